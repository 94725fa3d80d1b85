"""A recorder that would record nothing, or what is wrong, says so: not entered, copied, called by what is compiled."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import timstore


@pytest.fixture
def training(tmp_path):
    """Yield a store, a model, its optimizer and one step of training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, labels = torch.randn(6, 4), torch.randint(0, 2, (6,))

    def step():
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    with timstore.open(tmp_path / "run.tim") as store:
        yield store, model, optimizer, step


@pytest.mark.parametrize("samples", [5, 5.0, "12", torch.tensor(5), len, object()])
def test_samples_that_are_no_list_are_refused_with_what_to_write(training, samples):
    store, model, optimizer, _ = training
    with pytest.raises(timstore.InvalidInputError, match="samples is a list"):
        store.record(model, optimizer, samples=samples)


def test_training_beside_a_recorder_that_nobody_entered_warns_once(training):
    store, model, optimizer, step = training
    store.record(model, optimizer)
    with pytest.warns(timstore.TimstoreWarning, match="never entered"):
        step()
    step()
    with pytest.raises(timstore.TimstoreWarning, match="never entered"), warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = store.record(model, optimizer, samples=[1])
        step()
    assert kept.step == 0


@pytest.mark.parametrize("call", [lambda one: one.batch([1, 2]), lambda one: one.save_point()])
def test_a_recorder_that_nobody_entered_refuses_what_needs_the_block(training, call):
    store, model, optimizer, _ = training
    with pytest.raises(timstore.StateError, match="train within") as caught:
        call(store.record(model, optimizer))
    assert caught.value.kind == "not-recording"


def test_a_recorder_that_was_entered_or_replaced_says_nothing(training):
    store, model, optimizer, step = training
    replaced = store.record(model, optimizer)
    with store.record(model, optimizer) as recorder:
        recorder.batch(range(6))
        step()
    step()
    with store.record(model, optimizer, resume_from=(0, 0)) as recorder:
        recorder.batch(range(6))
        step()
    assert replaced is not recorder
    assert len(store.sql("FROM records").fetchall()) == 6


COPIES = [copy.copy, copy.deepcopy, pickle.dumps, lambda one: pickle.dumps({"callback": [one]}, protocol=2)]


@pytest.mark.parametrize("made", COPIES)
def test_neither_store_nor_recorder_is_copied(training, made):
    store, model, optimizer, step = training
    with store.record(model, optimizer) as recorder:
        for one, advice in ((store, str(store.path)), (recorder, "where the training runs")):
            with pytest.raises(timstore.StateError) as caught:
                made(one)
            assert advice in str(caught.value)
            assert caught.value.kind == "not-copied"
        recorder.batch(range(6))  # and the originals work
        step()
    assert len(store.sql("FROM records").fetchall()) == 6


class Rows(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return number


def test_a_store_does_not_travel_to_the_workers_of_a_loader(training):
    store = training[0]

    with pytest.raises(timstore.StateError, match="open it there"):
        list(torch.utils.data.DataLoader(Rows(store), num_workers=1, multiprocessing_context="spawn"))


@pytest.mark.parametrize("whole", [False, True], ids=["pieces", "fullgraph"])
def test_a_compiled_function_that_calls_a_recorded_model_is_refused_before_anything_is_recorded(training, whole):
    store, model, optimizer, _ = training
    torch._dynamo.reset()

    def loss_of(inputs, labels):
        return nn.functional.cross_entropy(model(inputs), labels)

    compiled = torch.compile(loss_of, backend="eager", fullgraph=whole)
    with pytest.raises(Exception) as caught, store.record(model, optimizer) as recorder:
        recorder.batch(range(6))
        compiled(torch.randn(6, 4), torch.randint(0, 2, (6,))).backward()
    said = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert any("recorded model" in one and "torch.compile" in one for one in said)
    assert whole or isinstance(caught.value, timstore.CoverageError)
    assert store.sql("FROM records").fetchall() == []


def test_a_function_that_was_compiled_before_is_refused_at_the_first_step(training):
    store, model, optimizer, _ = training
    inputs, labels = torch.randn(6, 4), torch.randint(0, 2, (6,))
    compiled = torch.compile(lambda: nn.functional.cross_entropy(model(inputs), labels), backend="eager")
    compiled().backward()
    optimizer.zero_grad()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(timstore.CoverageError, match="compile"), store.record(model, optimizer) as recorder:
        recorder.batch(range(6))
        compiled().backward()
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert store.sql("FROM records").fetchall() == []


def test_a_model_compiled_in_place_within_the_block_is_refused(training):
    store, model, optimizer, step = training
    with pytest.raises(timstore.CoverageError, match="compiled"), store.record(model, optimizer) as recorder:
        recorder.batch(range(6))
        model.compile(backend="eager")
        step()
    assert store.sql("FROM records").fetchall() == []
