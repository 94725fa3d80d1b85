"""Every public argument of a store is given everything: only errors of ours, and nothing is lost.

TIMSTORE_FUZZ=500 runs so many examples of each, drawn anew, instead of the few that are always the same.
"""

import inspect
import itertools
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd import FOLDER, TOGETHER, G, answer_of, fuzzed, left_out, odd_call

import timstore
from timstore.database.kept_rows import KeptRow, rows_table
from timstore.records import Parameter

FEW = 5
# A sample that is recorded last, and that nothing odd names.
LAST = 987654321

_GROUP = {"lr": 0.1, "momentum": 0.9}
_RECORD = dict(epoch=0, step=5, sample=1, gradients={"w": G}, lr=0.1, loss=1.0, tokens=3, dot=0.5, rank=0)
_RECORD |= dict(allow_zero=False, allow_nonfinite=False, copy=True)
_STEP = dict(epoch=0, step=6, groups=[_GROUP], rank=0, consumed_ratio=1.0, sample_ids=[1], tokens=3)
_STEP |= dict(grad_norm=1.0, amp_scale=1.0, clip_value=None, mean_over=None, micro_batches=[1], skipped=0)

# What each call takes when nothing is odd; every argument of it is exchanged.
CALLS = {
    "append": _RECORD,
    "append_step": _STEP,
    "record_entry": _RECORD,
    "step_entry": _STEP,
    "accept": dict(entries=()),
    "declare": dict(parameters=[Parameter("v", (2, 3), "float32", 0)]),
    "append_fingerprints": dict(epoch=0, step=0, digests={"w": "00"}),
    "append_states": dict(epoch=0, step=0, role="start_state", numbers={"w": G}, name="exp_avg"),
    "append_hashes": dict(hashes={1: "00"}),
    "append_rollback": dict(row={"samples": [1], "digest_after": "00"}, before={"w": G}),
    "keep_probe": dict(batches=[{"x": np.ones(2)}, np.ones(2), [np.ones(2)]], loss="mse"),
    "keep_rows": dict(rows=rows_table([KeptRow(1, 0, 0, None, 1, {"0": np.ones((1, 3))}, {})], "mse", None)),
    "begin_attempt": dict(from_epoch=3, from_step=0, scope=(1, 2), ranks=1, digest_before="00"),
    "join_attempt": dict(attempt=0),
    "claim_scope": dict(scope=None, ranks=1, digest_before="00"),
    "sql": dict(query="SELECT ? AS x", params=[1]),
    "read": dict(where="sample = 1"),
    "gradient": dict(epoch=0, step=0, sample=1, parameter="w", rank=0),
    "samples.update": dict(rows=[{"sample": 1, "owner": "a"}]),
    "compact": dict(progress=None),
    "verify": dict(progress=None),
}
OPEN = dict(path="s", mode="a", precision=None, max_rel_error=None, durability="os", sql_memory="1GB")
TABLES = ("records", "gradients", "steps", "parameters", "samples", "attempts", "fingerprints", "rollbacks", "commits")


# What is given a model is called in test_fuzzing_models.py.
_WITH_A_MODEL = {"record", "forecast", "rollback", "undo"}


def test_no_argument_is_left_out():
    methods = {name: one for name, one in inspect.getmembers(timstore.Store, callable) if not name.startswith("_")}
    calls = [(one, CALLS.get(name, ())) for name, one in methods.items() if name not in _WITH_A_MODEL]
    assert left_out([*calls, (timstore.open, OPEN), (timstore.Store, OPEN)]) == []


def called(store, verb):
    """Return a method of a store that does all of its work when it is called."""
    method = store
    for name in verb.split("."):
        method = getattr(method, name)
    if verb == "read":
        return lambda **given: list(method(**given))
    if verb == "sql":
        return lambda **given: method(**given).fetchall()
    if verb == "accept":
        return lambda entries: method(*entries) if isinstance(entries, list | tuple) else method(entries)
    return method


class Tried:
    """A store that examples are tried on, another one after so many of them or after one that failed."""

    def __init__(self, folder):
        self._folder, self._number = folder, itertools.count()
        self._store = None
        self.steps = itertools.count(5)

    @contextmanager
    def store(self):
        if self._store is None:
            self._path = self._folder / str(next(self._number))
            self._store = timstore.open(self._path, durability="os")
            self._store.append(0, 0, 1, {"w": G}, lr=0.1)
            self.kept, self._left = {1}, TOGETHER
        try:
            yield self._store
            self._store.commit()
            self._left -= 1
            if not self._left:
                self.end()
        except BaseException:
            self._give_up()
            raise

    def end(self):
        """Close the store: it opens again, all of it can be read, and holds what was accepted first and last."""
        if self._store is None:
            return
        self._store.append(0, 0, LAST, {"w": G * 2}, lr=0.1)
        self._store.close()
        self._store = None
        with timstore.open(self._path, "r") as store:
            for table in TABLES:
                store.sql(f"FROM {table}").fetchall()
            store.probe(), store.snapshot().kept_rows(), store.latest_fingerprints()
            for record in store.read():
                for name in record.gradients:
                    record.dense(name)
            for sample in {*self.kept, LAST}:
                assert np.array_equal(store.gradient(0, 0, sample, "w"), G if sample == 1 else G * 2)
        assert timstore.verify(self._path).sound

    def _give_up(self):
        store, self._store = self._store, None
        if store is not None:
            with suppress(Exception):
                store.close()


@pytest.fixture
def tried():
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        tried = Tried(Path(folder))
        yield tried
        tried.end()


@pytest.mark.parametrize("verb", CALLS)
@fuzzed(FEW)
@given(data=st.data())
def test_every_argument_of_a_store(tried, verb, data):
    usual = dict(CALLS[verb])
    with tried.store() as store:
        for name in usual:
            if "step" in usual:
                usual["step"] = next(tried.steps)
            arguments = data.draw(odd_call(usual, name))
            if answer_of(called(store, verb), arguments) and verb == "begin_attempt":
                start = int(arguments["from_epoch"]), int(arguments["from_step"])
                tried.kept -= {1} if start == (0, 0) else set()


@pytest.mark.parametrize("opening", [timstore.open, timstore.Store, timstore.verify])
@fuzzed(FEW)
@given(data=st.data())
def test_every_argument_of_opening(opening, data):
    usual = dict(path="s", progress=None) if opening is timstore.verify else OPEN
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        arguments = data.draw(odd_call(usual))
        if isinstance(arguments["path"], str):
            arguments["path"] = f"{folder}/{arguments['path'].replace('..', '')}"
        answer = answer_of(opening, arguments)
        if answer is None or opening is timstore.verify:
            assert not any(Path(folder).iterdir())
            return
        with answer.value as store:
            if store.mode == "r":
                return
            store.append(0, 0, 1, {"w": G}, lr=0.1)
            store.append(0, 0, 2, {"w": G * 2}, lr=0.1)
        with timstore.open(arguments["path"], "r") as store:
            exact = store.settings.precision == "exact"
            assert np.allclose(store.gradient(0, 0, 2, "w"), G * 2, rtol=0 if exact else 0.02)
        assert timstore.verify(arguments["path"]).sound
