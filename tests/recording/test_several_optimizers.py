"""One model, several optimizers: each step of each is recorded, and a rollback ends where training without ends."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import hooks, sgd
from torch import nn

import timstore
from timstore.errors import CoverageError, InvalidInputError, StateError, TimstoreWarning
from timstore.model.fingerprints import digests
from timstore.records import Parameter

Optimizers = list[torch.optim.Optimizer]
Clip = Callable[[nn.Module, Optimizers], Any]

X = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GONE = (1, 4, 5)


class Linear(nn.Module):
    """Returns losses that are linear in every parameter: what a sample did is known without training again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(6, 6).double()
        self.head = nn.Linear(6, 3).double()

    def forward(self, x: torch.Tensor, sample_ids: Any = None) -> torch.Tensor:
        return self.encoder(x).sum(1) * x[:, 0] + self.head(x).sum(1) * x[:, 1]


def momentum_and_decay(model: Any) -> Optimizers:
    return [
        torch.optim.SGD(model.encoder.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(model.head.parameters(), lr=0.05, weight_decay=0.01),
    ]


def sgd_and_adamw(model: Any) -> Optimizers:
    return [
        torch.optim.SGD(model.encoder.parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(model.head.parameters(), lr=0.05),
    ]


def muon_and_adamw(model: Any) -> Optimizers:
    matrices = [one for one in model.parameters() if one.ndim == 2]
    return [
        torch.optim.Muon(matrices, lr=0.1),
        torch.optim.AdamW([one for one in model.parameters() if one.ndim == 1], lr=0.05),
    ]


def three(model: Any) -> Optimizers:
    return [
        torch.optim.SGD([model.encoder.weight], lr=0.1, nesterov=True, momentum=0.8),
        torch.optim.SGD(
            [{"params": [model.encoder.bias]}, {"params": [model.head.bias], "momentum": 0.5}],
            lr=0.02,
            weight_decay=0.1,
        ),
        torch.optim.SGD([model.head.weight], lr=0.3, maximize=True),
    ]


def one_norm(model: nn.Module, _: Optimizers) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.5)


def norm_of_each(_: nn.Module, optimizers: Optimizers) -> None:
    for optimizer in optimizers:
        nn.utils.clip_grad_norm_([one for group in optimizer.param_groups for one in group["params"]], 1.0)


def trained(
    store: timstore.Store | None,
    make: Callable[[Any], Optimizers],
    *,
    clip: Clip | None = None,
    every: Sequence[int] = (1, 1, 1),
    without: Sequence[int] = (),
    history: str = "final",
) -> tuple[Linear, Optimizers]:
    """Train on four batches, with a recorder or by itself; optimizer k steps after every `every[k]` batches."""
    model = Linear()
    optimizers = make(model)
    recorder = None if store is None else store.record(model, optimizers, optimizer_history=history).__enter__()
    for number, ids in enumerate(torch.arange(12).split(3)):
        kept = torch.tensor([one not in without for one in ids.tolist()], dtype=torch.float64)
        losses = model(X[ids]) if recorder is None else model(X[ids], sample_ids=ids)
        (losses * kept / len(ids)).sum().backward()
        if clip is not None:
            clip(model, optimizers)
        for optimizer, count in zip(optimizers, every, strict=False):
            if (number + 1) % count == 0:
                optimizer.step()
                optimizer.zero_grad()
    if recorder is not None:
        recorder.__exit__(None, None, None)
    return model, optimizers


def assert_alike(model: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=tolerance), name


def assert_states_alike(optimizers: Optimizers, others: Optimizers) -> None:
    for one, other in zip(optimizers, others, strict=True):
        for mine, theirs in zip(one.state.values(), other.state.values(), strict=True):
            for key, numbers in mine.items():
                if isinstance(numbers, torch.Tensor):
                    assert torch.allclose(numbers, theirs[key], rtol=0, atol=1e-12), key


EXACT: dict[str, dict[str, Any]] = {
    "two of SGD": {"make": momentum_and_decay},
    "three, five groups": {"make": three},
    "at different times": {"make": momentum_and_decay, "every": (1, 2)},
    "at different times, the other way round": {"make": momentum_and_decay, "every": (4, 1)},
    "one norm over both": {"make": momentum_and_decay, "clip": one_norm},
    "one norm over three": {"make": three, "clip": one_norm},
    "a norm of each": {"make": momentum_and_decay, "clip": norm_of_each},
    "one norm, every gradient": {"make": momentum_and_decay, "clip": one_norm, "history": "gradients"},
    "SGD and AdamW": {"make": sgd_and_adamw, "history": "gradients"},
    "SGD and AdamW, at different times": {"make": sgd_and_adamw, "history": "gradients", "every": (2, 1)},
    "SGD and AdamW, one norm": {"make": sgd_and_adamw, "history": "gradients", "clip": one_norm},
    "Muon and AdamW": {"make": muon_and_adamw, "history": "gradients"},
    "Muon and AdamW, one norm": {"make": muon_and_adamw, "history": "gradients", "clip": one_norm},
}


@pytest.mark.filterwarnings("ignore::timstore.TimstoreWarning")
@pytest.mark.parametrize("name", EXACT)
def test_a_rollback_ends_where_training_without_the_samples_ends(store: timstore.Store, name: str) -> None:
    case = EXACT[name]
    if case["make"] is muon_and_adamw and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model, optimizers = trained(store, **case)
    other, others = trained(None, **{key: one for key, one in case.items() if key != "history"}, without=GONE)
    report = store.rollback(model, GONE, optimizer=optimizers, accumulate="float64")
    assert_alike(model, other)
    assert_states_alike(optimizers, others)
    assert report.clipping == ("followed" if "clip" in case else "none")


@pytest.mark.filterwarnings("ignore::timstore.TimstoreWarning")
def test_sgd_beside_adam_is_exact_by_its_scalars_alone(store: timstore.Store) -> None:
    model, optimizers = trained(store, sgd_and_adamw)
    other, others = trained(None, sgd_and_adamw, without=GONE)
    report = store.rollback(model, GONE, optimizer=optimizers, accumulate="float64")
    assert report.method == "final moment"
    assert_alike(model.encoder, other.encoder)
    assert_states_alike(optimizers[:1], others[:1])
    exp_avg = [[one.state[p]["exp_avg"] for p in one.param_groups[0]["params"]] for one in (optimizers[1], others[1])]
    assert all(torch.allclose(one, two, atol=1e-12) for one, two in zip(*exp_avg, strict=True))


def test_each_step_of_each_optimizer_is_a_step_of_its_own(store: timstore.Store) -> None:
    trained(store, three, every=(1, 1, 2))
    rows = store.sql(
        "SELECT step, list(group_id ORDER BY group_id), first(sample_ids) FROM steps GROUP BY step"
    ).fetchall()
    first, second = [0, 1, 2], [3, 4, 5]
    assert sorted(rows)[:5] == [
        (0, [0], first),
        (1, [1, 2], first),
        (2, [0], second),
        (3, [1, 2], second),
        (4, [3], first + second),
    ]
    assert store.sql("SELECT parameter, group_id FROM parameters ORDER BY group_id").fetchall() == [
        ("encoder.weight", 0),
        ("encoder.bias", 1),
        ("head.bias", 2),
        ("head.weight", 3),
    ]
    held = store.sql(
        "SELECT step, list(DISTINCT parameter) FROM gradients WHERE step IN (0, 4) GROUP BY step ORDER BY step"
    )
    assert held.fetchall() == [(0, ["encoder.weight"]), (4, ["head.weight"])]


def test_the_records_of_both_add_up_to_the_gradients(store: timstore.Store) -> None:
    model, optimizers = Linear(), None
    optimizers = momentum_and_decay(model)
    with store.record(model, optimizers):
        ids = torch.arange(4)
        model(X[ids], sample_ids=ids).mean().backward()
        expected = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        for optimizer in optimizers:
            optimizer.step()
    for name, gradient in expected.items():
        step = 0 if name.startswith("encoder") else 1
        parts = [torch.from_numpy(store.gradient(0, step, one, name)) for one in range(4)]
        assert torch.allclose(torch.stack(parts).sum(0), gradient, atol=1e-12)


# --- GAN ---------------------------------------------------------------------------------------------------


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.generator = nn.Linear(3, 6).double()
        self.critic = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, real: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
        if real is None:
            out: torch.Tensor = -self.critic(self.generator(noise))[:, 0]
            return out
        difference: torch.Tensor = self.critic(self.generator(noise).detach())[:, 0] - self.critic(real)[:, 0]
        return difference


def trained_gan(
    store: timstore.Store, kind: Any, freeze: bool
) -> tuple[Gan, Optimizers, list[dict[str, torch.Tensor]]]:
    """Two steps of the critic for each one of the generator; returns the gradients of every step too."""
    model = Gan()
    optimizers = [kind(model.critic.parameters(), lr=0.1), kind(model.generator.parameters(), lr=0.1)]
    noise = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    consumed = []

    def step(number: int) -> None:
        consumed.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
        optimizers[number].step()

    with store.record(model, optimizers):
        for number, ids in enumerate(torch.arange(12).split(4)):
            for _ in range(2):
                optimizers[0].zero_grad()
                model(X[ids], noise[ids], sample_ids=ids).mean().backward()
                step(0)
            optimizers[1].zero_grad()
            model.critic.requires_grad_(not freeze)
            model(None, noise[(ids + number) % 12], sample_ids=ids).mean().backward()
            model.critic.requires_grad_(True)
            step(1)
    return model, optimizers, consumed


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_critic_steps_twice_for_each_step_of_its_generator(store: timstore.Store, kind: Any, freeze: bool) -> None:
    model, _, consumed = trained_gan(store, kind, freeze)
    steps = store.sql("SELECT step, group_id FROM steps ORDER BY step").fetchall()
    assert steps == [(number, int(number % 3 == 2)) for number in range(9)]
    for step, gradients in enumerate(consumed):
        mine = "generator" if step % 3 == 2 else "critic"
        ids = range(4 * (step // 3), 4 * (step // 3) + 4)
        for name in (one for one, _ in model.named_parameters() if one.startswith(mine)):
            parts = [torch.from_numpy(store.gradient(0, step, one, name)).double() for one in ids]
            assert torch.allclose(torch.stack(parts).sum(0), gradients[name], atol=1e-12)


@pytest.mark.filterwarnings("ignore::timstore.TimstoreWarning")
def test_a_gan_without_every_sample_is_the_one_that_never_trained(store: timstore.Store) -> None:
    model, optimizers, _ = trained_gan(store, torch.optim.SGD, freeze=False)
    store.rollback(model, range(12), optimizer=optimizers, accumulate="float64")
    assert_alike(model, Gan())


# --- what else is trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_with_a_gradient_in_no_recorded_optimizer_is_refused_at_the_first_step(
    store: timstore.Store, frozen: bool
) -> None:
    model = Linear()
    model.head.requires_grad_(not frozen)
    optimizer = sgd(model.encoder)
    before = Linear()

    def step() -> None:
        model(X[:2], sample_ids=[1, 2]).mean().backward()
        optimizer.step()

    with store.record(model, optimizer):
        if frozen:
            step()
        else:
            with pytest.raises(CoverageError, match=r"head\.weight gets a gradient.*record\(model, \[one, two\]\)"):
                step()
            assert_alike(model, before, 0)
    assert store.sql("SELECT count(*) FROM records").fetchall() == [(2 * frozen,)]


def test_an_encoder_and_a_head_with_a_frozen_rest(store: timstore.Store) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    model[2].requires_grad_(False)
    first = [one.detach().clone() for one in model.parameters()]
    optimizers = [sgd(model[0], momentum=0.9), sgd(model[4], lr=0.01)]
    with store.record(model, optimizers):
        for ids in torch.arange(12).split(3):
            model(X[ids], sample_ids=ids).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    with pytest.warns(TimstoreWarning, match="first order"):
        store.rollback(model, range(12), accumulate="float64")
    assert all(torch.allclose(one, began, atol=1e-12) for one, began in zip(model.parameters(), first, strict=True))


def test_what_cannot_be_recorded_together_is_refused(store: timstore.Store) -> None:
    model = Linear()
    encoder, head = sgd(model.encoder), sgd(model.head)
    refused: list[tuple[Any, str]] = [
        ([encoder, sgd(model)], r"encoder\.weight is trained by two of the optimizers"),
        ([encoder, encoder], r"encoder\.weight is trained by two"),
        ([encoder, sgd(nn.Linear(2, 2))], r"optimizer 1 of the list holds none"),
        ([encoder, "adam"], r"a torch\.optim\.Optimizer, or a list of them, not str"),
        ([], "empty"),
    ]
    for given, said in refused:
        with pytest.raises(InvalidInputError, match=said):
            store.record(model, given)
    with store.record(model, [encoder, head]):
        with pytest.raises(StateError, match="one block records all"), store.record(model, head):
            pass
        model(X[:2], sample_ids=[1, 2]).mean().backward()
        head.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        encoder.step()
        with pytest.raises(CoverageError, match="other groups than when recording began"):
            head.step()
    assert hooks(model, encoder) == 0


def test_a_rollback_is_given_the_optimizers_that_trained(store: timstore.Store) -> None:
    model, optimizers = trained(store, sgd_and_adamw)
    before = Linear()
    before.load_state_dict(model.state_dict())
    swapped = [torch.optim.AdamW(model.encoder.parameters()), torch.optim.SGD(model.head.parameters(), lr=0.1)]
    refused: list[tuple[Any, str]] = [
        (optimizers[0], r"does not hold parameter head\.\w+ of this model.*optimizer=\[one, two\]"),
        (swapped, r"encoder\.\w+ is held by a AdamW, and was trained by a SGD"),
        (sgd_and_adamw(model), "no state yet"),
        ([*optimizers, torch.optim.Adagrad(model.parameters())], "is a Adagrad"),
    ]
    for given, said in refused:
        with pytest.raises(InvalidInputError, match=said):
            store.rollback(model, GONE, optimizer=given)
    assert_alike(model, before, 0)


def test_a_lost_step_of_one_optimizer_is_a_gap(tmp_path: Path) -> None:
    gradient = {"a": torch.ones(2).numpy()}
    for lost, refused in (2, True), (None, False):
        with timstore.open(tmp_path / f"{lost}.tim") as store:
            store.declare([Parameter("a", (2,), "float32", 0), Parameter("b", (2,), "float32", 1)])
            for step in range(6):
                if step != lost:
                    group = {"group_id": step % 2, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9}
                    store.append_step(0, step, [group], sample_ids=[1 if step == 0 else 2])
                if step == 0:
                    store.append(0, 0, 1, gradient)
            model = nn.Module()
            model.a, model.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
            store.append_fingerprints(0, 5, digests(model))
            store.commit()
            if refused:
                with pytest.raises(CoverageError, match="between epoch 0, step 1 and epoch 0, step 3"):
                    store.rollback(model, [1])
            else:
                with pytest.warns(TimstoreWarning):
                    store.rollback(model, [1])
                # Momentum 0.9 over the three steps of its own optimizer.
                assert torch.allclose(model.a, torch.full((2,), 0.1 * (1 + 0.9 + 0.81)))
