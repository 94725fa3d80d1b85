"""Columns attached to samples with values of several types: no value changes, and the store opens."""

import datetime
import decimal
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import timstore
from timstore.database.samples import ColumnTypes
from timstore.format.user_columns import cast_exactly, joined, plain

BIG = 2**60 + 1
VALUES = {
    "bool": pa.array([True, False]),
    "int": pa.array([3, -4]),
    "small int": pa.array([3, 4], pa.int8()),
    "big int": pa.array([BIG, 2**53 + 1]),
    "unsigned": pa.array([2**64 - 1, 5], pa.uint64()),
    "float": pa.array([0.5, 1e300]),
    "float32": pa.array([0.1, 3.0], pa.float32()),
    "half": pa.array([0.5, 2.0], pa.float16()),
    "text": pa.array(["3", "a"]),
    "words": pa.array(["3", "a"]).dictionary_encode(),
    "bytes": pa.array([b"\xff", b"a"]),
    "day": pa.array([datetime.date(2026, 1, 2), datetime.date(1, 1, 1)]),
    "moment": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5), datetime.datetime(1, 1, 1)], pa.timestamp("us")),
    "nanoseconds": pa.array([1, 2], pa.timestamp("ns")),
    "zoned": pa.array([1, 2], pa.timestamp("us", "Europe/Berlin")),
    "span": pa.array([datetime.timedelta(days=3, seconds=5), datetime.timedelta(0)]),
    "decimal": pa.array([decimal.Decimal("1.25"), decimal.Decimal("-7.50")]),
    "wide decimal": pa.array([decimal.Decimal("9" * 36 + ".25"), None]),
    "wider decimal": pa.array([decimal.Decimal("9" * 60 + ".25"), None]),
    "integers": pa.array([[BIG, 2], []]),
    "floats": pa.array([[0.5], [1e300]]),
    "parts": pa.array([{"a": 1}, {"a": None}]),
    "nothing": pa.nulls(2),
}
PAIRS = list(itertools.product(VALUES, VALUES))


def rows(first, values):
    return pa.table({"sample": [first, first + 1], "x": values})


def number(value):
    """Return the number that a value or its text stands for, anything else as it is."""
    try:
        return value if isinstance(value, bool | None) else decimal.Decimal(str(value))
    except decimal.InvalidOperation:
        return value


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=map("-".join, PAIRS))
def test_a_column_that_was_left_with_two_types_keeps_every_value(one, other):
    first, second = rows(1, VALUES[one]), rows(3, VALUES[other])
    both = joined([first, second])
    kind = both.schema.field("x").type
    # What was joined before is joined again with what comes later.
    assert joined([both, rows(5, VALUES[other])])["x"].type == kind
    exact = cast_exactly(plain(second)["x"], plain(first)["x"].type)
    assert exact is None or one == "nothing" or kind == plain(first)["x"].type
    texts = {"bool", "int", "big int", "unsigned", "float", "text", "words", "decimal", "nothing"}
    if {one, other} <= texts:
        given = [*VALUES[one].to_pylist(), *VALUES[other].to_pylist()]
        said = both["x"].to_pylist()
        wanted = [str(value).lower() if isinstance(value, bool) and kind == pa.string() else value for value in given]
        assert list(map(number, said)) == list(map(number, wanted))


def held(path):
    with timstore.open(path, "r") as store:
        return store.sql("SELECT typeof(x) AS kind, x FROM samples ORDER BY sample").fetchall()


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (1.5, BIG, [("VARCHAR", "1.5"), ("VARCHAR", str(BIG))]),
        (7, "seven", [("VARCHAR", "7"), ("VARCHAR", "seven")]),
        (0.5, np.uint64(2**64 - 1), [("VARCHAR", "0.5"), ("VARCHAR", str(2**64 - 1))]),
        (1, b"a", [("VARCHAR", "1"), ("VARCHAR", "61")]),
        (3, 0.5, [("DOUBLE", 3.0), ("DOUBLE", 0.5)]),
    ],
)
def test_a_store_that_was_left_with_two_types_opens_with_every_value(tmp_path, monkeypatch, one, other, said):
    # As two writers at once, and earlier versions, leave it.
    monkeypatch.setattr(ColumnTypes, "fitted", lambda _, table: table)
    with timstore.open(tmp_path / "s", durability="os") as store:
        store.samples.update({"sample": [3], "x": [one]})
        store.samples.update({"sample": [7], "x": [other]})
        assert held(tmp_path / "s") == said
        store.compact()
    assert held(tmp_path / "s") == said
    assert timstore.verify(tmp_path / "s").sound


REFUSED = [
    (1.5, [BIG], "x holds double, not int64"),
    (BIG, [3.0, 1.5], "x holds int64, not double: 1.5 of sample 8"),
    ("3", [3], "x holds string, not int64: 3 of sample 7"),
    (3, ["3"], "x holds int64, not string"),
    (True, [1], "x holds bool, not int64"),
    (3, [decimal.Decimal("0.25")], "x holds int64, not decimal"),
    (np.int8(3), [3, 300], "x holds int8, not int64: 300 of sample 8"),
    (datetime.datetime(2026, 1, 2), [5], "x holds .*, not int64"),
    (datetime.date(2026, 1, 2), [datetime.datetime(2026, 1, 2, 3)], "x holds .*, not timestamp"),
    ([1, 2], [["a"]], "x holds .*, not list"),
]


@pytest.mark.parametrize(("one", "others", "message"), REFUSED)
def test_a_value_that_the_columns_first_type_does_not_hold_is_refused(tmp_path, one, others, message):
    with timstore.open(tmp_path / "s", durability="os") as store:
        store.samples.update([{"sample": 3, "x": one}])
        before = held(tmp_path / "s")
        with pytest.raises(timstore.InvalidInputError, match=f"column {message}.* under another name") as refused:
            store.samples.update([{"sample": 7 + number, "x": other} for number, other in enumerate(others)])
        assert refused.value.fields["column"] == "x"
    assert held(tmp_path / "s") == before


def test_what_the_columns_first_type_holds_is_stored_in_it(tmp_path):
    with timstore.open(tmp_path / "s", durability="os") as store:
        store.samples.update([{"sample": 1, "x": BIG, "y": None, "z": 0.5}])
        store.samples.update([{"sample": 2, "X": 3.0, "y": "a", "z": 7}, {"sample": 3, "z": float("nan")}])
        store.samples.update({"sample": [4], "x": pa.array([5], pa.int8()), "z": pa.array([0.25], pa.float16())})
        store.compact()
        found = store.sql("SELECT x, y, z::VARCHAR FROM samples ORDER BY sample").fetchall()
        assert found == [(BIG, None, "0.5"), (3, "a", "7.0"), (None, None, "nan"), (5, None, "0.25")]
    tables = [pq.read_table(path) for path in (tmp_path / "s").glob("data/**/samples*.parquet")]
    assert [table["x"].type for table in tables] == [pa.int64()]
