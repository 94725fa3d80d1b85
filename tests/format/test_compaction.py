"""Compaction: row files folded into few, nothing of what a reader sees changed, whoever else is at work meanwhile."""

from collections import Counter

import numpy as np
import pytest
from stores import altered, everything, forged

import timstore
from timstore import Factors, Rows
from timstore.database import writer
from timstore.errors import CorruptionError, StorageError, TimstoreWarning
from timstore.format import compacting
from timstore.format.compacting import CompactionReport
from timstore.format.schemas import FOLDED


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fill(store, first, count=4):
    for step in range(first, first + count):
        shared = normal(step, 4, 24)
        for sample in (1, 2):
            gradients = {
                "q": Factors(shared, normal(10 + sample, 4, 32)),
                "k": Factors(shared, normal(20 + sample, 4, 32)),
                "table": Rows(np.array([sample, 7]), normal(30 + sample, 2, 16), (60, 16)),
                "bias": normal(40 + step, 9),
            }
            store.append(0, step, sample, gradients, lr=0.1, loss=1.5)
        store.commit()
    store.samples.update([{"sample": 1, "owner": f"ada{first}"}, {"sample": 2, "owner": "bob"}])
    store.samples.update([{"sample": 2, "Owner": "eve", "age": first}])
    store.append_fingerprints(0, step, {"q": "0" * 64})
    store.append_states(0, step, "exp_avg_sq", {"bias": normal(step, 9) ** 2})
    store.keep_probe([{"x": np.arange(first, first + 4)}], loss="mse")
    store.commit()


def seen(path):
    with timstore.open(path, "r") as store:
        return everything(store)


def tensors(path):
    found = [file for file in path.glob("data/*/*/**/*") if file.is_file() and not file.parent.name.startswith("m-")]
    return {file: file.read_bytes() for file in found if file.stem not in FOLDED}


def row_files(path):
    return sorted(file for file in path.glob("data/**/*.parquet") if file.name != "slices.parquet")


def test_nothing_that_a_reader_sees_changes_and_no_tensor_is_touched(tmp_path):
    with timstore.open(tmp_path) as store:
        fill(store, 0)
        store.begin_attempt(0, 3)
        fill(store, 3)
    for again in range(3):
        before, numbers = seen(tmp_path), tensors(tmp_path)
        with timstore.open(tmp_path) as store:
            done = store.compact()
            assert done.compaction == again + 1 and done.commits and done.deleted and done.bytes_after
            assert everything(store) == before
            assert store.compact() == CompactionReport()
        assert seen(tmp_path) == before
        assert tensors(tmp_path) == numbers
        kinds = Counter(file.name.rpartition("-")[0] for file in row_files(tmp_path))
        assert set(kinds.values()) == {1} and "gradients" in kinds and "samples" in kinds
        assert [file.name for file in tmp_path.glob("ckpt/*")] == [f"{again + 1:012d}.json"]
        assert len(list(tmp_path.glob("data/m-*"))) == 1
        if again < 2:
            with timstore.open(tmp_path) as store:
                fill(store, 10 * (again + 1))


def test_what_was_not_folded_yet_is_seen_beside_what_was(tmp_path):
    with timstore.open(tmp_path / "folded") as store, timstore.open(tmp_path / "plain") as plain:
        for one in (store, plain):
            fill(one, 0)
        store.compact()
        reader = timstore.open(tmp_path / "folded", "r")
        reader.sql("FROM records").fetchall()
        for one in (store, plain):
            fill(one, 5)
        reader.refresh()
        tables = ("records", "gradients", "steps", "samples", "parameters", "fingerprints")
        for handle in (store, reader):
            for name in tables:
                query = f"SELECT * FROM {name} ORDER BY ALL"
                assert handle.sql(query).fetchall() == plain.sql(query).fetchall()
            assert everything(handle)[1:5] == everything(plain)[1:5]


def test_large_row_files_are_carried_from_compaction_to_compaction(tmp_path, monkeypatch):
    monkeypatch.setattr(compacting, "FILE_ROWS", 20)
    with timstore.open(tmp_path) as store:
        for again in range(3):
            fill(store, 10 * again)
            before = everything(store)
            full = {file for file in row_files(tmp_path) if file.name.startswith("gradients-")}
            store.compact()
            assert everything(store) == before
            kept = {file for file in row_files(tmp_path) if file.name.startswith("gradients-")}
            assert len(full & kept) >= again
        assert seen(tmp_path) == before
        assert len(list(tmp_path.glob("data/m-*"))) > 1


def test_a_writer_folds_by_itself_and_says_when_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COMPACT_COMMITS", 5)
    with timstore.open(tmp_path) as store:
        fill(store, 0, 12)
    with timstore.open(tmp_path) as store:
        view = store.snapshot().view
        assert view.compaction.number >= 2 and len(view.since_compaction) < 6
        assert len(store.sql("SELECT DISTINCT step FROM records").fetchall()) == 12
        # What others left counts as well: this handle alone would not come to five.
        store.append(0, 50, 1, {"bias": normal(1, 9)})
        store.commit()

        def full(*_):
            raise StorageError("no space left")

        monkeypatch.setattr(compacting, "write_rows", full)
        with pytest.warns(TimstoreWarning, match="not folded: no space left"):
            for step in range(51, 57):
                store.append(0, step, 1, {"bias": normal(1, 9)})
                store.commit()
            store.close()
    with timstore.open(tmp_path, "r") as store:
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(24 + 7,)]


def test_a_snapshot_taken_before_answers_after(tmp_path):
    with timstore.open(tmp_path) as store:
        fill(store, 0)
        before = everything(store)
        asked, unasked = timstore.open(tmp_path, "r"), timstore.open(tmp_path, "r")
        asked.sql("FROM records").fetchall()
        store.compact()
        for reader in (asked, unasked):
            assert everything(reader) == before
        # Two newer compactions since the look.
        late = timstore.open(tmp_path, "r")
        for first in (10, 20):
            fill(store, first)
            store.compact()
        assert everything(late) == everything(store)
        asked.refresh()
        assert everything(asked) == everything(store)


def test_an_altered_row_file_stops_a_compaction_and_changes_nothing(tmp_path):
    with timstore.open(tmp_path) as store:
        fill(store, 0)
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        victim = next(tmp_path.glob("data/*/*/gradients.parquet"))
        with altered(victim, lambda data: data[:-1]), pytest.raises(CorruptionError, match=r"gradients\.parquet has"):
            store.compact()
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_altered_or_missing_compaction_is_noticed(tmp_path):
    with timstore.open(tmp_path) as store:
        fill(store, 0)
        store.compact()
    (path,) = tmp_path.glob("ckpt/*.json")
    for change in (lambda data: data[:-5], lambda data: forged(data, store="x"), lambda data: forged(data, commits=3)):
        with altered(path, change), pytest.raises(CorruptionError, match=r"000000000001\.json"):
            seen(tmp_path)
    for file in row_files(tmp_path):
        with altered(file, lambda data: data[:-1] + b"x"), pytest.raises(CorruptionError, match=file.name):
            seen(tmp_path)
    path.unlink()
    with pytest.raises(CorruptionError, match="is missing"):
        timstore.open(tmp_path, "r")


def test_reading_a_store_to_read_folds_nothing(tmp_path):
    timstore.open(tmp_path).close()
    with timstore.open(tmp_path, "r") as store, pytest.raises(timstore.ReadOnlyError):
        store.compact()
    with timstore.open(tmp_path) as store:
        assert store.compact() == CompactionReport()
    assert not list(tmp_path.glob("runs/*"))
