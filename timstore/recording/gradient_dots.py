"""Inner products of records with a whole gradient that is kept: one number per record that makes clipping exact.

Without a sample the gradient's norm would have been |g - h|, hence the clip factor another one; its square
is |g|^2 - 2 <g, h> + |h|^2, and only the middle term needs the gradient, which is gone after the step.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from timstore.records import Factors, Gradient, Rows, widen

Gradients = Mapping[str, Sequence[Gradient]]


def inner_products(records: Mapping[int, Gradients], gradients: Mapping[str, torch.Tensor]) -> dict[int, float]:
    """Return the inner product of each record with whole gradients.

    Cost: one product of a layer's weight-shaped gradient with its records' token rows, as the forward pass of those
    samples takes; on the parameters' device.

    Args:
        records: sample to parameter to parts.
        gradients: parameter to its whole gradient, in its shape.
    """
    order = {sample: number for number, sample in enumerate(records)}
    totals = np.zeros(len(order))
    if not records:
        return {}
    for name, gradient in gradients.items():
        if gradient.dtype in (torch.float16, torch.bfloat16):
            gradient = gradient.float()
        matrix = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient.reshape(1, -1)
        parts = [(order[sample], part) for sample, held in records.items() for part in held.get(name, ())]
        factors = [(owner, part) for owner, part in parts if isinstance(part, Factors)]
        if factors:
            # Of a gradient G = D'A the product <G, g> is the sum of (D g) * A over its tokens: all samples' at once.
            outputs = _joined([part.output_gradients for _, part in factors], matrix)
            inputs = _joined([part.inputs for _, part in factors], matrix)
            sums = (outputs @ matrix).mul_(inputs).sum(1).double().cpu().numpy()
            owners = np.repeat([owner for owner, _ in factors], [len(part.inputs) for _, part in factors])
            totals += np.bincount(owners, sums, len(totals))
        for owner, part in parts:
            if isinstance(part, Rows):
                rows = matrix[torch.from_numpy(part.indices).to(matrix.device)]
                totals[owner] += float((rows * _joined([part.values], matrix)).double().sum())
            elif not isinstance(part, Factors):
                totals[owner] += float((_joined([part.reshape(matrix.shape)], matrix) * matrix).double().sum())
    return dict(zip(order, totals.tolist(), strict=True))


def _joined(arrays: Sequence[np.ndarray], like: torch.Tensor) -> torch.Tensor:
    """Return the rows of all arrays below each other, beside another tensor and in its dtype."""
    tensors = [torch.from_numpy(widen(array)) for array in arrays]
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(like.device, like.dtype)
