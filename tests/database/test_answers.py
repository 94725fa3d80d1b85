"""`store.sql`: times with a zone, relations of a closed store, Ctrl-C, and what fails on its way to the last row."""

import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime

import duckdb
import numpy as np
import pytest

import timstore

# Years of work, of which DuckDB may do all in threads of its own, where it looks for no signal.
ENDLESS = "SELECT sum(sqrt(range)) AS x FROM range(100000000000000)"
ROWS = ("fetchall", "to_dicts", "df", "pl", "to_arrow_table", "fetchnumpy", "__str__", "__len__")


@pytest.fixture
def store(tmp_path):
    with timstore.open(tmp_path / "run.tim") as opened:
        opened.append(epoch=0, step=0, sample=1, gradients={"w": np.ones((2, 2), np.float32)}, lr=0.1)
        opened.commit()
        yield opened


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of DuckDB, by pandas
def test_times_with_a_zone_need_no_pytz(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytz", None)  # as where it is not installed
    before = datetime.now(UTC)
    (row,) = store.sql("SELECT now(), current_timestamp, now() - INTERVAL 1 DAY, 3, now()").fetchall()
    after = datetime.now(UTC)
    assert before <= row[0] == row[1] == row[4] <= after
    assert (row[0] - row[2]).days == 1 and row[3] == 3
    moment = "TIMESTAMPTZ '2020-01-01 10:00:00+02'"
    expected = datetime(2020, 1, 1, 8, tzinfo=UTC)
    nested = store.sql(
        f"SELECT [{moment}, NULL], {{'a b': {moment}, 'n': 1}}, MAP {{'k': [{moment}]}}, array_value({moment}), "
        f"NULL::TIMESTAMPTZ, [{{'deep': {moment}}}], '2020-01-01'::TIMESTAMP, [1.5]"
    )
    assert nested.fetchall() == [
        (
            [expected, None],
            {"a b": expected, "n": 1},
            {"k": [expected]},
            (expected,),
            None,
            [{"deep": expected}],
            datetime(2020, 1, 1),
            [1.5],
        )
    ]
    assert store.sql(f"SELECT {moment} AS t").to_dicts() == [{"t": expected}]
    assert list(store.sql(f"SELECT {moment} AS t, 1 AS t").iter_rows()) == [(expected, 1)]
    times = f"SELECT {moment} AS t"
    assert store.sql(times).df()["t"][0] == expected
    assert store.sql(times).pl()["t"][0] == expected
    assert store.sql(times).to_arrow_table()["t"][0].as_py() == expected
    assert next(store.read(f"{moment} < now()")).sample == 1


def test_the_zone_of_the_machine_changes_no_answer(store, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    store.refresh()
    try:
        with timstore.open(store.path, "r") as other:
            asked = "SELECT date_trunc('day', TIMESTAMPTZ '2020-01-01 20:00:00+00')::VARCHAR"
            assert other.sql(asked).fetchall() == [("2020-01-01 00:00:00+00",)]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("method", ROWS)
def test_a_relation_of_a_closed_store_says_so(tmp_path, method):
    with timstore.open(tmp_path / "run.tim") as store:
        relation = store.sql("SELECT 1 AS a")
        derived = relation.filter("a > 0").project("a")
        assert isinstance(derived, duckdb.DuckDBPyRelation)
        assert derived.fetchall() == [(1,)]
    for one in (relation, derived):
        with pytest.raises(timstore.StateError, match="closed") as caught:
            getattr(one, method)()
        assert caught.value.kind == "closed"


@pytest.mark.parametrize("more", [lambda one: one.columns, lambda one: one.shape, lambda one: one.limit(1)])
def test_what_a_relation_of_a_closed_store_is_asked_otherwise(tmp_path, more):
    with timstore.open(tmp_path / "run.tim") as store:
        relation = store.sql("SELECT 1 AS a")
    with pytest.raises(timstore.StateError, match="closed"):
        more(relation)


@pytest.mark.parametrize("method", ROWS[:-1])
def test_what_fails_on_the_way_is_an_error_of_ours(store, method):
    relation = store.sql("SELECT CAST('x' || range AS INTEGER) AS y FROM range(3)")
    with pytest.raises(timstore.InvalidInputError, match="Could not convert"):
        getattr(relation, method)()
    assert len(store.sql("FROM records").fetchall()) == 1


@pytest.mark.parametrize("query", [5, None, b"SELECT 1", "SELECT '\ud800'", "SELECT \0", "SELECT ?", "SELECT 1 +"])
def test_what_is_no_question_is_refused(store, query):
    with pytest.raises(timstore.InvalidInputError):
        store.sql(query)


@pytest.mark.parametrize("params", [5, ["\ud800"], [2**200], [object()], {"other": 1}])
def test_what_no_parameter_can_be_is_refused(store, params):
    with pytest.raises(timstore.InvalidInputError):
        store.sql("SELECT ?", params).fetchall()


class Stopped(Exception):
    pass


def asks(store, method):
    if method == "read":
        return list(store.read(f"(FROM ({ENDLESS})) > 0"))
    return getattr(store.sql(ENDLESS), method)()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("method", ["fetchall", "df", "pl", "to_arrow_table", "__str__", "read"])
def test_ctrl_c_ends_a_question_and_stays_what_it_is(store, method, raised):
    import polars  # noqa: F401  # it takes SIGINT over: from here on, not from within the question

    store.sql("SELECT 1").fetchall()

    def handler(number, frame):
        raise raised

    before = signal.signal(signal.SIGINT, handler)
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        with pytest.raises(raised):
            asks(store, method)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(store.sql("FROM records").fetchall()) == 1
    store.append(epoch=0, step=1, sample=1, gradients={"w": np.ones((2, 2), np.float32)}, lr=0.1)
    store.commit()
    assert len(store.sql("FROM records").fetchall()) == 2


def test_questions_of_other_threads_are_answered(store):
    found = []
    threads = [threading.Thread(target=lambda: found.extend(store.sql("FROM records").fetchall())) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(found) == 3
