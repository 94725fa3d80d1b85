"""Chunks that are read by themselves: no more of a store than a record needs, and all of that checked."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from full_stores import body

import timstore
from timstore import Factors
from timstore.format.local_files import LocalObjects
from timstore.format.zarr_shards import ArrayLayout, stored_name

RECORDS = 24


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gradients(sample):
    return {"layer": Factors(normal(sample, 8, 64), normal(100 + sample, 8, 96)), "table": normal(200 + sample, 6, 64)}


def dense(sample):
    factors = gradients(sample)["layer"]
    return np.einsum("to,ti->oi", factors.output_gradients.astype(float), factors.inputs.astype(float))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """One commit of 24 records in chunks of 2 KB, eight to a shard."""

    def small(rows, width, dtype):
        chunk_rows = min(rows, 2048 // (width * dtype.itemsize))
        return ArrayLayout(rows, width, stored_name(dtype), chunk_rows, min(8, -(-rows // chunk_rows)))

    path = tmp_path / "run.tim"
    with monkeypatch.context() as patch:
        patch.setattr(ArrayLayout, "plan", small)
        with timstore.open(path) as opened:
            for sample in range(RECORDS):
                opened.append(0, 0, sample, gradients(sample), lr=0.1)
    return path


def shards(path, width):
    return sorted(path.glob(f"data/*/*/z/w{width}-float32/c/*/0"), key=lambda one: int(one.parent.name))


def read(path, sample):
    with timstore.open(path, "r") as opened:
        return opened.gradient(0, 0, sample, "layer")


def test_a_record_among_others_costs_its_own_chunks_alone(store, monkeypatch):
    taken = []
    whole = LocalObjects.read

    def counted(self, path, *part, **options):
        data = whole(self, path, *part, **options)
        if "/c/" in path:
            taken.append(len(data))
        return data

    monkeypatch.setattr(LocalObjects, "read", counted)
    np.testing.assert_allclose(read(store, 11), dense(11), rtol=1e-5, atol=1e-5)
    everything = sum(one.stat().st_size for width in (64, 96) for one in shards(store, width))
    # Of 24 records one is asked for, 8 rows each way: two chunks of 5 or 8 rows may hold them, at most three.
    assert 0 < sum(taken) <= 6 * 2200 < everything / 8
    with timstore.open(store, "r") as opened:
        taken.clear()
        records = {one.sample: one for one in opened.read()}
        assert sorted(records) == list(range(RECORDS))
        # Everything, each chunk once.
        assert sum(taken) <= everything
    for sample, record in records.items():
        np.testing.assert_allclose(record.dense("layer"), dense(sample), rtol=1e-5, atol=1e-5)


def test_every_flipped_byte_is_noticed_by_who_reads_it_and_by_nobody_else(store):
    (first, *_) = shards(store, 96)
    good = first.read_bytes()
    noticed = set()
    with timstore.open(store, "r") as opened:  # which keeps nothing of an array from one question to the next
        gradients = {sample: opened.gradient(0, 0, sample, "layer") for sample in range(0, RECORDS, 3)}
        for at in range(0, len(good), len(good) // 60):
            first.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
            for sample, gradient in gradients.items():
                try:
                    assert opened.gradient(0, 0, sample, "layer").tobytes() == gradient.tobytes()
                except timstore.CorruptionError as error:
                    assert first.relative_to(store).as_posix() in str(error)
                    noticed.add(sample)
    first.write_bytes(good)
    assert noticed and noticed != set(range(0, RECORDS, 3))


@pytest.mark.parametrize("change", ["cut short", "missing", "another shard"])
def test_a_shard_that_is_not_what_was_written_is_refused(store, change):
    first, second, *_ = shards(store, 96)
    if change == "missing":
        first.unlink()
    elif change == "cut short":
        first.write_bytes(first.read_bytes()[:2000])
    else:
        shutil.copy(second, first)
    with pytest.raises(timstore.CorruptionError, match=r"c/0/0 (is missing|ends before|was altered)"):
        for sample in range(RECORDS):
            read(store, sample)


def test_shards_without_their_table_are_read_whole(store):
    """As stores written before the table was; the commit, and what it names, are else the same."""
    (log,) = store.glob("log/*/000000000000.json")
    (table,) = store.glob("data/*/*/chunks.parquet")
    named = {one["path"]: one for one in body(log)["objects"]}
    assert named[table.relative_to(store).as_posix()]["rows"] == pq.read_table(table).num_rows
    with timstore.open(store, "r") as opened:
        commits = opened.snapshot().view.commits
        kept = [one for one in commits[0].objects if one.kind != "chunks"]
        object.__setattr__(commits[0], "objects", kept)
        np.testing.assert_allclose(opened.gradient(0, 0, 5, "layer"), dense(5), rtol=1e-5, atol=1e-5)
