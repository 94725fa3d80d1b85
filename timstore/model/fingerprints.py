"""A digest per parameter, so that a model is known again by its bits."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

_BLOCK_BYTES = 16 * 1024 * 1024
_THREADS = min(4, os.cpu_count() or 1)


def digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's dtype, shape and bits, whatever device it is on. Memory of one block."""
    return digest_of_blocks(tensor.dtype, tuple(tensor.shape), _blocks(tensor.detach()))


def digest_of_blocks(dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[torch.Tensor]) -> str:
    """Return the digest of a tensor that is given flat, in blocks, in order."""
    state = hashlib.sha256(f"{dtype} {shape}\n".encode())
    for block in blocks:
        if block.numel():
            # A single element counts as contiguous whatever its stride is, and then has no view as bytes.
            packed = block.contiguous().as_strided((block.numel(),), (1,))
            state.update(packed.view(torch.uint8).cpu().numpy().data)
    return state.hexdigest()


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Return the digest of every named parameter."""
    named = dict(model.named_parameters())
    return digests_by(lambda name: digest(named[name]), named)


def digests_by(digest_of: Callable[[str], str], names: Iterable[str]) -> dict[str, str]:
    """Return the digest of every name, of several at once: hashing lets other threads run."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest_of, names), strict=True))


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if not tensor.is_contiguous() and tensor.ndim > 1 and tensor.numel() * tensor.element_size() > _BLOCK_BYTES:
        # Flattening it would copy the whole of it.
        for part in tensor:
            yield from _blocks(part)
        return
    flat = tensor.reshape(-1)
    step = max(1, _BLOCK_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step]
