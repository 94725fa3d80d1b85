"""What the scripts share: the time and the memory that a block of code costs."""

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil


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
