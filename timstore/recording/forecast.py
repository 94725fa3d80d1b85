"""How much a recording will write, from the size of a few records and one step's gradients."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from timstore.database.store import Store
from timstore.encoding import PRECISIONS
from timstore.errors import StateError
from timstore.recording.history import waypoints_of
from timstore.records import Gradient, Parameter

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


def predict(
    record_bytes: float,
    *,
    records: int,
    steps: int,
    batch_size: int,
    gradients: Mapping[str, torch.Tensor],
    numel: int,
    fingerprints: int,
    has_moment: bool,
    optimizer_history: str,
    waypoints: bool,
    precision: str,
) -> Forecast:
    """Return the forecast from the size of a record and one step's gradients.

    Args:
        numel: of all trained parameters.
        fingerprints: number of named parameters.
    """
    sample, share = _some(gradients, numel)
    whole = share * states_bytes(precision, "gradient", sample)
    moment = share * states_bytes(precision, "exp_avg_sq", {name: one.square() for name, one in sample.items()})
    start = share * states_bytes(precision, "start_theta", sample)

    # Gradients are no parameters, but their leading bits compress no better.
    waypoint = share * states_bytes(precision, "theta", sample) if waypoints else 0.0

    ids_written = min(batch_size, _MEASURED_IDS)

    def scalars(temporary: Store) -> None:
        group = {"optimizer": "AdamW", "lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "options": "{}" * 100}
        for step in range(_MEASURED_STEPS):
            ids = [(step * 7919 + row * 104729) % 2**20 for row in range(ids_written)]
            temporary.append_step(0, step, [{**group, "lr": 0.1 / (step + 1)}], sample_ids=ids, grad_norm=step / 7)

    return Forecast(
        precision=precision,
        optimizer_history=optimizer_history,
        records=records,
        record_bytes=record_bytes,
        steps=steps,
        step_bytes=written(precision, scalars) / _MEASURED_STEPS * (batch_size / ids_written),
        gradients_bytes=steps * whole + start if optimizer_history == "gradients" else 0.0,
        waypoints_bytes=waypoint * waypoints_of(steps),
        save_point_bytes=moment * has_moment + 64 * fingerprints,
    )


def records_bytes(precision: str, records: Records, parameters: Mapping[str, nn.Parameter]) -> float:
    """Return what some records take on disk."""

    def fill(store: Store) -> None:
        store.declare([Parameter(name, tuple(one.shape), _dtype(one)) for name, one in parameters.items()])
        for sample, gradients in records.items():
            store.append(0, 0, sample, gradients, allow_zero=True, allow_nonfinite=True, copy=False)

    return written(precision, fill)


def states_bytes(precision: str, role: str, numbers: Mapping[str, torch.Tensor]) -> float:
    """Return what whole parameters' worth of numbers take on disk."""
    return written(precision, lambda store: store.append_states(0, 0, role, numbers)) if numbers else 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """What a recording may write, and how long it is going to be.

    Attributes:
        steps: optimizer steps to come.
        epochs: how often each recorded sample is drawn in them.
        samples: how many samples are recorded; None for all of every batch.
    """

    limit_bytes: int
    steps: int
    epochs: int
    samples: int | None
    optimizer_history: str
    waypoints: bool

    def check(
        self,
        store: Store,
        optimizer: torch.optim.Optimizer,
        records: Records,
        gradients: Mapping[str, torch.Tensor],
        parameters: Mapping[str, nn.Parameter],
    ) -> "Budget":
        """Refuse a recording that would write more, by one optimizer's first records and whole gradients.

        Returns:
            What is left for other optimizers.

        Raises:
            StateError: with the forecast, and what would fit.
        """
        own = store.settings.precision
        count = len(records) * self.steps if self.samples is None else self.samples * self.epochs

        def planned(precision: str, history: str, waypoints: bool) -> Forecast:
            return predict(
                records_bytes(precision, records, parameters) / len(records),
                records=count,
                steps=self.steps,
                batch_size=max(1, count // self.steps),
                gradients=gradients,
                numel=sum(one.numel() for one in parameters.values()),
                fingerprints=len(parameters),
                has_moment=is_adam(optimizer),
                optimizer_history=history,
                waypoints=waypoints,
                precision=precision,
            )

        asked = planned(own, self.optimizer_history, self.waypoints)
        if asked.total_bytes <= self.limit_bytes:
            return replace(self, limit_bytes=int(self.limit_bytes - asked.total_bytes))
        rest = self.limit_bytes - (asked.total_bytes - asked.records * asked.record_bytes)
        fitting = [f"{int(rest / asked.record_bytes)} records instead of {asked.records}"] if rest > 0 else []
        others = {
            f"precision={one!r}": (one, self.optimizer_history, self.waypoints)
            for one in PRECISIONS[PRECISIONS.index(own) + 1 :]
        }
        if self.optimizer_history == "gradients":
            others["optimizer_history='final'"] = own, "final", self.waypoints
        if self.waypoints:
            others["waypoints=False"] = own, self.optimizer_history, False
        for what, choices in others.items():
            total = planned(*choices).total_bytes
            if total <= self.limit_bytes:
                fitting.append(f"{what} ({size_text(total)})")
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


def _some(gradients: Mapping[str, torch.Tensor], numel: int) -> tuple[dict[str, torch.Tensor], float]:
    """Return some of the gradients, and how many times as many numbers there are in all."""
    chosen: dict[str, torch.Tensor] = {}
    done = 0
    for name, gradient in gradients.items():
        if not done or done + gradient.numel() <= _MEASURED_NUMEL:
            chosen[name] = gradient.detach().cpu()
            done += gradient.numel()
    return chosen, numel / max(1, done)


def written(precision: str, fill: Callable[[Store], None]) -> float:
    """Return the bytes of what is put into a store of its own."""
    with tempfile.TemporaryDirectory(prefix="timstore-") as folder:
        with Store(Path(folder, "s"), precision=precision, durability="os") as store:
            fill(store)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def size_text(value: float) -> str:
    """Return a number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
