"""A recording that holds nothing, or nothing of a chosen sample, says so when it ends, and what the likely cause is."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from trainers import new_model, trained

import timstore
from timstore.errors import InvalidInputError, TimstoreWarning
from timstore.integrations.transformers import TrajectoryCallback

INPUTS, LABELS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as it is usually written: nobody calls its own `step`."""

    def __init__(self, params):
        super().__init__(params, {"rho": 0.05})
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=0.05)

    def second_step(self):
        self.inner.step()
        self.inner.zero_grad()


class Lookahead:
    """Another kind of wrapper, which is no optimizer itself."""

    def __init__(self, inner):
        self.inner = inner

    def step(self):
        self.inner.step()
        self.inner.zero_grad()


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 3)


def train(recorder, model, step, batches=None):
    for ids in torch.arange(16).split(4) if batches is None else batches:
        recorder.batch(ids)
        cross_entropy(model(INPUTS[ids]), LABELS[ids]).backward()
        step()


def stepped(optimizer):
    def step():
        optimizer.step()
        optimizer.zero_grad()

    return step


def the_wrapper_around_the_one_that_steps(store, model):
    wrapper = Sharpness(model.parameters())
    with store.record(model, wrapper) as recorder:
        train(recorder, model, wrapper.second_step)


def another_optimizer_of_the_same_parameters(store, model):
    given, used = torch.optim.AdamW(model.parameters()), torch.optim.Adagrad(model.parameters())
    with store.record(model, given) as recorder:
        train(recorder, model, Lookahead(used).step)


def no_optimizer_at_all(store, model):
    def by_hand():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None

    with store.record(model, torch.optim.SGD(model.parameters(), lr=0.1)) as recorder:
        train(recorder, model, by_hand)


def a_copy_of_the_trained_model(store, model):
    trained = copy.deepcopy(model)
    with store.record(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for ids in torch.arange(16).split(4):
            cross_entropy(trained(INPUTS[ids]), LABELS[ids]).backward()
            optimizer.step()


def a_loop_without_a_batch(store, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with store.record(model, optimizer, samples=[1]) as recorder:
        train(recorder, model, stepped(optimizer), [])


@pytest.mark.parametrize(
    ("train_so", "said"),
    [
        (the_wrapper_around_the_one_that_steps, "Sharpness that was given.*another optimizer .SGD."),
        (another_optimizer_of_the_same_parameters, "AdamW that was given.*another optimizer .Adagrad."),
        (no_optimizer_at_all, "SGD that was given: its step.. was never called, though the model ran"),
        (a_copy_of_the_trained_model, "nor was the Linear that was given.*not a copy of it"),
        (a_loop_without_a_batch, "nor was the Linear that was given"),
    ],
)
def test_steps_that_never_came(store, train_so, said):
    with pytest.warns(TimstoreWarning, match=f"nothing was recorded.*{said}") as caught:
        train_so(store, linear())
    assert len(caught) == 1 and store.sql("SELECT count(*) FROM records").fetchall() == [(0,)]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("choose", [list, set, np.array, lambda ids: iter(sorted(ids))])
def test_a_chosen_sample_that_nobody_drew(store, choose):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(TimstoreWarning, match=r"1 of the 2 chosen samples .*: 99\. .* ids from 0 to 15"),
        store.record(model, optimizer, samples=choose([3, 99])) as recorder,
    ):
        train(recorder, model, stepped(optimizer))
    assert store.sql("SELECT sample FROM records").fetchall() == [(3,)]


def test_many_that_nobody_drew_are_counted_and_the_first_are_named(store):
    model = linear()
    optimizer = torch.optim.Adam(model.parameters())
    with (
        pytest.warns(
            TimstoreWarning, match=r"40 of the 40 .*: 1000, 1001, 1002, 1003, 1004, \.\.\.\. .*by the ids that"
        ),
        store.record(model, optimizer, samples=range(1000, 1040)) as recorder,
    ):
        train(recorder, model, stepped(optimizer))


def test_a_last_batch_that_is_dropped(store):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(TimstoreWarning, match=r"1 of the 16 chosen samples .*: 15\. .*drop_last"),
        store.record(model, optimizer, samples=range(16)) as recorder,
    ):
        train(recorder, model, stepped(optimizer), torch.arange(15).split(5))


def test_it_is_said_at_the_end_of_the_first_epoch_and_once_more_at_the_end(store):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with store.record(model, optimizer, samples=[0, 15]) as recorder:
        recorder.epoch = 1  # before anything ran: no epoch is over
        train(recorder, model, stepped(optimizer), [torch.arange(8)])
        with pytest.warns(TimstoreWarning, match=r"^epoch 1 is over, and 1 of the 2 .*: 15\.") as caught:
            recorder.epoch = 2
        assert caught[0].filename == __file__
        train(recorder, model, stepped(optimizer), [torch.arange(8)])
        recorder.epoch = 3
        train(recorder, model, stepped(optimizer), [torch.arange(8, 16)])


def test_steps_that_never_came_are_missed_at_the_end_of_the_first_epoch(store):
    model = linear()
    wrapper = Sharpness(model.parameters())
    with pytest.warns(TimstoreWarning) as caught, store.record(model, wrapper) as recorder:
        train(recorder, model, wrapper.second_step)
        recorder.epoch = 1
        assert len(caught) == 1 and str(caught[0].message).startswith("epoch 0 is over, and nothing was recorded")
    assert len(caught) == 2


def test_what_came_before_in_an_earlier_block_or_attempt_was_drawn(tmp_path):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s") as store:
        with pytest.warns(TimstoreWarning, match="1 of the 2"), store.record(model, optimizer, [0, 15]) as recorder:
            train(recorder, model, stepped(optimizer), [torch.arange(8)])
        with store.record(model, optimizer, [0, 15]) as recorder:
            train(recorder, model, stepped(optimizer), [torch.arange(8, 16)])
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, [0, 1, 15], resume_from=(0, 2)) as recorder:  # 1 came, unchosen
            train(recorder, model, stepped(optimizer), [torch.arange(8, 16)])
        # What an attempt supersedes is as if it had never come.
        with (
            pytest.warns(TimstoreWarning, match=r"2 of the 3 .*: 0, 1\."),
            store.record(model, optimizer, [0, 1, 15], resume_from=(0, 0)) as recorder,
        ):
            train(recorder, model, stepped(optimizer), [torch.arange(8, 16)])


def test_a_block_that_ends_by_an_error_says_nothing_of_it(store):
    model = linear()
    with (
        warnings.catch_warnings(record=True) as seen,
        pytest.raises(KeyboardInterrupt),
        store.record(model, torch.optim.SGD(model.parameters(), lr=0.1), samples=[1]),
    ):
        raise KeyboardInterrupt
    assert seen == []


def test_a_warning_that_is_an_error_comes_after_everything_is_on_disk(tmp_path):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        timstore.open(tmp_path / "s") as store,
        pytest.raises(TimstoreWarning, match="99"),
        store.record(model, optimizer, samples=[3, 99]) as recorder,
    ):
        train(recorder, model, stepped(optimizer))
    with timstore.open(tmp_path / "s", "r") as store:
        assert store.sql("SELECT sample FROM records").fetchall() == [(3,)]
        assert store.latest_fingerprints() is not None


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_trainer_says_so_too(tmp_path, epochs):
    with pytest.warns(TimstoreWarning) as caught, timstore.open(tmp_path / "s") as store:
        callback = TrajectoryCallback(store, samples=[1, 10**15])
        trained(new_model("gpt2"), [callback], tmp_path / "out", num_train_epochs=epochs)
    said = [str(one.message) for one in caught if issubclass(one.category, TimstoreWarning)]
    assert len(said) == epochs and all("2 of the 2" in one and "content_ids" in one for one in said)
    assert said[0].startswith("epoch 0 is over") == (epochs == 2)


@pytest.mark.parametrize("ids", [[-1], [3, -(2**40)], np.array([0, -7])])
def test_ids_below_zero_are_refused_wherever_samples_are_chosen(store, ids):
    model = linear()
    with pytest.raises(InvalidInputError, match="starts at 0"):
        store.record(model, torch.optim.SGD(model.parameters(), lr=0.1), samples=ids)
    with pytest.raises(InvalidInputError, match="starts at 0"):
        store.rollback(model, ids)
