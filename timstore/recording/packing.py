"""Rows of tokens that several samples are packed into: where one ends and the next begins.

transformers' models are told by `seq_idx` (a number for every token), `cu_seq_lens_q` (where each begins) or
`position_ids`, which begin again. A piece is what lies between two such places.
"""

from collections.abc import Mapping
from typing import Any

import torch

from timstore.recording.batch_axis import Owners

_BEGINNINGS = ("cu_seq_lens_q", "cu_seq_lens")


def pieces_of(kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the number of every token's piece, (rows, T), negative for padding; None where rows are not packed.

    Args:
        kwargs: of the model, `input_ids` or `inputs_embeds` among them.
    """
    tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    if not isinstance(tokens, torch.Tensor) or tokens.ndim < 2:
        return None
    rows, length = tokens.shape[:2]
    begins = _beginnings(kwargs, rows, length)
    if begins is None:
        return None
    begins[:, 0] = True
    attended = kwargs.get("attention_mask")
    padding = torch.zeros(rows, length, dtype=torch.bool)
    if isinstance(attended, torch.Tensor) and attended.shape == (rows, length):
        padding = attended.detach().cpu() == 0
    numbers = begins.reshape(-1).cumsum(0).reshape(rows, length) - 1
    filling = _filling(numbers, kwargs.get("labels")) & ~padding
    numbers[padding | filling] = -1
    held = numbers >= 0
    named, again = torch.unique(numbers[held], return_inverse=True)
    if len(named) == int(held.any(1).sum()) and not filling.any():
        return None
    numbers[held] = again
    return numbers


def ids_of_tokens(samples: list[int], pieces: torch.Tensor) -> torch.Tensor:
    """Return the sample of every token, (rows, T), negative for none, from that of every piece."""
    return torch.cat([torch.tensor(samples, device="cpu"), torch.tensor([-1], device="cpu")])[pieces]


def contents_of(packed: Owners, kwargs: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """Return the tokens of each sample in packed rows, None where the model is given none."""
    tokens = kwargs.get("input_ids")
    if not isinstance(tokens, torch.Tensor) or not packed.fits(tokens.shape, packed.rows):
        return None
    return packed.parts(tokens.detach().cpu(), packed.rows)


def _beginnings(kwargs: Mapping[str, Any], rows: int, length: int) -> torch.Tensor | None:
    """Return where pieces begin within rows, (rows, T), in the first way in which it is told."""
    begins = torch.zeros(rows, length, dtype=torch.bool)
    numbers = _integers(kwargs.get("seq_idx"), 2)
    if numbers is not None and numbers.shape == (rows, length):
        begins[:, 1:] = numbers.diff(dim=1) != 0
        return begins
    for name in _BEGINNINGS:
        starts = _integers(kwargs.get(name), 1)
        if starts is not None:
            begins.reshape(-1)[starts[starts < rows * length]] = True
            return begins
    positions = _integers(kwargs.get("position_ids"), 2)
    if positions is None or positions.shape[1] != length or len(positions) not in (1, rows):
        return None
    begins[:, 1:] = positions.diff(dim=1) != 1
    return begins


def _integers(value: Any, axes: int) -> torch.Tensor | None:
    """Return a tensor of whole numbers with so many axes on the host, None where there is none."""
    if not isinstance(value, torch.Tensor) or value.ndim != axes or value.is_floating_point():
        return None
    return value.detach().cpu().long()


def _filling(numbers: torch.Tensor, labels: Any) -> torch.Tensor:
    """Return which tokens are pieces of their own without a label: what fills a row up to a multiple of a length."""
    if not isinstance(labels, torch.Tensor) or labels.shape != numbers.shape:
        return torch.zeros_like(numbers, dtype=torch.bool)
    return (numbers.reshape(-1).bincount()[numbers] == 1) & (labels.detach().cpu() == -100)
