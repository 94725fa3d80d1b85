"""Which probe a rollback asks: the one that is given, the one that the store keeps, rows of the training, or none."""

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from timstore.arguments import choice
from timstore.errors import CorruptionError
from timstore.kept_rows import ASKED, KEPT, asks_kept
from timstore.rollbacks.probe import LOSSES, Probe
from timstore.rollbacks.targets import Target
from timstore.snapshot import Snapshot

Given = Iterable[Any] | Literal["auto", False] | None


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """A probe, and where it comes from.

    Attributes:
        probe: None for none.
        kept: how many rows of the training the store keeps, where the probe is drawn from them.
        left_out: how many of those are to be forgotten, or alike.
        training: kept rows to hold a probe against that somebody chose; None where there are none.
        overlap: samples to be forgotten that it holds.
        advice: what could be asked instead of nothing.
    """

    probe: Probe | None
    kept: int | None = None
    left_out: int = 0
    training: Probe | None = None
    overlap: tuple[int, ...] = ()
    advice: str = ""


def probe_to_ask(
    snapshot: Snapshot,
    target: Target,
    given: Given,
    outputs: Callable[[Any], Any] | None,
    loss: str | None,
    forgotten: Collection[int],
) -> Asked:
    """Return what a rollback asks.

    Args:
        forgotten: samples that leave, or left before.

    Raises:
        InvalidInputError: what is given is no probe, or no loss.
    """
    if loss is not None:
        choice(loss, LOSSES, "loss")
    if given is False:
        return Asked(None)
    if given is not None and not asks_kept(given):
        asked = _of(given, snapshot, target, outputs, loss, forgotten)
        with suppress(CorruptionError):  # `verify` tells; a probe of one's own needs none of them
            asked = replace(asked, training=_kept(snapshot, target, outputs, loss, forgotten).probe)
        return asked
    held = snapshot.probe()
    if given is None and not target.is_loaded:
        there = held or snapshot.kept_rows()
        return Asked(None, advice=f', or probe="{KEPT}", what the store keeps' if there else "")
    if held is not None:
        return _of(held[0], snapshot, target, outputs, loss or held[1], forgotten)
    return _kept(snapshot, target, outputs, loss, forgotten)


def _kept(
    snapshot: Snapshot,
    target: Target,
    outputs: Callable[[Any], Any] | None,
    loss: str | None,
    forgotten: Collection[int],
) -> Asked:
    """Return a probe of rows of the training that the store keeps."""
    rows = snapshot.kept_rows()
    left = rows.without(frozenset(forgotten), _contents(snapshot, forgotten).keys())
    if not left:
        return Asked(None)
    loss = loss or rows.loss
    if loss is None:
        return Asked(
            None,
            advice=f". The store keeps {len(rows)} rows of the training itself, which are asked where loss= says what "
            f"its loss is: that was not recognised ({rows.reason or 'no gradient came to the outputs'})",
        )
    probe = Probe(target.model(), left.spread(ASKED).batches(), outputs=outputs, loss=loss)
    return Asked(probe, len(rows), len(rows) - len(left))


def _of(
    batches: Iterable[Any],
    snapshot: Snapshot,
    target: Target,
    outputs: Callable[[Any], Any] | None,
    loss: str | None,
    forgotten: Collection[int],
) -> Asked:
    """Return a probe of batches that somebody chose."""
    probe = Probe(target.model(), batches, outputs=outputs, loss=loss or "cross_entropy")
    rows = probe.row_hashes()
    held = [sample for content, sample in _contents(snapshot, forgotten).items() if content in rows]
    return Asked(probe, overlap=tuple(sorted(held)))


def _contents(snapshot: Snapshot, samples: Collection[int]) -> dict[str, int]:
    """Return the content hashes of samples, and whose they are."""
    if "content_hash" not in snapshot.catalog.rows("SELECT * FROM samples LIMIT 0").column_names:
        return {}
    found = snapshot.catalog.fetch(
        "SELECT content_hash, sample FROM samples WHERE content_hash IS NOT NULL AND sample IN "
        "(SELECT unnest(?::BIGINT[])) ORDER BY sample DESC",
        [list(samples)],
    )
    return dict(found)
