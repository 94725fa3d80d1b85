"""A checkpoint as what a rollback changes: its parameters are read from files and written to new ones, in blocks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from timstore.checkpoints.discover import Checkpoint
from timstore.checkpoints.files import TensorFile
from timstore.checkpoints.header import StoredTensor
from timstore.checkpoints.loaded import loaded_model
from timstore.checkpoints.names import Naming
from timstore.checkpoints.outputs import Output
from timstore.checkpoints.publish import Writing
from timstore.errors import FormatError
from timstore.interrupts import CriticalSection
from timstore.model.fingerprints import digest_of_blocks, digests_by
from timstore.records import Parameter
from timstore.rollbacks.apply import Writes
from timstore.rollbacks.places import Place

# What can be changed; the others are compared, since digests are of a dtype's name too, or only copied.
_CHANGED = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
Held = tuple[TensorFile, StoredTensor]


class CheckpointTarget:
    """An open checkpoint, to be rolled back.

    Args:
        naming: its tensors by the parameters' names.
        absent: digests of parameters that it leaves to the model under it.
        output: where the changed files go; None to compute only.
        model: what is asked with a probe; its parameters are read from the checkpoint.

    Attributes:
        left: old files that were replaced and could not be deleted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        naming: Naming,
        absent: Mapping[str, str],
        output: Output | None,
        model: nn.Module | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._naming = naming
        self._absent = absent
        self._output = output
        self._given = model
        self._places: dict[str, InFiles] = {}
        self._writing: Writing | None = None
        self.left: list[Path] = []

    @property
    def is_loaded(self) -> bool:
        return self._given is not None

    @property
    def text(self) -> str | None:
        held = [one for place in self._places.values() for one in place.held]
        files = {file for file, _ in held}
        parts = [
            f"{len(held)} of {len(self._checkpoint.holders)} tensors in {len(files)} of {len(self._checkpoint.files)} "
            f"files change; written {self._output or 'nowhere'}"
        ]
        parts += [
            f"{tensor.name} is tied to {place.held[0][1].name} and changes with it"
            for place in self._places.values()
            for _, tensor in place.held[1:]
        ]
        if self._absent:
            parts.append(f"{len(self._absent)} parameters that it does not hold are taken to be as they were recorded")
        return "; ".join(parts)

    def model(self) -> nn.Module:
        return self._model

    def digests(self) -> dict[str, str]:
        return {**self._digests, **self._absent}

    def places(self, wanted: Mapping[str, Parameter]) -> dict[str, Place]:
        self._places = {name: self._place(name) for name in wanted}
        return dict(self._places)

    def change(self, writes: Writes, record: Callable[[], None], section: CriticalSection) -> None:
        assert self._output is not None
        spans: dict[TensorFile, list[tuple[int, int]]] = {}
        for place in self._places.values():
            for file, tensor in place.held:
                spans.setdefault(file, []).append((tensor.start, tensor.stop))
        with self._output.begun(spans) as self._writing:
            writes.make()
            self._writing.finish()
            self._checkpoint.check_unchanged()
            record()
            section.enter()
            self.left = self._writing.publish()

    @cached_property
    def _model(self) -> nn.Module:
        return loaded_model(self._checkpoint, self._given, self._naming, self.digests())

    @cached_property
    def _digests(self) -> dict[str, str]:
        tensors = self._naming.tensors
        return digests_by(lambda parameter: self._digest(tensors[parameter]), tensors)

    def _digest(self, name: str) -> str:
        file, tensor = self._held(name)
        dtype = getattr(torch, TORCH_NAMES.get(tensor.dtype, ""), None)
        if dtype is None:
            raise FormatError(
                f"tensor {name} of {file.path} has dtype {tensor.dtype}, which this version cannot compare with what "
                "was recorded",
                tensor=name,
            )
        return digest_of_blocks(dtype, tensor.shape, file.blocks(tensor))

    def _place(self, parameter: str) -> "InFiles":
        name = self._naming.tensors[parameter]
        file, tensor = self._held(name)
        if tensor.dtype not in _CHANGED:
            raise FormatError(
                f"tensor {name} of {file.path} has dtype {tensor.dtype}; {', '.join(_CHANGED)} can be changed. Roll "
                "back the checkpoint that this one was converted from, or leave it out with parameters=",
                tensor=name,
            )
        # Of tied weights some savers keep both: unless both change, what a loader takes would be chance.
        alike = [one for one in self._naming.may_be_tied if _kind(self._held(one)[1]) == _kind(tensor)]
        tied = [one for one in alike if self._digest(one) == self._digests[parameter]]
        # With a model that was loaded, vectors are where it is.
        device = next(self._model.parameters()).device if "_model" in self.__dict__ else torch.device("cpu")
        return InFiles([(file, tensor), *map(self._held, tied)], self._put, device)

    def _held(self, name: str) -> Held:
        return self._checkpoint.holders[name], self._checkpoint.tensor(name)

    def _put(self, file: TensorFile, data: memoryview, offset: int) -> None:
        assert self._writing is not None
        self._writing.files[file].write(data, offset)


class InFiles:
    """A parameter in a file; where weights are tied, in several, which hold the same.

    Attributes:
        held: the file and the place in it; the first is read, all are written.
        device: to which the numbers are read.
    """

    def __init__(
        self, held: Sequence[Held], put: Callable[[TensorFile, memoryview, int], None], device: torch.device
    ) -> None:
        self.held = held
        self.device = device
        self._put = put
        tensor = held[0][1]
        self.shape = tensor.shape
        self.dtype: torch.dtype = getattr(torch, TORCH_NAMES[tensor.dtype])

    def read(self, start: int, stop: int) -> torch.Tensor:
        file, tensor = self.held[0]
        size = self.dtype.itemsize
        return file.read(tensor.start + start * size, tensor.start + stop * size).view(self.dtype).to(self.device)

    def blocks(self, numel: int) -> Iterator[torch.Tensor]:
        file, tensor = self.held[0]
        blocks = file.blocks(tensor, numel * self.dtype.itemsize)
        return (block.view(self.dtype).to(self.device) for block in blocks)

    def write(self, blocks: Iterator[torch.Tensor]) -> None:
        done = 0
        for block in blocks:
            data = block.cpu().contiguous().view(torch.uint8).numpy().data
            for file, tensor in self.held:
                self._put(file, data, tensor.start + done)
            done += len(data)


def _kind(tensor: StoredTensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape
