"""Dense gradients as people keep them by hand, one way each: written once, and summed with a weight per record.

Every layout holds the same (records, elements) float32 numbers. `add_up` returns sum_r w_r g_r, one record in memory
at a time where the layout allows it.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr

Records = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Layout:
    """One way to keep dense gradients.

    Attributes:
        write: given (folder, records, their number, elements of each).
        records: yields the record arrays of a folder.
    """

    write: Callable[[Path, Iterator[np.ndarray], int, int], None]
    records: Callable[[Path], Iterator[np.ndarray]]

    def add_up(self, folder: Path, weights: Sequence[float], elements: int) -> torch.Tensor:
        total = torch.zeros(elements)
        for weight, record in zip(weights, self.records(folder), strict=True):
            total.add_(torch.from_numpy(record), alpha=weight)
        return total


def _write_mapped(folder: Path, records: Iterator[np.ndarray], count: int, elements: int) -> None:
    with open(folder / "gradients.f32", "wb", buffering=0) as file:
        for record in records:
            file.write(memoryview(record).cast("B"))


def _read_mapped(folder: Path) -> Iterator[np.ndarray]:
    path = folder / "gradients.f32"
    elements = json.loads((folder / "elements").read_text())
    # Copy on write: torch wants memory that it may write to.
    yield from np.memmap(path, np.float32, "c", shape=(path.stat().st_size // (4 * elements), elements))


def _write_zarr(folder: Path, records: Iterator[np.ndarray], count: int, elements: int) -> None:
    array = zarr.create_array(folder / "gradients.zarr", shape=(count, elements), dtype="float32")
    rows = array.chunks[0]
    block: list[np.ndarray] = []
    for number, record in enumerate(records, 1):
        block.append(record)
        if len(block) == rows or number == count:
            array[number - len(block) : number] = np.stack(block)
            block.clear()


def _read_zarr(folder: Path) -> Iterator[np.ndarray]:
    array = zarr.open_array(folder / "gradients.zarr", mode="r")
    rows = array.chunks[0]
    # Whole chunks: read record by record, each chunk would be decoded as often as it has rows.
    for start in range(0, array.shape[0], rows):
        yield from array[start : start + rows]


def _write_npz(folder: Path, records: Iterator[np.ndarray], count: int, elements: int) -> None:
    for number, record in enumerate(records):
        np.savez_compressed(folder / f"{number:06d}.npz", gradient=record)


def _read_npz(folder: Path) -> Iterator[np.ndarray]:
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            yield arrays["gradient"]


def _write_pickle(folder: Path, records: Iterator[np.ndarray], count: int, elements: int) -> None:
    for number, record in enumerate(records):
        (folder / f"{number:06d}.pkl").write_bytes(pickle.dumps(record))


def _read_pickle(folder: Path) -> Iterator[np.ndarray]:
    for path in sorted(folder.glob("*.pkl")):
        yield pickle.loads(path.read_bytes())


def _write_json(folder: Path, records: Iterator[np.ndarray], count: int, elements: int) -> None:
    for number, record in enumerate(records):
        (folder / f"{number:06d}.json").write_text(json.dumps({"gradient": record.tolist()}))


def _read_json(folder: Path) -> Iterator[np.ndarray]:
    for path in sorted(folder.glob("*.json")):
        yield np.array(json.loads(path.read_text())["gradient"], np.float32)


LAYOUTS = {
    "memory-mapped float32": Layout(_write_mapped, _read_mapped),
    "Zarr, dense": Layout(_write_zarr, _read_zarr),
    "npz": Layout(_write_npz, _read_npz),
    "pickle": Layout(_write_pickle, _read_pickle),
    "JSON": Layout(_write_json, _read_json),
}


def forget_pages(path: Path) -> None:
    """Make the next read of every file below a folder come from the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            number = os.open(file, os.O_RDONLY)
            try:
                os.fsync(number)
                os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(number)
