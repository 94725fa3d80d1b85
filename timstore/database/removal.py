"""A store removed, so that another can begin in its place. At no moment does half of one look like a whole one."""

import logging
import os
import re
import shutil
from pathlib import Path

from timstore.database import lifetime
from timstore.errors import CorruptionError, InvalidInputError
from timstore.format import paths
from timstore.format.local_files import LocalObjects, folder_held
from timstore.format.settings import read_settings
from timstore.os_errors import reporting

_log = logging.getLogger(__name__)

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
            found = (within / name).as_posix()
            hidden = _TEMPORARY.fullmatch(name)
            if found != _MARK and not _is_ours((within / hidden[1]).as_posix() if hidden else found):
                return found
    return None


def _is_ours(path: str) -> bool:
    return path == paths.SETTINGS or any(parse(path) is not None for parse in _PARSERS)


def _synced(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
