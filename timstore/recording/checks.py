"""What a recorder proves about itself at the first step, before hours are spent."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timstore.errors import CoverageError
from timstore.records import Factors, Gradient, Rows, widen
from timstore.undisturbed import undisturbed

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
) -> None:
    """Hold the sum of all samples' parts to the gradient that the optimizer consumes.

    Args:
        gradients: of the parameters that have one.
        parts: parameter (by identity) to every part of every sample of the step.
        ratio: consumed over accumulated gradient.

    Raises:
        CoverageError: naming the parameter that something else than the hooked modules reaches.
    """
    norms = [float(one.double().norm()) for one in gradients.values()]
    noise = _NOISE * sum(norm * norm for norm in norms) ** 0.5
    for name, gradient in gradients.items():
        parameter = parameters[name]
        found = parts.get(id(parameter), ())
        if not found and bool(gradient.any()):
            raise _not_captured(model, name)
        total, bound = _total(found, gradient)
        tolerance = max(_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in (parameter.dtype, *_dtypes(found)))
        off = float((total * ratio - gradient.double()).norm())
        if off > tolerance * max(bound * abs(ratio), float(gradient.double().norm()), noise, 1e-30):
            raise CoverageError(
                f"parameter {name}: the recorded gradients add up to something else than its gradient (off by "
                f"{off:.2g} in norm). Something besides its module uses it, or samples of the batch are coupled",
                kind="sum-check",
                parameter=name,
            )


def check_captured(model: nn.Module, parameters: Mapping[str, nn.Parameter], captured: Iterable[int]) -> None:
    """Refuse a step in which a parameter got a gradient that no hook saw.

    Raises:
        CoverageError: naming the parameter.
    """
    seen = set(captured)
    for name, parameter in parameters.items():
        if id(parameter) not in seen and parameter.grad is not None and bool(parameter.grad.any()):
            raise _not_captured(model, name)


def _not_captured(model: nn.Module, name: str) -> CoverageError:
    owner, _, _ = name.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__
    return CoverageError(
        f"parameter {name} is trained, and module {owner or 'at the top'} ({kind}) was not seen using it: it is used "
        "directly, where hooks cannot see, or under a checkpoint with use_reentrant=True (use False). Freeze it, or "
        "build that module from Linear layers",
        kind="not-captured",
        parameter=name,
        module=owner,
    )


def check_order(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: int,
    watched: "list[tuple[str, torch.Tensor]]",
) -> None:
    """Run the batch twice, once with its rows reversed: every module's input must be reversed alike.

    The sum alone cannot see a batch axis in the wrong place when there are as many tokens as rows.

    Args:
        watched: filled by the hooks with (module, per-row summary of its input) while the model runs.

    Raises:
        CoverageError: naming the module whose axis 0 is not the batch.
    """

    def reverse(value: Any) -> Any:
        return value.flip(0) if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value

    with undisturbed(model), torch.no_grad():
        model(*args, **kwargs)
        straight = list(watched)
        watched.clear()
        model(*(reverse(value) for value in args), **{name: reverse(value) for name, value in kwargs.items()})
        turned = list(watched)
        watched.clear()
    for (name, before), (_, after) in zip(straight, turned, strict=False):
        if len(before) != rows:
            continue  # refused with a message of its own when the forward pass is recorded
        scale = float(before.abs().max()) or 1.0
        if not torch.allclose(before.flip(0) / scale, after / scale, rtol=1e-2, atol=1e-3):
            raise CoverageError(
                f"module {name}: its input does not follow the order of the batch's rows, so axis 0 is not the batch "
                "there; no gradient could be told from another. Keep the batch on axis 0, or freeze the module",
                kind="order-check",
                module=name,
            )


def summary(given: torch.Tensor) -> torch.Tensor:
    """Return three numbers per row of an input, enough to tell rows apart."""
    rows = given.detach().reshape(len(given), -1).double() if given.ndim else given.detach().double().reshape(1, 1)
    ramp = torch.linspace(0, 1, rows.shape[1], dtype=torch.float64, device=rows.device)
    return torch.stack([rows.sum(1), rows @ ramp, rows.abs().sum(1)], dim=1).cpu()


def _total(parts: Sequence[Gradient], like: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the sum of the parts in float64, in the gradient's shape, and the bound its error is measured by."""
    total = torch.zeros(like.shape, dtype=torch.float64)
    flat = total.view(total.shape[0], -1) if total.ndim > 1 else total
    bound = 0.0
    for part in parts:
        if isinstance(part, Factors):
            outputs = torch.from_numpy(widen(part.output_gradients)).double()
            inputs = torch.from_numpy(widen(part.inputs)).double()
            flat.addmm_(outputs.T, inputs)
            bound += float((outputs.norm(dim=1) * inputs.norm(dim=1)).sum())
        elif isinstance(part, Rows):
            values = torch.from_numpy(widen(part.values)).double()
            flat.index_add_(0, torch.from_numpy(part.indices), values)
            bound += float(values.norm(dim=1).sum())
        else:
            values = torch.from_numpy(widen(part)).double()
            total += values.reshape(total.shape)
            bound += float(values.norm())
    return total.to(like.device), bound


def _dtypes(parts: Sequence[Gradient]) -> set[torch.dtype]:
    names = set()
    for part in parts:
        values = part.output_gradients if isinstance(part, Factors) else part.values if isinstance(part, Rows) else part
        names.add({8: torch.float64, 4: torch.float32}.get(values.dtype.itemsize, torch.bfloat16))
    return names
