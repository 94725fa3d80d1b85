"""What the first step cannot show: losses, layouts, sizes and routes that change from step to step.

The claim: a record that is wrong is never written silently. Every record that a store holds when its recording is over,
or was refused on the way, is held to autograd one sample at a time.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coverage_models import Applied, Checkpointed, folded, folded_by_token
from networks import Net, sgd
from references import Batch, Loss
from stepwise import (
    BOTH,
    BY_SAMPLE,
    FLOAT32,
    HALF,
    IDS,
    MODULES,
    PRICED,
    Model,
    Step,
    lstm,
    of,
    record,
    record_or_refuse,
    rows,
    sized,
    skip_without_bfloat16_lstm,
    weighted,
)
from torch import nn

import timstore
from timstore.errors import CoverageError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- what the loss takes of the model's outputs ----------------------------------------------------------------


Output = make_dataclass("Output", ["hidden", "pooled", "logits"])


def as_tuple(**outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(outputs.values())


def chained(form: Callable[..., Any]) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> Any:
        hidden = self.lstm(x)[0]
        pooled = self.pool(hidden.mean(1)).tanh()
        return form(hidden=hidden, pooled=pooled, logits=self.head(pooled))

    return Model(forward, lstm=lstm(), pool=nn.Linear(6, 5), head=nn.Linear(5, 3))


def taking(names: str) -> Loss:
    def each(output: Any) -> torch.Tensor:
        named = output if isinstance(output, dict) else getattr(output, "__dict__", None)
        named = named or dict(zip(("hidden", "pooled", "logits"), output, strict=True))
        return torch.stack([rows(named[name]) for name in names.split()]).sum(0)

    return weighted(each)


@pytest.mark.parametrize("form", [as_tuple, dict, SimpleNamespace, Output])
@pytest.mark.parametrize("first", ["logits", "pooled", "hidden", "hidden logits", "hidden pooled logits"])
def test_outputs_that_are_made_of_each_other_are_counted_once(tmp_path: Path, first: str, form: Any) -> None:
    later = ["pooled", "hidden pooled", "logits", "hidden", "hidden pooled logits"]
    record(tmp_path / "s", chained(form), [of(5, 6, loss=taking(names)) for names in (first, *later)], **BY_SAMPLE)


@pytest.mark.parametrize("takes", [([0], [0, 1], [1]), ([0, 1], [1], [0])], ids=["later", "from the start"])
def test_a_second_head_may_join_the_loss(tmp_path: Path, takes: tuple[list[int], ...]) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        hidden = self.lstm(x)[0]
        return self.first(hidden), self.second(hidden) @ self.second.weight

    model = Model(forward, lstm=lstm(), first=nn.Linear(6, 2), second=nn.Linear(6, 3))
    losses = [weighted(lambda output, take=take: sum(rows(output[one]) for one in take)) for take in takes]  # type: ignore[misc]
    record(tmp_path / "s", model, [of(5, 6, loss=loss) for loss in losses], **BY_SAMPLE)


def test_the_hidden_states_of_all_layers_may_be_returned(tmp_path: Path) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        states = [x, first := self.first(x)[0], self.second(first)[0]]
        return self.head(states[-1]), states

    model = Model(forward, first=lstm(), second=lstm(), head=nn.Linear(6, 2))
    of_head = weighted(lambda output: rows(output[0]))
    of_all = weighted(lambda output: rows(output[0]) + sum(rows(one) for one in output[1][1:]))
    record(tmp_path / "s", model, [of(5, 6, loss=loss) for loss in (of_head, of_all, of_head)], **BY_SAMPLE)


@BOTH
@pytest.mark.parametrize("uses", [("one", "both"), ("both", "other", "one")], ids=str)
def test_of_two_passes_in_one_block_any_may_be_used(tmp_path: Path, uses: tuple[str, ...], options: Any) -> None:
    def used(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        one, other = rows(model(batch["x"])), rows(model(batch["y"]))
        return ({"one": one, "other": other, "both": one * other}[batch["use"]] * weights).mean()

    forward = lambda self, x: self.head(self.lstm(x)[0] if options else x.tanh())  # noqa: E731
    model = Model(forward, head=nn.Linear(6, 2), **({"lstm": lstm()} if options else {}))
    steps = [of(5, 6, loss=used) for _ in uses]
    for step, use in zip(steps, uses, strict=True):
        step.batches[0].update(y=torch.randn(4, 3, 6), use=use)
    record(tmp_path / "s", model, steps, block=True, **options)


# --- where the batch is ------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("lengths", [(5, 4), (4, 5, 4)], ids=str)
def test_another_argument_of_as_many_rows_is_not_the_batch(tmp_path: Path, lengths: Any, options: Any) -> None:
    places = torch.arange(30.0).view(5, 6) / 9
    forward = lambda self, x: self.out(self.places(self.layer(x), places[: x.shape[1]]))  # noqa: E731
    own = Model(lambda self, x, places: x + self.weight * places, weight=nn.Parameter(torch.rand(6)))
    model = Applied(forward, layer=nn.Linear(6, 6), places=own, out=nn.Linear(6, 2))
    record(tmp_path / "s", model, [of(length, 6) for length in lengths], **options)


def turned(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a layer with the batch on axis 1."""
    out: torch.Tensor = layer(x.transpose(0, 1)).transpose(0, 1)
    return out


LATE: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "on axis 1": lambda self, x: turned(self.late, x) if x.shape[1] < 5 else 0,
    "on axis 0": lambda self, x: self.late(x) if x.shape[1] < 5 else 0,
}


@BOTH
@pytest.mark.parametrize("name", LATE)
def test_a_layer_that_is_not_reached_at_first_is_proved_when_it_is(tmp_path: Path, name: str, options: Any) -> None:
    forward = lambda self, x: self.always(x).tanh() + LATE[name](self, x.tanh())  # noqa: E731
    model = Model(forward, always=nn.Linear(6, 6), late=nn.Linear(6, 6))
    record(tmp_path / "s", model, [of(5, 6), of(5, 6), of(4, 6), of(3, 6)], **options)


AT_TIMES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "is first used later, directly too": lambda self, x: self.late(x) @ self.late.weight if x.shape[1] < 5 else 0,
    "has the batch on two axes": lambda self, x: self.late(x) + turned(self.late, x),
}


@pytest.mark.parametrize("name", AT_TIMES)
def test_a_layer_needs_a_pass_of_each_sample_where_it(tmp_path: Path, name: str) -> None:
    forward = lambda self, x: self.always(x).tanh() + AT_TIMES[name](self, x.tanh())  # noqa: E731
    model = Model(forward, always=nn.Linear(6, 6), late=nn.Linear(6, 6))
    # The second step is looked at like the first one.
    record_or_refuse(tmp_path / "other lengths", model, [of(5, 6), of(5, 6), of(4, 6), of(3, 6)], "late")
    if "first" not in name:
        record_or_refuse(tmp_path / "as many tokens as samples", model, [of(4, 6), of(4, 6)], "late")


def shuffled(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a layer on the rows in another order."""
    order = torch.tensor([2, 0, 3, 1])
    out: torch.Tensor = layer(x[order])[order.argsort()]
    return out


@BOTH
@pytest.mark.parametrize("tokens", [3, 4])
def test_a_layer_is_proved_as_it_runs_in_training(tmp_path: Path, tokens: int, options: Any) -> None:
    forward = lambda self, x: self.always(x).tanh() + (turned(self.late, x) if self.training else 0)  # noqa: E731
    model = Model(forward, always=nn.Linear(6, 6), late=nn.Linear(6, 6))
    record(tmp_path / "s", model, [of(tokens, 6)] * 2, **options)


@pytest.mark.skipif(
    torch.get_default_device().type == "cuda",
    reason="there an index out of range ends the process",
)
def test_rows_in_another_order_in_training_only_need_a_pass_of_each_sample(tmp_path: Path) -> None:
    forward = lambda self, x: shuffled(self.layer, x) if self.training else self.layer(x)  # noqa: E731
    record_or_refuse(tmp_path, Model(forward, layer=nn.Linear(6, 3)), [of(5, 6)] * 2, "layer")


def by_length(self: Any, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    order = lengths.sort(descending=True, stable=True).indices
    out: torch.Tensor = self.layer(x[order].tanh())[order.argsort()]
    return out


JOINING: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "a weight used directly": lambda self, x: self.layer(x) + (x @ self.layer.weight if x.shape[1] == 4 else 0),
    "the batch on another axis": lambda self, x: self.layer(x) if x.shape[1] == 5 else turned(self.layer, x),
    "a table of as many rows": lambda self, x: (
        self.layer(x) + (self.layer(torch.arange(24.0).view(4, 6)).sum(0) if x.shape[1] == 4 else 0)
    ),
}


@BOTH
@PRICED
@pytest.mark.parametrize("name", JOINING)
def test_what_joins_in_the_second_step_is_refused_or_right(tmp_path: Path, name: str, options: Any) -> None:
    model = Model(JOINING[name], layer=nn.Linear(6, 6))
    try:
        record(tmp_path / "s", model, [of(5, 6), of(4, 6)], **options)
    except CoverageError as error:
        assert "add up to something else" in str(error) or "another axis" in str(error) or "layer" in str(error)


@BOTH
@PRICED
def test_rows_that_are_sorted_inside_are_noticed_when_the_order_changes(tmp_path: Path, options: Any) -> None:
    model = Model(by_length, layer=nn.Linear(6, 3))
    steps = [of(5, 6) for _ in range(2)]
    steps[0].batches[0]["lengths"] = torch.tensor([5, 5, 5, 5])
    steps[1].batches[0]["lengths"] = torch.tensor([3, 5, 2, 4])
    record(tmp_path / "s", model, steps, **options)
    with pytest.raises(CoverageError, match="does not follow the order of the batch's rows"):
        record(tmp_path / "refused", model, steps, **MODULES)


@BOTH
def test_sums_are_held_to_the_gradient_again_after_ten_steps(tmp_path: Path, options: Any) -> None:
    """What joins between two proofs is found at the next one: the eleventh step is one."""
    steps = [of(5, 6) for _ in range(10)] + [of(4, 6)]
    model = Model(JOINING["a weight used directly"], layer=nn.Linear(6, 6))
    if options:
        record(tmp_path / "s", model, steps, **options)
    else:
        with pytest.raises(CoverageError, match=r"add up to something else.*resume_from=\(0, 2\)"):
            record(tmp_path / "s", model, steps)


LAYOUTS: dict[str, Callable[..., torch.Tensor]] = {
    "(B * T, d)": folded,
    "(T * B, d)": folded_by_token,
    "(T, B, d)": lambda self, x: turned(self.norm, turned(self.layer, x).tanh()),
}


@pytest.mark.parametrize("options", [{}, BY_SAMPLE, {"samples": [7, 9]}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [(4, 3), (4, 4), (1, 3), (2, 2)], ids=str)
def test_batches_may_change_in_size_and_length(tmp_path: Path, layout: str, first: Any, options: Any) -> None:
    model = Applied(LAYOUTS[layout], layer=nn.Linear(6, 5), norm=nn.LayerNorm(5))
    later = [sized((4, 4)), sized((1, 5)), sized((3, 3), (2, 5), (1, 1)), sized((3, 1)), sized((4, 7), (4, 4))]
    record(tmp_path / "s", model, [sized(first), *later], **options)


@BOTH
@pytest.mark.parametrize("name", ["convolution", "batch norm", "layer norm"])
def test_frames_may_be_folded_into_the_batch(tmp_path: Path, name: str, options: Any) -> None:
    kinds = {"convolution": nn.Conv2d(3, 4, 2), "batch norm": nn.BatchNorm2d(3).eval(), "layer norm": nn.LayerNorm(4)}
    forward = lambda self, x: self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # noqa: E731
    model = Applied(forward, inner=kinds[name])
    record(tmp_path / "s", model, [of(5, 3, 4, 4), of(2, 3, 4, 4)], **options)


@BOTH
@pytest.mark.parametrize("draws", [[[7, 7, 7, 7], [3, 7, 3, 3], IDS], [IDS, [7, 7, 7, 7]]], ids=str)
def test_a_sample_may_be_drawn_several_times(tmp_path: Path, draws: list[list[int]], options: Any) -> None:
    model = Applied(folded_by_token, layer=nn.Linear(6, 5), norm=nn.LayerNorm(5))
    samples = torch.randn(12, 3, 6)
    record(tmp_path / "s", model, [Step([{"x": samples[ids]}], [ids]) for ids in draws], **options)


# --- tokens that are routed ----------------------------------------------------------------------------------------


def routed(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Send each token to one of several Linear layers, by the largest of its first numbers."""
    flat, chosen = self.inside(x).tanh().flatten(0, 1), x[..., :3].flatten(0, 1).argmax(1)
    out = torch.zeros_like(flat)
    for number, expert in enumerate(self.experts):
        places = (chosen == number).nonzero().flatten()
        if len(places) or self.calls_idle:
            out = out.index_add(0, places, expert(flat[places]))
    return out.view_as(x)


def choosing(*choices: int) -> Step:
    step = of(len(choices) // 4, 6)
    step.batches[0]["x"].view(-1, 6)[torch.arange(len(choices)), torch.tensor(choices)] += 9
    return step


# Eight tokens, two of each sample.
ROUTES = {
    "all to one": [0] * 8,
    "as many as samples": [0, 0, 0, 1, 1, 1, 1, 0],
    "some to each": [2, 1, 1, 0, 2, 2, 1, 0],
    "all to another": [1] * 8,
}


@pytest.mark.parametrize("calls_idle", [False, True], ids=["idle ones are not called", "idle ones are called"])
@pytest.mark.parametrize("first", ROUTES)
def test_experts_need_a_pass_of_each_sample(tmp_path: Path, first: str, calls_idle: bool) -> None:
    model = Applied(routed, inside=nn.Linear(6, 6), experts=nn.ModuleList(nn.Linear(6, 6) for _ in range(3)))
    model.calls_idle = calls_idle
    later = [[0, 0, 1] * 4, [0, 1] * 4, *ROUTES.values()]
    record_or_refuse(tmp_path, model, [choosing(*one) for one in (ROUTES[first], *later)], r"experts\.\d")


@pytest.mark.parametrize("count", [1, 3, 4, 8, 12])
@pytest.mark.parametrize("numbers", [torch.zeros, torch.ones, torch.rand])
def test_a_table_of_the_models_own_needs_a_pass_of_each_sample(tmp_path: Path, numbers: Any, count: int) -> None:
    forward = lambda self, x: self.out(x + self.layer(self.table).sum(0))  # noqa: E731
    table = nn.Parameter(numbers(count, 6))
    model = Applied(forward, layer=nn.Linear(6, 6), table=table, out=nn.Linear(6, 2))
    record_or_refuse(tmp_path, model, [of(6), of(6)], "layer")


def packed(*ids: list[int]) -> Step:
    flat = [one for row in ids for one in row]
    samples = list(dict.fromkeys(one for one in flat if one >= 0))
    places = torch.tensor([samples.index(one) if one >= 0 else len(samples) for one in flat])

    def loss(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        each = torch.cat([weights, torch.zeros(1)])[places]
        return (rows(model(**batch).flatten(0, 1)) * each).sum() / len(weights)

    return Step([{"x": torch.randint(0, 20, (len(ids), len(ids[0])))}], [samples], loss, [torch.tensor(ids)])


@BOTH
def test_packed_samples_may_lie_in_several_rows_beside_tokens_of_nobody(tmp_path: Path, options: Any) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.layer(self.table(x)))
        out: torch.Tensor = self.out(hidden @ self.layer.weight if options else hidden)
        return out

    layers = {"table": nn.Embedding(20, 6), "layer": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "out": nn.Linear(6, 2)}
    steps = [
        packed([1, 1, 2, 2, -1], [3, 3, 3, 1, 1]),
        packed([4, 4, 4, 4, 2, 2, -7]),
        packed([1, 2], [2, 1], [-1, -1]),
    ]
    record(tmp_path / "s", Applied(forward, **layers), [*steps, packed([5, 5, 5])], **options)


# --- what is switched on and off, and what is refused --------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("switched", [(True, False, True), (False, True, False)], ids=str)
def test_autocast_may_be_switched_on_and_off(tmp_path: Path, switched: tuple[bool, ...], options: Any) -> None:
    if options:
        skip_without_bfloat16_lstm()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.on):
            out: torch.Tensor = self.out(self.norm(self.layer(x)[0] if options else self.layer(x)))
        return out.float()

    def switch(on: bool) -> Step:
        return of(5, 6, prepare=lambda model: setattr(model, "on", on), limit=HALF if on else FLOAT32)

    layer = lstm() if options else nn.Linear(6, 6)
    model = Applied(forward, layer=layer, norm=nn.LayerNorm(6), out=nn.Linear(6, 2))
    record(tmp_path / "s", model, list(map(switch, switched)), **options)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_is_refused_by_name_where_each_sample_has_a_pass(tmp_path: Path) -> None:
    forward = lambda self, x: self.inner(self.lstm(x)[0])  # noqa: E731
    other, refused = (Applied(forward, lstm=lstm(), inner=Checkpointed(one).eval()) for one in (False, True))
    record(tmp_path / "other", other, [of(5, 6), of(4, 6)], **BY_SAMPLE)
    with pytest.raises(CoverageError, match="use_reentrant=True: use use_reentrant=False"):
        record(tmp_path / "refused", refused, [of(5, 6)], **BY_SAMPLE)


@BOTH
def test_synchronised_batch_norm_is_refused_however_often_it_is_tried(store: timstore.Store, options: Any) -> None:
    model = Net(nn.SyncBatchNorm(5), nn.Linear(6, 2))
    with store.record(model, sgd(model), **options):
        for _ in range(3):
            with pytest.raises(CoverageError, match="SyncBatchNorm"):
                model(x=torch.randn(4, 5, 6), sample_ids=IDS)
    assert store.sql("SELECT count(*) FROM steps").fetchall() == [(0,)]


@pytest.mark.parametrize("taken", ["logits", "hidden pooled logits"])
def test_no_activation_outlives_its_step_where_each_sample_has_a_pass(store: timstore.Store, taken: str) -> None:
    model, losses = chained(as_tuple), []
    alive: list[weakref.ref[Any]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        given = (*args, *(output if isinstance(output, tuple) else [output]))
        alive.extend(weakref.ref(one.untyped_storage()) for one in given if isinstance(one, torch.Tensor))

    for module in model.modules():
        module.register_forward_hook(note)
    with store.record(model, (optimizer := sgd(model)), **BY_SAMPLE):
        for _ in range(3):
            losses.append(taking(taken)(model, {"x": torch.randn(4, 5, 6), "sample_ids": IDS}, torch.ones(4)))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        assert len(alive) > 20
        assert [one() for one in alive if one() is not None] == []
    assert len(losses) == 3
