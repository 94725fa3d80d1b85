"""Asking a model something without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode, and leave mode, buffers and random state as they were."""
    training = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for module, mode, buffers in training:
            module.training = mode
            # A forward pass may also have put another tensor in a buffer's place.
            module._buffers.clear()
            module._buffers.update(buffers)
