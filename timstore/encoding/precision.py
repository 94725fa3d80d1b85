"""How numbers are stored: as captured, as bfloat16, or as int8 with a scale per 64 values."""

import numpy as np

from timstore.records import BFLOAT16, narrow, widen

PRECISIONS = ("exact", "bfloat16", "int8")

# A part whose measured error is above the store's limit climbs to the next, finer rung.
LADDER = {"exact": ("exact",), "bfloat16": ("bfloat16", "exact"), "int8": ("int8", "bfloat16", "exact")}

SCALE_BLOCK = 64


def store_as(values: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (stored values, scales) of a 2-D matrix; scales are None unless the precision is int8.

    Shapes: values (n, d); int8 scales (n, ceil(d / 64)), bfloat16, rounded up so that no value saturates.
    """
    if precision == "exact":
        # A view made here: until it is on disk nothing shall hold on to small objects of the training thread's heap.
        return values.view(), None
    if precision == "bfloat16":
        return (values if values.dtype == BFLOAT16 else narrow(widen(values))), None
    wide = widen(values).astype(np.float32, copy=False)
    rows, width = wide.shape
    blocks = -(-width // SCALE_BLOCK)
    padded = np.zeros((rows, blocks * SCALE_BLOCK), np.float32)
    padded[:, :width] = wide
    grouped = padded.reshape(rows, blocks, SCALE_BLOCK)
    scales = _round_up(np.abs(grouped).max(axis=2) / 127)
    divisor = widen(scales)[:, :, None]
    quantised = np.divide(grouped, divisor, out=np.zeros_like(grouped), where=divisor > 0)
    return np.rint(quantised).astype(np.int8).reshape(rows, blocks * SCALE_BLOCK)[:, :width], scales


def restore(values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Return stored values as numbers: float64 stays, every other dtype becomes float32."""
    if scales is None:
        return widen(values)
    restored: np.ndarray = values * np.repeat(widen(scales), SCALE_BLOCK, axis=1)[:, : values.shape[1]]
    return restored


def _round_up(scales: np.ndarray) -> np.ndarray:
    """Round non-negative float32 up to bfloat16."""
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    return ((bits + 0xFFFF) >> 16).astype("<u2").view(BFLOAT16)
