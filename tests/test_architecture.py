"""Imports run one way, and every outside library has one owner."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "timstore"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A file imports from its own room, or from a floor below.
FLOORS = [
    ["timstore.errors"],
    ["timstore.arguments", "timstore.os_errors", "timstore.progress", "timstore.interrupts", "timstore.records"],
    ["timstore.options"],
    ["timstore.encoding"],
    ["timstore.format"],
    ["timstore.catalog"],
    ["timstore.database"],
    ["timstore.model"],
    ["timstore.recording", "timstore.rollbacks", "timstore.verification", "timstore.legacy"],
    ["timstore.checkpoints"],
    ["timstore"],
    ["timstore.cli", "timstore.integrations"],
    ["timstore.__main__"],
]

OWNERS = {
    "zarr": ["timstore.format"],
    "numcodecs": ["timstore.format"],
    "google_crc32c": ["timstore.format"],
    "isal": ["timstore.format"],
    "duckdb": ["timstore.catalog", "timstore.cli.sample_files"],
    "torch": [
        "timstore.model",
        "timstore.options",  # for types alone
        "timstore.recording",
        "timstore.rollbacks",
        "timstore.legacy",
        "timstore.checkpoints",
        "timstore",
        "timstore.integrations",
        "timstore.cli.untrained",
    ],
    "ijson": ["timstore.legacy"],
    "rich": ["timstore.progress", "timstore.cli.reading"],
    "typer": ["timstore.cli"],
    "transformers": ["timstore.checkpoints", "timstore.integrations", "timstore.cli.untrained"],
    "lightning": ["timstore.integrations.lightning"],
    "pytorch_lightning": ["timstore.integrations.lightning"],
}

# The verbs of `Store` return what rooms above make, and its users' type checkers see that.
VERBS = "timstore.database.store"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    if name_of(path) == VERBS:
        tree.body = [node for node in tree.body if not is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def floor_of(module: str) -> int:
    rooms = [
        (len(room), level)
        for level, names in enumerate(FLOORS)
        for room in names
        if f"{module}.".startswith(f"{room}.")
    ]
    return max(rooms)[1]


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_imports_only_from_floors_below(path: Path) -> None:
    module = name_of(path)
    for imported in imports_of(path):
        if imported.split(".")[0] == "timstore":
            same_room = room_of(imported) == room_of(module) and module != "timstore"
            assert same_room or floor_of(imported) < floor_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_an_outside_library_is_imported_by_its_owner_alone(path: Path) -> None:
    module = name_of(path)
    for imported in imports_of(path):
        library = imported.split(".")[0]
        if library in OWNERS:
            assert any(f"{module}.".startswith(f"{owner}.") for owner in OWNERS[library] if owner != "timstore") or (
                module == "timstore" and "timstore" in OWNERS[library]
            ), f"{module} imports {library}"


def test_no_two_files_import_each_other_by_whatever_way_round() -> None:
    names = {name_of(path) for path in MODULES}
    arrows = {
        name_of(path): {
            imported if imported in names else imported.rpartition(".")[0]
            for imported in imports_of(path)
            if imported.split(".")[0] == "timstore"
        }
        & (names - {name_of(path)})
        for path in MODULES
    }
    graphlib.TopologicalSorter(arrows).prepare()


def test_no_room_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "helpers", "core", "base", "manager", "misc"}
    assert not empty & {part for path in MODULES for part in path.with_suffix("").parts[-2:]}


def test_reading_sql_and_appending_arrays_do_not_import_torch(tmp_path: Path) -> None:
    script = f"""
import sys
import numpy as np
import timstore
with timstore.open({str(tmp_path / "s")!r}) as store:
    store.append(0, 0, 7, {{"w": np.ones((2, 3), np.float32)}}, lr=0.1)
with timstore.open({str(tmp_path / "s")!r}, "r") as store:
    assert store.sql("SELECT sample FROM records").fetchall() == [(7,)]
    assert store.gradient(0, 0, 7, "w").sum() == 6
    assert [record.sample for record in store.read()] == [7]
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
