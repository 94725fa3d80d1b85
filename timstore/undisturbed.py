"""Asking a model something without leaving a trace."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


class RandomState:
    """Where torch's generators of random numbers are: the host's, and those of some devices."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._host = torch.get_rng_state()
        cuda = {device for device in devices if device.type == "cuda"}
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in cuda]

    def rewind(self) -> None:
        """Take them back there."""
        torch.set_rng_state(self._host)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)


@contextmanager
def undisturbed(model: nn.Module, *, evaluate: bool = True) -> Iterator[Callable[[], None]]:
    """Run the model, in eval mode unless told otherwise, and leave mode, buffers and random state as they were.

    Yields:
        what takes the random state back to where it was at the beginning.
    """
    training = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    of_torch = RandomState(parameter.device for parameter in model.parameters())

    def rewind() -> None:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        of_torch.rewind()

    try:
        if evaluate:
            # Not by eval(): what a module does in there (merging adapters), putting its mode back would not undo.
            for module in model.modules():
                module.training = False
        yield rewind
    finally:
        rewind()
        with torch.no_grad():
            for buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for module, mode, buffers in training:
            module.training = mode
            # A forward pass may also have put another tensor in a buffer's place.
            module._buffers.clear()
            module._buffers.update(buffers)
