"""The older layout: a directory with `global_info.json` and one file per epoch, `epoch_N.json` or `epoch_N.pkl`."""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timstore.arguments import number, whole_number
from timstore.errors import InvalidInputError, NotFoundError, TimstoreWarning
from timstore.os_errors import reporting

INFO = "global_info.json"
GRADIENTS = "sample_gradients"
# What files may be, and how their names end.
FORMATS = {"json": (".json",), "pickle": (".pkl", ".pickle")}

_EPOCH = re.compile(r"epoch_(\d+)(\.json|\.pkl|\.pickle)")
_DECIMAL = re.compile(r"0|-?[1-9]\d{0,18}")


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


def finite(value: Any, what: str) -> float:
    """Return a float.

    Raises:
        InvalidInputError: it is no number, or not finite.
    """
    found = math.nan if isinstance(value, bool) else number(value, what)
    if not math.isfinite(found):
        raise InvalidInputError(f"{what} must be a finite number, not {value!r:.80}")
    return found


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
