"""From an optimizer's scalars to one number per step: how much of its gradient is in the model at the end.

SGD with momentum, dampening, Nesterov, coupled (L2) and decoupled decay, `maximize`, any schedule. The
difference between training with and without a gradient obeys a linear recurrence in two numbers, the
parameter's and the momentum buffer's; its adjoint, run from the last step to the first, gives every weight.

Source: docs/design/rollback.md; the recurrence was checked there against torch's own optimizers.
"""

from dataclasses import dataclass

import numpy as np

_COLUMNS = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "decoupled", "maximize")


@dataclass(frozen=True, eq=False, slots=True)
class Schedule:
    """The scalars of one optimizer group over T steps, in order of time; every array has shape (T,)."""

    lr: np.ndarray
    momentum: np.ndarray
    dampening: np.ndarray
    nesterov: np.ndarray
    weight_decay: np.ndarray
    decoupled: np.ndarray
    maximize: np.ndarray

    @classmethod
    def from_columns(cls, columns: dict[str, np.ndarray]) -> "Schedule":
        """Build one from the columns of the `steps` table."""
        return cls(*(columns[name] for name in _COLUMNS))


def weights(schedule: Schedule, active: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Return w, shape (T,): the model's final parameters hold `-w[t]` times the gradient consumed in step t.

    Args:
        active: (T,) bool; False where the parameter had no gradient, so that the step left it alone.
        fresh: (T,) bool; True where the step created the momentum buffer: torch's first buffer is the
            gradient itself, without dampening.
    """
    steps = len(schedule.lr)
    result = np.zeros(steps)
    on_parameter, on_buffer = 1.0, 0.0
    columns = (getattr(schedule, name).tolist() for name in _COLUMNS)
    rows = list(zip(*columns, active.tolist(), fresh.tolist(), strict=True))
    for step in range(steps - 1, -1, -1):
        lr, momentum, dampening, nesterov, decay, decoupled, maximize, is_active, is_fresh = rows[step]
        if not is_active:
            continue
        keep = 1 - lr * decay if decoupled else 1.0
        # Coupled decay enters as a gradient; `maximize` turns the data's gradient around and not the decay's.
        coupled = 0.0 if decoupled else decay
        sign = -1.0 if maximize else 1.0
        if momentum == 0:
            result[step] = sign * on_parameter * lr
            on_parameter, on_buffer = on_parameter * (keep - lr * coupled), on_buffer
            continue
        taken = 1.0 if is_fresh else 1 - dampening
        carried = 0.0 if is_fresh else momentum
        through = 1 + momentum * taken if nesterov else taken
        old = momentum * carried if nesterov else carried
        result[step] = sign * (on_parameter * lr * through - on_buffer * taken)
        on_parameter, on_buffer = (
            on_parameter * (keep - lr * through * coupled) + on_buffer * taken * coupled,
            -on_parameter * lr * old + on_buffer * carried,
        )
    return result


def step_lengths(schedule: Schedule, active: np.ndarray) -> np.ndarray:
    """Return tau, shape (T,): how far step t moves the parameter along a constant unit gradient."""
    return np.where(active, schedule.lr / (1 - np.minimum(schedule.momentum, 0.999)), 0.0)
