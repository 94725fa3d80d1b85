"""Verification: everything that a store's records name is there and is what was written; nothing is changed."""

import os
import time
from collections.abc import Callable, Iterable

from timstore.errors import InvalidInputError, NotFoundError, TimstoreError
from timstore.format import paths
from timstore.format.checksums import fault_of
from timstore.format.local_files import LocalObjects
from timstore.format.log import Commit, ObjectInfo
from timstore.os_errors import reporting, user_path
from timstore.progress import told
from timstore.records import Parameter
from timstore.verification.examiner import Examiner, Fault, parse_table
from timstore.verification.findings import LEFTOVER, Finding, Verification, ordered
from timstore.verification.fit import Shapes
from timstore.verification.folded import check_checkpoint
from timstore.verification.inventory import Inventory
from timstore.verification.leftovers import data_folders, leftovers
from timstore.verification.picture import Picture, look
from timstore.verification.records import RecordReader
from timstore.verification.segments import check_commit

# A roll-up meanwhile moves rows into other files: then these are checked too, but not for ever.
_ROUNDS = 3


def verify(path: str | os.PathLike[str], *, progress: bool | Callable[[int, int], None] | None = None) -> Verification:
    """Find every defect of the store at a path, also of one that cannot be opened. Changes nothing; prints well.

    Every object is held against its size and checksum and decoded, every row against its record, its neighbours and
    its numbers, every writer's sequence against gaps. The store may be written meanwhile: what is on its way is at
    most a leftover, and what is committed after the beginning is checked only where a roll-up folds it. `sound` says
    that there is no damage; leftovers do none.

    Cost: reads the whole store once. Memory: the names of its commits, the row tables of one commit (two row files
    of each table where a checkpoint has folded them), and one object.

    Args:
        progress: as `Store.rollback` takes it; or who is called with (bytes read, bytes to read).

    Raises:
        NotFoundError: there is no store, nor what is left of one.
        InvalidInputError: the path is no folder.
        FormatError: the store needs a newer version.
    """
    began = time.monotonic()
    objects = _objects(path)
    inventory = Inventory(objects.root)
    with told(progress, "verifying", "bytes") as tell:
        reader = RecordReader(objects, inventory)
        examiner = Examiner(objects, inventory, tell)
        picture = look(reader)
        commits: dict[tuple[str, int], int] = {}
        for _ in range(_ROUNDS):
            commits |= {(commit.writer, commit.seq): commit.records for commit in picture.commits}
            _check_contents(examiner, picture)
            folders = data_folders(inventory)
            seen, picture = picture, look(reader)
            if seen.checkpoint == picture.checkpoint:
                break
    # What a roll-up has deleted since is missed by nobody.
    found = _still_missing(examiner.findings, picture)
    found += [*reader.findings, *picture.findings, *leftovers(inventory, picture, folders)]
    found += [Finding("unreadable", folder or ".", why) for folder, why in inventory.refused.items()]
    gone = (one for one in found if one.severity == LEFTOVER and one.kind != "missing")
    vanished = {one for one in gone if inventory.sort_of(one.path) is None}
    return Verification(
        path=str(path),
        commits=len(commits),
        records=sum(commits.values()),
        objects=examiner.read_objects,
        bytes=examiner.read_bytes,
        seconds=time.monotonic() - began,
        findings=ordered([one for one in found if one not in vanished]),
    )


def _objects(path: str | os.PathLike[str]) -> LocalObjects:
    root = user_path(path)
    with reporting("read", root):
        if not root.exists():
            raise NotFoundError(f"there is no store at {path}", path=str(path))
        if not root.is_dir():
            raise InvalidInputError(f"{path} is not a folder; a store is one", path=str(path))
        places = (paths.SETTINGS, paths.RUNS, paths.LOG, paths.DATA, paths.COMPACTIONS)
        if not any(os.path.lexists(root / place.rstrip("/")) for place in places):
            raise NotFoundError(f"there is no store at {path}, nor anything of one", path=str(path))
    return LocalObjects(root, durable=False)


def _check_contents(examiner: Examiner, picture: Picture) -> None:
    folded = picture.checkpoint.files if picture.checkpoint else ()
    fresh = [commit for commit in picture.fresh if (commit.writer, commit.seq) not in examiner.done]
    infos: list[Iterable[ObjectInfo]] = [folded, *(commit.objects for commit in (*(picture.covered or ()), *fresh))]
    examiner.total_bytes = examiner.read_bytes + sum(info.bytes for group in infos for info in group)
    shapes = _declared(examiner, picture)
    check_checkpoint(examiner, picture, shapes)
    for commit in fresh:
        path = paths.record_path(commit.writer, commit.seq)
        check_commit(examiner, commit, path, shapes, maybe_covered=picture.maybe_covered(commit))


def _still_missing(findings: Iterable[Finding], picture: Picture) -> list[Finding]:
    """Leave out what is missing and not named any more."""
    folded = {info.path for info in picture.checkpoint.files} if picture.checkpoint else set()
    places = {(commit.writer, commit.seq): commit for commit in picture.commits}
    kept = []
    for finding in findings:
        commit = places.get((paths.parse_data_path(finding.path) or ("", 0))[:2])
        named = folded if commit is None else {info.path for info in commit.objects}
        if finding.kind != "missing" or finding.path in named:
            kept.append(finding)
    return kept


def _declared(examiner: Examiner, picture: Picture) -> Shapes:
    """Return the matrix shapes that parameters were declared with; None if not all of their rows can be read.

    What is wrong with a file is found when all files are checked.
    """
    shapes: dict[str, set[tuple[int, int]]] = {}
    folded = picture.checkpoint.files if picture.checkpoint else ()
    if picture.lost is not None or any(chain.broken for chain in picture.chains.values()):
        return None
    for info, is_folded in [*((info, True) for info in folded), *((info, False) for info in _infos(picture.fresh))]:
        if info.kind != "parameters":
            continue
        try:
            data, problem = fault_of(examiner.objects, info)
        except TimstoreError:
            return None
        table = Fault("", "") if problem else parse_table(data, info, folded=is_folded)
        if isinstance(table, Fault):
            return None
        for row in table.select(["parameter", "shape"]).to_pylist():
            if all(type(size) is int and size >= 0 for size in row["shape"]):
                matrix = Parameter(row["parameter"], tuple(row["shape"]), "").matrix_shape
                shapes.setdefault(row["parameter"], set()).add(matrix)
    return shapes


def _infos(commits: Iterable[Commit]) -> Iterable[ObjectInfo]:
    return (info for commit in commits for info in commit.objects)
