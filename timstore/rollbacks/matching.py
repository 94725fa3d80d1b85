"""How much tau has to be multiplied by, measured on the probe: for momentum's lag, and for what a small probe misses.

The filter's closed form knows no momentum: it lets the other samples answer a push at once, which takes too much
back. A small probe shows too little curvature in the very directions in which its space was built, which takes too
little. Both are seen in one comparison: on one half of the probe a space is built and the closed form applied, with
tau multiplied by m; the curvature of the other half within that space, which it was not built for, and the run's
true answer say how much of the change should be left. The m at which the two agree is taken, of both ways round the
geometric mean.

Source: docs/design/curvature.md.
"""

import math
from collections.abc import Callable

from timstore.rollbacks.krylov import Apply, Space, krylov
from timstore.rollbacks.response import Response
from timstore.rollbacks.vectors import Vector, Workspace

_LEAST, _MOST = 0.1, 10.0


def multiplier(
    start: Vector, halves: tuple[Apply, Apply], response: Response, workspace: Workspace, steps: int
) -> float:
    """Return what to multiply tau by.

    Cost: twice `steps` products with each half of the probe; `steps` vectors in the workspace.

    Args:
        start: the whole first-order change in the filter's coordinates.
        halves: products with s H s, H of either half of the probe; the same one twice where it cannot be halved.
    """
    product = 1.0
    for own, other in (halves, halves[::-1]):
        space = krylov(start, own, workspace, steps)
        if space is None:
            return 1.0
        product *= _matched(space, other, response)
        space.free()
    return math.sqrt(product)


def _matched(space: Space, other: Apply, response: Response) -> float:
    values, _, weights = space.eigen()
    seen, _, seen_weights = space.eigen(space.project(other))
    wanted = float(seen_weights.square() @ response.true(seen))

    def left(factor: float) -> float:
        return float(weights.square() @ response.closed(values * factor))

    if left(_LEAST) - left(_MOST) < 1e-6 * space.length**2:
        return 1.0  # flat: nothing to measure, and nothing to answer
    return _bisected(left, wanted)


def _bisected(left: Callable[[float], float], wanted: float) -> float:
    """Return the factor at which a falling function has a value, within bounds."""
    low, high = _LEAST, _MOST
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if left(middle) > wanted else (low, middle)
    return low
