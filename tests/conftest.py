"""What every test starts from."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from stores import made_store

import timstore
from timstore.database.lifetime import attended_stores
from timstore.format.local_files import LocalObjects
from timstore.format.settings import Settings, read_settings

# The tests of recording run on another device as well: TIMSTORE_DEVICE=cuda pytest tests/recording/test_c*
if "TIMSTORE_DEVICE" in os.environ:
    torch.set_default_device(os.environ["TIMSTORE_DEVICE"])
    torch.backends.cudnn.allow_tf32 = False  # what is compared is float32

# A shell gives what it runs behind (`scripts/test &`) no Ctrl-C; tests of it need what a program in front has.
signal.signal(signal.SIGINT, signal.default_int_handler)

NOBODY = 65534


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture
def none_open() -> None:
    """No store is open: those that other tests of this process left open are closed."""
    gc.collect()
    for left_open in attended_stores():
        with suppress(timstore.TimstoreError, timstore.TimstoreWarning):
            left_open.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[timstore.Store]:
    with timstore.open(tmp_path / "s") as opened:
        yield opened


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    """The objects of an empty store."""
    return made_store(tmp_path)


@pytest.fixture
def settings(objects: LocalObjects) -> Settings:
    return read_settings(objects)


@pytest.fixture
def nobody() -> Iterator[Callable[[Path], None]]:
    """What makes this process one that may not write everywhere, and a folder its own."""
    is_root = os.geteuid() == 0

    def become(own: Path) -> None:
        if is_root:
            for place in [own, *own.rglob("*")]:
                os.chown(place, NOBODY, -1)
            os.seteuid(NOBODY)

    yield become
    if is_root:
        os.seteuid(0)
