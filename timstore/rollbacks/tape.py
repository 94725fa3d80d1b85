"""The tape of a run: every gradient its optimizer consumed, and what it began from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from timstore.database.identity import Identity
from timstore.database.snapshot import Snapshot
from timstore.database.states import State
from timstore.format.cache import ByteCache
from timstore.model.optimizer_names import class_of
from timstore.records import Parameter
from timstore.rollbacks.gradient_blocks import by_parameter
from timstore.rollbacks.reruns import hyperparameters
from timstore.rollbacks.selection import whole_gradients
from timstore.rollbacks.step_changes import complete_steps
from timstore.rollbacks.timeline import Timeline, moment_key, moment_of, up_to

_RECORD_IT = "record with optimizer_history='gradients' from the run's start on"


@dataclass(frozen=True, eq=False, slots=True)
class Tape:
    """What a run is made again from.

    Attributes:
        start: `moment_key` of its first step.
        theta: the parameters before it.
        states: the optimizer's state before it, by name; none for a fresh optimizer.
        gradients: parameter to (keys, commits, owners) of its consumed gradients, in order of time.
        bytes: size of all of these gradients.
        kinds, options: by group the optimizer's class, and the hyperparameters of each step from the start on.
    """

    start: int
    theta: State
    states: dict[str, State]
    gradients: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    bytes: int
    kinds: dict[int, type[torch.optim.Optimizer]]
    options: dict[int, list[dict[str, Any]]]


def find_tape(
    snapshot: Snapshot,
    cache: ByteCache,
    identity: Identity,
    known: dict[str, Parameter],
    timelines: dict[int, Timeline],
    first: int,
    given: Sequence[torch.optim.Optimizer],
) -> Tape | str:
    """Return the tape of a run, or why there is none.

    Args:
        first: `moment_key` of the first step that changes.
        given: optimizers of the classes that took the steps, where those are not torch's own.
    """
    moment, restarted = identity.moment, moment_key(*identity.restarted)
    if first < restarted:
        epoch, step = identity.restarted
        return (
            f"training went on from a rolled-back model at epoch {epoch}, step {step}, and a replay from before that "
            "would not end at this model"
        )
    gradients = whole_gradients(snapshot, moment)
    if not gradients.num_rows:
        return f"no step's whole gradient was kept; {_RECORD_IT}"
    keys = np.unique(np.concatenate([one.keys for one in timelines.values()]))
    gaps = np.setdiff1d(keys, complete_steps(gradients["key"].to_numpy(), known, timelines))
    starts = snapshot.catalog.sql(
        f"SELECT DISTINCT epoch, step FROM states WHERE role = 'start_theta' AND {up_to(moment)} ORDER BY ALL DESC"
    ).fetchall()
    usable = [one for one in starts if restarted <= moment_key(*one) <= first and not (gaps >= moment_key(*one)).any()]
    if not usable:
        later = gaps[gaps >= first]
        epoch, step = moment_of(later[0] if len(later) else first)
        what = "its whole gradient" if len(later) else "what the run began from before it"
        return f"epoch {epoch}, step {step}: {what} was not kept; {_RECORD_IT}"
    start = moment_key(*usable[0])
    kinds, options = {}, {}
    for group, timeline in timelines.items():
        kind = class_of(timeline.optimizer, given)
        if kind is None:
            return f"{timeline.optimizer} is not one of torch's own classes: pass optimizer= of that class"
        found = hyperparameters(timeline, int(np.searchsorted(timeline.keys, start)))
        if isinstance(found, str):
            return found
        kinds[group], options[group] = kind, found
    names = snapshot.catalog.sql(
        "SELECT DISTINCT name FROM states WHERE role = 'start_state' AND epoch = ? AND step = ?", list(usable[0])
    ).fetchall()
    places = {}
    for name, mine in by_parameter(gradients.sort_by("key")).items():
        columns = [mine[column].to_numpy() for column in ("key", "commit", "owner")]
        places[name] = columns[0], columns[1], columns[2]
    return Tape(
        start,
        State.find(snapshot, cache, "start_theta", moment=usable[0]),
        {name: State.find(snapshot, cache, "start_state", moment=usable[0], name=name) for (name,) in names},
        places,
        int(np.sum(gradients["dense_bytes"].to_numpy())),
        kinds,
        options,
    )
