"""What every test starts from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import timstore


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture
def store(tmp_path: Path) -> Iterator[timstore.Store]:
    with timstore.open(tmp_path / "s") as opened:
        yield opened
