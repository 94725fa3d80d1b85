"""What recording costs a training loop, against the bare loop and against other ways to take per-sample gradients.

Each figure is the median of interleaved repeats over the median of the bare loop in the same process; opening,
`close()` and syncs included. "Later steps" are those from the sixth on alone, without what is done once. CPU time is
that of all threads, over the bare loop's. Extra memory is the peak beyond the bare loop's. "Of raw": all bytes on disk,
the optimizer's state included, over those of the same gradients of every trained parameter as float32.

Settings, all with AdamW, clipping and batches of 8 samples:

- width 128, width 512: a transformer of depth 4 on sequences of 64 tokens of the standard library, with 655,360 and
  10.5 million weights (a fifth of the steps, which take ten times as long);
- demo's Llama: on the same sequences;
- ViT, ResNet: transformers' own, of 2.7 and 2.8 million weights, on scikit-learn's digits at 32 x 32 pixels (an
  eighth and a third of the steps);
- GPT-2 + LoRA: transformers' GPT-2 of width 256 and depth 6 with peft's adapters, 196,608 weights, on the same
  sequences as the Llama (a tenth of the steps);
- sentence encoder: all-MiniLM-L6-v2, 22.6 million weights, on functions of the standard library and docstrings, of 64
  tokens each, where a sample is two rows of the model's batch (an eighth of the steps). Its weights come from the
  package index at the first call, and stay in the user's cache.

Opacus and dattri-LLM are installed into environments of their own (in the user's cache), and measured there at width
128, dattri-LLM also at width 512, against the bare loop there. `torch.func` is measured with the first three settings
alone. A pass of each sample is not measured with the ResNet, whose BatchNorm makes another loss of a batch of one.

Run: python scripts/bench_record.py (about an hour on two cores; --repeats 2 --only timstore: 15 minutes; --quick for a
look; --sweep for growth)
"""

import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from language import Text, new_model
from loops import BATCH, Run, Work, backward_per_sample, bare, timed, transformer_work, vmapped
from measuring import arguments, disk_bytes, show
from peers import PEERS, measure
from real_models import REAL_MODELS
from rich.console import Console
from rich.progress import track

import timstore

NOWHERE = 2**40  # the id of no sample
Case = Callable[[Work, Path], None]


def recorded(samples: Callable[[int], Iterable[int]], precision: str = "exact") -> Case:
    """Return the loop under a recorder of the samples that a number of sequences is drawn from."""

    def run(work: Work, folder: Path) -> None:
        model, optimizer = work.begin()
        with (
            timstore.open(folder / "store.tim", precision=precision) as store,
            store.record(model, optimizer, samples=samples(len(work.tokens))),
        ):
            bare(work, model, optimizer, named=True)

    return run


CASES: dict[str, Case] = {
    "bare loop": lambda work, folder: bare(work, *work.begin()),
    "timstore, nothing to record": recorded(lambda count: [NOWHERE]),
    "timstore, 1 of 8": recorded(lambda count: range(0, count, BATCH)),
    "timstore, all 8": recorded(range),
    "backward per sample, npy": lambda work, folder: backward_per_sample(work, *work.begin(), folder),
    "torch.func vmap(grad), npy": lambda work, folder: vmapped(work, *work.begin(), folder),
}
# Records of a step; of all samples of the batch where nothing is said.
RECORDS = {"bare loop": 0, "timstore, nothing to record": 0, "timstore, 1 of 64": 1 / 8, "timstore, 1 of 8": 1}
GOALS = {"timstore, nothing to record": 1.02, "timstore, 1 of 8": 1.05, "timstore, all 8": 1.5}


def llama_work(tokens: torch.Tensor, steps: int) -> Work:
    return Work(new_model, lambda model, tokens, **more: model(input_ids=tokens, **more).logits, tokens, steps)


def sequences(steps: int) -> torch.Tensor:
    """Return the sequences of so many steps, or as many as there are: each once, so that no record is found known."""
    return Text.read(0).tuning[: steps * BATCH]


WIDTH_128, WIDTH_512 = "width 128", "width 512"
# What is measured of whom: dense gradients of width 512 are 17 GB.
OTHERS = {WIDTH_128: (128, list(PEERS)), WIDTH_512: (512, ["dattri-llm"])}
SETTINGS: dict[str, Callable[[int], Work]] = {
    WIDTH_128: lambda steps: transformer_work(sequences(steps), steps),
    "demo's Llama": lambda steps: llama_work(sequences(steps), steps),
    WIDTH_512: lambda steps: transformer_work(sequences(steps), max(2, steps // 5), 512),
    **REAL_MODELS,
}


def fits(setting: str, case: str) -> bool:
    """Tell whether a case is measured with a setting."""
    if setting == "ResNet" and case.startswith("backward per sample"):
        return False
    return setting not in REAL_MODELS or "vmap" not in case


def compare(setting: str, work: Work, repeats: int, cases: dict[str, Case]) -> list[dict[str, Any]]:
    """Return a row per case; a case that fails says why instead."""
    few = replace(work, steps=2, moments=[])
    trained = sum(one.numel() for one in work.begin()[0].parameters() if one.requires_grad)
    found: dict[str, list[tuple[Run, int]]] = {name: [] for name in cases}
    failed: dict[str, str] = {}
    for number in track(range(repeats + 1), setting, console=Console(stderr=True), transient=True):
        for name, case in cases.items():
            if name in failed:
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:  # the first round warms up
                    run = timed(lambda case=case, now=work if number else few, at=Path(folder): case(now, at))
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:80]
                    continue
                if number:
                    run.later_seconds = work.later_seconds
                    found[name].append((run, disk_bytes(Path(folder))))
    rows = []
    for name, runs in found.items():
        if name in failed:
            rows.append({"setting": setting, "case": f"{name} ({failed[name]})"})
            continue
        plain = [one for one, _ in found["bare loop"]]
        sizes = [size for _, size in runs]
        rows.append(row(setting, name, work.steps, trained, [one for one, _ in runs], plain, sizes))
    return rows


def row(
    setting: str, case: str, steps: int, trained: int, own: list[Run], plain: list[Run], sizes: list[int]
) -> dict[str, Any]:
    """Return the figures of a case, of a model with so many trained weights."""

    def median(runs: list[Run], field: str) -> float:
        return statistics.median(getattr(one, field) for one in runs)

    later = median(own, "later_seconds") / median(plain, "later_seconds")
    raw = steps * RECORDS.get(case, BATCH) * trained * 4
    ratios = [one.seconds / other.seconds for one, other in zip(own, plain, strict=True)]
    on_device = {}
    if plain[0].device_bytes:
        on_device["extra GPU MB"] = max(0.0, (median(own, "device_bytes") - median(plain, "device_bytes")) / 1e6)
    return {
        "setting": setting,
        "case": case,
        "steps": steps,
        "ms a step": median(own, "seconds") / steps * 1e3,
        "of the bare loop": median(own, "seconds") / median(plain, "seconds"),
        "lowest - highest": f"{min(ratios):.2f} - {max(ratios):.2f}",
        "later steps": None if math.isnan(later) else later,
        "goal": GOALS.get(case),
        "CPU time": median(own, "cpu_seconds") / median(plain, "cpu_seconds"),
        "extra MB": max(0.0, (median(own, "peak_bytes") - median(plain, "peak_bytes")) / 1e6),
        **on_device,
        "MB on disk": statistics.median(sizes) / 1e6,
        "of raw": statistics.median(sizes) / raw if raw else None,
    }


def peer_rows(setting: str, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each of the other libraries that is measured in a setting."""
    rows = []
    width, peers = OTHERS.get(setting, (0, []))
    for peer in peers:
        work = SETTINGS[setting](steps)
        trained = sum(one.numel() for one in work.begin()[0].parameters())
        try:
            found = measure(peer, work, width, repeats, torch.get_num_threads())
        except (RuntimeError, OSError) as error:
            print(f"{PEERS[peer]}: left out: {error}", file=sys.stderr)
            continue
        own, plain = ([Run(**one) for one in found[kind]] for kind in ("own", "bare"))
        rows.append(row(setting, PEERS[peer], work.steps, trained, own, plain, found["bytes"]))
    return rows


def sweep(quick: bool) -> list[dict[str, Any]]:
    """Return a row per number of samples and of tokens: what their records take in bytes and in time."""
    rows = []
    text = Text.read(0).pre.flatten()
    for tokens in (32, 64, 128) if quick else (16, 32, 64, 128, 256):
        for samples in (32, 128) if quick else (32, 64, 128, 256):
            own, plain, size = [], [], 0
            work = transformer_work(text[: samples * tokens].view(samples, tokens), samples // BATCH)
            for _ in range(3):
                plain.append(timed(lambda work=work: bare(work, *work.begin())).seconds)
                with tempfile.TemporaryDirectory() as folder:
                    own.append(timed(lambda work=work, at=Path(folder): recorded(range)(work, at)).seconds)
                    size = disk_bytes(Path(folder))
            more = statistics.median(own) - statistics.median(plain)
            rows.append(
                {
                    "samples": samples,
                    "tokens": tokens,
                    "MB": size / 1e6,
                    "bytes a token": size / (samples * tokens),
                    "seconds": statistics.median(own),
                    "seconds of the bare loop": statistics.median(plain),
                    "us more a token": more / (samples * tokens) * 1e6,
                }
            )
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sweep", action="store_true", help="bytes and time against samples and tokens instead")
    parser.add_argument("--steps", type=int, help="optimizer steps of every measurement (250; --quick: 10)")
    parser.add_argument("--repeats", type=int, help="(5; --quick: 2)")
    parser.add_argument("--threads", type=int, help="that torch may use (all cores)")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--only", metavar="WORD", help="cases whose name holds it, beside the bare loop")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.sweep:
        show("Growth of recording, all samples, transformer of width 128", sweep(given.quick), as_json=given.json)
        return
    steps, repeats = given.steps or (10 if given.quick else 250), given.repeats or (2 if given.quick else 5)
    cases = {name: case for name, case in CASES.items() if not given.only or given.only in name or name == "bare loop"}
    # It warns that the ResNet's BatchNorm mixes samples: that changes what a record means, not what it costs.
    warnings.filterwarnings("ignore", "module .* mixes the samples of a batch", timstore.TimstoreWarning)
    rows = []
    for setting in given.settings:
        try:
            work = SETTINGS[setting](steps)
        except (RuntimeError, OSError) as error:
            print(f"{setting}: left out: {error}", file=sys.stderr)
            continue
        rows += compare(setting, work, repeats, {name: case for name, case in cases.items() if fits(setting, name)})
        rows += [] if given.only else peer_rows(setting, steps, repeats)
    if not rows:
        sys.exit("nothing was measured")
    title = f"Cost of recording: steps of {BATCH} samples, {torch.get_num_threads()} threads"
    show(title, rows, as_json=given.json)


if __name__ == "__main__":
    main()
