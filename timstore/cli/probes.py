"""The probe of a rollback: the one that the store keeps, or rows of tokens in a file."""

from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from timstore.cli.json_lines import objects
from timstore.cli.stores import reading
from timstore.errors import InvalidInputError, NotFoundError

KEPT = "kept"
# Rows of one length that the model is asked about at once.
_ROWS = 8


def probe_options(given: str, store: Path) -> dict[str, Any]:
    """Return the options of a rollback with this probe.

    Raises:
        NotFoundError: the store keeps none.
        InvalidInputError: the file holds no rows of tokens.
    """
    if given != KEPT:
        return {"probe": list(_batches(Path(given)))}
    with reading(store) as opened:
        kept = opened.probe()
    if kept is None:
        raise NotFoundError(f"{store} keeps no probe, which record(probe=) would have given it: pass a file")
    return {"probe": "auto"}


def _batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    for shape, run in groupby(objects(path), lambda row: _shape(path, row)):
        while rows := list(islice(run, _ROWS)):
            yield {name: np.array([row[name] for row in rows], np.int64) for name, _ in shape}


def _shape(path: Path, row: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Return the names of a row's lists and their lengths."""
    for name, values in row.items():
        if not isinstance(values, list) or not all(type(value) is int and abs(value) < 2**63 for value in values):
            raise InvalidInputError(f"{path}: {name} of a row is a list of integers", path=str(path))
    if "input_ids" not in row:
        raise InvalidInputError(f'{path}: a row is {{"input_ids": [...]}}, and labels if you like', path=str(path))
    return tuple(sorted((name, len(values)) for name, values in row.items()))
