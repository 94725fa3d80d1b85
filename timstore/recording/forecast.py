"""How much a recording will write: records, scalars and parameters encoded in memory, and their bytes counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from timstore.arguments import positive_number
from timstore.database.ledger import step_rows
from timstore.database.states import state_item, state_precision
from timstore.database.store import Store
from timstore.database.writer import Batch, EncodedItem, Item
from timstore.encoding import PRECISIONS, encode
from timstore.errors import InvalidInputError, StateError, shown
from timstore.format.segments import EncodedRecord, build_segment
from timstore.format.settings import Settings
from timstore.model.eval_guard import given, undisturbed
from timstore.model.unwrap import inner_model, inner_optimizers
from timstore.options import OptimizerHistory, RecordOptions
from timstore.recording.batches import Ids, apart, by_parameter, on_host, records_of
from timstore.recording.checks import check_sum
from timstore.recording.history import waypoints_until
from timstore.recording.model_hooks import ModelHooks
from timstore.recording.optimizer import Trained, trained_by
from timstore.records import Gradient, Parameter, Record, Step, StepGroup

_MEASURED_ROWS = 4
# Whole parameters are measured on no more numbers than this; the rest compresses alike.
_MEASURED_NUMEL = 4_000_000
_MEASURED_STEPS = 64
_MEASURED_IDS = 4096

Records = Mapping[int, Mapping[str, Sequence[Gradient]]]


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes on disk that a recording is about to write.

    Attributes:
        records: how many; `record_bytes` is that of one, measured.
        steps: how many; `step_bytes` is that of one step's scalars.
        gradients_bytes: every step's whole gradient and the parameters at the start, for
            `optimizer_history="gradients"`.
        waypoints_bytes: the parameters at some moments on the way.
        save_point_bytes: second moment and fingerprints, kept once at the end and at each `recorder.save_point()`.
    """

    precision: str
    optimizer_history: str
    records: int
    record_bytes: float
    steps: int
    step_bytes: float
    gradients_bytes: float
    waypoints_bytes: float
    save_point_bytes: float

    @property
    def total_bytes(self) -> int:
        """Everything together, with one save point."""
        return round(
            self.records * self.record_bytes
            + self.steps * self.step_bytes
            + self.gradients_bytes
            + self.waypoints_bytes
            + self.save_point_bytes
        )

    def __str__(self) -> str:
        lines = {
            f"{self.records} records of {size_text(self.record_bytes)}, {self.precision}": self.records
            * self.record_bytes,
            f"scalars of {self.steps} steps": self.steps * self.step_bytes,
            "second moment and fingerprints, at the end and at each save point": self.save_point_bytes,
        }
        if self.waypoints_bytes:
            lines["parameters at waypoints"] = self.waypoints_bytes
        if self.optimizer_history == "gradients":
            lines["every step's whole gradient, and the parameters at the start"] = self.gradients_bytes
        lines["together"] = self.total_bytes
        return "\n".join(f"{size_text(value):>10}  {what}" for what, value in lines.items())


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """What a forecast is made from: some records of one step, and the step's gradients.

    Attributes:
        parameters: the trained ones, by name.
        has_moment: an optimizer keeps a second moment of them.
    """

    records: Records
    gradients: Mapping[str, torch.Tensor]
    parameters: Mapping[str, nn.Parameter]
    has_moment: bool

    def forecast(
        self, settings: Settings, *, records: int, steps: int, optimizer_history: OptimizerHistory, waypoints: bool
    ) -> Forecast:
        """Return the forecast for so many records in so many steps."""
        # Gradients stand for parameters too: their leading bits compress no better.
        gradients, share = self._some_gradients()
        moments = {name: one.square() for name, one in gradients.items()}

        def whole(role: str, numbers: Mapping[str, torch.Tensor]) -> float:
            return share * _bytes_of(state_item((0, 0), 0, role, numbers, state_precision(role, settings.precision)))

        return Forecast(
            precision=settings.precision,
            optimizer_history=optimizer_history,
            records=records,
            record_bytes=self._record_bytes(settings),
            steps=steps,
            step_bytes=_step_bytes(max(1, round(records / steps))),
            gradients_bytes=steps * whole("gradient", gradients) + whole("start_theta", gradients)
            if optimizer_history == "gradients"
            else 0.0,
            waypoints_bytes=len(waypoints_until(steps)) * whole("theta", gradients) if waypoints else 0.0,
            save_point_bytes=(whole("exp_avg_sq", moments) if self.has_moment else 0.0) + 64 * len(self.parameters),
        )

    def _some_gradients(self) -> tuple[dict[str, torch.Tensor], float]:
        """Return some of the gradients, and how many times as many numbers the parameters have in all."""
        some: dict[str, torch.Tensor] = {}
        numel = 0
        for name, gradient in self.gradients.items():
            if not numel or numel + gradient.numel() <= _MEASURED_NUMEL:
                some[name] = gradient.detach().cpu()
                numel += gradient.numel()
        return some, sum(one.numel() for one in self.parameters.values()) / max(1, numel)

    def _record_bytes(self, settings: Settings) -> float:
        """Return what one record adds to others of a commit, which has a size of its own."""
        known = {
            name: Parameter(name, tuple(one.shape), str(one.dtype).removeprefix("torch."))
            for name, one in self.parameters.items()
        }
        encoded = [
            EncodedRecord(
                Record(0, 0, sample, {}),
                0,
                *encode(gradients, known, precision=settings.precision, max_rel_error=settings.max_rel_error),
            )
            for sample, gradients in self.records.items()
        ]
        few = encoded[: len(encoded) // 2]
        written, others = (sum(len(data) for _, data, *_ in build_segment(some, {}, {})) for some in (encoded, few))
        return (written - others) / (len(encoded) - len(few))


def _step_bytes(batch_size: int) -> float:
    """Return what one step's scalars take, of a batch of so many samples."""
    ids = min(batch_size, _MEASURED_IDS)
    group = StepGroup(optimizer="AdamW", beta1=0.9, beta2=0.999, eps=1e-8, options="{}" * 100)
    rows = [
        row
        for step in range(_MEASURED_STEPS)
        for row in step_rows(
            Step(
                0,
                step,
                (replace(group, lr=0.1 / (step + 1)),),
                sample_ids=tuple((step * 7919 + place * 104729) % 2**20 for place in range(ids)),
                grad_norm=step / 7,
            ),
            0,
        )
    ]
    return _bytes_of(Item(0, rows={"steps": rows})) / _MEASURED_STEPS * (batch_size / ids)


def _bytes_of(item: Item) -> int:
    """Return what an item that is no record takes on disk."""
    return sum(len(data) for _, data, *_ in Batch([EncodedItem(item, None, 0)]).build())


@dataclass(frozen=True, slots=True)
class DiskBudget:
    """What a recording may write, and how long it is going to be.

    Attributes:
        samples: how many samples are recorded; None for all of every batch.
    """

    limit_bytes: int
    samples: int | None
    options: RecordOptions

    def check(
        self, settings: Settings, trained: Trained, records: Records, gradients: Mapping[str, torch.Tensor]
    ) -> "DiskBudget":
        """Refuse a recording that would write more, by one optimizer's first records and whole gradients.

        Returns:
            What is left for other optimizers.

        Raises:
            StateError: with the forecast, and what would fit.
        """
        measured = _Measured(records, gradients, trained.parameters, is_adam(trained.optimizer))
        options, own = self.options, settings.precision
        assert options.steps is not None
        steps = options.steps
        count = len(records) * steps if self.samples is None else self.samples * options.epochs

        def planned(precision: str, history: OptimizerHistory, waypoints: bool) -> Forecast:
            return measured.forecast(
                replace(settings, precision=precision),
                records=count,
                steps=steps,
                optimizer_history=history,
                waypoints=waypoints,
            )

        asked = planned(own, options.optimizer_history, options.waypoints)
        if asked.total_bytes <= self.limit_bytes:
            return replace(self, limit_bytes=self.limit_bytes - asked.total_bytes)
        rest = self.limit_bytes - (asked.total_bytes - asked.records * asked.record_bytes)
        fitting = [f"{int(rest / asked.record_bytes)} records instead of {asked.records}"] if rest > 0 else []
        others = {
            f"precision={finer!r}": planned(finer, options.optimizer_history, options.waypoints)
            for finer in PRECISIONS[PRECISIONS.index(own) + 1 :]
        }
        if options.optimizer_history == "gradients":
            others["optimizer_history='final'"] = planned(own, "final", options.waypoints)
        if options.waypoints:
            others["waypoints=False"] = planned(own, options.optimizer_history, False)
        fitting += [
            f"{what} ({size_text(other.total_bytes)})"
            for what, other in others.items()
            if other.total_bytes <= self.limit_bytes
        ]
        raise StateError(
            f"recording would write about {size_text(asked.total_bytes)}, and the budget is "
            f"{size_text(self.limit_bytes)}:\n{asked}\nWhat would fit: "
            f"{' or '.join(fitting) or 'nothing of this kind'}. No record was kept",
            kind="over-budget",
            needed_bytes=asked.total_bytes,
        )


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether an optimizer keeps a second moment."""
    return "betas" in optimizer.param_groups[0]


def forecast_of(
    store: Store,
    model: nn.Module,
    *,
    samples: int,
    steps: int,
    tokens: int | None = None,
    epochs: int = 1,
    batch: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_history: OptimizerHistory = "final",
    waypoints: bool = True,
) -> Forecast:
    """Measure what recording would write; see `timstore.Store.forecast`."""
    samples, steps = positive_number(samples, "samples"), positive_number(steps, "steps")
    tokens = None if tokens is None else positive_number(tokens, "tokens")
    options = RecordOptions(probe=None, optimizer_history=optimizer_history, waypoints=waypoints, epochs=epochs)
    has_moment = optimizer is None or any(map(is_adam, inner_optimizers(optimizer)[0]))
    inner, _ = inner_model(model)
    args, kwargs = _batch(inner, tokens, batch)
    with undisturbed(model):
        records, gradients, parameters = _recorded(inner, options, args, kwargs)
    return _Measured(records, gradients, parameters, has_moment).forecast(
        store.settings,
        records=samples * options.epochs,
        steps=steps,
        optimizer_history=options.optimizer_history,
        waypoints=options.waypoints,
    )


def _recorded(
    model: nn.Module, options: RecordOptions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Records, dict[str, torch.Tensor], Mapping[str, nn.Parameter]]:
    """Return the records of `_MEASURED_ROWS` rows, the gradients of their mean, and the trained parameters.

    Raises:
        CoverageError: the model cannot be recorded.
    """
    requiring = [one for one in model.parameters() if one.requires_grad]
    if not requiring:
        raise InvalidInputError("the model has no parameter that requires a gradient: nothing of it would be recorded")
    (trained,) = trained_by(model, [torch.optim.SGD(requiring, lr=0.0)])
    before = [(one, one.grad) for one in requiring]
    for one in requiring:
        one.grad = None
    hooks = ModelHooks(model, [trained.parameters], None, options)
    try:
        with torch.enable_grad():
            hooks.running.begin(Ids(list(range(_MEASURED_ROWS)), _MEASURED_ROWS))
            with given("this batch (of batch=, or of tokens= for a language model)"):
                returned = model(*args, **kwargs)
                loss = getattr(returned, "loss", None)
                if loss is None:
                    loss = getattr(returned, "logits", returned).float().logsumexp(-1).mean()
                loss.backward()
        hooks.forwards.wait()
        (pending,) = hooks.awaiting
        gradients = pending.clip.gradients()
        check_sum(model, trained.parameters, gradients, by_parameter(pending.parts), 1.0)
        records = records_of(pending.used, None, {id(one): name for name, one in trained.parameters.items()})
        return apart(records), gradients, trained.parameters
    finally:
        hooks.remove()
        for one, gradient in before:
            one.grad = gradient


def _batch(model: nn.Module, tokens: int | None, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `_MEASURED_ROWS` rows as the model takes them."""
    device = next(model.parameters()).device
    if batch is None:
        config = getattr(model, "config", None)
        vocabulary, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
        if vocabulary is None or tokens is None:
            raise InvalidInputError(
                "forecast measures on a batch: pass batch=, as the model takes it, or tokens= for a language model of "
                "transformers"
            )
        if longest is not None and tokens > longest:
            raise InvalidInputError(f"tokens is at most the {longest:,} positions that this model has; got {tokens:,}")
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (_MEASURED_ROWS, tokens), generator=draw, device="cpu").to(device)
        return (), {"input_ids": ids, "labels": ids}
    host = on_host(batch)

    def rows(value: Any) -> Any:
        try:
            array = torch.from_numpy(value)
            return torch.cat([array] * -(-_MEASURED_ROWS // len(array)))[:_MEASURED_ROWS].to(device)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise InvalidInputError(f"a batch holds arrays of one row or more, not {shown(value)}: {error}") from error

    if isinstance(host, dict):
        return (), {name: rows(value) for name, value in host.items()}
    return tuple(rows(value) for value in (host if isinstance(host, tuple) else (host,))), {}


def size_text(value: float) -> str:
    """Return a number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
