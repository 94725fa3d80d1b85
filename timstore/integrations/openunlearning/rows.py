"""Rows of a split, known by their tokens as the recorder knew them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from timstore.errors import InvalidInputError
from timstore.model.sample_ids import content_rows, row_hash

Collate = Callable[[list[Any]], Any]
# What the model was given of a batch.
INPUTS = ("input_ids", "attention_mask", "labels")


def hashes_of(split: Any, collate: Collate, name: str) -> list[str]:
    """Return the content hash of every row, as it reaches the model.

    Each goes through the collator by itself: which tokens are padding is its decision. OpenUnlearning's takes the end
    of a text for padding where the tokenizer has no token of its own for that.

    Args:
        name: of the split, for messages.

    Raises:
        InvalidInputError: a row that is no row of tokens.
    """
    return [hash_of(row, collate, f"row {number} of the {name} split") for number, row in enumerate(rows_of(split))]


def hash_of(row: Any, collate: Collate, where: str) -> str:
    """Return the content hash of one row."""
    given = inputs_of(collate([row]), where)
    rows = content_rows((), {key: one for key, one in given.items() if key != "labels"})
    assert rows is not None
    return row_hash(rows[0])


def inputs_of(batch: Any, where: str) -> dict[str, Any]:
    """Return what a model is given of a batch.

    Raises:
        InvalidInputError: it has no tokens.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        held = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise InvalidInputError(
            f"{where} has no input_ids, by which it could be known, but {held}: name a data set whose handler gives "
            "one text a row, such as QADataset"
        )
    return {name: batch[name] for name in INPUTS if name in batch}


def rows_of(split: Sequence[Any]) -> Iterator[Any]:
    """Yield a split's rows; OpenUnlearning's data sets have a length and rows by number, and no iterator."""
    for number in range(len(split)):
        yield split[number]
