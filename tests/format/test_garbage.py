"""Files that were replaced by anything at all: refused by their size, or in our words, also where checksums agree."""

import hashlib
import os
import random
import shutil
import warnings

import numpy as np
import pyarrow as pa
import pytest
from full_stores import body, files_of, fill, forge_rows, replace_object, reseal
from stores import sealed

import timstore
from timstore.format import paths

TABLES = ("records", "gradients", "steps", "parameters", "samples", "attempts", "fingerprints", "rollbacks", "commits")
VALUES = (None, True, -1, 2**70, 1e308, "x", [], {}, [[]], 0, 2**62, "../../etc", 2.0)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Return two stores: one as it was written, one compacted."""
    with pytest.MonkeyPatch.context() as patch:
        found = [fill(tmp_path_factory.mktemp(name) / "run", patch) for name in ("plain", "compacted")]
    with timstore.open(found[1]) as store:
        store.compact()
    return found


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", timstore.TimstoreWarning)
        yield


def read_all(path):
    """Ask a store for everything that it has."""
    with timstore.open(path, "r") as store:
        for table in TABLES:
            store.sql(f"SELECT * FROM {table}").fetchall()
        for record in store.read():
            for parameter in record.gradients:
                record.dense(parameter)


def copied(stores, number, tmp_path):
    return shutil.copytree(stores[number], tmp_path / str(number), dirs_exist_ok=False)


KINDS = ("timstore.json", "runs/*.json", "log/*/*.json", "ckpt/*.json", "data/*/*/records.parquet", "data/**/zarr.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_grew_to_gigabytes_is_refused_before_it_is_read(stores, tmp_path, kind):
    path = copied(stores, "ckpt" in kind, tmp_path)
    grown = sorted(path.glob(kind))[0]
    os.truncate(grown, 1 << 40)  # with holes: it takes no space, and a terabyte of memory to be read
    with pytest.raises(timstore.CorruptionError, match=str(1 << 40)) as refused:
        read_all(path)
    assert grown.name in str(refused.value)
    findings = timstore.verify(path).findings
    assert any(one.path == str(grown.relative_to(path)) and str(1 << 40) in one.message for one in findings)


def test_a_scope_that_no_reader_takes_is_refused_when_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RECORD_BYTES", 10_000)
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {"w": np.ones(2, np.float32)}, lr=0.1)
        store.commit()
        with pytest.raises(timstore.InvalidInputError, match="fewer samples"):
            store.begin_attempt(0, 1, scope=tuple(range(10_000)))
        store.append(0, 1, 1, {"w": np.ones(2, np.float32)}, lr=0.1)
    with timstore.open(tmp_path / "s", "r") as store:
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(2,)]


@pytest.mark.parametrize("number", [0, 1])
def test_garbage_under_right_checksums_is_corruption(stores, tmp_path, number):
    """Not RecursionError, MemoryError or what a decoder says; a process that only reads changes nothing."""
    draw = random.Random(number)
    for turn in range(15):
        path = copied(stores, number, tmp_path / str(turn))
        name = draw.choice(files_of(path))
        garble(draw, path, name)
        before = {one: (path / one).read_bytes() for one in files_of(path)}
        try:
            read_all(path)
        except timstore.TimstoreError:
            pass
        except BaseException as error:
            raise AssertionError(f"turn {turn}, {name}") from error
        timstore.verify(path)
        assert before == {one: (path / one).read_bytes() for one in files_of(path)}
        shutil.rmtree(path)


def garble(draw, path, name):
    """Put something else into a file, and let everything that vouches for it agree."""
    file = path / name
    if not name.startswith("data/"):
        fields = with_another_value(draw, body(file))
        if name.startswith("log/"):
            reseal(path, file, **fields)
        else:
            file.write_bytes(sealed(fields))
        return
    data = bytearray(file.read_bytes())
    at = draw.randrange(len(data))
    match draw.randrange(4):
        case 0:
            data[at] ^= 1 << draw.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data = bytearray(draw.randbytes(draw.randrange(300)))
        case _:
            data[at : at + 8] = b"\xff" * 8
    replace_object(path, name, bytes(data))


def with_another_value(draw, fields):
    """Return a record's fields, one of them, at any depth, something else."""
    node = fields
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.3:
            node[key] = draw.choice(VALUES)
            return fields
        node = node[key]


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"a":' * 100_000])
def test_a_record_nested_without_end_is_corruption(stores, tmp_path, deep):
    path = copied(stores, 0, tmp_path)
    newest = sorted(path.glob("log/*/*.json"))[-1]
    newest.write_bytes(deep + b"\nsha256:" + hashlib.sha256(deep).hexdigest().encode() + b"\n")
    with pytest.raises(timstore.CorruptionError, match=newest.name):
        read_all(path)


@pytest.mark.parametrize("column", ["rows", "start"])
@pytest.mark.parametrize("value", [2**40, 2**62, -(2**62)])
def test_rows_that_no_memory_holds_are_refused_before_it_is_taken(stores, tmp_path, column, value):
    path = copied(stores, 0, tmp_path)
    name = next(one for one in files_of(path) if one.endswith("slices.parquet"))

    def change(table):
        index = table.column_names.index(column)
        return table.set_column(index, table.schema.field(index), pa.array([value] * table.num_rows))

    forge_rows(path, name, change)
    with pytest.raises(timstore.CorruptionError, match="rows"):
        read_all(path)
