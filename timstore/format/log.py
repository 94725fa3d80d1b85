"""The commit protocol: data first, then one exclusively created record that makes it visible."""

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from isal.isal_zlib import crc32

from timstore.errors import (
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    ReadOnlyError,
    StateError,
    StorageError,
    shown,
)
from timstore.format import paths
from timstore.format.local_files import Objects
from timstore.format.paths import take
from timstore.format.settings import Place, Settings, replaced

Moment = tuple[int, int]
Scope = tuple[int, ...] | Literal["all"] | None

_KINDS = ("commit", "close", "fence")
_INFO: dict[str, type[Any]] = {"path": str, "bytes": int, "crc32": int, "kind": str, "logical_bytes": int, "rows": int}


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One data object as its commit names it.

    Attributes:
        path: relative to the store.
        bytes, crc32: of the object as stored. Not crc32c: shards are built of pieces that end in their own crc32c, and
            over those a crc32c comes out the same whatever they hold.
        kind: the row table's name, or what else the object is.
        logical_bytes: its size before compression.
        rows: how many rows it holds.
    """

    path: str
    bytes: int
    crc32: int
    kind: str
    logical_bytes: int
    rows: int


@dataclass(frozen=True, slots=True)
class Commit:
    """One record of a writer's log.

    Attributes:
        seq: from 0, contiguous per writer.
        kind: commit; close (the writer ended) and fence (it was ended) carry no objects.
        at: ISO 8601 in UTC with microseconds; for people, nothing is decided by it.
        steps: first and last (epoch, step) covered, None when there are none.
        records: how many gradient records the commit holds.
        digest: sha256 of the record; the writer's next one names it.
        rank, ranks: the processes whose records and steps it holds: the first of them; all, None when unknown.
    """

    writer: str
    seq: int
    kind: str
    at: str
    attempt: int
    rank: int
    digest: str
    steps: tuple[Moment, Moment] | None = None
    objects: Sequence[ObjectInfo] = ()
    records: int = 0
    ranks: tuple[int, ...] | None = None

    def __str__(self) -> str:
        steps = f", steps {self.steps[0]} to {self.steps[1]}" if self.steps else ""
        return f"{self.kind} {self.seq} of writer {self.writer} (attempt {self.attempt}{steps})"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One uninterrupted stretch of a run, which supersedes earlier ones from (from_epoch, from_step) on.

    Attributes:
        scope: the sample ids recorded, "all", or None when unknown.
        ranks: how many processes train together.
        digest_before: of all parameters before its first step; None when unknown.
    """

    attempt: int
    from_epoch: int
    from_step: int
    scope: Scope
    ranks: int
    at: str
    digest_before: str | None = None


def parse_record(
    fields: Mapping[str, Any],
    digest: str,
    path: str,
    settings: Settings,
    previous: Commit | None,
    *,
    chained: bool = True,
) -> Commit:
    """Return a log record's commit, if it is what this writer's next record can be.

    Args:
        fields, digest: as `paths.unseal` returns them.
        path: where the record lies or is going to lie.
        previous: the writer's record before this one, None for its first.
        chained: whether `previous` is that record; if it is damaged or missing, nothing can be said of the order.

    Raises:
        CorruptionError: naming the file and the field.
    """
    writer, seq = take(fields, "writer", str, path), take(fields, "seq", int, path)
    if paths.record_path(writer, seq) != path:
        raise misplaced(path, f"record {seq} of writer {writer}")
    require_store(fields, path, settings)
    if chained and fields.get("previous") != (previous.digest if previous else None):
        message = f"{path} does not follow the record before it: one of the two was replaced"
        raise CorruptionError(message, kind="chain", path=path)
    if chained and previous is not None and previous.kind != "commit":
        raise CorruptionError(f"{path} comes after the {previous.kind} of its writer", kind="chain", path=path)
    return Commit(
        writer=writer,
        **parse_head(fields, path),
        digest=digest,
        steps=_steps(fields.get("steps"), path),
        objects=_infos(take(fields, "objects", list, path), (writer, seq), path),
        records=take(fields, "records", int, path),
        ranks=_ranks(fields.get("ranks"), path),
    )


def misplaced(path: str, what: str) -> CorruptionError:
    """Return the error of a record that belongs under another name."""
    return CorruptionError(f"{path} holds {what}: files were renamed or swapped", kind="misplaced", path=path)


def require_store(fields: Mapping[str, Any], path: str, settings: Settings) -> None:
    """Refuse a record of another store."""
    if fields.get("store") != settings.store_id:
        message = f"{path} belongs to store {fields.get('store')!r:.80}, not to this one"
        raise CorruptionError(message, kind="foreign", path=path)


def parse_head(fields: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return what a compaction repeats of a record: `seq`, `kind`, `at`, `attempt` and `rank` of a `Commit`."""
    kind = take(fields, "kind", str, path)
    if kind not in _KINDS:
        raise CorruptionError(f"{path}: kind is {kind!r:.80}, not one of {', '.join(_KINDS)}", path=path)
    numbers = {name: take(fields, name, int, path) for name in ("seq", "attempt", "rank")}
    return {"kind": kind, "at": take_time(fields, path), **numbers}


def parse_attempt(data: bytes, path: str) -> Attempt:
    """Return the attempt that the bytes at `path` describe.

    Raises:
        CorruptionError: naming the file and the field.
    """
    fields, _ = paths.unseal(data, path)
    attempt = take(fields, "attempt", int, path)
    if paths.attempt_path(attempt) != path:
        raise misplaced(path, f"attempt {attempt}")
    start = take(fields, "from", dict, path)
    scope = fields.get("scope")
    if isinstance(scope, list) and all(type(sample) is int for sample in scope):
        scope = tuple(scope)
    elif scope not in ("all", None):
        raise CorruptionError(f"{path}: scope is {scope!r:.80}, not sample ids, 'all' or null", path=path)
    return Attempt(
        attempt=attempt,
        from_epoch=take(start, "epoch", int, path),
        from_step=take(start, "step", int, path),
        scope=scope,
        ranks=take(fields, "ranks", int, path),
        at=take_time(fields, path),
        digest_before=None if fields.get("digest_before") is None else take(fields, "digest_before", str, path),
    )


def take_time(fields: Mapping[str, Any], path: str) -> str:
    """Return the field `at`, an ISO 8601 time."""
    at = take(fields, "at", str, path)
    try:
        datetime.fromisoformat(at)
    except ValueError as error:
        raise CorruptionError(f"{path}: at is {at!r:.80}, not a time", path=path) from error
    return at


def _steps(value: Any, path: str) -> tuple[Moment, Moment] | None:
    if value is None:
        return None
    try:
        (first_epoch, first_step), (last_epoch, last_step) = value
        steps = (first_epoch, first_step), (last_epoch, last_step)
        sound = all(type(number) is int and number >= 0 for number in (*steps[0], *steps[1]))
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise CorruptionError(f"{path}: steps is {value!r:.80}, not [[epoch, step], [epoch, step]]", path=path)
    return steps


def _ranks(value: Any, path: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if type(value) is not list or not all(type(rank) is int and 0 <= rank < 2**63 for rank in value):
        raise CorruptionError(f"{path}: ranks is {shown(value)}, not numbers of processes", path=path)
    return tuple(value)


def parse_info(entry: Any, path: str) -> ObjectInfo:
    """Return one object as the record at `path` describes it."""
    if type(entry) is not dict:
        raise CorruptionError(f"{path}: an object is {entry!r:.80}, not a description", path=path)
    return ObjectInfo(**{name: take(entry, name, kind, path) for name, kind in _INFO.items()})


def _infos(entries: list[Any], owner: tuple[str, int], path: str) -> tuple[ObjectInfo, ...]:
    infos = tuple(parse_info(entry, path) for entry in entries)
    folders = {paths.parse_data_path(info.path) for info in infos}
    names = {info.path for info in infos}
    if len(folders) > 1 or not all(folder is not None and folder[:2] == owner for folder in folders):
        raise CorruptionError(f"{path} names objects that are not of its own commit: {sorted(names)!r:.200}", path=path)
    if len(names) != len(infos):
        raise CorruptionError(f"{path} names an object twice", path=path)
    return infos


_log = logging.getLogger(__name__)

Build = Callable[[], Iterator[tuple[str, bytes, str, int, int]]]

_MOST_FENCES = 3


class Overtaken(Exception):
    """What a commit was to hold is not what it may hold, since another writer was first: it is to be built again."""


class LogWriter:
    """One writer's log. Not to be shared with a forked child, nor used by two threads at once.

    Raises:
        ReadOnlyError: the store asks of its writers what this version cannot do.
    """

    def __init__(self, objects: Objects, settings: Settings) -> None:
        if not settings.writable:
            raise ReadOnlyError(
                f"writing to this store takes {', '.join(settings.unknown_writer_features)}, which this timstore "
                "cannot do. Open it with mode='r', or install a newer one",
                features=settings.unknown_writer_features,
            )
        self._objects = objects
        self._settings = settings
        self._process = os.getpid()
        self._closed = False
        self._unsettled: str | None = None
        self._at = ""
        self._newest: Commit | None = None
        self._writer = ""
        self._place = Place(objects, settings)
        self._is_copy = False  # whether what lies there is another copy, of which is unknown yet what it holds
        self._place.check()
        self._start()

    @property
    def writer(self) -> str:
        """The id under which the next commit goes; it changes when a fence is met."""
        return self._writer

    def commit(
        self,
        attempt: int,
        rank: int,
        steps: tuple[Moment, Moment] | None,
        records: int,
        build: Build,
        *,
        ranks: tuple[int, ...] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Commit:
        """Write one commit and return it: from then on every reader sees it, and it survives what the durability says.

        On an error nothing is visible and what was written is deleted: keep the rows and call again. The
        one exception is kind `outcome-unknown`, after which this writer refuses to go on.

        Args:
            attempt, rank, records: as the commit's record shall say.
            steps: first and last (epoch, step) covered.
            build: returns the commit's objects, each (path below the commit's folder, bytes, kind, logical
                bytes, rows). Called again when everything must be written under another name; its objects are
                consumed one at a time and never held.
            ranks: all processes whose rows it holds, None when unknown.
            check: called while no other writer of the store makes a record, right before this one does; what it
                raises leaves nothing visible.

        Raises:
            StorageError: the disk refused; kind `outcome-unknown` when the record may or may not last.
            ReadOnlyError: this process may not write here.
            CorruptionError: something else lies where this writer's record belongs.
            StateError: closed, forked, or after an unknown outcome.
        """
        self._require_usable()
        if self._closed:
            raise StateError("this writer is closed; open the store again to write")
        for _ in range(_MOST_FENCES):
            folder = paths.data_prefix(self._writer, self._seq, secrets.token_hex(paths.NONCE_BYTES))
            try:
                self._require_same(attempt)
                infos = self._put(folder, build)
                with self._objects.alone(paths.LOG):
                    self._require_same(attempt)
                    check()
                    commit = self._publish("commit", attempt, rank, steps, records, infos, ranks)
            except Exception:  # after an interrupt nothing is deleted: the record may be there
                if self._unsettled is None:
                    drop(self._objects, folder)
                raise
            if commit is not None:
                size = sum(info.bytes for info in infos)
                _log.debug("committed %d records, %d bytes, as %s/%d", records, size, self._writer, commit.seq)
                return commit
            _log.info("writer %s was fenced by maintenance, and goes on as another", self._writer)
            drop(self._objects, folder)
            self._start()
        raise StateError(f"maintenance fenced this writer {_MOST_FENCES} times during one commit; try again later")

    def close(self) -> None:
        """End this writer's log with a close record, unless it has no commits. Closing twice does nothing.

        Raises:
            StorageError, ReadOnlyError: the record could not be written; the commits are not affected.
            StateError: forked, or after an unknown outcome.
        """
        self._require_usable()
        if not self._closed and self._newest is not None:
            last = self._newest
            self._require_same(last.attempt)
            self._publish("close", last.attempt, last.rank)
        self._closed = True

    def _start(self) -> None:
        self._writer = secrets.token_hex(paths.WRITER_BYTES)
        self._newest = None

    @property
    def _seq(self) -> int:
        return self._newest.seq + 1 if self._newest else 0

    def _require_usable(self) -> None:
        if os.getpid() != self._process:
            raise StateError("this writer belongs to the parent process; open the store again in the child")
        if self._unsettled is not None:
            raise StateError(
                f"whether {self._unsettled} was committed for good is unknown since an earlier error. "
                "Open the store again: it shows what is there",
                path=self._unsettled,
            )

    def _require_same(self, attempt: int) -> None:
        """Refuse a store in which this writer's records have no place: one of another id, or an earlier copy."""
        self._is_copy |= not self._place.check()
        if not self._is_copy:
            return
        last = self._newest
        needed = [paths.attempt_path(attempt), *([paths.record_path(last.writer, last.seq)] if last else [])]
        for path in needed:
            try:
                self._objects.mark(path)
            except NotFoundError:
                raise replaced(f"an earlier copy was put in its place, without {path}") from None
        if last is not None and paths.unseal(self._objects.read(needed[-1]), needed[-1])[1] != last.digest:
            raise replaced(f"a copy was put in its place whose {needed[-1]} is another one")
        self._is_copy = False

    def _put(self, folder: str, build: Build) -> list[ObjectInfo]:
        infos = []
        for name, data, kind, logical_bytes, rows in build():
            path = folder + name
            if paths.parse_data_path(path) is None:
                raise InvalidInputError(f"{name!r} cannot name an object of a commit", path=name)
            infos.append(ObjectInfo(path, len(data), crc32(data), kind, logical_bytes, rows))
            self._objects.put(path, data)
        self._objects.sync([info.path for info in infos])
        return infos

    def _publish(
        self,
        kind: str,
        attempt: int,
        rank: int,
        steps: tuple[Moment, Moment] | None = None,
        records: int = 0,
        objects: Sequence[ObjectInfo] = (),
        ranks: tuple[int, ...] | None = None,
    ) -> Commit | None:
        """Create this writer's next record and return it, or None when a fence is in its place."""
        path = paths.record_path(self._writer, self._seq)
        # A clock set back must not turn the order of a writer's commits around.
        self._at = max(self._at, now())
        fields = {
            **paths.header(self._settings.reader_features, self._settings.writer_features),
            "store": self._settings.store_id,
            "writer": self._writer,
            "seq": self._seq,
            "previous": self._newest.digest if self._newest else None,
            "kind": kind,
            "at": self._at,
            "attempt": attempt,
            "rank": rank,
            "steps": steps,
            "records": records,
            **({} if ranks is None else {"ranks": ranks}),
            "objects": [asdict(info) for info in objects],
        }
        data = paths.seal(fields)
        record = self._parse(data, path)  # before anyone else can: a record that readers refuse must not appear
        self._unsettled = path  # and so it stays when an interrupt leaves here
        try:
            written = create_settled(self._objects, path, data)
        except Exception as error:
            if getattr(error, "kind", None) != "outcome-unknown":
                self._unsettled = None
            raise
        if written == data:
            self._newest = record
        self._unsettled = None
        if written == data:
            return record
        if self._parse(written, path).kind == "fence":
            return None
        raise CorruptionError(f"{path} holds a record that this writer did not write", path=path)

    def _parse(self, data: bytes, path: str) -> Commit:
        fields, digest = paths.unseal(data, path)
        return parse_record(fields, digest, path, self._settings, self._newest)


def claim_attempt(
    objects: Objects,
    from_epoch: int,
    from_step: int,
    scope: Scope,
    ranks: int,
    first: bool = False,
    digest_before: str | None = None,
) -> Attempt:
    """Begin an attempt, durable and visible at return; of several callers at once each gets its own number.

    Args:
        from_epoch, from_step: rows of earlier attempts from here on are superseded.
        scope: the sample ids that are recorded, "all", or None when unknown.
        ranks: how many processes train together.
        first: make attempt 0, or return it as it is when it exists.
        digest_before: of all parameters before its first step; None when unknown.

    Raises:
        StorageError, ReadOnlyError: nothing became visible, unless its kind is `outcome-unknown`.
    """
    while True:
        numbers = [
            number for path in objects.list(paths.RUNS) if (number := paths.parse_attempt_path(path)) is not None
        ]
        number = 0 if first else max(numbers, default=-1) + 1
        path = paths.attempt_path(number)
        fields = {
            **paths.header(),
            "attempt": number,
            "from": {"epoch": from_epoch, "step": from_step},
            "scope": scope,
            "ranks": ranks,
            "digest_before": digest_before,
            "at": now(),
            "claim": secrets.token_hex(8),  # tells our file from that of a caller who asks for the same
        }
        data = paths.seal(fields)
        attempt = parse_attempt(data, path)
        written = create_settled(objects, path, data)
        if written == data:
            return attempt
        if first:
            return parse_attempt(written, path)


def create_settled(objects: Objects, path: str, data: bytes) -> bytes:
    """Create an object and return what its name then holds: `data`, or what another made first.

    An error of `create` does not say what happened (the reply may be lost, not the request): only the name does.

    Raises:
        StorageError: kind `outcome-unknown` when not even the name says it.
        Exception: the error of `create`, when nothing became visible.
    """
    try:
        objects.create(path, data)
        return data
    except Exception as error:
        why = f"{error}; reading it back failed too"
        try:
            made = objects.read(path, most=paths.RECORD_BYTES)
            if made == data:
                why = "it is visible, but perhaps not for good"
                if getattr(error, "kind", None) == "not-durable":
                    raise  # a failed fsync is never repeated: a second one may lie
                objects.sync([path])
            return made
        except NotFoundError:
            raise error from None
        except Exception as trouble:
            raise StorageError(
                f"whether {path} is committed for good is unknown: {why}: {trouble}",
                kind="outcome-unknown",
                path=path,
            ) from error


def drop(objects: Objects, folder: str) -> None:
    """Delete a folder that no record names; what cannot be deleted stays, and no reader sees it."""
    with suppress(Exception):
        objects.delete_prefix(folder)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
