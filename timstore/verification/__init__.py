"""Verification: everything that a store's records name is there and can be read; nothing is changed."""

import os
import time
from collections.abc import Callable, Iterable, Iterator

from timstore.errors import InvalidInputError, NotFoundError
from timstore.format import paths
from timstore.os_errors import reporting, user_path
from timstore.progress import told
from timstore.verification.data import Walk
from timstore.verification.log import Disk, Log, data_folders, leftovers, read_log, settings_of
from timstore.verification.report import LEFTOVER, Finding, Verification, ordered

__all__ = ["Finding", "Verification", "verify"]

# A compaction meanwhile moves rows into other files: then these are checked too, but not for ever.
_ROUNDS = 3


def verify(path: str | os.PathLike[str], *, progress: bool | Callable[[int, int], None] | None = None) -> Verification:
    """Find every defect of the store at a path, also of one that cannot be opened. Changes nothing; prints well.

    Everything is read as readers read it: every object is held against its size and checksum, every row table against
    its columns, every writer's records against gaps, and every gradient and state is restored. Of a commit in which an
    object is damaged, nothing more is told. The store may be written meanwhile: what is on its way is at most a
    leftover, and what is committed after the beginning is checked only where a compaction folds it. `sound` says that
    there is no damage; leftovers do none.

    Cost: reads the store once from the disk, and each commit a second time, as a rule out of the system's cache.
    Memory: the names of its commits, the rows of one commit or of one row file of a compaction, one object, and
    100 MB of numbers, or one gradient if it is larger.

    Args:
        progress: as `Store.rollback` takes it; or who is called with (bytes read, bytes to read).

    Raises:
        NotFoundError: there is no store, nor what is left of one.
        InvalidInputError: the path is no folder.
        FormatError: the store needs a newer version.
    """
    began = time.monotonic()
    disk = _disk(path)
    settings, findings = settings_of(disk)
    with told(progress, "verifying", "bytes") as tell:
        walk = Walk(disk, tell)
        log = read_log(disk, settings)
        commits: dict[tuple[str, int], int] = {}
        for _ in range(_ROUNDS):
            commits |= {(commit.writer, commit.seq): commit.records for commit in log.view.commits}
            walk.over(log)
            folders = data_folders(disk)
            seen, log = log, read_log(disk, settings)
            if seen.view.compaction == log.view.compaction:
                break
    # What a compaction has deleted since is missed by nobody.
    findings += _still_missing(walk.findings, log)
    findings += [*log.findings, *leftovers(disk, log, folders)]
    findings += [Finding("unreadable", folder or ".", why) for folder, why in disk.refused.items()]
    return Verification(
        path=str(path),
        commits=len(commits),
        records=sum(commits.values()),
        objects=walk.objects,
        bytes=walk.bytes,
        seconds=time.monotonic() - began,
        findings=ordered([finding for finding in findings if not _is_gone(disk, finding)]),
    )


def _disk(path: str | os.PathLike[str]) -> Disk:
    root = user_path(path)
    with reporting("read", root):
        if not root.exists():
            raise NotFoundError(f"there is no store at {path}", path=str(path))
        if not root.is_dir():
            raise InvalidInputError(f"{path} is not a folder; a store is one", path=str(path))
        places = (paths.SETTINGS, paths.RUNS, paths.LOG, paths.DATA, paths.COMPACTIONS)
        if not any(os.path.lexists(root / place.rstrip("/")) for place in places):
            raise NotFoundError(f"there is no store at {path}, nor anything of one", path=str(path))
    return Disk(root)


def _still_missing(findings: Iterable[Finding], log: Log) -> Iterator[Finding]:
    """Leave out what is missing and not named any more."""
    folded = {info.path for info in log.view.compaction.files} if log.view.compaction else set()
    commits = {(commit.writer, commit.seq): commit for commit in log.view.commits}
    for finding in findings:
        commit = commits.get((paths.parse_data_path(finding.path) or ("", 0))[:2])
        named = folded if commit is None else {info.path for info in commit.objects}
        if finding.kind != "missing" or finding.path in named:
            yield finding


def _is_gone(disk: Disk, finding: Finding) -> bool:
    """Say whether a leftover was deleted since it was found."""
    return finding.severity == LEFTOVER and finding.kind != "missing" and disk.what_is(finding.path) is None
