"""Adam's preconditioner: what each element of a gradient was divided by when it became a step.

    step  =  lr * mhat / (sqrt(vhat) + eps),      vhat = v / (1 - beta2^t)

so that the sum of what the samples pushed, times 1 / (sqrt(vhat) + eps), is the change of the parameters. The second
moment v is taken as it is at the end; early steps divided by other numbers (docs/design/rollback.md: that is enough).
"""

from collections.abc import Sequence

import torch

from timstore.database.states import State
from timstore.errors import CoverageError
from timstore.rollbacks.filtering import phi
from timstore.rollbacks.plan import Plan
from timstore.rollbacks.vectors import Vector, Workspace


def read_preconditioner(plan: Plan, moments: State, workspace: Workspace) -> Vector | None:
    """Return 1 / (sqrt(vhat) + eps) for every element, 1 where no Adam divided; None if none did."""
    if not plan.divisions:
        return None
    missing = sorted(plan.divisions.keys() - moments.places.keys())
    if missing:
        raise CoverageError(
            f"parameter {missing[0]} was trained with Adam, and its second moment was not kept for this model: "
            "it is kept when the recorder's `with` block ends, at recorder.save_point(), or by append_states",
            kind="no-second-moment",
            parameter=missing[0],
        )
    result = workspace.new()
    for block in workspace.blocks():
        division = plan.divisions.get(block.parameter)
        factor = torch.ones(block.stop - block.start, dtype=workspace.dtype, device=workspace.device)
        if division is not None:
            width = plan.parameters[block.parameter].matrix_shape[1]
            numbers = moments.read(block.parameter, width, block.start, block.stop)
            moment = torch.from_numpy(numbers).to(workspace.device, workspace.dtype)
            factor = 1 / ((moment / division.correction).sqrt() + division.eps)
            # Of an element that no gradient ever reached Adam's rule says nothing, and 1 / eps would be huge.
            factor = torch.where(moment > 0, factor, 0.0)
        result.write(block.parameter, block.start, factor)
    return result


def into_steps(increments: Sequence[Vector], preconditioner: Vector) -> dict[str, float]:
    """Turn sums of gradients into changes of parameters, in place; return each parameter's largest factor."""
    # An element's error is multiplied as the element is; the largest factor bounds it for the parameter.
    workspace = preconditioner.workspace
    largest: dict[str, float] = dict.fromkeys(workspace.sizes, 0.0)
    for block in workspace.blocks():
        factor = preconditioner.at(block)
        largest[block.parameter] = max(largest[block.parameter], float(factor.max()))
        for increment in increments:
            increment.write(block.parameter, block.start, increment.at(block) * factor)
    return largest


def decayed(change: Vector, preconditioner: Vector, plan: Plan) -> None:
    """Let coupled decay act on a change, in place: its part of the probe filter, for when there is no probe."""
    # Coupled decay adds decay * parameter to the gradient: a curvature of `decay` in every direction, which acts
    # through the division. Over a length tau the filter multiplies by phi(tau decay / (sqrt(vhat) + eps)).
    for block in change.workspace.blocks():
        division = plan.divisions.get(block.parameter)
        if division is None or division.decay == 0:
            continue
        length = sum(taus[block.parameter] for taus in plan.lengths) * division.decay
        change.write(block.parameter, block.start, change.at(block) * phi(preconditioner.at(block) * length))
