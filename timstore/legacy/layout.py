"""The older layout: a directory with `global_info.json` and one file per epoch, `epoch_N.json` or `epoch_N.pkl`.

Here are its names, what is in a directory, and what a file of an epoch says whatever its format: which values are
gradients, which are the steps of those beside them, and when numbers in lists are an array.
"""

import hashlib
import json
import math
import re
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from timstore.arguments import number, whole_number
from timstore.errors import InvalidInputError, NotFoundError, TimstoreWarning
from timstore.os_errors import reporting

INFO = "global_info.json"
GRADIENTS = "sample_gradients"
MARKER = "_step"  # behind a parameter's name: the key beside it that holds its step
# What files may be, and how their names end.
FORMATS = {"json": (".json",), "pickle": (".pkl", ".pickle")}

_EPOCH = re.compile(r"epoch_(\d+)(\.json|\.pkl|\.pickle)")
_DECIMAL = re.compile(r"0|-?[1-9]\d{0,18}")
DEEPEST = 32  # no gradient has as many axes
_RAGGED = "its lists are ragged: each axis needs one length"

Entry = int | float | Callable[[], np.ndarray]
"""What a parameter's key holds: a single number, or what loads an array. Read before the next sample is asked for."""

Samples = Iterable[tuple[int | str, int | None, Iterable[tuple[str, np.ndarray]]]]
"""What an epoch's file is written of: each sample's key, its step (None where it is not known) and its gradients."""


@dataclass(frozen=True, slots=True)
class Trajectories:
    """A directory of the older layout.

    Attributes:
        files: of each epoch, in order.
        rate: learning rate, None where `global_info.json` names none.
        rates: learning rates by (epoch, step), where they differ; only our own export says so.
        scale: of the gradients in what the optimizer consumed.
    """

    files: Mapping[int, Path]
    rate: float | None
    rates: Mapping[tuple[int, int], float]
    scale: float | None

    def rate_at(self, epoch: int, step: int) -> float | None:
        """Return the learning rate of a step."""
        return self.rates.get((epoch, step), self.rate)


def find(directory: str | Path, format: str) -> Trajectories:
    """Return what there is in a directory of the older layout.

    Raises:
        NotFoundError: no such directory, or no file of an epoch in it.
        InvalidInputError: two files claim one epoch, an epoch's file is missing, or `global_info.json` is not what it
            should be.
    """
    folder = Path(directory)
    if format not in ("auto", *FORMATS):
        raise InvalidInputError(f"format is auto, json or pickle, not {format!r}")
    with reporting("read", folder):
        if not folder.is_dir():
            raise NotFoundError(f"there is no directory {folder}", path=str(folder))
        named = sorted(folder.iterdir())
    endings = [end for name, ends in FORMATS.items() if format in ("auto", name) for end in ends]
    files: dict[int, Path] = {}
    for path in named:
        match = _EPOCH.fullmatch(path.name)
        if match is None or match[2] not in endings:
            continue
        epoch = int(match[1])
        if epoch in files:
            raise InvalidInputError(
                f"{files[epoch]} and {path.name} both claim epoch {epoch}: move one of them away, or name the format",
                path=str(folder),
            )
        files[epoch] = path
    if not files:
        kinds = " or ".join(f"epoch_N{end}" for end in endings)
        raise NotFoundError(f"{folder} holds no {kinds}", path=str(folder))
    info = _info(folder / INFO)
    files = _announced(files, info.get("num_epoch"), folder)
    return Trajectories(
        files,
        _number(info, "learning_rate", folder),
        _rates(info.get("learning_rates", []), folder),
        _number(info, "scale", folder),
    )


def sample_of(key: Any, where: str) -> tuple[int, str | None]:
    """Return a sample's id, and its name where that is no number: then the id is made of the name's hash."""
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise InvalidInputError(f"{where}: samples are named by integers or text, not {key!r:.80}")
    text = str(key)
    if _DECIMAL.fullmatch(text) and abs(int(text)) < 2**63:
        return int(text), None
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1, text


def finite(value: Any, what: str) -> float:
    """Return a float.

    Raises:
        InvalidInputError: it is no number, or not finite.
    """
    checked = math.nan if isinstance(value, bool) else number(value, what)
    if not math.isfinite(checked):
        raise InvalidInputError(f"{what} must be a finite number, not {value!r:.80}")
    return checked


def is_scalar(value: Any) -> bool:
    """Say whether a value is a step, or a gradient without axes."""
    return type(value) is float or (type(value) is int and value.bit_length() < 64)


def gradients(entries: Iterable[tuple[str, Entry]]) -> Iterator[tuple[str, np.ndarray, int | None]]:
    """Yield the parameter, the gradient and the step, None where it is not known, of all that a sample's key holds.

    A key is a step marker only if it ends in `_step`, its value is an integer, and the rest of it is a key beside. Both
    may come several times; where there are more of one than of the other, or a step is below zero, it is not known.
    """
    by_name: dict[str, list[Entry]] = {}
    for name, entry in entries:
        by_name.setdefault(name, []).append(entry)

    def steps_of(name: str) -> list[int]:
        marked = by_name.get(name + MARKER, [])
        steps = [step for step in marked if type(step) is int]
        return steps if len(steps) == len(marked) else []

    for name, values in by_name.items():
        stem = name.removesuffix(MARKER)
        if stem != name and stem in by_name and steps_of(stem):
            continue
        steps = steps_of(name)
        for place, entry in enumerate(values):
            gradient = entry() if callable(entry) else narrowed(np.array(float(entry)))
            is_known = len(steps) == len(values) and steps[place] >= 0
            yield name, gradient, steps[place] if is_known else None


def nested(
    events: Iterable[tuple[str, Any]], words: Mapping[str, float], wrong: Callable[[str], Exception]
) -> np.ndarray:
    """Return nested lists as an array, float32 where that holds their numbers, else float64.

    Args:
        events: of a parser of JSON, from the first bracket on; of those behind the last one none is taken.
        words: that stand for numbers.
        wrong: makes the error of lists that differ in length within a depth, lie too deep, or hold no numbers.
    """
    values = array("d")
    row: list[float] = []  # the list at hand: a list's own append is what the interpreter does fastest
    counts: list[int] = []  # of the lists within each list that is open
    lengths: list[int] = []  # of the lists of each depth, -1 before one has ended
    deepest = 0
    for event, value in events:
        if event == "number":
            row.append(value)
        elif event == "start_array":
            if row:
                raise wrong(_RAGGED)
            if len(counts) == DEEPEST:
                raise wrong(f"lists are nested more than {DEEPEST} deep")
            if counts:
                counts[-1] += 1
            counts.append(0)
            lengths.extend([-1] * (len(counts) - len(lengths)))
        elif event == "end_array":
            lists, depth = counts.pop(), len(counts)
            length = lists or len(row)
            deepest = deepest or depth + 1  # the first that ends holds no lists
            # Lists hold lists, or numbers, and either is what all of that depth hold.
            if (lists and row) or bool(lists) == (depth + 1 == deepest) or lengths[depth] not in (-1, length):
                raise wrong(_RAGGED)
            lengths[depth] = length
            try:
                values.fromlist(row)
            except OverflowError:
                raise wrong("an integer is beyond any float") from None
            row.clear()
            if not counts:
                break
        elif event == "string" and value in words:
            row.append(words[value])
        else:
            raise wrong(f"a gradient is numbers in lists, not {said(event, value)}")
    return narrowed(np.frombuffer(values, np.float64).reshape(lengths))


def said(event: str, value: Any) -> str:
    """Return what a parser's event is of, for a message."""
    if event in ("start_map", "map_key", "end_map"):
        return "an object"
    return "a list" if event == "start_array" else json.dumps(value, default=str)[:80]


def narrowed(numbers: np.ndarray) -> np.ndarray:
    """Return float64 numbers as float32, if they are the very same."""
    with np.errstate(over="ignore"):
        single = numbers.astype(np.float32)
    same = (single == numbers) | np.isnan(numbers)
    return single if bool(same.all()) else np.array(numbers)


def _info(path: Path) -> dict[str, Any]:
    try:
        with reporting("read", path):
            info = json.loads(path.read_bytes())
    except NotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not JSON: {error}", path=str(path)) from None
    if not isinstance(info, dict):
        raise InvalidInputError(f"{path} holds {type(info).__name__}, not an object with names", path=str(path))
    return info


def _announced(files: dict[int, Path], count: Any, folder: Path) -> dict[int, Path]:
    """Return the files of as many epochs as `num_epoch` says, from 0 on; all where it says nothing."""
    if count is None:
        return dict(sorted(files.items()))
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidInputError(f"{folder / INFO}: num_epoch is {count!r}, not a number of epochs", path=str(folder))
    missing = next((epoch for epoch in range(count) if epoch not in files), None)
    if missing is not None:
        raise InvalidInputError(
            f"{folder / INFO} announces {count} epochs, and there is no file of epoch {missing}: put it there, or "
            "correct num_epoch",
            path=str(folder),
        )
    beyond = [path.name for epoch, path in sorted(files.items()) if epoch >= count]
    if beyond:
        warnings.warn(
            f"{folder / INFO} announces {count} epochs: {', '.join(beyond)} left out", TimstoreWarning, stacklevel=4
        )
    return {epoch: files[epoch] for epoch in range(count)}


def _number(info: Mapping[str, Any], name: str, folder: Path) -> float | None:
    return None if info.get(name) is None else finite(info[name], f"{folder / INFO}: {name}")


def _rates(rows: Any, folder: Path) -> dict[tuple[int, int], float]:
    what = f"{folder / INFO}: learning_rates"
    try:
        return {(whole_number(epoch, what), whole_number(step, what)): finite(rate, what) for epoch, step, rate in rows}
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{what} lists [epoch, step, rate], not {rows!r:.80} ({error})", path=str(folder)
        ) from None
