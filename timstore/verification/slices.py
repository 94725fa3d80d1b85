"""The slices of one commit: each within its array, of the width, owner and role that its gradient or state asks for."""

import numpy as np
import pyarrow as pa

from timstore.format.log import Commit
from timstore.verification.examiner import Examiner
from timstore.verification.fit import Shapes, misfits
from timstore.verification.matrices import FIRST_STATE, Layouts, Matrices, Slices
from timstore.verification.rows import Tables, samples_of, steps_of


class SliceCheck:
    """What is wrong with the slices of one commit.

    Args:
        path: of the slices file.
        layouts: of every array that the commit has; None where it cannot be read.
    """

    def __init__(
        self,
        examiner: Examiner,
        commit: Commit,
        tables: Tables,
        path: str,
        layouts: Layouts,
        shapes: Shapes,
    ) -> None:
        self._examiner = examiner
        self._commit = commit
        self._tables = tables
        self._path = path
        self._layouts = layouts
        self._shapes = shapes

    def run(self, table: pa.Table, found: Slices) -> None:
        """Look at all slices; each sort of mistake is one finding."""
        sound = self._places(found)
        pieces = Matrices.joined(found, table, sound, self._layouts)
        self._report("have blocks that do not tile the columns of their matrix", found, pieces.crooked)
        self._owners(found)
        for kind in ("gradients", "states"):
            of_kind = self._tables.get(kind)
            if of_kind is not None:
                self._fit(kind, of_kind, pieces, table)

    def _places(self, found: Slices) -> np.ndarray:
        """Find slices outside their arrays; return which ones are inside an array that can be read."""
        limit = np.array([_rows_of(self._layouts, name) for name in found.names] or [0], np.int64)[found.array]
        unnamed = np.array([name not in self._layouts for name in found.names] or [False], bool)[found.array]
        self._report("name an array that their commit does not have", found, unnamed)
        # Not start + rows, which may overflow.
        outside = (limit >= 0) & (
            (found.start < 0) | (found.rows < 0) | (found.start > limit) | (found.rows > limit - found.start)
        )
        self._report("lie outside their array", found, outside)
        self._report("have a role that does not exist", found, found.role < 0)
        return np.asarray((limit >= 0) & ~outside & (found.role >= 0))

    def _owners(self, found: Slices) -> None:
        for kind, mine in (("gradients", found.role < FIRST_STATE), ("states", found.role >= FIRST_STATE)):
            table = self._tables.get(kind)
            if kind in self._tables and table is None:
                continue
            count = table.num_rows if table is not None else 0
            wrong = mine & (found.role >= 0) & ((found.owner < 0) | (found.owner >= count))
            self._report(f"belong to no row of the {count} {kind}", found, wrong)

    def _fit(self, kind: str, table: pa.Table, pieces: "Matrices", slices: pa.Table) -> None:
        """Hold the matrices of gradients, or of states, to what their rows say."""
        for message, owners in misfits(kind, table, pieces, slices, self._shapes).items():
            samples = samples_of(self._tables, owners) if kind == "gradients" else ()
            steps = steps_of(self._tables, owners) if kind == "gradients" else None
            first = table.slice(int(owners[0]), 1).to_pylist()[0]
            text = f"{len(owners)} {kind} {message}; the first: row {owners[0]}, {first['parameter']}"
            self._examiner.add("slices", self._path, text, self._commit, steps=steps, samples=samples)

    def _report(self, what: str, found: Slices, wrong: np.ndarray) -> None:
        if not wrong.any():
            return
        one = int(np.flatnonzero(wrong)[0])
        where = f"rows {found.start[one]} to {int(found.start[one]) + int(found.rows[one])} of "
        where += found.names[found.array[one]]
        text = f"{int(wrong.sum())} slices {what}; the first: slice {one} of owner {found.owner[one]}, {where}"
        owners = found.of_gradients(wrong)
        steps, samples = steps_of(self._tables, owners), samples_of(self._tables, owners) if len(owners) else ()
        self._examiner.add("slices", self._path, text, self._commit, steps=steps, samples=samples)


def _rows_of(layouts: Layouts, name: str) -> int:
    """Return how many rows an array has; -1 when that is not known."""
    layout = layouts.get(name)
    return -1 if layout is None else layout.rows
