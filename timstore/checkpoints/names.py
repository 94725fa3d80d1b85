"""Which tensor of a checkpoint is which recorded parameter.

What saves a model renames in few ways: a prefix is put before all names or taken off (`model.` where a bare model was
saved from one with a head, `module.`, `_orig_mod.`), peft leaves out the adapter's name, and of tied weights one name
is kept. That a name was understood rightly is seen by the digests afterwards; what is ambiguous is refused before.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from timstore.checkpoints.discover import Checkpoint
from timstore.checkpoints.files import StoredTensor
from timstore.errors import ModelMismatchError
from timstore.records import Parameter
from timstore.rollbacks.difference import other_adapter

# Names that a prefix is looked for with.
_TRIED = 16


@dataclass(frozen=True, slots=True)
class Renaming:
    """What is done to a recorded name to get that of its tensor, in this order.

    Attributes:
        adapter: left out, as peft does; None to leave names as they are.
        off: a prefix that is taken off.
        before: a prefix that is put before.
    """

    adapter: str | None = None
    off: str = ""
    before: str = ""

    def __call__(self, name: str) -> str:
        if self.adapter is not None:
            name = _without_adapter(name, self.adapter)
        return self.before + name.removeprefix(self.off)


@dataclass(frozen=True, eq=False, slots=True)
class Naming:
    """How parameters are called in a checkpoint.

    Attributes:
        tensors: of each recorded parameter.
        absent: recorded parameters that an adapter leaves to the model under it.
        renaming: of any parameter's name to what it would be called there.
        may_be_tied: tensors that are no recorded parameter, but may hold one a second time; none where a tensor may
            hold the same by chance.
    """

    tensors: dict[str, StoredTensor]
    absent: tuple[str, ...]
    renaming: Renaming
    may_be_tied: tuple[StoredTensor, ...]


def understood(
    checkpoint: Checkpoint, recorded: Iterable[str], trained: Mapping[str, Parameter], *, is_checked: bool
) -> Naming:
    """Return how the recorded parameters are called in a checkpoint.

    Args:
        recorded: names that the model is recognised by, and those that may change.
        trained: what is known of those that may change.
        is_checked: whether digests will show that the names were understood rightly.

    Raises:
        ModelMismatchError: a parameter is not found, or has another shape, or could be one of several tensors.
    """
    names, stored = sorted(recorded), checkpoint.tensors
    is_certain = is_checked or bool(checkpoint.config.get("tie_word_embeddings"))
    renaming = _renaming(checkpoint, names, _adapters(trained) if checkpoint.is_adapter else [])
    tensors = {name: stored[renaming(name)] for name in names if renaming(name) in stored}
    missing = [name for name in names if name not in tensors]
    for name in missing:
        noted = checkpoint.metadata.get(renaming(name))  # as safetensors.torch.save_model does
        if noted is not None and noted in stored:
            tensors[name] = stored[noted]
        elif name in trained and len(missing) == 1 and is_certain:
            used = set(tensors.values())
            alike = [other for other in stored.values() if other not in used and other.shape == trained[name].shape]
            if len(alike) == 1:
                tensors[name] = alike[0]
    absent = tuple(name for name in missing if name not in tensors)
    used = set(tensors.values())
    free = [stored[name] for name in sorted(stored) if stored[name] not in used]
    lost = [name for name in absent if not checkpoint.is_adapter or name in trained]
    if lost:
        why = None if checkpoint.is_adapter else other_adapter(names, stored)
        raise ModelMismatchError(
            f"{checkpoint.path} has no tensor for parameter {lost[0]} ({len(lost)} of {len(names)} recorded ones are "
            f"missing); it holds {_some(tensor.name for tensor in free) or 'nothing'} beside the others. "
            f"{why or 'It was saved from another model, or incomplete'}",
            parameter=lost[0],
        )
    for name, parameter in trained.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise ModelMismatchError(
                f"tensor {tensor.name} of {checkpoint.path} has shape {tensor.shape}; parameter {name} was recorded "
                f"with shape {parameter.shape}. It was saved from another model, or resized",
                parameter=name,
                tensor=tensor.name,
            )
    # Vectors may be equal without being tied: all zeros, all ones.
    may_be_tied = tuple(tensor for tensor in free if is_certain and len(tensor.shape) > 1)
    return Naming(tensors, absent, renaming, may_be_tied)


def _renaming(checkpoint: Checkpoint, names: list[str], adapters: list[str]) -> Renaming:
    """Return the renaming that most names are found by; names as they are count more than others."""
    renamings = [Renaming(), *map(Renaming, adapters)]
    for renaming in tuple(renamings):
        prefixes = _prefixes([renaming(name) for name in names], checkpoint.tensors)
        renamings += [replace(renaming, off=off, before=before) for off, before in prefixes]
    matches = {way: {name: way(name) for name in names if way(name) in checkpoint.tensors} for way in renamings}
    best = max(renamings, key=lambda way: len(matches[way]))  # of equals the first
    if not matches[best]:
        raise ModelMismatchError(
            f"{checkpoint.path} holds no recorded parameter: {_some(names)} were recorded, and it has "
            f"{_some(checkpoint.tensors) or 'no tensor'}. It was saved from another model"
        )
    rivals = [way for way in renamings if len(matches[way]) == len(matches[best]) and matches[way] != matches[best]]
    if rivals and best != Renaming():
        name = next(name for name in names if matches[best].get(name) != matches[rivals[0]].get(name))
        raise ModelMismatchError(
            f"parameter {name} could be tensor {best(name)} of {checkpoint.path} as well as {rivals[0](name)}: "
            "pass a checkpoint of the recorded model alone",
            parameter=name,
        )
    return best


def _prefixes(names: list[str], tensors: Iterable[str]) -> list[tuple[str, str]]:
    """Return (taken off, put before) of every prefix by which one of some names becomes a tensor's."""
    prefixes = set()
    for name in names[:: max(1, len(names) // _TRIED)]:
        for tensor in tensors:
            if tensor.endswith(f".{name}"):
                prefixes.add(("", tensor.removesuffix(name)))
            elif name.endswith(f".{tensor}"):
                prefixes.add((name.removesuffix(tensor), ""))
    return sorted(prefixes)


def _without_adapter(name: str, adapter: str) -> str:
    """Return a name as peft saves it: `x.lora_A.default.weight` as `x.lora_A.weight`."""
    parts = name.replace(f".modules_to_save.{adapter}.", ".").split(".")
    short = ".".join(part for place, part in enumerate(parts) if part != adapter or place < len(parts) - 2)
    return short.removesuffix(".weight") if short.endswith(".lora_magnitude_vector.weight") else short


def _adapters(trained: Iterable[str]) -> list[str]:
    """Return the names of the adapters that these parameters belong to."""
    pairs = (pair for name in trained for pair in pairwise(name.split(".")))
    return sorted({part for before, part in pairs if before.startswith("lora_") or before == "modules_to_save"})


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
