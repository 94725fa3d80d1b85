"""Ids beside the rows of a dataset, on their way through a collator that may make anything of the rows.

Usually one row of the dataset is one of the model. A collator may also flatten all of them into one (padding-free), or
make several of each (a preference pair), or sort them. Which is whose is found by their tokens, and by asking the
collator for each row of the dataset alone.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from timstore.arguments import whole_number
from timstore.database.samples import sample_named
from timstore.errors import InvalidInputError
from timstore.model.sample_ids import is_pair, row_hash, row_ids, row_tokens
from timstore.recording.packing import pieces_of


class WithIds:
    """A collator that takes the ids out before another one, and hands them on beside its batch as `sample_ids`.

    A column holds an id for each row; of packed rows it may be a list, of an id for each piece, or for each token (-1
    for none).

    Args:
        column: that the ids are in; None to know rows by content. The recorder knows them by itself then, but for
            preference pairs, of which the model is given parts.

    Attributes:
        keys: the samples that go by names.
        recording: hand ids on. What is collated before and after training goes to models that know of none.
    """

    def __init__(self, collate: Any, column: str | None) -> None:
        self._collate = collate
        self._column = column
        self.keys: Mapping[str, int] | None = None
        self.recording = False

    def __call__(self, features: Sequence[Any]) -> Any:
        ids = self._ids(features)
        plain = [self._plain(row) for row in features]
        batch = self._collate(plain)
        if not self.recording or (isinstance(batch, Mapping) and "sample_ids" in batch):
            return batch
        if ids is not None:
            if not isinstance(batch, MutableMapping):
                raise _no_place(batch)
            batch["sample_ids"] = self._placed(ids, plain, batch)
        elif self._column is None and _count(batch) not in (None, len(features)) and pieces_of(batch) is None:
            raise _untold(len(features), batch)
        return batch

    def _ids(self, features: Sequence[Any]) -> list[int | list[int]] | None:
        """Return the ids of rows, None where they have none: rows for evaluation, or known by the recorder."""
        if self._column is None:
            pairs = all(isinstance(row, Mapping) and is_pair(row) for row in features)
            return [row_ids(row)[0] for row in features] if pairs else None
        named = [isinstance(row, Mapping) and self._column in row for row in features]
        if not any(named):
            return None
        if not all(named):
            raise InvalidInputError(f"row {named.index(False)} of a batch has no {self._column!r}, and others have")
        return [self._id(row[self._column]) for row in features]

    def _id(self, value: Any) -> int | list[int]:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list | tuple):
            return [-1 if one == -1 else self._one(one) for one in value]
        return self._one(value)

    def _one(self, value: Any) -> int:
        if isinstance(value, str):
            return sample_named(value, self.keys, self._column)
        return whole_number(value, f"{self._column}, a sample's id,")

    def _plain(self, row: Any) -> Any:
        if isinstance(row, Mapping) and self._column in row:
            return {name: value for name, value in row.items() if name != self._column}
        return row

    def _placed(self, ids: list[int | list[int]], features: Sequence[Any], batch: Any) -> torch.Tensor:
        """Return the sample of every row that the model is given, or of every token (negative: of none).

        Raises:
            InvalidInputError: it cannot be told.
        """
        if _count(batch) in (None, len(features)) and not any(isinstance(one, list) for one in ids):
            told = None if _count(batch) is None else _order(_contents(batch), [[_tokens_of(row)] for row in features])
            # Rows that are cut, masked or no tokens are taken to be in their order.
            in_turn = [(row, 0) for row in range(len(features))]
            return torch.tensor([ids[row] for row, _ in told or in_turn], device="cpu")
        alone = [_contents(self._collate([row])) for row in features]
        order = _order(_contents(batch), alone)
        if order is None:
            raise _untold(len(features), batch)
        return _spread([_owners(ids[row], alone[row], part) for row, part in order], batch)


def _count(batch: Any) -> int | None:
    """Return how many rows of tokens a batch has, None where it has none."""
    tokens = batch.get("input_ids") if hasattr(batch, "get") else None
    return len(tokens) if isinstance(tokens, torch.Tensor) and tokens.ndim == 2 else None


def _places(batch: Any) -> tuple[torch.Tensor, bool]:
    """Return the number of the row or piece that each token is in, negative for padding; and whether it is a piece."""
    pieces = pieces_of(batch)
    if pieces is not None:
        return pieces, True
    tokens, attended = batch["input_ids"], batch.get("attention_mask")
    rows = torch.arange(len(tokens), device="cpu")[:, None].repeat(1, tokens.shape[1])
    if isinstance(attended, torch.Tensor) and attended.shape == tokens.shape:
        rows[attended.cpu() == 0] = -1
    return rows, False


def _contents(batch: Any) -> list[torch.Tensor]:
    if _count(batch) is None:
        raise InvalidInputError(
            "lists of ids are for rows of tokens, and this batch has no input_ids", kind="wrong-ids"
        )
    places, _ = _places(batch)
    tokens = batch["input_ids"].cpu().long()
    return [tokens[places == number] for number in range(int(places.max()) + 1)]


def _tokens_of(row: Any) -> torch.Tensor:
    """Return what a row of the dataset consists of, nothing where it has no tokens."""
    known = isinstance(row, Mapping) and "input_ids" in row
    return row_tokens(row) if known else torch.empty(0, dtype=torch.long, device="cpu")


def _order(contents: Sequence[torch.Tensor], alone: Sequence[Sequence[torch.Tensor]]) -> list[tuple[int, int]] | None:
    """Return which part of which row of the dataset each content is, None where it cannot be told."""
    in_turn = [(row, part) for row, parts in enumerate(alone) for part in range(len(parts))]
    # Pairs are collated one way, chosen rows first; pieces, and rows that others repeat, one after the other.
    all_first = sorted(in_turn, key=lambda pair: pair[1])
    for order in (all_first, in_turn):
        if _same(contents, [alone[row][part] for row, part in order]):
            return order
    known = {row_hash(alone[row][part]): (row, part) for row, part in in_turn}
    found = [known[hashed] for hashed in map(row_hash, contents) if hashed in known]
    return found if len(found) == len(contents) == len(in_turn) == len(set(found)) else None


def _same(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def _owners(ids: int | list[int], parts: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    """Return the sample of each token of one part of a row of the dataset."""
    length = len(parts[number])
    if not isinstance(ids, list):
        return torch.full((length,), ids, device="cpu")
    if len(ids) == len(parts):
        return torch.full((length,), ids[number], device="cpu")
    lengths = [len(part) for part in parts]
    if len(ids) != sum(lengths):
        raise InvalidInputError(
            f"a row of {len(parts)} pieces and {sum(lengths)} tokens has a list of {len(ids)} ids: give it one for "
            "each piece, or for each token",
            kind="wrong-ids",
        )
    first = sum(lengths[:number])
    return torch.tensor(ids[first : first + length], device="cpu")


def _spread(owners: Sequence[torch.Tensor], batch: Any) -> torch.Tensor:
    places, packed = _places(batch)
    if not packed and all(bool((one == one[0]).all()) for one in owners):
        return torch.stack([one[0] for one in owners])
    spread = torch.full(places.shape, -1, device="cpu")
    for number, one in enumerate(owners):
        spread[places == number] = one
    return spread


def _no_place(batch: Any) -> InvalidInputError:
    return InvalidInputError(
        f"the collator returns a {type(batch).__name__}, which has no place for ids: have it return a mapping. Rows "
        "that the trainer makes itself, as where it generates answers, can be known by their tokens alone: leave "
        "id_column out",
        kind="wrong-ids",
    )


def _untold(count: int, batch: Any) -> InvalidInputError:
    return InvalidInputError(
        f"the collator makes {_count(batch)} rows for the model of {count} of the dataset, and which is whose cannot "
        "be told: no position_ids, cu_seq_lens_q or seq_idx say where one ends, or their tokens are not those of the "
        "dataset's rows, or of several of them. Make one row of each, or have the "
        "collator add sample_ids, one for each row or token that the model is given",
        kind="wrong-ids",
    )
