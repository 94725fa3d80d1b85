"""Which tensor of a checkpoint is which recorded parameter.

What saves a model renames in few ways: a prefix is put before all names or taken off (`model.` where a bare model was
saved from one with a head, `module.`, `_orig_mod.`), peft leaves out the adapter's name, and of tied weights one name
is kept. That a name was understood rightly is seen by the digests afterwards; what is ambiguous is refused before.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from timstore.checkpoints.discover import Checkpoint
from timstore.errors import ModelMismatchError
from timstore.records import Parameter
from timstore.rollbacks.difference import other_adapter

Way = Callable[[str], str]
# Names that a prefix is looked for with.
_TRIED = 16


@dataclass(frozen=True, eq=False, slots=True)
class Naming:
    """How parameters are called in a checkpoint.

    Attributes:
        tensors: recorded parameter to tensor.
        absent: recorded parameters that an adapter leaves to the model under it.
        way: from any parameter's name to what it would be called there.
        may_be_tied: tensors that are no recorded parameter, but may hold one a second time; none where a tensor may
            hold the same by chance.
    """

    tensors: dict[str, str]
    absent: tuple[str, ...]
    way: Way
    may_be_tied: tuple[str, ...]


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
    names, where = sorted(recorded), checkpoint.path
    is_certain = is_checked or bool(checkpoint.config.get("tie_word_embeddings"))
    way = _way(checkpoint, names, _adapters(trained) if checkpoint.is_adapter else [])
    tensors = {name: way(name) for name in names if way(name) in checkpoint.holders}
    missing = [name for name in names if name not in tensors]
    for name in missing:
        kept = _kept_of_tied(checkpoint, way(name), trained.get(name), len(missing), set(tensors.values()), is_certain)
        if kept is not None:
            tensors[name] = kept
    absent = tuple(name for name in missing if name not in tensors)
    free = sorted(checkpoint.holders.keys() - set(tensors.values()))
    lost = [name for name in absent if not checkpoint.is_adapter or name in trained]
    if lost:
        why = None if checkpoint.is_adapter else other_adapter(names, checkpoint.holders)
        raise ModelMismatchError(
            f"{where} has no tensor for parameter {lost[0]} ({len(lost)} of {len(names)} recorded ones are missing); "
            f"it holds {_some(free) or 'nothing'} beside the others. "
            f"{why or 'It was saved from another model, or incomplete'}",
            parameter=lost[0],
        )
    for name, parameter in trained.items():
        shape = checkpoint.tensor(tensors[name]).shape
        if shape != parameter.shape:
            raise ModelMismatchError(
                f"tensor {tensors[name]} of {where} has shape {shape}; parameter {name} was recorded with shape "
                f"{parameter.shape}. It was saved from another model, or resized",
                parameter=name,
                tensor=tensors[name],
            )
    # Vectors may be equal without being tied: all zeros, all ones.
    tied = tuple(name for name in free if is_certain and len(checkpoint.tensor(name).shape) > 1)
    return Naming(tensors, absent, way, tied)


def _way(checkpoint: Checkpoint, names: list[str], adapters: list[str]) -> Way:
    """Return the renaming that most names are found by; names as they are count more than others."""
    renamings: list[Way] = [_as_it_is, *(partial(_without_adapter, adapter=one) for one in adapters)]
    ways = list(renamings)
    for renaming in renamings:
        ways += [partial(_prefixed, renaming, *one) for one in _prefixes(map(renaming, names), checkpoint.holders)]
    found = {way: {name: way(name) for name in names if way(name) in checkpoint.holders} for way in ways}
    best = max(ways, key=lambda way: len(found[way]))  # of equals the first
    if not found[best]:
        raise ModelMismatchError(
            f"{checkpoint.path} holds no recorded parameter: {_some(names)} were recorded, and it has "
            f"{_some(checkpoint.holders) or 'no tensor'}. It was saved from another model"
        )
    rivals = [way for way in ways if len(found[way]) == len(found[best]) and found[way] != found[best]]
    if rivals and best is not ways[0]:
        name = next(name for name in names if found[best].get(name) != found[rivals[0]].get(name))
        raise ModelMismatchError(
            f"parameter {name} could be tensor {best(name)} of {checkpoint.path} as well as {rivals[0](name)}: "
            "pass a checkpoint of the recorded model alone",
            parameter=name,
        )
    return best


def _prefixes(names: Iterable[str], tensors: Iterable[str]) -> list[tuple[str, str]]:
    """Return (taken off, put before) of every prefix by which one of some names becomes a tensor's."""
    listed, found = list(names), set()
    for name in listed[:: max(1, len(listed) // _TRIED)]:
        for tensor in tensors:
            if tensor.endswith(f".{name}"):
                found.add(("", tensor.removesuffix(name)))
            elif name.endswith(f".{tensor}"):
                found.add((name.removesuffix(tensor), ""))
    return sorted(found)


def _as_it_is(name: str) -> str:
    return name


def _prefixed(renaming: Way, off: str, before: str, name: str) -> str:
    return before + renaming(name).removeprefix(off)


def _without_adapter(name: str, adapter: str) -> str:
    """Return a name as peft saves it: `x.lora_A.default.weight` as `x.lora_A.weight`."""
    parts = name.replace(f".modules_to_save.{adapter}.", ".").split(".")
    kept = ".".join(part for place, part in enumerate(parts) if part != adapter or place < len(parts) - 2)
    return kept.removesuffix(".weight") if kept.endswith(".lora_magnitude_vector.weight") else kept


def _adapters(trained: Iterable[str]) -> list[str]:
    """Return the names of the adapters that these parameters belong to."""
    found = set()
    for name in trained:
        parts = name.split(".")
        for before, part in pairwise(parts):
            if before.startswith("lora_") or before == "modules_to_save":
                found.add(part)
    return sorted(found)


def _kept_of_tied(
    checkpoint: Checkpoint, name: str, parameter: Parameter | None, missing: int, taken: set[str], is_certain: bool
) -> str | None:
    """Return the tensor that a missing one is tied to, where that is certain, or will be seen."""
    noted = checkpoint.metadata.get(name)  # as safetensors.torch.save_model does
    if noted in checkpoint.holders:
        return noted
    if parameter is None or missing > 1 or not is_certain:
        return None
    alike = [one for one in checkpoint.holders if one not in taken and checkpoint.tensor(one).shape == parameter.shape]
    return alike[0] if len(alike) == 1 else None


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
