"""Which samples the rows of the forget split are."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from timstore.arguments import whole_number
from timstore.database.samples import names_of_samples, sample_named
from timstore.database.store import Store
from timstore.errors import CoverageError, InvalidInputError, NotFoundError, TimstoreWarning


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
        found = self.rows - len(self.missing)
        return (
            f"{found} of {self.rows} forget rows are recorded, as {len(self.samples)} samples (known by their "
            f"{self.known_by}); {len(self.missing)} not"
        )


def find_forget_rows(
    store: Store, hashes: Sequence[str], id_map: Any, missing: str, *, holds_forget_alone: bool
) -> ForgetRows:
    """Return the samples that the forget rows are, by their content hashes or by an explicit map.

    Args:
        holds_forget_alone: whether nothing but forget rows is recorded in a store of this origin, as a rule: if it
            knows its samples by numbers, and there are as many as rows, all of them are meant, with a warning.

    Raises:
        InvalidInputError: the records know their samples by numbers alone, and there is no map; or a map that is none.
        CoverageError: no row was recorded; or not all, unless told to skip.
    """
    known = {row[0] for row in store.sql("SELECT DISTINCT sample FROM records").fetchall()}
    table = store.snapshot().catalog.rows("SELECT * FROM samples")
    if id_map is not None:
        known_by, given = "id_map", _read(id_map, len(hashes), names_of_samples(table, "name"))
        by_row = [[given[number]] if number in given else [] for number in range(len(hashes))]
    else:
        known_by, by_row = "tokens", _by_tokens(table, hashes)
        if not any(by_row) and "content_hash" not in table.column_names:
            known_by, by_row = "count", _by_count(store, known, len(hashes), holds_forget_alone)
    held = [[one for one in ids if one in known] for ids in by_row]
    absent = tuple(number for number, ids in enumerate(held) if not ids)
    found = ForgetRows(tuple(dict.fromkeys(one for ids in held for one in ids)), len(hashes), absent, known_by)
    if not found.samples or (absent and missing == "error"):
        raise CoverageError(_refusal(store, found, len(known)), kind="forget-rows", rows=absent)
    return found


def _by_tokens(table: pa.Table, hashes: Sequence[str]) -> list[list[int]]:
    """Return the samples of each row that the recorder knew by its tokens, or whoever recorded named by them."""
    by_hash: dict[str, list[int]] = {}
    for name in ("content_hash", "name"):
        if name in table.column_names:
            for sample, content in zip(table["sample"].to_pylist(), table[name].to_pylist(), strict=True):
                by_hash.setdefault(str(content), []).append(sample)
    return [by_hash.get(one, []) for one in hashes]


def _by_count(store: Store, known: Set[int], rows: int, holds_forget_alone: bool) -> list[list[int]]:
    """Return one of the samples for each row, all of them together, where there are as many.

    Raises:
        InvalidInputError: there are not, or others may be among them.
    """
    if not holds_forget_alone or len(known) != rows:
        counts = f". There are {len(known)} samples and {rows} rows: as many would do without one"
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
    return [[one] for one in sorted(known)]


def _refusal(store: Store, found: ForgetRows, known: int) -> str:
    first = ", ".join(map(str, found.missing[:8])) + (", ..." if len(found.missing) > 8 else "")
    some = f"{len(found.missing)} (rows {first})" if found.samples else "none"
    lacking = "were never recorded" if found.samples else "was ever recorded"
    why = (
        "what id_map says is no sample of it"
        if found.known_by == "id_map"
        else "rows are known by their tokens, so tokenizer, chat template (with its date), maximum length and collator "
        "have to be those of the recording"
    )
    skip = "; missing: skip goes on without them" if found.samples else ""
    return f"of {found.rows} forget rows, {some} {lacking} in {store.path}, which has {known} samples: {why}{skip}"


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
    found = {}
    for key, sample in id_map.items():
        row = int(key) if isinstance(key, str) and key.isdecimal() else whole_number(key, f"{what}: a row")
        if not 0 <= row < rows:
            raise InvalidInputError(f"{what} names row {row}, and the forget split has {rows}")
        if isinstance(sample, str):
            found[row] = sample_named(sample, names, "name")
        else:
            found[row] = whole_number(sample, f"{what}: the sample of row {row}")
    return found
