"""An epoch's file as a pickle: the whole of it in memory, read by an unpickler that runs nothing."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from timstore.errors import FormatError, InvalidInputError
from timstore.legacy.layout import GRADIENTS
from timstore.legacy.pickles import read_pickle
from timstore.legacy.visits import Visit, narrowed
from timstore.records import as_array


def read_pickled(path: Path) -> Iterator[Visit]:
    """Yield every sample's key of an epoch's file.

    Raises:
        FormatError: it is no pickle of the layout, or names something that is not plain data; nothing of it was run.
    """
    whole = read_pickle(path)
    samples = whole.get(GRADIENTS) if isinstance(whole, Mapping) else None
    if not isinstance(samples, Mapping):
        raise FormatError(f"{path}: it has no {GRADIENTS}: it is of another layout", path=str(path))
    for key, held in samples.items():
        where = f"{path}, sample {key!r:.80}"
        if not isinstance(held, Mapping):
            raise FormatError(f"{where}: it is no mapping of parameters", path=str(path))
        arrays: list[np.ndarray] = []
        visit = Visit(key, arrays.__getitem__)
        for name, value in held.items():
            if not isinstance(name, str):
                raise FormatError(f"{where}: parameters are named by text, not {name!r:.80}", path=str(path))
            if isinstance(value, int | float) and not isinstance(value, bool):
                visit.scalars.setdefault(name, []).append(value)
            else:
                visit.names.append(name)
                arrays.append(_array(value, f"{where}, parameter {name!r:.80}", path))
        yield visit


def _array(value: Any, where: str, path: Path) -> np.ndarray:
    try:
        if isinstance(value, list | tuple):
            return narrowed(np.array(value, np.float64))
        if isinstance(value, np.ndarray) and value.dtype.kind in "iub":
            return narrowed(value.astype(np.float64))
        return as_array(value)
    except (ValueError, TypeError, OverflowError, InvalidInputError) as error:
        raise FormatError(
            f"{where}: a gradient is an array, or numbers in lists of one length: {error}", path=str(path)
        ) from None
