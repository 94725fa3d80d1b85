"""The older function, one gradient of one sample at a time."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from timstore.database.lifetime import open_stores, unattended
from timstore.database.store import Store
from timstore.errors import InvalidInputError
from timstore.legacy.layout import INFO, finite, narrowed, sample_of
from timstore.os_errors import reporting

STORE = "trajectories.tim"

_MESSAGE = (
    "save_gradient_trajectory is the older interface. A script that has it from trainer.unlearn.tim_rollback writes "
    "`from timstore import save_gradient_trajectory`, and calls it as before; better, once per sample and step: "
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
        unattended(self.store)
        self.info = ""
        self.names: set[str] = set()

    def keep(self, text: str) -> None:
        """Write `global_info.json`, if it says something new."""
        if text == self.info:
            return
        beside = self._path / f"{INFO}.{os.getpid()}"
        with reporting("write", self._path / INFO):
            beside.write_text(text)
            beside.replace(self._path / INFO)
        self.info = text


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

    It goes to the store `trajectories.tim` in the directory, in constant time. It is on disk by itself after 30 s or
    256 MB, when this process opens that store (to ask, to roll back, to export), and when the interpreter ends.

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
    is_one = hasattr(sample_idx, "item") and getattr(sample_idx, "ndim", None) == 0
    sample, name = sample_of(sample_idx.item() if is_one else sample_idx, "sample_idx")
    try:
        info = dict(global_info or {})
        text = json.dumps(info, default=str, indent=1)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"global_info is a mapping that JSON can hold, not {global_info!r:.80} ({error})"
        ) from None
    rate = info.get("learning_rate")
    rate = None if rate is None else finite(rate, "global_info: learning_rate")
    if isinstance(gradient, list | tuple):  # which a store would take for several parts
        try:
            gradient = narrowed(np.array(gradient, np.float64))
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"gradient is an array, a tensor, or numbers in lists of one length: {error}"
            ) from None
    directory = _directory(output_dir)
    directory.store.append(epoch, step, sample, {param_name: gradient}, lr=rate, allow_zero=True)
    if global_info is not None:
        directory.keep(text)
    if name is not None and name not in directory.names:
        directory.store.samples.update([{"sample": sample, "name": name}])
        directory.names.add(name)


def _directory(output_dir: str | os.PathLike[str]) -> _Directory:
    key = os.getpid(), os.path.abspath(output_dir)
    directory = _directories.get(key)
    if directory is None or directory.store not in open_stores():
        directory = _directories[key] = _Directory(Path(output_dir))
    return directory
