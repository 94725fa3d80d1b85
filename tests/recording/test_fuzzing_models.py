"""Every public argument of what is given a model: only errors of ours, and the model is as it was, or as reported.

TIMSTORE_FUZZ=500 runs so many examples of each, drawn anew, instead of the few that are always the same.
"""

import copy
import itertools
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from odd import FOLDER, TOGETHER, G, answer_of, fuzzed, left_out, odd_call
from safetensors.torch import load_file, save_file

import timstore
from timstore.database.identity import combined_digest
from timstore.model.fingerprints import digests

FEW = 5
LAST = 987654321

ROLLBACK = dict(target=None, ids=[1], where=None, strength=1.0, epochs=None, parameters=None, method="auto")
ROLLBACK |= dict(denominator="kept", optimizer=None, probe=None, bins=2, outputs=None, loss=None, memory_limit="512MB")
ROLLBACK |= dict(accumulate="float32", missing="error", keep_delta=False, dry_run=False, force=False, progress=None)
ROLLBACK |= dict(output=None, in_place=False, model=None)
UNDO = dict(model=None, rollback_id=None)
FORECAST = dict(model=None, samples=2, steps=3, tokens=None, epochs=1, batch=torch.ones(4, 3), optimizer=None)
FORECAST |= dict(optimizer_history="final", waypoints=True)


class Recorded:
    """A tiny model that was recorded, its optimizer, and its store."""

    def __init__(self, folder, kind, history):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = getattr(torch.optim, kind)(self.model.parameters(), lr=0.1)
        self.store = timstore.open(Path(folder) / "s", durability="os")
        probe = [torch.randn(4, 3)]
        with self.store.record(
            self.model, self.optimizer, samples=[1, 2], probe=probe, optimizer_history=history
        ) as recorder:
            for _ in range(3):
                recorder.batch([1, 2, 3, 4])
                self.model(torch.randn(4, 3)).square().mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def state(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.model.training))

    def put(self, state):
        model, optimizer, _ = copy.deepcopy(state)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def assert_is(self, state):
        now, then = self.state(), state
        assert now[2] == then[2]
        assert all(torch.equal(now[0][name], then[0][name]) for name in then[0])
        assert str(now[1]) == str(then[1])
        assert all(one.grad is None for one in self.model.parameters())

    def given(self, arguments):
        """Return arguments with the model and its optimizer where nothing odd is."""
        ours = {"target": self.model, "model": self.model, "optimizer": self.optimizer}
        filled = [name for name in ours if name in arguments and arguments[name] is None]
        if "target" in arguments:
            filled = [name for name in filled if name != "model"]
        for name in filled:
            arguments[name] = ours[name]
        return arguments


@pytest.fixture(params=[("SGD", "final"), ("Adam", "gradients")], ids=" ".join)
def recorded(request, monkeypatch):
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        monkeypatch.chdir(folder)  # a path that is drawn leads nowhere else
        one = Recorded(folder, *request.param)
        yield one
        one.store.close()
        assert timstore.verify(one.store.path).sound


@pytest.mark.parametrize("called", ["store", "timstore"])
@fuzzed(FEW)
@given(data=st.data())
def test_every_argument_of_a_rollback(recorded, called, data):
    usual = ROLLBACK if called == "store" else dict(target=None, ids=[1], store=recorded.store)
    arguments = recorded.given(data.draw(odd_call(usual)))
    before = recorded.state()
    answer = answer_of(recorded.store.rollback if called == "store" else timstore.rollback, arguments)
    if answer is None or answer.value.dry_run:
        recorded.assert_is(before)
        return
    report, after = answer.value, recorded.model.state_dict()
    assert report.rollback_id == combined_digest(digests(recorded.model))
    moved = sum(float((after[name].double() - before[0][name].double()).square().sum()) for name in after) ** 0.5
    assert moved == pytest.approx(report.delta_norm, rel=1e-3, abs=1e-6)
    recorded.put(before)


@fuzzed(FEW)
@given(data=st.data())
def test_every_argument_of_a_rollback_of_a_checkpoint(recorded, data):
    checkpoint = Path.cwd() / "model.safetensors"
    save_file(recorded.model.state_dict(), checkpoint)
    before = checkpoint.read_bytes()
    usual = {name: one for name, one in ROLLBACK.items() if name != "target"}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        arguments = data.draw(odd_call(usual | {"output": "out.safetensors"}))
        if isinstance(arguments["output"], str):
            arguments["output"] = f"{folder}/{arguments['output'].replace('..', '')}"
        answer = answer_of(partial(recorded.store.rollback, checkpoint), arguments)
        written = list(Path(folder).glob("*.safetensors"))
        if answer is None or answer.value.dry_run:
            assert checkpoint.read_bytes() == before and not written
        for one in written:
            after = copy.deepcopy(recorded.model)
            after.load_state_dict(load_file(one))
            assert answer.value.rollback_id == combined_digest(digests(after))


@fuzzed(FEW)
@given(data=st.data())
def test_every_argument_of_undo(recorded, data):
    arguments = recorded.given(data.draw(odd_call(UNDO)))
    before = recorded.state()
    with pytest.warns(timstore.TimstoreWarning, match="first order"):
        report = recorded.store.rollback(recorded.model, [1], probe=False, keep_delta=True)
    between = recorded.state()
    if arguments["rollback_id"] is None:
        arguments["rollback_id"] = report.rollback_id
    try:
        recorded.assert_is(between if answer_of(recorded.store.undo, arguments) is None else before)
    finally:
        recorded.put(before)


@fuzzed(FEW)
@given(data=st.data())
def test_every_argument_of_a_forecast(recorded, data):
    before = recorded.state()
    answer = answer_of(recorded.store.forecast, recorded.given(data.draw(odd_call(FORECAST))))
    recorded.assert_is(before)
    if answer is not None:
        str(answer.value)


RECORD = dict(model=None, optimizer=None, samples=[1, 2], resume_from=None, probe="auto", optimizer_history="final")
RECORD |= dict(scaler=None, mean_over="samples", budget="1GB", steps=3, epochs=1, rank=0, allow_zero=False)
RECORD |= dict(capture="modules", batch_axis=0, id_column=None, by_content=False, process_group=None, waypoints=True)
# What the `with` block is given: `ids` beside the batch, and the epoch that is set.
WITHIN = dict(ids=[1, 2], epoch=1)


class Recording:
    """Stores under which examples are recorded, another one after so many of them."""

    def __init__(self, folder):
        self._folder, self._number = Path(folder), itertools.count()
        self._store, self._left = None, 0

    def step(self, ids, epoch, **options):
        """Train a step under a recorder."""
        if not self._left:
            self._begin()
        self._left -= 1
        net = torch.nn.Linear(3, 2)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        ours = {"model": net, "optimizer": sgd, "resume_from": (1, 0)}
        options |= {name: one for name, one in ours.items() if options[name] is None}
        with self._store.record(**options) as recorder:
            recorder.epoch = epoch
            recorder.batch(ids)
            net(torch.ones(2, 3)).square().mean().backward()
            sgd.step()
            recorder.save_point()

    def _begin(self):
        self.end()
        self._store = timstore.open(self._folder / str(next(self._number)), durability="os")
        self._store.append(0, 0, 1, {"w": G}, lr=0.1)
        self._store.append(0, 0, LAST, {"w": G * 2}, lr=0.1)
        self._left = TOGETHER

    def end(self):
        """Close the store: all of it can be read, and holds what was accepted first."""
        if self._store is None:
            return
        self._store.close()
        with timstore.open(self._store.path, "r") as store:
            for record in store.read():
                for name in record.gradients:
                    record.dense(name)
            assert np.array_equal(store.gradient(0, 0, LAST, "w"), G * 2)
        assert timstore.verify(self._store.path).sound


@pytest.fixture
def recording():
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        one = Recording(folder)
        yield one
        one.end()


def test_no_argument_is_left_out():
    store = timstore.Store
    calls = [(store.record, RECORD), (store.forecast, FORECAST), (store.rollback, ROLLBACK), (store.undo, UNDO)]
    assert left_out(calls) == []


@pytest.mark.parametrize("odd_one", ["record", "recorder"])
@fuzzed(FEW)
@given(data=st.data())
def test_every_argument_of_a_recorder(recording, odd_one, data):
    arguments = data.draw(odd_call(RECORD if odd_one == "record" else WITHIN))
    answer_of(recording.step, RECORD | WITHIN | arguments)
