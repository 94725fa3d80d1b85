"""Other libraries that take per-sample gradients, each in a virtual environment of its own.

Started by bench_record.py: makes the environment of a peer, and measures the peer in it against the bare loop.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

PINS = Path(__file__).with_name("constraints.txt")
# Name on the package index, and what it is called in a table.
PEERS = {"opacus": "Opacus GradSampleModule, npy", "dattri-llm": "dattri-LLM, factors"}


def cached(name: str) -> Path:
    """Return the folder in the user's cache for what is installed once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timstore-benchmarks" / name


def install(python: str | Path, *options: str | Path) -> None:
    """Run `pip install`.

    Raises:
        RuntimeError: with one line that says why it cannot be installed.
    """
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(next(iter(reversed(answer.stderr.strip().splitlines())), "pip failed"))


def environment(peer: str) -> Path:
    """Return the Python of a peer's environment, made at the first call and kept in the user's cache.

    Raises:
        RuntimeError: with one line that says why the peer cannot be installed.
    """
    cache = cached(peer)
    python, done = cache / "bin" / "python", cache / "complete"
    pins = PINS.read_text()
    if done.exists() and done.read_text() == pins:
        return python
    print(f"installing {peer} into an environment of its own", file=sys.stderr)
    venv.create(cache, clear=True, with_pip=True)
    install(python, "-c", PINS, "numpy", peer)
    done.write_text(pins)
    return python


def measure(peer: str, work: Any, width: int, repeats: int, threads: int) -> dict[str, Any]:
    """Return the costs of each repeat, `bare` and its `own` (the fields of `loops.Run`), and `bytes` on disk.

    Args:
        work: what `loops.transformer_work` returned, of this width.

    Raises:
        RuntimeError: with one line that says why there are no figures.
    """
    import torch

    python = environment(peer)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(work.tokens, Path(folder, "tokens.pt"))
        numbers = map(str, (work.steps, width, repeats, threads))
        command = [python, __file__, peer, Path(folder, "tokens.pt"), *numbers]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        answer = subprocess.run(command, capture_output=True, text=True, env=clean)
    if answer.returncode:
        raise RuntimeError(next(iter(reversed(answer.stderr.strip().splitlines())), "it failed"))
    figures: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return figures


def main(peer: str, tokens: str, steps: int, width: int, repeats: int, threads: int) -> None:
    import torch
    from loops import bare, timed, transformer_work

    torch.set_num_threads(threads)
    recorded: dict[str, Callable[..., None]] = {"opacus": with_opacus, "dattri-llm": with_dattri}
    work = transformer_work(torch.load(tokens), steps, width)
    few = transformer_work(torch.load(tokens), 2, width)
    figures: dict[str, list[Any]] = {"bare": [], "own": [], "bytes": []}
    bare(few, *few.begin())
    for number in range(repeats + 1):
        now = work if number else few  # the first round warms up
        plain = timed(lambda now=now: bare(now, *now.begin()))
        with tempfile.TemporaryDirectory() as folder:
            own = timed(lambda now=now, folder=folder: recorded[peer](now, *now.begin(), Path(folder)))
            size = sum(one.stat().st_size for one in Path(folder).rglob("*") if one.is_file())
        if number:
            for name, value in zip(figures, (vars(plain), vars(own), size), strict=True):
                figures[name].append(value)
    print(json.dumps(figures))


def with_opacus(work: Any, model: Any, optimizer: Any, folder: Path) -> None:
    from loops import Npy, finish
    from opacus import GradSampleModule

    files = Npy(folder)
    # `sum`: the loss's mean is in it already.
    wrapped = GradSampleModule(model, loss_reduction="sum")
    parameters = [one for one in wrapped.parameters() if one.requires_grad]
    for step, ids in enumerate(work.batches()):
        tokens = work.tokens[ids]
        work.loss(work.logits(wrapped, tokens), tokens).backward()
        files.write(step, [one.grad_sample for one in parameters])
        finish(wrapped, optimizer)
        for one in parameters:
            one.grad_sample = None


def with_dattri(work: Any, model: Any, optimizer: Any, folder: Path) -> None:
    from dattri_llm import REGISTER_ALL, GradientStorageManager, HookManager, HookManagerConfig, OffloadCallback
    from loops import bare

    store = GradientStorageManager(str(folder))
    callback = OffloadCallback(offload_interval=1, file_manager=store, recording_type="per_sample", async_write=True)
    manager = HookManager(model, config=HookManagerConfig(linear_io=REGISTER_ALL), callbacks=[callback])
    with manager.collect():
        bare(work, model, optimizer)
    manager.remove()
    store.close()
    # It leaves its files to the system; the others are on disk when their time stops.
    for one in folder.rglob("*"):
        if one.is_file():
            with open(one, "rb") as file:
                os.fsync(file.fileno())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(one) for one in sys.argv[3:7]))
