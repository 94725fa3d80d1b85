"""A digest is of a tensor's bits, dtype and shape, however it lies in memory."""

import hashlib

import pytest
import torch
from torch import nn

from timstore.model import fingerprints
from timstore.model.fingerprints import digest, digests


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_digest_is_the_sha256_of_dtype_shape_and_bytes(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert digest(tensor) == hashlib.sha256(f"{dtype} (3, 5)\n".encode() + content).hexdigest()


def test_one_turned_bit_another_shape_or_another_dtype_is_another_digest() -> None:
    tensor = torch.zeros(4, 4)
    turned = tensor.clone()
    turned[3, 3] = -0.0
    others = [tensor.reshape(16), tensor.reshape(2, 8), tensor.to(torch.int32), turned, tensor[:0], tensor[0, 0]]
    assert len({digest(one) for one in [tensor, *others]}) == 7


@pytest.mark.parametrize("block_bytes", [1, 4, 12, 1000])
def test_blocks_and_strides_do_not_show(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    tensor = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    whole = digest(tensor)
    monkeypatch.setattr(fingerprints, "_BLOCK_BYTES", block_bytes)
    assert digest(tensor) == whole
    assert digest(tensor.to(memory_format=torch.channels_last)) == whole
    assert digest(tensor.mT.contiguous().mT) == whole


def test_no_block_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_BLOCK_BYTES", 64)
    for tensor in (torch.zeros(9, 40), torch.zeros(40, 9).T, torch.zeros(3, 10, 7).permute(2, 0, 1)):
        sizes = [block.numel() * 4 for block in fingerprints._blocks(tensor)]
        assert max(sizes) <= 64
        assert sum(sizes) == tensor.numel() * 4


def test_a_model_has_a_digest_per_named_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    before = digests(model)
    assert before == {name: digest(one) for name, one in model.named_parameters()}
    with torch.no_grad():
        model[1].weight[1, 1] += 1
    after = digests(model)
    assert [name for name in before if before[name] != after[name]] == ["1.weight"]
