"""The tables that SQL sees: their columns, which rows are live, records put together, the user's own columns."""

import random

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import timstore
from timstore.catalog import AttemptRow, Catalog, CommitRows
from timstore.errors import InvalidInputError, StateError
from timstore.format.schemas import ADDED, SCHEMAS

KEY = ["attempt", "epoch", "step", "rank", "sample"]
COLUMNS = {
    "records": [*KEY, "loss", "tokens", "norm", "bytes", "dot"],
    "gradients": [*KEY, "parameter", "part", "encoding", "precision", "norm", "rel_error", "bytes", "dense_bytes"],
    "steps": [
        *("attempt", "epoch", "step", "rank", "group_id", "optimizer", "lr", "momentum", "dampening", "nesterov"),
        *("beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize", "consumed_ratio", "samples", "tokens"),
        *("sample_ids", "idle", "fresh", "amsgrad", "counter", "grad_norm", "amp_scale", "clip_value", "mean_over"),
        *("micro_batches", "skipped", "options"),
    ],
    "parameters": ["parameter", "shape", "dtype", "numel", "group_id"],
    "samples": ["sample"],
    "attempts": ["attempt", "from_epoch", "from_step", "ranks", "scope", "recorded", "digest_before"],
    "fingerprints": ["attempt", "epoch", "step", "parameter", "digest"],
    "states": [
        *("attempt", "epoch", "step", "role", "name", "parameter", "precision", "rel_error", "bytes", "rollback_id"),
    ],
    "rollbacks": [
        *("at", "samples", "strength", "method", "records", "delta_norm", "digest_before", "digest_after"),
        *("removed", "parameters", "optimizer_states"),
    ],
    "commits": ["writer", "seq", "at", "records", "bytes"],
}


def add(store, step, sample, **gradients):
    """Append one record; by default of a parameter `w`."""
    gradients = gradients or {"w": np.full(4, step + 1, np.float32)}
    store.append(0, step, sample, gradients, lr=0.1)


@pytest.mark.parametrize("filled", [False, True])
def test_every_table_has_its_columns_in_an_empty_store_too(store, filled):
    if filled:
        add(store, 0, 1)
        store.commit()
    for table, columns in COLUMNS.items():
        relation = store.sql(f"FROM {table}")
        assert relation.columns == columns, table
        assert filled or relation.fetchall() == []


def test_a_row_is_live_unless_a_later_attempt_starts_at_or_before_it():
    draw = random.Random(4)
    for _ in range(20):
        starts = [(0, 0), *((draw.randrange(3), draw.randrange(4)) for _ in range(draw.randrange(4)))]
        attempts = [AttemptRow(number, *start, 1, None, "all") for number, start in enumerate(starts)]
        # An attempt records from its start on.
        every = [
            (number, epoch, step)
            for number, start in enumerate(starts)
            for epoch in range(3)
            for step in range(4)
            if (epoch, step) >= start and draw.random() < 0.8
        ]
        live = {row for row in every if not any(start <= row[1:] for start in starts[row[0] + 1 :])}
        rows = [
            {"attempt": attempt, "epoch": epoch, "step": step, "rank": 0, "sample": 7, "parameter": "w"}
            for attempt, epoch, step in every
        ]
        kinds = ("records", "gradients", "steps", "fingerprints")
        tables = {kind: pa.Table.from_pylist(rows, SCHEMAS[kind]) for kind in kinds}
        catalog = Catalog.build([CommitRows(0, "w", 0, "now", len(rows), 1, tables)], attempts)
        for kind in kinds:
            found = catalog.sql(f"SELECT attempt, epoch, step FROM {kind}").fetchall()
            assert len(found) == len(live)
            assert set(found) == live, (kind, starts)
        catalog.close()


def test_a_record_that_came_in_two_calls_is_one_row(store):
    add(store, 0, 1, w=np.full(4, 3, np.float32))
    store.commit()
    add(store, 0, 1, v=np.full(4, 4, np.float32))
    add(store, 0, 2)
    store.commit()
    rows = store.sql("SELECT sample, norm, bytes FROM records ORDER BY sample").fetchall()
    assert rows == [(1, 10.0, 32), (2, 2.0, 16)]
    (record, _) = store.read()
    assert {name: record.dense(name).tolist() for name in record.gradients} == {"w": [3] * 4, "v": [4] * 4}


def test_parameters_are_as_they_were_declared_last(store):
    add(store, 0, 1, w=np.ones((2, 3), np.float32))
    store.declare([timstore.records.Parameter("w", (2, 3), "float16", 1)])
    store.commit()
    assert store.sql("FROM parameters").fetchall() == [("w", [2, 3], "float16", 6, 1)]


def test_a_question_takes_parameters_and_its_answer_outlives_refresh_and_close(tmp_path):
    with timstore.open(tmp_path / "s") as store:
        for sample in range(3):
            add(store, 0, sample)
        store.commit()
        assert store.sql("SELECT sample FROM records WHERE sample > ? ORDER BY 1", [0]).fetchall() == [(1,), (2,)]
        assert store.sql("SELECT sample FROM records WHERE sample = $one", {"one": 2}).df()["sample"].tolist() == [2]
        assert store.sql("SELECT count(*) AS n FROM records").pl()["n"].to_list() == [3]
        held = store.sql("SELECT count(*) FROM records")
        narrowed = store.sql("FROM records").filter("sample > 0")
        add(store, 1, 5)
        store.commit()
        store.refresh()
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(4,)]
    assert held.fetchall() == [(3,)]
    assert len(narrowed.fetchall()) == 2
    with pytest.raises(StateError, match="closed"):
        store.sql("FROM records")


def test_what_duckdb_says_of_a_wrong_question_is_passed_on_with_the_tables_names(store):
    with pytest.raises(InvalidInputError, match=r"(?s)nothere.*records, gradients, steps"):
        store.sql("SELECT nothere FROM records")
    with pytest.raises(InvalidInputError, match="one SELECT at a time"):
        store.sql("SELECT 1; SELECT 2")
    with pytest.raises(InvalidInputError):
        store.sql(None)


# --- the user's own columns ----------------------------------------------------------------------------------

ROWS = [{"sample": 1, "owner": "ann", "weight": 0.5}, {"sample": 9, "owner": "ben", "weight": 1.5}]
FORMS = {
    "rows": ROWS,
    "columns": {"sample": np.array([1, 9]), "owner": ("ann", "ben"), "weight": [0.5, 1.5]},
    "pandas": pd.DataFrame(ROWS),
    "pandas category": pd.DataFrame(ROWS).astype({"owner": "category", "sample": "int32"}),
    "polars": pl.DataFrame(ROWS),
    "arrow": pa.Table.from_pylist(ROWS),
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_come_in_any_form_and_stay_with_recorded_and_unrecorded_samples(tmp_path, form):
    with timstore.open(tmp_path / "s") as store:
        add(store, 0, 1)
        add(store, 0, 2)
        store.samples.update(FORMS[form])
    with timstore.open(tmp_path / "s", "r") as store:
        rows = store.sql("SELECT sample, owner, weight FROM samples ORDER BY sample").fetchall()
        assert rows == [(1, "ann", 0.5), (2, None, None), (9, "ben", 1.5)]
        chosen = store.sql("SELECT step FROM records JOIN samples USING (sample) WHERE owner = 'ann'").fetchall()
        assert chosen == [(0,)]


def test_the_last_value_written_for_a_sample_and_column_wins(store):
    store.samples.update(ROWS)
    store.samples.update([{"sample": 9, "OWNER": "cid"}, {"sample": 1, "note": 'a "quoted" one'}])
    store.samples.update([{"sample": 1, "weight": 2}])  # whole numbers fit into what is a fraction
    store.samples.update({"sample": np.array([], np.int64)})
    found = store.sql("SELECT sample, owner, weight, note FROM samples ORDER BY sample").fetchall()
    assert found == [(1, "ann", 2.0, 'a "quoted" one'), (9, "cid", 1.5, None)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"owner": "ann"}], "integer column `sample`"),
        ([{"sample": "1"}], "holds integers"),
        ([{"sample": 1.0}], "holds integers"),
        ([{"sample": None}, {"sample": 1}], "without gaps"),
        ([{"sample": 1, "weight": "heavy"}], "column weight holds double, not string"),
        ({"sample": [1, 2], "owner": ["ann"]}, "no table"),
        ([{"sample": 1, "owner": object()}], "no table"),
        ("ann", "not str"),
        (3, "not int"),
    ],
)
def test_rows_that_cannot_be_attached_are_refused_and_nothing_is_written(store, rows, message):
    store.samples.update(ROWS)
    with pytest.raises(InvalidInputError, match=message):
        store.samples.update(rows)
    assert store.sql("SELECT sample, owner, weight FROM samples ORDER BY sample").fetchall() == [
        (1, "ann", 0.5),
        (9, "ben", 1.5),
    ]
    assert store.sql("SELECT count(*) FROM commits").fetchall() == [(1,)]


def test_rows_of_format_1_0_lack_the_newer_columns_and_read_as_null():
    row = {"attempt": 0, "epoch": 0, "step": 0, "rank": 0, "sample": 7}
    tables = {}
    for kind in ("records", "steps", "states"):
        names = [name for name in SCHEMAS[kind].names if name not in ADDED[kind]]
        schema = pa.schema([SCHEMAS[kind].field(name) for name in names])
        tables[kind] = pa.Table.from_pylist([{name: row[name] for name in names if name in row}], schema)
    catalog = Catalog.build([CommitRows(0, "w", 0, "now", 1, 1, tables)], [AttemptRow(0, 0, 0, 1, None, "all")])
    assert catalog.sql("SELECT sample, dot FROM records").fetchall() == [(7, None)]
    assert catalog.sql("SELECT step, amp_scale, options, counter FROM steps").fetchall() == [(0, None, None, None)]
    assert catalog.sql("SELECT step, name FROM states").fetchall() == [(0, None)]
    catalog.close()


def test_columns_that_sql_cannot_tell_apart_are_refused_before_they_are_written(store):
    with pytest.raises(timstore.InvalidInputError, match="Owner, owner apart"):
        store.samples.update([{"sample": 1, "owner": "ada"}, {"sample": 2, "Owner": "bob"}])
    store.samples.update([{"sample": 1, "owner": "ada"}])
    assert store.sql("SELECT sample, owner FROM samples").fetchall() == [(1, "ada")]
