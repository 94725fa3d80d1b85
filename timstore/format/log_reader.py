"""What a reader sees: attempts and the verified, contiguous commits of every writer."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from timstore.errors import CorruptionError, FormatError, NotFoundError, StorageError, TimstoreWarning
from timstore.format import paths
from timstore.format.compaction import Compaction, CoveredObjects, parse_compaction, read_commits
from timstore.format.local_files import Objects
from timstore.format.log import Attempt, Commit, ObjectInfo, parse_attempt, parse_record
from timstore.format.settings import Settings

# What was listed may be gone when it is read: a newer compaction took its place. Not often while one looks.
_LOOKS = 3

# What may be wrong with one record, while the others can still be read.
Fault: TypeAlias = FormatError | StorageError
Report: TypeAlias = Callable[[Fault], None]


@dataclass(frozen=True, slots=True)
class View:
    """A steady snapshot of a store.

    Attributes:
        commits: of kind commit only. Those of the compaction come first; of a view with the same compaction, those of
            the earlier view, in the same places.
        attempts: number n at position n.
        newest: each writer's newest record, of any kind.
        compaction: the one that counts, None before the first.
        covered: the data objects of the commits that it covers.
    """

    commits: tuple[Commit, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    newest: Mapping[str, Commit] = field(default_factory=dict)
    compaction: Compaction | None = None
    covered: CoveredObjects | None = None

    @property
    def since_compaction(self) -> tuple[Commit, ...]:
        """The commits that no compaction covers."""
        return self.commits[self.compaction.commits :] if self.compaction else self.commits

    def largest_object(self) -> int:
        """Return the size of the largest data object, in bytes."""
        sizes = [info.bytes for commit in self.since_compaction for info in commit.objects]
        return max([self.covered.largest() if self.covered else 0, *sizes])

    def objects_of(self, kind: str) -> list[tuple[ObjectInfo, Commit]]:
        """Return the data objects of that kind and their commits, in the order of the commits."""
        covered = self.covered.holding(kind) if self.covered else []
        numbers = (*covered, *range(len(self.commits) - len(self.since_compaction), len(self.commits)))
        commits = [self.commits[number] for number in numbers]
        return [(info, commit) for commit in commits for info in commit.objects if info.kind == kind]


def refuse(fault: Fault) -> None:
    """Raise a fault; of the end of a log that a power failure took, which readers do without, only warn."""
    if fault.kind != "lost-tail":
        raise fault
    warnings.warn(str(fault), TimstoreWarning, stacklevel=3)


def read_view(objects: Objects, settings: Settings, previous: View | None = None, report: Report = refuse) -> View:
    """Return everything committed so far, every record verified; `previous` itself when nothing is new.

    Writes nothing and waits for nobody. With `previous`, only records that it lacks are read. New commits
    follow the known ones, ordered by (at, writer, seq).

    Args:
        report: takes each fault of the records, by default by raising the first. If it returns, so does this, with
            what the sound records say: the highest compaction that can be read (without its commits, where only their
            row files are damaged), and the records and attempts between and after those that are missing.

    Raises:
        CorruptionError: a record is altered or missing, or says what no writer says.
        FormatError: a newer version is needed.
    """
    for _ in range(_LOOKS):
        faults: list[Fault] = []
        view = _scan(objects, settings, previous or View(), faults.append)
        # A listing is not atomic: it may miss a name and show a later one. Another look settles it.
        if all(fault.kind != "missing" for fault in faults):
            break
    for fault in faults:
        report(fault)
    return view


def _scan(objects: Objects, settings: Settings, previous: View, report: Report) -> View:
    # The log first: what its records name (a later compaction, their attempt) then exists when it is looked for, and a
    # record that is gone is covered by a compaction that is there.
    listing = objects.list(paths.LOG)
    known = _at_compaction(objects, settings, previous, report)
    base = known.compaction.newest if known.compaction else {}
    listed: dict[str, set[int]] = {writer: set() for writer in known.newest}
    for path in listing:
        name = paths.parse_record_path(path)
        if name is not None:
            listed.setdefault(name[0], set()).add(name[1])
    newest = dict(known.newest)
    fresh: list[Commit] = []
    for writer, seqs in sorted(listed.items()):
        first = base[writer].seq + 1 if writer in base else 0
        present = sorted(seq for seq in seqs if seq >= first)
        for record in _new_records(objects, settings, writer, present, newest.get(writer), first, report):
            newest[writer] = record
            if record.kind == "commit":
                fresh.append(record)
    for writer, record in previous.newest.items():
        if writer not in newest or newest[writer].seq < record.seq:
            report(_missing(paths.record_path(writer, record.seq), "it was seen"))
    attempts = _attempts(objects, known.attempts, (*newest.values(), *fresh), report)
    if known is previous and newest == previous.newest and attempts == previous.attempts:
        return previous
    fresh.sort(key=lambda commit: (commit.at, commit.writer, commit.seq))
    return View(known.commits + tuple(fresh), attempts, newest, known.compaction, known.covered)


def _at_compaction(objects: Objects, settings: Settings, previous: View, report: Report) -> View:
    """Return what is known without the log: `previous`, or what a newer compaction covers."""
    numbers: set[int] = set()
    for path in objects.list(paths.COMPACTIONS):
        number = paths.parse_compaction_path(path)
        if number is not None:
            numbers.add(number)
            continue
        report(
            FormatError(f"a newer timstore maintained this store ({path}). Install a newer one to read it", path=path)
        )
    seen = previous.compaction.number if previous.compaction else 0
    if max(numbers, default=0) < seen:
        report(_missing(paths.compaction_path(seen), "it was seen"))
    for number in sorted((number for number in numbers if number > seen), reverse=True):
        path = paths.compaction_path(number)
        try:
            compaction = parse_compaction(_read(objects, path), path, settings)
        except (FormatError, StorageError) as fault:
            report(fault)
            continue
        try:
            commits, covered = read_commits(objects, compaction)
        except (FormatError, StorageError) as fault:
            report(fault)
            commits, covered = (), None
        return View(commits, previous.attempts, dict(compaction.newest), compaction, covered)
    return previous


def _new_records(
    objects: Objects,
    settings: Settings,
    writer: str,
    present: list[int],
    known: Commit | None,
    first: int,
    report: Report,
) -> Iterator[Commit]:
    """Yield a writer's sound records after the known one.

    Args:
        present: numbers of the records that are there, in order.
        first: the number of the first record that has to be there.
    """
    after, expected, chained = known.seq + 1 if known else 0, first, True
    for seq in present:
        if seq > expected:
            report(_gap(writer, expected, seq - 1))
            chained = False
        expected = seq + 1
        if seq < after:
            continue
        path = paths.record_path(writer, seq)
        try:
            fields, digest = paths.unseal(_read(objects, path), path)
            known = parse_record(fields, digest, path, settings, known, chained=chained)
        except (FormatError, StorageError) as fault:
            lost = fault.kind == "torn" and seq == present[-1] and not settings.durable
            report(_lost_tail(path, fault) if lost else fault)
            chained = False
        else:
            chained = True
            yield known
    if expected < after:
        report(_gap(writer, expected, after - 1))


def _attempts(
    objects: Objects, known: tuple[Attempt, ...], named_by: Iterable[Commit], report: Report
) -> tuple[Attempt, ...]:
    numbers = {paths.parse_attempt_path(path) for path in objects.list(paths.RUNS)} - {None}
    attempts, expected = list(known), 0
    for number in sorted(number for number in numbers if number is not None):
        if number > expected:
            report(_missing(paths.attempt_path(expected), "a later attempt exists"))
        expected = number + 1
        if number >= len(known):
            path = paths.attempt_path(number)
            try:
                attempts.append(parse_attempt(_read(objects, path), path))
            except (FormatError, StorageError) as fault:
                report(fault)
    if expected < len(known):
        report(_missing(paths.attempt_path(expected), "it was seen"))
    missing = {commit.attempt: commit for commit in named_by if commit.attempt >= expected}
    for number, commit in missing.items():
        report(_missing(paths.attempt_path(number), f"{commit} names it"))
    return tuple(attempts)


def _read(objects: Objects, path: str) -> bytes:
    try:
        return objects.read(path, most=paths.RECORD_BYTES)
    except NotFoundError as error:
        raise _missing(path, "it was listed a moment ago") from error


def _missing(path: str, why: str) -> CorruptionError:
    return CorruptionError(f"{path} is missing: {why}. Restore it from a copy", kind="missing", path=path)


def _gap(writer: str, first: int, last: int) -> CorruptionError:
    """Return the fault of records first to last, both included, by the path of the first."""
    path = paths.record_path(writer, first)
    what = f"{path} is missing" if first == last else f"{path} and the {last - first} records after it are missing"
    message = f"{what}: a later record of its writer exists or was seen. Restore what is missing from a copy"
    return CorruptionError(message, kind="missing", path=path, last=last)


def _lost_tail(path: str, torn: Fault) -> CorruptionError:
    return CorruptionError(
        f"{torn}. This store was made with durability='os': the commit is taken as lost in a power failure, "
        "and left out",
        kind="lost-tail",
        path=path,
    )
