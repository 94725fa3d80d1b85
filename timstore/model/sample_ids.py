"""What a sample consists of: a hash of its tokens, and the id that follows from it.

A row's number in a file or a split is no identity, its content is: another split, with its own numbering, finds its
rows again. Padding is not content.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch

from timstore.errors import InvalidInputError
from timstore.model.fingerprints import digest

_ID_DIGITS = 16
# What a preference pair consists of, under the names of one version of TRL or another.
_PROMPT, _CHOSEN, _REJECTED = ((f"{part}_ids", f"{part}_input_ids") for part in ("prompt", "chosen", "rejected"))


def content_rows(
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    rows: int | None = None,
    *,
    masked: bool = False,
    pieces: torch.Tensor | None = None,
) -> list[torch.Tensor] | None:
    """Return what each row of a batch consists of: `input_ids` without padding, or the first tensor with its rows.

    Args:
        rows: of the batch; None for as many as the first tensor has.
        masked: tokens may be hidden, as for a masked language model: the labels say which were there.
        pieces: the number of every token's piece, (rows, T), negative for padding: what each of them consists of, of
            packed rows.
    """
    tensors = [one for one in (kwargs.get("input_ids"), *args, *kwargs.values()) if isinstance(one, torch.Tensor)]
    given = next((one for one in tensors if one.ndim and (rows is None or len(one) == rows)), None)
    if given is None:
        return None
    given = given.detach().cpu()
    labels, attended = kwargs.get("labels"), kwargs.get("attention_mask")
    if masked and isinstance(labels, torch.Tensor) and labels.shape == given.shape:
        labels = labels.detach().cpu()
        given = torch.where(labels != -100, labels, given)
    if pieces is not None:
        return [given[pieces == number] for number in range(int(pieces.max()) + 1)]
    if isinstance(attended, torch.Tensor) and attended.shape == given.shape and given is not attended:
        kept = attended.detach().cpu().bool()
        return [row[mask] for row, mask in zip(given, kept, strict=True)]
    return list(given)


def row_hash(row: torch.Tensor) -> str:
    """Return the sha256 of what one row of a batch consists of: its numbers, whatever dtype integers are held in."""
    plain = row.detach().cpu() if row.is_floating_point() else row.detach().cpu().long()
    return digest(plain)


def sample_of(content_hash: str) -> int:
    """Return the sample id that a content hash gives: its first 63 bits."""
    return int(content_hash[:_ID_DIGITS], 16) >> 1


def is_pair(columns: Container[str]) -> bool:
    """Say whether rows with these columns are preference pairs of tokens: an answer that was chosen, one rejected."""
    return all(any(name in columns for name in names) for names in (_CHOSEN, _REJECTED))


def row_ids(row: Mapping[str, Any]) -> list[int]:
    """Return the ids of the samples in one row of a dataset, by their tokens, padding left out.

    One; of a packed row with `seq_lengths` one for each piece. A pair is one sample, with its prompt where it has one.

    Raises:
        InvalidInputError: the row has no tokens.
    """
    if is_pair(row):
        parts = [_tokens(row[name]) for name in (*_PROMPT, *_CHOSEN, *_REJECTED) if name in row]
        sizes = torch.tensor([len(part) for part in parts], device="cpu")
        return [sample_of(row_hash(torch.cat([sizes, *parts])))]
    if "input_ids" not in row:
        raise InvalidInputError(f"the row has no input_ids, by which it could be known: {sorted(row)}")
    tokens = row_tokens(row)
    lengths = row.get("seq_lengths")
    pieces = [tokens] if lengths is None else torch.split(tokens, _tokens(lengths).tolist())
    return [sample_of(row_hash(piece)) for piece in pieces]


def row_tokens(row: Mapping[str, Any]) -> torch.Tensor:
    """Return the `input_ids` of a row of a dataset without padding, (T,)."""
    tokens = _tokens(row["input_ids"])
    attended = _tokens(row.get("attention_mask", torch.ones_like(tokens)))
    return tokens[attended.bool()] if attended.shape == tokens.shape else tokens


def _tokens(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, device="cpu").long()
