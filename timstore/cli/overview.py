"""What is in a store, by a few aggregates over its tables, and how `timstore info` says it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timstore
from timstore.cli.terminal import aligned, counted, size

# Parameters that are listed unless all are asked for.
_LARGEST = 10
_SIZES = ("size", "share", "ratio")

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


def overview(store: timstore.Store) -> dict[str, Any]:
    """Return what is in a store, ready for JSON. Sizes of gradients are before lossless compression.

    Cost: its row tables are loaded, then some aggregates, each a fraction of a second for millions of gradients.

    Returns:
        disk_bytes: of all files, compressed.
        bytes, dense_bytes, ratio: of the gradients as they are encoded, as if each were dense, and how many times that
            is more.
        first, last: (epoch, step) of the records and steps; None where there are none.
        attempts: in order; `chosen` is how many samples each was told to record, None for all or unknown.
        encodings, parameters, states: the largest first.
        coverage: samples, but for `gaps`: how often a recorded sample was drawn and that was not recorded. All but
            `recorded` are None where the steps do not name their batches.
        rollbacks: each that was applied or undone, in order.
    """
    records, steps, commits = _rows(store, _RECORDS)[0], _rows(store, _STEPS)[0], _rows(store, _COMMITS)[0]
    encodings, parameters = _rows(store, _ENCODINGS), _rows(store, _PARAMETERS)
    for row in encodings + parameters:
        row["ratio"] = _ratio(row["dense_bytes"], row["bytes"])
    coverage: dict[str, int | None] = dict(_rows(store, _COVERAGE)[0])
    if coverage["drawn"]:
        coverage.update(_rows(store, _GAPS)[0])
    else:
        # Steps that `append` alone made do not name their batch: then nobody knows who was drawn.
        coverage.update(dict.fromkeys(("drawn", "not_recorded", "never_drawn", "gaps")))
    has_steps = steps["steps"] > 0
    stored = sum(row["bytes"] for row in encodings)
    dense = sum(row["dense_bytes"] for row in parameters)
    return {
        "path": str(store.path),
        "format": ".".join(map(str, store.settings.format)),
        "precision": store.settings.precision,
        "durability": store.settings.durability,
        "disk_bytes": sum(_file_sizes(store.path)),
        "bytes": stored,
        "dense_bytes": dense,
        "records": records["records"],
        "samples": records["samples"],
        "steps": steps["steps"],
        "epochs": (steps["first_epoch"], steps["last_epoch"]) if has_steps else None,
        "first": (steps["first_epoch"], steps["first_step"]) if has_steps else None,
        "last": (steps["last_epoch"], steps["last_step"]) if has_steps else None,
        "commits": commits["commits"],
        "last_commit_at": commits["last_at"],
        "attempts": _rows(store, _ATTEMPTS),
        "encodings": encodings,
        "parameters": parameters,
        "states": _rows(store, _STATES),
        "coverage": coverage,
        "rollbacks": _rows(store, _ROLLBACKS),
        "ratio": _ratio(dense, stored),
    }


def _ratio(dense_bytes: int, stored_bytes: int) -> float | None:
    """Return how many times smaller something is than dense."""
    return dense_bytes / stored_bytes if stored_bytes else None


def _rows(store: timstore.Store, query: str) -> Rows:
    answer = store.sql(query)
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.fetchall()]


def _file_sizes(folder: Path | str) -> Iterator[int]:
    """Yield the size of every file; those that another process deletes meanwhile count as nothing."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from _file_sizes(entry.path)
                else:
                    yield entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue


def lines(contents: dict[str, Any], every: bool) -> Iterator[str]:
    """Yield what a person reads of `overview`.

    Args:
        every: list all parameters, not the ten largest alone.
    """
    stored = contents["bytes"]
    facts = {
        "store": f"{contents['path']}, format {contents['format']}, precision {contents['precision']}",
        "on disk": f"{size(contents['disk_bytes'])} in all",
        "gradients": "none",
        "records": f"{contents['records']:,} of {counted(contents['samples'], 'sample')}",
        "steps": _steps(contents),
        "coverage": _coverage(contents["coverage"]),
        "commits": f"{contents['commits']:,}",
        "rollbacks": _rollbacks(contents["rollbacks"]),
    }
    if stored:
        dense = f"dense {size(contents['dense_bytes'])}, {contents['ratio']:.1f} times as much"
        facts["gradients"] = f"{size(stored)}; {dense}"
    if contents["last_commit_at"]:
        facts["commits"] += f", the last {_when(contents['last_commit_at'])}"
    for state in contents["states"]:
        facts[state["role"]] = f"{size(state['bytes'])}, of {counted(state['parameters'], 'parameter')}"
    width = max(map(len, facts)) + 2
    yield from (f"{name:<{width}}{fact}" for name, fact in facts.items())
    yield from _table(
        ("attempt", "from", "ranks", "samples", "records"),
        (
            (row["attempt"], (row["from_epoch"], row["from_step"]), row["ranks"], _scope(row), f"{row['records']:,}")
            for row in contents["attempts"]
        ),
    )
    yield from _table(
        ("encoding", "precision", "gradients", *_SIZES),
        (
            (row["encoding"], row["precision"], f"{row['gradients']:,}", *_sizes(row, stored))
            for row in contents["encodings"]
        ),
        left=2,
    )
    shown = contents["parameters"][: None if every else _LARGEST]
    yield from _table(
        ("parameter", "shape", "encoding", *_SIZES),
        ((row["parameter"], _shape(row["shape"]), "+".join(row["encodings"]), *_sizes(row, stored)) for row in shown),
    )
    if others := len(contents["parameters"]) - len(shown):
        yield f"and {counted(others, 'smaller one')}: --all lists them"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> Iterator[str]:
    """Yield a table below an empty line, or nothing where it has no rows."""
    texts = [[str(cell) for cell in row] for row in rows]
    if texts:
        yield f"\n{aligned(header, texts, left)}"


def _steps(contents: dict[str, Any]) -> str:
    if not contents["steps"]:
        return "none"
    first, last = contents["epochs"]
    epochs = f"epoch {first}" if first == last else f"epochs {first} to {last}"
    return f"{contents['steps']:,}, {epochs}, (epoch, step) from {contents['first']} to {contents['last']}"


def _coverage(counts: dict[str, int | None]) -> str:
    if counts["drawn"] is None:
        return f"{counts['recorded']:,} samples recorded; the steps do not name their batches"
    text = (
        f"{counts['recorded']:,} samples recorded, {counts['not_recorded']:,} drawn without, "
        f"{counts['never_drawn']:,} never drawn"
    )
    return text + (f"; {counted(counts['gaps'], 'gap')} in what is recorded" if counts["gaps"] else "")


def _rollbacks(rows: Rows) -> str:
    if not rows:
        return "none"
    last = rows[-1]
    return f"{len(rows)}, the last {_when(last['at'])}: {counted(last['samples'], 'sample')} by {last['method']}"


def _when(at: str) -> str:
    """Return a time of the log, which is UTC, to the second."""
    return f"{at[:10]} {at[11:19]} UTC"


def _scope(attempt: dict[str, Any]) -> str:
    if attempt["recorded"] == "selected":
        return f"{attempt['chosen']:,} chosen"
    return attempt["recorded"] or "as appended"


def _shape(shape: list[int] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


def _sizes(row: dict[str, Any], total: int) -> tuple[str, str, str]:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}x"
    return size(row["bytes"]), f"{row['bytes'] / total:.1%}" if total else "", ratio
