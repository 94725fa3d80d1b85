"""Columns attached to samples with values of several types: no value changes, and the store opens."""

import datetime
import decimal
import itertools

import numpy as np
import pyarrow as pa
import pytest

import timstore
from timstore.format.user_columns import fit, joined, plain

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
def test_a_column_of_two_types_keeps_every_value(one, other):
    first, second = rows(1, VALUES[one]), rows(3, VALUES[other])
    both = joined([first, second])
    kind, alone = both.schema.field("x").type, {plain(first)["x"].type, plain(second)["x"].type}
    # Text is for those that nothing else holds, and nobody attaches those on purpose.
    assert fit(first, second, "x") == (kind != pa.string() or alone <= {pa.string(), pa.null()})
    # What was merged before is merged again with what comes later.
    assert joined([both, rows(5, VALUES[other])])["x"].type == kind
    texts = {"bool", "int", "big int", "unsigned", "float", "text", "words", "decimal", "nothing"}
    if {one, other} <= texts:
        given = [*VALUES[one].to_pylist(), *VALUES[other].to_pylist()]
        said = both["x"].to_pylist()
        wanted = [str(value).lower() if isinstance(value, bool) and kind == pa.string() else value for value in given]
        assert list(map(number, said)) == list(map(number, wanted))


def held(path):
    with timstore.open(path, "r") as store:
        return store.sql("SELECT typeof(x) AS kind, x FROM samples ORDER BY sample").fetchall()


@pytest.mark.parametrize(("one", "other"), [(1.5, BIG), (BIG, 1.5), (7, "seven"), (0.5, 2**64 - 1), (1, b"a")])
def test_a_store_that_holds_types_without_a_common_one_opens_as_text(tmp_path, monkeypatch, one, other):
    # As two writers at once, and earlier versions, leave it.
    monkeypatch.setattr("timstore.database.store.check_columns", lambda *_: None)
    with timstore.open(tmp_path / "s", durability="os") as store:
        store.samples.update({"sample": [3], "x": [one]})
        store.samples.update({"sample": [7], "x": pa.array([other]) if other != 2**64 - 1 else [np.uint64(other)]})
        said = [("VARCHAR", str(one)), ("VARCHAR", "61" if other == b"a" else str(other))]
        assert held(tmp_path / "s") == said
        store.compact()
    assert held(tmp_path / "s") == said
    assert timstore.verify(tmp_path / "s").sound


@pytest.mark.parametrize(("one", "other", "kind"), [(1.5, BIG, "double"), (BIG, 1.5, "int64")])
def test_a_value_that_would_be_rounded_is_refused(tmp_path, one, other, kind):
    with timstore.open(tmp_path / "s", durability="os") as store:
        store.samples.update([{"sample": 3, "x": one}])
        with pytest.raises(timstore.InvalidInputError, match=f"column x holds {kind}, .* or under another name"):
            store.samples.update([{"sample": 7, "x": other}])
    assert [value for _, value in held(tmp_path / "s")] == [one]


def test_whole_numbers_join_decimals(tmp_path):
    with timstore.open(tmp_path / "s", durability="os") as store:
        store.samples.update([{"sample": 1, "x": BIG}])
        store.samples.update([{"sample": 2, "x": decimal.Decimal("0.25")}])
        store.compact()
    assert [value for _, value in held(tmp_path / "s")] == [BIG, decimal.Decimal("0.25")]
