"""Rollback against retraining, on losses where the two must agree, and against everything that must be refused."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import timstore

ROWS, STEPS, BATCH = 12, 14, 4


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="first order only", category=timstore.TimstoreWarning)
        yield


class Linears(nn.Module):
    """Outputs, and with `linear` a loss, that are linear in the parameters: their gradients do not depend on them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, dtype=dtype)
        self.out = nn.Linear(7, 5, dtype=dtype)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.table(ids).flatten(1).sum(1) + self.out(x).sum(-1).sum(-1)  # type: ignore[no-any-return]


def batch_of(step: int, dtype: torch.dtype) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    ids = [(step * 5 + row * 3) % ROWS for row in range(BATCH)]
    data = torch.Generator().manual_seed(7)
    tokens, numbers = torch.randint(0, 9, (ROWS, 3), generator=data), torch.randn(ROWS, 2, 7, generator=data)
    return ids, tokens[ids], numbers[ids].to(dtype)


def groups_of(model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"params": model.table.parameters(), **options},  # type: ignore[union-attr]
        {"params": model.out.parameters(), **options, "weight_decay": 0.0, "lr": options["lr"] / 2},  # type: ignore[union-attr]
    ]


def train(
    options: dict[str, Any], dtype: torch.dtype, *, without: Sequence[int] = (), store: timstore.Store | None = None
) -> nn.Module:
    """Two epochs with a schedule and accumulation over two micro-batches; the divisor stays when samples go."""
    torch.manual_seed(0)
    model = Linears(dtype)
    optimizer = torch.optim.SGD(groups_of(model, options))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 4) * 0.95**step)

    def run(recorder: Any = None) -> None:
        for step in range(STEPS):
            if recorder is not None:
                recorder.epoch = step // 7
            for half in range(2):
                ids, tokens, numbers = batch_of(2 * step + half, dtype)
                kept = torch.tensor([one not in without for one in ids])
                extra = {"sample_ids": ids} if recorder is not None else {}
                ((model(ids=tokens, x=numbers, **extra) * kept).sum() / (2 * BATCH)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    if store is None:
        run()
    else:
        with store.record(model, optimizer) as recorder:
            run(recorder)
    return model


def distance(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


FAMILY = [
    {"lr": 0.1},
    {"lr": 0.1, "maximize": True, "weight_decay": 0.02},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
]


@pytest.mark.parametrize(
    ("options", "dtype", "limit"),
    [*((options, torch.float64, 1e-11) for options in FAMILY), (FAMILY[-1], torch.float32, 1e-5)],
)
def test_rollback_equals_retraining_when_the_loss_is_linear(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype, limit: float
) -> None:
    with timstore.open(tmp_path / "s") as store:
        model = train(options, dtype, store=store)
        assert distance(model, train(options, dtype)) == 0
        retrained = train(options, dtype, without=(3, 8))
        assert distance(model, retrained) > 1e-2
        store.rollback(model, [3, 8], accumulate="float64" if dtype == torch.float64 else "float32")
    assert distance(model, retrained) <= limit


@pytest.mark.usefixtures("none_open")
def test_decoupled_decay_recorded_by_hand_equals_its_own_recurrence(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    gradients = random.standard_normal((6, 2, 5))
    ends = []
    for samples in ((0, 1), (1,)):
        value = np.ones(5)
        for step in range(6):
            value = value * (1 - 0.1 * 0.3) - 0.1 * sum(gradients[step, sample] for sample in samples)
        ends.append(value)
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor(ends[0]))})
    with timstore.open(tmp_path / "s") as store:
        for step in range(6):
            for sample in range(2):
                store.append(0, step, sample, {"w": gradients[step, sample]})
            store.append_step(0, step, [{"lr": 0.1, "weight_decay": 0.3, "decoupled": True}], sample_ids=[0, 1])
        store.commit()
        report = timstore.rollback(model, [0], accumulate="float64")
    np.testing.assert_allclose(model["w"].detach().numpy(), ends[1], atol=1e-12)
    assert "not checked" in report.model


def recorded_mlp(store: timstore.Store, **options: Any) -> tuple[nn.Module, list[torch.Tensor]]:
    """A net whose gradients do depend on its parameters, clipped hard; and its initial parameters."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 3))
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, **options)
    torch.manual_seed(2)
    data, labels = torch.randn(10, 6), torch.randint(0, 3, (10,))
    with store.record(model, optimizer, probe=False) as recorder:
        for step in range(12):
            ids = [(step * 3 + row) % 10 for row in range(5)]
            recorder.batch(ids)
            nn.functional.cross_entropy(model(data[ids]), labels[ids]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
    return model, start


def test_removing_every_sample_returns_the_initial_parameters_clipping_included(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model, start = recorded_mlp(store)
        ratios = [row[0] for row in store.sql("SELECT consumed_ratio FROM steps").fetchall()]
        assert min(ratios) < 0.5
        report = store.rollback(model, where="true")
    for parameter, before in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(parameter.detach(), before, atol=2e-6, rtol=0)
    assert report.samples == tuple(range(10))
    assert report.delta_norm > 0.1


def test_strength_epochs_parameters_and_sql_choose_what_is_removed(tmp_path: Path) -> None:
    options = FAMILY[0]
    with timstore.open(tmp_path / "s") as store:
        model = train(options, torch.float64, store=store)
        whole = store.rollback(model, [3], dry_run=True)
        half = store.rollback(model, [3], strength=0.5, dry_run=True)
        assert half.delta_norm == pytest.approx(whole.delta_norm / 2)
        store.samples.update([{"sample": 3, "owner": "u-118"}, {"sample": 4, "owner": "u-7"}])
        by_owner = store.rollback(
            model, where="sample IN (SELECT sample FROM samples WHERE owner = 'u-118')", dry_run=True
        )
        assert by_owner.samples == (3,)
        assert by_owner.delta_norm == pytest.approx(whole.delta_norm)
        parts = [store.rollback(model, [3], epochs=[epoch], dry_run=True).records for epoch in (0, 1)]
        assert sum(parts) == whole.records
        assert min(parts) > 0
        before = [parameter.detach().clone() for parameter in model.parameters()]
        store.rollback(model, [3], parameters=["out.bias"])
        for (name, after), old in zip(model.named_parameters(), before, strict=True):
            assert torch.equal(after, old) == (name != "out.bias")


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_lossy_records_stay_within_the_error_that_the_report_states(tmp_path: Path, precision: str) -> None:
    exact_dir, lossy_dir = tmp_path / "exact", tmp_path / "lossy"
    with timstore.open(exact_dir) as exact, timstore.open(lossy_dir, precision=precision) as lossy:
        models = [recorded_mlp(store)[0] for store in (exact, lossy)]
        exact.rollback(models[0], [2, 5])
        report = lossy.rollback(models[1], [2, 5])
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    off = sum(float((one - other).detach().double().square().sum()) for one, other in pairs) ** 0.5
    assert 0 < off <= report.error_bound
    assert report.error_bound < 0.05 * report.delta_norm


def test_memory_limit_changes_nothing_but_memory(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model, _ = recorded_mlp(store)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        ends = []
        for limit in ("512MB", "17 MiB"):
            with torch.no_grad():
                for parameter, old in zip(model.parameters(), start, strict=True):
                    parameter.copy_(old)
            store.rollback(model, [1, 2], memory_limit=limit, force=True)
            ends.append([parameter.detach().clone() for parameter in model.parameters()])
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, atol=1e-7, rtol=0)
        with pytest.raises(timstore.InvalidInputError, match="memory_limit is 1,000,000 bytes"):
            store.rollback(model, [3], memory_limit="1MB")


def test_a_model_is_known_by_its_bits(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model, _ = recorded_mlp(store)
        report = store.rollback(model, [1])
        assert "by its fingerprint" in report.model
        with pytest.raises(timstore.StateError, match="removed from this model before"):
            store.rollback(model, [1])
        with pytest.warns(timstore.TimstoreWarning, match="undo the earlier one"):
            second = store.rollback(model, [1, 2])
        assert (second.samples, second.left_out) == ((2,), report.records)
        assert "1 samples removed before" in second.model
        rows = store.sql('SELECT samples, digest_before, digest_after FROM rollbacks ORDER BY "at"').fetchall()
        assert [row[0] for row in rows] == [[1], [2]]
        assert rows[0][2] == rows[1][1] == report.rollback_id
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1e-3
        with pytest.raises(timstore.ModelMismatchError, match="none that the store recorded"):
            store.rollback(model, [3])
        other = nn.Sequential(nn.Linear(6, 20))
        with pytest.raises(timstore.ModelMismatchError, match="has no parameter"):
            store.rollback(other, [3])


def test_two_rollbacks_equal_one_of_both(tmp_path: Path) -> None:
    options = FAMILY[4]
    models = []
    for number, requests in enumerate([[[3, 8]], [[3], [8]]]):
        with timstore.open(tmp_path / str(number)) as store:
            model = train(options, torch.float64, store=store)
            for ids in requests:
                store.rollback(model, ids, accumulate="float64")
            models.append(model)
    assert distance(*models) < 1e-14


def test_what_was_never_recorded_is_named_and_nothing_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, samples=[1, 2]) as recorder:
            recorder.batch([1, 2, 3])
            model(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(timstore.CoverageError, match=r"never drawn: 77; trained on without being recorded: 3"):
            store.rollback(model, [1, 3, 77])
        with pytest.raises(timstore.CoverageError, match="nothing to remove"):
            store.rollback(model, [3, 77], missing="skip")
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, old)
        assert store.rollback(model, [1, 3, 77], missing="skip").skipped == (3, 77)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": []}, "ids is empty"),
        ({"ids": None}, "say what to remove"),
        ({"ids": [1], "where": "true"}, "say what to remove"),
        ({"ids": [1.5]}, "must be an integer"),
        ({"ids": "1"}, "list of integers"),
        ({"ids": [1], "strength": 2}, "strength"),
        ({"ids": [1], "missing": "ignore"}, "missing"),
        ({"ids": [1], "accumulate": "float16"}, "accumulate"),
        ({"ids": [1], "memory_limit": "much"}, "memory_limit"),
        ({"ids": [1], "bins": 0}, "bins"),
        ({"ids": [1], "parameters": ["nothing"]}, "no parameter nothing"),
        ({"ids": None, "where": "sample = "}, "DuckDB says"),
        ({"ids": [1], "probe": []}, "probe is empty"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with timstore.open(tmp_path / "s") as store:
        model, _ = recorded_mlp(store)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(timstore.InvalidInputError, match=message):
            store.rollback(model, **arguments)
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, old)
        assert store.sql("SELECT count(*) FROM rollbacks").fetchall() == [(0,)]


def test_steps_without_a_rate_and_missing_steps_are_refused(tmp_path: Path) -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(3))})
    with timstore.open(tmp_path / "a") as store:
        store.append(0, 0, 1, {"w": np.ones(3, np.float32)})
        store.commit()
        with pytest.raises(timstore.CoverageError, match="has no learning rate"):
            store.rollback(model, [1])
    with timstore.open(tmp_path / "b") as store:
        store.append(0, 0, 1, {"w": np.ones(3, np.float32)})
        for step in (0, 2):
            store.append_step(0, step, [{"lr": 0.1, "momentum": 0.9}])
        store.commit()
        with pytest.raises(
            timstore.CoverageError, match="no step is recorded between epoch 0, step 0 and epoch 0, step 2"
        ):
            store.rollback(model, [1])


def test_an_optimizer_without_a_formula_is_refused_and_told_what_to_record(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer):
            model(torch.randn(2, 4), sample_ids=[1, 2]).sum().backward()
            optimizer.step()
        with pytest.raises(timstore.CoverageError, match=r"RMSprop.*optimizer_history='gradients'"):
            store.rollback(model, [1])


def test_a_store_that_was_opened_to_read_only_computes(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model, _ = recorded_mlp(store)
    with timstore.open(tmp_path / "s", "r") as store:
        with pytest.raises(timstore.ReadOnlyError):
            store.rollback(model, [1])
        assert store.rollback(model, [1], dry_run=True).delta_norm > 0


@pytest.mark.usefixtures("none_open")
def test_the_function_takes_a_store_a_path_or_the_only_open_one(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model, _ = recorded_mlp(store)
        wanted = timstore.rollback(model, [1], store, dry_run=True).delta_norm
        assert timstore.rollback(model, [1], dry_run=True).delta_norm == wanted
        with timstore.open(tmp_path / "other"), pytest.raises(timstore.StateError, match="2 stores are open"):
            timstore.rollback(model, [1])
    with pytest.raises(timstore.StateError, match="no store is open"):
        timstore.rollback(model, [1])
    assert timstore.rollback(model, [1], store=tmp_path / "s", dry_run=True).delta_norm == wanted
    with pytest.raises(timstore.NotFoundError):
        timstore.rollback(model, [1], store=tmp_path / "nowhere")


def test_a_corrupt_object_is_an_error_and_the_model_is_what_it_was(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model, _ = recorded_mlp(store)
    shard = max((tmp_path / "s").rglob("c/0/0"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with timstore.open(tmp_path / "s") as store, pytest.raises(timstore.CorruptionError, match="crc32"):
        store.rollback(model, [1, 2, 3])
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_a_probe_kept_at_recording_is_used_and_the_report_says_what_it_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data, labels = torch.randn(20, 6), torch.randint(0, 3, (20,))
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, probe=[torch.randn(8, 6), torch.randn(4, 6)]) as recorder:
            for step in range(10):
                ids = [(step * 7 + row) % 20 for row in range(10)]
                recorder.batch(ids)
                nn.functional.cross_entropy(model(data[ids]), labels[ids]).backward()
                optimizer.step()
                optimizer.zero_grad()
        report = store.rollback(model, [3, 4])
    assert report.method == "closed form + probe"
    assert report.probe is not None
    assert report.probe.sequences == 12
    assert report.probe.products > 4
    assert report.probe.moved > 0
    assert report.to_dict()["probe"]["loss_after"] == report.probe.loss_after
    assert "12 sequences" in str(report)
