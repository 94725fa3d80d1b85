"""The step's side: what an optimizer is about to consume is held against the parts, and becomes records."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timstore.database.entries import Entry
from timstore.database.store import Store
from timstore.errors import CoverageError, StateError
from timstore.model.distributed import Ranks
from timstore.recording import checks
from timstore.recording.batches import by_parameter
from timstore.recording.closures import Arguments, run_closure
from timstore.recording.drawn import Drawn
from timstore.recording.forecast import Budget
from timstore.recording.forward_hooks import Forwards
from timstore.recording.history import History
from timstore.recording.optimizer import check_untrained, is_skipped
from timstore.recording.pending import Pending
from timstore.recording.standstill import Standstill
from timstore.recording.steps import Ahead, look_ahead
from timstore.records import Gradient

_log = logging.getLogger(__name__)


class Trained:
    """One recorded optimizer, and what is known of its steps.

    Args:
        parameters: those of the model that it trains, by name.
        first_group: the number of its first group, counted over all optimizers.
        still: holds the parameters to what the last step left; None where a rollback finds that out itself.

    Attributes:
        groups: how many groups it had when recording began.
        taken: how many steps it took.
        is_budgeted: its first records were held to the budget.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        first_group: int,
        pending: Pending,
        still: Standstill | None,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.names = {id(one): name for name, one in parameters.items()}
        self.first_group = first_group
        self.groups = len(optimizer.param_groups)
        self.pending = pending
        self.still = still
        self.taken = 0
        self.is_budgeted = False


class Stepping:
    """Hooks on the optimizers: one step's rows and the chosen samples' records for each call of their `step`.

    Args:
        untrained: the model's parameters that none of them trains, by name.
        scaler: the GradScaler, None where there is none or it was not given.

    Attributes:
        epoch, step: of the next step, whichever optimizer takes it.
        last: (epoch, step) of the latest one, None before the first.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        trained: Sequence[Trained],
        untrained: Mapping[str, nn.Parameter],
        *,
        forwards: Forwards,
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
        self._trained = {id(one.optimizer): one for one in trained}
        self._parameters = {name: one for mine in trained for name, one in mine.parameters.items()}
        self._untrained = untrained
        self._forwards = forwards
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
        self._entries: list[Entry] | None = None
        self._ids: Sequence[int] = ()
        self._consumed: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        for one in trained:
            self._handles.append(one.optimizer.register_step_pre_hook(self._before))
            after = one.optimizer.register_step_post_hook(self._after)
            # Before those of others, which may change what the step left.
            one.optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
            self._handles.append(after)

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
        mine = self._trained[id(optimizer)]
        self._check_trained(mine)
        self._entries = None
        if is_skipped(optimizer):
            return
        self._forwards.wait()
        accumulation = mine.pending.accumulation
        ratio = accumulation.ratio()
        if mine.still is not None:
            mine.still.check(f"before epoch {self.epoch}, step {self.step},")
        gradients = accumulation.gradients()
        self._check_parts(mine, ratio, gradients)
        ahead = look_ahead(
            optimizer,
            self._scaler,
            mine.pending.used,
            gradients,
            ratio=ratio,
            clip_value=accumulation.clip_value,
            mean_over=self._mean_over,
            # Elsewhere they are of no use, or can be had from the records of the whole step when it comes to it.
            products=self._history.needs_products,
            samples=self._samples,
            names=mine.names,
            first_group=mine.first_group,
        )
        if self._budget is not None and ahead.records and not mine.is_budgeted:
            self._budget = self._budget.check(self._store, optimizer, ahead.records, gradients, mine.parameters)
            mine.is_budgeted = True
        entries = self._taken_in(mine, ahead)
        self._history.before_step(self.epoch, self.step)
        # Copied before the step, which may write into them.
        self._consumed = self._history.copied(optimizer, gradients)
        self._entries, self._ids = entries, ahead.scalars["sample_ids"]

    def _check_trained(self, mine: Trained) -> None:
        """Refuse what is trained and not recorded."""
        optimizers = [one.optimizer for one in self._trained.values()]
        check_untrained(optimizers, self._untrained, all_seen=not mine.pending.proved)
        if len(self._trained) > 1 and len(mine.optimizer.param_groups) != mine.groups:
            raise CoverageError(
                "the optimizer has other groups than when recording began, and groups are numbered over all of them: "
                "leave the `with` block before adding one, and enter it again after",
                kind="groups-changed",
            )

    def _check_parts(self, mine: Trained, ratio: float, gradients: Mapping[str, torch.Tensor]) -> None:
        pending = mine.pending
        found = by_parameter(pending.parts)
        if not pending.proved:
            try:
                if self._ranks.alone:
                    checks.check_sum(self._model, mine.parameters, gradients, found, ratio, by_sample=self._by_sample)
                else:
                    self._check_local(mine, found)
            except CoverageError as error:
                raise CoverageError(f"{error}{pending.since_proof()}", kind=error.kind, **error.fields) from error
            pending.proved = True
            pending.proven = self.epoch, self.step
            _log.debug("proved at epoch %d, step %d: the recorded parts add up to the gradient", self.epoch, self.step)
        elif not any(batch.empty for batch in pending.batches):
            # A module that only an empty batch went through is rightly not among them.
            checks.check_captured(self._model, mine.parameters, found, pending.accumulation.touched)

    def _check_local(self, mine: Trained, found: Mapping[int, list[Gradient]]) -> None:
        """Hold the parts to what was accumulated here, and the mean of that over all processes to what arrived."""
        accumulation = mine.pending.accumulation
        local = accumulation.take_local()
        # The records hold this process's share of the mean.
        count = float(self._ranks.count)
        checks.check_sum(self._model, mine.parameters, local, found, count, by_sample=self._by_sample)
        kept, looked_up = accumulation.looked_up(local)
        mean = self._ranks.mean(looked_up)
        if not torch.allclose(mean, kept, rtol=1e-2, atol=1e-3 * float(kept.abs().max())):
            raise StateError(
                "the gradients that the processes have in common are not the mean of their own: something else than "
                "DistributedDataParallel's averaging (a communication hook, gradients changed by hand) makes them, and "
                "records could not be weighted",
                kind="gradient-changed",
            )

    def _taken_in(self, mine: Trained, ahead: Ahead) -> list[Entry]:
        """Return what the step will leave in the store: whatever is wrong with it is found before the step is taken."""
        moment, pending = (self.epoch, self.step), mine.pending
        step = self._store.step_entry(*moment, ahead.groups, rank=self._rank, skipped=pending.skipped, **ahead.scalars)
        # A sample without any gradient is one whose loss is flat; a step without any is one whose backward pass missed
        # the model. Another optimizer's parameters tell that as well.
        if any(one.pending.accumulation.reached for one in self._trained.values()):
            for batch in pending.batches:
                batch.reached = True
        allow_zero = self._allow_zero or any(batch.reached for batch in pending.batches)
        records = [
            self._store.record_entry(
                *moment,
                sample,
                gradients,
                tokens=ahead.tokens.get(sample),
                dot=ahead.dots.get(sample),
                rank=self._rank,
                allow_zero=allow_zero,
                copy=False,
            )
            for sample, gradients in ahead.records.items()
        ]
        return [step, *records]

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mine = self._trained[id(optimizer)]
        entries, self._entries = self._entries, None
        mine.pending.discard()
        if entries is None:
            mine.pending.skipped += 1
        else:
            mine.taken += 1
        proves = entries is not None and _proves(mine.taken)
        if mine.still is not None:
            mine.still.hold(whole=proves)
        if entries is None:
            return
        moment = self.epoch, self.step
        self.step += 1
        self.last = moment
        mine.pending.skipped = 0
        if proves:
            mine.pending.prove()
            self._forwards.look_again()
        self._drawn.took(self._ids)
        self._store.accept(*entries)
        self._history.after_step(*moment, self._consumed)


def _proves(taken: int) -> bool:
    """Say whether a step is a proof, as the first one is: after 1, 10, 100, 1,000 steps, and every 1,000 from there."""
    return taken in (1, 10, 100) or taken % 1000 == 0
