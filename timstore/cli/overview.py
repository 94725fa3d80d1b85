"""What is in a store, by a few aggregates over its tables."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timstore

Moment = tuple[int, int]
Rows = list[dict[str, Any]]

_RECORDS = "SELECT count(*) AS records, count(DISTINCT sample) AS samples FROM records"
_STEPS = """
SELECT count(*) AS steps, min(epoch) AS first_epoch, max(epoch) AS last_epoch,
    arg_min(step, (epoch, step)) AS first_step, arg_max(step, (epoch, step)) AS last_step
FROM (SELECT epoch, step FROM records UNION SELECT epoch, step FROM steps)
"""
_ATTEMPTS = """
SELECT attempt, from_epoch, from_step, ranks, recorded, len(scope) AS chosen, coalesce(records, 0) AS records
FROM attempts LEFT JOIN (SELECT attempt, count(*) AS records FROM records GROUP BY ALL) USING (attempt)
ORDER BY attempt
"""
_ENCODINGS = """
SELECT encoding, precision, count(*) AS gradients, sum(bytes)::BIGINT AS bytes, sum(dense_bytes)::BIGINT AS dense_bytes
FROM gradients GROUP BY ALL ORDER BY bytes DESC, encoding, precision
"""
# A gradient in several parts would be dense once.
_PARAMETERS = """
SELECT parameter, shape, dtype, numel, coalesce(encodings, []) AS encodings, coalesce(bytes, 0) AS bytes,
    coalesce(dense_bytes, 0) AS dense_bytes
FROM parameters FULL JOIN (
    SELECT parameter, list_sort(list(DISTINCT encoding)) AS encodings, sum(bytes)::BIGINT AS bytes,
        sum(dense_bytes) FILTER (part = 0)::BIGINT AS dense_bytes
    FROM gradients GROUP BY ALL
) USING (parameter)
ORDER BY bytes DESC, parameter
"""
_STATES = """
SELECT role, count(*) AS parameters, sum(bytes)::BIGINT AS bytes FROM states GROUP BY ALL ORDER BY bytes DESC, role
"""
_COVERAGE = """
SELECT
    count(*) FILTER (recorded) AS recorded,
    count(*) FILTER (drawn) AS drawn,
    count(*) FILTER (drawn AND NOT recorded) AS not_recorded,
    count(*) FILTER (NOT drawn AND NOT recorded) AS never_drawn
FROM (
    SELECT sample, bool_or(is_record) AS recorded, bool_or(is_draw) AS drawn FROM (
        SELECT sample, true AS is_record, false AS is_draw FROM records
        UNION ALL SELECT unnest(sample_ids), false, true FROM steps
        UNION ALL SELECT unnest(scope), false, false FROM attempts
        UNION ALL SELECT sample, false, false FROM samples
    ) GROUP BY sample
)
"""
_GAPS = """
SELECT count(*) AS gaps FROM (SELECT DISTINCT epoch, step, unnest(sample_ids) AS sample FROM steps)
SEMI JOIN (SELECT DISTINCT sample FROM records) USING (sample) ANTI JOIN records USING (epoch, step, sample)
"""
_COMMITS = 'SELECT count(*) AS commits, max("at") AS last_at FROM commits'
_ROLLBACKS = 'SELECT "at", len(samples) AS samples, method, strength FROM rollbacks ORDER BY "at"'


@dataclass(frozen=True, slots=True)
class Overview:
    """What is in a store. Sizes of gradients are before lossless compression, unless they say otherwise.

    Attributes:
        disk_bytes: of all files, compressed.
        bytes, dense_bytes: of the gradients as they are encoded, and as if each were dense.
        first, last: (epoch, step) of the records and steps; None where there are none.
        attempts: in order; `chosen` is how many samples each was told to record, None for all or unknown.
        encodings, parameters, states: the largest first.
        coverage: samples, but for `gaps`: how often a recorded sample was drawn and that was not recorded. All but
            `recorded` are None where the steps do not name their batches.
        rollbacks: each that was applied or undone, in order.
    """

    path: str
    format: str
    precision: str
    durability: str
    disk_bytes: int
    bytes: int
    dense_bytes: int
    records: int
    samples: int
    steps: int
    epochs: Moment | None
    first: Moment | None
    last: Moment | None
    commits: int
    last_commit_at: str | None
    attempts: Rows
    encodings: Rows
    parameters: Rows
    states: Rows
    coverage: dict[str, int | None]
    rollbacks: Rows

    @property
    def ratio(self) -> float | None:
        """How many times smaller the gradients are than dense ones, before lossless compression."""
        return smaller(self.dense_bytes, self.bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return every field and the ratios, ready for JSON."""
        return {**asdict(self), "ratio": self.ratio}


def overview(store: timstore.Store) -> Overview:
    """Return what is in a store.

    Cost: its row tables are loaded, then some aggregates, each a fraction of a second for millions of gradients.
    """
    records, steps, commits = _rows(store, _RECORDS)[0], _rows(store, _STEPS)[0], _rows(store, _COMMITS)[0]
    encodings, parameters = _rows(store, _ENCODINGS), _rows(store, _PARAMETERS)
    for row in encodings + parameters:
        row["ratio"] = smaller(row["dense_bytes"], row["bytes"])
    counts: dict[str, int | None] = dict(_rows(store, _COVERAGE)[0])
    if counts["drawn"]:
        counts.update(_rows(store, _GAPS)[0])
    else:
        # Steps that `append` alone made do not name their batch: then nobody knows who was drawn.
        counts.update(dict.fromkeys(("drawn", "not_recorded", "never_drawn", "gaps")))
    has_steps = steps["steps"] > 0
    return Overview(
        path=str(store.path),
        format=".".join(map(str, store.settings.format)),
        precision=store.settings.precision,
        durability=store.settings.durability,
        disk_bytes=sum(_sizes(store.path)),
        bytes=sum(row["bytes"] for row in encodings),
        dense_bytes=sum(row["dense_bytes"] for row in parameters),
        records=records["records"],
        samples=records["samples"],
        steps=steps["steps"],
        epochs=(steps["first_epoch"], steps["last_epoch"]) if has_steps else None,
        first=(steps["first_epoch"], steps["first_step"]) if has_steps else None,
        last=(steps["last_epoch"], steps["last_step"]) if has_steps else None,
        commits=commits["commits"],
        last_commit_at=commits["last_at"],
        attempts=_rows(store, _ATTEMPTS),
        encodings=encodings,
        parameters=parameters,
        states=_rows(store, _STATES),
        coverage=counts,
        rollbacks=_rows(store, _ROLLBACKS),
    )


def smaller(dense_bytes: int, bytes_: int) -> float | None:
    """Return how many times smaller something is than dense."""
    return dense_bytes / bytes_ if bytes_ else None


def _rows(store: timstore.Store, query: str) -> Rows:
    answer = store.sql(query)
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.fetchall()]


def _sizes(folder: Path | str) -> Iterator[int]:
    """Yield the size of every file; those that another process deletes meanwhile count as nothing."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from _sizes(entry.path)
                else:
                    yield entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
