"""The tensors in what a model returned, and whose sample's is what comes back from them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from timstore.recording.layouts import Axis, only

# Of containers in each other; one may hold itself.
_DEEPEST = 8


def outputs_of(returned: Any) -> dict[str, torch.Tensor]:
    """Return path to tensor, each once: in mappings and sequences, and in those of an object that holds all outputs.

    Objects inside, such as a cache of keys and values, are not looked into: a loss is not made of them.
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, tensor in _walk(returned, "", 0):
        found.setdefault(id(tensor), (path, tensor))
    return dict(found.values())


def comes_back_to(row: int, axis: int, outputs: Sequence[torch.Tensor], tables: Sequence[torch.Tensor]) -> bool:
    """Say whether a gradient at one sample's outputs comes back to that row of what tables returned, (rows, T, d).

    More to that one than to any other, which it may reach too where samples are tied together. Where that cannot be
    tried (a loss alone is returned, a reentrant checkpoint) it is taken to be so.
    """
    if not outputs or not tables:
        return True
    drawn = [only(torch.randn_like(one), Axis(axis), one.shape[axis], [row]) for one in outputs]
    try:
        found = torch.autograd.grad(outputs, tables, drawn, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return True
    sizes = sum(one.flatten(1).double().norm(dim=1) for one in found if one is not None)
    if not isinstance(sizes, torch.Tensor) or not bool(sizes.any()):
        return True
    others = sizes.clone()
    others[row] = 0.0
    return bool((2 * others < sizes[row]).all())


def _walk(value: Any, path: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and not value.is_nested:
            yield path, value
        return
    if depth > _DEEPEST:
        return
    if isinstance(value, Mapping):
        held = value.items()
    elif isinstance(value, tuple | list):
        if value and isinstance(value[0], int | float | str):
            return
        held = dict(enumerate(value)).items()
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module) and not depth:
        held = vars(value).items()
    else:
        return
    for key, one in held:
        yield from _walk(one, f"{path}.{key}".lstrip("."), depth + 1)
