"""What is put around models and optimizers by others: looked through, or refused with the reason."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from timstore.errors import CoverageError, InvalidInputError


def inner_model(model: Any) -> tuple[nn.Module, Any]:
    """Return the model itself and the process group that averages its gradients, None where there is none.

    Raises:
        InvalidInputError: it is no module.
        CoverageError: something around it hides the samples from hooks, or spreads its parameters.
    """
    inner, group = unwrapped(model)
    if isinstance(inner, DataParallel):
        raise CoverageError(
            "DataParallel copies the model in every forward pass, out of reach of hooks: use DistributedDataParallel "
            "(torchrun), or one device"
        )
    for name, module in inner.named_modules():
        if _is_compiled(module):
            raise CoverageError(
                f"module {name or 'at the top'} ({type(module).__name__}) is compiled: what runs inside torch.compile "
                "is out of reach of hooks. Record the model as it was before (compiled._orig_mod), not compiled"
            )
    spread = next((name for name, one in inner.named_parameters() if hasattr(one, "device_mesh")), None)
    if spread is not None or any("FullyShardedDataParallel" in type(one).__name__ for one in inner.modules()):
        raise CoverageError(
            "the model's parameters are spread over several processes (FSDP, DTensor), where no process has a whole "
            "gradient: record under DistributedDataParallel"
        )
    return inner, group


def unwrapped(model: Any) -> tuple[nn.Module, Any]:
    """Return the model itself and the process group of its DistributedDataParallel, None where it has none.

    Raises:
        InvalidInputError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        return model.module, model.process_group
    return model, None


def inner_optimizers(given: Any) -> tuple[list[torch.optim.Optimizer], Any]:
    """Return the optimizers that step, of one or of a list, and the GradScaler around them, as Accelerate holds them.

    Raises:
        InvalidInputError: one is no torch optimizer, or there is none.
    """
    found, scaler = [], None
    for optimizer in given if isinstance(given, list | tuple) else [given]:
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            scaler = scaler or getattr(optimizer, "scaler", None)
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidInputError(
                f"optimizer is a torch.optim.Optimizer, or a list of them, not {type(optimizer).__name__}"
            )
        found.append(optimizer)
    if not found:
        raise InvalidInputError("the list of optimizers is empty")
    return found, scaler


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
