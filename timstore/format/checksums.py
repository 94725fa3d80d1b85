"""Bytes of data objects, checked against the record that names them."""

from isal.isal_zlib import crc32

from timstore.errors import CorruptionError, NotFoundError
from timstore.format.local_files import Objects
from timstore.format.log import Commit, ObjectInfo
from timstore.format.zarr_shards import Chunk


def fault_of(objects: Objects, info: ObjectInfo) -> tuple[bytes, str | None]:
    """Return an object's bytes and what is wrong with them, None when they are what was written."""
    try:
        data = objects.read(info.path, most=info.bytes)
    except NotFoundError:
        return b"", "is missing"
    except CorruptionError as error:
        if error.kind != "too-large":
            raise
        return b"", f"has {error.fields['bytes']} bytes instead of {info.bytes}"
    if len(data) != info.bytes:
        return data, f"has {len(data)} bytes instead of {info.bytes}"
    return data, None if crc32(data) == info.crc32 else "was altered: its crc32 does not match"


def read_verified(objects: Objects, info: ObjectInfo, owner: object) -> bytes:
    """Return a data object once its size and crc32 are those of its record, a commit or a compaction. One pass.

    Raises:
        CorruptionError: naming the object and what it belongs to; kind `missing` when there is none.
    """
    data, problem = fault_of(objects, info)
    if problem is not None:
        raise _corrupt(info, problem, owner)
    return data


def read_part(objects: Objects, info: ObjectInfo, owner: Commit, part: Chunk) -> bytes:
    """Return part of a data object once its crc32 is the one that the commit has of it; nothing else is read.

    Raises:
        CorruptionError: as `read_verified`.
    """
    try:
        data = objects.read(info.path, part.offset, part.bytes)
    except NotFoundError:
        raise _corrupt(info, "is missing", owner) from None
    if len(data) != part.bytes:
        raise _corrupt(info, f"ends before byte {part.offset + part.bytes}", owner)
    if crc32(data) != part.crc32:
        problem = f"was altered: the crc32 of its bytes {part.offset} to {part.offset + part.bytes} does not match"
        raise _corrupt(info, problem, owner)
    return data


def _corrupt(info: ObjectInfo, problem: str, owner: object) -> CorruptionError:
    where = {"writer": owner.writer, "seq": owner.seq, "steps": owner.steps} if isinstance(owner, Commit) else {}
    return CorruptionError(
        f"{info.path} {problem}. It holds {info.kind} of {owner}. Restore this file from a copy",
        kind="missing" if problem == "is missing" else "altered",
        path=info.path,
        **where,
    )
