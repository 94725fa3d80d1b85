"""How soon the command line answers: `timstore info` and `timstore sql` against `python -c "import torch"`.

Whole processes, on a small store, one after the other in turn; medians. What the time goes into:
python -X importtime -m timstore info STORE.

Run: python scripts/bench_cli.py (half a minute on two cores; --quick: 3 runs of each instead of 7)
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import arguments, show

import timstore

GOAL = 0.4


def small_store(path: Path) -> None:
    """Write 64 records of two parameters, in 4 commits."""
    random = np.random.default_rng(0)
    with timstore.open(path, durability="os") as store:
        for step in range(16):
            for sample in range(4):
                factors = timstore.Factors(
                    random.standard_normal((8, 128), np.float32), random.standard_normal((8, 64), np.float32)
                )
                bias = random.standard_normal(64, np.float32)
                store.append(0, step, sample, {"fc.weight": factors, "fc.bias": bias}, lr=0.1)
            if step % 4 == 3:
                store.commit()


def seconds(command: list[str]) -> float:
    """Return how long a process takes, start to end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    given = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "s")
        small_store(Path(path))
        commands = {
            'python -c "import torch"': ["-c", "import torch"],
            "timstore info": ["-m", "timstore", "info", path],
            "timstore sql": ["-m", "timstore", "sql", path, "SELECT sample, sum(norm) FROM records GROUP BY sample"],
            "timstore --version": ["-m", "timstore", "--version"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for command in commands.values():  # once before, so that every file is in the page cache
            seconds(command)
        for _ in range(3 if given.quick else 7):
            for name, command in commands.items():
                times[name].append(seconds(command))
    median = {name: statistics.median(taken) for name, taken in times.items()}
    torch = next(iter(median.values()))
    rows = [
        {
            "command": name,
            "seconds": taken,
            "of import torch": taken / torch,
            "goal": GOAL if name in ("timstore info", "timstore sql") else None,
        }
        for name, taken in median.items()
    ]
    show("The start of the command line", rows, as_json=given.json)


if __name__ == "__main__":
    main()
