"""What a store's records say, as far as they can be read, and what lies in its folder that none of them names."""

import os
import stat
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from timstore.errors import CorruptionError, TimstoreError
from timstore.format import paths
from timstore.format.compaction import Compaction
from timstore.format.local_files import LocalObjects
from timstore.format.log import Commit, misplaced
from timstore.format.log_reader import Fault, View, read_view
from timstore.format.schemas import FOLDED, read_rows
from timstore.format.settings import Settings, read_settings
from timstore.verification.report import DAMAGE, LEFTOVER, Finding

_FOLDERS = {folder.rstrip("/") for folder in (paths.RUNS, paths.LOG, paths.DATA, paths.COMPACTIONS)}
_LINK = "a symbolic link"


class Disk(LocalObjects):
    """A store's folder where any name may lie: nothing is refused, no link is followed, nothing is written.

    Attributes:
        refused: path to reason of every folder that the system did not let be listed.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, durable=False)
        self.refused: dict[str, str] = {}

    def entries(self, folder: str = "") -> list[tuple[str, str]]:
        """Return (path, what it is: `file`, `folder` or other words) of what lies right in a folder, sorted."""
        if folder and self.what_is(folder) != "folder":
            return []
        prefix = f"{folder}/" if folder else ""
        try:
            with os.scandir(self.root / folder) as names:
                paths = sorted(prefix + entry.name for entry in names)
        except FileNotFoundError:  # deleted since it was listed
            return []
        except OSError as error:
            self.refused[folder] = error.strerror or str(error)
            return []
        return [(path, self.what_is(path) or "file") for path in paths]

    def what_is(self, path: str) -> str | None:
        """Return what lies at a path, None for nothing."""
        with suppress(OSError):
            mode = os.lstat(self.root / path).st_mode
            if stat.S_ISREG(mode):
                return "file"
            if stat.S_ISDIR(mode):
                return "folder"
            return _LINK if stat.S_ISLNK(mode) else "neither file nor folder"
        return None

    def below(self, folder: str) -> Iterator[tuple[str, str]]:
        """Yield what lies below a folder, as `entries`; of folders, only those that are named like files."""
        for path, what in self.entries(folder):
            if what == "folder" and not _is_hidden(path) and not path.endswith(".json"):
                yield from self.below(path)
            else:
                yield path, what

    def list(self, prefix: str) -> list[str]:
        """Return the paths of all objects below a folder, and of whatever else lies under such a name."""
        return [path for path, _ in self.below(prefix.rstrip("/")) if not _is_hidden(path)]

    def size_below(self, folder: str) -> tuple[int, int]:
        """Return how many files there are below a folder, and their bytes."""
        sizes = []
        for path, _ in self.below(folder):
            with suppress(OSError):
                sizes.append(os.lstat(self.root / path).st_size)
        return len(sizes), sum(sizes)

    def samples_below(self, folder: str, prefix: str) -> tuple[int, ...]:
        """Return the samples in row files that no record vouches for, in folders whose names begin with a prefix."""
        samples: set[int] = set()
        for above, _ in self.entries(folder):
            for path, what in self.below(above) if _name(above).startswith(prefix) else ():
                if what == "file" and _name(path).startswith("records"):
                    with suppress(TimstoreError):
                        samples.update(
                            read_rows(self.read(path), path, ["sample"], kind="records")["sample"].to_pylist()
                        )
        return tuple(sorted(samples))


def settings_of(disk: Disk) -> tuple[Settings, list[Finding]]:
    """Return a store's settings, and what is wrong with them; what else tells whose the records are stands in then.

    Raises:
        FormatError: the store needs a newer version.
    """
    try:
        return read_settings(disk), []
    except TimstoreError as error:
        finding = Finding.of(error, paths.SETTINGS)
        if finding.kind == "newer":
            raise
    store = ""
    for path in (*disk.list(paths.LOG), *disk.list(paths.COMPACTIONS)):
        with suppress(TimstoreError):
            fields, _ = paths.unseal(disk.read(path, most=paths.RECORD_BYTES), path)
            store = paths.take(fields, "store", str, path)
            break
    return Settings(store, "commit", "exact", 0.0), [finding]


@dataclass(frozen=True, slots=True)
class Log:
    """What the records of a store say.

    Attributes:
        view: what those that can be read say.
        findings: what is wrong with records, attempts and compactions.
        lost: whether a compaction is lost; what it covers cannot be told then.
        broken: by writer, (first, last) numbers of records that are damaged or missing.
    """

    view: View
    findings: tuple[Finding, ...]
    lost: bool
    broken: Mapping[str, Sequence[tuple[int, int]]]

    @property
    def covered(self) -> tuple[Commit, ...]:
        """The commits of the compaction; none if its row files do not tell."""
        compaction = self.view.compaction
        return self.view.commits[: compaction.commits] if compaction and self.view.covered else ()

    @property
    def fresh(self) -> tuple[Commit, ...]:
        """The other commits."""
        return self.view.commits[len(self.covered) :]

    def maybe_covered(self, writer: str, seq: int) -> bool:
        """Say whether a compaction that is lost may cover a record: all up to the first that is still in the log."""
        return self.lost and seq <= min((commit.seq for commit in self.fresh if commit.writer == writer), default=seq)


def read_log(disk: Disk, settings: Settings) -> Log:
    """Return what the records say now."""
    faults: list[Fault] = []
    view = read_view(disk, settings, report=faults.append)
    number = view.compaction.number if view.compaction else 0
    # Records from the first on that are gone are those that a compaction covers, if one is lost.
    leading = [fault for fault in faults if _is_leading(view, fault)]
    lost = any((paths.parse_compaction_path(_path(fault)) or 0) > number for fault in faults)
    if not lost and (vanished := _vanished(disk, view, number, bool(leading))):
        faults.append(vanished)
        lost = True
    if lost:
        faults = [fault for fault in faults if fault not in leading]
    broken: dict[str, list[tuple[int, int]]] = {}
    for fault in faults:
        if record := paths.parse_record_path(_path(fault)):
            broken.setdefault(record[0], []).append((record[1], fault.fields.get("last", record[1])))
    return Log(view, tuple(_told(disk, fault) for fault in faults), lost, broken)


def _is_leading(view: View, fault: Fault) -> bool:
    """Say whether it is that of a missing record which is the first that no compaction covers."""
    record = paths.parse_record_path(_path(fault))
    if fault.kind != "missing" or record is None:
        return False
    newest = view.compaction.newest.get(record[0]) if view.compaction else None
    return record[1] == (newest.seq + 1 if newest else 0)


def _vanished(disk: Disk, view: View, number: int, gaps: bool) -> CorruptionError | None:
    """Return the fault if a compaction is gone without which other things that are gone cannot be explained.

    Args:
        gaps: whether records at the beginning of a log are missing.
    """
    written = max((paths.parse_fold_prefix(path) or 0 for path, _ in disk.entries(paths.DATA.rstrip("/"))), default=0)
    if written <= number:
        return None
    first: dict[str, Commit] = {}
    for commit in view.commits:
        first.setdefault(commit.writer, commit)
    if not gaps and not any(_lacks_rows(disk, commit) for commit in first.values()):
        return None
    path = paths.compaction_path(written)
    message = f"{path} is missing: its row files are there, and what it covers is gone. Restore it from a copy"
    return CorruptionError(message, kind="missing", path=path)


def _lacks_rows(disk: Disk, commit: Commit) -> bool:
    """Say whether all row files of a commit are gone."""
    rows = [info.path for info in commit.objects if info.kind in FOLDED]
    return bool(rows) and all(disk.what_is(path) is None for path in rows)


def _told(disk: Disk, fault: Fault) -> Finding:
    """Return the finding, with the samples in the data of a record or compaction that cannot be read."""
    path = _path(fault)
    record, compaction = paths.parse_record_path(path), paths.parse_compaction_path(path)
    samples: tuple[int, ...] = ()
    if record is not None and fault.fields.get("last", record[1]) == record[1]:
        samples = disk.samples_below(f"{paths.DATA}{record[0]}", f"{record[1]:012d}-")
    elif compaction is not None:
        samples = disk.samples_below(paths.DATA.rstrip("/"), f"m-{compaction:012d}-")
    return Finding.of(fault, path, severity=LEFTOVER if fault.kind == "lost-tail" else DAMAGE, samples=samples)


def data_folders(disk: Disk) -> list[tuple[str, str]]:
    """Return what lies in `data/` and in the writers' folders there, as `Disk.entries`."""
    folders: list[tuple[str, str]] = []
    for path, what in disk.entries(paths.DATA.rstrip("/")):
        is_writer = what == "folder" and paths.parse_data_path(f"{path}/{0:012d}-{0:08x}/any.parquet") is not None
        folders += disk.entries(path) if is_writer else [(path, what)]
    return folders


def leftovers(disk: Disk, log: Log, folders: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Yield a finding for everything that no record names, and for what is wrong with what readers do not need.

    Args:
        folders: as `data_folders` returned them before the records of `log` were read, so that a commit that was
            made in between does not look like a leftover.
    """
    for path, what in disk.entries():
        if path in _FOLDERS and what != "folder":
            yield Finding("not-a-file", path, f"it is {what}, not a folder: readers follow none")
        elif path not in _FOLDERS and path != paths.SETTINGS:
            kind = "temporary" if _is_hidden(path) else "unexpected"
            yield Finding(kind, path, "it is none of a store's files", LEFTOVER)
    yield from _records(disk, log)
    yield from _covered_records(disk, log)
    named = {_folder(commit.objects[0].path): commit for commit in log.view.commits if len(commit.objects)}
    compaction = log.view.compaction
    row_files = {info.path for info in compaction.files} if compaction else set()
    folds = {_folder(path) for path in row_files}
    for path, what in folders:
        if what == "folder" and path in named:
            objects = {info.path for info in named[path].objects}
            yield from _beside(disk, path, objects, f"{named[path]} does not name it", named[path])
        elif what == "folder" and path in folds:
            yield from _beside(disk, path, row_files, f"{compaction} does not name it")
        else:
            yield from _unnamed(disk, log, path, what)


def _records(disk: Disk, log: Log) -> Iterator[Finding]:
    """Yield what lies in the log, under `runs/` and under `ckpt/` and is not read."""
    compaction = log.view.compaction
    for folder in (paths.LOG, paths.RUNS, paths.COMPACTIONS):
        for path, what in disk.below(folder.rstrip("/")):
            superseded = compaction is not None and _is_superseded(compaction, path)
            named = paths.parse_record_path(path) is not None or paths.parse_attempt_path(path) is not None
            if _is_hidden(path):
                yield Finding("temporary", path, "readers ignore it", LEFTOVER)
            elif (named or folder == paths.COMPACTIONS) and not superseded:
                continue  # readers read it, or refuse the store for it, and that was told
            elif what == _LINK:
                yield Finding("not-a-file", path, "it is a symbolic link: readers follow none")
            elif superseded:
                message = f"{compaction} took its place; the next compaction deletes it"
                yield Finding("superseded", path, message, LEFTOVER, *(paths.parse_record_path(path) or ()))
            else:
                yield Finding("unexpected", path, "readers ignore it", LEFTOVER)


def _is_superseded(compaction: Compaction, path: str) -> bool:
    """Say whether a compaction deletes a record or compaction; the newest record of each writer stays."""
    record, number = paths.parse_record_path(path), paths.parse_compaction_path(path)
    if record is not None:
        return compaction.covers(*record) and record[1] != compaction.newest[record[0]].seq
    return number is not None and number < compaction.number


def _covered_records(disk: Disk, log: Log) -> Iterator[Finding]:
    """Yield what is wrong with the newest records that a compaction covers: they are kept, and not needed to read."""
    newest = log.view.compaction.newest if log.view.compaction else {}
    for writer, commit in newest.items():
        path = paths.record_path(writer, commit.seq)
        try:
            if paths.unseal(disk.read(path, most=paths.RECORD_BYTES), path)[1] != commit.digest:
                raise misplaced(path, "another record than the one that the compaction covers")
        except TimstoreError as error:
            # A link or the like is refused by every listing, wherever it lies.
            finding = Finding.of(error, path, writer=writer, seq=commit.seq)
            severity = DAMAGE if finding.kind == "not-a-file" else LEFTOVER
            message = f"{finding.message}. A compaction covers it: readers do not need it"
            yield replace(finding, message=message, severity=severity)


def _beside(
    disk: Disk, folder: str, named: Container[str], message: str, commit: Commit | None = None
) -> Iterator[Finding]:
    """Yield what lies in a folder of row files and arrays and is not named: no reader looks at it."""
    where = (commit.writer, commit.seq, commit.steps) if commit else (None, None, None)
    for path, what in disk.below(folder):
        if path not in named:
            kind = "temporary" if _is_hidden(path) else "unreferenced" if what == "file" else "not-a-file"
            yield Finding(kind, path, message, LEFTOVER, *where)


def _unnamed(disk: Disk, log: Log, path: str, what: str) -> Iterator[Finding]:
    """Yield the finding of what lies among the folders of commits and compactions, and is none that is named."""
    fold, commit = paths.parse_fold_prefix(path), paths.parse_data_path(f"{path}/any.parquet")
    if _is_hidden(path):
        yield Finding("temporary", path, "readers ignore it", LEFTOVER)
    elif what not in ("file", "folder"):
        # In the place of a commit's folder it is damage, and found with the commit's objects.
        yield Finding("not-a-file", path, f"it is {what}; no record names it", LEFTOVER)
    elif fold is not None:
        yield from _fold(disk, log, path, fold)
    elif commit is not None:
        yield from _uncommitted(disk, log, path, commit[0], commit[1])
    else:
        yield Finding("unexpected", path, "it is no folder of a commit or a compaction", LEFTOVER)


def _fold(disk: Disk, log: Log, path: str, number: int) -> Iterator[Finding]:
    files, size = disk.size_below(path)
    if not files or log.lost:  # may be what the lost compaction named, which is a finding
        return
    what = f"{files} row files, {size:,} bytes, "
    if number > (log.view.compaction.number if log.view.compaction else 0):
        yield Finding("unreferenced", path, what + "of a compaction on its way or given up", LEFTOVER)
    else:
        yield Finding("superseded", path, what + "that no compaction names; the next compaction deletes it", LEFTOVER)


def _uncommitted(disk: Disk, log: Log, path: str, writer: str, seq: int) -> Iterator[Finding]:
    files, size = disk.size_below(path)
    compaction = log.view.compaction
    # Of a commit that a compaction covers, perhaps, whose own damage is a finding.
    unknown = log.view.covered is None and compaction is not None and compaction.covers(writer, seq)
    if not files or unknown or log.maybe_covered(writer, seq):
        return
    why = "no record names it (yet): of a commit on its way, or of one that was given up"
    if any(first <= seq <= last for first, last in log.broken.get(writer, ())):
        why = f"perhaps what the damaged record {paths.record_path(writer, seq)} names: keep it"
    yield Finding("unreferenced", path, f"{files} files, {size:,} bytes: {why}", LEFTOVER, writer, seq)


def _path(fault: Fault) -> str:
    return str(fault.fields.get("path", ""))


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _folder(path: str) -> str:
    """Return the folder of a commit or compaction that an object lies in."""
    parts = path.split("/")
    return "/".join(parts[: 2 if paths.parse_folded_path(path) is not None else 3])


def _is_hidden(path: str) -> bool:
    """Say whether it is a file in the making, or what is left of one: readers ignore such names."""
    return _name(path).startswith(".")
