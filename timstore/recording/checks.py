"""What a recorder proves about itself at the first step, before hours are spent, and again on the way."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from timstore.errors import CoverageError
from timstore.records import BFLOAT16, Factors, Gradient, Rows

# Of the sum of the token norms' products: some gradients are pure rounding noise, relative to themselves.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALF_TOLERANCE = 2e-2
_TF32_TOLERANCE = 1e-3
# Less than this part of the whole gradient is no evidence.
_NOISE = 1e-3
# A sum of s_t has an error of about u Sum_t |s_t|, u = 1e-7 in float32, a hundredth of the tolerance. A dense part is
# such a sum itself, over tokens: where that cancels, as attention's key bias, b = Sum_t d_t = 0, does for each sample,
# the part is nothing but this error and its norm tells nothing of the |d_t|. The weight of the same module does, whose
# parts are bounded by Sum_t |d_t| |a_t|: its bound stands for Sum_t |d_t|.
_ROUNDING = 1e-2


def check_sum(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, torch.Tensor],
    parts: Mapping[int, Sequence[Gradient]],
    ratio: float,
    *,
    by_sample: bool = False,
) -> None:
    """Hold the sum of all samples' parts to the gradient that was accumulated of them, or that is consumed.

    Args:
        gradients: of the parameters that have one.
        parts: parameter (by identity) to every part of every sample of the step.
        ratio: of the gradients over the sum of the parts.
        by_sample: what modules do not show came from backward passes of each sample.

    Raises:
        CoverageError: naming the parameter that something else than the hooked modules reaches.
    """
    for name, off in unlike(parameters, gradients, parts, ratio).items():
        if id(parameters[name]) not in parts:
            raise _not_captured(model, name)
        raise something_else(name, off, by_sample=by_sample)


def something_else(name: str, off: float, *, by_sample: bool = False, more: str = "") -> CoverageError:
    """Return the error of a parameter whose recorded gradients are not all that it gets, `off` in norm."""
    return CoverageError(
        f"parameter {name}: the recorded gradients add up to something else than its gradient (off by "
        f"{off:.2g} in norm). "
        + (
            "The loss takes something from the model that it does not return with the batch on an axis"
            if by_sample
            else "Something besides its module uses it, which capture='per-sample' sees by a backward pass of each "
            "recorded sample; or samples of the batch are coupled"
        )
        + more,
        kind="sum-check",
        parameter=name,
    )


def unlike(
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, torch.Tensor],
    parts: Mapping[int, Sequence[Gradient]],
    ratio: float,
) -> dict[str, float]:
    """Return the parameters whose parts do not add up to the gradient, and by how much; arguments as `check_sum`."""
    norms = {name: _norm(gradient) for name, gradient in gradients.items()}
    noise = _NOISE * sum(norm * norm for norm in norms.values()) ** 0.5
    # What comes through a half-precision layer (autocast) is no better than that anywhere before it.
    captured = _dtypes([part for of_parameter in parts.values() for part in of_parameter])
    tolerance = max((_tolerance(dtype) for dtype in captured), default=0.0)
    off, bounds = {}, {}
    for name, gradient in gradients.items():
        total, bound = _total(parts.get(id(parameters[name]), ()), gradient)
        off[name] = _norm(total.mul_(ratio).sub_(gradient))
        bounds[name] = bound * abs(ratio)
    largest: dict[str, float] = {}
    for name, bound in bounds.items():
        module = name.rpartition(".")[0]
        largest[module] = max(bound, largest.get(module, 0.0))
    unequal = {}
    for name, gradient in gradients.items():
        missing = not parts.get(id(parameters[name])) and bool(gradient.any())
        allowed = max(tolerance, _tolerance(parameters[name].dtype))
        # Its products may be of TF32 there, of which convolutions are unless that is turned off.
        allowed = allowed if gradient.device.type == "cpu" else max(allowed, _TF32_TOLERANCE)
        # Not times the tolerance of half precision, which would pass a bias whose inputs are large whatever it gets.
        rounding = _ROUNDING * min(allowed, _TOLERANCE[torch.float32]) * largest[name.rpartition(".")[0]]
        if missing or off[name] > max(allowed * max(bounds[name], norms[name], noise, 1e-30), rounding):
            unequal[name] = off[name]
    return unequal


def check_captured(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], captured: Iterable[int], touched: Collection[str]
) -> None:
    """Refuse a step in which a parameter got a gradient that no hook saw.

    Args:
        captured: parameters, by identity, that hooks saw.
        touched: names of those that this process's backward passes reached.

    Raises:
        CoverageError: naming the parameter.
    """
    seen = set(captured)
    for name, parameter in parameters.items():
        if name in touched and id(parameter) not in seen and parameter.grad is not None and bool(parameter.grad.any()):
            raise _not_captured(model, name)


def _not_captured(model: nn.Module, name: str) -> CoverageError:
    owner, _, _ = name.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__
    return CoverageError(
        f"parameter {name} is trained, and module {owner or 'at the top'} ({kind}) was not seen using it: it is used "
        "directly, or by what was compiled before (torch.compile), where hooks cannot see. Freeze it, record with "
        "capture='per-sample' (one more backward pass for each recorded sample), or build that module from Linear "
        "layers",
        kind="not-captured",
        parameter=name,
        module=owner,
    )


def _total(parts: Sequence[Gradient], like: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the sum of the parts, in the gradient's shape, and the bound that its error is measured by.

    In float32 where the parts are no finer: that rounds as training itself does, far below the tolerance.
    """
    fine = torch.float64 if torch.float64 in _dtypes(parts) else torch.float32
    total = torch.zeros(like.shape, dtype=fine, device=like.device)
    flat = total.view(total.shape[0], -1) if total.ndim > 1 else total
    bound = torch.zeros((), dtype=torch.float64, device=like.device)
    for part in parts:
        if isinstance(part, Factors):
            outputs, inputs = _beside(total, part.output_gradients), _beside(total, part.inputs)
            flat.addmm_(outputs.T, inputs)
            bound += (outputs.norm(dim=1).double() * inputs.norm(dim=1).double()).sum()
        elif isinstance(part, Rows):
            values = _beside(total, part.values)
            flat.index_add_(0, torch.from_numpy(part.indices).to(total.device), values)
            bound += values.norm(dim=1).double().sum()
        else:
            values = _beside(total, part)
            total += values.reshape(total.shape)
            bound += torch.linalg.vector_norm(values, dtype=torch.float64)
    return total, float(bound)


def _beside(total: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    """Return an array's numbers on the same device, in the same dtype."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).to(total.device).view(torch.bfloat16).to(total.dtype)
    return torch.from_numpy(array).to(total.device).to(total.dtype)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def _dtypes(parts: Sequence[Gradient]) -> set[torch.dtype]:
    names = set()
    for part in parts:
        values = part.output_gradients if isinstance(part, Factors) else part.values if isinstance(part, Rows) else part
        names.add({8: torch.float64, 4: torch.float32}.get(values.dtype.itemsize, torch.bfloat16))
    return names
