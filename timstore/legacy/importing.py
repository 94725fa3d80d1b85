"""The older layout into a store: gradients by sample, step by step."""

import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.linalg import norm

from timstore.database.snapshot import StoredRecord
from timstore.database.store import Store
from timstore.errors import FormatError, InvalidInputError, StorageError, TimstoreWarning
from timstore.format.local_files import folder_held
from timstore.format.paths import SETTINGS
from timstore.legacy.json_files import read_json
from timstore.legacy.layout import FORMATS, MARKER, Entry, Trajectories, find, finite, gradients, sample_of
from timstore.legacy.pickle_files import read_pickle
from timstore.legacy.staging import place_of, staged
from timstore.os_errors import reporting, user_path
from timstore.progress import shown
from timstore.records import StepGroup

# What becomes of a new store's folder until all of it is there.
STAGED = "importing"
# Long before the writer would by itself: it holds half a gigabyte then.
_COMMIT_BYTES = 32 * 1024 * 1024
_READ_BYTES = 1024 * 1024
# Steps that are not known, among those that are: beyond any that a run takes.
_BEYOND = 1 << 40


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import found; prints well.

    Attributes:
        epochs, samples, records, gradients: in the files.
        known: gradients that an interrupted import had brought already.
        duplicate_keys: sample keys that came again within one epoch's file. Each is a sign that the program that wrote
            it lost what the sample had before: what the file still holds was merged.
        unknown_steps: records without a step, numbered in the order of their file.
        not_finite: gradients that hold NaN or Inf.
        text_ids: samples named by text; `samples.name` says which.
    """

    epochs: int = 0
    samples: int = 0
    records: int = 0
    gradients: int = 0
    known: int = 0
    duplicate_keys: int = 0
    unknown_steps: int = 0
    not_finite: int = 0
    text_ids: int = 0

    def __str__(self) -> str:
        lines = [f"{self.gradients:,} gradients of {self.samples:,} samples in {self.epochs} epochs"]
        notes = {
            "of them were there already": self.known,
            "sample keys came twice, and were merged: the program that wrote them lost what came before": (
                self.duplicate_keys
            ),
            "records have no step: numbered in the order of their file": self.unknown_steps,
            "gradients hold NaN or Inf": self.not_finite,
            "samples are named by text: see samples.name": self.text_ids,
        }
        return "\n".join([*lines, *(f"{count:,} {what}" for what, count in notes.items() if count)])


def import_trajectories(
    directory: str | os.PathLike[str],
    store: Store | str | os.PathLike[str],
    *,
    format: str = "auto",
    lr: float | None = None,
    scale: float | None = None,
    allow_pickle: bool = False,
    progress: bool | None = None,
    dry_run: bool = False,
) -> Imported:
    """Bring a directory of the older layout (`global_info.json`, `epoch_N.json` or `.pkl`) into a store.

    A store that is new is there when all of it is; in one that has records, the files are read twice, first to see
    that they are sound. An import that was cut off goes on when it is called again.

    Memory: of one gradient, and 32 MB; of a pickle, the whole file.

    Args:
        store: one that is open, or a path.
        format: `json`, `pickle`, or `auto` for whatever is there.
        lr: learning rate, where `global_info.json` names none.
        scale: what the gradients are multiplied by, to be a sample's summand of the gradient that the optimizer
            consumed, such as 1 / batch; `scale` of `global_info.json`, or 1, when None.
        allow_pickle: read `.pkl`, by an unpickler that knows plain data, arrays and tensors and runs nothing.
        progress: True for bars, or lines where there is no terminal; by default bars on a terminal.
        dry_run: read and check everything, and write nothing.

    Raises:
        NotFoundError: no such directory, or no epoch in it.
        InvalidInputError: no learning rate, two files for one epoch, another shape than before; pickle not allowed;
            the store holds these epochs from elsewhere.
        FormatError: a file that is broken off or not of the layout; the store is as it was.
        StorageError: a file cannot be read, or the store not be written.
    """
    trajectories = find(user_path(directory), format)
    if not allow_pickle and any(path.suffix in FORMATS["pickle"] for path in trajectories.files.values()):
        raise InvalidInputError(
            f"{directory} holds pickles: pass allow_pickle=True to read them by an unpickler that runs nothing",
            kind="pickle",
        )
    if lr is not None or (trajectories.rate is None and not trajectories.rates):
        trajectories = replace(trajectories, rate=_given_rate(lr, directory), rates={})
    scale = _given_scale(scale if scale is not None else trajectories.scale)
    sizes = sum(path.stat().st_size for path in trajectories.files.values())
    other_epoch = partial(_other_epoch, trajectories=trajectories, scale=scale)
    with ExitStack() as stack:
        target, is_new = stack.enter_context(_target(store, dry_run, other_epoch))
        if (other := other_epoch(target)) is not None:
            raise InvalidInputError(
                f"{target.path} holds records of epoch {other} that are not of {trajectories.files[other]}, or came "
                "with another lr or scale: import into another store",
                kind="other-records",
            )
        passes = [False] if dry_run else [True] if is_new else [False, True]
        bars = stack.enter_context(shown(progress, "bytes"))
        task = bars.add_task("importing", total=sizes * len(passes))
        for writes in passes:
            report = _Import(trajectories, target, scale, writes).run(lambda count: bars.advance(task, count))
    if report.not_finite:
        warnings.warn(
            f"{report.not_finite} gradients hold NaN or Inf: a rollback of their samples is refused",
            TimstoreWarning,
            stacklevel=2,
        )
    return report


@contextmanager
def _target(
    store: Store | str | os.PathLike[str], dry_run: bool, other_epoch: Callable[[Store], int | None]
) -> Iterator[tuple[Store, bool]]:
    """Yield the store to write into, and whether it is new: another one has to be kept from what is half an import.

    No other import writes into it meanwhile. What an interruption left of a new one is gone on with, if it is of the
    same import.
    """
    path = store.path if isinstance(store, Store) else place_of(store)
    with reporting("read", path):
        is_there = path.exists() and any(path.iterdir())
    with ExitStack() as stack:
        if isinstance(store, Store) or is_there:
            stack.enter_context(folder_held(path, f"another process is importing into {path}"))
        if isinstance(store, Store):
            if store.mode != "r":
                store.commit()
            yield store, False
        elif is_there:
            yield stack.enter_context(Store(path, "r" if dry_run else "a")), False
        elif dry_run:
            yield stack.enter_context(Store(stack.enter_context(tempfile.TemporaryDirectory()))), True
        else:
            half = stack.enter_context(staged(path, STAGED, lambda folder: _goes_on(folder, other_epoch)))
            yield stack.enter_context(Store(half)), True


def _goes_on(half: Path, other_epoch: Callable[[Store], int | None]) -> bool:
    """Say whether a folder is a store that holds a part of the same import, and nothing else."""
    if not (half / SETTINGS).is_file():
        return False
    try:
        with Store(half, "r") as opened:
            return other_epoch(opened) is None
    except (FormatError, StorageError):
        return False


class _Steps:
    """Which step each gradient of an epoch's file belongs to: the one marked beside it, or the next free number.

    Without a marker, a sample's gradients are one visit, whose number is its place in the file; a parameter that comes
    again is of the next visit.

    Attributes:
        unknown: visits without a step.
    """

    def __init__(self, first: int) -> None:
        self.unknown = 0
        self._first = first
        self._marked: set[tuple[int, int, str]] = set()
        self._visits: dict[int, list[int]] = {}
        self._unmarked: Counter[tuple[int, str]] = Counter()

    @property
    def records(self) -> int:
        return len({(step, sample) for step, sample, _ in self._marked}) + self.unknown

    def of(self, sample: int, parameter: str, marked: int | None) -> int:
        """Return the step of a sample's gradient."""
        if marked is not None and (marked, sample, parameter) not in self._marked:
            self._marked.add((marked, sample, parameter))
            return marked
        visits, place = self._visits.setdefault(sample, []), self._unmarked[sample, parameter]
        self._unmarked[sample, parameter] += 1
        if place == len(visits):
            visits.append(self._first + self.unknown)
            self.unknown += 1
        return visits[place]


@dataclass(slots=True)
class _Import:
    """One directory on its way into one store.

    Attributes:
        writes: whether it goes there; without, everything is read and checked, so that what is wrong shows before
            anything is half written.
        counts: of `Imported`.
    """

    trajectories: Trajectories
    store: Store
    scale: float
    writes: bool
    counts: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    samples: dict[int, str | None] = field(default_factory=dict)
    uncommitted_bytes: int = 0
    latest: StoredRecord | None = None

    def run(self, advance: Callable[[int], None]) -> Imported:
        """Write what is not there yet."""
        self.shapes = {name: parameter.shape for name, parameter in self.store.snapshot().parameters().items()}
        for epoch, path in self.trajectories.files.items():
            self._epoch(epoch, path, _samples(path, advance))
        names = [{"sample": sample, "name": name} for sample, name in self.samples.items() if name is not None]
        if self.writes:
            if names:
                self.store.samples.update(names)
            self.store.commit()
        self.counts.update(epochs=len(self.trajectories.files), samples=len(self.samples), text_ids=len(names))
        return Imported(**self.counts)

    def _epoch(self, epoch: int, path: Path, samples: Iterable[tuple[int | str, list[tuple[str, Entry]]]]) -> None:
        query = "SELECT step, sample, parameter FROM gradients WHERE epoch = ?"
        stored = set(self.store.sql(query, [epoch]).fetchall())
        marks = _marks(path, self.trajectories.rate, self.scale)
        steps = _Steps(_BEYOND if _may_have_markers(path) else 0)
        begun: set[int] = set()
        met: set[int] = set()
        for key, entries in samples:
            sample, self.samples[sample] = sample_of(key, str(path))
            self.counts["duplicate_keys"] += sample in met
            met.add(sample)
            for parameter, raw, marked in gradients(entries):
                self._check_shape(parameter, raw.shape, f"{path}, sample {key}")
                gradient, step = scaled(raw, self.scale), steps.of(sample, parameter, marked)
                self.counts["gradients"] += 1
                self.counts["not_finite"] += not bool(np.isfinite(gradient).all())
                if (step, sample, parameter) in stored:
                    self._check_same(epoch, step, sample, parameter, gradient, path)
                    self.counts["known"] += 1
                    continue
                if step not in begun:
                    begun.add(step)
                    group = StepGroup(lr=self._rate(epoch, step, path), options=marks[step != marked])
                    if self.writes:
                        self.store.append_step(epoch, step, [group])
                if self.writes:
                    self._append(epoch, step, sample, parameter, gradient, path)
        self.counts.update(records=steps.records, unknown_steps=steps.unknown)

    def _check_shape(self, parameter: str, shape: tuple[int, ...], where: str) -> None:
        if self.shapes.setdefault(parameter, shape) != shape:
            raise InvalidInputError(
                f"{where}: {parameter} has shape {shape}, not {self.shapes[parameter]} as before", parameter=parameter
            )

    def _check_same(self, epoch: int, step: int, sample: int, parameter: str, gradient: np.ndarray, path: Path) -> None:
        """Refuse a gradient that is there with other numbers: the file is another than the one that was imported."""
        record = self.latest
        if record is None or (record.epoch, record.step, record.sample) != (epoch, step, sample):
            where = f"epoch = {epoch} AND step = {step} AND sample = {sample} AND rank = 0"
            self.latest = record = next(self.store.read(where))
        stored, settings = record.dense(parameter), self.store.settings
        if np.array_equal(stored, gradient, equal_nan=True):
            return
        allowed = 0.0 if settings.precision == "exact" else settings.max_rel_error
        if not float(norm(stored - gradient)) <= allowed * float(norm(gradient)):
            raise InvalidInputError(
                f"{self.store.path} holds other numbers for {parameter} of sample {sample}, epoch {epoch}, step {step} "
                f"than {path}: they came from another file of that name; import into another store",
                kind="other-records",
                parameter=parameter,
            )

    def _rate(self, epoch: int, step: int, path: Path) -> float:
        rate = self.trajectories.rate_at(epoch, step)
        if rate is None:
            raise InvalidInputError(
                f"{path}: global_info.json has no learning rate of epoch {epoch}, step {step}: pass lr=",
                kind="no-learning-rate",
            )
        return rate

    def _append(self, epoch: int, step: int, sample: int, parameter: str, gradient: np.ndarray, path: Path) -> None:
        try:
            self.store.append(
                epoch, step, sample, {parameter: gradient}, allow_zero=True, allow_nonfinite=True, copy=False
            )
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}: {error}", kind=error.kind, **error.fields) from None
        self.uncommitted_bytes += gradient.nbytes
        if self.uncommitted_bytes >= _COMMIT_BYTES:
            self.store.commit()
            self.uncommitted_bytes = 0


def _other_epoch(store: Store, trajectories: Trajectories, scale: float) -> int | None:
    """Return the first epoch of which a store has records that are not of this import, None if there is none."""
    for epoch, path in trajectories.files.items():
        marks = _marks(path, trajectories.rate, scale).values()
        rows = store.sql("SELECT DISTINCT options FROM steps WHERE epoch = ?", [epoch]).fetchall()
        recorded = store.sql("SELECT count(*) FROM records WHERE epoch = ?", [epoch]).fetchall()[0][0]
        if any(options not in marks for (options,) in rows) or (recorded and not rows):
            return epoch
    return None


def _marks(path: Path, rate: float | None, scale: float) -> dict[bool, str]:
    """Return what is kept beside the steps of a file, by whether they are unknown: an import that goes on knows it."""
    origin = {"file": path.name, "bytes": path.stat().st_size, "lr": rate, "scale": scale}
    return {
        unknown: json.dumps({"imported": origin, "step": "unknown" if unknown else "recorded"}, sort_keys=True)
        for unknown in (True, False)
    }


def scaled(gradient: np.ndarray, scale: float) -> np.ndarray:
    """Return a gradient times the scale, rounded once, in its own dtype; in float64 where that would lose it."""
    if scale == 1.0:
        return gradient
    product = gradient.astype(np.float64) * scale
    with np.errstate(over="ignore", under="ignore"):
        own = product.astype(gradient.dtype)
    is_lost = (np.isinf(own) & np.isfinite(product)).any() or (product.any() and not own.any())
    return product if is_lost else own


def _samples(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int | str, list[tuple[str, Entry]]]]:
    if path.suffix == ".json":
        yield from read_json(path, advance)
    else:
        yield from read_pickle(path)
        advance(path.stat().st_size)


def _may_have_markers(path: Path) -> bool:
    """Say whether the end of a step marker's name is anywhere in a file, up to where it comes first."""
    marker = MARKER.encode()
    with reporting("read", path), open(path, "rb") as file:
        rest = b""
        while block := file.read(_READ_BYTES):
            if marker in rest + block:
                return True
            rest = block[-len(marker) :]
    return False


def _given_rate(lr: float | None, directory: Any) -> float:
    if lr is None:
        raise InvalidInputError(
            f"{directory}: global_info.json names no learning_rate, and a guess would remove too much or too little: "
            "pass lr=, the rate that the run was trained with",
            kind="no-learning-rate",
        )
    return finite(lr, "lr")


def _given_scale(scale: float | None) -> float:
    checked = 1.0 if scale is None else finite(scale, "scale")
    if checked == 0:
        raise InvalidInputError("scale is a number other than zero")
    return checked
