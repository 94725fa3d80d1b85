"""Several threads at one rollback: the same sums, errors that surface, torch's threads as they were."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import timstore
from timstore.rollbacks.workers import side_by_side


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_of_one_number_run_in_their_order_and_progress_is_told_here(workers):
    ran = {number: [] for number in range(3)}
    told = []

    def task(number, turn):
        time.sleep(0.001 * (turn % 3))
        ran[number].append(turn)
        yield 2

    def advance(done):
        assert threading.current_thread() is threading.main_thread()
        told.append(done)

    side_by_side(
        ((number, lambda n=number, t=turn: task(n, t)) for turn in range(20) for number in ran), workers, advance
    )
    assert all(turns == list(range(20)) for turns in ran.values())
    assert sum(told) == 2 * 60


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_error_surfaces_and_no_thread_is_left(workers):
    before = torch.get_num_threads()

    def task(number):
        if number == 5:
            raise ValueError("the fifth")
        yield 1

    with pytest.raises(ValueError, match="the fifth"):
        side_by_side(((number % 2, lambda n=number: task(n)) for number in range(100)), workers, lambda done: None)
    assert not [one for one in threading.enumerate() if one.name.startswith("timstore-rollback")]
    assert torch.get_num_threads() == before


def test_an_interrupted_caller_stops_the_others():
    def endless():
        while True:
            yield 1

    def advance(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(((number, endless) for number in range(4)), 3, advance)
    assert not [one for one in threading.enumerate() if one.name.startswith("timstore-rollback")]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def mixed_store(path, random):
    """Fill a store of every encoding over several commits; return its dense gradients by (parameter, sample)."""
    dense = {}

    def keep(sample, name, gradient):
        dense[name, sample] = dense.get((name, sample), 0) + gradient.astype("float64")

    with timstore.open(path, "x", durability="os") as store:
        for sample in range(9):
            inputs = random.standard_normal((12, 40), "float32")
            gradients = {}
            for name in ("a", "b"):  # one input, and each has other rows of zeros: row maps
                outputs = random.standard_normal((12, 50), "float32")
                outputs[random.permutation(12)[: 3 + sample % 4]] = 0
                gradients[name] = timstore.Factors(inputs, outputs)
                keep(sample, name, outputs.T @ inputs)
            gradients["c"] = random.standard_normal((6, 7), "float32")
            keep(sample, "c", gradients["c"])
            values = random.standard_normal((3, 5), "float32")
            indices = random.permutation(30)[:3]
            gradients["d"] = timstore.Rows(indices, values, (30, 5))
            table = np.zeros((30, 5), "float32")
            table[indices] = values
            keep(sample, "d", table)
            store.append(0, sample // 2, sample, gradients, lr=0.5)
            if sample % 3 == 2:
                store.commit()
    return dense


@pytest.mark.parametrize("count", [1, 4])
def test_every_encoding_over_several_commits_is_summed_whatever_the_threads(tmp_path: Path, threads, count):
    threads(count)
    dense = mixed_store(tmp_path / "s", np.random.default_rng(3))
    shapes = {"a": (50, 40), "b": (50, 40), "c": (6, 7), "d": (30, 5)}
    model = torch.nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})
    chosen = [0, 2, 3, 5, 8]
    with timstore.open(tmp_path / "s") as store, pytest.warns(timstore.TimstoreWarning):
        store.rollback(model, chosen, accumulate="float64")
    for name in shapes:
        expected = 0.5 * sum(dense[name, sample] for sample in chosen)
        np.testing.assert_allclose(model[name].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_records_read_in_small_blocks_are_the_same(tmp_path: Path, monkeypatch):
    dense = mixed_store(tmp_path / "s", np.random.default_rng(4))
    with timstore.open(tmp_path / "s", "r") as store:
        for size in (1, 20_000, 10**9):
            monkeypatch.setattr("timstore.database.snapshot._BLOCK_BYTES", size)
            found = list(store.read("sample != 4"))
            assert [one.sample for one in found] == [0, 1, 2, 3, 5, 6, 7, 8]
            for one in found:
                assert sorted(one.gradients) == ["a", "b", "c", "d"]
                for name in one.gradients:
                    np.testing.assert_allclose(one.dense(name), dense[name, one.sample], rtol=1e-5, atol=1e-5)
