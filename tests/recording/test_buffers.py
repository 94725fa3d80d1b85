"""Memory for what is captured: copies stay what they were, and memory is used again once they are gone."""

import gc
import random

import numpy as np
import pytest
import torch

from timstore.recording import buffers
from timstore.recording.buffers import Buffers
from timstore.records import BFLOAT16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", [None, [2], [3, 0, 1], []])
def test_a_copy_has_the_bits_of_the_chosen_rows_whatever_happens_to_the_tensor(dtype, rows):
    torch.manual_seed(0)
    tensor = (torch.randn(4, 7, 3) * 9).to(dtype).transpose(1, 2)
    wanted = tensor if rows is None else tensor[rows]
    bits = wanted.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    pool = Buffers()
    copied = pool.copy(tensor, None if rows is None else torch.tensor(rows, dtype=torch.int64))
    tensor.fill_(0)
    pool.wait()
    assert copied.shape == tuple(wanted.shape) and copied.flags.c_contiguous
    assert copied.dtype == (
        BFLOAT16 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    )
    assert copied.tobytes() == bits


def test_a_number_alone_and_a_tensor_that_needs_a_gradient():
    held = torch.tensor(2.5, requires_grad=True)
    pool = Buffers()
    copied = pool.copy(held)
    pool.wait()
    assert copied.shape == () and copied == 2.5


def slabs(pool):
    return [slab for one in pool._pools.values() for slab in one.slabs]


def test_no_copy_changes_while_any_view_of_it_is_held_and_memory_is_used_again(monkeypatch):
    """Against copies on the heap, in random order of making and letting go, some larger than a slab."""
    monkeypatch.setattr(buffers, "_SLAB_BYTES", 4096)
    draw = random.Random(0)
    pool, held, most = Buffers(), [], 0
    for number in range(3000):
        numbers = draw.choice([1, 5, 60, 300, 900, 2000])
        wanted = np.full(numbers, number, np.float32)
        copied = pool.copy(torch.from_numpy(wanted).to(torch.get_default_device()))
        pool.wait()
        held.append((copied[numbers // 2 :], wanted[numbers // 2 :]))
        while len(held) > 6 or (held and draw.random() < 0.4):
            held.pop(draw.randrange(len(held)))
        for view, expected in held:
            assert np.array_equal(view, expected)
        most = max(most, sum(slab.size for slab in slabs(pool)))
    # Seven of at most 8,000 bytes are held at once, each of which may keep a slab; nothing grows with their number.
    assert most <= 2 * 7 * 8192
    held.clear()
    gc.collect()
    assert sum(not slab.unused for slab in slabs(pool)) <= 1
