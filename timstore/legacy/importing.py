"""The older layout into a store: gradients by sample, step by step."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.linalg import norm

from timstore.database.snapshot import StoredRecord
from timstore.database.store import Store
from timstore.errors import FormatError, InvalidInputError, StateError, StorageError, TimstoreWarning
from timstore.format.local_files import folder_held
from timstore.format.paths import SETTINGS
from timstore.legacy.json_files import read_json
from timstore.legacy.layout import FORMATS, Trajectories, find, finite, sample_of
from timstore.legacy.numbering import Numbering, may_have_markers
from timstore.legacy.pickle_files import read_pickled
from timstore.legacy.staging import emptied, place_of, publish, staged
from timstore.legacy.visits import Visit
from timstore.os_errors import reporting, user_path
from timstore.progress import shown
from timstore.records import StepGroup

# What becomes of a new store's folder until all of it is there.
STAGED = "importing"
# Long before the writer would by itself: it holds half a gigabyte then.
_COMMIT_BYTES = 32 * 1024 * 1024


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
    found = find(user_path(directory), format)
    if not allow_pickle and any(path.suffix in FORMATS["pickle"] for path in found.files.values()):
        raise InvalidInputError(
            f"{directory} holds pickles: pass allow_pickle=True to read them by an unpickler that runs nothing",
            kind="pickle",
        )
    if lr is not None or (found.rate is None and not found.rates):
        found = replace(found, rate=_given_rate(lr, directory), rates={})
    scale = _given_scale(scale if scale is not None else found.scale)
    sizes = sum(path.stat().st_size for path in found.files.values())
    with ExitStack() as stack:
        target, is_new = stack.enter_context(_target(store, dry_run, lambda half: _other_epoch(half, found, scale)))
        other = _other_epoch(target, found, scale)
        if other is not None:
            raise InvalidInputError(
                f"{target.path} holds records of epoch {other} that are not of {found.files[other]}, or came with "
                "another lr or scale: import into another store",
                kind="other-records",
            )
        passes = [False] if dry_run else [True] if is_new else [False, True]
        bars = stack.enter_context(shown(progress, "bytes"))
        task = bars.add_task("importing", total=sizes * len(passes))

        def advance(count: int) -> None:
            bars.advance(task, count)

        report = Imported()
        for writes in passes:
            report = _Import(found, target, scale, writes).run(advance)
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

    No other import writes into it meanwhile. A new one is made beside, and moved to its place when it is whole. What an
    interruption left there is gone on with, if it is of the same import.
    """
    if isinstance(store, Store):
        if store.mode != "r":
            store.commit()
        with folder_held(store.path, _importing(store.path)):
            yield store, False
        return
    path = place_of(store)
    with reporting("read", path):
        is_there = path.exists() and any(path.iterdir())
    if is_there:
        with folder_held(path, _importing(path)), Store(path, "r" if dry_run else "a") as opened:
            yield opened, False
        return
    if dry_run:
        with tempfile.TemporaryDirectory() as folder, Store(folder) as empty:
            yield empty, True
        return
    with staged(path, STAGED) as half:
        try:
            if not _goes_on(half, other_epoch):
                emptied(half)
            with Store(half) as opened:
                yield opened, True
            publish(half, path)
        except (StateError, ValueError):
            # Not what an interruption is: the same would come again.
            shutil.rmtree(half, ignore_errors=True)
            raise


def _importing(path: Path) -> str:
    return f"another process is importing into {path}"


def _goes_on(half: Path, other_epoch: Callable[[Store], int | None]) -> bool:
    """Say whether a folder is a store that holds a part of the same import, and nothing else."""
    if not (half / SETTINGS).is_file():
        return False
    try:
        with Store(half, "r") as opened:
            return other_epoch(opened) is None
    except (FormatError, StorageError):
        return False


@dataclass(slots=True)
class _Import:
    """One directory on its way into one store.

    Attributes:
        writes: whether it goes there; without, everything is read and checked, so that what is wrong shows before
            anything is half written.
    """

    found: Trajectories
    store: Store
    scale: float
    writes: bool
    samples: set[int] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)
    waiting: int = 0
    latest: StoredRecord | None = None

    def run(self, advance: Callable[[int], None]) -> Imported:
        """Write what is not there yet."""
        shapes = {name: one.shape for name, one in self.store.snapshot().parameters().items()}
        report = Imported(epochs=len(self.found.files))
        for epoch, path in self.found.files.items():
            report = self._epoch(epoch, path, report, shapes, advance)
        if self.writes:
            if self.names:
                self.store.samples.update([{"sample": one, "name": name} for one, name in self.names.items()])
            self.store.commit()
        return replace(report, samples=len(self.samples), text_ids=len(self.names))

    def _epoch(
        self,
        epoch: int,
        path: Path,
        report: Imported,
        shapes: dict[str, tuple[int, ...]],
        advance: Callable[[int], None],
    ) -> Imported:
        stored = self.store.sql("SELECT step, sample, parameter FROM gradients WHERE epoch = ?", [epoch]).fetchall()
        numbering = Numbering(stored, has_markers=may_have_markers(path))
        marks = _marks(path, self.found.rate, self.scale)
        steps: set[tuple[int, bool]] = set()
        gradients, known, again, not_finite = 0, 0, 0, 0
        for visit in _visits(path, advance):
            sample, name = sample_of(visit.key, str(path))
            if name is not None:
                self.names[sample] = name
            again += numbering.meets(sample)
            self.samples.add(sample)
            for parameter, gradient, step in visit.gradients():
                if shapes.setdefault(parameter, gradient.shape) != gradient.shape:
                    raise InvalidInputError(
                        f"{path}, sample {visit.key}: {parameter} has shape {gradient.shape}, not "
                        f"{shapes[parameter]} as before",
                        parameter=parameter,
                    )
                gradient = scaled(gradient, self.scale)
                place = numbering.place(sample, parameter, step)
                gradients += 1
                not_finite += not bool(np.isfinite(gradient).all())
                if numbering.is_there(place, sample, parameter):
                    self._check_same(epoch, place, sample, parameter, gradient, path)
                    known += 1
                    continue
                if (place, step is None) not in steps:
                    group = StepGroup(lr=self._rate(epoch, place, path), options=marks[step is None])
                    if self.writes:
                        self.store.append_step(epoch, place, [group])
                    steps.add((place, step is None))
                if self.writes:
                    self._append(epoch, place, sample, parameter, gradient, path)
        return replace(
            report,
            records=report.records + numbering.records,
            gradients=report.gradients + gradients,
            known=report.known + known,
            duplicate_keys=report.duplicate_keys + again,
            unknown_steps=report.unknown_steps + numbering.unknown,
            not_finite=report.not_finite + not_finite,
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
        rate = self.found.rate_at(epoch, step)
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
        self.waiting += gradient.nbytes
        if self.waiting >= _COMMIT_BYTES:
            self.store.commit()
            self.waiting = 0


def _other_epoch(store: Store, found: Trajectories, scale: float) -> int | None:
    """Return the first epoch of which a store has records that are not of this import, None if there is none."""
    for epoch, path in found.files.items():
        marks = _marks(path, found.rate, scale).values()
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


def _visits(path: Path, advance: Callable[[int], None]) -> Iterator[Visit]:
    if path.suffix == ".json":
        yield from read_json(path, advance)
    else:
        yield from read_pickled(path)
        advance(path.stat().st_size)


def _given_rate(lr: float | None, directory: Any) -> float:
    if lr is None:
        raise InvalidInputError(
            f"{directory}: global_info.json names no learning_rate, and a guess would remove too much or too little: "
            "pass lr=, the rate that the run was trained with",
            kind="no-learning-rate",
        )
    return finite(lr, "lr")


def _given_scale(scale: float | None) -> float:
    found = 1.0 if scale is None else finite(scale, "scale")
    if found == 0:
        raise InvalidInputError("scale is a number other than zero")
    return found
