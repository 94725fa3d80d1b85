"""Interrupts, kills and a full disk at random moments of what changes a model, a compaction or a store.

    python scripts/stress_interrupts.py --moments 200

Each moment is a process of its own: it does one thing on a fresh copy of a store, and meets SIGINT, SIGTERM or SIGKILL
somewhere in it, or (aimed) just when the first number, file or name has changed; or a disk that is full from one of its
last 40 writes on. Afterwards what was changed has to be wholly the old one or wholly the new one, what was said has to
agree, and the same call has to bring it to the end.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import timstore
from timstore.model.fingerprints import digests

LAYERS, WIDTH, WRITES = 16, 400, 40
SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}
# What asks for space; a rename over a name that is there does not.
TAKES_SPACE = ("write", "pwrite", "fsync", "mkdir", "link")


def new_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def made(folder: Path) -> None:
    """Write a store of several commits, the model's weights in four files beside it, and a rollback to undo."""
    draw, model = np.random.default_rng(0), new_model()
    names = list(dict(model.named_parameters()))
    with timstore.open(folder / "s") as store:
        for step in range(6):
            factors = {
                name: timstore.Factors(*(draw.standard_normal((2, WIDTH), "float32") for _ in range(2)))
                for name in names
            }
            store.append(0, step, step % 3, factors, lr=0.1)
            store.commit()
        store.append_fingerprints(0, 5, digests(model))
        store.commit()
    (folder / "model").mkdir()
    held, index = {name: one.detach() for name, one in model.named_parameters()}, {}
    for number in range(4):
        part = {name: held[name] for name in names[number::4]}
        save_file(part, folder / "model" / f"part-{number}.safetensors")
        index.update(dict.fromkeys(part, f"part-{number}.safetensors"))
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


class Case:
    """One kind of change: how it is made, and which state the changed thing is in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, timstore.open(folder / "s")
        self.prepare()

    def prepare(self) -> None:
        """Bring it to where the change begins."""

    def change(self) -> Any:
        """Make the change."""
        raise NotImplementedError

    def state(self) -> str:
        """Return `old`, `new`, or what else it is."""
        raise NotImplementedError

    def mark(self) -> Any:
        """Return something that changes as soon as anything does."""
        raise NotImplementedError


class Rollback(Case):
    def prepare(self) -> None:
        self.model = new_model()
        self.before = digests(self.model)
        other = new_model()
        with timstore.open(shutil.copytree(self.folder / "s", self.folder / "other")) as store:
            store.rollback(other, [1], probe=False)
        self.after = digests(other)

    def change(self) -> Any:
        return self.store.rollback(self.model, [1], probe=False, keep_delta=True)

    def state(self) -> str:
        now = digests(self.model)
        return "old" if now == self.before else "new" if now == self.after else "BETWEEN"

    def mark(self) -> Any:
        return self.model[0].weight.data[0, 0].item()


class Undo(Rollback):
    def prepare(self) -> None:
        super().prepare()
        self.id = Rollback.change(self).rollback_id
        self.before, self.after = self.after, self.before

    def change(self) -> Any:
        return self.store.undo(self.model, self.id)


class OnDisk(Case):
    def change(self) -> Any:
        return self.store.rollback(self.folder / "model", [1], in_place=True, probe=False)

    def state(self) -> str:
        files = sorted((self.folder / "model").glob("*.safetensors"))
        held = {name: one for file in files for name, one in load_file(file).items()}
        same = {torch.equal(held[name], one) for name, one in new_model().named_parameters()}
        return "old" if same == {True} else "new" if same == {False} else "mixture"

    def mark(self) -> Any:
        return os.stat(self.folder / "model" / "part-0.safetensors").st_ino


class Compact(Case):
    def change(self) -> Any:
        return self.store.compact()

    def state(self) -> str:
        checked = timstore.verify(self.folder / "s", progress=False)
        if not checked.sound:
            return f"DAMAGED {checked}"
        with timstore.open(self.folder / "s", "r") as store:
            rows = store.sql("SELECT count(*) FROM gradients").fetchall()[0][0]
            if rows != 6 * LAYERS:
                return f"LOST {rows}"
            return "new" if store.snapshot().view.compaction else "old"

    def mark(self) -> Any:
        return os.path.isdir(self.folder / "s" / "ckpt")


CASES: dict[str, type[Case]] = {"rollback": Rollback, "undo": Undo, "checkpoint": OnDisk, "compact": Compact}


@contextmanager
def full_disk(at: int | None) -> Iterator[list[int]]:
    """Let everything that takes space fail from the call of this number on; yields how many there were."""
    count, plain = [0], {name: getattr(os, name) for name in TAKES_SPACE}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if at is not None and count[0] >= at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain[name](*args, **kwargs)

        return call

    for name in TAKES_SPACE:
        setattr(os, name, counted(name))
    try:
        yield count
    finally:
        for name in TAKES_SPACE:
            setattr(os, name, plain[name])


def once(case: Case, ready: Callable[[], None], at: int | None = None) -> dict[str, Any]:
    """Make the change, come what may; return what was said, and whether that is true."""
    with full_disk(at) as count:
        began = time.perf_counter()
        try:
            ready()
            case.change()
            said, told = "returned", ["new"]
        except BaseException as error:
            said, told = type(error).__name__, ["new" if is_done(error) else "old"]
            if getattr(error, "kind", None) == "outcome-unknown" and isinstance(case, Compact):
                told = ["old", "new"]
        seconds = time.perf_counter() - began
    state = case.state()
    wrong = state not in told
    if state == "old":
        case.store = timstore.open(case.folder / "s")
        case.change()
        wrong |= case.state() != "new"
    return {"said": said, "told": told, "state": state, "writes": count[0], "wrong": wrong, "seconds": seconds}


def is_done(error: BaseException) -> bool:
    """Return whether an error says that it came after the change."""
    return any("before this was raised" in note for note in getattr(error, "__notes__", ()))


def watch(case: Case, number: int) -> None:
    """Send a signal to this process as soon as something of the case has changed."""
    first, process = case.mark(), os.getpid()

    def look() -> None:
        while case.mark() == first:
            pass
        os.kill(process, number)

    threading.Thread(target=look, daemon=True).start()


def child(kind: str, folder: Path, at: int | None, watched: int | None, tell: int) -> None:
    """Be the process that meets it."""
    sys.setswitchinterval(1e-4)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    write = os.write
    result: dict[str, Any]

    def ready() -> None:
        write(tell, b"ready\n")

    try:
        case = CASES[kind](folder)
        if watched is not None:
            watch(case, watched)
        try:
            result = once(case, ready, at)
        except (KeyboardInterrupt, SystemExit):  # it came before or after the change
            result = {"said": "outside", "state": case.state(), "wrong": False}
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case.store.close()
    except BaseException:
        result = {"said": "failed", "state": "?", "wrong": True, "why": traceback.format_exc()}
    write(tell, json.dumps(result).encode() + b"\n")


def tried(
    kind: str, base: Path, work: Path, number: int | None = None, wait: float | None = None, at: int | None = None
) -> dict[str, Any]:
    """Fork a process that makes a change on a copy, and look at what is there afterwards.

    Args:
        number: the signal that it meets, after `wait` seconds, or when something changed.
        at: the write from which on its disk is full.
    """
    folder = Path(shutil.copytree(base, work / "copy"))
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        os.close(reading)
        warnings.simplefilter("ignore")
        child(kind, folder, at, number if wait is None else None, writing)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        assert lines.readline() == "ready\n" or at is not None
        if number is not None and wait is not None:
            time.sleep(wait)
            os.kill(process, number)
        text = lines.readline()
    os.waitpid(process, 0)
    result = json.loads(text) if text else after_death(kind, folder)
    shutil.rmtree(folder)
    return result


def after_death(kind: str, folder: Path) -> dict[str, Any]:
    """Return what a killed process left, and whether the same call brings it to the end."""
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        warnings.simplefilter("ignore")
        shutil.rmtree(folder / "other", ignore_errors=True)
        try:
            state, again = "moot", True
            if CASES[kind] in (OnDisk, Compact):
                case = CASES[kind](folder)
                state = case.state()
                try:
                    case.change()
                except timstore.StateError as error:
                    again = error.kind == "removed-before" and state == "new"
                again = again and case.state() == "new"
            else:
                case = Rollback(folder)
                case.change()
                again = case.state() == "new"
            case.store.close()
            again = again and timstore.verify(folder / "s", progress=False).sound
            result = {"said": "killed", "state": state, "wrong": not again}
        except BaseException:
            result = {"said": "killed", "state": "?", "wrong": True, "why": traceback.format_exc()}
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        result = json.loads(lines.read())
    os.waitpid(process, 0)
    return dict(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200, help="signals in all")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="timstore-stress-") as top:
        base, work, own = Path(top) / "base", Path(top) / "work", Path(top) / "tmp"
        for folder in (base, work, own):
            folder.mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(own)
        apart(lambda: made(base))
        rows = []
        for kind in CASES:
            calm = [tried(kind, base, work) for _ in range(3)][-1]
            assert not calm["wrong"], calm
            for name, number in SIGNALS.items():
                count = -(-options.moments // (2 * len(CASES) * len(SIGNALS)))
                moments = [
                    tried(kind, base, work, number, draw.uniform(0, 1.05) * calm["seconds"]) for _ in range(count)
                ]
                rows.append(row(kind, name, moments))
                aimed = [tried(kind, base, work, number) for _ in range(count)]
                rows.append(row(kind, f"{name}, aimed", aimed))
            full = [tried(kind, base, work, at=calm["writes"] - back) for back in range(min(WRITES, calm["writes"]))]
            rows.append(row(kind, "disk full", full))
        apart(lambda: timstore.open(base / "s").close())
        left = len(list(own.iterdir()))
    if options.json:
        print(json.dumps({"seed": options.seed, "rows": rows, "left_in_tmpdir": left}))
    else:
        print(f"seed {options.seed}")
        print("| what | met | moments | old | new | mixture, put back | died with it | wrong |")
        print("|---|---|--:|--:|--:|--:|--:|--:|")
        for one in rows:
            print("| " + " | ".join(str(value) for value in one.values()) + " |")
        print(f"{left} entries left in TMPDIR after another process opened a store")
    sys.exit(any(one["wrong"] for one in rows))


def apart(work: Callable[[], None]) -> None:
    """Do something in a process of its own: DuckDB does not survive a fork."""
    if (process := os.fork()) == 0:
        work()
        os._exit(0)
    os.waitpid(process, 0)


def row(kind: str, met: str, moments: list[dict[str, Any]]) -> dict[str, Any]:
    states = Counter(one["state"] for one in moments)
    for one in moments:
        if one["wrong"]:
            print(kind, met, one.get("why", one), file=sys.stderr)
    return {
        "what": kind,
        "met": met,
        "moments": len(moments),
        "old": states["old"],
        "new": states["new"],
        "mixture": states["mixture"],
        "dead": states["moot"],
        "wrong": sum(bool(one["wrong"]) for one in moments),
    }


if __name__ == "__main__":
    main()
