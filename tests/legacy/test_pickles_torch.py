"""Pickles with torch's bytes within them: a tensor lies in its storage, a storage in its bytes."""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pickled import BLOB, assert_same_bits, items, load, name, refused, saved, tensor_of, text


def test_a_tensor_made_by_hand_is_read(path: Path) -> None:
    assert_same_bits(load(path, tensor_of(BLOB)), np.arange(4, dtype=np.float32))
    assert_same_bits(load(path, tensor_of(BLOB, rest=b"}")), np.arange(4, dtype=np.float32))
    read = load(path, tensor_of(BLOB, offset=1, size=(2, 2), stride=(1, 1)))
    assert read.tolist() == [[1, 2], [2, 3]]


@pytest.mark.parametrize(
    "options",
    [
        {"size": (5,)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**62},
        {"stride": (2,)},
        {"stride": (-1,)},
        {"stride": (2**62,)},
        {"size": (5,), "stride": (0,)},
        {"size": (2**33,), "stride": (0,)},
        {"size": (2**32, 2**32), "stride": (0, 0)},
        {"size": (4, 4), "stride": (0, 1)},
        {"size": (-1,)},
        {"size": (2**64,)},
        {"size": (2**40, 0), "stride": (0, 1)},
        {"size": (1,) * 65, "stride": (1,) * 65},
        {"size": (4,), "stride": ()},
        {"size": (4,), "stride": (1, 1)},
        {"rest": b"}" + text("neg") + b"\x88s"},
        {"rest": b"K\x01"},
    ],
    ids=str,
)
def test_a_tensor_that_does_not_lie_in_its_storage_is_refused(path: Path, options: dict[str, Any]) -> None:
    error = refused(path, tensor_of(BLOB, **options))
    numbers = [options.get("offset", 0), *options.get("size", ()), *options.get("stride", ())]
    if (
        "rest" not in options
        and 0 not in options.get("size", ())
        and len(numbers) < 6
        and options.get("stride") not in ((), (1, 1))
    ):
        within = all(0 <= one < 2**63 for one in numbers)
        assert ("expanded, or beyond its storage" if within else "no sizes") in str(error)


def test_bytes_of_torch_that_are_not_one_storage_are_refused(path: Path) -> None:
    evil = name("os", "system") + items(text(f"touch {path.parent / 'ran'}")) + b"R."
    parts = [b"".join((b"\x80\x02", one, b".")) for one in BLOB.split(b".\x80\x02")]
    parts[0] = parts[0][2:]
    head, data = b"".join(parts[:4]), BLOB[-24:]
    assert head + b"\x80\x02" + BLOB.split(b".\x80\x02")[4] == BLOB, "the format of these tests is torch's"
    others = [b"".join([*parts[:place], evil, *parts[place:4], parts[4][:-1]]) for place in range(5)]
    others += [b"".join([*parts[:place], evil, *parts[place + 1 : 4], parts[4][:-1]]) for place in range(4)]
    others += [
        BLOB[:-1],
        BLOB + b"x",
        BLOB + BLOB,
        b"",
        b"N." * 5,
        data,
        BLOB.replace(b"torch\nFloat", b"torch\nComplexFloat"),
    ]
    others += [
        BLOB.replace(b"torch\nFloatStorage", replaced) for replaced in (b"os\nsystem", b"torch\nTensor", b"torch\nload")
    ]
    others += [BLOB.replace(b"storageq", b"moduleXq"), BLOB.replace(b"storageq", b"modulesq")]
    others += [
        BLOB.replace(b"torch\nFloat", b"torch\nDouble"),
        BLOB.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
    ]
    others += [BLOB.replace(b"K\x04Ntq\x04Q", b"K\x05Ntq\x04Q"), BLOB.replace(b"K\x04Ntq\x04Q", b"K\x04K\x01tq\x04Q")]
    others += [BLOB.replace(b"K\x04Ntq\x04Q", b"M\xff\xffNtq\x04Q")[:-24] + struct.pack("<Q", 0xFFFF) + data[8:]]
    others += [BLOB[:-24] + struct.pack("<Q", 2**61) + data[8:], BLOB[:-24] + struct.pack("<q", -1) + data[8:]]
    others += [saved(value, as_zip=as_zip) for value in (torch.ones(4), {"a": 1}) for as_zip in (False, True)]
    others += [saved(torch.ones(4).untyped_storage(), as_zip=True)]
    key = re.findall(rb"\d{6,}", BLOB)[0]
    other = b"9" * len(key)
    others += [BLOB.replace(key, other, 1), BLOB.replace(key, other).replace(other, key, 1)]
    assert len(set(others)) == len(others)
    assert BLOB not in others
    for blob in others:
        refused(path, tensor_of(blob))
    assert not (path.parent / "ran").exists()
