"""What backward accumulated since the last step, and what the optimizer consumes of it: the factor of clipping."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from timstore.errors import StateError
from timstore.recording.elements import Elements

# How far a parameter's consumed gradient may be from one common multiple of the accumulated one.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2


class ClipMeasurement:
    """Watches gradients being accumulated into one optimizer's parameters.

    When a backward pass is over, some elements of what it accumulated are kept. The optimizer consumes a common
    multiple of them (clipping), or something that no record can be weighted by.

    Args:
        parameters: by name; none of them empty.
        paused: says whether a backward pass of our own runs, which accumulates nothing.
        vanished: called when a backward pass finds that what was accumulated by earlier ones has been zeroed.
        accumulated: told of each parameter when a backward pass has accumulated into it.
        whole: keep all of the accumulated gradients, which lets clipping by value be told from other changes.
        averaged: gradients are averaged over several processes when backward ends, and looked at after that.

    Attributes:
        clip_value: the bound of a clipping by value that `ratio` found; None where there was none.
        touched: names of the parameters that backward passes reached here since the last step.
        extremes: look at every number for the largest and smallest, the only ones that a clipping by value is sure to
            change. Without, as suffices for a step that no record is of, at some numbers alone.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        paused: Callable[[], bool],
        vanished: Callable[[], None],
        accumulated: Callable[[nn.Parameter], None],
        whole: bool,
        averaged: bool,
    ) -> None:
        self._parameters = parameters
        self._paused = paused
        self._vanished = vanished
        self._accumulated = accumulated
        self._averaged = averaged
        self.clip_value: float | None = None
        self.touched: set[str] = set()
        self.extremes = True
        self._kept: Elements | None = None
        self._whole: dict[str, torch.Tensor] | None = {} if whole else None
        # What this process alone accumulated, in steps that prove that the mean is that of the processes.
        self._local: dict[str, torch.Tensor] | None = {} if averaged else None
        self._suspect = False
        self._stale: str | None = None
        # By name, the version of each gradient when it had been accumulated; and what a hook changed after that.
        self._versions: dict[str, int] = {}
        self._changed: str | None = None
        self._settling = -1
        self._handles: list[RemovableHandle] = []
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
        self._kept = self._stale = self._changed = None
        self._suspect = False
        self.touched.clear()
        if self._whole is not None:
            self._whole.clear()

    @property
    def begun(self) -> bool:
        """Whether anything was accumulated since the last step."""
        return self._kept is not None

    @property
    def reached(self) -> bool:
        """Whether any number of what was accumulated is not zero."""
        return self._kept is not None and bool(self._kept.numbers.any())

    def lost(self) -> bool:
        """Return whether what was accumulated has been zeroed: the step that it was for was skipped.

        When it has not, the next backward pass looks again, for loops that zero between forward and backward.
        """
        names = [] if self._kept is None else sorted(self._kept.names, key=lambda name: self._parameters[name].numel())
        self._suspect = any(map(self._holds, names))
        # What was zero when it was accumulated may still be what it was.
        return not self._suspect and (self.reached or all(self._parameters[name].grad is None for name in names))

    def ratio(self) -> float:
        """Return consumed over accumulated gradient, one factor common to all parameters.

        Raises:
            StateError: if there is none (per-layer clipping, added noise, gradients changed by hand), if a
                gradient is not finite, or was not accumulated since the last step. Clipping by value is no
                common factor either, but known where the whole gradients were kept: then 1 and `clip_value`.
        """
        if self._settling != -1:  # a step that is taken before its backward pass is over
            self._settle()
        self.clip_value = None
        known = () if self._kept is None else set(self._kept.names)
        stale = self._stale or next(
            (name for name in self._parameters if name not in known and self._holds(name)), None
        )
        if stale is not None:
            raise _stale(stale)
        if self._changed is not None:
            raise _changed(self._changed)
        if self._kept is None or not self._held(self._kept.names):
            return 1.0
        names, sums = self._sums(self._kept)
        between, accumulated, consumed = sums.sum(0).tolist()
        if not np.isfinite(sums).all():
            raise _not_finite(names[int((~np.isfinite(sums)).any(1).argmax())])
        if accumulated == 0:
            if consumed or any(self._holds(name) for name in names):
                raise StateError(
                    "the gradients are too sparse to see how they were scaled between backward and step; train "
                    "another parameter beside the embeddings",
                    kind="not-measured",
                )
            return 1.0
        # The factor r that brings r * then nearest to now, over all parameters: <now, then> / <then, then>. What is
        # left of one parameter, |now - r then|^2 = |now|^2 - 2 r <now, then> + r^2 |then|^2, is rounding if r is its.
        ratio = float(between / accumulated)
        expected = ratio * ratio * sums[:, 1]
        off = np.sqrt(np.maximum(sums[:, 2] - 2 * ratio * sums[:, 0] + expected, 0))
        for name, error, size in zip(names, off.tolist(), np.sqrt(expected).tolist(), strict=True):
            if error > _TOLERANCE.get(self._parameters[name].dtype, _HALF_TOLERANCE) * max(size, 1e-30):
                self.clip_value = self._bound()
                if self.clip_value is not None:
                    return 1.0
                raise _changed(name)
        return ratio

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients as the optimizer is about to consume them, but for a clipping by value."""
        if self.clip_value is not None and self._whole is not None:
            return dict(self._whole)
        return self._held(self._parameters)

    def await_mean(self) -> None:
        """Look at the gradients when this backward pass is over, where they are averaged at its end."""
        if self._averaged:
            self._settle_later()

    def take_local(self) -> dict[str, torch.Tensor]:
        """Return what this process alone accumulated for this step; it is not kept for others until asked for."""
        local, self._local = self._local, None
        return local or {}

    def keep_local(self) -> None:
        """Keep what this process alone accumulates for the next step."""
        if self._averaged:
            self._local = {}

    def looked_up(self, local: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kept elements of all parameters, (n,) float64, and the same ones of what is this process's own."""
        assert self._kept is not None
        own = {
            name: local[name] if name in local else torch.zeros_like(self._parameters[name])
            for name in self._kept.names
        }
        linear = self._kept.linear  # the largest magnitude of a mean is not the mean of the largest
        mine = Elements(own, like=self._kept)
        return torch.from_numpy(self._kept.numbers[linear]), torch.from_numpy(mine.numbers[linear])

    def _bound(self) -> float | None:
        """Return the value that all accumulated gradients were clamped to, None if that is not what happened."""
        if self._whole is None:
            return None
        pairs = [(self._parameters[name].grad, whole) for name, whole in self._whole.items()]
        bound = max(float(grad.abs().max()) for grad, _ in pairs if grad is not None)
        clamped = (grad is not None and torch.equal(grad, whole.clamp(-bound, bound)) for grad, whole in pairs)
        return bound if all(clamped) else None

    def _sums(self, kept: Elements) -> tuple[list[str], np.ndarray]:
        """Return names, and of each one's kept elements <now, then>, |then|^2 and |now|^2, (names, 3).

        A parameter whose gradient was taken away since is not among them: the optimizer leaves it alone.
        """
        now = Elements(self._held(kept.names), like=kept)
        then = kept.numbers if now.names == kept.names else np.concatenate([kept.of(name) for name in now.names])
        with np.errstate(over="ignore", invalid="ignore"):
            products = np.stack([now.numbers * then, then * then, now.numbers * now.numbers], axis=1)
            return now.names, np.add.reduceat(products, now.starts)

    def _before(self, name: str) -> Callable[[torch.Tensor], None]:
        def arriving(_: torch.Tensor) -> None:
            if self._paused():
                return
            if self._kept is None and not self.touched:
                # Harmless where it is zeroed before the step, as a GAN's discriminator is after its generator's pass.
                if self._holds(name):
                    self._stale = name
            elif self._suspect and self._kept is not None and name in self._kept.names and self._kept.of(name).any():
                self._suspect = False
                if not self._holds(name):
                    self._vanished()

        return arriving

    def _after(self, name: str) -> Callable[[torch.Tensor], None]:
        def arrived(parameter: torch.Tensor) -> None:
            self.touched.add(name)
            self._accumulated(parameter)  # type: ignore[arg-type]
            gradient = parameter.grad
            assert gradient is not None
            self._versions[name] = gradient._version
            if self._local is not None:
                self._local[name] = gradient.detach().clone()
            self._settle_later()

        return arrived

    def _settle_later(self) -> None:
        task = torch._C._current_graph_task_id()
        if self._settling != task:
            self._settling = task
            _when_over(lambda: _when_over(self._settle))  # behind what others want done by then

    def _settle(self) -> None:
        """Keep elements of all that was accumulated since the last step."""
        self._settling = -1
        # Of averaged gradients also those that only other processes' samples reached.
        gradients = self._held(self._parameters if self._averaged else sorted(self.touched))
        if not self._averaged:
            changed = (name for name, one in gradients.items() if one._version != self._versions[name])
            self._changed = self._changed or next(changed, None)
        if gradients:
            self._kept = Elements(gradients, extremes=self.extremes)
        if self._whole is not None:
            self._whole.update((name, one.clone()) for name, one in gradients.items())

    def _held(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        pairs = ((name, self._parameters[name].grad) for name in names)
        return {name: gradient.detach() for name, gradient in pairs if gradient is not None}

    def _holds(self, name: str) -> bool:
        """Say whether a parameter has a gradient that is not zero."""
        gradient = self._parameters[name].grad
        return gradient is not None and bool(gradient.any())


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


def _not_finite(name: str) -> StateError:
    return StateError(
        f"parameter {name}: its gradient is not finite, so nothing after this step could be recorded. Skip such steps "
        "(do not call optimizer.step()), or find where the loss overflows",
        kind="not-finite",
        parameter=name,
    )


def _changed(name: str) -> StateError:
    return StateError(
        f"parameter {name}: between backward and step its gradient was changed by more than one factor common to all "
        "parameters (per-layer clipping, noise, or by hand): records could not be weighted. Clip by the total norm; "
        "clipping by value can be recorded with optimizer_history='gradients'",
        kind="gradient-changed",
        parameter=name,
    )
