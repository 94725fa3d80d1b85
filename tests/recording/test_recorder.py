"""The recorder around a training loop: steps, ids, clipping, continuing, and leaving nothing behind."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import backward, hooks, moments, network, sgd, train
from torch import nn

import timstore
from timstore.errors import InvalidInputError, StateError
from timstore.model.fingerprints import digests

# --- what is written ---------------------------------------------------------------------------------------


def test_every_step_is_written_and_only_the_chosen_samples_are_recorded(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer, samples=[2, 9]) as recorder:
        train(model, optimizer, [1, 2], [3, 4])
        with pytest.warns(timstore.TimstoreWarning, match="epoch 0 is over.*: 9"):
            recorder.epoch = 1
        train(model, optimizer, [9, 2])
        assert recorder.step == 3
    assert moments(store) == [(0, 0, 2), (1, 2, 2), (1, 2, 9)]
    rows = store.sql("SELECT epoch, step, sample_ids, samples FROM steps ORDER BY ALL").fetchall()
    assert rows == [(0, 0, [1, 2], 2), (0, 1, [3, 4], 2), (1, 2, [9, 2], 2)]
    assert store.sql("SELECT DISTINCT from_step FROM attempts").fetchall() == [(0,)]


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_ids_come_in_any_form_and_never_reach_the_model(store: timstore.Store, form: Any) -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x)
            return out

    model = Strict()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        model(x=torch.randn(2, 4), sample_ids=form([5, 6])).sum().backward()
        optimizer.step()
        with torch.no_grad():
            model(x=torch.randn(2, 4), sample_ids=form([5, 6]))
    assert moments(store) == [(0, 0, 5), (0, 0, 6)]


def test_a_batch_can_be_named_by_a_call_or_a_block(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer) as recorder:
        recorder.batch([1, 2])
        model(torch.randn(2, 4)).sum().backward()
        with recorder.batch([3, 4]):
            # Not the model itself is called, but its layers.
            model[3](model[2](model[0](torch.randn(2, 4)))).sum().backward()
        optimizer.step()
    assert [sample for *_, sample in moments(store)] == [1, 2, 3, 4]


def test_micro_batches_of_a_step_are_one_record_and_one_row_of_ids(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        backward(model, [1, 2])
        backward(model, [2, 3])
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
        optimizer.step()
    assert [sample for *_, sample in moments(store)] == [1, 2, 3]
    assert store.sql("SELECT sample_ids FROM steps").fetchall() == [([1, 2, 2, 3],)]
    for name, gradient in expected.items():
        total = sum(store.gradient(0, 0, sample, name) for sample in (1, 2, 3))
        np.testing.assert_allclose(total, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chosen", [None, [4]])
def test_two_forward_passes_may_come_before_one_backward(store: timstore.Store, chosen: list[int] | None) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer, samples=chosen):
        for _ in range(2):
            losses = [model(torch.randn(2, 4), sample_ids=ids).square().mean() for ids in ([1, 2], [3, 4])]
            (losses[0] + losses[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
    recorded = [1, 2, 3, 4] if chosen is None else chosen
    assert moments(store) == [(0, step, sample) for step in (0, 1) for sample in recorded]
    assert store.sql("SELECT DISTINCT sample_ids FROM steps").fetchall() == [([1, 2, 3, 4],)]


def test_a_sample_twice_in_a_batch_is_one_record_of_both(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        backward(model, [7, 7])
        expected = model[0].weight.grad.numpy().copy()
        optimizer.step()
    assert moments(store) == [(0, 0, 7)]
    np.testing.assert_allclose(store.gradient(0, 0, 7, "0.weight"), expected, rtol=1e-5, atol=1e-7)


def test_a_forward_pass_that_failed_or_had_no_backward_belongs_to_no_step(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(2, 3), sample_ids=[1, 2])
        model(torch.randn(2, 4), sample_ids=[3, 4])
        train(model, optimizer, [5, 6])
    assert store.sql("SELECT sample_ids FROM steps").fetchall() == [([5, 6],)]
    assert [sample for *_, sample in moments(store)] == [5, 6]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("zeroed", ["before forward", "between forward and backward"])
def test_the_gradients_of_a_skipped_step_are_discarded(store: timstore.Store, set_to_none: bool, zeroed: str) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        train(model, optimizer, [1, 2])
        backward(model, [3, 4])  # and no step, as under a GradScaler that saw an overflow
        if zeroed == "before forward":
            optimizer.zero_grad(set_to_none=set_to_none)
        loss = model(torch.randn(2, 4), sample_ids=[5, 6]).square().mean()
        if zeroed != "before forward":
            optimizer.zero_grad(set_to_none=set_to_none)
        loss.backward()
        optimizer.step()
    assert moments(store) == [(0, 0, 1), (0, 0, 2), (0, 1, 5), (0, 1, 6)]
    assert store.sql("SELECT sample_ids FROM steps ORDER BY step").fetchall() == [([1, 2],), ([5, 6],)]


def test_evaluation_between_steps_records_nothing_and_needs_no_ids(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        train(model, optimizer, [1, 2])
        with torch.no_grad():
            model.eval()(torch.randn(3, 4))
        with torch.inference_mode():
            model(torch.randn(3, 4))
        train(model.train(), optimizer, [3, 4])
    assert [sample for *_, sample in moments(store)] == [1, 2, 3, 4]


def test_groups_are_written_as_the_step_used_them(store: timstore.Store) -> None:
    model = network()
    model[2].bias.requires_grad_(False)
    first = {"params": model[0].parameters(), "lr": 0.5, "momentum": 0.9, "nesterov": True}
    rest = {"params": [*model[2].parameters(), *model[3].parameters()], "weight_decay": 0.01, "maximize": True}
    optimizer = torch.optim.SGD([first, rest], lr=0.1, dampening=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with store.record(model, optimizer):
        for ids in ([1, 2], [3, 4]):
            backward(model, ids)
            if ids == [3, 4]:
                model[3].bias.grad = None
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    found = store.sql(
        "SELECT step, group_id, optimizer, lr, momentum, nesterov, weight_decay, maximize, idle, fresh FROM steps "
        "ORDER BY ALL"
    ).fetchall()
    assert found == [
        (0, 0, "SGD", 0.5, 0.9, True, 0.0, False, [], ["0.weight", "0.bias"]),
        (0, 1, "SGD", 0.1, 0.0, False, 0.01, True, [], []),
        (1, 0, "SGD", 0.25, 0.9, True, 0.0, False, [], []),
        (1, 1, "SGD", 0.05, 0.0, False, 0.01, True, ["3.bias"], []),
    ]
    parameters = dict(store.sql("SELECT parameter, group_id FROM parameters").fetchall())
    assert parameters == {"0.weight": 0, "0.bias": 0, "2.weight": 1, "3.weight": 1, "3.bias": 1}


def test_another_optimizer_is_written_under_its_own_name(store: timstore.Store) -> None:
    class Mine(torch.optim.SGD):
        pass

    model = network()
    optimizers = [torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95), eps=1e-6), Mine(model.parameters(), lr=1.0)]
    for optimizer in optimizers:
        with store.record(model, optimizer):
            train(model, optimizer, [1, 2])
    found = store.sql("SELECT optimizer, beta1, beta2, eps, decoupled FROM steps ORDER BY step").fetchall()
    assert found == [("AdamW", 0.8, 0.95, 1e-6, True), ("test_recorder.Mine", None, None, None, False)]


@pytest.mark.parametrize("scale", [1.0, 0.125, 1e-3])
def test_the_ratio_is_the_clip_factor(store: timstore.Store, scale: float) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        backward(model, [1, 2])
        norm = float(nn.utils.get_total_norm([one.grad for one in model.parameters()]))  # type: ignore[misc]
        nn.utils.clip_grad_norm_(model.parameters(), norm * scale)
        optimizer.step()
    store.commit()
    assert store.sql("SELECT consumed_ratio FROM steps").fetchall()[0][0] == pytest.approx(scale, rel=3e-6)


def test_the_ratio_is_seen_when_only_a_few_rows_of_a_table_are_trained(store: timstore.Store) -> None:
    model = nn.Embedding(5000, 2)
    optimizer = sgd(model)
    with store.record(model, optimizer):
        model(torch.tensor([[1], [3]]), sample_ids=[0, 1]).square().sum().backward()
        model.weight.grad *= 0.25  # type: ignore[operator]
        optimizer.step()
    store.commit()
    assert store.sql("SELECT consumed_ratio FROM steps").fetchall()[0][0] == pytest.approx(0.25)


def test_a_probe_is_kept_without_its_ids(store: timstore.Store) -> None:
    model = network()
    batches = [{"x": torch.ones(2, 4), "sample_ids": torch.tensor([1, 2])}, (torch.zeros(1, dtype=torch.bfloat16),)]
    with store.record(model, sgd(model), probe=batches):
        pass
    kept = store.probe()
    assert kept is not None
    (first, second), loss = kept
    assert (list(first), loss) == (["x"], "cross_entropy")
    np.testing.assert_array_equal(first["x"], np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(second[0], np.zeros(1, np.float32))


# --- continuing --------------------------------------------------------------------------------------------


def test_recording_goes_on_where_it_stopped(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer) as recorder:
        recorder.epoch = 3
        train(model, optimizer, [1, 2])
    assert store.latest_fingerprints() == (3, 0, digests(model))
    with store.record(model, optimizer) as recorder:
        assert (recorder.epoch, recorder.step) == (3, 1)
        train(model, optimizer, [1, 2])
        with pytest.raises(InvalidInputError, match="before epoch 3"):
            recorder.epoch = 2
    assert moments(store) == [(3, 0, 1), (3, 0, 2), (3, 1, 1), (3, 1, 2)]


def test_a_model_that_changed_since_is_refused_and_a_resumed_run_supersedes(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        train(model, optimizer, [1, 2], [3, 4], [5, 6])
    restarted = network()
    optimizer = sgd(restarted)
    with (
        pytest.raises(StateError, match=r"changed since recording stopped at epoch 0, step 2.*resume_from"),
        store.record(restarted, optimizer),
    ):
        pass
    assert hooks(restarted, optimizer) == 0
    with store.record(restarted, optimizer, resume_from=(0, 1)) as recorder:
        assert recorder.step == 1
        train(restarted, optimizer, [7, 8])
    assert moments(store) == [(0, 0, 1), (0, 0, 2), (0, 1, 7), (0, 1, 8)]


def test_a_run_that_was_cut_off_is_not_silently_gone_on_with(tmp_path: Path) -> None:
    model = network()
    optimizer = sgd(model)
    with timstore.open(tmp_path / "s") as store:
        recorder = store.record(model, optimizer)
        recorder.__enter__()
        train(model, optimizer, [1, 2])
        recorder._release()  # a kill would not have written fingerprints either
    with timstore.open(tmp_path / "s") as store:
        with pytest.raises(StateError, match=r"cut off.*resume_from") as caught, store.record(model, optimizer):
            pass
        assert caught.value.kind == "unknown-model"
        with store.record(model, optimizer, resume_from=(0, 1)) as recorder:
            train(model, optimizer, [3, 4])
        assert moments(store) == [(0, 0, 1), (0, 0, 2), (0, 1, 3), (0, 1, 4)]


# --- leaving nothing behind --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["exit", "error", "refusal at enter", "store closed"])
def test_no_hook_is_left_whatever_ends_it(tmp_path: Path, end: str) -> None:
    model = network()
    optimizer = sgd(model, momentum=0.9)
    store = timstore.open(tmp_path / "s")
    if end == "refusal at enter":
        store.append(0, 0, 1, {"0.weight": np.ones((9, 9), np.float32)}, lr=0.1)
    if end == "store closed":
        store.close()
    try:
        with store.record(model, optimizer):
            assert hooks(model, optimizer) > 10
            train(model, optimizer, [1, 2])
            if end == "error":
                raise KeyError("mine")
        assert end == "exit"
    except (KeyError, StateError) as error:
        assert end != "exit"
        assert isinstance(error, KeyError) == (end == "error")
    assert hooks(model, optimizer) == 0
    model(torch.randn(2, 4)).sum().backward()
    store.close()
    with timstore.open(tmp_path / "again") as other, other.record(model, sgd(model)):
        pass


def test_the_errors_of_the_loop_are_never_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = sgd(model)
    with timstore.open(tmp_path / "s") as store:

        def no_space() -> None:
            raise timstore.StorageError("no space left")

        with pytest.raises(KeyError, match="mine") as caught:  # noqa: SIM117
            with store.record(model, optimizer):
                train(model, optimizer, [1, 2])
                monkeypatch.setattr(store, "commit", no_space)
                raise KeyError("mine")
        monkeypatch.undo()
        assert "no space left" in caught.value.__notes__[0]
        assert moments(store) == [(0, 0, 1), (0, 0, 2)]


def test_no_activation_outlives_its_step_even_when_the_loss_is_kept(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    activations: list[weakref.ref[Any]] = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # The storage: every detached copy and view of the tensor keeps it.
        activations.extend(weakref.ref(tensor.untyped_storage()) for tensor in (args[0], output))

    losses = []
    kept = torch.randn(2, 4)
    alive = weakref.ref(kept.untyped_storage())
    with store.record(model, optimizer):
        handles = [module.register_forward_hook(note) for module in model]
        for ids in ([1, 2], [3, 4]):
            losses.append(backward(model, ids))
            optimizer.step()
            optimizer.zero_grad()
        # This one never gets a backward pass.
        model(torch.randn(2, 4), sample_ids=[5, 6])
        for handle in handles:
            handle.remove()
        gc.collect()
        assert alive() is not None
        # Three forward passes: no proof runs the model another time.
        assert len(activations) == 2 * len(model) * 3
        assert [one() for one in activations if one() is not None] == []
    assert len(losses) == 2


def test_a_backward_pass_after_its_step_is_refused_and_after_recording_ignored(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        late = model(torch.randn(2, 4), sample_ids=[1, 2])
        train(model, optimizer, [3, 4])
        with pytest.raises(StateError, match="after the optimizer step"):
            late.sum().backward()
        optimizer.zero_grad()
        outside = model(torch.randn(2, 4), sample_ids=[5, 6])
    outside.sum().backward()
    assert [sample for *_, sample in moments(store)] == [3, 4]
