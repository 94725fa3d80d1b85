"""What the benchmarks share: the time and the memory that a block of code costs, and the table they end with."""

import argparse
import ctypes
import gc
import json
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


@dataclass
class Cost:
    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured() -> Iterator[Cost]:
    """Yield what the block costs: seconds, and peak resident memory beyond what was there before."""
    gc.collect()
    if sys.platform == "linux":
        # Memory that earlier phases freed would hide what this one needs.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    process, cost, done = psutil.Process(), Cost(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.005):
            cost.peak_bytes = max(cost.peak_bytes, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begun = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - begun
        done.set()
        watcher.join()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the two flags of every benchmark."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller run, for a look within a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row instead of the table")
    return parser


def machine() -> str:
    """Say what the figures were measured on."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores, {memory:.0f} GB, {platform.system()}, Python {platform.python_version()}"


def disk_bytes(path: Path) -> int:
    """Return the size of a file, or of everything below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def show(title: str, rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print rows as one table, or as a JSON object per line. Numbers are rounded in the table alone.

    Args:
        rows: column name to value; the columns are those of the first row, and what a row lacks stays empty.
    """
    if as_json:
        for row in rows:
            print(json.dumps({"benchmark": title, "machine": machine(), **row}))
        return
    table = Table(title=f"{title} ({machine()})", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in rows[0]))
    Console(width=140, highlight=False).print(table)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
