"""Vectors in memory and in the spill file hold the same numbers, and give their space back."""

import os

import pytest
import torch

from timstore.errors import StorageError
from timstore.rollbacks.vectors import Workspace

SIZES = {"a": 1000, "empty": 0, "b": 37}
IN_MEMORY, SPILLED = 2**20, 512


@pytest.mark.parametrize("limit", [IN_MEMORY, SPILLED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_products_are_those_of_whole_tensors(limit: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(1037, dtype=dtype), torch.randn(1037, dtype=dtype)
    with Workspace(SIZES, dtype=dtype, memory_limit_bytes=limit) as workspace:
        vectors = [workspace.new(), workspace.new()]
        assert [vector.numbers.spilled for vector in vectors] == [limit == SPILLED] * 2
        for vector, numbers in zip(vectors, (left, right), strict=True):
            vector.write("a", 0, numbers[:400])
            vector.write("a", 400, numbers[400:1000])
            vector.write("b", 0, numbers[1000:])
        one, other = vectors
        assert one.dot(other) == pytest.approx(float(left.double() @ right.double()), rel=1e-12)
        assert one.norm() == pytest.approx(float(left.double().norm()), rel=1e-12)
        one.add(other, -0.5)
        one.scale(3.0)
        expected = (left - 0.5 * right) * 3
        assert torch.equal(torch.cat([one.read("a"), one.read("empty"), one.read("b")]), expected)
        assert torch.equal(one.read("a", 10, 20), expected[10:20])
        covered = [(block.parameter, n) for block in workspace.blocks() for n in range(block.start, block.stop)]
        assert covered == [(name, n) for name, size in SIZES.items() for n in range(size)]
        assert max(block.stop - block.start for block in workspace.blocks()) * dtype.itemsize <= max(limit // 8, 8)


@pytest.mark.parametrize("limit", [3 * 1037 * 4, SPILLED])
def test_the_space_of_a_freed_vector_is_used_again_and_starts_at_zero(limit: int) -> None:
    with Workspace(SIZES, memory_limit_bytes=limit) as workspace:
        vectors = [workspace.new() for _ in range(3)]
        for vector in vectors:
            vector.write("b", 0, torch.ones(37))
        vectors[1].free()
        again = workspace.new()
        assert again.numbers.spilled == (limit == SPILLED)
        assert not again.read("b").any() and again.norm() == 0
        assert vectors[0].read("b").sum() == vectors[2].read("b").sum() == 37
        if limit == SPILLED:
            assert os.fstat(workspace.spill._file.fileno()).st_size == 3 * 1037 * 4


def test_the_spill_file_has_no_name_and_a_full_disk_is_said_to_be_full(tmp_path, monkeypatch) -> None:
    with Workspace(SIZES, memory_limit_bytes=SPILLED, directory=tmp_path) as workspace:
        workspace.new()
        assert list(tmp_path.iterdir()) == []

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match=r"(?s)No space left on device.*make room there, set TMPDIR"):
            workspace.new()
