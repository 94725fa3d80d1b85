"""Which moment of the recorded history a model is at, by its parameters' digests, and which records are out of it.

A model is at a moment whose digests were kept, or it is what rollbacks made of such a moment. From there the way goes
back attempt by attempt: each keeps the digest that it began with, which again is that of a moment, or of a rollback.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from timstore.database.snapshot import Snapshot
from timstore.errors import ModelMismatchError
from timstore.format.log import Attempt

Moment = tuple[int, int]
# Attempt, epoch, step.
Place = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Removal:
    """A rollback that a model went through.

    Attributes:
        rollback_id: the digest of the model afterwards.
        until: where the model before it stood; None when unknown.
        parameters: the only ones that it changed; None for all.
        states: of the optimizer, that went along.
        is_exact: whether the store says which records it took out; of older rollbacks it says only of which samples.
    """

    rollback_id: str
    until: Place | None
    samples: tuple[int, ...]
    strength: float
    parameters: tuple[str, ...] | None
    states: tuple[str, ...]
    is_exact: bool

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left in the model of the records that it took out, as far as the store tells."""
        return self.is_exact and self.strength == 1 and self.parameters is None


@dataclass(frozen=True, slots=True)
class Restart:
    """An attempt that began on a model which rollbacks had made.

    Attributes:
        moment: of its first step.
        removals: these rollbacks.
    """

    attempt: int
    moment: Moment
    removals: tuple[Removal, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """A model as the store knows it.

    Attributes:
        place: after which step its parameters were these; None when the store holds no digests.
        names: of the parameters that make the digest.
        digest: of them together.
        removals: the rollbacks that it went through.
        restarts: where training went on after some of them.
        is_rolled_back: whether the last thing that happened to it was a rollback, not training.
        hidden: attempts that superseded steps which the model that they began with had taken.
        possible: rollbacks that it may have gone through, since the store does not know what an attempt began with.
    """

    place: Place | None
    names: tuple[str, ...]
    digest: str
    removals: tuple[Removal, ...] = ()
    restarts: tuple[Restart, ...] = ()
    is_rolled_back: bool = False
    hidden: tuple[int, ...] = ()
    possible: tuple[Removal, ...] = ()

    @property
    def moment(self) -> Moment | None:
        """(epoch, step) of its place."""
        return None if self.place is None else self.place[1:]

    @property
    def removed(self) -> frozenset[int]:
        """Samples of which rollbacks took records out of it."""
        return frozenset(sample for removal in self.removals for sample in removal.samples)

    @property
    def restarted(self) -> Moment:
        """The first step since the last rollback that training went on after."""
        return max((one.moment for one in self.restarts), default=(0, 0))

    def taken_for_whole(self) -> "Identity":
        """Return it as if no rollback had been."""
        return replace(self, removals=(), possible=())

    def __str__(self) -> str:
        place = (
            f"the one after epoch {self.place[1]}, step {self.place[2]}, by its fingerprint"
            if self.place
            else "identity not checked: the store holds no fingerprints"
        )
        return place + (f", {len(self.removed)} samples removed before" if self.removals else "")


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return one digest of all parameters from the digest of each."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def recognise(snapshot: Snapshot, digests: Mapping[str, str]) -> Identity:
    """Return where in the recorded history a model with these parameter digests stands.

    Raises:
        ModelMismatchError: nowhere: it is another model, or one that was trained on without recording.
    """
    history = History(snapshot)
    missing = sorted(set(history.names or ()) - digests.keys())
    if missing:
        raise ModelMismatchError(
            f"the model has no parameter {missing[0]} ({len(missing)} of {len(history.names or ())} recorded ones are "
            "missing)",
            parameter=missing[0],
        )
    found = history.identity(digests)
    if found is None:
        raise ModelMismatchError(history.why_unknown(digests), kind="unknown-model")
    return found


def taken_out(removals: Iterable[Removal]) -> tuple[str, list[Any]]:
    """Return the SQL condition, with its parameters, that a record is one of those that rollbacks took out."""
    conditions: list[str] = ["false"]
    params: list[Any] = []
    removals = list(removals)
    exact = sorted({one.rollback_id for one in removals if one.is_exact})
    if exact:
        conditions.append(
            "(attempt, epoch, step, rank, sample) IN (SELECT (r[1], r[2], r[3], r[4], r[5]) FROM (SELECT "
            "unnest(removed) AS r FROM stored.rollbacks WHERE method != 'undo' AND digest_after IN "
            "(SELECT unnest(?::VARCHAR[]))))"
        )
        params.append(exact)
    for removal in removals:
        if not removal.is_exact:
            until = "true"
            if removal.until is not None:
                attempt, epoch, step = removal.until
                until = f"attempt <= {attempt} AND (epoch < {epoch} OR (epoch = {epoch} AND step <= {step}))"
            conditions.append(f"(sample IN (SELECT unnest(?::BIGINT[])) AND {until})")
            params.append(list(removal.samples))
    return f"({' OR '.join(conditions)})", params


class History:
    """The digests that a store holds: of moments, and of what rollbacks made.

    Attributes:
        attempts: number n at position n.
        names: of the parameters that digests of moments are made of; None where there are none.
        made: by digest, the rows of the rollbacks that left it.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.attempts: Sequence[Attempt] = snapshot.view.attempts
        ask = snapshot.catalog.rows
        moments: dict[Place, dict[str, str]] = {}
        for row in ask("FROM stored.fingerprints ORDER BY epoch, step, attempt").to_pylist():
            place = row["attempt"], row["epoch"], row["step"]
            moments.setdefault(place, {})[row["parameter"]] = row["digest"]
        live = ask("SELECT DISTINCT attempt, epoch, step FROM fingerprints").to_pylist()
        self._live = {(row["attempt"], row["epoch"], row["step"]) for row in live}
        newest = max(self._live or moments, key=_in_time, default=None)
        self.names = None if newest is None else tuple(moments[newest])
        self._kept: dict[str, list[Place]] = {}
        for place, kept in moments.items():
            self._kept.setdefault(combined_digest(kept), []).append(place)
        self.made: dict[str, list[dict[str, Any]]] = {}
        # What a rollback began from, and what an undo gave back.
        self._whole: set[str] = set()
        self._restored: set[str] = set()
        rollbacks = "SELECT * EXCLUDE (removed), removed IS NOT NULL AS is_exact FROM stored.rollbacks ORDER BY commit"
        for row in ask(rollbacks).to_pylist():
            if row["method"] == "undo":
                self._restored.add(row["digest_after"])
            elif row["digest_after"] != row["digest_before"]:
                row["attempt"] = snapshot.view.commits[row["commit"]].attempt
                self.made.setdefault(row["digest_after"], []).append(row)
                self._whole.add(row["digest_before"])

    def digest(self, digests: Mapping[str, str]) -> str:
        """Return one digest of the parameters that moments are known by; of all of them where the model lacks some."""
        names = digests if self.names is None or not digests.keys() >= set(self.names) else self.names
        return combined_digest({name: digests[name] for name in names})

    def identity(self, digests: Mapping[str, str]) -> Identity | None:
        """Return where a model stands, None if nowhere."""
        digest = self.digest(digests)
        own, origins = self._kept.get(digest, []), self._origins(digest)
        live = [one for one in own if one in self._live] or [one for one in origins if one in self._live]
        if not live and (own or origins or self._live):
            return None
        way = _Way(self, digest)
        unknown = way.unknown
        if not live and digest not in self.made and digest not in self._whole:
            unknown = [len(self.attempts)]
        return Identity(
            max(live, key=_in_time, default=None),
            tuple(digests) if self.names is None else self.names,
            digest,
            removals=tuple(way.removals),
            restarts=tuple(way.restarts),
            is_rolled_back=digest in self.made and not own,
            hidden=tuple(way.hidden),
            possible=self._beside(way, unknown),
        )

    def kept(self, digest: str) -> list[Place]:
        """Return the moments that a digest was kept of."""
        return self._kept.get(digest, [])

    def places(self, digest: str) -> list[Place]:
        """Return the moments that a digest was kept of, and those from which rollbacks led to it."""
        return self.kept(digest) + self._origins(digest)

    def rollbacks(self, digest: str) -> list[dict[str, Any]]:
        """Return the rows of the rollbacks that led from some moment to a digest."""
        rows, waiting = [], [digest]
        for one in waiting:
            for row in self.made.get(one, ()):
                rows.append(row)
                before = row["digest_before"]
                if before not in self._kept and before not in waiting:
                    waiting.append(before)
        return rows

    def removal(self, row: Mapping[str, Any]) -> Removal:
        """Return what a row of the `rollbacks` table says."""
        return Removal(
            row["digest_after"],
            max(self.places(row["digest_before"]), default=None),
            tuple(row["samples"]),
            row["strength"],
            None if row["parameters"] is None else tuple(row["parameters"]),
            tuple(row["optimizer_states"] or ()),
            row["is_exact"],
        )

    def was_given(self, digest: str) -> bool:
        """Say whether a rollback, or its undoing, left a model with this digest."""
        return digest in self.made or digest in self._restored

    def why_unknown(self, digests: Mapping[str, str]) -> str:
        """Return why a model stands nowhere in the history."""
        places = self.places(self.digest(digests))
        if places:
            attempt, epoch, step = max(places)
            return (
                f"this model is the one after epoch {epoch}, step {step} of attempt {attempt}, and a later attempt "
                "superseded that step: what it was trained on is no longer part of the recorded run. Load the weights "
                "from the end of that run"
            )
        _, epoch, step = max(self._live, key=_in_time)
        return (
            f"this model is none that the store recorded (the last is the one after epoch {epoch}, step {step}): "
            "load the weights from the end of the recorded run; a model trained on without recording cannot be "
            "rolled back"
        )

    def _origins(self, digest: str) -> list[Place]:
        return [place for row in self.rollbacks(digest) for place in self.kept(row["digest_before"])]

    def _beside(self, way: "_Way", attempts: Sequence[int]) -> tuple[Removal, ...]:
        """Return the rollbacks that are not on the way, and were made before one of these attempts began."""
        held = {removal.rollback_id for removal in way.removals}
        rows = (row for digest, rows in self.made.items() if digest not in held for row in rows)
        return tuple(self.removal(row) for row in rows if row["attempt"] < max(attempts, default=0))


class _Way:
    """The way back from a digest to the run's start.

    Where a digest is of several things, all of them are followed: a record that may be out of the model counts as out.

    Attributes:
        removals, restarts, hidden: as in `Identity`.
        unknown: attempts that do not say what they began with, or began with a model that the store does not know.
    """

    def __init__(self, history: History, digest: str) -> None:
        self._history = history
        self._waiting = [digest]
        self._attempts: set[int] = set()
        self.removals: list[Removal] = []
        self.restarts: list[Restart] = []
        self.hidden: list[int] = []
        self.unknown: list[int] = []
        seen: set[str] = set()
        while self._waiting:
            one = self._waiting.pop()
            if one not in seen:
                seen.add(one)
                for row in history.made.get(one, ()):
                    self.removals.append(history.removal(row))
                    self._waiting.append(row["digest_before"])
                for attempt, _, _ in history.kept(one):
                    self._before(attempt)

    def _before(self, number: int) -> None:
        """Go on with what an attempt began with; if that is not known, with the attempt whose steps came before."""
        history = self._history
        starts = [(one.from_epoch, one.from_step) for one in history.attempts[: number + 1]]
        while number not in self._attempts and starts[number] > (0, 0):
            self._attempts.add(number)
            begun = history.attempts[number].digest_before
            rows = [] if begun is None else history.rollbacks(begun)
            if rows:
                self.restarts.append(Restart(number, starts[number], tuple(map(history.removal, rows))))
            if begun is not None and (rows or history.kept(begun)):
                places = history.places(begun)
                if places and all(place[1:] >= starts[number] for place in places):
                    self.hidden.append(number)
                self._waiting.append(begun)
                return
            self.unknown.append(number)
            number = max((one for one in range(number) if starts[one] < starts[number]), default=number)


def _in_time(place: Place) -> tuple[int, int, int]:
    return place[1], place[2], place[0]
