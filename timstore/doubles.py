"""What another handle committed first: kept out of a commit, so that nothing is in the store twice."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from timstore.batch import Batch, Entry
from timstore.errors import CorruptionError, InvalidInputError, TimstoreError, TimstoreWarning
from timstore.format.checkpoint import read_rows, read_tables
from timstore.format.commits import Commit
from timstore.format.log import Overtaken
from timstore.format.objects import Objects
from timstore.format.settings import Settings
from timstore.format.view import View, read_view
from timstore.ledger import same

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
        before = len(batch.entries), batch.bytes
        for look in range(_LOOKS):
            try:
                self._look(batch.ranks)
                kept = self._without(batch.entries, *self._committed(batch))
                break
            except (TimstoreError, TimstoreWarning) as error:
                # A log that cannot be read keeps nobody from putting on disk what was accepted; readers will refuse it.
                if not isinstance(error, CorruptionError) or error.kind != "missing" or look == _LOOKS - 1:
                    return
        if kept != batch.entries:
            batch.entries = kept
            batch.bytes = sum(entry.bytes for entry in kept)
            raise Overtaken(f"{before} became {len(kept)}")

    def _look(self, ranks: tuple[int, ...]) -> None:
        """Take note of the commits that are new, but for one's own, and those of other attempts and ranks."""
        before, self._view = self._view, read_view(self._objects, self._settings, self._view)
        if self._view is before:
            return
        known = len(before.commits) if self._view.checkpoint == before.checkpoint else 0
        for commit in self._view.commits[known:]:
            if commit.seq <= self._seen.get(commit.writer, -1):
                continue
            self._seen[commit.writer] = commit.seq
            if commit.writer in self._own:
                continue
            for rows in self._rows(commit, "parameters", ("parameter", "shape")):
                self._shapes.update(zip(*(column.to_pylist() for column in rows.columns), strict=True))
            alike = commit.ranks is None or set(commit.ranks) & set(ranks)
            if commit.attempt == self._attempt and commit.steps is not None and alike:
                self._others.append(commit)

    def _committed(self, batch: Batch) -> tuple[set[tuple[Any, ...]], dict[tuple[Any, ...], Mapping[str, Any]]]:
        """Return what others have committed at the batch's moments: keys of gradients, and steps by their keys."""
        gradients: set[tuple[Any, ...]] = set()
        steps: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        span = batch.steps
        for commit in self._others:
            if span is None or commit.steps is None or commit.steps[1] < span[0] or span[1] < commit.steps[0]:
                continue
            for rows in self._rows(commit, "gradients", _GRADIENT):
                gradients.update(zip(*(column.to_pylist() for column in rows.columns), strict=True))
            for rows in self._rows(commit, "steps"):
                steps |= {tuple(row[name] for name in _STEP): row for row in rows.to_pylist()}
        return gradients, steps

    def _rows(self, commit: Commit, kind: str, columns: tuple[str, ...] | None = None) -> Iterator[pa.Table]:
        """Yield the rows of one kind of a commit, out of the checkpoint where they are folded."""
        checkpoint = self._view.checkpoint
        if checkpoint is None or not checkpoint.covers(commit.writer, commit.seq):
            for info in commit.objects:
                if info.kind == kind:
                    rows = read_rows(self._objects, info, commit)
                    yield rows if columns is None else rows.select(columns)
            return
        commits = self._view.commits[: checkpoint.commits]
        number = next(n for n, one in enumerate(commits) if (one.writer, one.seq) == (commit.writer, commit.seq))
        for rows in read_tables(self._objects, checkpoint, kind):
            mine = rows.filter(pc.equal(rows["commit"], number))
            yield mine if columns is None else mine.select(columns)

    def _without(
        self,
        entries: list[Entry],
        gradients: set[tuple[Any, ...]],
        steps: Mapping[tuple[Any, ...], Mapping[str, Any]],
    ) -> list[Entry]:
        """Return what is left of entries; what says something else than what is committed is refused by name."""
        refused: list[str] = []
        kept = []
        for entry in entries:
            if entry.encoded is not None and (twice := self._twice(entry, gradients)):
                refused.append(f"{entry.item}: {twice}")
                continue
            fewer: dict[str, list[Mapping[str, Any]]] = {}
            for kind, rows in entry.item.rows.items():
                told = [row for row in rows if self._is_new(kind, row, steps, refused)]
                if len(told) < len(rows):
                    fewer[kind] = told
            if fewer:
                left = {kind: rows for kind, rows in {**entry.item.rows, **fewer}.items() if rows}
                if not left:
                    continue
                entry = Entry(replace(entry.item, rows=left), None, entry.bytes)
            kept.append(entry)
        if refused:
            more = "" if len(refused) == 1 else f", and {len(refused) - 1} more like it"
            self.refused.append(
                InvalidInputError(
                    f"{refused[0]}{more}: committed by another handle since this one was opened, to attempt "
                    f"{self._attempt}. It was left out, all else that was accepted is on disk",
                    kind="duplicate",
                )
            )
        return kept

    def _twice(self, entry: Entry, gradients: set[tuple[Any, ...]]) -> str | None:
        """Return what is wrong with a record, None where nothing is."""
        encoded = entry.encoded
        assert encoded is not None
        record = encoded.record
        for name in dict.fromkeys(part.parameter for part in encoded.parts):
            if (record.epoch, record.step, record.rank, record.sample, name) in gradients:
                return f"the gradient of {name} is recorded already"
            shape = self._shapes.get(name)
            if shape is not None and tuple(shape) != entry.item.parameters[name].shape:
                return f"{name} is recorded with shape {tuple(shape)}, not {entry.item.parameters[name].shape}"
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
            shape = self._shapes.get(row["parameter"])
            if shape is not None and list(shape) != list(row["shape"]):
                refused.append(
                    f"parameter {row['parameter']} is recorded with shape {tuple(shape)}, not {row['shape']}"
                )
                return False
        if kind == "steps" and (there := steps.get(tuple(row[name] for name in _STEP))) is not None:
            for name in row:
                if not same(there.get(name), row[name]):
                    where = f"epoch {row['epoch']}, step {row['step']}, group {row['group_id']}"
                    refused.append(f"{where}: recorded with {name} {there.get(name)}, not {row[name]}")
                    break
            return False
        return True
