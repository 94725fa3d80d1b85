"""What a reader sees: attempts and the verified, contiguous commits of every writer."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from timstore.errors import CorruptionError, FormatError, NotFoundError, TimstoreWarning
from timstore.format import paths
from timstore.format.compaction import Compaction, CoveredObjects, parse_compaction, read_commits
from timstore.format.local_files import Objects
from timstore.format.log import Attempt, Commit, ObjectInfo, parse_attempt, parse_record
from timstore.format.settings import Settings

# What was listed may be gone when it is read: a newer compaction took its place. Not often while one looks.
_LOOKS = 3


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


def read_view(objects: Objects, settings: Settings, previous: View | None = None) -> View:
    """Return everything committed so far, every record verified; `previous` itself when nothing is new.

    Writes nothing and waits for nobody. With `previous`, only records that it lacks are read. New commits
    follow the known ones, ordered by (at, writer, seq).

    Raises:
        CorruptionError: a record is altered or missing, or says what no writer says.
        FormatError: a newer version is needed.
    """
    for _ in range(_LOOKS - 1):
        try:
            return _scan(objects, settings, previous or View())
        except CorruptionError as error:
            if error.kind != "missing":
                raise
        # A listing is not atomic either: it may miss a name and show a later one. Another look settles it.
    return _scan(objects, settings, previous or View())


def _scan(objects: Objects, settings: Settings, previous: View) -> View:
    # The log first: what its records name (a later compaction, their attempt) then exists when it is looked for, and a
    # record that is gone is covered by a compaction that is there.
    listing = objects.list(paths.LOG)
    known = _at_compaction(objects, settings, previous)
    base = known.compaction.newest if known.compaction else {}
    listed: dict[str, set[int]] = {writer: set() for writer in known.newest}
    for path in listing:
        name = paths.parse_record_path(path)
        if name is not None:
            listed.setdefault(name[0], set()).add(name[1])
    newest = dict(known.newest)
    fresh: list[Commit] = []
    for writer, seqs in sorted(listed.items()):
        covered = base[writer].seq if writer in base else -1
        for record in _new_records(objects, settings, writer, seqs, newest.get(writer), covered):
            newest[writer] = record
            if record.kind == "commit":
                fresh.append(record)
    for writer, record in previous.newest.items():
        if writer not in newest or newest[writer].seq < record.seq:
            raise _missing(paths.record_path(writer, record.seq), "it was seen")
    attempts = _attempts(objects, known.attempts)
    for commit in fresh:
        if commit.attempt >= len(attempts):
            raise _missing(paths.attempt_path(commit.attempt), f"{commit} names it")
    if known is previous and newest == previous.newest and attempts == previous.attempts:
        return previous
    fresh.sort(key=lambda commit: (commit.at, commit.writer, commit.seq))
    return View(known.commits + tuple(fresh), attempts, newest, known.compaction, known.covered)


def _at_compaction(objects: Objects, settings: Settings, previous: View) -> View:
    """Return what is known without the log: `previous`, or what a newer compaction covers."""
    number = 0
    for path in objects.list(paths.COMPACTIONS):
        found = paths.parse_compaction_path(path)
        if found is None:
            raise FormatError(
                f"a newer timstore maintained this store ({path}). Install a newer one to read it", path=path
            )
        number = max(number, found)
    seen = previous.compaction.number if previous.compaction else 0
    if number < seen:
        raise _missing(paths.compaction_path(seen), "it was seen")
    if number == seen:
        return previous
    path = paths.compaction_path(number)
    compaction = parse_compaction(_read(objects, path), path, settings)
    commits, covered = read_commits(objects, compaction)
    return View(commits, previous.attempts, dict(compaction.newest), compaction, covered)


def _new_records(
    objects: Objects, settings: Settings, writer: str, seqs: set[int], known: Commit | None, covered: int
) -> list[Commit]:
    """Return a writer's records after the known one; those up to `covered` may be gone."""
    first = known.seq + 1 if known else 0
    last = max(seqs, default=-1)
    for seq in range(covered + 1, max(first, last)):
        if seq not in seqs:
            raise _missing(paths.record_path(writer, seq), "a later record of its writer exists or was seen")
    records: list[Commit] = []
    for seq in range(first, last + 1):
        path = paths.record_path(writer, seq)
        try:
            fields, digest = paths.unseal(_read(objects, path), path)
        except CorruptionError as error:
            if error.kind != "torn" or seq != last or settings.durable:
                raise
            warnings.warn(
                f"{error}. This store was made with durability='os': the commit is taken as lost in a power failure, "
                "and left out",
                TimstoreWarning,
                stacklevel=2,
            )
            break
        known = parse_record(fields, digest, path, settings, known)
        records.append(known)
    return records


def _attempts(objects: Objects, known: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
    numbers = {paths.parse_attempt_path(path) for path in objects.list(paths.RUNS)} - {None}
    last = max((number for number in numbers if number is not None), default=-1)
    for number in range(max(len(known), last)):
        if number not in numbers:
            raise _missing(paths.attempt_path(number), "a later attempt exists or this one was seen")
    fresh = [paths.attempt_path(number) for number in range(len(known), last + 1)]
    return known + tuple(parse_attempt(_read(objects, path), path) for path in fresh)


def _read(objects: Objects, path: str) -> bytes:
    try:
        return objects.read(path, most=paths.RECORD_BYTES)
    except NotFoundError as error:
        raise _missing(path, "it was listed a moment ago") from error


def _missing(path: str, why: str) -> CorruptionError:
    return CorruptionError(f"{path} is missing: {why}. Restore it from a copy", kind="missing", path=path)
