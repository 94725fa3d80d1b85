"""Tables that are looked up by one row of ids, (1, T), for all samples: given a row for each, is it that sample's own?

What a model makes of its first row for everybody, or of a mean over rows, is all samples' together.
"""

from collections.abc import Callable, Sequence

import torch

from timstore.recording.layouts import Axis, only

# Of gradients in bfloat16 that were added up in another order.
_ROUNDING = 0.1
# Runs the batch, or the samples of it that are named in their place; returns what the model returned, as far as it can
# be differentiated, and what a table did in each call, (rows, T, d).
Run = Callable[[torch.Tensor | None], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]


def has_own_rows(run: Run, rows: int, axis: int) -> bool:
    """Say whether what comes back from each of `rows` samples comes to its row of a table.

    Where what comes back is zero it is taken to be so.

    Raises:
        RuntimeError: of torch, where gradients cannot be asked for (a reentrant checkpoint).
    """
    outputs, tables = run(None)
    if not outputs:
        return False
    batched = [one for one in outputs if one.ndim > axis and one.shape[axis] == rows]
    if batched:
        return all(_comes_back_to(row, axis, batched, tables) for row in (0, rows - 1))
    # A loss alone cannot be asked for one sample's part. But with the last sample in the first one's place as well,
    # each row's gradient is that of the sample that is there.
    order = torch.arange(rows, device="cpu")
    order[0] = rows - 1
    others, moved = run(order)
    if (len(others), len(moved)) != (len(outputs), len(tables)):
        return False
    before, after = (
        _gradients(losses, rows_of, [torch.ones_like(one) for one in losses])
        for losses, rows_of in ((outputs, tables), (others, moved))
    )
    return _is_multiple(after, before[order.to(before.device)])


def _comes_back_to(row: int, axis: int, outputs: Sequence[torch.Tensor], tables: Sequence[torch.Tensor]) -> bool:
    """Say whether a gradient at one sample's outputs comes back to that row of a table.

    More to that one than to any other, which it may reach too where samples are tied together.
    """
    drawn = [only(torch.randn_like(one), Axis(axis), one.shape[axis], [row]) for one in outputs]
    sizes = _gradients(outputs, tables, drawn).norm(dim=1)
    others = sizes.clone()
    others[row] = 0.0
    return not bool(sizes.any()) or bool((2 * others < sizes[row]).all())


def _is_multiple(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Say whether a matrix is another one but for a factor: that of a mean over tokens, when there are more of them."""
    factor = (wanted * found).sum() / wanted.square().sum()
    return not bool(found.any()) or bool(factor > 0 and (found - factor * wanted).norm() <= _ROUNDING * found.norm())


def _gradients(
    outputs: Sequence[torch.Tensor], tables: Sequence[torch.Tensor], arriving: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return what comes back to each row of a table, all its calls side by side, (rows, n)."""
    found = torch.autograd.grad(outputs, tables, arriving, allow_unused=True, materialize_grads=True, retain_graph=True)
    return torch.cat([one.flatten(1).double() for one in found], dim=1)
