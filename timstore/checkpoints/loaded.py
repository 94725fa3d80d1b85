"""The model of a checkpoint in memory: only to be asked with a probe, never to be written."""

from collections.abc import Mapping

from torch import nn

from timstore.checkpoints.discover import Checkpoint
from timstore.checkpoints.names import Naming
from timstore.errors import InvalidInputError, ModelMismatchError
from timstore.model.fingerprints import digest
from timstore.rollbacks.targets import InModule


def loaded_model(
    checkpoint: Checkpoint, given: nn.Module | None, naming: Naming, digests: Mapping[str, str]
) -> nn.Module:
    """Return the model with the checkpoint's parameters, held to have exactly these.

    Args:
        given: a model of the recorded class, whose parameters and buffers are overwritten; by default the one that
            the folder's config.json names is made by transformers.
        digests: of the recorded parameters.

    Raises:
        InvalidInputError: it is not known which model that is, or transformers cannot load it.
        ModelMismatchError: the model has other parameters.
    """
    if given is None:
        model = _by_transformers(checkpoint)
    else:
        model = given
        _fill(model, checkpoint, naming)
    held = dict(model.named_parameters())
    for name, wanted in digests.items():
        if name not in held:
            raise ModelMismatchError(
                f"the model ({type(model).__name__}) has no parameter {name}, which was recorded: pass model=, one "
                "of the class that was recorded",
                parameter=name,
            )
        if digest(held[name]) != wanted:
            raise ModelMismatchError(
                f"parameter {name} of the model ({type(model).__name__}, {held[name].dtype}) has not the bits that "
                f"{checkpoint.path} or the record of it has: pass model=, made as the recorded one was",
                parameter=name,
            )
    return model


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
    own = {} if int(transformers.__version__.split(".")[0]) >= 5 else {"torch_dtype": "auto"}
    try:
        model: nn.Module = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, **own)
        return model
    except Exception as error:
        raise InvalidInputError(f"transformers cannot load {path} as {names[0]} ({error}): {how}") from error


def _fill(model: nn.Module, checkpoint: Checkpoint, naming: Naming) -> None:
    """Read every parameter and buffer that the checkpoint holds into a model. Memory of one block."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a torch.nn.Module, not {type(model).__name__}")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        tensor_name = naming.tensors.get(name, naming.way(name))
        if tensor_name not in checkpoint.holders:
            continue
        file, tensor = checkpoint.holders[tensor_name], checkpoint.tensor(tensor_name)
        if tuple(value.shape) != tensor.shape or value.nbytes != tensor.stop - tensor.start:
            raise ModelMismatchError(
                f"{name} of the model is {value.dtype} {tuple(value.shape)}; tensor {tensor_name} of {file.path} is "
                f"{tensor.dtype} {tensor.shape}: pass a model made as the recorded one was",
                parameter=name,
            )
        InModule(value).write(block.view(value.dtype) for block in file.blocks(tensor))
