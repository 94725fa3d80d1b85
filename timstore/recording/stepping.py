"""The step's side: what the optimizer is about to consume is held against the parts, and becomes records."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from timstore.errors import CoverageError, StateError
from timstore.ranks import Ranks
from timstore.recording import checks
from timstore.recording.accumulation import Accumulation
from timstore.recording.batches import by_parameter
from timstore.recording.closures import Arguments, run_closure
from timstore.recording.drawn import Drawn
from timstore.recording.forecast import Budget
from timstore.recording.forwards import Forwards
from timstore.recording.history import History
from timstore.recording.optimizer import check_untrained, is_skipped
from timstore.recording.steps import Ahead, look_ahead
from timstore.records import Gradient
from timstore.store import Store

_log = logging.getLogger(__name__)


class Stepping:
    """Hooks on the optimizer: one `steps` row and the chosen samples' records for each of its steps.

    Args:
        parameters: the trained ones, by name.
        untrained: the model's other parameters (by identity) to their names.
        scaler: the GradScaler, None where there is none or it was not given.

    Attributes:
        epoch, step: of the next step.
        last: (epoch, step) of the latest one, None before the first.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        untrained: Mapping[int, str],
        *,
        forwards: Forwards,
        accumulation: Accumulation,
        history: History,
        ranks: Ranks,
        drawn: Drawn,
        samples: frozenset[int] | None,
        scaler: Any,
        mean_over: str | None,
        budget: Budget | None,
        rank: int,
        allow_zero: bool,
        by_sample: bool,
    ) -> None:
        self._store = store
        self._model = model
        self._optimizer = optimizer
        self._parameters = parameters
        self._names = {id(one): name for name, one in parameters.items()}
        self._untrained = untrained
        self._forwards = forwards
        self._accumulation = accumulation
        self._history = history
        self._ranks = ranks
        self._drawn = drawn
        self._samples = samples
        self._scaler = scaler
        self._mean_over = mean_over
        self._budget = budget
        self._rank = rank
        self._allow_zero = allow_zero
        self._by_sample = by_sample
        self.epoch = 0
        self.step = 0
        self.last: tuple[int, int] | None = None
        self._taken = 0
        self._ahead: Ahead | None = None
        self._consumed: dict[str, torch.Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        instead = run_closure(optimizer, args, kwargs, self._parameters.values())
        self._look_ahead(optimizer)
        return instead

    def _look_ahead(self, optimizer: torch.optim.Optimizer) -> None:
        check_untrained(optimizer, self._untrained)
        self._ahead = None
        if is_skipped(optimizer):
            return
        self._forwards.wait()
        ratio = self._accumulation.ratio()
        gradients = self._accumulation.gradients()
        self._check(ratio, gradients)
        self._ahead = look_ahead(
            optimizer,
            self._scaler,
            [batch for batch in self._forwards.pending if batch.used],
            gradients,
            ratio=ratio,
            clip_value=self._accumulation.clip_value,
            mean_over=self._mean_over,
            # Elsewhere they are of no use, or can be had from the records of the whole step when it comes to it.
            products=self._history.needs_products,
            samples=self._samples,
            names=self._names,
        )
        if self._budget is not None and self._ahead.records:
            self._budget.check(self._store, self._optimizer, self._ahead.records, gradients, self._parameters)
            self._budget = None
        self._history.before_step(self.epoch, self.step, self._parameters)
        # Copied before the step, which may write into them.
        self._consumed = self._history.copied(gradients)

    def _check(self, ratio: float, gradients: Mapping[str, torch.Tensor]) -> None:
        batches = self._forwards.pending
        found = by_parameter([pair for batch in batches for pair in batch.parts()])
        if not self._forwards.proved:
            try:
                if self._ranks.alone:
                    checks.check_sum(self._model, self._parameters, gradients, found, ratio, by_sample=self._by_sample)
                else:
                    self._check_mine(found)
            except CoverageError as error:
                more = self._forwards.since_proof()
                raise CoverageError(f"{error}{more}", kind=error.kind, **error.fields) from error
            self._forwards.proved = True
            self._forwards.proven = self.epoch, self.step
            _log.debug("proved at epoch %d, step %d: the recorded parts add up to the gradient", self.epoch, self.step)
        elif not any(batch.empty for batch in batches):
            # A module that only an empty batch went through is rightly not among them.
            checks.check_captured(self._model, self._parameters, found, self._accumulation.touched)

    def _check_mine(self, found: Mapping[int, list[Gradient]]) -> None:
        """Hold the parts to what was accumulated here, and the mean of that over all processes to what arrived."""
        mine = self._accumulation.take_local()
        # The records hold this process's share of the mean.
        checks.check_sum(
            self._model, self._parameters, mine, found, float(self._ranks.count), by_sample=self._by_sample
        )
        kept, local = self._accumulation.looked_up(mine)
        mean = self._ranks.mean(local)
        if not torch.allclose(mean, kept, rtol=1e-2, atol=1e-3 * float(kept.abs().max())):
            raise StateError(
                "the gradients that the processes have in common are not the mean of their own: something else than "
                "DistributedDataParallel's averaging (a communication hook, gradients changed by hand) makes them, and "
                "records could not be weighted",
                kind="gradient-changed",
            )

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ahead, self._ahead = self._ahead, None
        self._forwards.discard()
        if ahead is None:
            self._forwards.skipped += 1
            return
        moment = self.epoch, self.step
        self.step += 1
        self.last = moment
        self._taken += 1
        self._drawn.took(ahead.scalars["sample_ids"])
        if _proves(self._taken):
            self._forwards.prove()
        skipped, self._forwards.skipped = self._forwards.skipped, 0
        self._store.append_step(*moment, ahead.groups, rank=self._rank, skipped=skipped, **ahead.scalars)
        self._history.after_step(*moment, self._consumed)
        for sample, gradients in ahead.records.items():
            self._store.append(
                *moment,
                sample,
                gradients,
                tokens=ahead.tokens.get(sample),
                dot=ahead.dots.get(sample),
                rank=self._rank,
                allow_zero=self._allow_zero,
                copy=False,
            )


def _proves(taken: int) -> bool:
    """Say whether a step is a proof, as the first one is: after 1, 10, 100, 1,000 steps, and every 1,000 from there."""
    return taken in (1, 10, 100) or taken % 1000 == 0
