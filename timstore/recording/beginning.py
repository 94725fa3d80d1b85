"""Where a recording begins: a new run, one that goes on, or one that goes on from a model that a rollback made."""

import logging
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from timstore.database.identity import History, Moment, Place
from timstore.database.store import Store
from timstore.errors import StateError, TimstoreWarning
from timstore.format.log import Scope
from timstore.model.fingerprints import digests

_log = logging.getLogger(__name__)


class Beginning:
    """What the store knows of a model that is about to be recorded.

    Args:
        scope, ranks: of the attempt.
    """

    def __init__(
        self, store: Store, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], scope: Scope, ranks: int
    ) -> None:
        self._store = store
        self._optimizers = optimizers
        self._scope = scope
        self._ranks = ranks
        self._digests = digests(model)
        self._history = History(store.snapshot())
        self._digest = self._history.digest(self._digests)

    def resume(self, moment: Moment) -> Moment:
        """Begin an attempt where the caller said.

        Raises:
            StateError: the model has not seen a step before that.
        """
        places = self._history.places(self._digest)
        if places and moment != (0, 0):
            self._check(places, moment)
        return self._begin(moment)

    def go_on(self) -> Moment:
        """Go on where the store's history ends, or after the moment that a rolled-back model is at.

        Raises:
            StateError: the model is neither.
        """
        frontier = self._store.frontier
        if frontier is None:
            self._store.claim_scope(self._scope, ranks=self._ranks, digest_before=self._digest)
            return 0, 0
        identity = self._history.identity(self._digests)
        place = None if identity is None else identity.place
        if identity is None or place is None or set(identity.names) != self._digests.keys():
            raise self._unknown(frontier, None)
        moment = place[1], place[2] + 1
        if place == (self._store.attempt, *frontier) and not identity.is_rolled_back:
            self._store.claim_scope(self._scope, ranks=self._ranks)
            return moment
        was_given = self._history.was_given(self._digest)
        if place[1:] != frontier and not was_given:
            raise self._unknown(frontier, place)
        model = f"the model is what a rollback, or its undoing, left of the run at epoch {place[1]}, step {place[2]}"
        if place[1:] < frontier:
            warnings.warn(
                f"{model}: recording goes on from there, and what was recorded from epoch {moment[0]}, step "
                f"{moment[1]} on (up to epoch {frontier[0]}, step {frontier[1]}) is superseded",
                TimstoreWarning,
                stacklevel=2,
            )
        elif was_given:
            _log.info("%s: recording goes on from there in a new attempt", model)
        return self._begin(moment)

    def _begin(self, moment: Moment) -> Moment:
        removed = {
            sample
            for removal in map(self._history.removal, self._history.rollbacks(self._digest))
            if not removal.states
            for sample in removal.samples
        }
        if removed and any(map(_has_momentum, self._optimizers)):
            warnings.warn(
                f"the optimizer still holds momentum of the {len(removed)} samples (the first is {min(removed)}) that "
                "were rolled back from this model: part of them will come back into it. Roll back with optimizer=, "
                "which corrects it too, or go on with a new optimizer",
                TimstoreWarning,
                stacklevel=2,
            )
        self._store.begin_attempt(*moment, scope=self._scope, ranks=self._ranks, digest_before=self._digest)
        return moment

    def _check(self, places: Iterable[Place], moment: Moment) -> None:
        """Hold what the caller said against the moments that the model may be at."""
        rows = self._store.snapshot().catalog.rows(
            "SELECT DISTINCT attempt, epoch, step FROM steps WHERE epoch < ? OR (epoch = ? AND step < ?)",
            [moment[0], *moment],
        )
        live = {(row["attempt"], row["epoch"], row["step"]) for row in rows.to_pylist()}
        unseen = {
            place: [step for step in live if step[0] > place[0] or (step[0] == place[0] and step[1:] > place[1:])]
            for place in places
        }
        seen = [place for place in unseen if not unseen[place]]
        if not seen:
            place = max(unseen)
            epoch, step = min(step[1:] for step in unseen[place])
            raise StateError(
                f"this model is the one after epoch {place[1]}, step {place[2]} of attempt {place[0]}, which has not "
                f"seen the step of epoch {epoch}, step {step} that the store holds: pass resume_from=({place[1]}, "
                f"{place[2] + 1}), which supersedes that, or load the weights from the step before resume_from",
                kind="other-moment",
            )
        if all(place[1:] >= moment for place in seen):
            epoch, step = max(place[1:] for place in seen)
            warnings.warn(
                f"this model is the one after epoch {epoch}, step {step}, so that it holds steps that "
                f"resume_from={moment} supersedes: what samples did in them can never be rolled back",
                TimstoreWarning,
                stacklevel=2,
            )

    def _unknown(self, frontier: Moment, place: Place | None) -> StateError:
        known = self._store.latest_fingerprints()
        where = f"epoch {frontier[0]}, step {frontier[1]}"
        resume = (
            "pass resume_from=(epoch, step) of the first step that the model has not seen; it supersedes what was "
            "recorded from there on, and (0, 0) starts over"
        )
        if place is not None:
            resume = (
                f"this is the model after epoch {place[1]}, step {place[2]}: pass resume_from=({place[1]}, "
                f"{place[2] + 1}) to go on from there, which supersedes what was recorded from there on"
            )
        if known is None or known[:2] < frontier:
            return StateError(
                f"the store's history ends at {where} without the fingerprint of a model, so recording was cut off "
                f"there, or done by append: {resume}",
                kind="unknown-model",
            )
        return StateError(f"the model changed since recording stopped at {where}: {resume}", kind="model-changed")


def _has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether an optimizer holds numbers for each element of a parameter that are not zero."""
    return any(
        isinstance(value, torch.Tensor) and value.shape == parameter.shape and bool(value.any())
        for parameter, state in optimizer.state.items()
        for value in state.values()
    )
