"""A proof leaves training as it is, and finds the samples in models that make that hard."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import Batch
from stepwise import BOTH, BY_SAMPLE, IDS, PRICED, Model, Step, lstm, of, record, record_or_refuse, rows, weighted
from torch import nn
from torch.utils.checkpoint import checkpoint

import timstore
from timstore.errors import CoverageError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- training stays what it is --------------------------------------------------------------------------------------


def dropped_and_changed(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.inner(F.relu(F.dropout(x, 0.1, self.training), inplace=True)) + x
    return out


def masked_in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    """As transformers' Whisper does it with `apply_spec_augment`."""
    if self.training:
        x[:, torch.from_numpy(np.random.rand(x.shape[1]) < 0.4)] = 0
    out: torch.Tensor = self.inner(x)
    return out


def left_out(self: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in (self.inner, self.other):
        if not self.training or random.random() < 0.5:
            x = x + layer(x).tanh()
    out: torch.Tensor = self.last(x)
    return out


class Merging(nn.Module):
    """Adapters that are put into the weight when evaluation begins, as loralib's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
        self.adapter, self.merged = nn.Linear(6, 6, bias=False), False

    def train(self, mode: bool = True) -> Any:
        self.merged = not mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = x @ self.weight
        return plain if self.merged else plain + self.adapter(x)


def noisy(self: Any, x: torch.Tensor) -> torch.Tensor:
    noise = torch.rand(len(x), 1, 1) if self.training else 0
    out: torch.Tensor = self.other(self.inner(x) * (1 + noise))
    return out


class Remembering(nn.Module):
    """A layer of one's own that keeps an average, a counter and its last output beside its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.slow = nn.Parameter(torch.ones(6), requires_grad=False)
        self.mean, self.calls = torch.zeros(6), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
            self.slow.mul_(0.9).add_(self.scale, alpha=0.1)
        self.last = (x - self.mean) * self.scale * self.slow / self.calls
        return self.last


def batch_norm_in_checkpoint(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.last(checkpoint(self.inner, x, use_reentrant=False))
    return out


TRAININGS: dict[str, Callable[[], nn.Module]] = {
    "an argument changed after dropout": lambda: Model(dropped_and_changed, inner=nn.Linear(6, 6)),
    "an argument masked in place": lambda: Model(masked_in_place, inner=nn.Linear(6, 6)),
    "layers left out by chance": lambda: Model(
        left_out, inner=nn.Linear(6, 6), other=nn.Linear(6, 6), last=nn.Linear(6, 2)
    ),
    "what eval() does, behind noise": lambda: Model(noisy, inner=nn.Linear(6, 6), other=Merging()),
    "what a layer keeps beside buffers": lambda: Model(
        lambda self, x: self.other(self.inner(x)), inner=nn.Linear(6, 6), other=Remembering()
    ),
    "statistics within a checkpoint": lambda: Model(
        batch_norm_in_checkpoint, inner=nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5)), last=nn.Linear(6, 2)
    ),
}


@BOTH
@PRICED
@pytest.mark.filterwarnings("ignore:.*mixes the samples of a batch")
@pytest.mark.parametrize("name", TRAININGS)
def test_a_recorded_training_is_the_training_without(tmp_path: Path, name: str, options: Any) -> None:
    def train(recorded: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = TRAININGS[name]().train()
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
        given = [torch.randn(4, 5, 6) for _ in range(4)]

        def loop(**named: Any) -> None:
            for x in given:
                rows(model(x=x, **named)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        if recorded:
            with timstore.open(tmp_path / "s") as store, store.record(model, optimizer, **options):
                loop(sample_ids=IDS)
        else:
            loop()
        return [*(one.detach() for one in (*model.parameters(), *model.buffers())), *given]

    for plain, beside in zip(train(False), train(True), strict=True):
        assert torch.equal(plain, beside)


# --- the samples are found, or their place refused -------------------------------------------------------------------


def token_major(self: Any, x: torch.Tensor) -> torch.Tensor:
    turned = x.transpose(0, 1)
    out: torch.Tensor = self.layer(turned.flatten(0, 1)).view(*turned.shape[:2], -1).transpose(0, 1)
    return out


@BOTH
@pytest.mark.parametrize("mean", [0, 100, 300])
@pytest.mark.parametrize("tokens", [3, 4])
def test_samples_are_told_apart_that_have_much_in_common(tmp_path: Path, mean: int, tokens: int, options: Any) -> None:
    model = Model(token_major, layer=nn.Linear(64, 3))
    steps = [Step([{"x": mean + torch.randn(4, tokens, 64)}]) for _ in range(3)]
    record(tmp_path / "s", model, steps, **options)


def tokens_first(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.out(self.inner(x).tanh()).transpose(0, 1)
    return out


def tokens_first_directly(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.inner(x).transpose(0, 1).tanh() @ self.inner.weight.T
    return out


def of_columns(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.out(self.inner(x).tanh().mean(1))
    return out


@PRICED
@BOTH
@pytest.mark.parametrize("lengths", [[4, 4, 4], [6, 6, 4, 6]])
@pytest.mark.parametrize(
    ("forward", "columns"), [(tokens_first, 3), (tokens_first_directly, 3), (of_columns, 4)], ids=lambda it: str(it)[:9]
)
def test_an_output_with_as_many_tokens_or_classes_as_rows_is_proved(
    tmp_path: Path, lengths: list[int], forward: Any, columns: int, options: Any
) -> None:
    model = Model(forward, inner=nn.Linear(6, 6), out=nn.Linear(6, columns))
    turn = (lambda y: y) if forward is of_columns else (lambda y: y.transpose(0, 1))
    loss = weighted(lambda output: rows(turn(output)))
    record(tmp_path / "s", model, [of(length, 6, loss=loss) for length in lengths], **options)


@PRICED
@BOTH
def test_every_micro_batch_of_a_proof_step_is_proved(tmp_path: Path, options: Any) -> None:
    """The second task of each step goes through the layers in another order of rows."""
    model = Model(lambda self, x, turned: self._way(x, turned), inner=nn.Linear(6, 6), out=nn.Linear(6, 2))
    model._way = lambda x, turned: (
        model.out(model.inner(x.flip(0)).tanh()).flip(0) if turned else model.out(model.inner(x).tanh())
    )
    batches = [{"x": torch.randn(4, 5, 6), "turned": False}, {"x": torch.randn(4, 5, 6), "turned": True}]
    record(tmp_path / "s", model, [Step(batches, [IDS, [1, 3, 4, 6]]) for _ in range(3)], **options)


@BOTH
def test_a_layer_that_gives_back_what_it_got_adds_nothing(tmp_path: Path, options: Any) -> None:
    class Skipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.skips = nn.Parameter(torch.ones(6)), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.skips else x * self.scale

    model = Model(
        lambda self, x: self.out(self.own(self.inner(x))), inner=nn.Linear(6, 6), own=Skipped(), out=nn.Linear(6, 2)
    )
    skip = lambda value: lambda model: setattr(model.own, "skips", value)  # noqa: E731
    record(tmp_path / "s", model, [of(5, 6, prepare=skip(value)) for value in (False, True, False)], **options)


@pytest.mark.parametrize("turn", [lambda x: x.flip(0), lambda x: x.roll(1, 0)])
def test_two_rows_exchanged_inside_need_a_pass_of_each_sample(tmp_path: Path, turn: Any) -> None:
    model = Model(
        lambda self, x: turn(self.out(turn(self.inner(x).tanh()))), inner=nn.Linear(6, 6), out=nn.Linear(6, 2)
    )
    steps = [Step([{"x": torch.randn(2, 5, 6)}], [[3, 9]]) for _ in range(3)]
    record_or_refuse(tmp_path, model, steps, "out")


@BOTH
def test_large_numbers_in_half_precision_are_summed_without_overflow(tmp_path: Path, options: Any) -> None:
    model = Model(lambda self, x: self.out(self.table(x).mean(1)), table=nn.Embedding(500, 8), out=nn.Linear(8, 2))

    def half(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        with torch.autocast(torch.get_default_device().type, torch.float16):
            return (rows(model(**batch).float()) * weights).mean()

    record(tmp_path / "s", model, [Step([{"x": torch.randint(0, 500, (4, 512))}], loss=half, limit=1e-2)], **options)


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min])
def test_outputs_may_hold_what_stands_for_nothing(tmp_path: Path, fill: float) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.lstm(x)[0])
        return logits.masked_fill(torch.arange(3) == 1, fill)

    each = lambda model, batch, weights: (model(**batch).softmax(-1)[..., 0].sum(1) * weights).mean()  # noqa: E731
    record(tmp_path / "s", Model(forward, lstm=lstm(), head=nn.Linear(6, 3)), [of(5, 6, loss=each)] * 2, **BY_SAMPLE)


@BOTH
def test_a_matrix_for_all_rows_is_not_the_batch_when_it_is_as_long(tmp_path: Path, options: Any) -> None:
    model = Model(lambda self, x, mixing: mixing @ self.inner(x), inner=nn.Linear(6, 6))
    steps = [of(tokens, 6) for tokens in (5, 4, 3)]
    for step in steps:
        tokens = step.batches[0]["x"].shape[1]
        step.batches[0]["mixing"] = torch.rand(tokens, tokens)
    record(tmp_path / "s", model, steps, **options)


@pytest.mark.parametrize("lengths", [[16, 1, 1, 1], [1, 16, 1, 1]], ids=str)
def test_rows_that_are_mostly_padding_are_proved(tmp_path: Path, lengths: list[int]) -> None:
    def forward(self: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pooled = (self.table(x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        out: torch.Tensor = self.out(pooled)
        return out

    model = Model(forward, table=nn.Embedding(20, 6), out=nn.Linear(6, 2))
    mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).float()
    record(tmp_path / "s", model, [Step([{"x": torch.randint(0, 20, (4, 16)), "mask": mask}])] * 2)


def test_an_output_whose_samples_cannot_be_found_is_refused_when_the_loss_takes_it(tmp_path: Path) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        hidden = self.lstm(x)[0]
        return self.head(hidden.mean(1)), hidden[:, ::2].flatten(0, 1)

    def both(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        logits, states = model(**batch)
        return ((rows(logits) + rows(states.view(4, -1, 6))) * weights).mean()

    model = Model(forward, lstm=lstm(), head=nn.Linear(6, 2))
    with pytest.raises(CoverageError, match="the loss takes 1 of the model"):
        record(tmp_path / "s", model, [of(tokens, 6, loss=both) for tokens in (6, 6, 8)], **BY_SAMPLE)


@BOTH
def test_an_own_layer_may_fold_tokens_away(tmp_path: Path, options: Any) -> None:
    pool = Model(lambda self, x, count: (x * self.scale).view(count, -1, 6).mean(1), scale=nn.Parameter(torch.rand(6)))
    forward = lambda self, x: self.out(self.pool(x.flatten(0, 1), len(x)))  # noqa: E731
    record(tmp_path / "s", Model(forward, pool=pool, out=nn.Linear(6, 2)), [of(5, 6), of(3, 6)], **options)


# --- what is rounding, and what is not ------------------------------------------------------------------------------


@pytest.mark.parametrize("used_directly", [False, True])
def test_a_gradient_far_below_the_others_is_held_to_its_parts(tmp_path: Path, used_directly: bool) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        small = self.small(x) + (x @ self.small.weight.T if used_directly else 0)
        out: torch.Tensor = self.large(x) + 3e-8 * small
        return out

    model = Model(forward, large=nn.Linear(6, 2), small=nn.Linear(6, 2))
    if not used_directly:
        record(tmp_path / "s", model, [of(5, 6), of(4, 6)], capture="modules")
        return
    with pytest.raises(CoverageError, match=r"small\.weight.*add up to something else"):
        record(tmp_path / "s", model, [of(5, 6)], capture="modules")


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@BOTH
def test_a_gradient_that_is_zero_but_for_rounding_is_no_evidence(tmp_path: Path, scale: float, options: Any) -> None:
    # Softmax takes no notice of what is added to all of its arguments, so that the keys' bias has no gradient.
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        out: torch.Tensor = self.out(weights @ x)
        return out

    model = Model(forward, query=nn.Linear(6, 6), key=nn.Linear(6, 6), out=nn.Linear(6, 2))

    def loss(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        return scale * (rows(model(**batch)) * weights).mean()

    record(tmp_path / "s", model, [of(5, 6, loss=loss), of(3, 6, loss=loss)], **options)
