"""Names, versions and check lines of what is on disk. Pure functions: nothing here touches a disk."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from timstore.errors import CorruptionError, FormatError, InvalidInputError

FORMAT = (1, 2)
"""Major and minor version. A larger major is refused; a larger minor only adds what a reader may ignore."""

READER_FEATURES: frozenset[str] = frozenset({"blosc-zstd"})
"""What a store may ask of its readers beyond `FORMAT` and this version can do. What this version writes asks for all
of it."""

WRITER_FEATURES: frozenset[str] = frozenset()
"""What a store may ask of its writers beyond `FORMAT` and this version can do."""

SETTINGS = "timstore.json"
RUNS = "runs/"
LOG = "log/"
DATA = "data/"
COMPACTIONS = "ckpt/"

RECORD_BYTES = 256 * 1024 * 1024
"""The most that a record has, its check line included: ten million sample ids in a scope are 200 MB."""
_CHECK_BYTES = len("\nsha256:\n") + 64

WRITER_BYTES = 8
NONCE_BYTES = 4

_COMPONENT = r"[a-z0-9][a-z0-9._-]*"
_OBJECT = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_ATTEMPT = re.compile(r"runs/([0-9]{6})\.json")
_RECORD = re.compile(r"log/([0-9a-f]{16})/([0-9]{12})\.json")
_DATA = re.compile(
    r"data/([0-9a-f]{16})/([0-9]{12})-([0-9a-f]{8})/"
    r"(?:[a-z_]+\.[a-z0-9]+|z/zarr\.json|z/[a-z0-9]+(?:-[a-z0-9]+)*/(?:zarr\.json|c(?:/[0-9]+)*))"
)

_COMPACTION = re.compile(r"ckpt/([0-9]{12})\.json")
_FOLDED = re.compile(r"data/m-([0-9]{12})-([0-9a-f]{8})/[a-z_]+-[0-9]{4}\.parquet")
_FOLD = re.compile(r"data/m-([0-9]{12})-([0-9a-f]{8})")

T = TypeVar("T")


def is_object_path(path: str) -> bool:
    """Say whether a path may name an object: relative, lower case, no hidden or parent components."""
    return _OBJECT.fullmatch(path) is not None


def attempt_path(attempt: int) -> str:
    """Return where an attempt is described."""
    return f"{RUNS}{attempt:06d}.json"


def parse_attempt_path(path: str) -> int | None:
    """Return the attempt that a path describes, or None for any other path."""
    return _number(_ATTEMPT, path)


def record_path(writer: str, seq: int) -> str:
    """Return where a writer's record number `seq` (from 0) lies."""
    return f"{LOG}{writer}/{seq:012d}.json"


def parse_record_path(path: str) -> tuple[str, int] | None:
    """Return (writer, seq) of a log record's path, or None for any other path."""
    match = _RECORD.fullmatch(path)
    return (match[1], int(match[2])) if match else None


def data_prefix(writer: str, seq: int, nonce: str) -> str:
    """Return the folder, with its slash, of everything that one try at one commit writes."""
    return f"{DATA}{writer}/{seq:012d}-{nonce}/"


def parse_data_path(path: str) -> tuple[str, int, str] | None:
    """Return (writer, seq, nonce) of a data object's path, or None for any other path."""
    match = _DATA.fullmatch(path)
    return (match[1], int(match[2]), match[3]) if match else None


def compaction_path(number: int) -> str:
    """Return where compaction `number` (from 1) is described."""
    return f"{COMPACTIONS}{number:012d}.json"


def parse_compaction_path(path: str) -> int | None:
    """Return the compaction that a path describes, or None for any other path."""
    return _number(_COMPACTION, path)


def fold_prefix(number: int, nonce: str) -> str:
    """Return the folder, with its slash, of the row files that one try at one compaction writes."""
    return f"{DATA}m-{number:012d}-{nonce}/"


def parse_fold_prefix(folder: str) -> int | None:
    """Return the compaction that a folder of row files was written for, or None for any other folder."""
    return _number(_FOLD, folder.rstrip("/"))


def parse_folded_path(path: str) -> int | None:
    """Return the compaction that a row file was written for, or None for any other path."""
    return _number(_FOLDED, path)


def _number(pattern: re.Pattern[str], path: str) -> int | None:
    match = pattern.fullmatch(path)
    return int(match[1]) if match else None


def seal(fields: Mapping[str, Any]) -> bytes:
    """Return a record: one line of JSON, and its check line.

    Raises:
        InvalidInputError: kind `too-large`.
    """
    body = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > RECORD_BYTES - _CHECK_BYTES:
        raise InvalidInputError(
            f"a record of {len(body)} bytes is more than readers take ({RECORD_BYTES}): commit more often, or name "
            "fewer samples in a scope",
            kind="too-large",
        )
    return body + f"\nsha256:{hashlib.sha256(body).hexdigest()}\n".encode()


def unseal(data: bytes, path: str) -> tuple[dict[str, Any], str]:
    """Return the fields of a record and the sha256 of its JSON as hex, once both lines agree.

    Raises:
        CorruptionError: kind `torn` if a byte is not the one that was written.
        FormatError: if the record needs a newer version.
    """
    body, _, check = data.partition(b"\n")
    digest = hashlib.sha256(body).hexdigest()
    if check != f"sha256:{digest}\n".encode():
        raise CorruptionError(
            f"{path} is torn or was altered: its check line does not match. Restore this file from a copy",
            kind="torn",
            path=path,
        )
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path} is not a timstore record: {error}", path=path) from error
    if not isinstance(fields, dict):
        raise CorruptionError(f"{path} is not a timstore record: it holds no object", path=path)
    _require_readable(fields, path)
    return fields, digest


def header(reader_features: tuple[str, ...] = (), writer_features: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields with which every record begins, also in a store that an earlier version made."""
    return {
        "format": list(FORMAT),
        "reader_features": sorted(READER_FEATURES.union(reader_features)),
        "writer_features": list(writer_features),
    }


def take(fields: Mapping[str, Any], name: str, kind: type[T], path: str) -> T:
    """Return one field of exactly that type; numbers are not negative and fit into 63 bits.

    Raises:
        CorruptionError: naming the file, the field and what it holds.
    """
    value = fields.get(name)
    if type(value) is not kind or (isinstance(value, (int, float)) and not 0 <= value < 2**63):
        raise CorruptionError(
            f"{path}: {name} is {value!r:.80}, which is no {kind.__name__} that belongs there", path=path
        )
    return value


def take_names(fields: Mapping[str, Any], name: str, path: str) -> tuple[str, ...]:
    """Return a field that lists names."""
    values = take(fields, name, list, path)
    if not all(isinstance(value, str) for value in values):
        raise CorruptionError(f"{path}: {name} is {values!r:.80}, not a list of names", path=path)
    return tuple(values)


def _require_readable(fields: Mapping[str, Any], path: str) -> None:
    version = take(fields, "format", list, path)
    if len(version) != 2 or not all(type(number) is int for number in version):
        raise CorruptionError(f"{path}: format is {version!r:.80}, not [major, minor]", path=path)
    if version[0] != FORMAT[0]:
        raise FormatError(
            f"{path} is of format {version[0]}.{version[1]}; this timstore reads format {FORMAT[0]}. "
            "Install the timstore that wrote it, or a newer one",
            path=path,
            version=tuple(version),
        )
    unknown = sorted(set(take_names(fields, "reader_features", path)) - READER_FEATURES)
    if unknown:
        raise FormatError(
            f"{path} needs {', '.join(unknown)}, which this timstore cannot read. Install a newer one",
            path=path,
            features=unknown,
        )
