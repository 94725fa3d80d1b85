"""What a rollback says: of its progress, and of what it did, for people and for files."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from timstore.progress import Shown, shown, span

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the probe filter did.

    Attributes:
        sequences: rows of the probe's batches.
        products: products of the curvature matrix with a vector; each costs about two gradients of half the probe.
        damping: curvature, the same in all directions, for what half the probe does not show and the other half does,
            in units of one over the run's length; 0 where it shows all, large where the change is far beyond a
            linearisation.
        expected, seen: divergence of the other half's answers, before || after: what the curvature tells, and what it
            is (KL per position, or the mean squared difference). These three are means of both ways round.
        moved: how far the filter moved the first-order change, relative to the result.
        apart: how far the changes by either half are from their mean, relative to it.
        loss_before, loss_after: the probe's own mean loss; a rise by more than 1 % means damage.
        noise: KL of the answers of one retraining || another, in another order of the batches, on data that stays; None
            where it is not known how many rows each step drew.
        misfit: how many times more the change moves the model's answers on rows of the training that the store keeps
            than on the probe; None where it keeps none, the probe is of them, or either has fewer than 16.
        waypoints: at how many of them rows were asked, beside the model itself.
        kept: how many rows of the training the store keeps, where the probe is drawn from them; None where it is not.
        left_out: how many of those were left out, since they are to be forgotten or consist of the same.
    """

    sequences: int
    products: int
    damping: float
    expected: float
    seen: float
    moved: float
    apart: float
    loss_before: float
    loss_after: float
    noise: float | None = None
    misfit: float | None = None
    waypoints: int = 0
    kept: int | None = None
    left_out: int = 0

    @property
    def origin(self) -> str:
        """Where the probe comes from, in words; empty where it was given."""
        if self.kept is None:
            return ""
        return f" of {self.kept} kept rows of the training" + f" ({self.left_out} left out)" * bool(self.left_out)

    @property
    def asked_at(self) -> str:
        """Which parameters it was asked at, in words."""
        return f"at {self.waypoints} waypoints and the end, " if self.waypoints else ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that was not measured.

    Attributes:
        low, high: in two of three trainings that it was fitted on, the true number lay between them.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1e} ({self.low:.1e} to {self.high:.1e})"


@dataclass(frozen=True, slots=True)
class ExpectedKL:
    """How far from the retrained model a rollback is expected to end: KL(retrained || model), a mean over positions.

    Attributes:
        forgotten, staying: of the rolled-back model, on what was forgotten and on other data.
        noise_forgotten, noise_staying: of another retraining, in another order of the batches.
        rise: how much the change raises the forgotten samples' mean loss at their first use, to first order.
        faded: the norm of the forgotten samples' gradients at their last use, over that at their first.
    """

    forgotten: Estimate
    staying: Estimate
    noise_forgotten: Estimate
    noise_staying: Estimate
    rise: float
    faded: float

    @property
    def doubts(self) -> list[str]:
        """Say where the model may be farther from a retrained one than another retraining.

        On forgotten data, where a wrong claim costs most, already where the upper estimate is.
        """
        compared = [
            ("forgotten", self.forgotten, self.forgotten.high, self.noise_forgotten),
            ("other", self.staying, self.staying.value, self.noise_staying),
        ]
        return [
            f"on {data} data the model may be farther from a retrained one, by KL {own}, than retraining in another "
            f"order of the batches is, {noise}: where that matters, retrain without these samples"
            for data, own, bound, noise in compared
            if bound > noise.value
        ]


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What a rollback removed, how, and how sure that is.

    Attributes:
        method: how the change was computed: "closed form", "final moment" or "exact replay"; "+ probe" when it was
            filtered, else it is first order: the other samples' gradients are taken as recorded.
        approximates: what that did with these samples' steps, and what it takes for granted.
        denominator: `kept`, or `renormalised`: means are over the samples that stay.
        clipping: what became of the clip factors: none, followed, or kept where the records do not tell.
        model: how the model was recognised.
        delta_norm: Frobenius norm of the change; `relative_change` is that over the norm of the parameters.
        error_bound: the change is at most this far (Frobenius) from that of exactly stored records.
        rounding: norm of what the parameters' own precision could not take up, over `delta_norm`.
        read_bytes: size of the gradients that were added up, if they were dense.
        replay_off: how far the replayed run ended from the model, over how far the run went; None without a replay.
        optimizer: what became of the optimizer's state; None where no optimizer was given.
        left_out: how many records that were asked for were not in the model any more, taken out by an earlier rollback.
        rollback_id: the digest of the model afterwards, as in the `rollbacks` table.
        expected_kl: how far from the retrained model this is expected to end, beside retraining's own noise; None where
            only a part is removed, no rows of the training are asked, the loss is mse, or nobody told how many rows a
            step drew.
        checkpoint: which files are changed, and where the new ones are; None for a model in memory.
    """

    samples: tuple[int, ...]
    skipped: tuple[int, ...]
    records: int
    parameters: int
    method: str
    approximates: str
    denominator: str
    clipping: str
    strength: float
    dry_run: bool
    model: str
    delta_norm: float
    relative_change: float
    error_bound: float
    rounding: float
    read_bytes: int
    seconds: float
    rollback_id: str
    left_out: int = 0
    replay_off: float | None = None
    optimizer: str | None = None
    probe: ProbeReport | None = None
    expected_kl: ExpectedKL | None = None
    checkpoint: str | None = None
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain numbers, strings, lists and dicts, ready for JSON."""
        plain = asdict(self)
        for name in ("samples", "skipped", "warnings"):
            plain[name] = list(plain[name])
        return plain

    def __str__(self) -> str:
        ids = ", ".join(map(str, self.samples[:8])) + (", ..." if len(self.samples) > 8 else "")
        lines = [
            f"{'would remove' if self.dry_run else 'removed'}  {len(self.samples)} samples ({ids}), "
            f"{self.records} records, strength {self.strength:g}",
            f"method        {self.method}; denominator {self.denominator}; clipping {self.clipping}",
            f"that is       {self.approximates}",
            f"model         {self.model}",
            f"change        {self.delta_norm:.4g} in norm, {self.relative_change:.3%} of {self.parameters} parameters",
            f"stored error  at most {self.error_bound:.2g} of that norm; rounding lost {self.rounding:.1%}",
            f"read          {self.read_bytes / 1e6:.1f} MB of gradients (as if dense) in {self.seconds:.2f} s",
        ]
        if self.probe is not None:
            probe = self.probe
            lines.append(
                f"probe         {probe.sequences} sequences{probe.origin}, {probe.asked_at}{probe.products} products, "
                f"damping {probe.damping:.2f}; moved the change by {probe.moved:.1%}, "
                f"its halves {probe.apart:.1%} apart; its loss {probe.loss_before:.4f} -> {probe.loss_after:.4f}"
            )
        if self.expected_kl is not None:
            kl = self.expected_kl
            lines += [
                f"expected      KL to a retrained model: forgotten data {kl.forgotten}, other data {kl.staying}",
                f"noise         of retraining in another order: {kl.noise_forgotten}, {kl.noise_staying}",
            ]
        if self.replay_off is not None:
            lines.append(f"replay        ended within {self.replay_off:.1e} of the run's length of the model")
        if self.optimizer is not None:
            lines.append(f"optimizer     {self.optimizer}")
        if self.checkpoint is not None:
            lines.append(f"checkpoint    {self.checkpoint}")
        if self.left_out:
            lines.append(f"left out      {self.left_out} records that earlier rollbacks took out of this model")
        if self.skipped:
            lines.append(f"skipped       {len(self.skipped)} samples without records")
        lines += [f"warning       {warning}" for warning in self.warnings]
        return "\n".join(lines)


class Bar:
    """Two lines of progress: gradients added, products taken.

    Args:
        products: how many there will be, at most.
    """

    def __init__(self, progress: Shown, gradients: int, products: int) -> None:
        self._progress = progress
        self._products = products
        self._began: float | None = None
        self._added = progress.add_task("adding gradients", total=gradients)
        self._taken = progress.add_task("curvature", total=products, visible=products > 0)

    def added(self, gradients: int) -> None:
        """Say that some more gradients were added."""
        self._progress.advance(self._added, gradients)

    def curved(self, sequences: int) -> None:
        """Say that products with the probe's curvature begin."""
        self._began = time.perf_counter()
        self._say(
            f"curvature: up to {self._products} products over one or the other half of the probe's {sequences} "
            "sequences, each about two of their gradients"
        )

    def taken(self) -> None:
        """Say that one more product was taken."""
        if self._began is not None:
            seconds, self._began = time.perf_counter() - self._began, None
            whole = span(seconds * self._products)
            self._say(f"curvature: the first product took {span(seconds)}; all of them take about {whole}")
        self._progress.advance(self._taken, 1)

    def _say(self, text: str) -> None:
        self._progress.say(text)
        _log.info(text)


@contextmanager
def rollback_shown(wanted: bool | None, gradients: int, products: int = 0) -> Iterator[Bar]:
    """Show how far a rollback is, as `timstore.progress.shown` does."""
    with shown(wanted) as progress:
        yield Bar(progress, gradients, products)
