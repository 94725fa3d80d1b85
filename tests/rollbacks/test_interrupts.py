"""Signals, errors and a full disk while something is changed: it is the old one or the new one, and that is said."""

import copy
import errno
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import saved_models
import torch
from networks import network
from torch import nn

import timstore
from timstore.database.store import Store
from timstore.format.local_files import LocalObjects
from timstore.format.log import LogWriter
from timstore.interrupts import Held
from timstore.model.fingerprints import digests
from timstore.rollbacks import vectors
from timstore.rollbacks.streaming_sum import MemoryShares
from timstore.rollbacks.targets import InModule

pytestmark = pytest.mark.filterwarnings("ignore:first order only:timstore.TimstoreWarning")

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


class Terminated(BaseException):
    """What a program's own handler of SIGTERM raises."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As in a program that handles both signals; they are the same ones afterwards."""

    def terminate(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    now = signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGINT, before[1])
    assert now == (terminate, signal.default_int_handler)


def spread() -> nn.Module:
    """A model with a weight that is not contiguous, and all of it in half precision."""
    model = network()
    with torch.no_grad():
        model[0].weight = nn.Parameter(model[0].weight.t().contiguous().t())
    return model.to(torch.bfloat16)


MAKERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum": (network, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), {}),
    "Adam, replayed": (
        network,
        lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
        {"optimizer_history": "gradients"},
    ),
    "Adam": (network, lambda parameters: torch.optim.Adam(parameters, lr=0.01), {}),
    "half": (spread, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), {}),
}


def trained(store: Store, kind: str = "momentum") -> tuple[nn.Module, torch.optim.Optimizer]:
    make, steps, options = MAKERS[kind]
    model = make()
    optimizer = steps(model.parameters())
    draw = torch.Generator().manual_seed(1)
    with store.record(model, optimizer, **options):
        for ids in ([1, 2], [3, 4], [1, 4]):
            data = torch.randn(2, 4, generator=draw).to(next(model.parameters()).dtype)
            model(data, sample_ids=ids).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    """Return the bits of the parameters and of the optimizer's state."""
    states = [one for state in optimizer.state.values() for _, one in sorted(state.items())]
    return [
        one.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for one in [*model.parameters(), *states]
    ]


def expected(store: Store, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> list[bytes]:
    """Return what the rollback of sample 1 makes of both, undisturbed."""
    store.commit()
    twin, steps = copy.deepcopy((model, optimizer))
    with timstore.open(saved_models.copied(path)) as other:
        other.rollback(twin, [1], optimizer=steps)
    return held(twin, steps)


@contextmanager
def at_write(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Do something in the middle of the write to one tensor; yields how many were written to."""
    plain, count, lock = InModule.write, [0], threading.Lock()

    def write(self: InModule, blocks: Iterator[torch.Tensor]) -> None:
        with lock:
            count[0] += 1
            mine = count[0]

        def disturbed() -> Iterator[torch.Tensor]:
            for block in blocks:
                half = len(block) // 2
                yield block[:half]
                if mine == number:
                    act()
                yield block[half:]

        plain(self, disturbed())

    with monkeypatch.context() as patched:
        patched.setattr(InModule, "write", write)
        yield count


@pytest.mark.parametrize(("kind", "number"), [*((one, signal.SIGINT) for one in MAKERS), ("momentum", signal.SIGTERM)])
def test_a_signal_while_parameters_are_written_comes_when_all_of_them_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: signal.Signals
) -> None:
    raised = KeyboardInterrupt if number == signal.SIGINT else Terminated
    with timstore.open(tmp_path / "s") as store:
        model, optimizer = trained(store, kind)
        before, after = digests(model), expected(store, model, optimizer, tmp_path / "s")
        with (
            at_write(monkeypatch, 2, lambda: os.kill(os.getpid(), number)) as written,
            pytest.raises(raised) as told,
        ):
            store.rollback(model, [1], optimizer=optimizer, keep_delta=True)
        assert written[0] >= len(before)
        assert held(model, optimizer) == after
        assert told.value.report.samples == (1,)
        assert "on record" in told.value.__notes__[0]
        rollback_id = told.value.report.rollback_id
        with at_write(monkeypatch, 1, lambda: os.kill(os.getpid(), number)), pytest.raises(raised) as told:
            store.undo(model, rollback_id)
        assert digests(model) == before
        assert told.value.report == rollback_id
        assert "undone" in told.value.__notes__[0]


@pytest.mark.parametrize("kind", MAKERS)
def test_an_error_in_any_write_puts_back_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def fail() -> None:
        raise MemoryError

    with timstore.open(tmp_path / "s") as store:
        model, optimizer = trained(store, kind)
        before, after = held(model, optimizer), expected(store, model, optimizer, tmp_path / "s")
        # The first ones, and the first of the optimizer's: the order is that of their names.
        for number in (1, 4, 7):
            with at_write(monkeypatch, number, fail) as written, pytest.raises(MemoryError):
                store.rollback(model, [1], optimizer=optimizer)
            assert written[0] > number, "the others were written back"
            assert held(model, optimizer) == before
        store.rollback(model, [1], optimizer=optimizer)
        assert held(model, optimizer) == after


def test_a_delta_that_cannot_be_read_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the delta and the old values are in the spill file; the first read fails in the middle of writing."""

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    class Os:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    failing, divide = Os(), MemoryShares.divide
    monkeypatch.setattr(MemoryShares, "divide", lambda *arguments: replace(divide(*arguments), deltas_bytes=64))
    monkeypatch.setattr(vectors, "os", failing)

    def once() -> None:
        failing.preadv = lambda *_: (delattr(failing, "preadv"), broken())  # type: ignore[attr-defined]

    with timstore.open(tmp_path / "s") as store:
        model, optimizer = trained(store)
        before = held(model, optimizer)
        with at_write(monkeypatch, 2, once), pytest.raises(timstore.StorageError, match="cannot be read back"):
            store.rollback(model, [1], optimizer=optimizer)
        assert held(model, optimizer) == before
        with (
            at_write(monkeypatch, 2, lambda: setattr(failing, "preadv", broken)),
            pytest.raises(timstore.StateError, match="load the model again") as raised,
        ):
            store.rollback(model, [1], optimizer=optimizer)
        assert raised.value.kind == "half-changed"


def test_an_interrupt_before_the_change_says_that_nothing_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Store.append_rollback

    def interrupted(self: Store, *arguments: Any) -> None:
        plain(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    with timstore.open(tmp_path / "s") as store:
        model, optimizer = trained(store)
        before, after = held(model, optimizer), expected(store, model, optimizer, tmp_path / "s")
        with monkeypatch.context() as patched:
            patched.setattr(Store, "append_rollback", interrupted)
            with pytest.raises(KeyboardInterrupt) as told:
                store.rollback(model, [1], optimizer=optimizer, keep_delta=True)
        assert held(model, optimizer) == before
        assert told.value.report is None and "before anything was changed" in told.value.__notes__[0]
        # The row names a model that there never was, and is in nobody's way.
        report = store.rollback(model, [1], optimizer=optimizer, keep_delta=True)
        assert held(model, optimizer) == after
        store.undo(model, report.rollback_id)
        assert held(model, optimizer)[: len(list(model.parameters()))] == before[: len(list(model.parameters()))]


def test_a_warning_that_is_an_error_brings_the_report(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model, optimizer = trained(store)
        after = expected(store, model, optimizer, tmp_path / "s")
        with warnings.catch_warnings(), pytest.raises(timstore.TimstoreWarning, match="first order") as raised:
            warnings.simplefilter("error")
            store.rollback(model, [1], optimizer=optimizer)
        assert raised.value.report.records == 2
        assert held(model, optimizer) == after


class FullDisk:
    """The disk of a store, full from one call that changes it on; `at` None counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None) -> None:
        self.calls = 0
        plain = LocalObjects._call

        def call(objects: LocalObjects, function: Any, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if at is not None and self.calls >= at and function not in (os.unlink, os.rmdir):
                raise NO_SPACE
            return plain(objects, function, *arguments, **options)

        monkeypatch.setattr(LocalObjects, "_call", call)


@pytest.mark.filterwarnings("ignore:everything is on disk:timstore.TimstoreWarning")
@pytest.mark.parametrize("what", ["rollback", "undo"])
def test_a_disk_that_is_full_leaves_the_old_model_or_makes_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """By the path of the store: it is closed after the change, and its last record may find no room."""
    with timstore.open(tmp_path / "s", durability="os") as store:
        model, _ = trained(store)
        start = digests(model)
        rollback_id = store.rollback(model, [1], keep_delta=True).rollback_id
        after = digests(model)
        if what == "rollback":
            store.undo(model, rollback_id)

    def change(path: Path) -> None:
        if what == "rollback":
            assert timstore.rollback(model, [1], path, keep_delta=True).rollback_id == rollback_id
        else:
            with timstore.open(path) as store:
                store.undo(model, rollback_id)

    def change_back(path: Path) -> None:
        with timstore.open(path) as store:
            if what == "rollback":
                store.undo(model, rollback_id)
            else:
                store.rollback(model, [1], keep_delta=True)

    old, new = (start, after) if what == "rollback" else (after, start)
    with monkeypatch.context() as patched:
        disk = FullDisk(patched, None)
        change(saved_models.copied(tmp_path / "s", "calm"))
    change_back(tmp_path / "calm-s")
    states = []
    for at in range(disk.calls - 8, disk.calls + 1):
        path = saved_models.copied(tmp_path / "s", str(at))
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, at)
            try:
                change(path)
            except timstore.StorageError:
                states.append("refused")
                assert digests(model) == old
            else:
                states.append("done")
                assert digests(model) == new
        if states[-1] == "refused":
            change(path)
            assert digests(model) == new
        change_back(path)
        assert digests(model) == old
    assert states.count("refused") > 3
    assert states.count("done") > 2, "the record that ends the log comes after the change"


def test_a_log_that_cannot_be_ended_is_a_warning_and_takes_no_report_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise timstore.StorageError("no space left")

    with timstore.open(tmp_path / "s") as store:
        model, _ = trained(store)
        before = digests(model)
    monkeypatch.setattr(LogWriter, "close", full)
    with pytest.warns(timstore.TimstoreWarning, match="everything is on disk, but for .*: no space left"):
        report = timstore.rollback(model, [1], tmp_path / "s", keep_delta=True)
    assert report.records == 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="everything is on disk", category=timstore.TimstoreWarning)
        with pytest.raises(timstore.TimstoreWarning, match="no space left") as raised:
            timstore.rollback(model, [3], tmp_path / "s", keep_delta=True)
        assert raised.value.report.samples == (3,)
        store = timstore.open(tmp_path / "s")
        store.undo(model, raised.value.report.rollback_id)
        store.undo(model, report.rollback_id)
        with pytest.raises(timstore.TimstoreWarning, match="no space left"):
            store.close()
        store.close()
    assert digests(model) == before


@pytest.fixture
def commits(tmp_path: Path) -> Path:
    """A store of five commits."""
    with timstore.open(tmp_path / "s") as store:
        for step in range(5):
            store.append(0, step, step, {"w": torch.ones(3)}, lr=0.5)
            store.commit()
    return tmp_path / "s"


def is_folded(path: Path) -> bool:
    """Check that a store is whole, and return whether it was compacted."""
    assert timstore.verify(path, progress=False).sound
    with timstore.open(path, "r") as store:
        assert len(list(store.read())) == 5
        return store.snapshot().view.compaction is not None


@pytest.mark.parametrize("met", ["full disk", "Ctrl-C"])
def test_a_compact_that_is_cut_off_is_done_or_not_and_says_which(
    commits: Path, monkeypatch: pytest.MonkeyPatch, met: str
) -> None:
    plain, calls, at = LocalObjects._call, 0, -1

    def call(objects: LocalObjects, function: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and met == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        if calls >= at > 0 and met == "full disk" and function is not os.unlink:
            raise NO_SPACE
        return plain(objects, function, *arguments, **options)

    def compacted(path: Path) -> str:
        with timstore.open(path) as store, monkeypatch.context() as patched:
            patched.setattr(LocalObjects, "_call", call)
            try:
                return "done" if store.compact().compaction == 1 else "nothing"
            except timstore.StorageError as error:
                return "unknown" if error.kind == "outcome-unknown" else "not done"
            except KeyboardInterrupt as error:
                return "not done" if error.report is None else "done"  # type: ignore[attr-defined]

    assert compacted(saved_models.copied(commits, "calm")) == "done"
    last, states = calls, []
    # The compaction is made after about half of the calls; deleting is the rest.
    for at in range(last // 3, last + 1, 7):
        calls, path = 0, saved_models.copied(commits, str(at))
        states.append(compacted(path))
        if states[-1] != "unknown":
            assert is_folded(path) == (states[-1] == "done")
        with timstore.open(path) as store:
            store.compact()
        assert is_folded(path)
    assert {"done", "not done"} <= set(states), states


def test_what_a_compact_cannot_delete_is_in_its_report(commits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LocalObjects.delete

    def delete(objects: LocalObjects, path: str) -> None:
        if path.endswith("steps.parquet"):
            raise timstore.StorageError("Input/output error")
        plain(objects, path)

    with timstore.open(commits) as store:
        with monkeypatch.context() as patched:
            patched.setattr(LocalObjects, "delete", delete)
            done = store.compact()
        assert done.compaction == 1 and "Input/output error" in str(done.undeleted)
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(5,)]
        store.append(0, 5, 5, {"w": torch.ones(3)}, lr=0.5)
        store.commit()
        assert store.compact().undeleted is None
    assert not list(timstore.verify(commits, progress=False).findings)


def test_held_signals_run_once_each_in_the_end_even_if_one_raises() -> None:
    ran = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}

    def fail(number: int, _: Any) -> None:
        ran.append(number)
        raise Terminated

    for number in before:
        signal.signal(number, fail)
    try:
        with pytest.raises(Terminated), Held():
            for number in (*before, *before):
                signal.raise_signal(number)
            with Held():
                pass
            assert ran == []
        assert sorted(ran) == sorted(before)
        assert all(signal.getsignal(number) is fail for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_rollback_in_another_thread_is_whole(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model, optimizer = trained(store)
        after = expected(store, model, optimizer, tmp_path / "s")
        thread = threading.Thread(target=store.rollback, args=(model, [1]), kwargs={"optimizer": optimizer})
        thread.start()
        thread.join()
        assert held(model, optimizer) == after
