"""Rolling back from factors, against summing dense gradients from every layout that people keep them in.

Dense-equivalent bytes per second: what the chosen gradients would take as dense float32, over the seconds. The first
read finds nothing in the page cache; a warm one finds everything there. Every figure is measured in a process of its
own, in rounds over all of them, and is the median of the rounds; "/ mapped" and "/ JSON" are ratios of first reads.
A rollback is timed as called, on a handle whose tables are loaded: finding the records, summing, writing the rollback
down and changing the model. Peak memory is what the process holds beyond the model and the open store; pages of a
mapped file count. JSON and npz hold a few records only, the others all of them.

Run: python scripts/bench_rollback.py (about 4 minutes on two cores, 11 GB of disk; --quick for a small one, --sweep for
seconds and memory against the records asked for and the records in the store)
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gradient_layouts import LAYOUTS, forget_pages
from measuring import arguments, disk_bytes, measured, show
from rich.console import Console
from rich.progress import track
from rollback_stores import Shapes, products

import timstore

TOKENS = (64, 256, 1024)
LIMIT = "512MB"
LIMITS = ("96MB", "128MB", "256MB", "512MB")
FEW = {"JSON": 1, "npz": 4}
# Of the sweep: how many of a sample's records there are for each record of others.
OTHERS = (0, 1, 3, 7)

console = Console(stderr=True)
Answer = dict[str, float]


def roll_back(path: Path, layers: int, tokens: int, limit: str, ids: list[int], calls: int) -> Answer:
    """Return seconds of the first and of the fastest warm call, and the first one's peak memory."""
    shapes = Shapes(layers, tokens)
    model = shapes.model()
    torch.ones(500, 500) @ torch.ones(500, 500)  # threads and buffers that any use of torch brings
    with timstore.open(path) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore", timstore.TimstoreWarning)  # no probe, no fingerprint
        store.sql("FROM records LIMIT 1").fetchall()
        return _timed(path, calls, lambda: store.rollback(model, ids, memory_limit=limit, force=True, probe=False))


def add_up(path: Path, name: str, elements: int, calls: int) -> Answer:
    """Return the same of summing dense gradients in one layout."""
    count = FEW.get(name) or int((path / "records").read_text())
    weights = [1e-5 * (number + 1) for number in range(count)]
    return _timed(path, calls, lambda: LAYOUTS[name].add_up(path, weights, elements))


def multiply(layers: int, tokens: int, together: int, records: int) -> Answer:
    """Return seconds of the matrix products alone, everything in memory, the tokens of `together` records at once."""
    seconds = 0.0
    for left, right in products(Shapes(layers, tokens), together):
        total = torch.zeros(left.shape[1], right.shape[1])
        total.addmm_(left.T, right)
        begun = time.perf_counter()
        for _ in range(records // together):
            total.addmm_(left.T, right)
        seconds += time.perf_counter() - begun
    return {"warm": seconds}


def _timed(path: Path, calls: int, run: Callable[[], Any]) -> Answer:
    forget_pages(path)
    with measured() as cost:
        run()
    answer: Answer = {"first": cost.seconds, "peak": cost.peak_bytes}
    warm = []
    for _ in range(calls - 1):
        begun = time.perf_counter()
        run()
        warm.append(time.perf_counter() - begun)
    return answer | ({"warm": min(warm)} if warm else {})


CALLS: dict[str, Callable[..., Answer]] = {"roll back": roll_back, "add up": add_up, "multiply": multiply}


def apart(name: str, *given: Any) -> Answer:
    """Run one of `CALLS` in a process of its own."""
    order = json.dumps([name, *given], default=str)
    answer = subprocess.run([sys.executable, __file__, "--apart", order], check=True, capture_output=True, text=True)
    found: Answer = json.loads(answer.stdout)
    return found


def medians(rounds: int, calls: dict[str, tuple[Any, ...]]) -> dict[str, Answer]:
    """Run every call once a round; return the median of each figure."""
    found: dict[str, list[Answer]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in track(calls.items(), f"round {number + 1} of {rounds}", console=console, transient=True):
            found[name].append(apart(*call))
    return {
        name: {figure: statistics.median(one[figure] for one in answers) for figure in answers[0]}
        for name, answers in found.items()
    }


def compare(folder: Path, quick: bool, rounds: int, records: int, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    layers = 1 if quick else 2
    elements = Shapes(layers, 64).elements
    dense_bytes = elements * 4
    calls: dict[str, tuple[Any, ...]] = {}
    bytes_of: dict[str, float] = {}
    held: dict[str, int] = {}
    for tokens in track(lengths, "filling stores", console=console, transient=True):
        path = folder / f"tokens-{tokens}"
        shapes, name = Shapes(layers, tokens), f"timstore, {tokens} tokens"
        shapes.fill(path, records)
        calls[name] = "roll back", path, layers, tokens, LIMIT, list(range(records)), 3
        bytes_of[name], held[name] = disk_bytes(path) / records, records
        alone = f"torch.mm alone, {tokens} tokens"
        at_once = max(1, 1024 // tokens)
        calls[alone], held[alone] = ("multiply", layers, tokens, at_once, records), records
        alone = f"torch.mm alone, record by record, {tokens} tokens"
        if at_once > 1:
            calls[alone], held[alone] = ("multiply", layers, tokens, 1, records), records
    for name, one in track(LAYOUTS.items(), "writing dense layouts", console=console, transient=True):
        path = folder / name
        path.mkdir()
        held[name] = FEW.get(name, records)
        (path / "records").write_text(str(held[name]))
        (path / "elements").write_text(str(elements))
        one.write(path, map(Shapes(layers, 64).dense, range(held[name])), held[name], elements)
        bytes_of[name] = disk_bytes(path) / held[name]
        calls[name] = "add up", path, name, elements, 1 if name == "JSON" else 3
    # Twenty times the smallest limit.
    large, many = folder / "large", 16 if quick else 132
    Shapes(layers, 256).fill(large, many)
    for limit in LIMITS:
        name = f"timstore, 256 tokens, limit {limit}"
        calls[name] = "roll back", large, layers, 256, limit, list(range(many)), 1
        bytes_of[name], held[name] = disk_bytes(large) / many, many
    found = medians(rounds, calls)
    mapped = "memory-mapped float32"
    for name, answer in found.items():
        speed = {when: held[name] * dense_bytes / answer[when] / 1e9 for when in ("first", "warm") if when in answer}
        rates = {of: held[of] * dense_bytes / found[of]["first"] / 1e9 for of in (mapped, "JSON")}
        first = speed.get("first")
        yield {
            "what": name,
            "records": held[name],
            "GB/s first": first,
            "GB/s warm": speed.get("warm"),
            "/ mapped": first and first / rates[mapped],
            "/ JSON": first and first / rates["JSON"],
            "peak MB": answer["peak"] / 1e6 if "peak" in answer else None,
            "disk MB": held[name] * bytes_of[name] / 1e6 if name in bytes_of else None,
            "dense / disk": dense_bytes / bytes_of[name] if name in bytes_of else None,
        }


def sweep(folder: Path, quick: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield seconds and memory against the records asked for, and against those of others in the same store.

    Others' records lie beside the asked ones in every step, or in steps of their own after them.
    """
    most = 32 if quick else 128
    shapes = Shapes(1, 64)
    cases: list[tuple[Path, str, int, int]] = []
    for others in OTHERS:
        for laid in ("beside", "after") if others else ("none",):
            total = most * (1 + others)
            path = folder / f"{laid}-{others}"
            shapes.fill(path, total, sample=partial(_sample, others, total, most if laid == "after" else None))
            asked_for = (most // 8, most // 4, most // 2, most) if others in (0, OTHERS[-1]) else (most // 4,)
            cases += [(path, laid, total, asked) for asked in asked_for]
    calls = {str(case): ("roll back", case[0], 1, 64, LIMIT, list(range(case[3])), 3) for case in cases}
    for case, answer in zip(cases, medians(rounds, calls).values(), strict=True):
        path, laid, total, asked = case
        yield {
            "others": laid,
            "in store": total,
            "disk MB": disk_bytes(path) / 1e6,
            "asked for": asked,
            "s first": answer["first"],
            "s warm": answer["warm"],
            "ms a record, warm": answer["warm"] / asked * 1e3,
            "peak MB": answer["peak"] / 1e6,
        }


def _sample(others: int, total: int, before: int | None, number: int) -> int:
    """Return whose record `number` is: others' ids begin at `total`, their records after the first `before`."""
    if before is not None:
        return number if number < before else total + number
    place, share = divmod(number, 1 + others)
    return total + number if share else place


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sweep", action="store_true", help="seconds against records asked for and records stored")
    parser.add_argument("--rounds", type=int, help="of which medians are taken: 3, and 1 with --quick")
    parser.add_argument(
        "--records", type=int, help="of each store (64; --quick: 16): the fixed part of a call weighs less"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of a record")
    parser.add_argument("--apart", help="one measurement, as JSON; for the benchmark itself")
    given = parser.parse_args()
    if given.apart:
        name, first, *rest = json.loads(given.apart)
        print(json.dumps(CALLS[name](Path(first) if isinstance(first, str) else first, *rest)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rounds = given.rounds or (1 if given.quick else 3)
        records = given.records or (16 if given.quick else 64)
        if given.sweep:
            rows = list(sweep(Path(folder), given.quick, rounds))
        else:
            rows = list(compare(Path(folder), given.quick, rounds, records, given.tokens))
    if given.sweep:
        title = "Rollback against the records asked for, 1 layer of width 512, 64 tokens"
    else:
        title = "Rollback from factors and sums of dense gradients, Llama's layers of width 512"
    show(title, rows, as_json=given.json)


if __name__ == "__main__":
    main()
