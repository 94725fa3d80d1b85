"""Adam's coordinates: what each element of a gradient was divided by when it became a step.

The second moment is taken as it is at the end; early steps divided by other numbers. Why that is enough:
docs/design/rollback.md.
"""

from collections.abc import Sequence

import torch

from timstore.database.states import State
from timstore.errors import CoverageError
from timstore.rollbacks.filtering import phi
from timstore.rollbacks.plan import Plan
from timstore.rollbacks.vectors import Vector, Workspace


def read_coordinates(plan: Plan, moments: State, workspace: Workspace) -> Vector | None:
    """Return 1 / (sqrt(v / correction) + eps) for every element, 1 where no Adam divided; None if none did.

    An element that no gradient ever reached (v = 0) gets 0: Adam's rule says nothing about it.

    Raises:
        CoverageError: the second moment was not kept for the model's moment.
    """
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
        if division is None:
            ones = torch.ones(block.stop - block.start, dtype=workspace.dtype, device=workspace.device)
            result.write(block.parameter, block.start, ones)
            continue
        width = plan.parameters[block.parameter].matrix_shape[1]
        found = moments.read(block.parameter, width, block.start, block.stop)
        moment = torch.from_numpy(found).to(workspace.device, workspace.dtype)
        step = 1 / ((moment / division.correction).sqrt() + division.eps)
        result.write(block.parameter, block.start, torch.where(moment > 0, step, 0.0))
    return result


def decayed(change: Vector, coordinates: Vector, plan: Plan) -> None:
    """Let coupled decay act on a change, in place: its part of the probe filter, for when there is no probe."""
    workspace = change.workspace
    for block in workspace.blocks():
        division = plan.divisions.get(block.parameter)
        if division is None or division.decay == 0:
            continue
        length = sum(taus[block.parameter] for taus in plan.lengths) * division.decay
        numbers = change.read(block.parameter, block.start, block.stop)
        factor = phi(coordinates.read(block.parameter, block.start, block.stop) * length)
        change.write(block.parameter, block.start, numbers * factor)


def into_steps(increments: Sequence[Vector], coordinates: Vector) -> dict[str, float]:
    """Turn sums of gradients into changes of parameters, in place; return each parameter's largest factor."""
    workspace = coordinates.workspace
    largest: dict[str, float] = dict.fromkeys(workspace.sizes, 0.0)
    for block in workspace.blocks():
        factor = coordinates.read(block.parameter, block.start, block.stop)
        largest[block.parameter] = max(largest[block.parameter], float(factor.max()))
        for increment in increments:
            numbers = increment.read(block.parameter, block.start, block.stop)
            increment.write(block.parameter, block.start, numbers * factor)
    return largest
