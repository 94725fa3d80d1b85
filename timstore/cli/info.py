"""`timstore info`: what is in a store."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from timstore.cli.options import AsJson, StorePath
from timstore.cli.output import aligned, counted, print_json, size
from timstore.cli.overview import Overview, overview
from timstore.cli.stores import reading

EXAMPLES = """\b
Examples:
  timstore info run.tim
  timstore info run.tim --json | jq .ratio
"""

_LARGEST = 10


def run(
    path: StorePath,
    every: Annotated[bool, typer.Option("--all", help="List every parameter, not only the ten largest.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in a store, how large it is, and what it covers.

    Sizes of gradients are those of their encodings, before lossless
    compression; what lies on disk is compressed. Rows that a later
    attempt superseded are left out.
    """
    with reading(path) as store:
        found = overview(store)
    if as_json:
        print_json(found.to_dict())
        return
    typer.echo("\n".join(_lines(found, len(found.parameters) if every else _LARGEST)))


def _lines(found: Overview, most: int) -> Iterator[str]:
    facts = {
        "store": f"{found.path}, format {found.format}, precision {found.precision}",
        "on disk": f"{size(found.disk_bytes)} in all",
        "gradients": _gradients(found),
        "records": f"{found.records:,} of {counted(found.samples, 'sample')}",
        "steps": _steps(found),
        "coverage": _coverage(found.coverage),
        "commits": f"{found.commits:,}" + (f", the last {_when(found.last_commit_at)}" if found.last_commit_at else ""),
        "rollbacks": _rollbacks(found.rollbacks),
    }
    for state in found.states:
        facts[state["role"]] = f"{size(state['bytes'])}, of {counted(state['parameters'], 'parameter')}"
    width = max(map(len, facts)) + 2
    yield from (f"{name:<{width}}{fact}" for name, fact in facts.items())
    for table in (_attempts(found), _encodings(found), _parameters(found, most)):
        if table:
            yield ""
            yield table


def _gradients(found: Overview) -> str:
    if not found.bytes:
        return "none"
    return f"{size(found.bytes)}; dense {size(found.dense_bytes)}, {found.ratio:.1f} times as much"


def _steps(found: Overview) -> str:
    if found.first is None or found.last is None or found.epochs is None:
        return "none"
    first, last = found.epochs
    epochs = f"epoch {first}" if first == last else f"epochs {first} to {last}"
    return f"{found.steps:,}, {epochs}, (epoch, step) from {found.first} to {found.last}"


def _coverage(counts: dict[str, int | None]) -> str:
    if counts["drawn"] is None:
        return f"{counts['recorded']:,} samples recorded; the steps do not name their batches"
    text = (
        f"{counts['recorded']:,} samples recorded, {counts['not_recorded']:,} drawn without, "
        f"{counts['never_drawn']:,} never drawn"
    )
    return text + (f"; {counted(counts['gaps'], 'gap')} in what is recorded" if counts["gaps"] else "")


def _rollbacks(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "none"
    last = rows[-1]
    return f"{len(rows)}, the last {_when(last['at'])}: {counted(last['samples'], 'sample')} by {last['method']}"


def _when(at: str) -> str:
    """Return a time of the log, which is UTC, to the second."""
    return f"{at[:10]} {at[11:19]} UTC"


def _attempts(found: Overview) -> str:
    rows = [
        (
            f"{row['attempt']}",
            f"({row['from_epoch']}, {row['from_step']})",
            f"{row['ranks']}",
            _scope(row),
            f"{row['records']:,}",
        )
        for row in found.attempts
    ]
    return aligned(("attempt", "from", "ranks", "samples", "records"), rows) if rows else ""


def _scope(attempt: dict[str, Any]) -> str:
    if attempt["recorded"] == "selected":
        return f"{attempt['chosen']:,} chosen"
    return attempt["recorded"] or "as appended"


def _encodings(found: Overview) -> str:
    rows = [
        (row["encoding"], row["precision"], f"{row['gradients']:,}", *_sizes(row, found.bytes))
        for row in found.encodings
    ]
    return aligned(("encoding", "precision", "gradients", "size", "share", "ratio"), rows, left=2) if rows else ""


def _parameters(found: Overview, most: int) -> str:
    shown = found.parameters[:most]
    if not shown:
        return ""
    rows = [
        (
            row["parameter"],
            _shape(row["shape"]),
            "+".join(row["encodings"]),
            *_sizes(row, found.bytes),
        )
        for row in shown
    ]
    table = aligned(("parameter", "shape", "encoding", "size", "share", "ratio"), rows)
    left = len(found.parameters) - len(shown)
    return f"{table}\nand {counted(left, 'smaller one')}: --all lists them" if left else table


def _shape(shape: list[int] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


def _sizes(row: dict[str, Any], total: int) -> tuple[str, str, str]:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}x"
    return size(row["bytes"]), f"{row['bytes'] / total:.1%}" if total else "", ratio
