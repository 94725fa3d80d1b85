"""Asking a model something without leaving a trace."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from timstore.errors import InvalidInputError, TimstoreError


class RandomState:
    """Where the generators of random numbers are: torch's, for the host and for some devices, Python's and numpy's.

    Args:
        beyond_torch: also Python's and numpy's, which takes ten times as long.
    """

    def __init__(self, devices: Iterable[torch.device], *, beyond_torch: bool = True) -> None:
        self._host = torch.get_rng_state()
        cuda = {device for device in devices if device.type == "cuda"}
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in cuda]
        self._others = (random.getstate(), np.random.get_state()) if beyond_torch else None

    def moved(self) -> bool:
        """Say whether any of them has drawn since."""
        return (
            not torch.equal(torch.get_rng_state(), self._host)
            or any(not torch.equal(torch.cuda.get_rng_state(device), state) for device, state in self._cuda)
            or self.moved_beyond_torch()
        )

    def moved_beyond_torch(self) -> bool:
        """Say whether Python's or numpy's has drawn since; False where they are left out."""
        if self._others is None:
            return False
        of_python, of_numpy = self._others
        return random.getstate() != of_python or not _same(np.random.get_state(), of_numpy)

    def rewind(self) -> None:
        """Take them back there."""
        torch.set_rng_state(self._host)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        if self._others is not None:
            random.setstate(self._others[0])
            np.random.set_state(self._others[1])


@contextmanager
def undisturbed(model: nn.Module, *, evaluate: bool = True) -> Iterator[Callable[[], None]]:
    """Run the model, in eval mode unless told otherwise, and leave mode, buffers and random state as they were.

    Yields:
        what takes the random state back to where it was at the beginning.
    """
    training = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    chance = RandomState(parameter.device for parameter in model.parameters())
    try:
        if evaluate:
            # Not by eval(): what a module does in there (merging adapters), putting its mode back would not undo.
            for module in model.modules():
                module.training = False
        yield chance.rewind
    finally:
        chance.rewind()
        with torch.no_grad():
            for buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for module, mode, buffers in training:
            module.training = mode
            # A forward pass may also have put another tensor in a buffer's place.
            module._buffers.clear()
            module._buffers.update(buffers)


def _same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def given(what: str) -> Iterator[None]:
    """Have what a model raises about its input say what that was, in an error of ours."""
    try:
        yield
    except (TimstoreError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model raises
        raise InvalidInputError(f"the model does not take {what}: {type(error).__name__}: {error}") from error
