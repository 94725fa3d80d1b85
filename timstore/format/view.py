"""What a reader sees: attempts and the verified, contiguous commits of every writer."""

import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from timstore.errors import CorruptionError, FormatError, NotFoundError, TimstoreWarning
from timstore.format import layout
from timstore.format.commits import Attempt, Commit, ObjectInfo, parse_attempt, parse_record
from timstore.format.objects import Objects
from timstore.format.settings import Settings


@dataclass(frozen=True, slots=True)
class View:
    """A steady snapshot of a store.

    Attributes:
        commits: of kind commit only; those of an earlier view come first, in the same places.
        attempts: number n at position n.
        newest: each writer's newest record, of any kind.
    """

    commits: tuple[Commit, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    newest: Mapping[str, Commit] = field(default_factory=dict)


def read_view(objects: Objects, settings: Settings, previous: View | None = None) -> View:
    """Return everything committed so far, every record verified; `previous` itself when nothing is new.

    Writes nothing and waits for nobody. With `previous`, only records that it lacks are read. New commits
    follow the known ones, ordered by (at, writer, seq).

    Raises:
        CorruptionError: a record is altered or missing, or says what no writer says.
        FormatError: a newer version is needed.
    """
    try:
        return _scan(objects, settings, previous or View())
    except CorruptionError as error:
        if error.kind != "missing":
            raise
    # A listing is not atomic: it may miss a name and show a later one. A second look settles it.
    return _scan(objects, settings, previous or View())


def read_verified(objects: Objects, info: ObjectInfo, commit: Commit) -> bytes:
    """Return a data object once its size and crc32 are those of its commit. One pass over the bytes.

    Raises:
        CorruptionError: naming the object and its commit, when it is missing or is not what was written.
    """
    problem = None
    try:
        data = objects.read(info.path)
    except NotFoundError:
        problem = "is missing"
    else:
        if len(data) != info.bytes:
            problem = f"has {len(data)} bytes instead of {info.bytes}"
        elif zlib.crc32(data) != info.crc32:
            problem = "was altered: its crc32 does not match"
    if problem is not None:
        raise CorruptionError(
            f"{info.path} {problem}. It holds {info.kind} of {commit}. Restore this file from a copy",
            path=info.path,
            writer=commit.writer,
            seq=commit.seq,
            steps=commit.steps,
        )
    return data


def _scan(objects: Objects, settings: Settings, previous: View) -> View:
    # The log first: what its records name (a later checkpoint, their attempt) then exists when it is looked for.
    listed: dict[str, set[int]] = {writer: set() for writer in previous.newest}
    for path in objects.list(layout.LOG):
        name = layout.parse_record_path(path)
        if name is not None:
            listed.setdefault(name[0], set()).add(name[1])
    checkpoints = objects.list(layout.CHECKPOINTS)
    if checkpoints:
        raise FormatError(
            f"a newer timstore maintained this store ({checkpoints[-1]}). Install a newer one to read it",
            path=checkpoints[-1],
        )
    newest = dict(previous.newest)
    fresh: list[Commit] = []
    for writer, seqs in sorted(listed.items()):
        for record in _new_records(objects, settings, writer, seqs, newest.get(writer)):
            newest[writer] = record
            if record.kind == "commit":
                fresh.append(record)
    attempts = _attempts(objects, previous.attempts)
    for commit in fresh:
        if commit.attempt >= len(attempts):
            raise _missing(layout.attempt_path(commit.attempt), f"{commit} names it")
    if newest == previous.newest and attempts == previous.attempts:
        return previous
    fresh.sort(key=lambda commit: (commit.at, commit.writer, commit.seq))
    return View(previous.commits + tuple(fresh), attempts, newest)


def _new_records(
    objects: Objects, settings: Settings, writer: str, seqs: set[int], known: Commit | None
) -> list[Commit]:
    """Return a writer's records after the known one."""
    first = known.seq + 1 if known else 0
    last = max(seqs, default=-1)
    for seq in range(max(first, last)):
        if seq not in seqs:
            raise _missing(layout.record_path(writer, seq), "a later record of its writer exists or was seen")
    records: list[Commit] = []
    for seq in range(first, last + 1):
        path = layout.record_path(writer, seq)
        try:
            fields, digest = layout.unseal(_read(objects, path), path)
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
    numbers = {layout.parse_attempt_path(path) for path in objects.list(layout.RUNS)} - {None}
    last = max((number for number in numbers if number is not None), default=-1)
    for number in range(max(len(known), last)):
        if number not in numbers:
            raise _missing(layout.attempt_path(number), "a later attempt exists or this one was seen")
    paths = [layout.attempt_path(number) for number in range(len(known), last + 1)]
    return known + tuple(parse_attempt(_read(objects, path), path) for path in paths)


def _read(objects: Objects, path: str) -> bytes:
    try:
        return objects.read(path)
    except NotFoundError as error:
        raise _missing(path, "it was listed a moment ago") from error


def _missing(path: str, why: str) -> CorruptionError:
    return CorruptionError(f"{path} is missing: {why}. Restore it from a copy", kind="missing", path=path)
