"""Hooks on the optimizers: what a step is about to consume is held against the captured parts, and becomes records."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from timstore.database.entries import Entry
from timstore.database.store import Store
from timstore.errors import CoverageError, InvalidInputError, StateError
from timstore.model.distributed import Ranks
from timstore.options import RecordOptions
from timstore.recording import checks
from timstore.recording.batches import MicroBatch, apart, by_parameter, records_of
from timstore.recording.forecast import DiskBudget
from timstore.recording.gradient_dots import inner_products
from timstore.recording.history import History
from timstore.recording.misuse import Drawn
from timstore.recording.model_hooks import ModelHooks
from timstore.recording.optimizer import (
    Trained,
    amp_scales,
    check_untrained,
    is_skipped,
    norm_of_gradients,
    step_groups,
)
from timstore.recording.pending import Clock, Pending
from timstore.recording.standstill import Standstill
from timstore.records import Gradient

_log = logging.getLogger(__name__)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Gradients = Mapping[str, torch.Tensor]
# Sample to parameter to parts.
Records = Mapping[int, Mapping[str, Sequence[Gradient]]]


@dataclass(frozen=True, eq=False, slots=True)
class _Ahead:
    """A step that is about to be taken.

    Attributes:
        entries: what it will leave in the store, checked.
        drawn: the samples in it.
        consumed: copies of whole gradients, where they are kept.
    """

    entries: list[Entry]
    drawn: Sequence[int]
    consumed: dict[str, torch.Tensor]


class _Optimizer:
    """One recorded optimizer, and what is known of its steps.

    Args:
        still: holds the parameters to what the last step left; None where a rollback finds that out itself.

    Attributes:
        taken: how many steps it took.
        is_budgeted: its first records were held to the budget.
        ahead: the step that it is about to take; None where that is skipped.
    """

    def __init__(self, trained: Trained, pending: Pending, still: Standstill | None) -> None:
        self.trained = trained
        self.names = {id(parameter): name for name, parameter in trained.parameters.items()}
        self.group_count = len(trained.optimizer.param_groups)
        self.pending = pending
        self.still = still
        self.taken = 0
        self.is_budgeted = False
        self.ahead: _Ahead | None = None


class OptimizerHooks:
    """One step's rows and the chosen samples' records for each call of an optimizer's `step`.

    Args:
        stills: of each optimizer; empty where a rollback finds out itself what changed parameters.
        samples: the ids to record, None for all.
        scaler: the GradScaler, None where there is none or it was not given.
        rank: that steps are recorded under.
        clock: moved on by each step.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        trained: Sequence[Trained],
        hooks: ModelHooks,
        stills: Sequence[Standstill],
        samples: frozenset[int] | None,
        options: RecordOptions,
        *,
        history: History,
        ranks: Ranks,
        drawn: Drawn,
        scaler: Any,
        rank: int,
        clock: Clock,
    ) -> None:
        self._store = store
        self._model = model
        self._hooks = hooks
        self._samples = samples
        self._options = options
        self._history = history
        self._ranks = ranks
        self._drawn = drawn
        self._scaler = scaler
        self._rank = rank
        self._clock = clock
        self._budget: DiskBudget | None = None
        if isinstance(options.budget, int):
            self._budget = DiskBudget(options.budget, None if samples is None else len(samples), options)
        self._parameters = {name: parameter for each in trained for name, parameter in each.parameters.items()}
        self._untrained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name not in self._parameters and parameter.numel()
        }
        self._optimizers = {
            id(each.optimizer): _Optimizer(each, pending, stills[number] if stills else None)
            for number, (each, pending) in enumerate(zip(trained, hooks.awaiting, strict=True))
        }
        self._handles = ExitStack()
        for each in trained:
            self._handles.callback(each.optimizer.register_step_pre_hook(self._before).remove)
            after = each.optimizer.register_step_post_hook(self._after)
            # Before those of others, which may change what the step left.
            each.optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
            self._handles.callback(after.remove)

    def remove(self) -> None:
        """Leave no hook behind."""
        self._handles.close()

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        mine = self._optimizers[id(optimizer)]
        mine.ahead = None
        instead = run_closure(optimizer, args, kwargs, self._parameters.values())
        self._check_trained(mine)
        if not is_skipped(optimizer):
            mine.ahead = self._look_ahead(mine)
        return instead

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mine = self._optimizers[id(optimizer)]
        ahead, mine.ahead = mine.ahead, None
        mine.pending.discard()
        if ahead is None:
            mine.pending.skipped += 1
        else:
            mine.taken += 1
        proves = ahead is not None and _proves(mine.taken)
        if mine.still is not None:
            mine.still.hold(whole=proves)
        if ahead is None:
            return
        moment = self._clock.epoch, self._clock.step
        self._clock.step += 1
        self._clock.last = moment
        mine.pending.skipped = 0
        self._hooks.forwards.step_taken()
        if proves:
            mine.pending.prove()
            self._hooks.forwards.look_again()
        self._drawn.took(ahead.drawn)
        self._store.accept(*ahead.entries)
        self._history.after_step(*moment, ahead.consumed)

    def _look_ahead(self, mine: _Optimizer) -> _Ahead:
        """Return the step that is about to be taken: whatever is wrong with it is found before it is taken."""
        clip, moment = mine.pending.clip, (self._clock.epoch, self._clock.step)
        self._hooks.forwards.wait()
        ratio = clip.ratio()
        if mine.still is not None:
            mine.still.check(f"before epoch {moment[0]}, step {moment[1]},")
        gradients = clip.gradients()
        self._check_parts(mine, ratio, gradients)
        batches = mine.pending.used
        records = records_of(batches, self._samples, mine.names)
        captured = (sample for batch in batches for sample in batch.chosen.samples)
        if self._samples is not None and not self._samples.issuperset(captured):
            records = apart(records)
        if self._budget is not None and records and not mine.is_budgeted:
            self._budget = self._budget.check(self._store.settings, mine.trained, records, gradients)
            mine.is_budgeted = True
        norm, tokens = norm_of_gradients(gradients.values()), _tokens(batches)
        entries = [
            self._step_entry(mine, batches, tokens, ratio, norm),
            *self._record_entries(mine, records, tokens, self._dots(records, gradients, ratio), math.isfinite(norm)),
        ]
        self._history.before_step(*moment)
        # Copied before the step, which may write into them.
        consumed = self._history.copied(mine.trained.optimizer, gradients)
        return _Ahead(entries, [sample for batch in batches for sample in batch.ids], consumed)

    def _dots(self, records: Records, gradients: Gradients, ratio: float) -> dict[int, float]:
        """Return the inner product of each record with what was accumulated in all, where clipping will need it."""
        # Elsewhere they are of no use, or can be had from the records of the whole step when it comes to it.
        if not self._history.needs_products or not ratio:
            return {}
        # <h, g> = <h, r g> / r: what is there now is r times what was accumulated.
        return {sample: dot / ratio for sample, dot in inner_products(records, gradients).items()}

    def _step_entry(
        self, mine: _Optimizer, batches: Sequence[MicroBatch], tokens: Counter[int] | None, ratio: float, norm: float
    ) -> Entry:
        inside, scale = amp_scales(mine.trained.optimizer, self._scaler)
        return self._store.step_entry(
            self._clock.epoch,
            self._clock.step,
            step_groups(mine.trained.optimizer, mine.names, mine.trained.first_group),
            rank=self._rank,
            skipped=mine.pending.skipped,
            consumed_ratio=ratio / inside,
            sample_ids=[sample for batch in batches for sample in batch.ids],
            grad_norm=norm / ratio if ratio else 0.0,
            amp_scale=scale,
            clip_value=mine.pending.clip.clip_value,
            tokens=None if tokens is None else tokens.total(),
            mean_over=self._options.mean_over or ("samples" if tokens is None else "tokens"),
            micro_batches=[len(batch.ids) for batch in batches],
        )

    def _record_entries(
        self,
        mine: _Optimizer,
        records: Records,
        tokens: Counter[int] | None,
        dots: Mapping[int, float],
        finite: bool,
    ) -> list[Entry]:
        allow_zero = self._allows_zero(mine)
        return [
            self._store.record_entry(
                self._clock.epoch,
                self._clock.step,
                sample,
                parts,
                tokens=None if tokens is None else tokens[sample],
                dot=dots.get(sample),
                rank=self._rank,
                allow_zero=allow_zero,
                copy=False,
                # A number that is not finite in any part would be in the sum as well: nothing needs to look again.
                checked=finite,
            )
            for sample, parts in records.items()
        ]

    def _allows_zero(self, mine: _Optimizer) -> bool:
        """Say whether a record may be zero.

        A sample without any gradient is one whose loss is flat; a step without any is one whose backward pass missed
        the model. Another optimizer's parameters tell that as well.
        """
        if any(optimizer.pending.clip.reached for optimizer in self._optimizers.values()):
            for batch in mine.pending.batches:
                batch.reached = True
        return self._options.allow_zero or any(batch.reached for batch in mine.pending.batches)

    def _check_trained(self, mine: _Optimizer) -> None:
        """Refuse what is trained and not recorded."""
        optimizers = [optimizer.trained.optimizer for optimizer in self._optimizers.values()]
        check_untrained(optimizers, self._untrained, all_seen=not mine.pending.proved)
        if len(optimizers) > 1 and len(mine.trained.optimizer.param_groups) != mine.group_count:
            raise CoverageError(
                "the optimizer has other groups than when recording began, and groups are numbered over all of them: "
                "leave the `with` block before adding one, and enter it again after",
                kind="groups-changed",
            )

    def _check_parts(self, mine: _Optimizer, ratio: float, gradients: Gradients) -> None:
        pending, parameters = mine.pending, mine.trained.parameters
        parts = by_parameter(pending.parts)
        by_sample = self._options.capture != "modules"
        if not pending.proved:
            try:
                if self._ranks.alone:
                    checks.check_sum(self._model, parameters, gradients, parts, ratio, by_sample=by_sample)
                else:
                    local = pending.clip.take_local()
                    # The records hold this process's share of the mean.
                    share = float(self._ranks.count)
                    checks.check_sum(self._model, parameters, local, parts, share, by_sample=by_sample)
                    self._check_mean(pending, local)
            except CoverageError as error:
                raise CoverageError(f"{error}{pending.since_proof()}", kind=error.kind, **error.fields) from error
            pending.proved = True
            pending.proven = self._clock.epoch, self._clock.step
            _log.debug("proved at epoch %d, step %d: the recorded parts add up to the gradient", *pending.proven)
        elif not any(batch.empty for batch in pending.batches):
            # A module that only an empty batch went through is rightly not among them.
            checks.check_captured(self._model, parameters, parts, pending.clip.touched)

    def _check_mean(self, pending: Pending, local: Gradients) -> None:
        """Hold the mean, over all processes, of what each accumulated to what arrived."""
        arrived, own = pending.clip.looked_up(local)
        mean = self._ranks.mean(own)
        if not torch.allclose(mean, arrived, rtol=1e-2, atol=1e-3 * float(arrived.abs().max())):
            raise StateError(
                "the gradients that the processes have in common are not the mean of their own: something else than "
                "DistributedDataParallel's averaging (a communication hook, gradients changed by hand) makes them, and "
                "records could not be weighted",
                kind="gradient-changed",
            )


def _tokens(batches: Sequence[MicroBatch]) -> Counter[int] | None:
    """Return how many labels of each sample count, None where one of the batches holds none."""
    tokens: Counter[int] = Counter()
    for batch in batches:
        if batch.tokens is None:
            return None
        for sample, count in zip(batch.ids, batch.tokens.tolist(), strict=True):
            tokens[sample] += count
    return tokens if batches else None


def _proves(taken: int) -> bool:
    """Say whether a step is a proof, as the first one is: after 1, 10, 100, 1,000 steps, and every 1,000 from there."""
    return taken in (1, 10, 100) or taken % 1000 == 0


def run_closure(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Iterable[nn.Parameter]
) -> Arguments | None:
    """Run the closure that a step was given; return what to give the step instead, None where there was none.

    The closure runs before the step, so that what the step consumes can be looked at; the optimizer is handed another
    one, which returns the same loss. That is the same step where the closure is evaluated once, before anything else.

    Args:
        args, kwargs: of the step, the optimizer itself first.

    Raises:
        InvalidInputError: the step was given something else.
        CoverageError: the optimizer evaluates closures several times; also later, by the closure that is returned.
    """
    values = [value for value in (*args[1:], *kwargs.values()) if value is not None]
    if not values:
        return None
    closure = values[0]
    if len(values) > 1 or not callable(closure):
        raise InvalidInputError("optimizer.step takes a closure or nothing to be recorded, not other arguments")
    with torch.enable_grad():
        loss = closure()
    trained = list(parameters)
    left = _state(trained)
    calls = 0

    def same_loss() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1 or _state(trained) != left:
            raise CoverageError(
                f"{type(optimizer).__name__} evaluates its closure more than once in a step, or changes parameters or "
                "gradients before it does: no one gradient is what the step consumes, so it cannot be recorded. Use an "
                "optimizer that takes one gradient per step",
                kind="closure",
            )
        return loss

    def instead(value: Any) -> Any:
        return same_loss if value is closure else value

    return tuple(map(instead, args)), {name: instead(value) for name, value in kwargs.items()}


def _state(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int, int]]:
    """Return what changes when parameters or their gradients do."""
    return [
        (parameter._version, id(parameter.grad), -1 if parameter.grad is None else parameter.grad._version)
        for parameter in parameters
    ]
