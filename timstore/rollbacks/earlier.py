"""What a model that went through earlier rollbacks still holds of their samples, as far as that is known."""

from timstore.database.identity import Identity, taken_out
from timstore.database.snapshot import Snapshot
from timstore.model.optimizer_names import SGD_FAMILY
from timstore.rollbacks.selection import Selection


def warnings_of_earlier(snapshot: Snapshot, identity: Identity, selection: Selection) -> list[str]:
    """Return what the user should know of earlier rollbacks of the model, and of those that nobody can tell."""
    found = []
    partial = [one for one in identity.removals if not one.is_whole and set(one.samples) & set(selection.before[1])]
    if partial:
        strength = min(one.strength for one in partial)
        how = [f"with strength {strength:g}"] * (strength < 1)
        how += ["of some parameters only"] * any(one.parameters is not None for one in partial)
        how += ["in a store of an earlier version, which does not say which"] * any(not one.is_exact for one in partial)
        found.append(
            f"{selection.before[0]} records were left out since earlier rollbacks took them out of this model, but "
            f"{', '.join(how)}: undo those and remove all at once to be sure that nothing is left"
        )
    for restart in identity.restarts:
        held = sorted({one for removal in restart.removals if not removal.states for one in removal.samples})
        if held and _carries(snapshot, restart.attempt):
            found.append(
                f"training went on in attempt {restart.attempt} with an optimizer that kept its momentum from before "
                f"the rollback of {len(held)} samples (the first is {held[0]}): part of them came back into the model "
                "by it, and no record says how much; rollback(optimizer=...) corrects the optimizer as well"
            )
    for attempt in identity.hidden:
        start = snapshot.view.attempts[attempt]
        found.append(
            f"attempt {attempt} began at epoch {start.from_epoch}, step {start.from_step} with a model that had been "
            "trained further: what it was trained on from there is superseded, stays in the model, and is not removed"
        )
    possible = _possible(snapshot, identity, selection)
    if possible:
        found.append(
            f"whether earlier rollbacks took records of {len(possible)} of these samples (the first is {possible[0]}) "
            "out of this model cannot be told, since the store does not know the weights that it came from: if so, "
            "they were subtracted twice now"
        )
    return found


def _carries(snapshot: Snapshot, attempt: int) -> bool:
    """Say whether the first steps of an attempt, one of each group, used momentum or moments from before it."""
    parameters = snapshot.parameters().values()
    rows = snapshot.catalog.rows(
        "SELECT * FROM stored.steps WHERE attempt = ? "
        "QUALIFY rank() OVER (PARTITION BY group_id ORDER BY epoch, step) = 1",
        [attempt],
    ).to_pylist()
    return any(
        (row["momentum"] or row["optimizer"] not in SGD_FAMILY)
        and {one.name for one in parameters if one.group_id == row["group_id"]}
        - {*(row["idle"] or ()), *(row["fresh"] or ())}
        for row in rows
    )


def _possible(snapshot: Snapshot, identity: Identity, selection: Selection) -> list[int]:
    """Return the samples that leave and that rollbacks may have taken out before."""
    if not identity.possible:
        return []
    out, params = taken_out(identity.possible)
    found = snapshot.catalog.rows(
        f"SELECT DISTINCT sample FROM records WHERE {out} AND (attempt, epoch, step, rank, sample) IN "
        "(SELECT (r[1], r[2], r[3], r[4], r[5]) FROM (SELECT unnest(?::BIGINT[][]) AS r)) ORDER BY sample",
        [*params, selection.removed],
    )
    return list(found["sample"].to_pylist())
