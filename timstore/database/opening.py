"""Find, make or remove the store at a path. At no moment does half of a removed one look like a whole one."""

import logging
import os
import re
import shutil
import stat
import warnings
from pathlib import Path
from typing import Any

from timstore.arguments import choice
from timstore.database import lifetime
from timstore.encoding import PRECISIONS
from timstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    ReadOnlyError,
    TimstoreWarning,
    shown,
)
from timstore.format import paths
from timstore.format.local_files import LocalObjects, folder_held
from timstore.format.settings import Settings, create_settings, read_settings
from timstore.os_errors import reporting

_log = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {"precision": "exact", "max_rel_error": 0.02, "durability": "commit"}
_CHOICES = {"precision": PRECISIONS, "durability": ("commit", "os")}
# What the settings are called while the rest goes: without settings nothing is a store, with this it was one.
_MARK = f".{paths.SETTINGS}.removed"
_FOLDERS = tuple(folder.rstrip("/") for folder in (paths.DATA, paths.LOG, paths.COMPACTIONS, paths.RUNS))
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}")
_PARSERS = (
    paths.parse_attempt_path,
    paths.parse_record_path,
    paths.parse_data_path,
    paths.parse_compaction_path,
    paths.parse_folded_path,
)


def open_settings(path: Path, mode: str, options: dict[str, Any]) -> tuple[LocalObjects, Settings]:
    """Return the object backend and the settings of the store at `path`, made first where the mode says so.

    Args:
        options: precision, max_rel_error, durability; None where the caller has no wish.
    """
    _check(mode, options)
    with reporting("open", path):
        return _opened(path, mode, options)


def _opened(path: Path, mode: str, options: dict[str, Any]) -> tuple[LocalObjects, Settings]:
    if mode == "w":
        remove_store(path)
    exists = (path / paths.SETTINGS).exists()
    if mode == "x" and exists:
        raise AlreadyExistsError(f"{path} is a store already; open it with mode 'a', or choose another path")
    if not exists:
        check_whole(path)
        if (path / paths.attempt_path(0)).exists():
            raise CorruptionError(
                f"{path} has records, but its {paths.SETTINGS} is missing. Restore this file from a copy",
                path=paths.SETTINGS,
            )
        if mode == "r":
            raise NotFoundError(f"there is no store at {path}; mode 'a' makes one", path=str(path))
        if path.exists() and not _is_free(path):
            raise InvalidInputError(
                f"{path} is not a store, and is not empty: choose an empty or a new directory", path=str(path)
            )
        wanted = {name: _DEFAULTS[name] if value is None else value for name, value in options.items()}
        objects = LocalObjects(path, durable=wanted["durability"] == "commit")
        try:
            made = create_settings(objects, **wanted)
            _log.info("made a store at %s", path)
            return objects, made
        except AlreadyExistsError:
            if mode == "x":
                raise
            # Another process made it just now; its options are held against ours below.
    settings = read_settings(LocalObjects(path, durable=False))
    _warn_when_public(path)
    for name, value in options.items():
        kept = getattr(settings, name)
        if value is not None and value != kept:
            raise InvalidInputError(
                f"{path} was made with {name}={kept!r}, not {shown(value)}: leave {name} out, or make another store",
                path=str(path),
            )
    if mode != "r":
        if not settings.writable:
            raise ReadOnlyError(f"{path} was written by a newer timstore: this version can only read it (mode 'r')")
        if not os.access(path, os.W_OK):
            raise ReadOnlyError(f"{path} is not writable for this process: open it with mode 'r'", path=str(path))
    return LocalObjects(path, durable=settings.durability == "commit"), settings


def _warn_when_public(path: Path) -> None:
    """A copy made without its modes, say, may be open to everyone."""
    if path.stat().st_mode & stat.S_IXOTH and (path / paths.SETTINGS).stat().st_mode & stat.S_IROTH:
        warnings.warn(
            f"every user of this machine can read {path}, and gradients tell about the data they came from: "
            f"chmod -R go= {path}",
            TimstoreWarning,
            stacklevel=6,
        )


def _is_free(path: Path) -> bool:
    """Say whether a store may be made here: an empty folder, or one in which somebody began to make it."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    return paths.SETTINGS in names or all(name.startswith(f".{paths.SETTINGS}.") for name in names)


def _check(mode: str, options: dict[str, Any]) -> None:
    if not isinstance(mode, str) or mode not in ("r", "a", "x", "w"):
        raise InvalidInputError(
            f"mode is 'r' (read), 'a' (open or create), 'x' (create) or 'w' (start over), not {shown(mode)}"
        )
    for name, choices in _CHOICES.items():
        if options[name] is not None:
            choice(options[name], choices, name)
    limit = options["max_rel_error"]
    if limit is not None and not (isinstance(limit, float | int) and 0 < limit < 1):
        raise InvalidInputError(f"max_rel_error lies between 0 and 1, not {shown(limit)}")


def check_whole(path: Path) -> None:
    """Refuse what a removal that was cut off has left.

    Raises:
        CorruptionError: kind `half-removed`.
    """
    if (path / _MARK).exists() and any((path / folder).exists() for folder in _FOLDERS):
        raise CorruptionError(
            f"{path} is what is left of a store that was being removed, by mode 'w', when the process ended: open it "
            "with mode 'w' again",
            kind="half-removed",
            path=str(path),
        )


def remove_store(path: Path) -> None:
    """Remove the store at a path, or what is left of one; its folder stays. Does nothing where nothing is.

    Handles of this process that are open on it are closed first, and what they accepted and did not commit is dropped.

    Raises:
        InvalidInputError: something else is there, also beside or within a store; nothing was changed.
        FormatError: a store that this version does not know, or damaged settings; nothing was changed.
        StateError: another process is removing it, or importing into it.
        ReadOnlyError: this process may not write there; nothing was changed.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return
    with folder_held(path, f"another process is importing into {path}, or removing it"), reporting("remove", path):
        settings = path / paths.SETTINGS
        if not settings.exists() and not (path / _MARK).exists():
            return
        foreign = _foreign(path)
        if foreign is not None:
            raise InvalidInputError(
                f"{path} holds {foreign}, which is no part of a store, and mode 'w' removes nothing else: choose "
                "another path, or remove it yourself",
                path=str(path),
            )
        if settings.exists():
            read_settings(LocalObjects(path, durable=False))
            lifetime.give_up(path)
            os.rename(settings, path / _MARK)
            _synced(path)
        for folder in _FOLDERS:
            if (path / folder).exists():
                shutil.rmtree(path / folder)
        for left in path.iterdir():
            left.unlink()
        _synced(path)
    _log.info("removed the store at %s", path)


def _foreign(path: Path) -> str | None:
    """Return something that lies in a store's folder and no store puts there."""
    for above, folders, files in os.walk(path):
        within = Path(above).relative_to(path)
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        strange = [] if within.parts else [name for name in folders if name not in _FOLDERS]
        for name in [*files, *links, *strange]:
            inside = (within / name).as_posix()
            hidden = _TEMPORARY.fullmatch(name)
            if inside != _MARK and not _is_ours((within / hidden[1]).as_posix() if hidden else inside):
                return inside
    return None


def _is_ours(path: str) -> bool:
    return path == paths.SETTINGS or any(parse(path) is not None for parse in _PARSERS)


def _synced(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
