"""Rows of the training that a recorder keeps by itself, and a rollback that asks them."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Net
from torch import nn

import timstore
from timstore.database import kept_rows
from timstore.database.kept_rows import KeptRow, KeptRows, places_of, rows_table
from timstore.recording import reservoir
from timstore.recording.losses import is_cross_entropy
from timstore.rollbacks.probe import Probe, tensors_of

SAMPLES, WIDTH, CLASSES = 60, 4, 3
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(SAMPLES, WIDTH, generator=draw), torch.randint(CLASSES, (SAMPLES,), generator=draw)


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return Net(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def train(
    store: timstore.Store,
    model: nn.Module,
    *,
    loss: Loss = F.cross_entropy,
    inputs: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    epochs: range = range(1),
    **options: Any,
) -> None:
    """Batches of 5 in another order every epoch; the ids are the numbers of the rows, unless they are given."""
    x, y = data()
    x = x if inputs is None else inputs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with store.record(model, optimizer, **options) as recorder:
        for epoch in epochs:
            recorder.epoch = epoch
            for rows in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).split(5):
                named = rows if ids is None else ids[rows]
                loss(model(x[rows], sample_ids=named), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()


def kept(store: timstore.Store) -> KeptRows:
    return store.snapshot().kept_rows()


def samples(rows: KeptRows) -> set[int]:
    return {row.sample for row in rows.rows}


def inputs_of(row: KeptRow) -> np.ndarray:
    (found,) = row.by_row.values()
    return found[0]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Eight rows are kept."""
    for module in (kept_rows, reservoir):
        monkeypatch.setattr(module, "ROWS", 8)
    return 8


# --- which rows ------------------------------------------------------------------------------------------


def test_rows_of_samples_that_are_not_recorded_are_kept_as_they_were_drawn(store: timstore.Store, few: int) -> None:
    train(store, classifier(), samples=[3, 5, 17], epochs=range(2))
    rows, (x, _) = kept(store), data()
    others = [one for one in range(SAMPLES) if one not in (3, 5, 17)]
    assert samples(rows) == set(sorted(others, key=lambda one: places_of([one])[0])[:few])
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist()
    for row in rows.rows:
        np.testing.assert_array_equal(inputs_of(row), x[row.sample])
        assert (row.epoch, row.step, row.batch_rows) == (0, order.index(row.sample) // 5, 5)
    assert [(row.epoch, row.step) for row in rows.rows] == sorted((row.epoch, row.step) for row in rows.rows)
    assert rows.loss == "cross_entropy"


@pytest.mark.parametrize("stride", [1, 64, 2**40 + 1])
def test_every_sample_is_as_likely_to_be_kept(stride: int) -> None:
    # 4,000 runs of 50 samples, of which 10 are kept; what numbers they have, and where they come, tells nothing.
    counts = np.zeros(50)
    for run in range(4000):
        ids = (run * 50 + np.arange(50)) * stride
        counts[np.argsort(places_of(ids))[:10]] += 1
    expected, free = 4000 * 10 / 50, 49
    statistic = float(((counts - expected) ** 2).sum() / (expected * (1 - 10 / 50)) * free / 50)
    assert abs(statistic - free) < 5 * (2 * free) ** 0.5


def test_of_a_training_whose_samples_are_all_recorded_some_of_those_are_kept(tmp_path: Path, few: int) -> None:
    for number, chosen in enumerate((None, range(SAMPLES))):
        with timstore.open(tmp_path / f"s{number}") as store:
            train(store, classifier(), samples=chosen)
            assert samples(kept(store)) == set(sorted(range(SAMPLES), key=lambda one: places_of([one])[0])[:few])


def test_recorded_samples_give_way_to_others_that_come_late(store: timstore.Store, few: int) -> None:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist()
    train(store, classifier(), samples=order[:-3])
    assert samples(kept(store)) == set(order[-3:])


def test_no_more_bytes_are_kept_than_are_allowed(store: timstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservoir, "ROWS_BYTES", 5 * WIDTH * 4)
    train(store, classifier(), samples=[3])
    others = [one for one in range(SAMPLES) if one != 3]
    assert samples(kept(store)) == set(sorted(others, key=lambda one: places_of([one])[0])[:5])


@pytest.mark.parametrize("probe", [False, None])
def test_nothing_is_kept_where_nothing_is_wanted(store: timstore.Store, probe: Any) -> None:
    model = classifier()
    train(store, model, samples=[3], probe=probe)
    assert len(kept(store)) == 0 and store.probe() is None
    with pytest.warns(timstore.TimstoreWarning, match=r"first order only.*training data\)$"):
        store.rollback(model, [3], dry_run=True)


def test_a_probe_that_is_given_is_asked_and_no_rows_are_kept(store: timstore.Store) -> None:
    model, (x, _) = classifier(), data()
    train(store, model, samples=[3], probe=[x[10:17]])
    assert len(kept(store)) == 0
    report = store.rollback(model, [3], dry_run=True)
    assert report.probe is not None and (report.probe.sequences, report.probe.kept) == (7, None)


# --- asked -----------------------------------------------------------------------------------------------


def test_a_rollback_asks_them_as_if_they_were_given(store: timstore.Store, few: int, tmp_path: Path) -> None:
    model = classifier()
    train(store, model, epochs=range(2))
    rows = kept(store)
    forgotten = rows.rows[3].sample
    given = [torch.from_numpy(np.stack([inputs_of(row) for row in rows.rows if row.sample != forgotten])).split(4)]
    by_itself = store.rollback(model, [forgotten], dry_run=True)
    with timstore.open(tmp_path / "keeps none") as other:
        same = classifier()
        train(other, same, epochs=range(2), probe=False)
        wanted = other.rollback(same, [forgotten], probe=given[0], dry_run=True)
    assert by_itself.rollback_id == wanted.rollback_id
    assert by_itself.probe is not None and by_itself.probe.sequences == few - 1
    assert (by_itself.probe.kept, by_itself.probe.left_out) == (few, 1)
    assert "7 sequences of 8 kept rows of the training (1 left out)" in str(by_itself)
    batches, loss = store.probe() or ([], "")
    assert (sum(len(batch["x"]) if isinstance(batch, dict) else len(batch[0]) for batch in batches), loss) == (
        few,
        "cross_entropy",
    )


def test_rows_of_the_same_content_as_what_is_forgotten_are_left_out(store: timstore.Store) -> None:
    model, (x, _) = classifier(), data()
    x[40:44] = x[3]
    train(store, model, samples=[3], inputs=x)
    report = store.rollback(model, [3], dry_run=True)
    assert report.probe is not None
    assert (report.probe.kept, report.probe.left_out) == (SAMPLES - 1, 4)


@pytest.mark.parametrize("unlike", [False, True])
def test_a_probe_that_is_given_is_held_against_them(store: timstore.Store, unlike: bool) -> None:
    x, _ = data()
    x = torch.cat([x[:, :2] * 3, torch.zeros(SAMPLES, 2)], 1)  # the last two are never seen in training
    model, start = classifier(), classifier()
    train(store, model, samples=[3, 4, 5], inputs=x, epochs=range(4))
    probe = [torch.cat([torch.zeros(32, 2), torch.ones(32, 2)], 1)] if unlike else [x[20:52]]
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", timstore.TimstoreWarning)
        report = store.rollback(model, [3, 4, 5], probe=probe)
    assert report.probe is not None and report.probe.misfit is not None
    assert any("unlike what was trained on" in one for one in report.warnings) is unlike
    start.load_state_dict(before)
    ids = [row.sample for row in kept(store).without(frozenset([3, 4, 5]), set()).rows]
    # What was measured is what happened to the rows of the training.
    old, new = (F.log_softmax(one(x[ids]).detach().double(), 1) for one in (start, model))
    seen = float((old.exp() * (old - new)).sum(1).mean())
    assert report.probe.seen == pytest.approx(seen, rel=1e-3)
    old, new = (F.log_softmax(one(torch.cat(probe)).detach().double(), 1) for one in (start, model))
    assert report.probe.misfit == pytest.approx(seen / float((old.exp() * (old - new)).sum(1).mean()), rel=1e-3)


def test_what_was_taken_out_before_is_left_out_too(store: timstore.Store) -> None:
    model = classifier()
    train(store, model)
    store.rollback(model, [3, 4])
    report = store.rollback(model, [9], dry_run=True)
    assert report.probe is not None and report.probe.left_out == 3


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("count", range(1, 12))
def test_batches_hold_every_row_once_and_none_is_empty(count: int, at_once: int) -> None:
    rows = [KeptRow(sample, 0, 0, None, at_once, {"x": np.full((1, 2), sample)}, {}) for sample in range(count)]
    batches = KeptRows.read([rows_table(rows, "mse", None)], None).batches()
    assert sorted(int(one) for batch in batches for one in batch["x"][:, 0]) == list(range(count))
    assert all(0 < len(batch["x"]) <= at_once for batch in batches)


# --- the kind of loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, wanted: F.mse_loss(out, F.one_hot(wanted, CLASSES).float()),
        lambda out, wanted: F.binary_cross_entropy_with_logits(out, F.one_hot(wanted, CLASSES).float()),
        lambda out, wanted: F.multi_margin_loss(out, wanted),
        lambda out, wanted: F.cross_entropy(2 * out, wanted),
        lambda out, wanted: F.cross_entropy(out, wanted) - 0.1 * out.softmax(-1).square().sum(),
        lambda out, wanted: -F.cross_entropy(out, wanted),
    ],
)
def test_rows_are_not_asked_by_themselves_where_the_loss_is_none_that_is_known(
    store: timstore.Store, loss: Loss
) -> None:
    model = classifier()
    train(store, model, samples=[3], loss=loss)
    rows = kept(store)
    assert len(rows) == SAMPLES - 1 and rows.loss is None
    assert "not that of a cross entropy" in str(rows.reason)
    assert (store.probe() or ("", ""))[1] == "unknown"
    with pytest.warns(timstore.TimstoreWarning, match="keeps 59 rows of the training itself, .* loss= says"):
        assert store.rollback(model, [3], dry_run=True).probe is None
    asked = store.rollback(model, [3], loss="mse", dry_run=True).probe
    assert asked is not None and asked.kept == SAMPLES - 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, wanted: F.cross_entropy(out, wanted, reduction="sum") / 7,
        lambda out, wanted: F.cross_entropy(out, torch.where(wanted == 0, -100, wanted)),
        lambda out, wanted: F.cross_entropy(out, wanted, weight=torch.tensor([0.2, 3.0, 1.0])),
        lambda out, wanted: F.nll_loss(out.log_softmax(-1), wanted),
        lambda out, wanted: F.cross_entropy(out.double(), wanted) * 1024,
    ],
)
def test_a_cross_entropy_is_known_however_it_is_spelled(store: timstore.Store, loss: Loss) -> None:
    train(store, classifier(), samples=[3], loss=loss)
    assert kept(store).loss == "cross_entropy"


@pytest.mark.parametrize(
    ("dtype", "classes"), [(torch.bfloat16, 50), (torch.float16, 50), (torch.float32, 2), (torch.float64, 9)]
)
def test_a_cross_entropy_is_known_by_its_gradient_in_any_precision(dtype: torch.dtype, classes: int) -> None:
    torch.manual_seed(0)
    outputs = (3 * torch.randn(4, 5, classes)).to(dtype).requires_grad_()
    wanted = torch.randint(classes, (20,))
    cross = F.cross_entropy(outputs.flatten(0, 1).float(), wanted) * 64
    (gradient,) = torch.autograd.grad(cross, outputs)
    assert is_cross_entropy(outputs.detach(), gradient)
    smoothed = F.cross_entropy(outputs.flatten(0, 1).float(), wanted, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(smoothed, outputs)
    assert is_cross_entropy(outputs.detach(), gradient) or classes < 4
    margin = F.multi_margin_loss(outputs.flatten(0, 1).float(), wanted)
    (other,) = torch.autograd.grad(margin, outputs)
    assert is_cross_entropy(outputs.detach(), other) is False
    assert is_cross_entropy(outputs.detach(), torch.zeros_like(gradient)) is None
    assert is_cross_entropy(outputs.detach(), torch.full_like(gradient, torch.inf)) is None


def test_a_loss_that_becomes_another_one_is_not_known(store: timstore.Store) -> None:
    calls = []

    def loss(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return F.cross_entropy(out, wanted) if len(calls) < 6 else out.square().mean()

    train(store, classifier(), samples=[3], loss=loss)
    assert kept(store).loss is None


def test_a_model_that_returns_its_loss_alone_says_so(store: timstore.Store) -> None:
    class Losing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, CLASSES)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.inner(x), y)

    model, (x, y) = Losing(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with store.record(model, optimizer, samples=[3]):
        model(x[:9], y=y[:9], sample_ids=range(9)).backward()
        optimizer.step()
    assert samples(kept(store)) == set(range(9)) - {3}
    assert "returns no outputs" in str(kept(store).reason)
    batches, _ = store.probe() or ([], "")
    assert {name: len(value) for name, value in batches[0].items()} == {"x": 8, "y": 8}


# --- kept for good -----------------------------------------------------------------------------------------


def test_a_run_that_goes_on_keeps_what_one_without_a_break_keeps(tmp_path: Path, few: int) -> None:
    found = []
    for parts in ([range(3)], [range(1), range(1, 3)]):
        model = classifier()
        with timstore.open(tmp_path / f"s{len(found)}") as store:
            for epochs in parts:
                train(store, model, samples=[3, 5], epochs=epochs)
            found.append([(row.sample, row.epoch, row.step, row.content_hash) for row in kept(store).rows])
            objects = store.snapshot().view.objects_of(kept_rows.KIND)
            assert len(objects) == 1  # nothing is written twice
            assert store.verify().findings == ()
    assert found[0] == found[1]


def test_a_recorder_that_is_entered_again_goes_on_with_its_rows(store: timstore.Store, few: int) -> None:
    model, (x, y) = classifier(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = store.record(model, optimizer, samples=[3])
    for rows in torch.arange(SAMPLES).split(20):
        with recorder:
            F.cross_entropy(model(x[rows], sample_ids=rows), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    others = [one for one in range(SAMPLES) if one != 3]
    assert samples(kept(store)) == set(sorted(others, key=lambda one: places_of([one])[0])[:few])


def test_rows_outlive_a_kill_after_a_checkpoint(tmp_path: Path) -> None:
    script = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]!r}
import torch, timstore
import torch.nn.functional as F
from test_reservoir import classifier, data
model, (x, y) = classifier(), data()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
with timstore.open({str(tmp_path / "s")!r}) as store, store.record(model, optimizer, samples=[3]) as recorder:
    for step in range(6):
        rows = torch.arange(step * 10, step * 10 + 10)
        F.cross_entropy(model(x[rows], sample_ids=rows), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            recorder.save_point()
            torch.save(model.state_dict(), {str(tmp_path / "model.pt")!r})
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 9
    model = classifier()
    model.load_state_dict(torch.load(tmp_path / "model.pt"))
    with timstore.open(tmp_path / "s") as store:
        assert samples(kept(store)) == set(range(40)) - {3}
        report = store.rollback(model, [3], dry_run=True)
        assert report.probe is not None and report.probe.kept == 39


def test_rows_stay_when_an_error_ends_the_block_and_commits_are_folded(store: timstore.Store) -> None:
    left = iter(range(5))

    def loss(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        next(left)
        return F.cross_entropy(out, wanted)

    with pytest.raises(StopIteration):
        train(store, classifier(), samples=[3], loss=loss)
    before = samples(kept(store))
    assert len(before) >= 25
    store.compact()
    assert samples(kept(store)) == before
    assert store.verify().findings == ()


# --- asked in batches ----------------------------------------------------------------------------------------


def test_texts_are_asked_together_as_they_are_asked_alone() -> None:
    from coverage_cases import llama

    torch.manual_seed(0)
    model = llama(attention_dropout=0.0)
    rows = []
    for sample, length in enumerate((4, 9, 6, 6, 3)):
        tokens = np.random.default_rng(sample).integers(2, 60, (1, 9))
        mask = (np.arange(9) < length).astype(np.int64)[None]
        by_row = {"input_ids": tokens, "attention_mask": mask, "labels": np.where(mask == 1, tokens, -100)}
        rows.append(KeptRow(sample, 0, 0, None, 3, by_row, {"use_cache": False}))
    found = KeptRows.read([rows_table(rows, "cross_entropy", None)], None)
    batches = found.batches()
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4), (3, 9)]
    together = torch.cat([one.outputs for one in Probe(model, batches).answers(tensors_of(model))])
    alone = [{name: torch.from_numpy(value) for name, value in row.by_row.items()} for row in rows]
    apart = torch.cat([one.outputs for one in Probe(model, alone).answers(tensors_of(model))])
    assert len(together) == sum((4, 9, 6, 6, 3)) - 5
    torch.testing.assert_close(together.double().sum(0), apart.double().sum(0), rtol=1e-5, atol=1e-5)


def test_what_all_rows_of_a_batch_share_stays_as_long_as_they_are() -> None:
    numbers = np.arange(6)[None]
    rows = [
        KeptRow(sample, 0, 0, None, 4, {"input_ids": numbers, "attention_mask": mask}, {"position_ids": shared})
        for sample, (mask, shared) in enumerate(
            [(numbers < 4, numbers), (numbers < 6, numbers), (numbers < 3, numbers + 1)]
        )
    ]
    batches = KeptRows.read([rows_table(rows, "cross_entropy", None)], None).batches()
    assert [(batch["input_ids"].shape, batch["position_ids"][0, 0]) for batch in batches] == [((2, 6), 0), ((1, 6), 1)]


def test_rows_that_are_none_are_found(store: timstore.Store) -> None:
    model = classifier()
    train(store, model, samples=[3])
    written = rows_table(kept(store).rows, "cross_entropy", None)
    column = written.column_names.index("layout")
    torn = written.set_column(column, "layout", [['[{"name": "x", "shared": false, "dtype": "<f4"}]'] * len(written)])
    store.keep_rows(torn)
    store.commit()
    assert [(found.kind, "kept is none" in found.message) for found in store.verify().findings] == [("malformed", True)]
    with pytest.raises(timstore.CorruptionError, match="kept is none"):
        store.rollback(model, [3], dry_run=True)
    assert store.rollback(model, [3], probe=[data()[0][10:20]], dry_run=True).probe is not None
