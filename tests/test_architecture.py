"""Imports run one way, every outside library has one owner, and files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "timstore"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A file imports from its own room, or from a lower layer. Within layer 5 the order is that of this list.
LAYERS = [
    ["timstore.errors"],
    ["timstore.reporting"],
    ["timstore.holding"],
    ["timstore.progress"],
    ["timstore.lifetime"],
    ["timstore.interrupts"],
    ["timstore.records"],
    ["timstore.encoding"],
    ["timstore.format"],
    ["timstore.catalog"],
    ["timstore.parts"],
    ["timstore.arguments"],
    ["timstore.intake"],
    ["timstore.samples"],
    ["timstore.kept_rows"],
    ["timstore.snapshot"],
    ["timstore.removal"],
    ["timstore.opening"],
    ["timstore.ledger"],
    ["timstore.batch"],
    ["timstore.doubles"],
    ["timstore.writing"],
    ["timstore.entries"],
    ["timstore.states"],
    ["timstore.identity"],
    ["timstore.attempts"],
    ["timstore.handle"],
    ["timstore.store"],
    ["timstore.fingerprints"],
    ["timstore.content"],
    ["timstore.undisturbed"],
    ["timstore.optimizers"],
    ["timstore.ranks"],
    ["timstore.wrappers"],
    ["timstore.recording", "timstore.rollbacks", "timstore.maintenance", "timstore.interchange"],
    ["timstore.checkpoints"],
    ["timstore"],
    ["timstore.integrations"],
    ["timstore.cli"],
    ["timstore.__main__"],
]

OWNERS = {
    "zarr": ["timstore.format"],
    "numcodecs": ["timstore.format"],
    "google_crc32c": ["timstore.format"],
    "isal": ["timstore.format", "timstore.maintenance"],
    "duckdb": ["timstore.catalog", "timstore.handle"],
    "torch": [
        "timstore.fingerprints",
        "timstore.content",
        "timstore.undisturbed",
        "timstore.optimizers",
        "timstore.ranks",
        "timstore.wrappers",
        "timstore.recording",
        "timstore.rollbacks",
        "timstore.interchange",
        "timstore.checkpoints",
        "timstore",
        "timstore.integrations",
    ],
    "ijson": ["timstore.interchange"],
    "rich": ["timstore.progress", "timstore.cli.sql"],
    "typer": ["timstore.cli"],
    "transformers": ["timstore.checkpoints", "timstore.integrations"],
    "lightning": ["timstore.integrations.lightning"],
    "pytorch_lightning": ["timstore.integrations.lightning"],
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def layer_of(module: str) -> int:
    rooms = [
        (len(room), level)
        for level, names in enumerate(LAYERS)
        for room in names
        if f"{module}.".startswith(f"{room}.")
    ]
    return max(rooms)[1]


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_imports_only_from_layers_below(path: Path) -> None:
    module = name_of(path)
    for imported in imports_of(path):
        if imported.split(".")[0] == "timstore":
            same_room = room_of(imported) == room_of(module) and module != "timstore"
            assert same_room or layer_of(imported) < layer_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_an_outside_library_is_imported_by_its_owner_alone(path: Path) -> None:
    module = name_of(path)
    for imported in imports_of(path):
        library = imported.split(".")[0]
        if library in OWNERS:
            assert any(f"{module}.".startswith(f"{owner}.") for owner in OWNERS[library] if owner != "timstore") or (
                module == "timstore" and "timstore" in OWNERS[library]
            ), f"{module} imports {library}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_stays_below_four_hundred_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


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
