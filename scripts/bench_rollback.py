"""Peak memory of a rollback under several limits, on a store many times larger than each.

Every limit is tried in a process of its own, on a store of factors made for it: MATRICES parameters, TOKENS rows a
gradient. Peak extra memory is what the process holds beyond the model and the open store.

Run: python scripts/bench_rollback.py (about 3 minutes on two cores, 3.5 GB of disk; --quick for a small store)
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from measuring import measured
from rich.console import Console
from rich.progress import track
from rich.table import Table

import timstore

OUT, IN, MATRICES, TOKENS, SAMPLES = 2000, 1500, 6, 256, 4
LIMITS = ("96MB", "128MB", "256MB", "512MB")

console = Console(width=100, highlight=False)


def new_model() -> torch.nn.Module:
    return torch.nn.ModuleDict({f"w{number}": torch.nn.Linear(IN, OUT, bias=False) for number in range(MATRICES)})


def fill(path: Path, steps: int) -> None:
    random = np.random.default_rng(0)
    with timstore.open(path, "x", durability="os") as store:
        for step in track(range(steps), "filling a store", console=console, transient=True):
            for sample in range(SAMPLES):
                gradients = {}
                for number in range(MATRICES):
                    inputs = random.standard_normal((TOKENS, IN), "float32")
                    output_gradients = random.standard_normal((TOKENS, OUT), "float32")
                    gradients[f"w{number}.weight"] = timstore.Factors(inputs, output_gradients)
                store.append(0, step, sample, gradients, lr=1e-5)


def roll_back(path: Path, limit: str) -> None:
    """Print "bytes seconds"; runs in a process of its own."""
    model = new_model()
    torch.ones(500, 500) @ torch.ones(500, 500)  # threads and buffers that any use of torch brings
    with timstore.open(path) as store, warnings.catch_warnings():
        store.sql("FROM records").fetchall()
        warnings.simplefilter("ignore", timstore.TimstoreWarning)  # no probe, no fingerprint
        with measured() as cost:
            store.rollback(model, range(SAMPLES), memory_limit=limit, force=True)
    print(cost.peak_bytes, cost.seconds)


def compare(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store.tim")
        fill(path, steps)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        table = Table("memory_limit", title=f"Rollback of a store of {size / 1e6:.0f} MB", title_justify="left")
        for column in ("peak extra memory, MB", "seconds"):
            table.add_column(column, justify="right")
        for limit in LIMITS:
            command = [sys.executable, __file__, "--roll-back", str(path), limit]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peak, seconds = map(float, answer.split())
            table.add_row(limit, f"{peak / 1e6:.0f}", f"{seconds:.1f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a store a fifth of the size")
    parser.add_argument("--roll-back", nargs=2, metavar=("STORE", "LIMIT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.roll_back:
        roll_back(Path(arguments.roll_back[0]), arguments.roll_back[1])
    else:
        compare(8 if arguments.quick else 40)


if __name__ == "__main__":
    main()
