"""Several threads at one rollback: the same sums, errors that surface, torch's threads as they were."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import timstore
from timstore.rollbacks.streaming_sum import crew


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_surfaces_and_no_thread_is_left(workers):
    before = torch.get_num_threads()
    begun = threading.Event()

    def task(number):
        if number == 5:
            raise ValueError("the fifth")
        begun.set()

    with pytest.raises(ValueError, match="the fifth"), crew(workers) as pool:
        for future in [pool.submit(task, number) for number in range(100)]:
            future.result()
    assert begun.is_set()
    assert not [one for one in threading.enumerate() if one.name.startswith("timstore-rollback")]
    assert torch.get_num_threads() == before


def test_an_interrupted_caller_leaves_when_what_was_begun_has_ended_and_begins_nothing_else():
    ended = []

    def task(number):
        time.sleep(0.02)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt), crew(2) as pool:
        futures = [pool.submit(task, number) for number in range(50)]
        futures[0].result()
        raise KeyboardInterrupt
    assert 0 < len(ended) < 50
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


def test_every_encoding_over_several_commits_is_summed_to_the_same_bits_whatever_the_threads(tmp_path: Path, threads):
    dense = mixed_store(tmp_path / "s", np.random.default_rng(3))
    shapes = {"a": (50, 40), "b": (50, 40), "c": (6, 7), "d": (30, 5)}
    chosen, models = [0, 2, 3, 5, 8], []
    for count in (1, 4):
        threads(count)
        model = torch.nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})
        with timstore.open(tmp_path / "s") as store, pytest.warns(timstore.TimstoreWarning):
            store.rollback(model, chosen, accumulate="float64", force=True)
        models.append(model)
    for name in shapes:
        expected = 0.5 * sum(dense[name, sample] for sample in chosen)
        np.testing.assert_allclose(models[0][name].detach().numpy(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(models[0][name], models[1][name])


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
