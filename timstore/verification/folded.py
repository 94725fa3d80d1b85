"""A checkpoint: its row files one by one, and with them the commits that it covers."""

import pyarrow as pa

from timstore.format import paths
from timstore.format.compaction import Compaction
from timstore.format.log import Commit
from timstore.format.schemas import FOLDED
from timstore.verification.examiner import Examiner, Fault
from timstore.verification.fit import Shapes
from timstore.verification.picture import Picture
from timstore.verification.rowfiles import RowFiles
from timstore.verification.segments import check_commit

_NUMBERED = tuple(kind for kind in FOLDED if kind != "samples")
_ALONE = ("commits", "objects", "samples")


def check_checkpoint(examiner: Examiner, picture: Picture, shapes: Shapes) -> None:
    """Find what is wrong with a checkpoint and the commits that it covers.

    Memory: two row files of each kind, and one object.
    """
    checkpoint = picture.checkpoint
    if checkpoint is None:
        return
    path = paths.compaction_path(checkpoint.number)
    before = len(examiner.findings)
    for info in checkpoint.files:
        if info.kind in _NUMBERED:
            continue
        found = examiner.table(info, folded=True) if info.kind in _ALONE else examiner.read(info)
        if isinstance(found, Fault):
            message = f"{found.message}. It holds {info.kind} of commits that a checkpoint covers"
            examiner.add(found.kind, info.path, message)
    covered = picture.covered
    if covered is None and len(examiner.findings) == before:
        examiner.add("malformed", path, "its row files do not say which commits it covers")
    files = [
        RowFiles(examiner, checkpoint, kind, None if covered is None else len(covered))
        for kind in _NUMBERED
        if any(info.kind == kind for info in checkpoint.files)
    ]
    _check_order(examiner, checkpoint, covered or (), path)
    for number, commit in enumerate(covered or ()):
        tables: dict[str, pa.Table | None] = {}
        for rows in files:
            rows.add_to(tables, number)
        if _describes(commit):
            check_commit(examiner, commit, path, shapes, folded=tables)
        else:
            examiner.add("malformed", path, "it names objects that are not of their own commit", commit)
        for rows in files:
            rows.concern(commit, tables)
    for rows in files:
        rows.finish()
    _check_folders(examiner, checkpoint)


def _describes(commit: Commit) -> bool:
    """Say whether the objects of a covered commit are its own, and none that a checkpoint folds."""
    return all(
        (paths.parse_data_path(info.path) or ())[:2] == (commit.writer, commit.seq) and info.kind not in FOLDED
        for info in commit.objects
    )


def _check_order(examiner: Examiner, checkpoint: Compaction, covered: tuple[Commit, ...], path: str) -> None:
    """Hold the commits that a checkpoint covers to what it says of their writers."""
    numbers: dict[str, list[Commit]] = {}
    for commit in covered:
        numbers.setdefault(commit.writer, []).append(commit)
    for writer in sorted({*numbers, *(checkpoint.newest if covered else ())}):
        commits, newest = numbers.get(writer, []), checkpoint.newest.get(writer)
        if newest is None:
            examiner.add("count", path, f"it covers commits of writer {writer}, and does not say up to which")
            continue
        # A close or a fence has a number, and no place among the commits.
        wanted = list(range(newest.seq + (newest.kind == "commit")))
        if [commit.seq for commit in commits] != wanted:
            message = f"it covers writer {writer} up to {newest.kind} {newest.seq}, and not all commits before it"
            examiner.add("gap", path, message)
        elif newest.kind == "commit" and commits[-1].digest != newest.digest:
            examiner.add("chain", path, f"it names the newest record of writer {writer} with two digests", newest)


def _check_folders(examiner: Examiner, checkpoint: Compaction) -> None:
    """Find files beside a checkpoint's row files, which no reader looks at."""
    named = {info.path for info in checkpoint.files}
    for folder in sorted({path.rpartition("/")[0] for path in named}):
        examiner.beside(folder, named, f"{checkpoint} does not name it")
