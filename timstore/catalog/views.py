"""What SQL shows: live rows, under the names of the data model."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from timstore.catalog.tables import AttemptRow, quoted
from timstore.format.schemas import SCHEMAS

_RECORD = "attempt, epoch, step, rank, sample"


def create_views(connection: duckdb.DuckDBPyConnection, attempts: Sequence[AttemptRow]) -> None:
    """Make the views, in the place of older ones: rows that no later attempt supersedes."""
    live = _live(attempts)
    records = f"{_records(connection)} r{live}"
    # ENUMs would reach the user as categories.
    text = "REPLACE (encoding::VARCHAR AS encoding, precision::VARCHAR AS precision)"
    views = {
        "records": f"SELECT {_columns('records')} FROM {records}",
        "gradients": f"SELECT * EXCLUDE (commit, owner) {text} FROM stored.gradients r{live}",
        "steps": f"SELECT {_columns('steps')} FROM stored.steps r{live}",
        "fingerprints": f"SELECT {_columns('fingerprints')} FROM stored.fingerprints r{live}",
        "states": f"SELECT {_columns('states')} FROM stored.states r{live}",
        "parameters": (
            "SELECT parameter, shape, dtype, numel, group_id FROM stored.parameters "
            "QUALIFY row_number() OVER (PARTITION BY parameter ORDER BY commit DESC, rowid DESC) = 1"
        ),
        "samples": (
            f"SELECT * FROM (SELECT r.sample FROM {records} UNION SELECT sample FROM stored.samples) "
            "LEFT JOIN stored.samples USING (sample)"
        ),
        "rollbacks": f"SELECT {_columns('rollbacks')} FROM stored.rollbacks r ORDER BY r.commit, r.rowid",
        "attempts": "FROM stored.attempts",
        "commits": "SELECT * EXCLUDE (commit) FROM stored.commits",
    }
    for name, query in views.items():
        connection.execute(f"CREATE OR REPLACE VIEW main.{name} AS {query}")


def _live(attempts: Sequence[AttemptRow]) -> str:
    """Return the condition that a row is live, nothing if all are.

    A row of an attempt is live until the first moment that a later attempt starts from. Written out as constants,
    this takes half the time of a join with the attempts.
    """
    cases = []
    until: tuple[int, int] | None = None
    for attempt in sorted(attempts, key=lambda one: one.attempt, reverse=True):
        if until is not None:
            epoch, step = until
            cases.append(f"WHEN {attempt.attempt} THEN r.epoch < {epoch} OR (r.epoch = {epoch} AND r.step < {step})")
        start = attempt.from_epoch, attempt.from_step
        until = start if until is None else min(until, start)
    return f" WHERE CASE r.attempt {' '.join(cases)} ELSE true END" if cases else ""


def _records(connection: duckdb.DuckDBPyConnection) -> str:
    """Return where one row per record is read: put together from its parts only if some came in several calls."""
    again = f"SELECT 1 FROM stored.records GROUP BY {_RECORD} HAVING count(*) > 1 LIMIT 1"
    if not connection.execute(again).fetchall():
        return "stored.records"
    return (
        f"(SELECT {_RECORD}, any_value(loss) AS loss, any_value(tokens) AS tokens, sqrt(sum(norm * norm)) AS norm, "
        f"sum(bytes)::BIGINT AS bytes, sum(dot) AS dot FROM stored.records GROUP BY {_RECORD})"
    )


def _columns(kind: str) -> str:
    return ", ".join(f"r.{quoted(name)}" for name in SCHEMAS[kind].names)
