"""What a configuration says under `method_args`."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from timstore.errors import InvalidInputError

AUTO = "auto"
FORMATS = ("auto", "timstore", "json", "pickle")


class _Arguments:
    """Arguments of ours among those of a Trainer."""

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> Self:
        """Take ours out of a trainer's keyword arguments, which keep the rest.

        Raises:
            InvalidInputError: one is missing, or cannot be right.
        """
        named = fields(cls)  # type: ignore[arg-type]
        missing = [one.name for one in named if one.default is MISSING and given.get(one.name) is None]
        if missing:
            raise InvalidInputError(f"say where the trajectories are: trainer.method_args.{missing[0]}=...")
        return cls(**{one.name: given.pop(one.name) for one in named if one.name in given})


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackArguments(_Arguments):
    """How `TIMParameterRollback` rolls back.

    Attributes:
        tim_output_dir: the one that `TIMRecorder` or `save_gradient_trajectory` wrote into, one of the older layout, or
            a store.
        rollback_strength: between 0 and 1, the share that is removed.
        trajectory_format: `timstore`, `json` or `pickle`; `auto` is whatever is there.
        id_map: the samples' ids by the number of the row in the forget split, as a mapping or a list, or the path of a
            JSON file with one; where None, rows are known by their tokens, or by their count in an older layout.
        missing: `skip` goes on without forget rows that were never recorded.
        probe: `auto`, what the store keeps, or where it keeps nothing that can be asked, 64 rows of the retain split;
            a number, so many rows of the retain split; None for none, which is first order only.
        method, denominator, memory_limit, keep_delta, force: of `timstore.Store.rollback`.
        lr, scale, allow_pickle: of `import_trajectories`, for an older layout.
        train_after: train on the retain split when the rollback is done.
    """

    tim_output_dir: str
    rollback_strength: float = 1.0
    trajectory_format: str = "auto"
    id_map: Any = None
    missing: str = "error"
    probe: int | str | None = AUTO
    method: str = "auto"
    denominator: str = "kept"
    memory_limit: int | str = "512MB"
    lr: float | None = None
    scale: float | None = None
    allow_pickle: bool = False
    keep_delta: bool = False
    force: bool = False
    train_after: bool = False

    def __post_init__(self) -> None:
        if self.trajectory_format not in FORMATS:
            raise InvalidInputError(f"trajectory_format is {', '.join(FORMATS)}, not {self.trajectory_format!r}")
        probe = self.probe
        if probe not in (None, AUTO) and (isinstance(probe, bool) or not isinstance(probe, int) or probe < 1):
            raise InvalidInputError(f"probe is {AUTO}, a number of rows of the retain split, or null, not {probe!r}")
        if self.missing not in ("error", "skip"):
            raise InvalidInputError(f"missing is error or skip, not {self.missing!r}")
        for name in ("allow_pickle", "keep_delta", "force", "train_after"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name} is true or false, not {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderArguments(_Arguments):
    """What `TIMRecorder` records, and how.

    Attributes:
        tim_output_dir: gets the store `trajectories.tim`.
        samples: ids to record, the path of a JSON file with a list of them, or OpenUnlearning's configuration of a data
            set, whose rows are recorded; all rows when None.
        precision, max_rel_error: of `timstore.open`.
        optimizer_history, waypoints, capture, allow_zero: of `timstore.Store.record`.
        probe: `auto` keeps rows of the training for rollbacks, as `Store.record` does; None keeps none.
    """

    tim_output_dir: str
    samples: Any = None
    precision: str | None = None
    max_rel_error: float | None = None
    optimizer_history: str = "final"
    waypoints: bool = True
    capture: str = "auto"
    allow_zero: bool = False
    probe: str | None = AUTO

    def __post_init__(self) -> None:
        if self.probe not in (None, AUTO):
            raise InvalidInputError(f"probe is {AUTO}, or null, not {self.probe!r}")
