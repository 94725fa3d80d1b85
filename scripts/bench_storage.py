"""Bytes on disk per record, everything counted: timstore against the other ways to keep per-sample gradients.

Real training steps on sources of the standard library; every layout holds the same numbers, read back from the exact
store. timstore holds all the records; the others are linear in them and written for a few.
"""

import json
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from measuring import arguments, disk_bytes, show
from recordings import BLOCKS, TIED, UNTIED, Net, matrices, record
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save_file

import timstore
from timstore.encoding import PRECISIONS
from timstore.format.zarr_shards import ArrayLayout, encode_shards
from timstore.records import BFLOAT16

Dense = list[dict[str, np.ndarray]]
OTHERS, JSON_RECORDS = 2, 1
JSON = f"JSON, {JSON_RECORDS} record"


@dataclass(frozen=True)
class Setting:
    """What is recorded.

    Attributes:
        others: whether the other layouts are written too.
    """

    net: Net
    tokens: int
    masked: str = ""
    others: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.net.name}, {self.tokens} tokens" + (f", {self.masked}" if self.masked else "")


# The one whose bytes per number the arithmetic of larger nets takes.
MEASURED = Setting(TIED, 64, others=True)
QUICK = [Setting(TIED, 64), Setting(BLOCKS, 64, others=True)]
FULL = [
    MEASURED,
    Setting(UNTIED, 64),
    Setting(TIED, 256),
    Setting(TIED, 512),
    Setting(TIED, 64, "padded"),
    Setting(TIED, 64, "prompt"),
    Setting(BLOCKS, 64, others=True),
]


@dataclass(frozen=True)
class Scale:
    """How much is trained and recorded, and where the stores lie."""

    steps: int
    records: int
    folder: Path


def raw(records: Dense, path: Path) -> None:
    with path.open("wb") as file:
        for one in records:
            for gradient in one.values():
                gradient.tofile(file)


def npz(records: Dense, path: Path) -> None:
    np.savez_compressed(path, **_numbered(records))


def pickled(records: Dense, path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(records, file, protocol=pickle.HIGHEST_PROTOCOL)


def as_json(records: Dense, path: Path) -> None:
    """Write the TIM layout: sample to parameter to nested lists."""
    with path.open("w") as file:
        lists = {str(number): {name: one.tolist() for name, one in r.items()} for number, r in enumerate(records)}
        json.dump({"sample_gradients": lists}, file)


def dense_zarr(records: Dense, path: Path) -> None:
    group = zarr.open_group(path, mode="w")
    for name, gradient in _numbered(records).items():
        group.create_array(name, data=gradient)


def safetensors(records: Dense, path: Path) -> None:
    save_file({name: np.ascontiguousarray(one) for name, one in _numbered(records).items()}, path)


LAYOUTS: dict[str, tuple[int, Callable[[Dense, Path], None]]] = {
    "dense fp32, raw": (OTHERS, raw),
    "npz, compressed": (OTHERS, npz),
    "pickle": (OTHERS, pickled),
    "safetensors": (OTHERS, safetensors),
    "dense Zarr, defaults": (OTHERS, dense_zarr),
    JSON: (JSON_RECORDS, as_json),
}


def _numbered(records: Dense) -> dict[str, np.ndarray]:
    return {f"{number}/{name}": one for number, record in enumerate(records) for name, one in record.items()}


def overhead(path: Path) -> int:
    """Return the bytes of a store that are no shards: row tables, records of the log, metadata of arrays."""
    return disk_bytes(path) - sum(disk_bytes(shard) for shard in path.glob("data/*/*/z/*/c"))


def recorded(setting: Setting, precision: str, scale: Scale) -> Path:
    """Return a store of the setting's records; the same one when asked again."""
    path = scale.folder / f"{setting}, {precision}.tim"
    if not path.exists():
        options = {"precision": precision, "tokens": setting.tokens, "masked": setting.masked}
        record(setting.net, path, records=scale.records, steps=scale.steps, **options)
    return path


def weigh(setting: Setting, scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield a row for each layout of a setting's records."""
    for precision in PRECISIONS:
        path = recorded(setting, precision, scale)
        with timstore.open(path, "r") as store:
            raw_bytes = 4 * int(store.sql("SELECT sum(numel) FROM parameters").fetchall()[0][0])
            errors = store.sql("SELECT median(rel_error), max(rel_error) FROM gradients").fetchall()[0]
            if setting.others and precision == "exact":
                dense = [{n: one.dense(n) for n in one.gradients} for one in islice(store.read(), OTHERS)]
        written = disk_bytes(path)
        found = row(setting, f"timstore, {precision}", scale.records, written / scale.records, raw_bytes, errors)
        yield found | {"not arrays": f"{overhead(path) / written:.2%}"}
        if setting != MEASURED:
            shutil.rmtree(path)
    for name, (count, write) in LAYOUTS.items() if setting.others else ():
        with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
            path = Path(folder, "records.npz")
            write(dense[:count], path)
            yield row(setting, name, count, disk_bytes(path) / count, raw_bytes, (0.0, 0.0))


def row(
    setting: object, layout: str, records: int | str, each: float, raw_bytes: int, errors: tuple[float, float]
) -> dict[str, Any]:
    return {
        "net": str(setting),
        "layout": layout,
        "records": records,
        "KB/record": each / 1e3,
        "of raw": each / raw_bytes,
        "raw/this": raw_bytes / each,
        "JSON/this": None,
        "median err": f"{errors[0]:.2%}",
        "largest err": f"{errors[1]:.2%}",
        "not arrays": None,
    }


def bytes_per_number(path: Path, net: Net) -> dict[str, float]:
    """Return stored bytes per number of inputs, output gradients, the head's, and values; int8 with its scales."""
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for kind, matrix in matrices(path, net):
        found.setdefault((kind, f"{matrix.shape[1]}-{matrix.dtype}"), []).append(matrix)
    stored: dict[str, float] = {}
    numbers: dict[str, int] = {}
    for (kind, _), pieces in found.items():
        rows = np.concatenate(pieces)
        layout = ArrayLayout.plan(*rows.shape, rows.dtype if rows.dtype != np.uint16 else BFLOAT16)
        plain = rows.view(layout.numpy_dtype)

        def fill(first: int, out: np.ndarray, plain: np.ndarray = plain) -> None:
            out[:] = plain[first : first + len(out)]

        base = kind.removesuffix(" scales")
        stored[base] = stored.get(base, 0) + sum(len(shard.data) for shard in encode_shards(layout, fill))
        numbers[base] = numbers.get(base, 0) + (0 if kind.endswith("scales") else rows.size)
    return {base: stored[base] / numbers[base] for base in stored}


def of_a_billion(scale: Scale, tokens: int) -> Iterator[dict[str, Any]]:
    """Yield rows for a record of a Llama of 1.2 billion parameters: its shapes, times what numbers of each kind took in
    the net of width 512. Every token counts as a row, also those that the embedding or a mask would leave out.
    """
    width, inner, depth, keys, vocabulary = 2048, 8192, 16, 512, 128_256
    weights = depth * (2 * width * width + 2 * width * keys + 3 * width * inner) + vocabulary * width
    counts = {
        "inputs": tokens * (depth * (3 * width + inner) + width),
        "output gradients": tokens * depth * (3 * width + 2 * keys + 2 * inner),
        "head's output gradients": tokens * vocabulary,
        "values": tokens * width + (2 * depth + 1) * width,
    }
    for precision in PRECISIONS:
        each = bytes_per_number(recorded(MEASURED, precision, scale), MEASURED.net)
        total = sum(count * each[kind] for kind, count in counts.items())
        raw_bytes = 4 * (weights + (2 * depth + 1) * width)
        name = f"1.2 B*, {tokens} tokens"
        found = row(name, f"timstore, {precision}", "", total, raw_bytes, (0.0, 0.0))
        yield found | {"median err": None, "largest err": None}


def main() -> None:
    options = arguments(__doc__).parse_args()
    settings, (steps, records) = (QUICK, (4, 8)) if options.quick else (FULL, (60, 16))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scale = Scale(steps, records, Path(folder))
        for setting in track(settings, "settings", transient=True, console=Console(stderr=True)):
            found = list(weigh(setting, scale))
            json_bytes = {one["layout"]: one["KB/record"] for one in found}.get(JSON)
            rows += [one | {"JSON/this": json_bytes and json_bytes / one["KB/record"]} for one in found]
        for tokens in (64, 256, 512):
            rows += of_a_billion(scale, tokens)
    title = f"Bytes per record after {steps} steps of training; * by arithmetic, from the bytes per number of 512 tied"
    show(title, rows, as_json=options.json)


if __name__ == "__main__":
    main()
