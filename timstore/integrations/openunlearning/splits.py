"""The rows of OpenUnlearning's splits: which samples those to be forgotten are, and a probe of those to be retained.

Rows are known by their tokens, as the recorder knew them.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from timstore.arguments import whole_number
from timstore.database.samples import names_of_samples, sample_named
from timstore.database.store import Store
from timstore.errors import CoverageError, InvalidInputError, NotFoundError, TimstoreWarning
from timstore.model.sample_ids import content_rows, row_hash

Collate = Callable[[list[Any]], Any]
# What the model was given of a batch; by the first two a row is known.
INPUTS = ("input_ids", "attention_mask", "labels")


def hashes_of(split: Sequence[Any], collate: Collate, name: str) -> list[str]:
    """Return the content hash of every row, as it reaches the model.

    Each goes through the collator by itself: which tokens are padding is its decision. OpenUnlearning's takes the end
    of a text for padding where the tokenizer has no token of its own for that.

    Args:
        split: rows by number; OpenUnlearning's data sets have no iterator.
        name: of the split, for messages.

    Raises:
        InvalidInputError: a row that is no row of tokens.
    """
    return [_hash_of(split[number], collate, f"row {number} of the {name} split") for number in range(len(split))]


def _hash_of(row: Any, collate: Collate, where: str) -> str:
    inputs = _inputs_of(collate([row]), where)
    rows = content_rows((), {name: inputs[name] for name in INPUTS[:2] if name in inputs})
    assert rows is not None
    return row_hash(rows[0])


def _inputs_of(batch: Any, where: str) -> dict[str, Any]:
    """Return what a model is given of a batch.

    Raises:
        InvalidInputError: it has no tokens.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        has = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise InvalidInputError(
            f"{where} has no input_ids, by which it could be known, but {has}: name a data set whose handler gives "
            "one text a row, such as QADataset"
        )
    return {name: batch[name] for name in INPUTS if name in batch}


@dataclass(frozen=True, slots=True)
class ForgetRows:
    """The forget split, as the store knows it.

    Attributes:
        samples: ids, in the order of the rows; rows of the same tokens are one.
        rows: how many there are.
        missing: the numbers of those that were never recorded.
        known_by: `tokens`, `id_map`, or `count`: there are as many samples as rows, and all of them are meant.
    """

    samples: tuple[int, ...]
    rows: int
    missing: tuple[int, ...]
    known_by: str

    def __str__(self) -> str:
        return (
            f"{self.rows - len(self.missing)} of {self.rows} forget rows are recorded, as {len(self.samples)} samples "
            f"(known by their {self.known_by}); {len(self.missing)} not"
        )


def find_forget_rows(
    store: Store, hashes: Sequence[str], id_map: Any, *, skips_missing: bool, holds_forget_alone: bool
) -> ForgetRows:
    """Return the samples that the forget rows are, by their content hashes or by an explicit map.

    Args:
        skips_missing: go on without rows that were never recorded.
        holds_forget_alone: whether nothing but forget rows is recorded in a store of this origin, as a rule: if it
            knows its samples by numbers, and there are as many as rows, all of them are meant, with a warning.

    Raises:
        InvalidInputError: the records know their samples by numbers alone, and there is no map; or a map that is none.
        CoverageError: no row was recorded; or not all, unless told to skip.
    """
    recorded = {row[0] for row in store.sql("SELECT DISTINCT sample FROM records").fetchall()}
    table = store.snapshot().catalog.rows("SELECT * FROM samples")
    if id_map is not None:
        known_by, mapped = "id_map", _read(id_map, len(hashes), names_of_samples(table, "name"))
        by_row = [[mapped[number]] if number in mapped else [] for number in range(len(hashes))]
    else:
        known_by, by_row = "tokens", _by_tokens(table, hashes)
        if not any(by_row) and "content_hash" not in table.column_names:
            known_by, by_row = "count", _by_count(store, recorded, len(hashes), holds_forget_alone)
    by_row = [[sample for sample in samples if sample in recorded] for samples in by_row]
    absent = tuple(number for number, samples in enumerate(by_row) if not samples)
    distinct = dict.fromkeys(sample for samples in by_row for sample in samples)
    rows = ForgetRows(tuple(distinct), len(hashes), absent, known_by)
    if not rows.samples or (absent and not skips_missing):
        raise CoverageError(_refusal(store, rows, len(recorded)), kind="forget-rows", rows=absent)
    return rows


def _by_tokens(table: pa.Table, hashes: Sequence[str]) -> list[list[int]]:
    """Return the samples of each row that the recorder knew by its tokens, or whoever recorded named by them."""
    by_hash: dict[str, list[int]] = {}
    for column in ("content_hash", "name"):
        if column in table.column_names:
            for sample, content in zip(table["sample"].to_pylist(), table[column].to_pylist(), strict=True):
                by_hash.setdefault(str(content), []).append(sample)
    return [by_hash.get(content, []) for content in hashes]


def _by_count(store: Store, recorded: Set[int], rows: int, holds_forget_alone: bool) -> list[list[int]]:
    """Return one of the samples for each row, all of them together, where there are as many.

    Raises:
        InvalidInputError: there are not, or others may be among them.
    """
    if not holds_forget_alone or len(recorded) != rows:
        counts = f". There are {len(recorded)} samples and {rows} rows: as many would do without one"
        raise InvalidInputError(
            f"{store.path} knows its samples by numbers that whoever recorded them chose, not by their tokens, and "
            "a row's place in the forget split is none of them: pass id_map=, the number of each forget row to its "
            f"sample id{counts if holds_forget_alone else ''}",
            kind="no-id-map",
        )
    warnings.warn(
        f"{store.path} knows its samples by numbers, and has {rows} of them, as many as the forget split has rows: all "
        "are taken to be those rows, as nothing else used to be recorded so. If something else was, pass id_map=",
        TimstoreWarning,
        stacklevel=4,
    )
    return [[sample] for sample in sorted(recorded)]


def _refusal(store: Store, rows: ForgetRows, recorded: int) -> str:
    first = ", ".join(map(str, rows.missing[:8])) + (", ..." if len(rows.missing) > 8 else "")
    some, skip = "none was ever recorded", ""
    if rows.samples:
        some = f"{len(rows.missing)} (rows {first}) were never recorded"
        skip = "; missing: skip goes on without them"
    why = (
        "what id_map says is no sample of it"
        if rows.known_by == "id_map"
        else "rows are known by their tokens, so tokenizer, chat template (with its date), maximum length and collator "
        "have to be those of the recording"
    )
    return f"of {rows.rows} forget rows, {some} in {store.path}, which has {recorded} samples: {why}{skip}"


def _read(id_map: Any, rows: int, names: Mapping[str, int] | None) -> dict[int, int]:
    """Return the sample of each row that a map names.

    Raises:
        NotFoundError: no such file.
        InvalidInputError: it is no map, or names a row that there is not.
    """
    what = "id_map"
    if isinstance(id_map, str | os.PathLike):
        what = f"id_map {id_map}"
        try:
            id_map = json.loads(Path(id_map).read_bytes())
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {what}", path=str(id_map)) from None
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{what} is no JSON: {error}") from None
    if isinstance(id_map, Sequence) and not isinstance(id_map, str):
        id_map = dict(enumerate(id_map))
    if not isinstance(id_map, Mapping):
        raise InvalidInputError(
            f"{what} gives the number of a forget row its sample id, and is no {type(id_map).__name__}"
        )
    mapped = {}
    for key, sample in id_map.items():
        row = int(key) if isinstance(key, str) and key.isdecimal() else whole_number(key, f"{what}: a row")
        if not 0 <= row < rows:
            raise InvalidInputError(f"{what} names row {row}, and the forget split has {rows}")
        by_name = isinstance(sample, str)
        mapped[row] = (
            sample_named(sample, names, "name") if by_name else whole_number(sample, f"{what}: the sample of row {row}")
        )
    return mapped


@dataclass(frozen=True, slots=True)
class RetainProbe:
    """Batches as the model takes them, and the numbers of their rows in the retain split."""

    batches: list[dict[str, Any]]
    rows: list[int]


def probe_of(retain: Any, collate: Collate, count: int, forgotten: Set[str], batch_rows: int) -> RetainProbe:
    """Return a probe of rows drawn from the retain split, the same ones at every call.

    Args:
        forgotten: content hashes of rows that must not be in it.
        batch_rows: at most so many rows a batch.

    Raises:
        InvalidInputError: there is no retain split, or nothing in it that is not to be forgotten.
    """
    if retain is None or not len(retain):
        raise InvalidInputError(
            "the probe is taken from the retain split, and there is none: name one, or set probe: null"
        )
    drawn = torch.randperm(len(retain), generator=torch.Generator(device="cpu").manual_seed(0), device="cpu").tolist()
    left_out, numbers = set(forgotten), []
    for number in drawn:
        content = _hash_of(retain[number], collate, f"row {number} of the retain split")
        if content not in left_out:
            left_out.add(content)  # rows of the same tokens are asked once
            numbers.append(number)
        if len(numbers) == count:
            break
    if not numbers:
        raise InvalidInputError("every row of the retain split is to be forgotten as well: no probe is left of it")
    together = [numbers[start : start + batch_rows] for start in range(0, len(numbers), batch_rows)]
    collated = (collate([retain[number] for number in batch]) for batch in together)
    return RetainProbe([_inputs_of(batch, "a batch of the retain split") for batch in collated], numbers)
