"""Which step a gradient of an epoch's file belongs to: the one that is marked beside it, or the next free number."""

from collections.abc import Iterable
from pathlib import Path

from timstore.legacy.visits import MARKER
from timstore.os_errors import reporting

# Unmarked visits among marked ones: beyond any step that a run takes.
_BEYOND = 1 << 40
_BLOCK_BYTES = 1024 * 1024
_MARKER = MARKER.encode()


def may_have_markers(path: Path) -> bool:
    """Say whether the end of a step marker's name is anywhere in a file, up to where it comes first."""
    with reporting("read", path), open(path, "rb") as file:
        rest = b""
        while block := file.read(_BLOCK_BYTES):
            if _MARKER in rest + block:
                return True
            rest = block[-len(_MARKER) :]
    return False


class Numbering:
    """The steps of one epoch.

    Without a marker, a sample's gradients are one visit, whose number is its place in the file; one that has the
    parameter already is of another visit.

    Args:
        stored: (step, sample, parameter) of the epoch that the store holds.
        has_markers: whether steps may be marked anywhere in the file: then the others are numbered beyond those.

    Attributes:
        records: visits of a sample.
        unknown: those without a step.
    """

    def __init__(self, stored: Iterable[tuple[int, int, str]], *, has_markers: bool) -> None:
        self._first = _BEYOND if has_markers else 0
        # Names as bits: a file may hold millions of visits of hundreds of parameters.
        self._bits: dict[str, int] = {}
        self._stored: dict[tuple[int, int], int] = {}
        for step, sample, parameter in stored:
            self._stored[step, sample] = self._stored.get((step, sample), 0) | self._bit(parameter)
        self._met: set[int] = set()
        self._marked: dict[tuple[int, int], int] = {}
        self._visits: dict[int, list[list[int]]] = {}
        self.unknown = 0

    @property
    def records(self) -> int:
        return len(self._marked) + self.unknown

    def meets(self, sample: int) -> bool:
        """Note that a sample's key comes; returns whether it came before."""
        before = sample in self._met
        self._met.add(sample)
        return before

    def place(self, sample: int, parameter: str, step: int | None) -> int:
        """Return the number of the step that a gradient belongs to."""
        bit = self._bit(parameter)
        if step is not None:
            held = self._marked.get((step, sample), 0)
            if not held & bit:
                self._marked[step, sample] = held | bit
                return step
        visits = self._visits.setdefault(sample, [])
        for visit in visits:
            if not visit[1] & bit:
                visit[1] |= bit
                return visit[0]
        number = self.unknown + self._first
        self.unknown += 1
        visits.append([number, bit])
        return number

    def is_there(self, step: int, sample: int, parameter: str) -> bool:
        """Tell whether the store holds it."""
        return bool(self._stored.get((step, sample), 0) & self._bit(parameter))

    def _bit(self, parameter: str) -> int:
        return 1 << self._bits.setdefault(parameter, len(self._bits))
