"""Rolling a checkpoint back on disk, against copying it, under a memory limit that forbids holding it.

A synthetic safetensors file of matrices, 4096 columns wide, and a store with a few records of every one of them
(factors of 2 tokens) and the file's fingerprint. Every figure is of a process of its own that finds nothing in the page
cache. Peak memory is what it holds beyond the open store; the row of a tiny checkpoint says how much of that are
libraries, which any rollback loads. "copy" copies the file in blocks of 1 MB and syncs it, as a rollback does. Some
rows of every matrix are then held against their sum computed here.

Run: python scripts/bench_checkpoint.py (4 GB: a few minutes on two cores, 13 GB of disk in TMPDIR, with --dtype
BF16 17 GB; --quick: 256 MB)
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradient_layouts import forget_pages
from measuring import arguments, measured, show
from rich.console import Console
from safetensors import safe_open

import timstore

WIDTH, TOKENS, RECORDS, LR = 4096, 2, 4, 1e-3
BLOCK = 1024 * 1024
TINY_BYTES = 2 * WIDTH * 4 * 8
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}

console = Console(stderr=True)
Answer = dict[str, float]


def matrices(size_bytes: int, dtype: str) -> dict[str, tuple[int, int]]:
    """Return names and shapes: some square matrices, and one of many rows."""
    rows = size_bytes // (WIDTH * DTYPES[dtype].itemsize)
    count = rows // (2 * WIDTH)
    squares = {f"layers.{number}.weight": (WIDTH, WIDTH) for number in range(count)}
    return squares | {"table.weight": (rows - count * WIDTH, WIDTH)}


def write_checkpoint(path: Path, shapes: dict[str, tuple[int, int]], dtype: str) -> dict[str, str]:
    """Write the file a block at a time, and return each tensor's digest."""
    kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (rows, columns) in shapes.items():
        size = rows * columns * kind.itemsize
        header[name] = {"dtype": dtype, "shape": [rows, columns], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    found = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, shape) in enumerate(shapes.items()):
            state = hashlib.sha256(f"{kind} {shape}\n".encode())
            left = shape[0] * shape[1]
            while left:
                block = numbers.roll(left % 977 + number)[:left].to(kind).view(torch.uint8).numpy().data
                state.update(block)
                file.write(block)
                left -= min(left, BLOCK)
            found[name] = state.hexdigest()
    return found


def factors(number: int, shapes: dict[str, tuple[int, int]]) -> dict[str, timstore.Factors]:
    """Return record `number`."""
    random = np.random.default_rng(number)
    return {
        name: timstore.Factors(
            random.standard_normal((TOKENS, columns), "float32"), random.standard_normal((TOKENS, rows), "float32")
        )
        for name, (rows, columns) in shapes.items()
    }


def fill(path: Path, shapes: dict[str, tuple[int, int]], digests: dict[str, str]) -> None:
    with timstore.open(path, "x", durability="os") as store:
        for number in range(RECORDS):
            store.append(0, number, number, factors(number, shapes), lr=LR)
            store.commit()  # objects stay small, so that the limit may be small
        store.append_fingerprints(0, RECORDS - 1, digests)


def roll_back(path: Path, store: Path, output: Path, limit: str) -> Answer:
    torch.ones(500, 500) @ torch.ones(500, 500)  # threads and buffers that any use of torch brings
    with timstore.open(store) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore", timstore.TimstoreWarning)  # no probe
        opened.sql("FROM records LIMIT 1").fetchall()
        forget_pages(path.parent)
        begun = time.process_time()
        with measured() as cost:
            opened.rollback(path, list(range(RECORDS)), output=output, memory_limit=limit, force=True)
    return {"seconds": cost.seconds, "peak": cost.peak_bytes, "processor": time.process_time() - begun}


def copy(path: Path, output: Path) -> Answer:
    forget_pages(path.parent)
    begun = time.process_time()
    with measured() as cost, path.open("rb", buffering=0) as source, output.open("wb", buffering=0) as to:
        while block := source.read(BLOCK):
            to.write(block)
        os.fsync(to.fileno())
    return {"seconds": cost.seconds, "peak": cost.peak_bytes, "processor": time.process_time() - begun}


def worst_row(path: Path, output: Path, shapes: dict[str, tuple[int, int]]) -> float:
    """Return how far a few rows of each matrix are from what they must be, in roundings of their dtype."""
    records = [factors(number, shapes) for number in range(RECORDS)]
    worst = 0.0
    with safe_open(path, "pt") as before, safe_open(output, "pt") as after:
        for name, (rows, _) in shapes.items():
            for row in (0, rows // 2, rows - 1):
                old, new = (one.get_slice(name)[row : row + 1] for one in (before, after))
                change = sum(one[name].output_gradients[:, row].astype("float64") @ one[name].inputs for one in records)
                wanted = old.double() + LR * torch.from_numpy(change)
                rounding = torch.finfo(old.dtype).eps * wanted.abs().max()
                worst = max(worst, float((new.double() - wanted).abs().max() / rounding))
    return worst


CALLS: dict[str, Callable[..., Answer]] = {"roll back": roll_back, "copy": copy}


def apart(name: str, *given: Any) -> Answer:
    """Run one of `CALLS` in a process of its own."""
    order = json.dumps([name, *given], default=str)
    answer = subprocess.run([sys.executable, __file__, "--apart", order], check=True, stdout=subprocess.PIPE, text=True)
    found: Answer = json.loads(answer.stdout)
    return found


def compare(folder: Path, size_bytes: int, dtype: str, limits: list[str]) -> Iterator[dict[str, Any]]:
    output = folder / "out.safetensors"
    (folder / "tiny").mkdir()
    sizes = {"tiny": TINY_BYTES, "": size_bytes}
    shapes = {place: matrices(size, dtype) for place, size in sizes.items()}
    for place in sizes:
        with console.status("writing a checkpoint and its store"):
            path = folder / place / "model.safetensors"
            fill(folder / place / "run.tim", shapes[place], write_checkpoint(path, shapes[place], dtype))
    with console.status("copying"):
        copied = apart("copy", path, output)
    output.unlink()
    yield _row("copy", path, copied, copied)
    for limit in limits:
        for place in sizes:
            path = folder / place / "model.safetensors"
            with console.status(f"rolling back under {limit}"):
                answer = apart("roll back", path, folder / place / "run.tim", output, limit)
            off = worst_row(path, output, shapes[place])
            output.unlink()
            name = f"roll back, limit {limit}" + (", tiny" if place else "")
            yield _row(name, path, answer, None if place else copied) | {"roundings off": off}


def _row(what: str, path: Path, answer: Answer, copied: Answer | None) -> dict[str, Any]:
    size = path.stat().st_size
    return {
        "what": what,
        "GB": size / 1e9,
        "s": answer["seconds"],
        "GB/s": size / answer["seconds"] / 1e9,
        "processor s": answer["processor"],
        "times a copy": answer["seconds"] / copied["seconds"] if copied else None,
        "peak MB": answer["peak"] / 1e6,
        "roundings off": None,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, help="of the checkpoint (4; --quick: 0.25)")
    parser.add_argument("--dtype", choices=DTYPES, default="F32")
    parser.add_argument("--limits", nargs="+", default=["64MB"], help="memory limits")
    parser.add_argument("--apart", help="one measurement, as JSON; for the benchmark itself")
    given = parser.parse_args()
    if given.apart:
        name, *rest, last = json.loads(given.apart)
        paths = [Path(one) for one in rest]
        print(json.dumps(CALLS[name](*paths, Path(last) if name == "copy" else last)))
        return
    gigabytes = given.gigabytes or (0.25 if given.quick else 4)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(compare(Path(folder), int(gigabytes * 1e9), given.dtype, given.limits))
    show(f"Rolling back a checkpoint on disk, {given.dtype}", rows, as_json=given.json)


if __name__ == "__main__":
    main()
