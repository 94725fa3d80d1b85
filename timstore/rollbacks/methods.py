"""Which ways there are to take samples out, what each of them leaves out, and which one the records allow."""

from collections.abc import Callable
from dataclasses import dataclass

from timstore.arguments import choice
from timstore.errors import CoverageError
from timstore.model.optimizer_names import ADAM_FAMILY, SGD_FAMILY
from timstore.rollbacks.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Method:
    """A way to compute the change before curvature is asked.

    Attributes:
        name: as `rollback(method=...)` takes it.
        says: what it does with the removed samples' gradients, where `touched` of `steps` steps held one.
    """

    name: str
    says: str


CLOSED_FORM = Method(
    "closed form",
    "what the samples did is taken out of {touched} of {steps} steps, those that held one of them, by the optimizer's "
    "own formula, to rounding",
)
REPLAY = Method(
    "exact replay",
    "the optimizer runs again over {steps} steps' recorded gradients, with and without what the samples did in "
    "{touched} of them, to rounding",
)
FINAL_MOMENT = Method(
    "final moment",
    "what the samples did is taken out of {touched} of {steps} steps, those that held one of them, divided by the "
    "second moment that Adam had at the end of the run, not at each of those steps",
)
METHODS = (CLOSED_FORM, REPLAY, FINAL_MOMENT)
AUTO = "auto"


def check_method(asked: str) -> str:
    """Return the name of a method, or `auto`.

    Raises:
        InvalidInputError: for any other name.
    """
    names = [AUTO, *(method.name for method in METHODS)]
    return choice(asked, names, "method")


def approximated(method: Method, touched: int, steps: int, sequences: int | None) -> str:
    """Return what a rollback did and what it takes for granted, in words.

    Args:
        touched: steps that held a removed sample, of all `steps` that were recorded.
        sequences: of the probe, None without one.
    """
    others = (
        "the other samples' gradients stay as they were recorded, though without these samples they would have been "
        "others"
        if sequences is None
        else f"how the other samples would have answered is estimated by the model's curvature at the end of the run, "
        f"on the probe's {sequences} sequences"
    )
    return f"{method.says.format(touched=touched, steps=steps)}; {others}"


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
