"""The older layout: what a call of `save_gradient_trajectory` costs as calls add up, and how fast its files come in.

"Original": the algorithm of the function that this one takes the place of, made again: the epoch's file is read, the
gradient added, and the file written. Milliseconds a call are those of the last tenth of the calls.

Import: an epoch's file as the original leaves it, against ijson going through the same file with nothing done about it,
in the same run, before and after; peak memory is that beyond the start.

Run: python scripts/bench_compat.py (10 minutes, with a file of 2 GB; --quick: half a minute, 50 MB)
"""

import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ijson
import numpy as np
from measuring import Cost, arguments, disk_bytes, measured, show
from rich.progress import track

import timstore
from timstore.legacy import import_trajectories

SHAPE = (64, 32)


def original(folder: Path, epoch: int, step: int, sample: int, name: str, gradient: np.ndarray) -> None:
    path = folder / f"epoch_{epoch}.json"
    data = json.loads(path.read_text()) if path.exists() else {"sample_gradients": {}}
    held = data["sample_gradients"].setdefault(str(sample), {})
    held[name] = gradient.tolist()
    held[f"{name}_step"] = step
    path.write_text(json.dumps(data))


def calls(quick: bool) -> list[dict[str, Any]]:
    """Return a row per number of calls and function."""
    gradients = np.random.default_rng(0).standard_normal((400, *SHAPE)).astype(np.float32)
    functions: dict[str, Callable[..., None]] = {
        "original": original,
        "save_gradient_trajectory": timstore.save_gradient_trajectory,
    }
    rows = []
    for count in (25, 50, 100) if quick else (50, 100, 200, 400):
        for name, function in functions.items():
            times = []
            with tempfile.TemporaryDirectory() as folder:
                for number in track(range(count), f"{name}, {count} calls", transient=True):
                    begun = time.perf_counter()
                    function(Path(folder), 0, number, number, "layer.weight", gradients[number])
                    times.append(time.perf_counter() - begun)
                for store in timstore.database.lifetime.open_stores():
                    store.close()
                size = disk_bytes(Path(folder))
            last = statistics.median(times[-max(5, count // 10) :])
            rows.append(
                {
                    "calls": count,
                    "function": name,
                    "ms a call": last * 1e3,
                    "seconds in all": sum(times),
                    "KB a gradient": size / count / 1e3,
                }
            )
    return rows


def epoch_file(path: Path, size: int) -> int:
    """Write an epoch's file of so many bytes; returns how many gradients are in it."""
    draw, count = np.random.default_rng(0), 0
    with open(path, "w") as file:
        file.write('{"sample_gradients": {')
        while file.tell() < size:
            file.write(", " if count else "")
            numbers = draw.standard_normal((512, 256)).astype(np.float32).tolist()
            file.write(f'"{count}": ' + json.dumps({"layer.weight": numbers, "layer.weight_step": count}))
            count += 1
        file.write("}}")
    return count


def parsed(path: Path) -> Cost:
    """Return what ijson alone takes to go through a file."""
    with measured() as cost, open(path, "rb") as file:
        for _ in ijson.basic_parse(file, use_float=True):
            pass
    return cost


def imports(quick: bool) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "old"
        folder.mkdir()
        path = folder / "epoch_0.json"
        count = epoch_file(path, 50_000_000 if quick else 2_000_000_000)
        os.sync()  # a commit would wait for this file as well, which in practice is long on disk
        megabytes = path.stat().st_size / 1e6
        before = parsed(path)
        with measured() as imported:
            report = import_trajectories(folder, Path(name) / "s", lr=0.1, progress=False)
        assert report.gradients == count
        after = parsed(path)
        alone = (before.seconds + after.seconds) / 2
        for what, cost in (("ijson alone", before), ("import_trajectories", imported), ("ijson again", after)):
            rows.append(
                {
                    "what": what,
                    "MB": megabytes,
                    "seconds": cost.seconds,
                    "MB/s": megabytes / cost.seconds,
                    "of ijson's rate": alone / cost.seconds,
                    "extra MB": cost.peak_bytes / 1e6,
                }
            )
    return rows


def main() -> None:
    given = arguments(__doc__).parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    show("Calls of one gradient each", calls(given.quick), as_json=given.json)
    show("Import of an epoch's file", imports(given.quick), as_json=given.json)


if __name__ == "__main__":
    main()
