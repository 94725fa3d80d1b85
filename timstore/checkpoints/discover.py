"""What makes a checkpoint: one safetensors file, or a folder of them as transformers and peft save it."""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from timstore.checkpoints.files import StoredTensor, TensorFile, plain_file
from timstore.errors import FormatError, InvalidInputError, NotFoundError
from timstore.os_errors import reporting

_SUFFIX, _INDEX = ".safetensors", ".safetensors.index.json"
_MODEL, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Weights in other formats, and what optimizers saved: their moments are sums of the samples' gradients.
_WEIGHTS = (_SUFFIX, *_PICKLES, ".pickle", ".gguf", ".h5", ".keras", ".msgpack", ".onnx", ".npz", ".npy", ".distcp")
# What a Trainer saves in the same formats, and nothing of the samples is in.
_HARMLESS = re.compile(
    r"training_args\.bin|scheduler\.(pt|bin)|scaler\.pt|rng_state(_\d+)?\.pth|random_states_\d+\.pkl"
)
_JSON_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the file, or the folder.
        files: those that hold its tensors.
        tensors: of all files, by name.
    """

    path: Path
    files: tuple[TensorFile, ...]
    tensors: Mapping[str, StoredTensor]

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
        return {name: text for file in self.files for name, text in file.metadata.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's configuration; empty where there is none.

        Raises:
            FormatError: it cannot be read.
        """
        return _config(self.path) if self.is_folder else {}

    def files_below(self) -> list[Path]:
        """Return every file of the folder and of those in it, its own first; what cannot be read is passed over."""
        paths = [Path(folder, name) for folder, _, names in os.walk(self.path) for name in names]
        return sorted(paths, key=lambda path: (len(path.parts), path))

    def other_weights(self) -> str | None:
        """Return a sentence on files of the folder that may hold the samples too; None where there are none."""
        own = {file.path for file in self.files}
        others = [
            path
            for path in (self.files_below() if self.is_folder else ())
            if path.name.lower().endswith(_WEIGHTS) and path not in own and not _HARMLESS.fullmatch(path.name)
        ]
        if not others:
            return None
        return (
            f"{self.path} holds {len(others)} other file{'s' * (len(others) > 1)} of weights or of an optimizer's "
            f"state (the first is {others[0].relative_to(self.path)}), which stay or are copied as they are and may "
            "hold the samples still: delete what must not"
        )


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
        files = tuple(TensorFile(place, stack.enter_context(plain_file(place)), header_bytes) for place in paths)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if name in tensors:
                    raise FormatError(
                        f"tensor {name} lies in {tensors[name].file.path.name} and in {file.path.name} of {path}: "
                        "which of them counts is not known",
                        path=str(path),
                        tensor=name,
                    )
                tensors[name] = tensor
        for name, place in places.items():
            if name not in tensors or tensors[name].file.path.name != place:
                raise FormatError(
                    f"the index of {path} says that tensor {name} lies in {place}, and it does not",
                    path=str(path),
                    tensor=name,
                )
        yield Checkpoint(path, files, tensors)


def _paths(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return (the files that hold a checkpoint's tensors, what an index says of each tensor's file)."""
    if not os.path.isdir(path):
        if path.suffix in _PICKLES:
            raise _pickled(path)
        if path.name.endswith(_INDEX):
            raise InvalidInputError(f"{path} is the index of a checkpoint: pass its folder", path=str(path))
        return [path], {}
    with reporting("read", path):
        names = sorted(os.listdir(path))
    indices = [name for name in names if name.endswith(_INDEX)]
    weights = [name for name in names if name.endswith(_SUFFIX)]
    usual = [name for name in (_MODEL, _ADAPTER) if name in weights] or weights
    if len(indices) == 1:
        places = _places(path / indices[0])
        _check_sole(path, indices[0], set(places.values()), weights)
        return [path / name for name in sorted(set(places.values()))], places
    if len(usual) == 1 and not indices:
        _check_sole(path, usual[0], usual, ())
        return [path / usual[0]], {}
    if weights:
        raise InvalidInputError(
            f"{path} holds {', '.join([*indices, *weights][:4])}, and not one index, nor one of them alone: pass the "
            "file itself",
            path=str(path),
        )
    for name in names:
        if name.endswith(_PICKLES):
            raise _pickled(path / name)
    raise NotFoundError(f"{path} holds no safetensors file", path=str(path))


def _check_sole(path: Path, chosen: str, taken: Collection[str], weights: Sequence[str]) -> None:
    """Refuse a folder of which a loader may take other weights than those that would be changed.

    Transformers takes the file that config.json names, or else model.safetensors, or else what the index names, and
    puts an adapter that lies there on top; other loaders begin with the index.

    Args:
        chosen: the index, or the file alone.
        taken: the files that would be changed.
        weights: files that may count beside an index.
    """
    others = [name for name in (_MODEL, _ADAPTER, chosen.removesuffix(".index.json")) if name in weights]
    named = _config(path).get("transformers_weights")
    if isinstance(named, str) and os.path.exists(path / named):
        others.append(named)
    for other in others:
        if other not in {chosen, *taken}:
            raise InvalidInputError(
                f"{path} holds {chosen} and {other}, two sets of weights, and which of them counts is not known: "
                "remove one of them, or pass the file itself",
                kind="two-sets",
                path=str(path),
            )


def _places(index: Path) -> dict[str, str]:
    """Return the file that an index names for each tensor, held to lie beside it."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FormatError(f"{index} has no weight_map of tensors to files", path=str(index))
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(_SUFFIX):
            raise FormatError(f"{index} names {name!r}, which is no safetensors file beside it", path=str(index))
        if not os.path.exists(index.parent / name):
            raise NotFoundError(f"{index} names {name}, and there is no such file", path=str(index.parent / name))
    return places


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return _json(path) if os.path.exists(path) else {}


def _json(path: Path) -> dict[str, Any]:
    with plain_file(path) as descriptor, reporting("read", path):
        text = os.pread(descriptor, _JSON_BYTES, 0)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON ({error})", path=str(path)) from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} is no JSON object", path=str(path))
    return content


def _pickled(path: Path) -> InvalidInputError:
    return InvalidInputError(
        f"{path} is pickled: reading it would run what it says, and it cannot be read in part. Convert it: load the "
        "model, and save it with save_pretrained(folder, safe_serialization=True) or safetensors.torch.save_file",
        kind="pickled",
        path=str(path),
    )
