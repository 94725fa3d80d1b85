"""One commit: all of its objects, its rows, its arrays, and what else lies in its folder."""

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from timstore.database.kept_rows import KIND, KeptRows
from timstore.database.snapshot import unpack_probe
from timstore.format.log import Commit, ObjectInfo
from timstore.format.schemas import FOLDED, SCHEMAS, read_rows
from timstore.verification.arrays import ArrayCheck
from timstore.verification.chunks import ChunkCheck
from timstore.verification.examiner import Examiner, Fault
from timstore.verification.fit import Shapes, index_bounds
from timstore.verification.matrices import Slices, columns
from timstore.verification.rows import Tables, check_rows, samples_of
from timstore.verification.slices import SliceCheck

_OTHER: dict[str, tuple[str, Callable[[bytes, ObjectInfo], Any]]] = {
    "probe": ("probe", lambda data, info: unpack_probe(data)),
    KIND: ("rows of a training", lambda data, info: KeptRows.read([read_rows(data, info.path, rows=info.rows)], None)),
}


def check_commit(
    examiner: Examiner,
    commit: Commit,
    path: str,
    shapes: Shapes,
    *,
    folded: Mapping[str, pa.Table | None] | None = None,
    maybe_covered: bool = False,
) -> None:
    """Find what is wrong with one commit. Memory: its row tables and one object.

    Args:
        path: of the record, or the checkpoint, that names its objects.
        folded: its rows where a checkpoint has them.
        maybe_covered: its row files may have been folded by a checkpoint that cannot be read.
    """
    tables: dict[str, pa.Table | None] = dict(folded or {})
    faults: list[tuple[ObjectInfo, Fault]] = []
    for info in commit.objects:
        if info.kind in SCHEMAS:
            found = examiner.table(info)
            if isinstance(found, Fault):
                tables[info.kind] = None
                if not (maybe_covered and found.kind == "missing" and info.kind in FOLDED):
                    faults.append((info, found))
            else:
                tables[info.kind] = found
    for info, fault in faults:
        concerned = () if info.kind in ("steps", "parameters", "fingerprints", "rollbacks") else samples_of(tables)
        if info.kind == "states":
            concerned = ()
        message = f"{fault.message}. It holds {info.kind}"
        examiner.add(fault.kind, info.path, message, commit, samples=concerned)
    check_rows(examiner, commit, tables, path)
    _check_numbers(examiner, commit, tables, shapes, path)
    for info in commit.objects:
        if info.kind not in SCHEMAS and info.path.split("/")[3] != "z":
            _check_other(examiner, commit, info)
    _check_folder(examiner, commit)


def _check_numbers(examiner: Examiner, commit: Commit, tables: Tables, shapes: Shapes, path: str) -> None:
    said = tables.get("chunks")
    chunks = None if said is None else ChunkCheck(said, _path_of(commit, "chunks", path))
    arrays = ArrayCheck(examiner, commit, chunks)
    arrays.read_layouts()
    table = tables.get("slices")
    if table is None and "slices" not in tables:
        # A gradient without slices is zero: then all of them have to be.
        table = pa.Table.from_pylist([], SCHEMAS["slices"])
    slices: Slices | None = None
    bounds = None
    if table is not None:
        slices = columns(table)
        named = _path_of(commit, "slices", path)
        SliceCheck(examiner, commit, tables, named, arrays.layouts, shapes).run(table, slices)
        gradients = tables.get("gradients")
        bounds = None if gradients is None else index_bounds(gradients, shapes)
    if (commit.writer, commit.seq) not in examiner.done:
        arrays.run(slices, tables, bounds)
        examiner.done.add((commit.writer, commit.seq))


def _path_of(commit: Commit, kind: str, otherwise: str) -> str:
    return next((info.path for info in commit.objects if info.kind == kind), otherwise)


def _check_other(examiner: Examiner, commit: Commit, info: ObjectInfo) -> None:
    data = examiner.read(info)
    if isinstance(data, Fault):
        examiner.add(data.kind, info.path, f"{data.message}. It holds {info.kind}", commit)
    elif info.kind in _OTHER:
        what, read = _OTHER[info.kind]
        try:
            read(data, info)
        except Exception as error:  # whatever numpy, zipfile, json and arrow make of bytes that are none
            examiner.add("malformed", info.path, f"it holds no {what}: {error!s:.200}", commit)


def _check_folder(examiner: Examiner, commit: Commit) -> None:
    """Find files beside the commit's objects, which no reader looks at."""
    named = {info.path for info in commit.objects}
    for folder in {"/".join(path.split("/")[:3]) for path in named}:
        examiner.beside(folder, named, f"{commit} does not name it", commit)
