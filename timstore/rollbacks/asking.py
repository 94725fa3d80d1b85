"""Which probe a rollback asks: the one that is given, the one that the store keeps, rows of the training, or none."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from timstore.arguments import choice
from timstore.database.kept_rows import ASKED, KEPT, asks_kept
from timstore.database.snapshot import Snapshot
from timstore.errors import CorruptionError
from timstore.rollbacks.probe import LOSSES, Probe
from timstore.rollbacks.targets import Target

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

    @property
    def knows_training(self) -> bool:
        """Whether a change is held against rows of the training."""
        return self.kept is not None or self.training is not None


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
    asking = _Asking(snapshot, target, outputs, loss, forgotten, _contents(snapshot, forgotten))
    if given is not None and not asks_kept(given):
        asked = asking.of(given, loss)
        with suppress(CorruptionError):  # `verify` tells; a probe of one's own needs none of them
            asked = replace(asked, training=asking.kept().probe)
        return asked
    held = snapshot.probe()
    if given is None and not target.is_loaded:
        there = held or snapshot.kept_rows()
        return Asked(None, advice=f', or probe="{KEPT}", what the store keeps' if there else "")
    return asking.kept() if held is None else asking.of(held[0], loss or held[1])


@dataclass(frozen=True, eq=False, slots=True)
class _Asking:
    """What a rollback asks with.

    Attributes:
        contents: content hashes of the samples that leave, or left before, and whose they are.
    """

    snapshot: Snapshot
    target: Target
    outputs: Callable[[Any], Any] | None
    loss: str | None
    forgotten: Collection[int]
    contents: Mapping[str, int]

    def of(self, batches: Iterable[Any], loss: str | None) -> Asked:
        """Return a probe of batches that somebody chose."""
        probe = Probe(self.target.model(), batches, outputs=self.outputs, loss=loss or "cross_entropy")
        rows = probe.row_hashes()
        return Asked(probe, overlap=tuple(sorted(one for content, one in self.contents.items() if content in rows)))

    def kept(self) -> Asked:
        """Return a probe of rows of the training that the store keeps."""
        rows = self.snapshot.kept_rows()
        left = rows.without(frozenset(self.forgotten), self.contents.keys())
        if not left:
            return Asked(None)
        loss = self.loss or rows.loss
        if loss is None:
            return Asked(
                None,
                advice=f". The store keeps {len(rows)} rows of the training itself, which are asked where loss= says "
                f"what its loss is: that was not recognised ({rows.reason or 'no gradient came to the outputs'})",
            )
        probe = Probe(self.target.model(), left.spread(ASKED).batches(), outputs=self.outputs, loss=loss)
        return Asked(probe, len(rows), len(rows) - len(left))


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
