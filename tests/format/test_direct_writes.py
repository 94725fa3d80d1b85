"""Large files are written past the page cache where they are synced: with the same bytes, wherever they lie."""

import errno
import os

import numpy as np
import pytest

from timstore.errors import StorageError
from timstore.format.local_files import LocalObjects


@pytest.mark.parametrize("size", [256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 2**20, 2**20 + 4096, 3 * 2**20 + 123])
def test_large_files_hold_what_was_put_whatever_their_size(tmp_path, size):
    data = np.random.default_rng(size).bytes(size)
    objects = LocalObjects(tmp_path, durable=True)
    objects.put("data/x", data)
    objects.put("data/y", data[::-1])  # through the memory that the first one used
    assert objects.read("data/x") == data
    assert objects.read("data/y") == data[::-1]


def test_a_file_system_that_writes_through_its_cache_only_gets_the_same_bytes(tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(2**20 + 5)
    writes = []

    def call(self, function, *args, **kwargs):
        if function is os.write:
            writes.append(len(args[1]))
            if len(writes) == 1:
                raise OSError(errno.EINVAL, "Invalid argument")
        return function(*args, **kwargs)

    monkeypatch.setattr(LocalObjects, "_call", call)
    LocalObjects(tmp_path / "refused", durable=True).put("data/x", data)
    assert (tmp_path / "refused/data/x").read_bytes() == data
    assert writes == [2**20, len(data)]

    def unknown(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("fcntl.fcntl", lambda file, command, *flags: unknown() if flags else 0)
    LocalObjects(tmp_path / "unknown", durable=True).put("data/x", data)
    assert (tmp_path / "unknown/data/x").read_bytes() == data


def test_a_full_disk_in_the_middle_of_a_large_file_is_told(tmp_path, monkeypatch):
    def call(self, function, *args, **kwargs):
        if function is os.write:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)

    monkeypatch.setattr(LocalObjects, "_call", call)
    with pytest.raises(StorageError, match="no space left to write"):
        LocalObjects(tmp_path, durable=True).put("data/x", bytes(2**20))
