"""A checkpoint as what a rollback changes: its parameters are read from files and written to copies, in blocks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from timstore.checkpoints.discover import Checkpoint
from timstore.checkpoints.files import StoredTensor
from timstore.checkpoints.names import Naming
from timstore.checkpoints.publish import Output
from timstore.errors import FormatError, InvalidInputError, ModelMismatchError
from timstore.interrupts import CriticalSection
from timstore.model.fingerprints import digest, digest_of_blocks, digests_by
from timstore.records import Parameter
from timstore.rollbacks.apply import Writes
from timstore.rollbacks.places import Place
from timstore.rollbacks.targets import InModule

# What can be changed; the others are compared, since digests are of a dtype's name too, or only copied.
_CHANGED = ("F64", "F32", "F16", "BF16")


class CheckpointTarget:
    """An open checkpoint, to be rolled back.

    Args:
        naming: its tensors by the parameters' names.
        absent: digests of parameters that it leaves to the model under it.
        output: where it goes; None to compute only.
        model: what is asked with a probe; its parameters are read from the checkpoint. By default transformers makes
            the one that config.json names.

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
        self.left: list[Path] = []

    @property
    def is_loaded(self) -> bool:
        return self._given is not None

    @property
    def text(self) -> str | None:
        changed = [tensor for place in self._places.values() for tensor in place.tensors]
        files = {tensor.file for tensor in changed}
        parts = [
            f"{len(changed)} of {len(self._checkpoint.tensors)} tensors in {len(files)} of "
            f"{len(self._checkpoint.files)} files change; written {self._output or 'nowhere'}"
        ]
        parts += [
            f"{tensor.name} is tied to {place.tensors[0].name} and changes with it"
            for place in self._places.values()
            for tensor in place.tensors[1:]
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
        with self._output.copied(tensor for place in self._places.values() for tensor in place.tensors):
            writes.make()
            self._output.finish()
            for file in self._checkpoint.files:
                file.check_unchanged()
            record()
            section.enter()
            self.left = self._output.publish()

    @cached_property
    def _model(self) -> nn.Module:
        """The model with the checkpoint's parameters, held to have exactly these.

        Raises:
            InvalidInputError: it is not known which model that is, or transformers cannot load it.
            ModelMismatchError: the model has other parameters.
        """
        model = _by_transformers(self._checkpoint) if self._given is None else self._filled(self._given)
        parameters, kind = dict(model.named_parameters()), type(model).__name__
        for name, wanted in self.digests().items():
            if name not in parameters:
                raise ModelMismatchError(
                    f"the model ({kind}) has no parameter {name}, which was recorded: pass model=, one of the class "
                    "that was recorded",
                    parameter=name,
                )
            if digest(parameters[name]) != wanted:
                raise ModelMismatchError(
                    f"parameter {name} of the model ({kind}, {parameters[name].dtype}) has not the bits that "
                    f"{self._checkpoint.path} or the record of it has: pass model=, made as the recorded one was",
                    parameter=name,
                )
        return model

    def _filled(self, model: nn.Module) -> nn.Module:
        """Read every parameter and buffer that the checkpoint holds into a model. Memory of one block."""
        if not isinstance(model, nn.Module):
            raise InvalidInputError(f"model is a torch.nn.Module, not {type(model).__name__}")
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            renamed = self._checkpoint.tensors.get(self._naming.renaming(name))
            tensor = self._naming.tensors.get(name, renamed)
            if tensor is None:
                continue
            if tuple(value.shape) != tensor.shape or value.nbytes != tensor.stop - tensor.start:
                raise ModelMismatchError(
                    f"{name} of the model is {value.dtype} {tuple(value.shape)}; tensor {tensor.name} of "
                    f"{tensor.file.path} is {tensor.dtype} {tensor.shape}: pass a model made as the recorded one was",
                    parameter=name,
                )
            InModule(value).write(block.view(value.dtype) for block in tensor.blocks())
        return model

    @cached_property
    def _digests(self) -> dict[str, str]:
        return digests_by(lambda name: _digest(self._naming.tensors[name]), self._naming.tensors)

    def _place(self, parameter: str) -> "InFiles":
        tensor = self._naming.tensors[parameter]
        if tensor.dtype not in _CHANGED:
            raise FormatError(
                f"tensor {tensor.name} of {tensor.file.path} has dtype {tensor.dtype}; {', '.join(_CHANGED)} can be "
                "changed. Roll back the checkpoint that this one was converted from, or leave it out with parameters=",
                tensor=tensor.name,
            )
        # Of tied weights some savers keep both: unless both change, what a loader takes would be chance.
        tied = [
            other
            for other in self._naming.may_be_tied
            if (other.dtype, other.shape) == (tensor.dtype, tensor.shape) and _digest(other) == self._digests[parameter]
        ]
        # With a model that was loaded, vectors are where it is.
        device = next(self._model.parameters()).device if "_model" in self.__dict__ else torch.device("cpu")
        return InFiles([tensor, *tied], self._output, device)


class InFiles:
    """A parameter in a file; where weights are tied, in several tensors, which hold the same.

    Attributes:
        tensors: the first is read, all are written.
        device: to which the numbers are read.
    """

    def __init__(self, tensors: Sequence[StoredTensor], output: Output | None, device: torch.device) -> None:
        self.tensors = tensors
        self.device = device
        self.shape = tensors[0].shape
        self.dtype = _torch_dtype(tensors[0])
        self._output = output

    def read(self, start: int, stop: int) -> torch.Tensor:
        tensor, size = self.tensors[0], self.dtype.itemsize
        data = tensor.file.read(tensor.start + start * size, tensor.start + stop * size)
        return data.view(self.dtype).to(self.device)

    def blocks(self, numel: int) -> Iterator[torch.Tensor]:
        blocks = self.tensors[0].blocks(numel * self.dtype.itemsize)
        return (block.view(self.dtype).to(self.device) for block in blocks)

    def write(self, blocks: Iterator[torch.Tensor]) -> None:
        assert self._output is not None
        done = 0
        for block in blocks:
            data = block.cpu().contiguous().view(torch.uint8).numpy().data
            for tensor in self.tensors:
                self._output.write(tensor.file, tensor.start + done, data)
            done += len(data)


def _digest(tensor: StoredTensor) -> str:
    return digest_of_blocks(_torch_dtype(tensor), tensor.shape, tensor.blocks())


def _torch_dtype(tensor: StoredTensor) -> torch.dtype:
    if tensor.torch_dtype is None:
        raise FormatError(
            f"tensor {tensor.name} of {tensor.file.path} has dtype {tensor.dtype}, which this version cannot compare "
            "with what was recorded",
            tensor=tensor.name,
        )
    return tensor.torch_dtype


def _by_transformers(checkpoint: Checkpoint) -> nn.Module:
    path, names = checkpoint.path, checkpoint.config.get("architectures")
    how = "pass model=, an nn.Module of the recorded class; its parameters are then read from the checkpoint"
    if checkpoint.is_adapter:
        raise InvalidInputError(f"{path} is an adapter, and a probe asks the whole model: {how} (with peft around it)")
    if not names:
        raise InvalidInputError(f"probe= asks the model, and {path} has no config.json that names its class: {how}")
    try:
        import transformers
    except ImportError as error:
        raise InvalidInputError(
            f"probe= asks the model of {path}, and transformers is not installed: pip install 'timstore[hf]', or {how}"
        ) from error
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise InvalidInputError(f"config.json of {path} names {names[0]}, which transformers does not know: {how}")
    # Newer versions take the dtype of the files by themselves.
    dtype = {} if int(transformers.__version__.split(".")[0]) >= 5 else {"torch_dtype": "auto"}
    try:
        model: nn.Module = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, **dtype)
        return model
    except Exception as error:
        raise InvalidInputError(f"transformers cannot load {path} as {names[0]} ({error}): {how}") from error
