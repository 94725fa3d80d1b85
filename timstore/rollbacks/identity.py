"""Which moment of the recorded history a model is at, by the digests of its parameters."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from timstore.errors import ModelMismatchError
from timstore.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Identity:
    """A model as the store knows it.

    Attributes:
        moment: (epoch, step) after which its parameters were these; None when the store holds no digests.
        names: of the parameters that make the digest.
        digest: of them together.
        removed: ids that earlier rollbacks took out of it.
    """

    moment: tuple[int, int] | None
    names: tuple[str, ...]
    digest: str
    removed: frozenset[int]

    def __str__(self) -> str:
        place = (
            f"the one after epoch {self.moment[0]}, step {self.moment[1]}, by its fingerprint"
            if self.moment
            else "identity not checked: the store holds no fingerprints"
        )
        return place + (f", {len(self.removed)} samples removed before" if self.removed else "")


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return one digest of all parameters from the digest of each."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def recognise(snapshot: Snapshot, digests: Mapping[str, str]) -> Identity:
    """Return where in the recorded history a model with these parameter digests stands.

    It is at a moment whose fingerprints were kept, or what rollbacks made of such a moment.

    Raises:
        ModelMismatchError: it is neither: another model, or one that was trained on without recording.
    """
    moments: dict[tuple[int, int], dict[str, str]] = {}
    rows = snapshot.catalog.rows("SELECT epoch, step, parameter, digest FROM fingerprints ORDER BY epoch, step")
    for row in rows.to_pylist():
        moments.setdefault((row["epoch"], row["step"]), {})[row["parameter"]] = row["digest"]
    if moments:
        names = next(reversed(moments.values())).keys()
        missing = sorted(names - digests.keys())
        if missing:
            raise ModelMismatchError(
                f"the model has no parameter {missing[0]} ({len(missing)} of {len(names)} recorded ones are missing)",
                parameter=missing[0],
            )
        digests = {name: digests[name] for name in names}
    known = {combined_digest(kept): moment for moment, kept in moments.items()}
    digest = combined_digest(digests)
    made = {
        row["digest_after"]: row
        for row in snapshot.catalog.rows(
            "SELECT samples, digest_before, digest_after FROM rollbacks WHERE method != 'undo'"
        ).to_pylist()
        if row["digest_after"] != row["digest_before"]
    }
    removed: set[int] = set()
    origin, seen = digest, {digest}
    while origin not in known and origin in made:
        removed.update(made[origin]["samples"])
        origin = made[origin]["digest_before"]
        if origin in seen:
            break
        seen.add(origin)
    if moments and origin not in known:
        last = max(moments)
        raise ModelMismatchError(
            f"this model is none that the store recorded (the last is the one after epoch {last[0]}, step {last[1]}): "
            "load the weights from the end of the recorded run; a model trained on without recording cannot be "
            "rolled back",
            kind="unknown-model",
        )
    return Identity(known.get(origin), tuple(digests), digest, frozenset(removed))
