"""Draw how costs grow: bytes and time of recording, seconds and memory of a rollback, seconds of opening a store.

Runs the sweeps of bench_record.py, bench_rollback.py and bench_sql.py one after the other, and draws what they print.

Run: python scripts/plot_growth.py (about 15 minutes on two cores; --quick: 3) writes docs/growth.svg, and
     docs/growth.jsonl with the figures; --draw draws those again without measuring
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from measuring import arguments

SCRIPTS = Path(__file__).parent
FIGURES = SCRIPTS.parent / "docs" / "growth.jsonl"
PLOT = SCRIPTS.parent / "docs" / "growth.svg"
SWEEPS = ("bench_record", "bench_rollback", "bench_sql")

Rows = Sequence[dict[str, Any]]


def measure(quick: bool) -> str:
    """Run the sweeps, and return their JSON lines."""
    lines = []
    for name in SWEEPS:
        command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--sweep", "--json", *(["--quick"] if quick else [])]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        lines += [json.dumps({"script": name, **json.loads(line)}) for line in answer.splitlines()]
    return "\n".join(lines) + "\n"


def draw(rows: Rows, path: Path) -> None:
    """Draw one panel per cost. Every axis starts at 0: what is linear is seen to be a line."""
    plt.rcParams.update({"svg.hashsalt": "timstore", "svg.fonttype": "none", "font.size": 9})
    figure, panels = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
    record, rollback, opening = ([row for row in rows if row["script"] == name] for name in SWEEPS)
    _recording(panels[0][0], record, "MB", "bytes recorded, MB")
    _recording(panels[0][1], record, "seconds beyond the bare loop", "recording beyond the bare loop, s")
    for panel, column, title in (
        (panels[1][0], "s warm", "rollback, s"),
        (panels[1][1], "peak MB", "rollback, peak extra memory, MB"),
    ):
        for stored, laid in dict.fromkeys((row["in store"], row["others"]) for row in rollback):
            of_store = [row for row in rollback if (row["in store"], row["others"]) == (stored, laid)]
            label = f"{stored} in store" + ("" if laid == "none" else f", others {laid}")
            _line(panel, of_store, "asked for", column, label)
        _name(panel, title, "records asked for")
    _line(panels[1][2], opening, "commits", "not rolled up", "not rolled up")
    for name in sorted({name for row in opening for name in row if name.startswith("since")}):
        _line(panels[1][2], opening, "commits", name, name)
    _line(panels[1][2], opening, "commits", "rolled up", "rolled up", marker="o", linestyle="")
    _name(panels[1][2], "opening a store, s", "commits (1,000 gradient rows each)")
    panels[0][2].axis("off")
    panels[0][2].text(0, 0.5, f"{rows[0]['machine']}\n\npython scripts/plot_growth.py", va="center")
    figure.savefig(path, metadata={"Date": None})


def _recording(panel: Axes, rows: Rows, column: str, title: str) -> None:
    for tokens in sorted({row["tokens"] for row in rows}):
        _line(panel, [row for row in rows if row["tokens"] == tokens], "rows", column, f"{tokens} tokens")
    _name(panel, title, "samples x tokens")


def _line(panel: Axes, rows: Rows, across: str, up: str, label: str, **style: Any) -> None:
    points = sorted((row[across], row[up]) for row in rows if row.get(up) is not None)
    if points:
        panel.plot(*zip(*points, strict=True), label=label, **{"marker": ".", "linewidth": 1, **style})


def _name(panel: Axes, title: str, across: str) -> None:
    panel.set_title(title, loc="left")
    panel.set_xlabel(across)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=7, frameon=False)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--draw", action="store_true", help="draw docs/growth.jsonl again")
    given = parser.parse_args()
    if not given.draw:
        FIGURES.write_text(measure(given.quick))
    rows = [json.loads(line) for line in FIGURES.read_text().splitlines()]
    for row in rows:
        if row["script"] == "bench_record":
            row["rows"] = row["samples"] * row["tokens"]
            row["seconds beyond the bare loop"] = row["seconds"] - row["seconds of the bare loop"]
    draw(rows, PLOT)
    if given.json:
        sys.stdout.write(FIGURES.read_text())


if __name__ == "__main__":
    main()
