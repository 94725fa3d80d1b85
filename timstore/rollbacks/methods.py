"""Which ways there are to take samples out, what each of them leaves out, and which one the records allow."""

from collections.abc import Callable
from dataclasses import dataclass

from timstore.errors import CoverageError, InvalidInputError
from timstore.optimizers import ADAM_FAMILY, SGD_FAMILY
from timstore.rollbacks.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Method:
    """A way to compute the change before curvature is asked.

    Attributes:
        name: as `rollback(method=...)` takes it.
        approximates: what it takes for granted, and how far off it was where that was measured.
    """

    name: str
    approximates: str


CLOSED_FORM = Method(
    "closed form",
    "two runs of the optimizer on the recorded gradients, with and without the samples: to rounding "
    "(1e-12 in float64, 1e-6 with float32 records)",
)
REPLAY = Method(
    "exact replay",
    "two runs of the optimizer on the recorded gradients, with and without the samples: to rounding "
    "(1e-12 in float64, 1e-6 with float32 records)",
)
FINAL_MOMENT = Method(
    "final moment",
    "what Adam divided by is taken as it was at the end of the run: on the digits of scripts/bench_unlearning.py a "
    "third to a half of the change off, on its language models with a probe at a fifth of another batch order's KL",
)
FILTERED = "; the other samples' answer by the model's curvature on the probe at the end of the run"
UNFILTERED = "; the other samples' gradients as they were recorded"
METHODS = (CLOSED_FORM, REPLAY, FINAL_MOMENT)
AUTO = "auto"


def check_method(asked: str) -> str:
    """Return the name of a method, or `auto`.

    Raises:
        InvalidInputError: for any other name.
    """
    names = [AUTO, *(method.name for method in METHODS)]
    if asked not in names:
        raise InvalidInputError(f"method is one of {', '.join(names)}, not {asked!r}")
    return asked


def approximated(method: Method, filtered: bool) -> str:
    """Return what a rollback takes for granted, in words."""
    return method.approximates + (FILTERED if filtered else UNFILTERED)


def choose(asked: str, timelines: dict[int, Timeline], why_no_replay: Callable[[], str | None]) -> Method:
    """Return the method that was asked for, or the best one that the records allow.

    Args:
        why_no_replay: says why the optimizer cannot be run again, None when it can; asked only where that decides.

    Raises:
        CoverageError: the records do not allow it; says what would have had to be recorded.
    """
    optimizers = {timeline.optimizer for timeline in timelines.values()}
    by_value = any(not (bounds != bounds).all() for bounds in (one.clip_value for one in timelines.values()))
    linear = optimizers <= set(SGD_FAMILY) and not by_value
    adam = optimizers <= {*SGD_FAMILY, *ADAM_FAMILY} and not by_value
    if linear and asked in (AUTO, CLOSED_FORM.name):
        return CLOSED_FORM
    if adam and not linear and asked == FINAL_MOMENT.name:
        return FINAL_MOMENT
    no_replay = why_no_replay()
    possible = [
        *([CLOSED_FORM] if linear else []),
        *([REPLAY] if no_replay is None else []),
        *([FINAL_MOMENT] if adam and not linear else []),
    ]
    chosen = [method for method in possible if asked in (AUTO, method.name)]
    if chosen:
        return chosen[0]
    names = " and ".join(sorted(optimizers))
    if asked == REPLAY.name or not possible:
        what = " with clipping by value" if by_value else ""
        raise CoverageError(
            f"a run of {names}{what} can be rolled back by running the optimizer again, and that cannot be done: "
            f"{no_replay}",
            kind="no-replay",
        )
    raise CoverageError(
        f"method {asked!r} does not fit a run of {names}; {' or '.join(repr(one.name) for one in possible)} does",
        kind="other-method",
    )
