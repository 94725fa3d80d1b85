"""The row tables of one commit, against its record and against each other."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timstore.encoding import PRECISIONS
from timstore.format.log import Commit, Moment
from timstore.format.segments import STATE_ROLES
from timstore.verification.examiner import Examiner

# None: the file is there, or should be, and cannot be read. A kind without rows is absent.
Tables = Mapping[str, pa.Table | None]

ENCODINGS = ("factors", "dense", "rows")
_MOMENTS = ("records", "gradients", "steps", "fingerprints", "states")
_RECORD = ["epoch", "step", "rank", "sample"]
_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "gradients": {"encoding": ENCODINGS, "precision": PRECISIONS},
    "states": {"role": STATE_ROLES, "precision": PRECISIONS},
}


def check_rows(examiner: Examiner, commit: Commit, tables: Tables, path: str) -> None:
    """Find what disagrees between a commit's record and its rows.

    Args:
        path: of the record, or the checkpoint, that says what the commit holds.
    """
    records = tables.get("records")
    if records is not None or "records" not in tables:
        count = records.num_rows if records is not None else 0
        if count != commit.records:
            message = f"it says {commit.records} records, and its rows are {count}"
            examiner.add("count", path, message, commit, samples=samples_of(tables))
    for kind, table in tables.items():
        if table is not None:
            _check_table(examiner, commit, kind, table, path)
    gradients = tables.get("gradients")
    if gradients is not None and ("records" not in tables or records is not None):
        alone = _without(gradients, records)
        if alone.num_rows:
            message = f"{alone.num_rows} gradients belong to no record of their commit"
            ids = _distinct(alone["sample"])
            examiner.add("count", path, message, commit, steps=moments(alone), samples=ids)


def _check_table(examiner: Examiner, commit: Commit, kind: str, table: pa.Table, path: str) -> None:
    if "attempt" in table.column_names and kind != "parameters":
        others = [number for number in table["attempt"].unique().to_pylist() if number != commit.attempt]
        if others:
            message = f"{kind} of attempt {others[0]} in a commit of attempt {commit.attempt}"
            examiner.add("count", path, message, commit)
    if kind in _MOMENTS:
        covered = moments(table)
        if covered and (commit.steps is None or covered[0] < commit.steps[0] or covered[1] > commit.steps[1]):
            said = "no steps" if commit.steps is None else f"steps {commit.steps[0]} to {commit.steps[1]}"
            message = f"it says {said}, and its {kind} are of {covered[0]} to {covered[1]}"
            examiner.add("count", path, message, commit, steps=covered)
    for column, words in _WORDS.get(kind, {}).items():
        others = [word for word in table[column].unique().to_pylist() if word not in words]
        if others:
            message = f"{kind} with {column} {others[0]!r:.40}, which is none of {', '.join(words)}"
            examiner.add("malformed", path, message, commit)


def moments(table: pa.Table) -> tuple[Moment, Moment] | None:
    """Return the first and the last (epoch, step) of a table's rows."""
    if table.num_rows == 0:
        return None
    epochs, steps = table["epoch"].to_numpy(), table["step"].to_numpy()
    first, last = epochs.min(), epochs.max()
    return (int(first), int(steps[epochs == first].min())), (int(last), int(steps[epochs == last].max()))


def samples_of(tables: Tables, owners: np.ndarray | None = None) -> tuple[int, ...]:
    """Return the samples of a commit, or of those gradients of it, as far as a table that can be read tells."""
    gradients, records = tables.get("gradients"), tables.get("records")
    if owners is not None and gradients is not None:
        sound = owners[(owners >= 0) & (owners < gradients.num_rows)]
        return _distinct(gradients["sample"].take(pa.array(np.unique(sound))))
    found = records if records is not None else gradients
    return () if found is None else _distinct(found["sample"])


def steps_of(tables: Tables, owners: np.ndarray) -> tuple[Moment, Moment] | None:
    """Return the steps of some gradients of a commit, None if their table cannot be read."""
    gradients = tables.get("gradients")
    if gradients is None:
        return None
    sound = np.unique(owners[(owners >= 0) & (owners < gradients.num_rows)])
    return moments(gradients.select(["epoch", "step"]).take(pa.array(sound)))


def _distinct(column: pa.ChunkedArray) -> tuple[int, ...]:
    return tuple(sorted(pc.unique(column).to_pylist()))


def _without(gradients: pa.Table, records: pa.Table | None) -> pa.Table:
    """Return the gradients whose record is not there."""
    if records is None:
        return gradients.select(_RECORD)
    return gradients.select(_RECORD).join(
        records.select(_RECORD), keys=_RECORD, join_type="left anti", use_threads=False
    )
