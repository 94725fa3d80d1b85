"""What a reader sees, and what it refuses to take for a store's own."""

import hashlib
from dataclasses import replace

import pytest
from stores import (
    altered,
    commit,
    contents,
    flipped,
    forged,
    one_object,
    record_files,
)

from timstore.errors import (
    CorruptionError,
    FormatError,
    NotFoundError,
    TimstoreWarning,
)
from timstore.format.checksums import read_verified
from timstore.format.local_files import LocalObjects
from timstore.format.log import LogWriter, claim_attempt
from timstore.format.log_reader import read_view
from timstore.format.settings import create_settings, read_settings


@pytest.fixture
def lossy(tmp_path):
    """A store that is not synced, and its settings."""
    made = LocalObjects(tmp_path / "lossy", durable=False)
    settings = create_settings(made, durability="os")
    claim_attempt(made, 0, 0, "all", 1, first=True)
    return made, settings


def test_a_later_view_keeps_what_it_knows_in_place_and_reads_only_what_is_new(objects, settings, monkeypatch):
    first, second = LogWriter(objects, settings), LogWriter(objects, settings)
    times = (f"2030-01-01T00:00:{seconds:02d}.000000+00:00" for seconds in (30, 31, 10, 20, 40))
    monkeypatch.setattr("timstore.format.log.now", lambda: next(times))
    known = [commit(first, b"a"), commit(first, b"b")]
    before = read_view(objects, settings)
    later = [commit(second, b"c"), commit(second, b"d"), commit(first, b"e")]
    read = []
    plain = objects.read
    monkeypatch.setattr(objects, "read", lambda path, **most: (read.append(path), plain(path, **most))[1])
    view = read_view(objects, settings, before)
    assert before.commits == tuple(known)
    assert view.commits == tuple(known + later)
    assert sorted(read) == sorted(f"log/{one.writer}/{one.seq:012d}.json" for one in later)
    assert {one.seq for one in read_view(objects, settings).commits} == {0, 1, 2}
    assert read_view(objects, settings, view) is view


def test_readers_write_nothing(objects, settings, monkeypatch):
    commit(LogWriter(objects, settings), b"a")

    def refuse(*_, **__):
        raise AssertionError("a reader wrote")

    reader = LocalObjects(objects.root, durable=True)
    monkeypatch.setattr(reader, "_call", refuse)
    assert contents(reader, read_view(reader, read_settings(reader))) == [[b"a"]]


@pytest.fixture
def three(objects, settings):
    writer = LogWriter(objects, settings)
    for data in (b"a", b"b", b"c"):
        commit(writer, data)
    return writer


def test_any_flipped_or_missing_byte_of_a_record_is_noticed(objects, settings, three):
    for path in record_files(objects, three)[1:]:
        original = path.read_bytes()
        cut = [(length, original[:length]) for length in range(0, len(original), 7)]
        for position, data in [*flipped(original), *cut]:
            path.write_bytes(data)
            with pytest.raises(CorruptionError, match=path.name):
                read_view(objects, settings)
                pytest.fail(f"byte {position}")
        path.write_bytes(original)
    assert len(read_view(objects, settings).commits) == 3


def test_any_flipped_or_missing_byte_of_an_attempt_is_noticed(objects, settings):
    path = objects.root / "runs/000000.json"
    original = path.read_bytes()
    for position, data in [*flipped(original), *((length, original[:length]) for length in range(len(original)))]:
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match=r"000000\.json"):
            read_view(objects, settings)
            pytest.fail(f"byte {position}")


def test_a_torn_newest_record_is_corruption_when_commits_are_durable(objects, settings, three):
    path = record_files(objects, three)[-1]
    with altered(path, lambda data: data[: len(data) // 2]), pytest.raises(CorruptionError, match=path.name):
        read_view(objects, settings)


def test_a_torn_newest_record_is_a_warning_when_they_are_not(lossy):
    objects, settings = lossy
    writer = LogWriter(objects, settings)
    made = [commit(writer, data) for data in (b"a", b"b", b"c")]
    for torn in (b"", b"{"):
        with altered(record_files(objects, writer)[-1], lambda _, torn=torn: torn):
            with pytest.warns(TimstoreWarning, match=r"000000000002\.json.*durability='os'"):
                view = read_view(objects, settings)
            assert list(view.commits) == made[:2]
        with altered(record_files(objects, writer)[1], lambda _, torn=torn: torn), pytest.raises(CorruptionError):
            read_view(objects, settings)
    unchained = altered(record_files(objects, writer)[-1], lambda data: forged(data, previous="0"))
    with unchained, pytest.raises(CorruptionError, match="does not follow"):
        read_view(objects, settings)


@pytest.mark.parametrize("number", [0, 1])
def test_a_gap_names_the_missing_record(objects, settings, three, number):
    path = record_files(objects, three)[number]
    listings = []
    plain = objects.list
    objects.list = lambda prefix: (listings.append(prefix), plain(prefix))[1]
    path.rename(objects.root / "away")
    with pytest.raises(CorruptionError, match=f"log/{three.writer}/{path.name} is missing"):
        read_view(objects, settings)
    assert listings.count("log/") == 3


def test_a_gap_that_a_second_listing_fills_is_none(objects, settings, three):
    plain = objects.list
    hidden = [f"log/{three.writer}/000000000001.json"]

    def once_without(prefix):
        paths = [path for path in plain(prefix) if path not in hidden]
        hidden.clear()
        return paths

    objects.list = once_without
    assert len(read_view(objects, settings).commits) == 3


def test_a_record_that_vanishes_between_listing_and_reading_is_looked_for_again(objects, settings, three, monkeypatch):
    plain = objects.read
    refusals = []

    def vanished(path, **options):
        if len(refusals) < most:
            refusals.append(path)
            raise NotFoundError(path)
        return plain(path, **options)

    monkeypatch.setattr(objects, "read", vanished)
    most = 1
    assert len(read_view(objects, settings).commits) == 3
    most = 10
    with pytest.raises(CorruptionError, match=r"000000000000\.json is missing: it was listed"):
        read_view(objects, settings)


def test_a_known_record_that_vanishes_is_noticed_at_refresh(objects, settings, three):
    view = read_view(objects, settings)
    record_files(objects, three)[-1].unlink()
    with pytest.raises(CorruptionError, match=r"000000000002\.json is missing"):
        read_view(objects, settings, view)
    for path in record_files(objects, three):
        path.unlink()
    with pytest.raises(CorruptionError, match="is missing"):
        read_view(objects, settings, view)


def test_records_that_changed_places_are_noticed(objects, settings, three):
    first, second, third = record_files(objects, three)
    contents = second.read_bytes()
    with (
        altered(second, lambda _: third.read_bytes()),
        altered(third, lambda _: contents),
        pytest.raises(CorruptionError, match="renamed or swapped"),
    ):
        read_view(objects, settings)
    with altered(second, lambda _: first.read_bytes()), pytest.raises(CorruptionError, match="renamed or swapped"):
        read_view(objects, settings)


def test_a_replaced_record_breaks_the_chain(objects, settings, three):
    with (
        altered(record_files(objects, three)[1], lambda data: forged(data, records=99)),
        pytest.raises(CorruptionError, match=r"000000000002\.json does not follow"),
    ):
        read_view(objects, settings)


def test_nothing_follows_a_close(objects, settings):
    writer = LogWriter(objects, settings)
    commit(writer, b"a")
    writer.close()
    last = record_files(objects, writer)[-1]
    digest = hashlib.sha256(last.read_bytes().split(b"\n")[0]).hexdigest()
    after = forged(last.read_bytes(), seq=2, previous=digest, kind="commit")
    last.with_name("000000000002.json").write_bytes(after)
    with pytest.raises(CorruptionError, match="after the close"):
        read_view(objects, settings)


@pytest.mark.parametrize(
    "path",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "{folder}/../../../secret.parquet",
        "{folder}/z/../../x.parquet",
        "{folder}//x.parquet",
        "{folder}/.x.parquet",
        "{folder}/z/w8-float32/c/../0",
        "{folder}/a/b.parquet",
        "{folder}/records.parquet\n",
        "{folder}/",
        "data/{other}/000000000000-00000000/records.parquet",
        "data/{writer}/000000000007-00000000/records.parquet",
        "data/{writer}/000000000000-00000000/../x.parquet",
        "timstore.json",
        "",
    ],
)
def test_a_forged_path_out_of_the_own_folder_is_refused(objects, settings, path):
    writer = LogWriter(objects, settings)
    made = commit(writer, b"a")
    folder = made.objects[0].path.split("/z/")[0]
    path = path.format(folder=folder, writer=writer.writer, other="0" * 16)
    with (
        altered(record_files(objects, writer)[0], lambda data: forged(data, objects=[one_object(path=path)])),
        pytest.raises(CorruptionError, match="not of its own commit"),
    ):
        read_view(objects, settings)
    sound = f"{folder}/records.parquet"
    with altered(record_files(objects, writer)[0], lambda data: forged(data, objects=[one_object(path=sound)])):
        assert read_view(objects, settings).commits[0].objects[0].path == sound


@pytest.mark.parametrize(
    "change",
    [
        {"store": "another"},
        {"kind": "merge"},
        {"at": "yesterday"},
        {"attempt": -1},
        {"attempt": True},
        {"rank": 2**63},
        {"records": 1.0},
        {"steps": [1, 2]},
        {"steps": [[0, 1], [0, "x"]]},
        {"steps": {}},
        {"objects": {}},
        {"objects": [7]},
        {"objects": [one_object(bytes=-1)]},
        {"objects": [one_object(crc32=None)]},
        {"writer": "0" * 16},
        {"seq": "0"},
    ],
)
def test_a_record_that_no_writer_writes_is_refused(objects, settings, change):
    writer = LogWriter(objects, settings)
    commit(writer, b"a")
    with (
        altered(record_files(objects, writer)[0], lambda data: forged(data, **change)),
        pytest.raises(CorruptionError, match=r"000000000000\.json"),
    ):
        read_view(objects, settings)


def test_a_record_that_names_an_object_twice_or_two_folders_is_refused(objects, settings):
    writer = LogWriter(objects, settings)
    folder = commit(writer, b"a").objects[0].path.split("/z/")[0]
    twice = [one_object(path=f"{folder}/records.parquet")] * 2
    other = [twice[0], one_object(path=f"{folder[:-8]}00000000/steps.parquet")]
    for entries in (twice, other):
        with (
            altered(record_files(objects, writer)[0], lambda data, entries=entries: forged(data, objects=entries)),
            pytest.raises(CorruptionError, match=r"twice|not of its own commit"),
        ):
            read_view(objects, settings)


def test_a_record_of_a_newer_format_is_refused_and_not_called_corrupt(objects, settings, three):
    last = record_files(objects, three)[-1]
    for change in ({"format": [2, 0]}, {"reader_features": ["sparse"]}):
        with altered(last, lambda data, change=change: forged(data, **change)):
            with pytest.raises(FormatError) as caught:
                read_view(objects, settings)
            assert not isinstance(caught.value, CorruptionError)


def test_a_store_that_a_newer_version_maintained_is_refused(objects, settings):
    objects.put("ckpt/000000000001-deltas.json", b"{}")
    with pytest.raises(FormatError, match="newer timstore maintained"):
        read_view(objects, settings)


def test_foreign_and_temporary_files_are_ignored(objects, settings, three):
    before = read_view(objects, settings)
    folder = objects.root / "log" / three.writer
    (folder / ".000000000003.json.abcd").write_bytes(b"half")
    (folder / "000000000001.json~").write_bytes(b"backup")
    (objects.root / "log/notes.txt").write_bytes(b"")
    (objects.root / "data" / three.writer / "unfinished").mkdir()
    assert read_view(objects, settings) == before


# Data objects


def test_every_change_of_an_object_is_noticed(objects, settings):
    data = bytes(range(64))
    made = commit(LogWriter(objects, settings), data)
    (info,) = made.objects
    path = objects.root / info.path
    for change in (*(turned for _, turned in flipped(data)), data[:-1], data + b"\0", b""):
        with (
            altered(path, lambda _, change=change: change),
            pytest.raises(CorruptionError) as caught,
        ):
            read_verified(objects, info, made)
    message = str(caught.value)
    assert info.path in message
    assert made.writer in message
    assert "steps (0, 1) to (0, 3)" in message
    assert caught.value.fields["path"] == info.path
    assert read_verified(objects, info, made) == data
    path.unlink()
    with pytest.raises(CorruptionError, match="is missing"):
        read_verified(objects, info, made)


def test_an_object_of_another_size_is_noticed_before_its_checksum(objects, settings):
    made = commit(LogWriter(objects, settings), b"abc")
    (info,) = made.objects
    with pytest.raises(CorruptionError, match="has 3 bytes instead of 4"):
        read_verified(objects, replace(info, bytes=4), made)


def test_two_swapped_objects_of_equal_size_are_noticed(objects, settings):
    made = commit(LogWriter(objects, settings), b"aaaa", b"bbbb")
    first, second = (objects.root / info.path for info in made.objects)
    with altered(first, lambda _: b"bbbb"), altered(second, lambda _: b"aaaa"):
        for info in made.objects:
            with pytest.raises(CorruptionError, match="crc32"):
                read_verified(objects, info, made)
