"""Bytes of data objects, checked against the record that names them."""

from typing import TYPE_CHECKING

from isal.isal_zlib import crc32

from timstore.errors import CorruptionError, NotFoundError
from timstore.format.commits import Commit, ObjectInfo
from timstore.format.objects import Objects

if TYPE_CHECKING:
    from timstore.format.checkpoint import Checkpoint


def fault_of(objects: Objects, info: ObjectInfo) -> tuple[bytes, str | None]:
    """Return an object's bytes and what is wrong with them, None when they are what was written."""
    try:
        data = objects.read(info.path)
    except NotFoundError:
        return b"", "is missing"
    if len(data) != info.bytes:
        return data, f"has {len(data)} bytes instead of {info.bytes}"
    return data, None if crc32(data) == info.crc32 else "was altered: its crc32 does not match"


def read_verified(objects: Objects, info: ObjectInfo, owner: "Commit | Checkpoint") -> bytes:
    """Return a data object once its size and crc32 are those of its record. One pass over the bytes.

    Raises:
        CorruptionError: naming the object and what it belongs to; kind `missing` when there is none.
    """
    data, problem = fault_of(objects, info)
    if problem is None:
        return data
    where = {"writer": owner.writer, "seq": owner.seq, "steps": owner.steps} if isinstance(owner, Commit) else {}
    raise CorruptionError(
        f"{info.path} {problem}. It holds {info.kind} of {owner}. Restore this file from a copy",
        kind="missing" if problem == "is missing" else None,
        path=info.path,
        **where,
    )
