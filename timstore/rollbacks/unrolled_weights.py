"""From an optimizer's scalars to one number per step: how much of its gradient is in the model at the end.

SGD with momentum, dampening, Nesterov, coupled (L2) and decoupled decay, `maximize`, any schedule. The
difference between training with and without a gradient obeys a linear recurrence in two numbers, the
parameter's and the momentum buffer's; its adjoint, run from the last step to the first, gives every weight.

Adam, AdamW and AMSGrad the same way, with the first moment as the buffer and the weight in units of
1 / (sqrt(second moment) + eps): the second moment is taken as it is at the end.

Source: docs/design/rollback.md; the recurrence was checked there against torch's own optimizers.
"""

from dataclasses import dataclass

import numpy as np

from timstore.errors import CoverageError

_COLUMNS = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "decoupled", "maximize")
_ADAM_COLUMNS = ("lr", "beta1", "weight_decay", "decoupled", "maximize")


@dataclass(frozen=True, eq=False, slots=True)
class Schedule:
    """The scalars of one optimizer group over T steps, in order of time; every array has shape (T,).

    Attributes:
        counter: the optimizer's own count, for bias correction; 0 where unknown.
    """

    lr: np.ndarray
    momentum: np.ndarray
    dampening: np.ndarray
    nesterov: np.ndarray
    weight_decay: np.ndarray
    decoupled: np.ndarray
    maximize: np.ndarray
    beta1: np.ndarray
    beta2: np.ndarray
    eps: np.ndarray
    counter: np.ndarray


def weights(schedule: Schedule, active: np.ndarray, fresh: np.ndarray, of: str = "parameter") -> np.ndarray:
    """Return w, shape (T,): the model's final parameters hold `-w[t]` times the gradient consumed in step t.

    Args:
        active: (T,) bool; False where the parameter had no gradient, so that the step left it alone.
        fresh: (T,) bool; True where the step created the momentum buffer: torch's first buffer is the
            gradient itself, without dampening.
        of: `parameter`, or `buffer`: what the final momentum buffer holds instead.
    """
    # One step of torch's SGD, with d = sign g + coupled theta, is linear in the parameter and the buffer:
    #     buffer'  =  carried buffer + taken d
    #     theta'   =  keep theta - lr (through d + old buffer)
    # where what is subtracted is buffer' itself, or with Nesterov d + momentum buffer'. Let on_parameter and on_buffer
    # be what one unit of theta' and of buffer' adds to the end of the run. Then one unit of g adds
    #     -w  =  sign (-lr through on_parameter + taken on_buffer)
    # and one unit of theta and of buffer, before the step, add what the loop hands on to the step before it.
    steps = len(schedule.lr)
    result = np.zeros(steps)
    on_parameter, on_buffer = (1.0, 0.0) if of == "parameter" else (0.0, 1.0)
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


def adam_weights(schedule: Schedule, active: np.ndarray, fresh: np.ndarray, of: str = "parameter") -> np.ndarray:
    """Return w, shape (T,): the final parameters hold `-w[t] / (sqrt(vhat) + eps)` times the gradient of step t.

    Coupled decay is not in it: it acts through the division, so that it is left to the curvature.

    Args:
        active, fresh: as in `weights`; fresh is where the moments began at zero.
        of: `parameter`, or `buffer`: what the final first moment holds instead, undivided.
    """
    # With P = 1 / (sqrt(vhat) + eps) taken as it is at the end, one step of Adam is linear too:
    #     moment'  =  beta1 moment + (1 - beta1) g
    #     theta'   =  keep theta - P lr moment' / (1 - beta1^count)
    # on_moment is what one unit of moment' takes from the end of the run, in units of P: now, and by later steps.
    counts = own_counts(schedule, active, fresh)
    result = np.zeros(len(schedule.lr))
    on_parameter, on_moment = (1.0, 0.0) if of == "parameter" else (0.0, -1.0)
    columns = (getattr(schedule, name).tolist() for name in _ADAM_COLUMNS)
    rows = list(zip(*columns, active.tolist(), fresh.tolist(), counts.tolist(), strict=True))
    for step in range(len(rows) - 1, -1, -1):
        lr, beta1, decay, decoupled, maximize, is_active, is_fresh, count = rows[step]
        if not is_active:
            continue
        on_moment = on_moment + on_parameter * lr / (1 - beta1**count)
        taken = on_moment * (1 - beta1)
        result[step] = -taken if maximize else taken
        on_moment = on_moment * (0.0 if is_fresh else beta1)
        on_parameter *= 1 - lr * decay if decoupled else 1.0
    return result


def own_counts(schedule: Schedule, active: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Return, shape (T,), how many steps the moments of a parameter had seen after each step; 0 where idle."""
    counts = np.zeros(len(active), np.int64)
    count = 0
    for step in np.flatnonzero(active).tolist():
        # From a fresh start its own steps are counted; before one is seen, the optimizer's counter has to do.
        count = 1 if fresh[step] else count + 1 if count else int(schedule.counter[step])
        if count == 0:
            raise CoverageError(
                "Adam's own step counter is not known, and with it its bias correction: recording began after its "
                "first step, and parameters had taken different numbers of steps; pass counter= to append_step",
                kind="no-counter",
            )
        counts[step] = count
    return counts


def step_lengths(schedule: Schedule, active: np.ndarray) -> np.ndarray:
    """Return tau, shape (T,): how far step t moves the parameter along a constant unit gradient."""
    # A buffer of momentum mu adds up to 1 / (1 - mu) gradients.
    return np.where(active, schedule.lr / (1 - np.minimum(schedule.momentum, 0.999)), 0.0)
