"""What a recorder proves about itself at the first step, before hours are spent, and again on the way."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from timstore.errors import CoverageError
from timstore.records import Factors, Gradient, Rows, widen

# Of the sum of the token norms' products: some gradients are pure rounding noise, relative to themselves.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALF_TOLERANCE = 2e-2
# Attention's key bias has a gradient of nothing but rounding noise: less than this part of the whole is no evidence.
_NOISE = 1e-3


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
        raise CoverageError(
            f"parameter {name}: the recorded gradients add up to something else than its gradient (off by "
            f"{off:.2g} in norm). "
            + (
                "The loss takes something from the model that it does not return with the batch on an axis"
                if by_sample
                else "Something besides its module uses it, which capture='per-sample' sees by a backward pass of each "
                "recorded sample; or samples of the batch are coupled"
            ),
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
    norms = [float(one.double().norm()) for one in gradients.values()]
    noise = _NOISE * sum(norm * norm for norm in norms) ** 0.5
    # What comes through a half-precision layer (autocast) is no better than that anywhere before it.
    captured = _dtypes([part for held in parts.values() for part in held])
    tolerance = max(_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in captured) if captured else 0.0
    found = {}
    for name, gradient in gradients.items():
        parameter = parameters[name]
        mine = parts.get(id(parameter), ())
        total, bound = _total(mine, gradient)
        off = float((total * ratio - gradient.to(total.dtype)).norm())
        missing = not mine and bool(gradient.any())
        allowed = max(tolerance, _TOLERANCE.get(parameter.dtype, _HALF_TOLERANCE))
        if missing or off > allowed * max(bound * abs(ratio), float(gradient.double().norm()), noise, 1e-30):
            found[name] = off
    return found


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
        "directly, where hooks cannot see. Freeze it, record with capture='per-sample' (one more backward pass for "
        "each recorded sample), or build that module from Linear layers",
        kind="not-captured",
        parameter=name,
        module=owner,
    )


def _total(parts: Sequence[Gradient], like: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the sum of the parts, in the gradient's shape, and the bound that its error is measured by.

    In float32 where the parts are no finer: that rounds as training itself does, far below the tolerance.
    """
    fine = torch.float64 if torch.float64 in _dtypes(parts) else torch.float32
    total = torch.zeros(like.shape, dtype=fine)
    flat = total.view(total.shape[0], -1) if total.ndim > 1 else total
    bound = 0.0
    for part in parts:
        if isinstance(part, Factors):
            outputs = torch.from_numpy(widen(part.output_gradients)).to(fine)
            inputs = torch.from_numpy(widen(part.inputs)).to(fine)
            flat.addmm_(outputs.T, inputs)
            bound += float((outputs.norm(dim=1).double() * inputs.norm(dim=1).double()).sum())
        elif isinstance(part, Rows):
            values = torch.from_numpy(widen(part.values)).to(fine)
            flat.index_add_(0, torch.from_numpy(part.indices), values)
            bound += float(values.norm(dim=1).double().sum())
        else:
            values = torch.from_numpy(widen(part)).to(fine)
            total += values.reshape(total.shape)
            bound += float(values.double().norm())
    return total.to(like.device), bound


def _dtypes(parts: Sequence[Gradient]) -> set[torch.dtype]:
    names = set()
    for part in parts:
        values = part.output_gradients if isinstance(part, Factors) else part.values if isinstance(part, Rows) else part
        names.add({8: torch.float64, 4: torch.float32}.get(values.dtype.itemsize, torch.bfloat16))
    return names
