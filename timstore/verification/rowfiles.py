"""The row files of one kind that a checkpoint names, dealt out commit by commit."""

import numpy as np
import pyarrow as pa

from timstore.format.compaction import Compaction
from timstore.format.log import Commit, Moment, ObjectInfo
from timstore.verification.examiner import Examiner, Fault
from timstore.verification.rows import Tables, samples_of

# Rows of these kinds are those of samples, so that a damaged file concerns some.
_OF_SAMPLES = ("records", "gradients")


class RowFiles:
    """The row files of one kind, each read once, in order. Memory: two of them.

    Args:
        commits: how many the checkpoint covers; None when that cannot be told.
    """

    def __init__(self, examiner: Examiner, checkpoint: Compaction, kind: str, commits: int | None) -> None:
        self._examiner = examiner
        self._kind = kind
        self._commits = commits
        self._waiting = [info for info in checkpoint.files if info.kind == kind]
        self._table: pa.Table | None = None
        self._numbers = np.zeros(0, np.int64)
        self._path = ""
        self._last = -1
        self._damaged: list[tuple[ObjectInfo, Fault]] = []
        self._steps: list[Moment] = []
        self._samples: set[int] = set()

    def add_to(self, tables: dict[str, pa.Table | None], number: int) -> None:
        """Put the rows of a commit, numbers in rising order, under their kind; None if they cannot be read."""
        parts = []
        while True:
            first, last = np.searchsorted(self._numbers, [number, number + 1])
            if self._table is not None and last > first:
                self._settle()
                parts.append(self._table.slice(int(first), int(last - first)))
            if last < len(self._numbers) or not self._load():
                break
        if not parts and self._damaged:
            tables[self._kind] = None
        elif parts:
            tables[self._kind] = self._plain(pa.concat_tables(parts), number)

    def concern(self, commit: Commit, tables: Tables) -> None:
        """Say whose rows they are, where those of a commit cannot be read."""
        if self._damaged and tables.get(self._kind, self) is None:
            self._steps += commit.steps or ()
            if self._kind in _OF_SAMPLES:
                self._samples.update(samples_of(tables))

    def finish(self) -> None:
        """Read what is left."""
        while self._load():
            pass
        self._settle()

    def _load(self) -> bool:
        """Take up the next file that can be read; those before it that cannot are remembered."""
        while self._waiting:
            info = self._waiting.pop(0)
            table = self._examiner.table(info, folded=True)
            if not isinstance(table, Fault):
                numbers = table["commit"].to_numpy().astype(np.int64)
                if self._in_order(numbers):
                    self._table, self._numbers, self._path = table, numbers, info.path
                    self._last = int(numbers[-1]) if len(numbers) else self._last
                    return True
                table = Fault("malformed", "its rows are not in the order of the commits that the checkpoint covers")
            self._damaged.append((info, table))
        self._table, self._numbers = None, np.zeros(0, np.int64)
        return False

    def _in_order(self, numbers: np.ndarray) -> bool:
        if len(numbers) == 0:
            return True
        end = self._commits if self._commits is not None else int(numbers[-1]) + 1
        return bool(numbers[0] >= max(0, self._last) and numbers[-1] < end and (np.diff(numbers) >= 0).all())

    def _plain(self, table: pa.Table, number: int) -> pa.Table | None:
        """Return the rows as the commit's own file had them."""
        if "owner" in table.column_names:
            if (table["owner"].to_numpy() != np.arange(table.num_rows)).any():
                message = f"the {self._kind} of commit {number} of the checkpoint are not numbered from 0"
                self._examiner.add("malformed", self._path, message)
                return None
            table = table.drop_columns(["owner"])
        return table.drop_columns(["commit"])

    def _settle(self) -> None:
        """Report the files that could not be read, once the commits that they are of are behind."""
        steps = (min(self._steps), max(self._steps)) if self._steps else None
        for info, fault in self._damaged:
            message = f"{fault.message}. It holds {self._kind} of commits that a checkpoint covers"
            samples = sorted(self._samples)
            self._examiner.add(fault.kind, info.path, message, steps=steps, samples=samples)
        self._damaged, self._steps, self._samples = [], [], set()
