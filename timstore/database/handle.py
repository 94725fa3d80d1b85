"""One handle on a store, to ask in SQL and to read: a steady view until it is refreshed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from timstore import arguments, errors
from timstore.catalog import remove_leftovers
from timstore.database import lifetime
from timstore.database.opening import open_settings
from timstore.database.snapshot import Snapshot, StoredRecord
from timstore.format.segments import Arrays
from timstore.format.settings import Place
from timstore.os_errors import user_path

if TYPE_CHECKING:
    import duckdb

_LEAST_SQL_MEMORY = 32 * 10**6  # below, DuckDB cannot count the rows of each group


class Handle:
    """What reading needs of a store: its objects, its settings and a snapshot."""

    def __init__(self, path: str | os.PathLike[str], mode: str, options: dict[str, Any], sql_memory: int | str) -> None:
        self.path = user_path(path)
        self.mode = mode
        self._sql_memory = _sql_memory(sql_memory)
        self._objects, self.settings = open_settings(self.path, mode, options)
        self._place = Place(self._objects, self.settings)
        lifetime.commit_unattended(self.path)
        remove_leftovers()
        self._snapshot = Snapshot(self._objects, self.settings, self._sql_memory)
        self._stale = False
        self._restored = False
        self._pid = os.getpid()
        self._closed = False

    def refresh(self) -> None:
        """See what others have committed since. Questions asked before keep their answers."""
        self._check_same()
        # A copy of the store may hold less than what was seen.
        before = None if self._restored else self._snapshot
        newer = Snapshot(self._objects, self.settings, self._sql_memory, before)
        if newer.view != self._snapshot.view:
            self._snapshot = newer
        self._stale = self._restored = False

    def snapshot(self) -> Snapshot:
        """Return what this handle sees now; everything committed through it is in."""
        self._check_same()
        if self._stale or self._restored:
            self.refresh()
        return self._snapshot

    def sql(self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> "duckdb.DuckDBPyRelation":
        """Ask one question in SQL: a DuckDB relation (`.df()`, `.pl()`, `.arrow()`, `.fetchall()`).

        Tables: records, gradients, steps, parameters, samples, attempts, fingerprints, rollbacks, commits;
        live rows only. The query can read these tables and nothing else, and changes nothing.

        Raises:
            InvalidInputError: if it is not one SELECT, or DuckDB does not understand it.
        """
        return self.snapshot().catalog.sql(arguments.text(query, "a query"), params)

    def read(self, where: str | None = None) -> Iterator[StoredRecord]:
        """Iterate over records, all or those where an SQL condition on the `records` table holds.

        Cost: memory of one record and a cache of 64 MB.

        Raises:
            CorruptionError: if an object is missing or is not what was written.
        """
        return self.snapshot().read(None if where is None else arguments.text(where, "where"))

    def zarr(self) -> Iterator[Arrays]:
        """Iterate over the arrays of the store as zarr-python opens them, for tools that read Zarr: read-only, checked.

        Yields (group, rows) for each commit that has arrays, in the order of the SQL table `commits`.

        `group` is a `zarr.Group`. Its arrays are named `w<width>-<dtype>` and have the shape (rows, width); bfloat16 is
        uint16, the upper half of a float32. An object is read, and checked whole, when a slice of its array is taken.

        `rows` is an arrow table that says where gradients lie. Of the gradient part of (attempt, epoch, step, rank,
        sample, parameter, part), the key of the SQL table `gradients`, the rows [start, start + rows) of `array` are
        its `role`. Of encoding `dense` it is its `values`; of `rows`, zeros but for `values` in the rows `indices`; of
        `factors`, `output_gradients.T @ inputs`, where there is a `row_map` of these rows of the inputs alone. The
        roles with `_scales` (int8), and matrices in several `block`s (rows above 1 MB), are explained in
        docs/format.md. Rows that a later attempt supersedes are among them, though SQL leaves them out; what the arrays
        hold of the SQL table `states` is not.

        Raises:
            CorruptionError: an object is missing or is not what was written, also when an array is read.
        """
        return self.snapshot().arrays()

    def gradient(self, epoch: int, step: int, sample: int, parameter: str, *, rank: int = 0) -> np.ndarray:
        """Return one gradient as a dense array of the parameter's shape, float64 if recorded so, else float32.

        Raises:
            NotFoundError: if it was not recorded.
        """
        epoch, step = arguments.moment(epoch, step)
        sample, rank = arguments.sample_id(sample), arguments.rank_number(rank)
        for record in self.read(f"epoch = {epoch} AND step = {step} AND sample = {sample} AND rank = {rank}"):
            return record.dense(parameter)
        raise errors.NotFoundError(
            f"{self.path} has no record of epoch {epoch}, step {step}, sample {sample}, rank {rank}", sample=sample
        )

    def latest_fingerprints(self) -> tuple[int, int, dict[str, str]] | None:
        """Return the newest (epoch, step) whose parameters' digests were kept, and the digests."""
        return self.snapshot().latest_fingerprints()

    def probe(self) -> tuple[list[Any], str] | None:
        """Return (batches, loss) of the probe given last; without one, of rows that were kept of the training; or None.

        The loss of such rows may be `unknown`, and what is to be forgotten may be among them: a rollback that is given
        no probe leaves it out.
        """
        given = self.snapshot().probe()
        if given is not None:
            return given
        rows = self.snapshot().kept_rows()
        return (rows.batches(), rows.loss or "unknown") if rows else None

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._snapshot.view.commits)} commits"
        return f"<timstore.Store {str(self.path)!r} mode={self.mode!r} {state}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise errors.StateError(
            f"a store cannot be copied or sent to another process (pickle, deepcopy, workers): give them the path "
            f"{str(self.path)!r}, and open it there",
            kind="not-copied",
        )

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise errors.StateError(
                f"{self.path} was opened in process {self._pid}: a forked child opens its own handle", kind="forked"
            )
        if self._closed:
            raise errors.StateError(f"{self.path} is closed; open it again", kind="closed")
        self._place.require()

    def _check_same(self) -> None:
        """Refuse a store that another one took the place of; a copy of it is read from the start."""
        self._check_open()
        self._restored |= not self._place.check()


def _sql_memory(size: Any) -> int:
    taken = arguments.byte_count(size, "sql_memory")
    if taken < _LEAST_SQL_MEMORY:
        raise errors.InvalidInputError(
            f'sql_memory is at least "{_LEAST_SQL_MEMORY // 10**6}MB", not {errors.shown(size)}'
        )
    return taken
