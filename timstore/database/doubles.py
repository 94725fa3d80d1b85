"""What another handle committed first: kept out of a commit, so that nothing is in the store twice."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from timstore.database.batch import Batch, EncodedItem
from timstore.database.ledger import same
from timstore.errors import CorruptionError, FormatError, InvalidInputError, TimstoreWarning
from timstore.format.compaction import read_rows, read_tables
from timstore.format.local_files import Objects
from timstore.format.log import Commit, Overtaken
from timstore.format.log_reader import View, read_view
from timstore.format.segments import EncodedRecord
from timstore.format.settings import Settings
from timstore.records import Parameter

_GRADIENT = ("epoch", "step", "rank", "sample", "parameter")
_STEP = ("epoch", "step", "rank", "group_id")
# What a look names may be folded, and gone, when it is read.
_LOOKS = 3


class Doubles:
    """Looks, at each commit of one writer, at what others have committed since.

    Args:
        attempt: the one that is written.
        base: what the ledger goes by: everything up to there it has looked up itself.

    Attributes:
        refused: an error for each batch of which something was refused, until it is told.
    """

    def __init__(self, objects: Objects, settings: Settings, attempt: int, base: View) -> None:
        self._objects = objects
        self._settings = settings
        self._attempt = attempt
        self._view = base
        self._seen = {writer: newest.seq for writer, newest in base.newest.items()}
        self._own: set[str] = set()
        self._others: list[Commit] = []
        self._shapes: dict[str, list[int]] = {}
        self.refused: list[InvalidInputError] = []

    def keep_out(self, batch: Batch, writer: str) -> None:
        """Take out of a batch what is committed already. To be called while no other writer commits.

        Raises:
            Overtaken: the batch is another one now.
        """
        self._own.add(writer)
        try:
            kept = self._without(batch.items, *self._told(batch))
        except (CorruptionError, FormatError, TimstoreWarning):
            # A log that is damaged keeps nobody from putting on disk what was accepted; readers say what is wrong.
            return
        if kept != batch.items:
            batch.keep(kept)
            raise Overtaken

    def _told(self, batch: Batch) -> tuple[set[tuple[Any, ...]], dict[tuple[Any, ...], Mapping[str, Any]]]:
        for _ in range(_LOOKS - 1):
            try:
                self._look()
                return self._committed(batch)
            except CorruptionError as error:
                if error.kind != "missing":
                    raise
        self._look()
        return self._committed(batch)

    def _look(self) -> None:
        """Take note of the commits that are new, but for one's own, and of those the ones to this attempt."""
        view = read_view(self._objects, self._settings, self._view)
        known = len(self._view.commits) if view.compaction == self._view.compaction else 0
        new = [one for one in view.commits[known:] if one.seq > self._seen.get(one.writer, -1)]
        others = [one for one in new if one.writer not in self._own]
        for commit in others:
            for rows in self._rows(view, commit, "parameters", ("parameter", "shape")):
                self._shapes.update(zip(*(column.to_pylist() for column in rows.columns), strict=True))
        # Last: what could not be read is looked at again.
        self._others += [one for one in others if one.attempt == self._attempt and one.steps is not None]
        self._seen.update((one.writer, one.seq) for one in new)
        self._view = view

    def _committed(self, batch: Batch) -> tuple[set[tuple[Any, ...]], dict[tuple[Any, ...], Mapping[str, Any]]]:
        """Return what others have committed at the batch's moments: keys of gradients, and steps by their keys."""
        gradients: set[tuple[Any, ...]] = set()
        steps: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        span, ranks = batch.steps, set(batch.ranks)
        for commit in self._others:
            if span is None or commit.steps is None or commit.steps[1] < span[0] or span[1] < commit.steps[0]:
                continue
            if commit.ranks is not None and ranks.isdisjoint(commit.ranks):
                continue
            for rows in self._rows(self._view, commit, "gradients", _GRADIENT):
                gradients.update(zip(*(column.to_pylist() for column in rows.columns), strict=True))
            for rows in self._rows(self._view, commit, "steps"):
                steps |= {tuple(row[name] for name in _STEP): row for row in rows.to_pylist()}
        return gradients, steps

    def _rows(
        self, view: View, commit: Commit, kind: str, columns: tuple[str, ...] | None = None
    ) -> Iterator[pa.Table]:
        """Yield the rows of one kind of a commit, out of the compaction where they are folded."""
        compaction = view.compaction
        if compaction is None or not compaction.covers(commit.writer, commit.seq):
            files = [info for info in commit.objects if info.kind == kind]
            tables = [read_rows(self._objects, info, commit) for info in files]
        else:
            key = commit.writer, commit.seq
            number = next(number for number, one in enumerate(view.commits) if (one.writer, one.seq) == key)
            folded = read_tables(self._objects, compaction, kind)
            tables = [rows.filter(pa.array(rows["commit"].to_numpy() == number)) for rows in folded]
        for rows in tables:
            yield rows if columns is None else rows.select(columns)

    def _without(
        self,
        items: Sequence[EncodedItem],
        gradients: set[tuple[Any, ...]],
        steps: Mapping[tuple[Any, ...], Mapping[str, Any]],
    ) -> list[EncodedItem]:
        """Return what is left of some items; what says something else than what is committed is refused by name."""
        refused: list[str] = []
        kept = []
        for one in items:
            if one.encoded is not None and (reason := self._twice(one.encoded, one.item.parameters, gradients)):
                refused.append(f"{one.item}: {reason}")
                continue
            rows = {
                kind: [row for row in listed if self._is_new(kind, row, steps, refused)]
                for kind, listed in one.item.rows.items()
            }
            if rows == one.item.rows:
                kept.append(one)
            elif left := {kind: listed for kind, listed in rows.items() if listed}:
                kept.append(replace(one, item=replace(one.item, rows=left)))
        if refused:
            more = "" if len(refused) == 1 else f", and {len(refused) - 1} more like it"
            message = (
                f"{refused[0]}{more}: committed by another handle since this one was opened, to attempt "
                f"{self._attempt}. It was left out, all else that was accepted is on disk"
            )
            self.refused.append(InvalidInputError(message, kind="duplicate"))
        return kept

    def _twice(
        self, encoded: EncodedRecord, parameters: Mapping[str, Parameter], gradients: set[tuple[Any, ...]]
    ) -> str | None:
        """Return what is wrong with a record, None where nothing is."""
        record = encoded.record
        for name in dict.fromkeys(part.parameter for part in encoded.parts):
            if (record.epoch, record.step, record.rank, record.sample, name) in gradients:
                return f"the gradient of {name} is recorded already"
            shape = tuple(self._shapes.get(name, parameters[name].shape))
            if shape != parameters[name].shape:
                return f"{name} is recorded with shape {shape}, not {parameters[name].shape}"
        return None

    def _is_new(
        self,
        kind: str,
        row: Mapping[str, Any],
        steps: Mapping[tuple[Any, ...], Mapping[str, Any]],
        refused: list[str],
    ) -> bool:
        """Say whether a row is to be written; of one that contradicts what is committed, `refused` says so."""
        if kind == "parameters":
            shape = self._shapes.get(row["parameter"], row["shape"])
            if shape != row["shape"]:
                refused.append(f"parameter {row['parameter']} is recorded with shape {shape}, not {row['shape']}")
                return False
        if kind == "steps" and (there := steps.get(tuple(row[name] for name in _STEP))) is not None:
            for name in row:
                if not same(there.get(name), row[name]):
                    where = f"epoch {row['epoch']}, step {row['step']}, group {row['group_id']}"
                    refused.append(f"{where}: recorded with {name} {there.get(name)}, not {row[name]}")
                    break
            return False
        return True
