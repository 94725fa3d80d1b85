"""The optimizer's history as the store holds it: one timeline per parameter group, checked for gaps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from timstore.database.snapshot import Snapshot
from timstore.errors import CoverageError, StateError
from timstore.model.optimizer_names import ADAM_FAMILY, SGD_FAMILY
from timstore.rollbacks.unrolled_weights import Schedule, adam_weights, own_counts, step_lengths, weights

Moment = tuple[int, int]

# (epoch, step) as one integer that sorts the same way.
_EPOCH = 2**40
# Clip factors of one round differ by rounding alone.
_ALIKE = 1e-3


def moment_key(epoch: Any, step: Any) -> Any:
    """Return (epoch, step), integers or arrays of them, as integers in order of time."""
    return epoch * _EPOCH + step


def moment_of(key: Any) -> Moment:
    """Return (epoch, step) from `moment_key`."""
    return int(key) // _EPOCH, int(key) % _EPOCH


def up_to(moment: Moment | None) -> str:
    """Return the SQL condition that (epoch, step) is not after a moment."""
    if moment is None:
        return "true"
    epoch, step = moment
    return f"(epoch < {epoch} OR (epoch = {epoch} AND step <= {step}))"


@dataclass(frozen=True, slots=True)
class Division:
    """How Adam turned its second moment v at the end into a step: over (sqrt(v / correction) + eps).

    Attributes:
        decay: coupled weight decay, which acts through the division as curvature does.
    """

    correction: float
    eps: float
    decay: float


@dataclass(frozen=True, eq=False, slots=True)
class Timeline:
    """The steps of one parameter group, in order; every array has shape (T,).

    Attributes:
        keys: `moment_key` of each step.
        rounds: that of the first step that was clipped together with it, by one norm; its own if there was no other.
        optimizer: the class that took the steps.
        staying: the share of the step's batch that is not removed.
        ratio: consumed over accumulated gradient.
        idle, fresh: per step, names of parameters; fresh is None where unknown.
        grad_norm: of the accumulated gradient, all of the round's, NaN where unknown.
        amp_scale: what the loss had been multiplied by.
        samples, tokens: of the whole batch; NaN where unknown.
        clip_value: the bound of clipping by value, NaN where there was none.
        amsgrad: whether Adam divides by the largest second moment so far.
        mean_over: what the mean divides by, `samples` or `tokens`.
        options: every hyperparameter, None where unknown.
        micro_batches: how many a step had, at most; those of all processes.
    """

    keys: np.ndarray
    rounds: np.ndarray
    optimizer: str
    schedule: Schedule
    ratio: np.ndarray
    staying: np.ndarray
    idle: list[frozenset[str]]
    fresh: list[frozenset[str] | None]
    grad_norm: np.ndarray
    amp_scale: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray
    clip_value: np.ndarray
    amsgrad: np.ndarray
    mean_over: list[str | None]
    options: list[str | None]
    micro_batches: int

    def active(self, parameter: str) -> np.ndarray:
        """Say in which steps the parameter had a gradient."""
        return np.array([parameter not in names for names in self.idle], bool)

    def weights(self, parameter: str, of: str = "parameter") -> np.ndarray:
        """Return, for each step, how much of the gradient consumed then is in the final parameter, its sign turned.

        Args:
            of: `parameter`, or `buffer` for the optimizer's momentum (first moment) instead.
        """
        active = self.active(parameter)
        weigh = adam_weights if self.optimizer in ADAM_FAMILY else weights
        return weigh(self.schedule, active, self.fresh_steps(parameter, active), of)

    def division(self, parameter: str) -> Division | None:
        """Return what Adam divided by at the end; None for other optimizers, and where it never took a step."""
        active = self.active(parameter)
        if self.optimizer not in ADAM_FAMILY or not active.any():
            return None
        # vhat = v / (1 - beta2^count): the moments began at zero, and hold that much less.
        last = int(np.flatnonzero(active)[-1])
        count = own_counts(self.schedule, active, self.fresh_steps(parameter, active))[last]
        schedule = self.schedule
        decay = 0.0 if schedule.decoupled[last] else float(schedule.weight_decay[last])
        return Division(float(1 - schedule.beta2[last] ** count), float(schedule.eps[last]), decay)

    def lengths(self, parameter: str) -> np.ndarray:
        """Return the step lengths that the kept samples' curvature acted over, shape (T,)."""
        # A step answers a change d by -lr c H' d, where c is what clipping left of its gradient and H' the curvature of
        # its batch without the samples that leave: their share of the mean answers nothing.
        lengths: np.ndarray = step_lengths(self.schedule, self.active(parameter)) * self.ratio * self.staying
        return lengths

    def pattern(self, parameter: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what sets the parameter apart from others of its group: equal patterns, equal weights."""
        active = self.active(parameter)
        return tuple(np.flatnonzero(~active)), tuple(np.flatnonzero(self.fresh_steps(parameter, active)))

    def fresh_steps(self, parameter: str, active: np.ndarray) -> np.ndarray:
        """Say in which steps the parameter's buffer or moments were made."""
        fresh = np.array([names is not None and parameter in names for names in self.fresh], bool)
        if active.any() and self.fresh[int(np.argmax(active))] is None:
            # Nobody said: the first step of a run makes the buffer.
            fresh[int(np.argmax(active))] = True
        return fresh


def read_timelines(snapshot: Snapshot, moment: Moment | None, removed: Iterable[int]) -> dict[int, Timeline]:
    """Return the timeline of every group up to a moment (all when None)."""
    # A step has a row for each process and group: scalars are the same in all processes, what was drawn adds up. The
    # batch's ids are hashed there, so that they need not be held for every step.
    table = snapshot.catalog.rows(
        "WITH removed AS (SELECT unnest(?::BIGINT[]) AS sample), "
        "drawn AS (SELECT epoch, step, rank, group_id, count(r.sample) AS hits FROM (SELECT epoch, step, rank, "
        "group_id, unnest(sample_ids) AS sample FROM steps) JOIN removed r USING (sample) GROUP BY ALL) "
        "SELECT epoch, step, group_id, arg_min(s, rank) AS scalars, sum(samples)::BIGINT AS samples, "
        "sum(tokens)::BIGINT AS tokens, sum(coalesce(len(micro_batches), 1))::BIGINT AS micro_batches, "
        "bit_xor(s.batch) AS batch, coalesce(sum(hits), 0)::BIGINT AS hits FROM "
        "(SELECT steps.* EXCLUDE (sample_ids), hits, "
        "CASE WHEN sample_ids IS NOT NULL THEN hash(sample_ids) END AS batch FROM steps "
        f"LEFT JOIN drawn USING (epoch, step, rank, group_id)) s WHERE {up_to(moment)} "
        "GROUP BY epoch, step, group_id ORDER BY epoch, step",
        [list(removed)],
    )
    summed = ("samples", "tokens", "micro_batches", "hits", "batch")
    by_group: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_group.setdefault(row["group_id"], []).append({**row["scalars"], **{name: row[name] for name in summed}})
    rounds = _clipped_together(by_group)
    timelines = {group: _timeline(group, rows, rounds) for group, rows in by_group.items()}
    _check_no_gap(timelines)
    return timelines


def _clipped_together(by_group: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[Moment, tuple[Moment, float]]:
    """Return, for each step of a round, (the round's first step, the norm over all of the round's gradients).

    A round is steps of several optimizers that consumed one backward pass, clipped by one norm over all of them.

    Args:
        by_group: rows of the `steps` table in order of time, with `batch`, a hash of the step's samples.
    """
    rows: dict[Moment, Mapping[str, Any]] = {}
    groups: dict[Moment, set[int]] = {}
    for group, steps in by_group.items():
        for row in steps:
            moment = row["epoch"], row["step"]
            rows.setdefault(moment, row)
            groups.setdefault(moment, set()).add(group)
    rounds: list[list[Moment]] = []
    for moment in sorted(rows):
        batch, latest = rows[moment]["batch"], rounds[-1] if rounds else []
        same = bool(latest) and batch is not None and batch == rows[latest[0]]["batch"]
        if same and all(groups[moment].isdisjoint(groups[other]) for other in latest):
            latest.append(moment)
        else:
            rounds.append([moment])
    several = [moments for moments in rounds if len(moments) > 1]
    # Nobody wrote down over which parameters a norm was taken. By one norm over all of them every step of a round gets
    # the same factor; where that is not so in some round, each optimizer is taken to have been clipped alone.
    factors = [
        [float(rows[moment]["consumed_ratio"] * (rows[moment]["amp_scale"] or 1.0)) for moment in moments]
        for moments in several
    ]
    one_norm = all(max(of_round) - min(of_round) <= _ALIKE * max(of_round) for of_round in factors)
    if not one_norm or not any(min(of_round) < 1 - 1e-6 for of_round in factors):
        return {}
    # |g| over all parameters is the root of the sum of the optimizers' own squares.
    norms = [sum((rows[moment]["grad_norm"] or 0.0) ** 2 for moment in moments) ** 0.5 for moments in several]
    return {moment: (moments[0], norm) for moments, norm in zip(several, norms, strict=True) for moment in moments}


def _timeline(group: int, rows: list[dict[str, Any]], rounds: Mapping[Moment, tuple[Moment, float]]) -> Timeline:
    for row in rows:
        where = f"epoch {row['epoch']}, step {row['step']}, group {group}"
        if row["optimizer"] != rows[0]["optimizer"]:
            raise StateError(
                f"{where} was taken by {row['optimizer']}, earlier ones by {rows[0]['optimizer']}: one rollback "
                "cannot go back over a change of optimizer",
                kind="optimizer-changed",
            )
        known = SGD_FAMILY + ADAM_FAMILY
        if row["optimizer"] in ADAM_FAMILY and None in (row["beta1"], row["beta2"], row["eps"]):
            raise CoverageError(f"{where} has no beta1, beta2 or eps: pass them to append_step", kind="no-betas")
        if row["optimizer"] in known and row["lr"] is None:
            raise CoverageError(f"{where} has no learning rate: pass lr= to append, or append_step", kind="no-lr")
    moments = [(row["epoch"], row["step"]) for row in rows]
    together = [rounds.get(moment, (moment, np.nan)) for moment in moments]
    norms = np.array([norm for _, norm in together], np.float64)
    return Timeline(
        keys=np.array([moment_key(*moment) for moment in moments], np.int64),
        rounds=np.array([moment_key(*first) for first, _ in together], np.int64),
        optimizer=rows[0]["optimizer"],
        schedule=Schedule(*(np.array([row[name] or 0 for row in rows]) for name in Schedule.__dataclass_fields__)),
        ratio=np.array([row["consumed_ratio"] for row in rows]),
        staying=np.array([1 - row["hits"] / row["samples"] if row["samples"] else 1.0 for row in rows]),
        idle=[frozenset(row["idle"] or ()) for row in rows],
        fresh=[None if row["fresh"] is None else frozenset(row["fresh"]) for row in rows],
        grad_norm=np.where(np.isnan(norms), _numbers(rows, "grad_norm"), norms),
        amp_scale=np.array([row["amp_scale"] or 1.0 for row in rows]),
        samples=_numbers(rows, "samples"),
        tokens=_numbers(rows, "tokens"),
        clip_value=_numbers(rows, "clip_value"),
        amsgrad=np.array([bool(row["amsgrad"]) for row in rows]),
        mean_over=[row["mean_over"] for row in rows],
        options=[row["options"] for row in rows],
        micro_batches=max((row["micro_batches"] for row in rows), default=0),
    )


def _numbers(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if row[name] is None else row[name] for row in rows], np.float64)


def _check_no_gap(timelines: Mapping[int, Timeline]) -> None:
    """With momentum, moments or decay every step changes what earlier ones left behind: none may be missing.

    Groups that stepped together are one optimizer's; the steps that it did not take may be another's.
    """
    groups: dict[frozenset[int], list[int]] = {}
    for group, timeline in timelines.items():
        groups.setdefault(frozenset(timeline.keys.tolist()), []).append(group)
    for taken, members in groups.items():
        counting = [group for group in members if _counts_every_step(timelines[group])]
        if not counting:
            continue
        # Steps of others that this optimizer never took part in may lie between its own.
        moments = sorted(taken.union(*(others for others in groups if others.isdisjoint(taken))))
        begins, first, last = moment_of(moments[0])[1], min(taken), max(taken)
        for before, after in pairwise(moment_of(one) for one in moments if first <= one <= last):
            follows = after[1] == before[1] + 1
            restarts = after[0] > before[0] and after[1] == begins
            if not follows and not restarts:
                raise CoverageError(
                    f"group {counting[0]}: no step is recorded between epoch {before[0]}, step {before[1]} and epoch "
                    f"{after[0]}, step {after[1]}; with momentum or weight decay every step counts: append_step those "
                    "that held no recorded sample too",
                    kind="missing-steps",
                )


def _counts_every_step(timeline: Timeline) -> bool:
    schedule = timeline.schedule
    return timeline.optimizer not in SGD_FAMILY or bool(schedule.momentum.any() or schedule.weight_decay.any())
