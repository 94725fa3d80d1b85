"""`timstore.json`: read as it was created, or refused with the reason."""

import hashlib

import pytest
from stores import altered, flipped, forged

from timstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    FormatError,
    InvalidInputError,
    NotFoundError,
    ReadOnlyError,
)
from timstore.format.local_files import LocalObjects
from timstore.format.log import LogWriter
from timstore.format.log_reader import read_view
from timstore.format.settings import create_settings, read_settings


def test_settings_are_read_as_they_were_created(tmp_path):
    objects = LocalObjects(tmp_path / "new/store", durable=True)
    with pytest.raises(NotFoundError, match=r"timstore\.json"):
        read_settings(objects)
    made = create_settings(objects, precision="int8", max_rel_error=0.5, durability="os")
    assert read_settings(objects) == made
    assert (made.precision, made.max_rel_error, made.durability, made.durable) == ("int8", 0.5, "os", False)
    assert made.writable
    with pytest.raises(AlreadyExistsError):
        create_settings(objects)
    assert read_settings(objects) == made


def test_a_store_whose_creation_was_repeated_by_the_network_is_ours(tmp_path):
    class Repeating(LocalObjects):
        def create(self, path, data):
            super().create(path, data)
            super().create(path, data)

    objects = Repeating(tmp_path, durable=True)
    made = create_settings(objects)
    assert read_settings(objects) == made


@pytest.mark.parametrize("option", [{"precision": "int4"}, {"durability": "maybe"}, {"max_rel_error": 1.5}])
def test_impossible_settings_make_no_store(tmp_path, option):
    with pytest.raises(InvalidInputError, match=next(iter(option))):
        create_settings(LocalObjects(tmp_path / "store", durable=True), **option)
    assert not (tmp_path / "store").exists()


def test_settings_are_not_made_anew_over_the_remains_of_a_store(objects):
    (objects.root / "timstore.json").unlink()
    with pytest.raises(CorruptionError, match="is missing from a store that has records"):
        create_settings(objects)


def test_any_flipped_byte_of_the_settings_is_noticed(objects):
    path = objects.root / "timstore.json"
    original = path.read_bytes()
    for position, data in flipped(original):
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match=r"timstore\.json"):
            read_settings(objects)
            pytest.fail(f"byte {position}")
    for length in range(len(original)):
        path.write_bytes(original[:length])
        with pytest.raises(CorruptionError, match=r"timstore\.json"):
            read_settings(objects)


def test_a_store_of_another_format_is_refused_with_its_version(objects):
    path = objects.root / "timstore.json"
    for version in ([2, 0], [0, 9]):
        with altered(path, lambda data, version=version: forged(data, format=version)):
            with pytest.raises(FormatError, match=f"format {version[0]}.{version[1]}") as caught:
                read_settings(objects)
            assert not isinstance(caught.value, CorruptionError)
    with altered(path, lambda data: forged(data, format=[1, 7], something="new")):
        assert read_settings(objects).format == (1, 7)
    with (
        altered(path, lambda data: forged(data, reader_features=["sharded-log"])),
        pytest.raises(FormatError, match="sharded-log"),
    ):
        read_settings(objects)


def test_a_store_with_an_unknown_writer_feature_is_read_only(objects, settings):
    with altered(objects.root / "timstore.json", lambda data: forged(data, writer_features=["signed"])):
        newer = read_settings(objects)
    assert not newer.writable
    assert read_view(objects, newer).commits == ()
    with pytest.raises(ReadOnlyError, match="signed"):
        LogWriter(objects, newer)
    assert settings.writable


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"format": [1]},
        {"format": [True, 0]},
        {"store": None},
        {"max_rel_error": "0.1"},
        {"max_rel_error": -1.0},
        {"precision": "int4"},
        {"durability": "never"},
        {"reader_features": "x"},
        {"reader_features": [1]},
    ],
)
def test_settings_that_make_no_sense_are_refused(objects, change):
    with (
        altered(objects.root / "timstore.json", lambda data: forged(data, **change)),
        pytest.raises(CorruptionError, match=next(iter(change))),
    ):
        read_settings(objects)


@pytest.mark.parametrize("body", [b"[]", b"nothing", b"\xff", b"[" * 100_000])
def test_a_checked_file_without_an_object_is_refused(objects, body):
    data = body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n"
    with (
        altered(objects.root / "timstore.json", lambda _: data),
        pytest.raises(CorruptionError, match="is not a timstore record"),
    ):
        read_settings(objects)
