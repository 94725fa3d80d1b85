"""What the caller of a rollback asked for, checked before anything is read."""

from collections.abc import Iterable
from dataclasses import dataclass

from timstore.arguments import choice, listed, plain_name, sample_id, text, whole_number
from timstore.errors import InvalidInputError, shown
from timstore.rollbacks.methods import check_method

DENOMINATORS = ("kept", "renormalised")


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """What the caller asked for, checked."""

    ids: tuple[int, ...] | None
    where: str | None
    epochs: tuple[int, ...] | None
    parameters: frozenset[str] | None
    strength: float
    missing: str
    method: str
    denominator: str

    @property
    def is_whole(self) -> bool:
        """Whether all that the samples did is to be removed."""
        return self.strength == 1 and self.parameters is None and self.epochs is None

    @classmethod
    def check(
        cls,
        ids: Iterable[int] | None,
        where: str | None,
        epochs: Iterable[int] | None,
        parameters: Iterable[str] | None,
        strength: float,
        missing: str,
        method: str,
        denominator: str,
    ) -> "Request":
        """Check the arguments of a rollback.

        Raises:
            InvalidInputError: naming the argument.
        """
        if (ids is None) == (where is None):
            both = "" if ids is None else ", and not both"
            raise InvalidInputError(f"say what to remove: ids, or where (an SQL condition on the records table){both}")
        checked = None if ids is None else _integers(ids, "ids")
        if checked is not None and not checked:
            raise InvalidInputError("ids is empty: nothing to remove")
        for one in checked or ():
            sample_id(one, "a sample id")
        if not (isinstance(strength, float | int) and 0 <= strength <= 1):
            raise InvalidInputError(f"strength lies between 0 and 1, not {shown(strength)}")
        names = None if parameters is None else listed(parameters, "parameters")
        return cls(
            checked,
            None if where is None else text(where, "where"),
            None if epochs is None else _integers(epochs, "epochs"),
            None if names is None else frozenset(plain_name(one, "a parameter's name") for one in names),
            float(strength),
            choice(missing, ("error", "skip"), "missing"),
            check_method(method),
            choice(denominator, DENOMINATORS, "denominator"),
        )


def _integers(values: Iterable[int], what: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(whole_number(one, what) for one in listed(values, what, "a list of integers")))
