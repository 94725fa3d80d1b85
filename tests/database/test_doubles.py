"""What two handles of one store both write is in it once; what they contradict each other in is refused by name."""

import multiprocessing
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import timstore
from timstore.database import writer
from timstore.format import local_files

STEP = {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9}


def gradient(sample, step=0):
    return np.full((2, 3), 1.0 + sample + 10 * step, np.float32)


def append(store, step, *samples, lr=0.1, **options):
    for sample in samples:
        store.append(0, step, sample, {"w": gradient(sample, step)}, lr=lr, **options)


def assert_holds(path, expected):
    """The store is sound and holds these (step, sample), each once and whole."""
    with timstore.open(path, "r") as store:
        query = "SELECT step, sample, count(*) FROM gradients GROUP BY ALL ORDER BY ALL"
        assert store.sql(query).fetchall() == [(*key, 1) for key in sorted(expected)]
        for step, sample in expected:
            assert np.array_equal(store.gradient(0, step, sample, "w"), gradient(sample, step))
        steps = store.sql("SELECT step, group_id, count(*) FROM steps GROUP BY ALL").fetchall()
        assert all(count == 1 for *_, count in steps)
    assert timstore.verify(path).sound


@pytest.fixture
def pair(tmp_path):
    """Two handles of one store, neither of which has written anything."""
    first, second = timstore.open(tmp_path), timstore.open(tmp_path)
    # Each knows now what is committed: nothing.
    assert first.frontier is second.frontier is None
    return first, second


@pytest.mark.parametrize("end", ["commit", "close", "with"])
def test_what_another_handle_committed_is_refused_and_the_rest_is_kept(tmp_path, pair, end):
    first, second = pair
    append(first, 0, 7, 8)
    first.commit()
    append(second, 0, 7, 9)
    append(second, 1, 7)
    second.append_fingerprints(0, 1, {"w": "after"})
    with pytest.raises(timstore.errors.InvalidInputError, match=r"step 0, sample 7.*recorded already") as caught:
        if end == "with":
            with second:
                pass
        else:
            getattr(second, end)()
    assert caught.value.kind == "duplicate"
    second.close()
    first.close()
    assert_holds(tmp_path, [(0, 7), (0, 8), (0, 9), (1, 7)])
    with timstore.open(tmp_path, "r") as store:
        assert store.latest_fingerprints() == (0, 1, {"w": "after"})


def test_it_is_told_once_and_both_go_on(tmp_path, pair):
    first, second = pair
    append(first, 0, 1)
    first.commit()
    append(second, 0, 1)
    with pytest.raises(timstore.errors.InvalidInputError):
        second.commit()
    second.commit()
    append(second, 1, 1)
    second.commit()
    append(first, 1, 1, 2)
    with pytest.raises(timstore.errors.InvalidInputError, match="step 1, sample 1"):
        first.commit()
    first.close()
    second.close()
    assert_holds(tmp_path, [(0, 1), (1, 1), (1, 2)])


@pytest.mark.parametrize("how", ["append", "append_step"])
def test_two_rates_for_one_step_are_refused(tmp_path, pair, how):
    first, second = pair
    append(first, 0, 1, lr=0.1)
    first.commit()
    if how == "append":
        append(second, 0, 2, lr=0.2)
    else:
        append(second, 0, 2, lr=None)
        second.append_step(0, 0, [{"lr": 0.2}])
    with pytest.raises(timstore.errors.InvalidInputError, match=r"step 0, group 0: recorded with lr 0\.1, not 0\.2"):
        second.close()
    first.close()
    assert_holds(tmp_path, [(0, 1), (0, 2)])
    with timstore.open(tmp_path, "r") as store:
        assert store.sql("SELECT lr FROM steps").fetchall() == [(0.1,)]


@pytest.mark.parametrize("lr", [0.25, float("nan")])
def test_a_step_that_both_record_alike_is_there_once(tmp_path, pair, lr):
    first, second = pair
    for store, samples in ((first, (1, 2)), (second, (3, 4))):
        store.append_step(0, 0, [{**STEP, "lr": lr}, {**STEP, "lr": lr, "group_id": 1}], sample_ids=[1, 2, 3, 4])
        append(store, 0, *samples, lr=None)
        store.commit()
    first.close()
    second.close()
    assert_holds(tmp_path, [(0, sample) for sample in (1, 2, 3, 4)])
    with timstore.open(tmp_path, "r") as store:
        assert store.sql("SELECT group_id, isnan(lr) FROM steps ORDER BY 1").fetchall() == [
            (0, np.isnan(lr)),
            (1, np.isnan(lr)),
        ]


def test_another_parameter_of_the_same_sample_is_no_double(tmp_path, pair):
    first, second = pair
    first.append(0, 0, 1, {"a": gradient(1)}, lr=0.1)
    first.commit()
    second.append(0, 0, 1, {"b": gradient(2)}, lr=0.1)
    second.close()
    first.close()
    with timstore.open(tmp_path, "r") as store:
        assert np.array_equal(store.gradient(0, 0, 1, "a"), gradient(1))
        assert np.array_equal(store.gradient(0, 0, 1, "b"), gradient(2))


def test_a_parameter_of_another_shape_is_refused(tmp_path, pair):
    first, second = pair
    append(first, 0, 1)
    first.commit()
    second.append(0, 1, 1, {"w": np.ones(5, np.float32)}, lr=0.1)
    second.append(0, 1, 2, {"v": np.ones(5, np.float32)}, lr=0.1)
    with pytest.raises(
        timstore.errors.InvalidInputError, match=r"shape \(2, 3\), not \(5,\)|shape \[2, 3\], not \[5\]"
    ):
        second.close()
    first.close()
    with timstore.open(tmp_path, "r") as store:
        assert store.sql("SELECT step, sample FROM records ORDER BY ALL").fetchall() == [(0, 1), (1, 2)]
        assert np.array_equal(store.gradient(0, 1, 2, "v"), np.ones(5))
        assert store.sql("SELECT shape FROM parameters WHERE parameter = 'w'").fetchall() == [([2, 3],)]


@pytest.mark.parametrize("later_rank", [0, 3])
def test_processes_of_other_ranks_record_the_same_moment(tmp_path, pair, later_rank):
    """And a handle that wrote for one rank first sees what was committed meanwhile for another."""
    first, second = pair
    append(first, 0, 1, rank=3)
    first.commit()
    append(second, 0, 1, rank=1)
    second.commit()
    append(second, 0, 1, rank=later_rank)
    if later_rank == 3:
        with pytest.raises(timstore.errors.InvalidInputError, match="rank 3"):
            second.commit()
    second.close()
    first.close()
    with timstore.open(tmp_path, "r") as store:
        ranks = store.sql("SELECT rank FROM records ORDER BY 1").fetchall()
        assert ranks == [(rank,) for rank in sorted({1, 3, later_rank})]


def test_what_is_folded_meanwhile_is_seen(tmp_path, pair):
    first, second = pair
    append(first, 0, 1)
    first.commit()
    append(first, 1, 1)
    first.commit()
    first.compact()
    append(second, 0, 1, 2)
    append(second, 1, 1, 2)
    with pytest.raises(timstore.errors.InvalidInputError, match="1 more like it"):
        second.close()
    first.close()
    assert_holds(tmp_path, [(0, 1), (0, 2), (1, 1), (1, 2)])


def test_a_new_attempt_records_the_moment_again(tmp_path, pair):
    first, second = pair
    append(first, 0, 1)
    first.commit()
    second.begin_attempt(0, 0)
    append(second, 0, 1, lr=0.3)
    second.close()
    append(first, 0, 2)
    first.close()
    with timstore.open(tmp_path, "r") as store:
        assert store.sql("SELECT attempt, sample FROM records").fetchall() == [(1, 1)]
        assert store.sql("SELECT lr FROM steps").fetchall() == [(0.3,)]


def test_the_loops_of_two_recorders_leave_each_record_once(tmp_path):
    """The same script started twice: every record of the second is a double."""
    for number, store in enumerate([timstore.open(tmp_path), timstore.open(tmp_path)]):
        if number == 0:
            other = timstore.open(tmp_path)
            assert other.frontier is None
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = torch.randn(4, 3)

        def train(into, model=model, optimizer=optimizer, inputs=inputs):
            with into.record(model, optimizer) as recorder:
                for _ in range(2):
                    recorder.batch([0, 1, 2, 3])
                    model(inputs).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()

        if number == 0:
            train(store)
            store.close()
        else:
            store.close()
            with pytest.raises(timstore.TimstoreError, match="recorded already"):
                train(other)
            other.close()
    with timstore.open(tmp_path, "r") as store:
        assert store.sql("SELECT count(*), count(DISTINCT (step, sample)) FROM records").fetchall() == [(8, 8)]


def test_threads_that_commit_at_once_record_nothing_twice(tmp_path):
    stores = [timstore.open(tmp_path) for _ in range(4)]
    assert {store.frontier for store in stores} == {None}
    refused = []
    start = threading.Barrier(len(stores))

    def run(store):
        start.wait()
        for step in range(4):
            append(store, step, *range(3))
            try:
                store.commit()
            except timstore.errors.InvalidInputError as error:
                refused.append(error)
        store.close()

    threads = [threading.Thread(target=run, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 12 and {error.kind for error in refused} == {"duplicate"}
    assert_holds(tmp_path, [(step, sample) for step in range(4) for sample in range(3)])


def _commit_all(path, known, start, told):
    store = timstore.open(path)
    append(store, 0, *range(5))
    known.set()
    start.wait()
    told.put(_closed(store))


def _closed(store):
    try:
        store.close()
    except timstore.errors.InvalidInputError as error:
        return error.kind
    return "closed"


def test_processes_that_commit_at_once_record_nothing_twice(tmp_path, pair):
    spawn = multiprocessing.get_context("spawn")
    known, start, told = spawn.Event(), spawn.Event(), spawn.Queue()
    process = spawn.Process(target=_commit_all, args=(tmp_path, known, start, told))
    process.start()
    append(pair[0], 0, *range(5))
    known.wait()
    start.set()
    assert {_closed(pair[0]), told.get()} == {"closed", "duplicate"}
    process.join()
    pair[1].close()
    assert_holds(tmp_path, [(0, sample) for sample in range(5)])


def test_a_commit_waits_for_the_lock_and_keeps_what_it_holds_when_it_does_not_get_it(tmp_path, pair, monkeypatch):
    first, second = pair
    append(first, 0, 1)
    append(second, 0, 2)
    monkeypatch.setattr(local_files, "_SECONDS", 0.05)
    refused = pytest.raises(timstore.errors.StorageError, match="another process has held")
    with first._objects.alone("log/"), refused as caught:
        second.commit()
    assert caught.value.kind == "locked"
    monkeypatch.undo()
    held, committed = threading.Event(), []

    def hold():
        with first._objects.alone("log/"):
            held.set()
            time.sleep(0.05)
            committed.extend(timstore.open(tmp_path, "r").sql("SELECT sample FROM records").fetchall())

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    second.commit()
    holder.join()
    assert committed == []
    first.close()
    second.close()
    assert_holds(tmp_path, [(0, 1), (0, 2)])


def test_a_file_system_without_locks_takes_commits_all_the_same(tmp_path, pair, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(local_files, "fcntl", SimpleNamespace(**{**vars(local_files.fcntl), "flock": refuse}))
    first, second = pair
    append(first, 0, 1)
    first.commit()
    append(second, 0, 1, 2)
    with pytest.raises(timstore.errors.InvalidInputError, match="recorded already"):
        second.close()
    first.close()
    assert_holds(tmp_path, [(0, 1), (0, 2)])


def test_a_log_that_another_damaged_keeps_nothing_off_the_disk(tmp_path, pair):
    first, second = pair
    append(first, 0, 1)
    first.close()
    (record,) = tmp_path.glob("log/*/000000000000.json")
    original = record.read_bytes()
    record.write_bytes(original.replace(b'"kind"', b'"kinp"'))
    append(second, 1, 1)
    second.commit()
    with pytest.raises(timstore.errors.CorruptionError):
        second.sql("FROM records")
    second.close()
    record.write_bytes(original)
    assert_holds(tmp_path, [(0, 1), (1, 1)])


def test_what_is_refused_frees_the_memory_that_it_took(tmp_path, pair, monkeypatch):
    """Else a loop whose records are refused waits for room in the end, for ever."""
    monkeypatch.setattr(writer, "QUEUE_BYTES", 100)
    first, second = pair
    for step in range(6):
        append(first, step, 1)
    first.close()
    for step in range(6):
        append(second, step, 1)
        with pytest.raises(timstore.errors.InvalidInputError):
            second.commit()
    second.close()
    assert_holds(tmp_path, [(step, 1) for step in range(6)])
