"""KLoM, the benchmark's distance to retraining, against numpy; and the benchmark itself, from training to table."""

import json
from pathlib import Path

import bench_klom
import klom
import numpy as np
import pytest
import rivals
import torch

# torch.func.jvp has some of its rules scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def distance(unlearned: np.ndarray, oracles: np.ndarray) -> float:
    """KL of two histograms over shared bins."""
    edges = np.linspace(min(unlearned.min(), oracles.min()), max(unlearned.max(), oracles.max()), 21)
    found, wanted = (np.histogram(one, edges)[0] / len(one) for one in (unlearned, oracles))
    return sum(p * np.log(p / max(q, 1e-5)) for p, q in zip(found, wanted, strict=True) if p)


@pytest.mark.parametrize("shift", [0.0, 0.5, 40.0])
def test_klom_is_the_kl_of_histograms_of_each_row(shift: float) -> None:
    draw = np.random.default_rng(0)
    unlearned, oracles = draw.normal(shift, 1.0, (60, 9)), draw.normal(0.0, 2.0, (50, 9))
    expected = [distance(one, other) for one, other in zip(unlearned.T, oracles.T, strict=True)]
    assert klom.klom(torch.from_numpy(unlearned), torch.from_numpy(oracles)).numpy() == pytest.approx(expected)


def test_klom_of_equal_margins_is_nothing_and_of_no_numbers_is_finite() -> None:
    same = torch.randn(8, 3, dtype=torch.float64)
    same[:, 2] = 1.0
    assert klom.klom(same, same).tolist() == [0.0, 0.0, 0.0]
    assert klom.klom(torch.full_like(same, torch.nan), same).tolist() == pytest.approx([np.log(1 / 1e-5)] * 3)


@pytest.mark.parametrize("net", klom.NETS)
def test_margins_are_the_log_odds_of_the_label(net: str) -> None:
    training = klom.Training(net, "sgd", wrong=True)
    weights = klom.new_models(training, [3, 4])
    pixels, labels = training.rows()
    chances = klom.single(training, weights, 1)(pixels).double().softmax(-1)[torch.arange(len(labels)), labels]
    odds = (chances / (1 - chances)).log()
    torch.testing.assert_close(klom.margins(training, weights)[1], odds.detach(), rtol=1e-4, atol=1e-4)


def test_ten_forget_sets_of_at_most_a_twentieth() -> None:
    sets = klom.forget_sets("mlp", "sgd")
    assert len(sets) == 10
    assert all(1 <= len(set(one.ids)) <= klom.ROWS / 20 and not set(one.ids) & set(one.retained) for one in sets)
    plain, wrong = (klom.Training("mlp", "sgd", wrong=wrong).rows()[1] for wrong in (False, True))
    mislabelled = next(one for one in sets if one.training.wrong)
    assert torch.nonzero(plain != wrong)[:, 0].tolist() == list(mislabelled.ids)


@pytest.mark.parametrize(("net", "optimizer"), [("mlp", "adamw"), ("conv", "sgd")])
def test_many_trained_at_once_are_those_trained_one_by_one(net: str, optimizer: str) -> None:
    training, ids = klom.Training(net, optimizer), range(100, klom.ROWS)
    pixels, labels = training.rows()
    together = klom.train(training, [5, 6], without=range(100), epochs=1)
    model = klom.new_model(net, 6)
    one_by_one = training.new_optimizer(list(model.parameters()), training.rate)
    steps = list(klom.batches(6, ids, 1))
    for step, (_, rows) in enumerate(steps):
        klom.set_rate(one_by_one, training.rate, step, len(steps))
        torch.nn.functional.cross_entropy(model(pixels[rows]), labels[rows]).backward()
        one_by_one.step()
        one_by_one.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name][1], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_curvature_of_the_hessian_free_step_is_the_gauss_newton_matrix() -> None:
    training = klom.Training("conv", "sgd")
    weights = {name: one.double() for name, one in klom.new_models(training, [1, 2]).items()}
    pixels = training.rows()[0][:6].double()
    vector = {name: torch.randn_like(one) for name, one in weights.items()}
    found = rivals._curved("conv", pixels, weights, 0.5, vector)

    def of_one(*values: torch.Tensor) -> torch.Tensor:
        return klom.ask("conv", dict(zip(weights, values, strict=True)), pixels)

    own, along = ([one[1] for one in ensemble.values()] for ensemble in (weights, vector))
    jacobians = [one.flatten(2) for one in torch.autograd.functional.jacobian(of_one, tuple(own))]
    whole = torch.cat(jacobians, 2)
    chances = of_one(*own).softmax(-1)
    inner = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    flat = torch.cat([one.flatten() for one in along])
    expected = torch.einsum("nap,nab,nbq,q->p", whole, inner, whole, flat) / len(pixels) + 0.5 * flat
    torch.testing.assert_close(torch.cat([one[1].flatten() for one in found.values()]), expected)


def test_kfac_blocks_are_the_second_moments_of_inputs_and_of_output_gradients() -> None:
    """A layer of zeros gives equal chances: with two values, output gradients are (1/2, -1/2) or its opposite."""
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    inputs = torch.randn(4000, 3)
    ((a, vectors), (b, others)) = rivals._blocks(model, inputs, torch.Generator().manual_seed(0))[model]
    with_ones = torch.cat([inputs, torch.ones(4000, 1)], 1)
    torch.testing.assert_close(
        vectors @ torch.diag(a) @ vectors.T, with_ones.T @ with_ones / 4000, rtol=1e-4, atol=1e-4
    )
    expected = torch.tensor([[0.25, -0.25], [-0.25, 0.25]])
    torch.testing.assert_close(others @ torch.diag(b) @ others.T, expected, rtol=1e-4, atol=1e-4)


def test_linear_response_is_the_derivative_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "EPOCHS", 1)
    rivals._trained.cache_clear()
    forget = klom.forget_sets("mlp", "sgd")[4]
    pixels, labels = forget.training.rows()
    pixels, leaving = pixels.double(), torch.tensor(forget.ids)
    steps = [ids for _, ids in klom.batches(8, range(klom.ROWS), 1)]
    begun = {name: one[0].double() for name, one in klom.new_models(forget.training, [8]).items()}

    def trained(left_out: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = begun
        pace = {name: torch.zeros_like(one) for name, one in weights.items()}
        for step, ids in enumerate(steps):
            counts = 1 - left_out * torch.isin(ids, leaving)

            def loss(own: dict[str, torch.Tensor], ids=ids, counts=counts) -> torch.Tensor:
                chances = klom.ask("mlp", own, pixels[ids]).log_softmax(-1)
                return -(counts * chances.gather(1, labels[ids, None])[:, 0]).sum() / len(ids)

            rate = forget.training.rate * min(1, (step + 1) / klom.WARM_UP) * (1 - step / len(steps))
            gradient = torch.func.grad(loss)(weights)
            pace = {name: 0.9 * one + gradient[name] for name, one in pace.items()}
            weights = {name: one - rate * pace[name] for name, one in weights.items()}
        return weights

    nothing = torch.tensor(0.0, dtype=torch.float64)
    _, expected = torch.func.jvp(trained, (nothing,), (torch.ones_like(nothing),))
    start = {name: torch.zeros_like(one)[None] for name, one in expected.items()}
    found = rivals.linear_response(forget, start, [8])
    rivals._trained.cache_clear()
    for name, one in expected.items():
        torch.testing.assert_close(found[name][0], one, rtol=2e-2, atol=1e-5)


def test_the_benchmark_goes_from_training_to_table_and_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--models", "2", "--sets", "random 5", "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    bench_klom.main(arguments)
    first = json.loads((tmp_path / "out.json").read_text())
    ways = first["random 5"]
    assert {bench_klom.NOTHING, bench_klom.ROLLBACK, *rivals.RIVALS, bench_klom.FLOOR, "80% of a retrain"} <= set(ways)
    assert all(0 <= one[kind] < 12 for one in ways.values() for kind in bench_klom.GOALS)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    bench_klom.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")} == kept
    assert json.loads((tmp_path / "out.json").read_text()) == first
    assert "rollback" in capsys.readouterr().out
