"""What a person is told: progress in lines where there is no terminal, logging, and a report of this very rollback."""

import logging
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

import timstore
from timstore import progress
from timstore.legacy import export_trajectories, import_trajectories


def trained(path, optimizer_class=torch.optim.SGD, steps=9, clip=None, **options):
    """Return a store and a model: sample 1 was in every second step of those trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    inputs, labels = torch.randn(12, 4), torch.randint(0, 2, (12,))
    store = timstore.open(path)
    with store.record(model, optimizer, samples=[1], **options) as recorder:
        for step in range(steps):
            ids = torch.tensor([1, 2, 3] if step % 2 == 0 else [4, 5, 6])
            recorder.batch(ids)
            nn.functional.cross_entropy(model(inputs[ids]), labels[ids]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return store, model


PROBE = [torch.randn(6, 4, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("wanted", [None, False])
def test_without_a_terminal_nothing_is_printed_unless_asked_for(tmp_path, capsys, wanted):
    store, model = trained(tmp_path / "run.tim")
    with store:
        store.rollback(model, [1], probe=PROBE, dry_run=True, progress=wanted)
        store.verify(progress=wanted)
        store.compact(progress=wanted)
        export_trajectories(store, tmp_path / "out", progress=wanted)
    import_trajectories(tmp_path / "out", tmp_path / "in.tim", progress=wanted)
    assert capsys.readouterr() == ("", "")


def test_asked_for_it_prints_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    store, model = trained(tmp_path / "run.tim")
    with store:
        store.rollback(model, [1], probe=PROBE, dry_run=True, progress=True)
        said = capsys.readouterr()
        assert said.out == ""
        lines = said.err.splitlines()
        assert re.search(r"^adding gradients: done in [0-9.]+ s$", said.err, re.MULTILINE)
        products = next(line for line in lines if "up to" in line)
        assert re.fullmatch(
            r"curvature: up to \d+ products over one or the other half of the probe's 6 sequences, .*", products
        )
        first = next(number for number, line in enumerate(lines) if "the first product took" in line)
        assert lines.index(products) < first
        assert re.search(r"all of them take about [0-9.]+ (s|min)$", lines[first])
        assert any(re.match(r"curvature: \d+ % in ", line) for line in lines[first:])
        assert "\x1b" not in said.err
        for work, name in (
            (lambda: store.verify(progress=True), "verifying"),
            (lambda: store.compact(progress=True), "folding commits"),
            (lambda: export_trajectories(store, tmp_path / "out", progress=True), "exporting"),
            (lambda: import_trajectories(tmp_path / "out", tmp_path / "in.tim", progress=True), "importing"),
        ):
            work()
            assert f"{name}: done in" in capsys.readouterr().err


def test_lines_are_far_apart(capsys, monkeypatch):
    now = [0.0]
    with progress.shown(True) as told:
        monkeypatch.setattr(told, "get_time", lambda: now[0])
        told._said_at = 0.0
        task = told.add_task("counting", total=100)
        for _ in range(99):
            now[0] += 1.0
            told.advance(task)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 9
    assert said[0].startswith("counting: 10 % in 10 s, about ")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2 s"), (12.4, "12 s"), (90, "2 min"), (960, "16 min"), (3900, "1 h 05 min")]
)
def test_times_are_said_in_words(seconds, text):
    assert progress.span(seconds) == text


def test_what_happens_behind_is_logged(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "timstore")
    store, model = trained(tmp_path / "run.tim")
    with store:
        before = [parameter.clone() for parameter in model.parameters()]
        report = store.rollback(model, [1], probe=PROBE, keep_delta=True)
        store.undo(model, report.rollback_id)
        assert all(map(torch.equal, before, model.parameters()))
        store.begin_attempt(0, 3)
        store.compact()
    timstore.open(tmp_path / "run.tim", "w").close()
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name.startswith("timstore")]
    for level, pattern in (
        ("INFO", "made a store at .*run.tim"),
        ("DEBUG", r"committed 5 records, \d+ bytes"),
        ("DEBUG", "proved at epoch 0, step 0"),
        ("INFO", r"curvature: up to \d+ products"),
        ("INFO", "the first product took"),
        ("INFO", r"1 samples removed, closed form \+ probe"),
        ("INFO", f"rollback {report.rollback_id} was undone"),
        ("INFO", r"attempt 1 begins at \(0, 3\)"),
        ("INFO", r"folded \d+ commits"),
        ("INFO", "removed the store at .*run.tim"),
    ):
        assert any(one == level and re.search(pattern, text) for one, text in said), (pattern, said)


def test_a_commit_that_failed_is_logged(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "timstore")
    with timstore.open(tmp_path / "run.tim") as store:
        store.append(epoch=0, step=0, sample=1, gradients={"w": np.ones((2, 2), np.float32)}, lr=0.1)

        def full(path, data):
            raise timstore.StorageError("no space left")

        with monkeypatch.context() as patch, pytest.raises(timstore.StorageError):
            patch.setattr(store._objects, "put", full)
            store.commit()
    assert "1 records were not committed, and are kept to try again: no space left" in caplog.text


def test_nobody_hears_of_it_who_does_not_listen(tmp_path, capfd):
    trained(tmp_path / "run.tim")[0].close()
    assert capfd.readouterr() == ("", "")
    assert any(isinstance(one, logging.NullHandler) for one in logging.getLogger("timstore").handlers)


@pytest.mark.filterwarnings("ignore:the probe's own loss rose")  # of a run of nine steps
@pytest.mark.parametrize(
    ("optimizer", "options", "method", "said"),
    [
        (torch.optim.SGD, {}, "auto", "taken out of 5 of 9 steps"),
        (torch.optim.AdamW, {}, "auto", "second moment that Adam had at the end"),
        (torch.optim.AdamW, {"optimizer_history": "gradients"}, "auto", "again over 9 steps' recorded gradients"),
    ],
    ids=["closed form", "final moment", "exact replay"],
)
def test_a_report_speaks_of_this_rollback(tmp_path, optimizer, options, method, said):
    store, model = trained(tmp_path / "run.tim", optimizer, clip=1e-3, **options)
    with store:
        with pytest.warns(timstore.TimstoreWarning, match="first order only"):
            alone = store.rollback(model, [1], method=method, probe=False, dry_run=True)
        probed = store.rollback(model, [1], method=method, probe=PROBE, dry_run=True)
    for report in (alone, probed):
        assert said in report.approximates
        assert "5 of" in report.approximates
        assert "bench" not in str(report) and "digits" not in str(report)
    assert "stay as they were recorded" in alone.approximates
    assert "the probe's 6 sequences" in probed.approximates
    if not options:
        assert "kept in 5 of the 5 steps that held a removed sample" in str(alone)


def test_bars_are_drawn_on_a_terminal(tmp_path, monkeypatch, capsys):
    store, model = trained(tmp_path / "run.tim")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with store:
        store.rollback(model, [1], probe=PROBE, dry_run=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert "the first product took" in said.err
