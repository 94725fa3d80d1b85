"""A store's folder that is moved, deleted or replaced under an open handle: it says so, and writes nowhere else."""

import os
import shutil
import warnings

import numpy as np
import pytest
import torch

import timstore
from timstore.errors import StorageError
from timstore.records import Parameter

GRADIENT = np.ones((2, 3), np.float32)

VERBS = {
    "append": lambda store: store.append(0, 1, 1, {"w": GRADIENT}),
    "append_step": lambda store: store.append_step(0, 1, [{"lr": 0.1}]),
    "append_states": lambda store: store.append_states(0, 0, "exp_avg_sq", {"w": GRADIENT}),
    "append_fingerprints": lambda store: store.append_fingerprints(0, 0, {"w": "00"}),
    "append_hashes": lambda store: store.append_hashes({1: "00"}),
    "append_rollback": lambda store: store.append_rollback({"samples": [1]}),
    "declare": lambda store: store.declare([Parameter("w", (2, 3), "float32")]),
    "keep_probe": lambda store: store.keep_probe([np.ones(2)], loss="mse"),
    "begin_attempt": lambda store: store.begin_attempt(0, 1),
    "join_attempt": lambda store: store.join_attempt(0),
    "claim_scope": lambda store: store.claim_scope("all"),
    "attempt": lambda store: store.attempt,
    "frontier": lambda store: store.frontier,
    "samples": lambda store: store.samples.update([{"sample": 1, "owner": "a"}]),
    "commit": lambda store: store.commit(),
    "compact": lambda store: store.compact(),
    "refresh": lambda store: store.refresh(),
    "snapshot": lambda store: store.snapshot(),
    "sql": lambda store: store.sql("SELECT 1"),
    "read": lambda store: list(store.read()),
    "gradient": lambda store: store.gradient(0, 0, 1, "w"),
    "latest_fingerprints": lambda store: store.latest_fingerprints(),
    "probe": lambda store: store.probe(),
    "zarr": lambda store: list(store.zarr()),
    "rollback": lambda store: store.rollback(torch.nn.Linear(3, 2), [1]),
    "record": lambda store: record(store),
    "verify": lambda store: store.verify(),
    "with": lambda store: store.__enter__(),
}
# What a handle only accepts is looked at when it is written.
LATER = ("append", "append_step", "append_states", "append_fingerprints", "append_hashes", "declare", "keep_probe")
UNCHECKED = ("attempt", "frontier", "claim_scope", "join_attempt", "with")


def record(store):
    model = torch.nn.Linear(3, 2)
    with store.record(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        pass


def made(path, sample=1):
    store = timstore.open(path)
    store.append(0, 0, sample, {"w": GRADIENT * sample}, lr=0.1)
    store.commit()
    return store


def samples(path):
    with timstore.open(path, "r") as store:
        assert timstore.verify(path).sound
        return [row[0] for row in store.sql("SELECT sample FROM records ORDER BY ALL").fetchall()]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_that_the_folder_is_gone(tmp_path, verb):
    store = made(tmp_path / "s")
    os.rename(tmp_path / "s", tmp_path / "moved")
    with pytest.raises(timstore.TimstoreError, match=r"the store is gone: .*moved or deleted|there is no store at"):
        VERBS[verb](store)
    assert not (tmp_path / "s").exists()
    # Moved back it goes on.
    os.rename(tmp_path / "moved", tmp_path / "s")
    store.append(0, 2, 2, {"w": GRADIENT})
    store.close()
    assert samples(tmp_path / "s") == [1, 2]


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {*LATER, *UNCHECKED, "verify"}))
def test_what_asks_or_commits_says_that_another_store_is_there(tmp_path, verb):
    store = made(tmp_path / "s")
    store.append(0, 1, 1, {"w": GRADIENT})
    shutil.rmtree(tmp_path / "s")
    made(tmp_path / "s", 5).close()
    with pytest.raises(StorageError, match="another store was made in its place") as caught:
        VERBS[verb](store)
    assert caught.value.kind == "replaced"
    with pytest.raises(StorageError, match="loses 1 accepted records that were never committed"):
        store.close()
    store.close()
    assert samples(tmp_path / "s") == [5]


@pytest.mark.parametrize("verb", LATER)
def test_what_is_accepted_never_reaches_the_store_in_its_place(tmp_path, verb):
    store = made(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    made(tmp_path / "s", 5).close()
    VERBS[verb](store)
    with pytest.raises(StorageError, match="another store was made in its place"):
        store.commit()
    with pytest.raises(StorageError, match="another store was made in its place"):
        store.close()
    assert samples(tmp_path / "s") == [5]


def test_two_stores_that_change_places(tmp_path):
    first, second = made(tmp_path / "a", 1), made(tmp_path / "b", 2)
    for one, other in (("a", "c"), ("b", "a"), ("c", "b")):
        os.rename(tmp_path / one, tmp_path / other)
    for store in (first, second):
        store.append(0, 1, 9, {"w": GRADIENT})
        with pytest.raises(StorageError, match="another store was made in its place"):
            store.commit()
    for one, other in (("a", "c"), ("b", "a"), ("c", "b")):
        os.rename(tmp_path / one, tmp_path / other)
    first.close()
    second.close()
    assert samples(tmp_path / "a") == [1, 9] and samples(tmp_path / "b") == [2, 9]


def test_a_copy_of_the_store_that_has_all_is_written_into(tmp_path):
    """As when a folder is moved to another disk while the loop goes on."""
    store = made(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    shutil.rmtree(tmp_path / "s")
    os.rename(tmp_path / "copy", tmp_path / "s")
    store.append(0, 1, 2, {"w": GRADIENT})
    store.commit()
    assert store.sql("SELECT count(*) FROM records").fetchall() == [(2,)]
    store.close()
    assert samples(tmp_path / "s") == [1, 2]


def test_an_earlier_copy_of_the_store_is_not_written_into(tmp_path):
    """A backup that was put back lacks records that this handle's next one would name."""
    store = made(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "backup")
    store.append(0, 1, 2, {"w": GRADIENT})
    store.commit()
    shutil.rmtree(tmp_path / "s")
    os.rename(tmp_path / "backup", tmp_path / "s")
    assert store.sql("SELECT sample FROM records").fetchall() == [(1,)]
    store.append(0, 2, 3, {"w": GRADIENT})
    with pytest.raises(StorageError, match="an earlier copy was put in its place") as caught:
        store.commit()
    assert caught.value.kind == "replaced"
    with pytest.raises(StorageError):
        store.close()
    assert samples(tmp_path / "s") == [1]


def test_a_commit_by_itself_finds_the_folder_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("timstore.database.writer.COMMIT_SECONDS", 0.0)
    store = made(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(StorageError, match="the store is gone"):
        store.append(0, 1, 1, {"w": GRADIENT})
    with pytest.raises(StorageError, match="the store is gone"):
        store.close()
    store.close()
    assert not (tmp_path / "s").exists()


def test_a_handle_of_nobody_whose_store_is_gone_keeps_none_from_opening_one_there(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        timstore.save_gradient_trajectory(tmp_path / "run", 0, 0, 1, "w", GRADIENT)
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(timstore.TimstoreWarning, match="loses 1 accepted record"):
        made(tmp_path / "run" / "trajectories.tim", 5).close()
    assert samples(tmp_path / "run" / "trajectories.tim") == [5]
