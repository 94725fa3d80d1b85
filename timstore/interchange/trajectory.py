"""The older function, one gradient of one sample at a time."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timstore.errors import InvalidInputError
from timstore.interchange.layout import INFO, sample_of
from timstore.lifetime import open_stores
from timstore.reporting import reporting
from timstore.store import Store

STORE = "trajectories.tim"

_MESSAGE = (
    "save_gradient_trajectory is the older interface. Once per sample and step: "
    "store = timstore.open(path); store.append(epoch, step, sample, {name: gradient, ...}, lr=lr); or let "
    "store.record(model, optimizer) take the gradients"
)


class _Directory:
    """A directory that is written into.

    Attributes:
        info: what its `global_info.json` holds, as far as it is known here.
        names: of samples that were given as text.
    """

    def __init__(self, path: Path) -> None:
        with reporting("make", path):
            path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.store = Store(path / STORE)
        self.info = ""
        self.names: set[str] = set()

    def keep(self, info: Mapping[str, Any]) -> None:
        """Write `global_info.json`, if it says something new."""
        text = json.dumps(dict(info), default=str, indent=1)
        if text == self.info:
            return
        beside = self._path / f"{INFO}.{os.getpid()}"
        with reporting("write", self._path / INFO):
            beside.write_text(text)
            beside.replace(self._path / INFO)
        self.info = text

    def name(self, sample: int, name: str) -> None:
        """Keep what a sample was called."""
        if name not in self.names:
            self.store.samples.update([{"sample": sample, "name": name}])
            self.names.add(name)


# By process as well: a forked child opens its own.
_directories: dict[tuple[int, str], _Directory] = {}
_told: list[bool] = []


def save_gradient_trajectory(
    output_dir: str | os.PathLike[str],
    epoch: int,
    step: int,
    sample_idx: Any,
    param_name: str,
    gradient: Any,
    global_info: Mapping[str, Any] | None = None,
) -> None:
    """Record one sample's gradient of one parameter. The older interface: `Store.append` takes a whole record.

    It goes to the store `trajectories.tim` in the directory, in constant time, and is on disk by itself after 30 s or
    256 MB, and when the interpreter ends.

    Args:
        output_dir: made if it is missing.
        sample_idx: an integer; text is taken too, and makes its id of a hash (`samples.name` says of what).
        gradient: array or tensor of the parameter's shape: the sample's summand, not a row of the batch's gradient.
        global_info: kept as `global_info.json`; its `learning_rate` is the step's.

    Raises:
        InvalidInputError: as `Store.append`; the same parameter of the same sample and step for the second time.
        StorageError: the directory cannot be written.
    """
    if not _told:
        _told.append(True)
        warnings.warn(_MESSAGE, DeprecationWarning, stacklevel=2)
    if not isinstance(param_name, str) or not param_name:
        raise InvalidInputError(f"param_name is text, not {param_name!r}")
    key = sample_idx.item() if hasattr(sample_idx, "item") else sample_idx
    sample, name = sample_of(key, "sample_idx")
    directory = _directory(output_dir)
    if global_info is not None:
        directory.keep(global_info)
    rate = None if global_info is None else global_info.get("learning_rate")
    directory.store.append(epoch, step, sample, {param_name: gradient}, lr=rate, allow_zero=True)
    if name is not None:
        directory.name(sample, name)


def _directory(output_dir: str | os.PathLike[str]) -> _Directory:
    key = os.getpid(), os.path.abspath(output_dir)
    found = _directories.get(key)
    if found is None or found.store not in open_stores():
        found = _directories[key] = _Directory(Path(output_dir))
    return found
