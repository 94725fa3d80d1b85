"""What the records of a store say: commits, the objects they name, and attempts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from timstore.errors import CorruptionError, shown
from timstore.format import layout
from timstore.format.layout import take
from timstore.format.settings import Settings

Moment = tuple[int, int]
Scope = tuple[int, ...] | Literal["all"] | None

_KINDS = ("commit", "close", "fence")


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
    steps: tuple[Moment, Moment] | None
    objects: Sequence[ObjectInfo]
    records: int
    digest: str
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
        fields, digest: as `layout.unseal` returns them.
        path: where the record lies or is going to lie.
        previous: the writer's record before this one, None for its first.
        chained: whether `previous` is that record; if it is damaged or missing, nothing can be said of the order.

    Raises:
        CorruptionError: naming the file and the field.
    """
    writer, seq = take(fields, "writer", str, path), take(fields, "seq", int, path)
    if layout.record_path(writer, seq) != path:
        raise misplaced(path, f"record {seq} of writer {writer}")
    require_store(fields, path, settings)
    if chained and fields.get("previous") != (previous.digest if previous else None):
        message = f"{path} does not follow the record before it: one of the two was replaced"
        raise CorruptionError(message, kind="chain", path=path)
    if chained and previous is not None and previous.kind != "commit":
        raise CorruptionError(f"{path} comes after the {previous.kind} of its writer", kind="chain", path=path)
    kind = take_kind(fields, path)
    return Commit(
        writer=writer,
        seq=seq,
        kind=kind,
        at=take_time(fields, path),
        attempt=take(fields, "attempt", int, path),
        rank=take(fields, "rank", int, path),
        steps=_steps(fields.get("steps"), path),
        objects=_infos(take(fields, "objects", list, path), (writer, seq), path),
        records=take(fields, "records", int, path),
        digest=digest,
        ranks=_ranks(fields.get("ranks"), path),
    )


def parse_attempt(data: bytes, path: str) -> Attempt:
    """Return the attempt that the bytes at `path` describe.

    Raises:
        CorruptionError: naming the file and the field.
    """
    fields, _ = layout.unseal(data, path)
    attempt = take(fields, "attempt", int, path)
    if layout.attempt_path(attempt) != path:
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


def misplaced(path: str, what: str) -> CorruptionError:
    """Return the error of a record that belongs under another name."""
    return CorruptionError(f"{path} holds {what}: files were renamed or swapped", kind="misplaced", path=path)


def require_store(fields: Mapping[str, Any], path: str, settings: Settings) -> None:
    """Refuse a record of another store."""
    if fields.get("store") != settings.store_id:
        message = f"{path} belongs to store {fields.get('store')!r:.80}, not to this one"
        raise CorruptionError(message, kind="foreign", path=path)


def take_kind(fields: Mapping[str, Any], path: str) -> str:
    """Return the field `kind`."""
    kind = take(fields, "kind", str, path)
    if kind not in _KINDS:
        raise CorruptionError(f"{path}: kind is {kind!r:.80}, not one of {', '.join(_KINDS)}", path=path)
    return kind


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
    return ObjectInfo(
        path=take(entry, "path", str, path),
        bytes=take(entry, "bytes", int, path),
        crc32=take(entry, "crc32", int, path),
        kind=take(entry, "kind", str, path),
        logical_bytes=take(entry, "logical_bytes", int, path),
        rows=take(entry, "rows", int, path),
    )


def _infos(entries: list[Any], owner: tuple[str, int], path: str) -> tuple[ObjectInfo, ...]:
    infos = tuple(parse_info(entry, path) for entry in entries)
    folders = {layout.parse_data_path(info.path) for info in infos}
    names = {info.path for info in infos}
    if len(folders) > 1 or not all(folder is not None and folder[:2] == owner for folder in folders):
        raise CorruptionError(f"{path} names objects that are not of its own commit: {sorted(names)!r:.200}", path=path)
    if len(names) != len(infos):
        raise CorruptionError(f"{path} names an object twice", path=path)
    return infos
