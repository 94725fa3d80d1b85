"""Codecs on real gradients: how small, how fast, and what entropy leaves to gain.

Rows of a Llama of width 512 trained on sources of the standard library, forward inputs and output gradients apart, in
every precision. One thread: the writer must not take the training's cores.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import arguments, show
from numcodecs import blosc
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from recordings import TIED, matrices, record, seconds_per_sample

KB = 1024
TOKENS = 64
# Fewer bytes of a kind say nothing about speed.
LEAST_BYTES = 400 * KB
SHORT = {np.dtype(name): short for name, short in (("f4", "fp32"), ("u2", "bf16"), ("i1", "int8"), ("i4", "int32"))}
DEFAULT, EARLIER = "zstd 1 byte 512K", "lz4 5 bit"


@dataclass(frozen=True)
class Codec:
    """A codec that Zarr v3 has, at a chunk size.

    Attributes:
        name: Blosc's compressor, level, shuffle and block size (its own choice where none is named); or Zstd alone.
    """

    name: str
    encoder: Blosc | Zstd
    chunk_bytes: int = 512 * KB


def codecs(quick: bool) -> Iterator[Codec]:
    """Yield the codecs: all at chunks of 512 KB, what is written and what format 1.1 wrote at every size."""
    shuffles = {"byte": Blosc.SHUFFLE, "bit": Blosc.BITSHUFFLE}
    levels = (1,) if quick else (1, 3, 5, 9)
    yield Codec(DEFAULT, Blosc("zstd", 1, Blosc.SHUFFLE, 512 * KB))
    yield Codec(EARLIER, Blosc("lz4", 5, Blosc.BITSHUFFLE))
    yield Codec("lz4 5 byte", Blosc("lz4", 5, Blosc.SHUFFLE))
    for level in levels:
        for name, shuffle in shuffles.items():
            yield Codec(f"zstd {level} {name}", Blosc("zstd", level, shuffle))
            if level > 1 or name == "bit":
                yield Codec(f"zstd {level} {name} 512K", Blosc("zstd", level, shuffle, 512 * KB))
    for level in levels:
        yield Codec(f"Zstd {level} alone", Zstd(level))
    for kilobytes in () if quick else (64, 128, 256, 1024):
        block = min(kilobytes, 512)
        yield Codec(f"zstd 1 byte {block}K", Blosc("zstd", 1, Blosc.SHUFFLE, block * KB), kilobytes * KB)
        yield Codec(EARLIER, Blosc("lz4", 5, Blosc.BITSHUFFLE), kilobytes * KB)


def entropy_bits(numbers: np.ndarray) -> float:
    """Return bits per number that no code of single numbers goes below: of floats sign and exponent count by their
    entropy, mantissas whole.
    """
    mantissa = {4: 23, 2: 7, 1: 0}[numbers.itemsize]
    bits = numbers.reshape(-1).view(f"u{numbers.itemsize}")
    counts = np.unique(bits >> np.array(mantissa, bits.dtype), return_counts=True)[1]
    chances = counts / counts.sum()
    return mantissa - float((chances * np.log2(chances)).sum())


def fastest(work: Callable[[], list[bytes]], repeats: int) -> tuple[list[bytes], float]:
    """Return what the work gives, and the seconds of the fastest of so many tries."""
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        made = work()
        taken.append(time.perf_counter() - begun)
    return made, min(taken)


def weigh(numbers: np.ndarray, codec: Codec, most_bytes: int) -> dict[str, float]:
    """Return ratio and speeds over chunks taken evenly out of the numbers."""
    data, size = numbers.reshape(-1), codec.chunk_bytes // numbers.itemsize
    whole = [data[start : start + size] for start in range(0, len(data), size)]
    whole = [chunk for chunk in whole if len(chunk) == size] or whole
    slow = " 9 " in codec.name
    most_bytes, repeats = (most_bytes // 8, 1) if slow else (most_bytes, 3)
    chunks = whole[:: max(1, len(whole) * codec.chunk_bytes // most_bytes)]
    encoded, encode = fastest(lambda: [codec.encoder.encode(chunk) for chunk in chunks], repeats)
    _, decode = fastest(lambda: [codec.encoder.decode(chunk) for chunk in encoded], repeats)
    total = sum(chunk.nbytes for chunk in chunks)
    return {
        "ratio": total / sum(map(len, encoded)),
        "enc GB/s": total / encode / 1e9,
        "dec GB/s": total / decode / 1e9,
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    blosc.set_nthreads(1)
    steps, records = (3, 8) if options.quick else (30, 8)
    rows = []
    step_seconds = seconds_per_sample(TIED, TOKENS, steps)
    for precision in ("exact", "bfloat16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "run.tim")
            record(TIED, path, precision=precision, tokens=TOKENS, records=records, steps=steps)
            kinds: dict[str, list[np.ndarray]] = {}
            for kind, matrix in matrices(path, TIED):
                kinds.setdefault(f"{kind}, {SHORT[matrix.dtype]}", []).append(matrix.reshape(-1))
        for kind, found in kinds.items():
            numbers = np.concatenate(found)
            if numbers.nbytes < LEAST_BYTES:
                continue
            bound = 8 * numbers.itemsize / entropy_bits(numbers)
            for codec in codecs(options.quick):
                figures = weigh(numbers, codec, (4 if options.quick else 8) * KB * KB)
                each = numbers.nbytes / records
                rows.append(
                    {
                        "precision": precision,
                        "numbers": kind,
                        "MB/record": each / 1e6,
                        "codec": codec.name,
                        "chunk": codec.chunk_bytes // KB,
                        **figures,
                        "entropy": bound,
                        "% of step": 100 * each / figures["enc GB/s"] / 1e9 / step_seconds,
                    }
                )
    title = f"Codecs, one thread; a training step takes {1e3 * step_seconds:.0f} ms per sample"
    show(title, rows, as_json=options.json)


if __name__ == "__main__":
    main()
