"""What backward accumulated since the last step, and what the optimizer consumes of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from timstore.errors import StateError
from timstore.recording.elements import (
    Elements,
    Values,
    is_kept_together,
    kept_together,
    on_host,
    without_largest,
)

# How far a parameter's consumed gradient may be from one common multiple of the accumulated one.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2


class Accumulation:
    """Watches gradients being accumulated into the trained parameters.

    Right after backward has accumulated into a parameter, some of its gradient's elements are kept. The
    optimizer consumes a common multiple of them (clipping), or something that no record can be weighted by.

    Args:
        vanished: called when a backward pass finds that what was accumulated by earlier ones has been zeroed.
        whole: keep all of the accumulated gradients, which lets clipping by value be told from other changes.
        averaged: gradients are averaged over several processes when backward ends, and looked at after that.
        paused: whether a backward pass of our own runs, which accumulates nothing.
        accumulated: told of each parameter when a backward pass has accumulated into it.

    Attributes:
        clip_value: the bound of a clipping by value that `ratio` found; None where there was none.
        touched: names of the parameters that backward passes reached here since the last step.
        extremes: look at every number for the largest and smallest, the only ones that a clipping by value is sure to
            change. Without, as suffices for a step that no record is of, at some numbers alone.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        vanished: Callable[[], None],
        *,
        whole: bool = False,
        averaged: bool = False,
        paused: Callable[[], bool] = lambda: False,
        accumulated: Callable[[nn.Parameter], None] = lambda _: None,
    ) -> None:
        self._parameters = parameters
        self._vanished = vanished
        self._elements: dict[str, Elements] = {}
        # Of what was accumulated since the last step.
        self._kept: dict[str, Values] = {}
        self.clip_value: float | None = None
        self.extremes = True
        self._whole: dict[str, torch.Tensor] | None = {} if whole else None
        self._suspect = False
        self._stale: str | None = None
        self._paused = paused
        self._accumulated = accumulated
        self._averaged = averaged
        # Looked at together, when the backward pass is over.
        self._together = {name for name, one in parameters.items() if is_kept_together(one) and one.numel()}
        self._settling = -1
        # In steps that prove that it can be told from what is averaged.
        self._local: dict[str, torch.Tensor] | None = {} if averaged else None
        self.touched: set[str] = set()
        self._handles: list[Any] = []
        for name, parameter in parameters.items():
            self._handles.append(parameter.register_hook(self._before(name)))  # type: ignore[no-untyped-call]
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._after(name)))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget what was accumulated: the step is over, or was skipped."""
        self._kept.clear()
        self.touched.clear()
        if self._whole is not None:
            self._whole.clear()
        self._suspect = False
        self._stale = None

    @property
    def begun(self) -> bool:
        """Whether anything was accumulated since the last step."""
        return bool(self._kept)

    @property
    def reached(self) -> bool:
        """Whether any number of what was accumulated is not zero."""
        return any(bool(kept.any()) for kept in self._kept.values())

    def lost(self) -> bool:
        """Return whether what was accumulated has been zeroed: the step that it was for was skipped.

        When it has not, the next backward pass looks again, for loops that zero between forward and backward.
        """
        held = sorted((self._parameters[name] for name in self._kept), key=torch.numel)
        self._suspect = any(_nonzero(parameter) for parameter in held)
        # What was zero when it was accumulated may still be what it was.
        return not self._suspect and (self.reached or all(parameter.grad is None for parameter in held))

    def ratio(self) -> float:
        """Return consumed over accumulated gradient, one factor common to all parameters.

        Raises:
            StateError: if there is none (per-layer clipping, added noise, gradients changed by hand), if a
                gradient is not finite, or was not accumulated since the last step. Clipping by value is no
                common factor either, but known where the whole gradients were kept: then 1 and `clip_value`.
        """
        self.clip_value = None
        stale = self._stale or next(
            (name for name, one in self._parameters.items() if name not in self._kept and _nonzero(one)), None
        )
        if stale is not None:
            raise _stale(stale)
        names = [name for name in self._kept if self._parameters[name].grad is not None]
        if not names:
            return 1.0
        sums = self._sums(names)
        between, accumulated, consumed = sums.sum(0).tolist()
        if not np.isfinite(sums).all():
            name = names[int((~np.isfinite(sums)).any(1).argmax())]
            raise StateError(
                f"parameter {name}: its gradient is not finite, so nothing after this step could be recorded. Skip "
                "such steps (do not call optimizer.step()), or find where the loss overflows",
                kind="not-finite",
                parameter=name,
            )
        if accumulated == 0:
            if consumed or any(_nonzero(self._parameters[name]) for name in names):
                raise StateError(
                    "the gradients are too sparse to see how they were scaled between backward and step; train "
                    "another parameter beside the embeddings",
                    kind="not-measured",
                )
            return 1.0
        ratio = float(between / accumulated)
        expected = ratio * ratio * sums[:, 1]
        off = np.sqrt(np.maximum(sums[:, 2] - 2 * ratio * sums[:, 0] + expected, 0))
        for name, error, size in zip(names, off.tolist(), np.sqrt(expected).tolist(), strict=True):
            if error > _TOLERANCE.get(self._parameters[name].dtype, _HALF_TOLERANCE) * max(size, 1e-30):
                self.clip_value = self._bound()
                if self.clip_value is not None:
                    return 1.0
                raise StateError(
                    f"parameter {name}: between backward and step its gradient was changed by more than one factor "
                    "common to all parameters (per-layer clipping, noise, or by hand): records could not be weighted. "
                    "Clip by the total norm; clipping by value can be recorded with optimizer_history='gradients'",
                    kind="gradient-changed",
                    parameter=name,
                )
        return ratio

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients as the optimizer is about to consume them, but for a clipping by value."""
        if self.clip_value is not None and self._whole is not None:
            return dict(self._whole)
        return {name: one.grad.detach() for name, one in self._parameters.items() if one.grad is not None}

    def _bound(self) -> float | None:
        """Return the value that all accumulated gradients were clamped to, None if that is not what happened."""
        if self._whole is None:
            return None
        pairs = [(self._parameters[name].grad, whole) for name, whole in self._whole.items()]
        bound = max(float(grad.abs().max()) for grad, _ in pairs if grad is not None)
        clamped = (grad is not None and torch.equal(grad, whole.clamp(-bound, bound)) for grad, whole in pairs)
        return bound if all(clamped) else None

    def _sums(self, names: Sequence[str]) -> np.ndarray:
        """Return, of each parameter's kept elements, (now x then, then x then, now x now), (parameters, 3)."""
        sums = np.empty((len(names), 3))
        together = kept_together(self._gradients_together(names))
        alone = {
            name: self._elements[name].of(_gradient(self._parameters[name])) for name in names if name not in together
        }
        now = on_host([together[name] if name in together else alone[name] for name in names])
        then = on_host([self._kept[name] for name in names])
        starts = np.cumsum([0, *(len(self._kept[name]) for name in names[:-1])])
        with np.errstate(over="ignore", invalid="ignore"):
            for column, product in enumerate((now * then, then * then, now * now)):
                sums[:, column] = np.add.reduceat(product, starts)
        return sums

    def _before(self, name: str) -> Callable[[torch.Tensor], None]:
        def arriving(_: torch.Tensor) -> None:
            if self._paused():
                return
            if not self._kept and not self.touched:
                # Harmless where it is zeroed before the step, as a GAN's discriminator is after its generator's pass.
                if _nonzero(self._parameters[name]):
                    self._stale = name
            elif self._suspect and name in self._kept and bool(self._kept[name].any()):
                self._suspect = False
                if not _nonzero(self._parameters[name]):
                    self._vanished()

        return arriving

    def _after(self, name: str) -> Callable[[torch.Tensor], None]:
        def arrived(parameter: torch.Tensor) -> None:
            if parameter.numel() == 0:
                return
            self.touched.add(name)
            self._accumulated(parameter)  # type: ignore[arg-type]
            if not self._averaged and name not in self._together:
                self._keep([name])
                return
            self._settle_later()
            if self._local is not None:
                assert parameter.grad is not None
                self._local[name] = parameter.grad.detach().clone()

        return arrived

    def _keep(self, names: Sequence[str]) -> None:
        held = {name: one.grad for name in names if (one := self._parameters[name]).grad is not None and one.numel()}
        for name, gradient in held.items():
            if self._whole is not None:
                self._whole[name] = gradient.detach().clone()
            if name not in self._together:
                if name not in self._elements:
                    self._elements[name] = Elements(self._parameters[name])
                self._kept[name] = self._elements[name].chosen(gradient, self.extremes)
        self._kept.update(kept_together(self._gradients_together(held)))

    def settle_later(self) -> None:
        """Look at the gradients when this backward pass is over, where they are averaged at its end."""
        if self._averaged:
            self._settle_later()

    def _settle_later(self) -> None:
        task = torch._C._current_graph_task_id()
        if self._settling != task:
            self._settling = task
            _when_over(lambda: _when_over(self._settle))  # behind what others want done by then

    def _settle(self) -> None:
        self._settling = -1
        # Of averaged ones also those that only other processes' samples reached.
        names = self._together & self.touched
        self._keep([name for name in self._parameters if self._averaged or name in names])

    def _gradients_together(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        found = ((name, self._parameters[name].grad) for name in names if name in self._together)
        return {name: gradient.detach() for name, gradient in found if gradient is not None}

    def take_local(self) -> dict[str, torch.Tensor]:
        """Return what this process alone accumulated for this step; it is not kept for others until asked for."""
        local, self._local = self._local, None
        return local or {}

    def keep_local(self) -> None:
        """Keep what this process alone accumulates for the next step."""
        if self._averaged:
            self._local = {}

    def looked_up(self, local: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept elements of all parameters, (n,) float64, and the same ones of what is this process's own."""
        together = kept_together({name: one for name, one in local.items() if name in self._together})
        kept: list[Values] = []
        mine: list[Values] = []
        for name, held in self._kept.items():
            # The largest magnitude of a mean is not the mean of the largest.
            kept.append(without_largest(held) if name in self._together else held)
            if name not in local:
                mine.append(np.zeros(len(kept[-1])))
            elif name in self._together:
                mine.append(without_largest(together[name]))
            else:
                mine.append(self._elements[name].of_flat(local[name].reshape(-1)))
        return torch.from_numpy(on_host(kept)), torch.from_numpy(on_host(mine))


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _nonzero(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _when_over(work: Callable[[], None]) -> None:
    """Have something done when the backward pass that runs is over."""
    torch.autograd.Variable._execution_engine.queue_callback(work)


def _stale(name: str) -> StateError:
    return StateError(
        f"parameter {name}: its gradient still holds what an earlier step consumed, or what was accumulated before "
        "recording began, and would be consumed again; call optimizer.zero_grad() after each step",
        kind="stale-gradient",
        parameter=name,
    )
