"""A record that is out of the model is never subtracted again, however the model came about.

Random sequences of training, rolling back, undoing, loading and resuming, on a loss that is linear in the parameters:
what each record did to them is then known exactly, and so is what is left in the model.
TIMSTORE_SEQUENCES=20000 runs so many.
"""

import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import timstore
from timstore.errors import CoverageError, ModelMismatchError, StateError

SEQUENCES = int(os.environ.get("TIMSTORE_SEQUENCES", "500"))
CHUNKS = 100
LONGEST = 8
WIDTH = 3
LR = 0.1
SAMPLES = (1, 2, 3)
STEPS_OF_AN_EPOCH = 3

Record = tuple[int, int, int]  # attempt, step, sample


@dataclass(frozen=True)
class Held:
    """What a model is made of.

    Attributes:
        shares: by record, how much of it is in the model.
        out: records that a rollback took out, all or a part of each.
        steps: (attempt, step) that the model was trained on.
        place: the last of these.
        undo: the rollback that made it, and the model before.
    """

    theta: torch.Tensor
    shares: dict[Record, float] = field(default_factory=dict)
    out: frozenset[Record] = frozenset()
    steps: frozenset[tuple[int, int]] = frozenset()
    place: tuple[int, int] | None = None
    undo: "tuple[str, Held] | None" = None

    @property
    def key(self) -> bytes:
        return self.theta.numpy().tobytes()


class Sequence:
    """Random operations on one store, and beside them what must come of each."""

    def __init__(self, path: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.store = timstore.open(path)
        self.model = nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64)
        self.first = torch.randn(1, WIDTH, generator=self.numbers, dtype=torch.float64)
        self.model.weight.data.copy_(self.first)
        self.held = Held(self.first)
        self.met = [self.held]
        self.given: set[bytes] = set()
        self.starts: list[int] = []
        self.gradients: dict[Record, np.ndarray] = {}
        self.done: list[str] = []

    def run(self) -> None:
        self.train(None)
        for _ in range(self.random.randint(1, LONGEST)):
            operation = self.random.choices(
                [self.roll_back, self.go_on, self.resume, self.load, self.undo], weights=[8, 4, 3, 2, 1]
            )[0]
            operation()
            self.check()
            if self.is_ambiguous:
                break

    def check(self) -> None:
        """Hold the model against what the records that are in it did to it, each on its own."""
        expected = self.first.numpy().copy()
        for record, share in self.held.shares.items():
            expected -= LR * share * self.gradients[record]
        assert np.abs(self.model.weight.detach().numpy() - expected).max() < 1e-12

    @property
    def is_ambiguous(self) -> bool:
        """Whether taking a record out led to the very bits of another model that was met: then it is that model."""
        made = [(one.key, one.place, one.out) for one in self.met]
        return len({key for key, _, _ in made}) < len(set(made))

    # --- what the records are -------------------------------------------------------------------------------

    def is_live(self, attempt: int, step: int) -> bool:
        return all(step < start for start in self.starts[attempt + 1 :])

    @property
    def frontier(self) -> tuple[int, int]:
        """The last live (attempt, step)."""
        return max(((a, s) for a, s, _ in self.gradients if self.is_live(a, s)), key=lambda one: one[::-1])

    def become(self, held: Held) -> None:
        self.held = replace(held, theta=self.model.weight.detach().clone())
        self.met.append(self.held)

    # --- operations -----------------------------------------------------------------------------------------

    def roll_back(self) -> None:
        ids = self.random.choice([[1], [2], [3], [1, 2], [2, 3], [1, 2, 3]])
        strength = self.random.choice([1.0, 1.0, 1.0, 0.5])
        part = self.random.choice([None, None, None, "step % 2 = 0"])
        self.done.append(f"rollback({ids}, strength={strength}, where={part!r})")
        held = self.held
        where = f"sample IN ({', '.join(map(str, ids))})" + (f" AND {part}" if part else "")
        asked = {
            one
            for one in self.gradients
            if one[2] in ids and self.is_live(*one[:2]) and (part is None or one[1] % 2 == 0)
            if held.place is not None and one[1] <= held.place[1]
        }
        leaving = asked - held.out
        how = {"where": where, "strength": strength, "accumulate": "float64", "keep_delta": True, "missing": "skip"}
        roll_back = partial(self.store.rollback, self.model, **how)
        if held.place is None or not self.is_live(*held.place):
            with pytest.raises(ModelMismatchError):
                roll_back()
        elif not asked:
            with pytest.raises(CoverageError, match="nothing to remove"):
                roll_back()
        elif not leaving:
            with pytest.raises(StateError) as caught:
                roll_back()
            assert caught.value.kind == "removed-before"
        else:
            report = roll_back()
            assert (report.records, report.left_out) == (len(leaving), len(asked & held.out))
            shares = held.shares | {one: held.shares[one] - strength for one in leaving}
            self.become(replace(held, shares=shares, out=held.out | leaving, undo=(report.rollback_id, held)))
            self.given.add(self.held.key)

    def undo(self) -> None:
        if self.held.undo is None:
            return
        rollback_id, before = self.held.undo
        if self.held.place is None or not self.is_live(*self.held.place):
            with pytest.raises(ModelMismatchError):
                self.store.undo(self.model, rollback_id)
            return
        self.done.append("undo")
        self.store.undo(self.model, rollback_id)
        assert torch.equal(self.model.weight, before.theta)
        self.held = before
        self.given.add(before.key)

    def load(self) -> None:
        """Go back to a model of before, as from a checkpoint."""
        number = self.random.randrange(len(self.met))
        self.done.append(f"load({number})")
        self.held = self.met[number]
        self.model.weight.data.copy_(self.held.theta)

    def go_on(self) -> None:
        """Record without saying where: where history ends, or after the moment that a rolled-back model is at."""
        place = self.held.place
        if place is None or not self.is_live(*place) or not (place == self.frontier or self.held.key in self.given):
            with pytest.raises(StateError, match="resume_from"), self.store.record(self.model, self.sgd()):
                pass
        else:
            self.train(None)

    def resume(self) -> None:
        """Record from a step that is said: the next one, one that the model has seen already, or the first."""
        step = 0 if self.held.place is None else max(0, self.held.place[1] + self.random.choice([1, 1, 1, 0, -1, -9]))
        live = {(attempt, one) for attempt, one, _ in self.gradients if one < step and self.is_live(attempt, one)}
        if live - self.held.steps:
            with (
                pytest.raises(StateError) as caught,
                self.store.record(self.model, self.sgd(), resume_from=moment(step)),
            ):
                pass
            assert caught.value.kind == "other-moment"
        else:
            self.train(step)

    def train(self, start: int | None) -> None:
        optimizer = self.sgd()
        count = self.random.randint(1, 3)
        self.done.append(f"train({count}, resume_from={start})")
        resume_from = None if start is None else moment(start)
        with self.store.record(self.model, optimizer, resume_from=resume_from) as recorder:
            attempt, held = self.store.attempt, self.held
            if attempt == len(self.starts):
                self.starts.append(recorder.step)
            expected = 0 if held.place is None else held.place[1] + 1
            assert recorder.step == (expected if start is None else start)
            for _ in range(count):
                step = recorder.step
                recorder.epoch = moment(step)[0]
                ids = self.random.sample(SAMPLES, self.random.randint(1, 2))
                inputs = torch.randn(len(ids), WIDTH, generator=self.numbers, dtype=torch.float64)
                self.model(inputs, sample_ids=ids).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                records = {(attempt, step, one): inputs[row].numpy() for row, one in enumerate(ids)}
                self.gradients |= records
                steps = held.steps | {(attempt, step)}
                held = replace(held, shares=held.shares | dict.fromkeys(records, 1.0), steps=steps)
                held = replace(held, place=(attempt, step), undo=None)
                if self.random.random() < 0.3:
                    recorder.save_point()
                    self.become(held)
        self.become(held)

    def sgd(self) -> torch.optim.SGD:
        return torch.optim.SGD(self.model.parameters(), lr=LR)


def moment(step: int) -> tuple[int, int]:
    return step // STEPS_OF_AN_EPOCH, step


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where syncing costs nothing, if there is such a place."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_what_is_out_is_never_subtracted_again(folder: Path, chunk: int) -> None:
    for seed in range(chunk, SEQUENCES, CHUNKS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", timstore.TimstoreWarning)
            sequence = Sequence(folder / str(seed), seed)
            try:
                with sequence.store:
                    sequence.run()
            except (Exception, pytest.fail.Exception) as error:
                error.add_note(f"sequence {seed}: {'; '.join(sequence.done)}")
                raise
