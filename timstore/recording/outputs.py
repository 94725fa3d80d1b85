"""The tensors in what a model returned."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

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
