"""What makes a checkpoint: one safetensors file, or a folder of them as transformers and peft save it."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from timstore.checkpoints.files import PlainFile, TensorFile
from timstore.checkpoints.header import StoredTensor
from timstore.errors import FormatError, InvalidInputError, NotFoundError
from timstore.os_errors import reporting

SUFFIX, _INDEX = ".safetensors", ".safetensors.index.json"
_MODEL, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_JSON_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the file, or the folder.
        files: those that hold its tensors.
        holders: each tensor's name to the file that holds it.
    """

    path: Path
    files: tuple[TensorFile, ...]
    holders: Mapping[str, TensorFile]

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, with a configuration and other files in it."""
        return self.path != self.files[0].path

    @property
    def is_adapter(self) -> bool:
        """Whether it holds what peft trained, and not the model under it."""
        return self.files[0].path.name == _ADAPTER

    @property
    def metadata(self) -> dict[str, str]:
        """What the writer of its files noted."""
        return {name: text for file in self.files for name, text in file.header.metadata.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's configuration; empty where there is none.

        Raises:
            FormatError: it cannot be read.
        """
        path = self.path / "config.json"
        return _json(path) if self.is_folder and os.path.exists(path) else {}

    def tensor(self, name: str) -> StoredTensor:
        """Return where a tensor lies in its file."""
        return self.holders[name].header.tensors[name]

    def check_unchanged(self) -> None:
        """Refuse to go on when a file is another one than it was.

        Raises:
            StateError: somebody wrote to it, or replaced it.
        """
        for file in self.files:
            file.check_unchanged()


@contextmanager
def opened(path: Path, header_bytes: int) -> Iterator[Checkpoint]:
    """Open the checkpoint at a path. Memory: its headers.

    Args:
        header_bytes: that the header of a file may take.

    Raises:
        NotFoundError, StorageError: it is not there, or cannot be read.
        InvalidInputError: there is no safetensors file, or it is not clear which of several make the checkpoint.
        FormatError: a file is not whole, or the index says something else than the files.
    """
    with ExitStack() as stack:
        paths, places = _paths(path)
        files = tuple(stack.enter_context(TensorFile(one, header_bytes)) for one in paths)
        holders: dict[str, TensorFile] = {}
        for file in files:
            for name in file.header.tensors:
                if name in holders:
                    raise FormatError(
                        f"tensor {name} lies in {holders[name].path.name} and in {file.path.name} of {path}: which of "
                        "them counts is not known",
                        path=str(path),
                        tensor=name,
                    )
                holders[name] = file
        for name, place in places.items():
            if name not in holders or holders[name].path.name != place:
                raise FormatError(
                    f"the index of {path} says that tensor {name} lies in {place}, and it does not",
                    path=str(path),
                    tensor=name,
                )
        yield Checkpoint(path, files, holders)


def _paths(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return (the files that hold a checkpoint's tensors, what an index says of each tensor's file)."""
    if not os.path.isdir(path):
        if path.suffix in PICKLES:
            raise _pickled(path)
        if path.name.endswith(_INDEX):
            raise InvalidInputError(f"{path} is the index of a checkpoint: pass its folder", path=str(path))
        return [path], {}
    with reporting("read", path):
        names = sorted(os.listdir(path))
    indices = [name for name in names if name.endswith(_INDEX)]
    found = [name for name in names if name.endswith(SUFFIX)]
    if len(indices) == 1:
        paths, places = _indexed(path / indices[0])
        _check_sole(path, indices[0], {one.name for one in paths}, found)
        return paths, places
    usual = [name for name in (_MODEL, _ADAPTER) if name in found] or found
    if len(usual) == 1 and not indices:
        _check_sole(path, usual[0], set(usual), ())
        return [path / usual[0]], {}
    if not found and any(name.endswith(PICKLES) for name in names):
        raise _pickled(path / next(name for name in names if name.endswith(PICKLES)))
    if not found:
        raise NotFoundError(f"{path} holds no safetensors file", path=str(path))
    raise InvalidInputError(
        f"{path} holds {', '.join([*indices, *found][:4])}, and not one index, nor one of them alone: pass the "
        "file itself",
        path=str(path),
    )


def _check_sole(path: Path, chosen: str, taken: Set[str], found: Sequence[str]) -> None:
    """Refuse a folder of which a loader may take other weights than those that would be changed.

    Transformers takes the file that config.json names, or else model.safetensors, or else what the index names, and
    puts an adapter that lies there on top; other loaders begin with the index.

    Args:
        chosen: the index, or the file alone.
        taken: the files that would be changed.
        found: those that may count beside an index.
    """
    others = [name for name in (_MODEL, _ADAPTER, chosen.removesuffix(".index.json")) if name in found]
    if os.path.exists(path / "config.json"):
        named = _json(path / "config.json").get("transformers_weights")
        others += [named] if isinstance(named, str) and os.path.exists(path / named) else []
    for other in others:
        if other not in {chosen, *taken}:
            raise InvalidInputError(
                f"{path} holds {chosen} and {other}, two sets of weights, and which of them counts is not known: "
                "remove one of them, or pass the file itself",
                kind="two-sets",
                path=str(path),
            )


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the files that an index names, held to lie beside it, and the file of each tensor."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(one, str) for one in places.values()):
        raise FormatError(f"{index} has no weight_map of tensors to files", path=str(index))
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(SUFFIX):
            raise FormatError(f"{index} names {name!r}, which is no safetensors file beside it", path=str(index))
        if not os.path.exists(index.parent / name):
            raise NotFoundError(f"{index} names {name}, and there is no such file", path=str(index.parent / name))
    return [index.parent / name for name in names], places


def _json(path: Path) -> dict[str, Any]:
    with PlainFile(path) as file:
        text = file.read(0, min(file.size, _JSON_BYTES)).numpy().tobytes()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON ({error})", path=str(path)) from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} is no JSON object", path=str(path))
    return found


def _pickled(path: Path) -> InvalidInputError:
    return InvalidInputError(
        f"{path} is pickled: reading it would run what it says, and it cannot be read in part. Convert it: load the "
        "model, and save it with save_pretrained(folder, safe_serialization=True) or safetensors.torch.save_file",
        kind="pickled",
        path=str(path),
    )
