"""The commit protocol: what is acknowledged is there for every reader, whole, once, for good."""

import errno
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import google_crc32c
import pytest

from timstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    FormatError,
    InvalidInputError,
    NotFoundError,
    ReadOnlyError,
    StateError,
    StorageError,
    TimstoreWarning,
)
from timstore.format.log import (
    LogWriter,
    claim_attempt,
    create_settings,
    read_settings,
    read_verified,
    read_view,
)
from timstore.format.objects import LocalObjects

STEPS = ((0, 1), (0, 3))


def build(*contents):
    """Return a builder of objects with those contents."""
    return lambda: (
        (f"z/w8-float32/c/{number}/0", data, "shard", 2 * len(data), number) for number, data in enumerate(contents)
    )


def commit(writer, *contents, attempt=0, steps=STEPS, records=1):
    return writer.commit(attempt, 0, steps, records, build(*contents))


def contents(objects, view):
    return [[read_verified(objects, info, one) for info in one.objects] for one in view.commits]


@contextmanager
def altered(path, change):
    """Hold changed bytes in a file for a while."""
    original = path.read_bytes()
    path.write_bytes(change(original))
    try:
        yield
    finally:
        path.write_bytes(original)


def sealed(fields):
    body = json.dumps(fields).encode()
    return body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def forged(data, **changes):
    """Return a record with other fields and a check line that agrees with them."""
    return sealed({**json.loads(data.split(b"\n")[0]), **changes})


def flipped(data):
    """Yield (position, data with one bit of that byte turned)."""
    for position in range(len(data)):
        turned = bytearray(data)
        turned[position] ^= 1 << (position % 8)
        yield position, bytes(turned)


class Intercepted(LocalObjects):
    """Lets a test stand in for one operation."""

    intercept = None

    def create(self, path, data):
        if self.intercept is not None:
            self.intercept(path, data)
        else:
            super().create(path, data)


@pytest.fixture
def objects(tmp_path):
    made = Intercepted(tmp_path, durable=True)
    create_settings(made)
    claim_attempt(made, 0, 0, "all", 1, first=True)
    return made


@pytest.fixture
def settings(objects):
    return read_settings(objects)


@pytest.fixture
def lossy(tmp_path):
    """A store that is not synced, and its settings."""
    made = LocalObjects(tmp_path / "lossy", durable=False)
    settings = create_settings(made, durability="os")
    claim_attempt(made, 0, 0, "all", 1, first=True)
    return made, settings


# Settings


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


# The protocol


def test_a_commit_is_what_a_reader_sees(objects, settings):
    writer = LogWriter(objects, settings)
    made = commit(writer, b"first", b"second", records=7)
    view = read_view(objects, settings)
    assert view.commits == (made,)
    assert (made.seq, made.kind, made.attempt, made.rank, made.steps, made.records) == (0, "commit", 0, 0, STEPS, 7)
    assert [(info.bytes, info.kind, info.logical_bytes, info.rows) for info in made.objects] == [
        (5, "shard", 10, 0),
        (6, "shard", 12, 1),
    ]
    assert [info.crc32c for info in made.objects] == [google_crc32c.value(b"first"), google_crc32c.value(b"second")]
    assert contents(objects, view) == [[b"first", b"second"]]


def test_the_bytes_of_a_record_follow_the_specification(objects, settings):
    writer = LogWriter(objects, settings)
    commit(writer, b"a")
    second = commit(writer, b"b", steps=None)
    folder = objects.root / "log" / writer.writer
    assert sorted(path.name for path in folder.iterdir()) == ["000000000000.json", "000000000001.json"]
    bodies = []
    for path in sorted(folder.iterdir()):
        body, check, rest = path.read_bytes().split(b"\n")
        assert check == b"sha256:" + hashlib.sha256(body).hexdigest().encode()
        assert rest == b""
        bodies.append(body)
    first, last = map(json.loads, bodies)
    assert first["previous"] is None
    assert last["previous"] == hashlib.sha256(bodies[0]).hexdigest()
    assert second.digest == hashlib.sha256(bodies[1]).hexdigest()
    assert (last["format"], last["reader_features"], last["writer_features"]) == ([1, 0], [], [])
    assert (last["writer"], last["seq"], last["kind"], last["steps"]) == (writer.writer, 1, "commit", None)
    (described,) = last["objects"]
    assert (objects.root / described["path"]).read_bytes() == b"b"
    assert described["path"].startswith(f"data/{writer.writer}/000000000001-")


def test_a_commit_may_hold_nothing(objects, settings):
    made = commit(LogWriter(objects, settings), steps=None, records=0)
    assert read_view(objects, settings).commits == (made,)


def test_closing_writes_a_last_record_once(objects, settings):
    writer = LogWriter(objects, settings)
    made = commit(writer, b"a")
    writer.close()
    writer.close()
    view = read_view(objects, settings)
    assert view.commits == (made,)
    assert [record.kind for record in view.newest.values()] == ["close"]
    assert len(objects.list("log/")) == 2
    with pytest.raises(StateError, match="closed"):
        commit(writer, b"b")


def test_a_writer_without_commits_leaves_nothing(objects, settings):
    before = sorted(objects.root.rglob("*"))
    LogWriter(objects, settings).close()
    assert sorted(objects.root.rglob("*")) == before


def test_objects_are_written_one_at_a_time(objects, settings):
    written = []

    def stream():
        for number in range(5):
            assert len(written) == number
            yield f"part_{'abcde'[number]}.parquet", b"x", "records", 1, 1

    put = objects.put
    objects.put = lambda path, data: (put(path, data), written.append(path))
    LogWriter(objects, settings).commit(0, 0, None, 1, stream)
    assert len(written) == 5


def test_everything_is_synced_before_the_record_appears(tmp_path, objects, settings):
    events = []

    class Watched(LocalObjects):
        def _call(self, function, *args, **kwargs):
            if function is os.fsync:
                name = os.path.relpath(os.readlink(f"/proc/self/fd/{args[0]}"), self.root)
                events.append(("folder" if os.path.isdir(self.root / name) else "file", name))
            if function is os.link:
                events.append(("link", args[1]))
            return super()._call(function, *args, **kwargs)

    writer = LogWriter(Watched(tmp_path, durable=True), settings)
    made = commit(writer, b"a", b"b")
    link = events.index(("link", "000000000000.json"))
    before, after = events[:link], events[link + 1 :]
    files = [name for kind, name in before if kind == "file"]
    folders = [name for kind, name in before if kind == "folder"]
    assert files[:2] == [info.path for info in made.objects]
    assert files[2].startswith(f"log/{writer.writer}/.000000000000.json.")
    assert len(files) == 3
    deepest = made.objects[0].path.rsplit("/", 1)[0]
    needed = {os.path.relpath(deepest + "/.." * level) for level in range(deepest.count("/") + 2)}
    assert needed <= set(folders)
    assert [name.count("/") for name in folders] == sorted((name.count("/") for name in folders), reverse=True)
    kinds = [kind for kind, _ in before]
    assert kinds == ["file"] * 2 + ["folder"] * len(folders) + ["file"]
    assert after == [("folder", f"log/{writer.writer}"), ("folder", "log"), ("folder", ".")]


def test_the_order_of_commits_survives_a_clock_that_is_set_back(objects, settings, monkeypatch):
    times = iter(["2030-01-01T00:00:00.000000+00:00", "2020-01-01T00:00:00.000000+00:00"])
    monkeypatch.setattr("timstore.format.log._now", lambda: next(times))
    writer = LogWriter(objects, settings)
    made = [commit(writer, b"a"), commit(writer, b"b")]
    assert list(read_view(objects, settings).commits) == made


def test_a_forked_child_may_not_use_the_writer(objects):
    script = """
import os, sys
from timstore.errors import StateError
from timstore.format.log import LogWriter, read_settings
from timstore.format.objects import LocalObjects

objects = LocalObjects(sys.argv[1], durable=True)
writer = LogWriter(objects, read_settings(objects))
writer.commit(0, 0, None, 0, lambda: iter(()))
child = os.fork()
if child == 0:
    refused = 0
    for use in (lambda: writer.commit(0, 0, None, 0, lambda: iter(())), writer.close):
        try:
            use()
        except StateError:
            refused += 1
    os._exit(refused)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
writer.close()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(objects.root)], check=True)
    assert len(objects.list("log/")) == 2


# Several writers


def test_two_writers_at_once_lose_nothing(objects, settings):
    made = {"a": [], "b": []}

    def write(name):
        writer = LogWriter(LocalObjects(objects.root, durable=True), settings)
        for number in range(10):
            made[name].append(commit(writer, f"{name}{number}".encode()))
        writer.close()

    threads = [threading.Thread(target=write, args=(name,)) for name in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    view = read_view(objects, settings)
    assert set(view.commits) == {*made["a"], *made["b"]}
    assert len(view.commits) == 20
    keys = [(one.at, one.writer, one.seq) for one in view.commits]
    assert keys == sorted(keys)
    for mine in made.values():
        assert [one for one in view.commits if one in mine] == mine


def test_a_later_view_keeps_what_it_knows_in_place_and_reads_only_what_is_new(objects, settings, monkeypatch):
    first, second = LogWriter(objects, settings), LogWriter(objects, settings)
    times = (f"2030-01-01T00:00:{seconds:02d}.000000+00:00" for seconds in (30, 31, 10, 20, 40))
    monkeypatch.setattr("timstore.format.log._now", lambda: next(times))
    known = [commit(first, b"a"), commit(first, b"b")]
    before = read_view(objects, settings)
    later = [commit(second, b"c"), commit(second, b"d"), commit(first, b"e")]
    read = []
    plain = objects.read
    monkeypatch.setattr(objects, "read", lambda path: (read.append(path), plain(path))[1])
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


# What a reader refuses


def records(objects, writer):
    return sorted((objects.root / "log" / writer.writer).iterdir())


@pytest.fixture
def three(objects, settings):
    writer = LogWriter(objects, settings)
    for data in (b"a", b"b", b"c"):
        commit(writer, data)
    return writer


def test_any_flipped_or_missing_byte_of_a_record_is_noticed(objects, settings, three):
    for path in records(objects, three)[1:]:
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
    path = records(objects, three)[-1]
    with altered(path, lambda data: data[: len(data) // 2]), pytest.raises(CorruptionError, match=path.name):
        read_view(objects, settings)


def test_a_torn_newest_record_is_a_warning_when_they_are_not(lossy):
    objects, settings = lossy
    writer = LogWriter(objects, settings)
    made = [commit(writer, data) for data in (b"a", b"b", b"c")]
    for torn in (b"", b"{"):
        with altered(records(objects, writer)[-1], lambda _, torn=torn: torn):
            with pytest.warns(TimstoreWarning, match=r"000000000002\.json.*durability='os'"):
                view = read_view(objects, settings)
            assert list(view.commits) == made[:2]
        with altered(records(objects, writer)[1], lambda _, torn=torn: torn), pytest.raises(CorruptionError):
            read_view(objects, settings)
    with pytest.raises(CorruptionError), altered(records(objects, writer)[-1], lambda data: forged(data, previous="0")):
        read_view(objects, settings)


@pytest.mark.parametrize("number", [0, 1])
def test_a_gap_names_the_missing_record(objects, settings, three, number):
    path = records(objects, three)[number]
    listings = []
    plain = objects.list
    objects.list = lambda prefix: (listings.append(prefix), plain(prefix))[1]
    path.rename(objects.root / "away")
    with pytest.raises(CorruptionError, match=f"log/{three.writer}/{path.name} is missing"):
        read_view(objects, settings)
    assert listings.count("log/") == 2


def test_a_gap_that_a_second_listing_fills_is_none(objects, settings, three):
    plain = objects.list
    hidden = [f"log/{three.writer}/000000000001.json"]

    def once_without(prefix):
        paths = [path for path in plain(prefix) if path not in hidden]
        hidden.clear()
        return paths

    objects.list = once_without
    assert len(read_view(objects, settings).commits) == 3


def test_a_known_record_that_vanishes_is_noticed_at_refresh(objects, settings, three):
    view = read_view(objects, settings)
    records(objects, three)[-1].unlink()
    with pytest.raises(CorruptionError, match=r"000000000002\.json is missing"):
        read_view(objects, settings, view)
    for path in records(objects, three):
        path.unlink()
    with pytest.raises(CorruptionError, match="is missing"):
        read_view(objects, settings, view)


def test_records_that_changed_places_are_noticed(objects, settings, three):
    first, second, third = records(objects, three)
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
        altered(records(objects, three)[1], lambda data: forged(data, records=99)),
        pytest.raises(CorruptionError, match=r"000000000002\.json does not follow"),
    ):
        read_view(objects, settings)


def test_nothing_follows_a_close(objects, settings):
    writer = LogWriter(objects, settings)
    commit(writer, b"a")
    writer.close()
    last = records(objects, writer)[-1]
    digest = hashlib.sha256(last.read_bytes().split(b"\n")[0]).hexdigest()
    after = forged(last.read_bytes(), seq=2, previous=digest, kind="commit")
    last.with_name("000000000002.json").write_bytes(after)
    with pytest.raises(CorruptionError, match="after the close"):
        read_view(objects, settings)


def one_object(**changes):
    return {
        "path": "records.parquet",
        "bytes": 1,
        "crc32c": 0,
        "kind": "records",
        "logical_bytes": 1,
        "rows": 1,
        **changes,
    }


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
        altered(records(objects, writer)[0], lambda data: forged(data, objects=[one_object(path=path)])),
        pytest.raises(CorruptionError, match="not of its own commit"),
    ):
        read_view(objects, settings)
    sound = f"{folder}/records.parquet"
    with altered(records(objects, writer)[0], lambda data: forged(data, objects=[one_object(path=sound)])):
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
        {"objects": [one_object(crc32c=None)]},
        {"writer": "0" * 16},
        {"seq": "0"},
    ],
)
def test_a_record_that_no_writer_writes_is_refused(objects, settings, change):
    writer = LogWriter(objects, settings)
    commit(writer, b"a")
    with (
        altered(records(objects, writer)[0], lambda data: forged(data, **change)),
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
            altered(records(objects, writer)[0], lambda data, entries=entries: forged(data, objects=entries)),
            pytest.raises(CorruptionError, match=r"twice|not of its own commit"),
        ):
            read_view(objects, settings)


def test_a_record_of_a_newer_format_is_refused_and_not_called_corrupt(objects, settings, three):
    last = records(objects, three)[-1]
    for change in ({"format": [2, 0]}, {"reader_features": ["sparse"]}):
        with altered(last, lambda data, change=change: forged(data, **change)):
            with pytest.raises(FormatError) as caught:
                read_view(objects, settings)
            assert not isinstance(caught.value, CorruptionError)


def test_a_store_that_a_newer_version_maintained_is_refused(objects, settings):
    objects.put("ckpt/000000000001.json", b"{}")
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


def test_two_swapped_objects_of_equal_size_are_noticed(objects, settings):
    made = commit(LogWriter(objects, settings), b"aaaa", b"bbbb")
    first, second = (objects.root / info.path for info in made.objects)
    with altered(first, lambda _: b"bbbb"), altered(second, lambda _: b"aaaa"):
        for info in made.objects:
            with pytest.raises(CorruptionError, match="crc32c"):
                read_verified(objects, info, made)


# Attempts


def test_attempts_are_numbered_and_read_back(objects, settings):
    second = claim_attempt(objects, 1, 20, (3, 5), 4)
    third = claim_attempt(objects, 1, 30, None, 4)
    view = read_view(objects, settings)
    assert view.attempts[1:] == (second, third)
    assert (second.attempt, second.from_epoch, second.from_step, second.scope, second.ranks) == (1, 1, 20, (3, 5), 4)
    assert view.attempts[0].scope == "all"
    more = claim_attempt(objects, 2, 0, "all", 1)
    assert read_view(objects, settings, view).attempts == (*view.attempts, more)


def test_the_first_attempt_is_made_once_and_then_shared(objects, settings):
    mine = claim_attempt(objects, 0, 0, (1,), 2, first=True)
    assert mine == read_view(objects, settings).attempts[0]
    assert mine.scope == "all"
    assert objects.list("runs/") == ["runs/000000.json"]


def test_a_commit_of_a_missing_attempt_is_corruption(objects, settings):
    writer = LogWriter(objects, settings)
    claim_attempt(objects, 0, 2, "all", 1)
    commit(writer, b"a", attempt=1)
    (objects.root / "runs/000001.json").unlink()
    with pytest.raises(CorruptionError, match=r"runs/000001\.json is missing"):
        read_view(objects, settings)


def test_a_missing_attempt_before_another_is_corruption(objects, settings):
    claim_attempt(objects, 0, 2, "all", 1)
    claim_attempt(objects, 0, 3, "all", 1)
    view = read_view(objects, settings)
    (objects.root / "runs/000001.json").rename(objects.root / "away")
    with pytest.raises(CorruptionError, match=r"runs/000001\.json is missing"):
        read_view(objects, settings)
    (objects.root / "away").rename(objects.root / "runs/000001.json")
    (objects.root / "runs/000002.json").unlink()
    with pytest.raises(CorruptionError, match=r"runs/000002\.json is missing"):
        read_view(objects, settings, view)


@pytest.mark.parametrize(
    "change",
    [{"attempt": 1}, {"scope": "some"}, {"scope": [1, "x"]}, {"from": [0, 0]}, {"from": {"epoch": 0}}, {"ranks": None}],
)
def test_an_attempt_that_no_writer_writes_is_refused(objects, settings, change):
    with (
        altered(objects.root / "runs/000000.json", lambda data: forged(data, **change)),
        pytest.raises(CorruptionError, match=r"runs/000000\.json"),
    ):
        read_view(objects, settings)


def _claim(root, count):
    objects = LocalObjects(root, durable=False)
    return [claim_attempt(objects, 0, 0, "all", 1).attempt for _ in range(count)]


def test_racing_processes_get_attempts_of_their_own(objects, settings):
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        claimed = list(pool.map(_claim, [str(objects.root)] * 3, [20] * 3))
    assert sorted(number for mine in claimed for number in mine) == list(range(1, 61))
    assert len(read_view(objects, settings).attempts) == 61


def test_an_attempt_whose_reply_was_lost_is_still_the_callers(objects, settings):
    def lose_reply(path, data):
        objects.intercept = None
        objects.create(path, data)
        raise TimeoutError("no reply")

    objects.intercept = lose_reply
    mine = claim_attempt(objects, 0, 5, "all", 1)
    assert mine.attempt == 1
    assert read_view(objects, settings).attempts[1:] == (mine,)


# Faults


class Failing(LocalObjects):
    """Raises an error at the system call with a given number, counted from 0; None raises nowhere."""

    at = None
    count = 0

    def _call(self, function, *args, **kwargs):
        self.count += 1
        if self.count - 1 == self.at:
            raise OSError(self.code, os.strerror(self.code))
        return super()._call(function, *args, **kwargs)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("durable", [True, False])
def test_an_error_at_any_call_of_a_commit_loses_and_doubles_nothing(tmp_path, durable, code):
    """Every call once: what was there stays, what failed is absent, and the same rows then commit."""
    uncertain = 0
    for at in range(200):
        objects = Failing(tmp_path / str(at), durable=durable)
        objects.code = code
        settings = create_settings(objects, durability="commit" if durable else "os")
        claim_attempt(objects, 0, 0, "all", 1, first=True)
        writer = LogWriter(objects, settings)
        commit(writer, b"before")
        objects.at, objects.count = at, 0
        expected = [[b"before"], [b"first", b"second"]]
        try:
            commit(writer, b"first", b"second")
        except StorageError as error:
            if error.kind == "outcome-unknown":
                uncertain += 1
                assert durable
                with pytest.raises(StateError, match="Open the store again"):
                    commit(writer, b"first", b"second")
                with pytest.raises(StateError):
                    writer.close()
                writer = LogWriter(objects, settings)
            else:
                assert contents(objects, read_view(objects, settings)) == expected[:1]
                assert len(objects.list("data/")) == 1
                commit(writer, b"first", b"second")
        reached, objects.at = objects.count > at, None
        view = read_view(objects, settings)
        assert contents(objects, view) == expected
        commit(writer, b"after")
        writer.close()
        assert contents(objects, read_view(objects, settings, view)) == [*expected, [b"after"]]
        if not reached:
            break
    assert not reached, "the last run met no fault"
    assert uncertain == (3 if durable else 0)  # the three folders above the record, synced once it is visible


@pytest.mark.parametrize("operation", ["put", "sync", "create", "delete_prefix"])
def test_a_raw_error_of_any_operation_leaves_the_store_intact(objects, settings, monkeypatch, operation):
    writer = LogWriter(objects, settings)
    before = commit(writer, b"a")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(objects, operation, fail)
        if operation == "delete_prefix":
            patch.setattr(objects, "sync", fail)
        with pytest.raises(OSError, match="No space left"):
            commit(writer, b"b", b"c")
    assert read_view(objects, settings).commits == (before,)
    assert len(objects.list("data/")) == (3 if operation == "delete_prefix" else 1)
    assert read_view(objects, settings).commits == (before,)
    commit(writer, b"b", b"c")
    assert contents(objects, read_view(objects, settings)) == [[b"a"], [b"b", b"c"]]


def test_an_error_of_the_builder_reaches_the_caller_and_leaves_nothing(objects, settings):
    def broken():
        yield from build(b"a")()
        raise MemoryError("too large")

    writer = LogWriter(objects, settings)
    with pytest.raises(MemoryError):
        writer.commit(0, 0, None, 1, broken)
    assert objects.list("data/") == objects.list("log/") == []
    assert commit(writer, b"b").seq == 0


@pytest.mark.parametrize(
    "name", ["../x.parquet", "/x.parquet", "Layer.weight", "z/../x", "x", ".x.parquet", "a/b.parquet"]
)
def test_an_object_cannot_be_named_out_of_pattern(objects, settings, name):
    with pytest.raises(InvalidInputError, match="cannot name an object"):
        LogWriter(objects, settings).commit(0, 0, None, 1, lambda: iter([(name, b"a", "records", 1, 1)]))
    assert objects.list("data/") == objects.list("log/") == []


def test_an_object_named_twice_is_refused_and_nothing_committed(objects, settings):
    entry = ("records.parquet", b"a", "records", 1, 1)
    with pytest.raises(AlreadyExistsError):
        LogWriter(objects, settings).commit(0, 0, None, 1, lambda: iter([entry, entry]))
    assert objects.list("data/") == objects.list("log/") == []


def test_a_record_that_readers_would_refuse_is_never_created(objects, settings):
    with pytest.raises(CorruptionError, match="steps"):
        commit(LogWriter(objects, settings), b"a", steps=((0, 1), (0, -3)))
    assert objects.list("data/") == objects.list("log/") == []


@pytest.mark.parametrize("error", [TimeoutError("no reply"), AlreadyExistsError("answered by a repeated request")])
def test_a_lost_reply_is_settled_by_reading_the_name_back(objects, settings, error):
    writer = LogWriter(objects, settings)

    def lose_reply(path, data):
        LocalObjects.create(objects, path, data)
        raise error

    objects.intercept = lose_reply
    made = commit(writer, b"a")
    objects.intercept = None
    later = commit(writer, b"b")
    assert read_view(objects, settings).commits == (made, later)


def test_when_the_name_cannot_be_read_back_the_writer_stops_and_deletes_nothing(objects, settings, monkeypatch):
    writer = LogWriter(objects, settings)

    def lose_reply(path, data):
        LocalObjects.create(objects, path, data)
        raise TimeoutError("no reply")

    def unreadable(path):
        raise StorageError("cannot read")

    objects.intercept = lose_reply
    with monkeypatch.context() as patch:
        patch.setattr(objects, "read", unreadable)
        with pytest.raises(StorageError, match="is unknown") as caught:
            commit(writer, b"a")
    assert caught.value.kind == "outcome-unknown"
    objects.intercept = None
    for use in (lambda: commit(writer, b"a"), writer.close):
        with pytest.raises(StateError, match=r"000000000000\.json"):
            use()
    assert contents(objects, read_view(objects, settings)) == [[b"a"]]


def test_an_interrupt_during_the_record_deletes_nothing_and_is_never_repeated(objects, settings):
    writer = LogWriter(objects, settings)

    def interrupted(path, data):
        LocalObjects.create(objects, path, data)
        raise KeyboardInterrupt

    objects.intercept = interrupted
    with pytest.raises(KeyboardInterrupt):
        commit(writer, b"a")
    objects.intercept = None
    with pytest.raises(StateError, match="unknown"):
        commit(writer, b"a")
    assert contents(objects, read_view(objects, settings)) == [[b"a"]]


def fence(settings, writer, seq, previous):
    return sealed(
        {
            "format": [1, 0],
            "reader_features": [],
            "writer_features": [],
            "store": settings.store_id,
            "writer": writer,
            "seq": seq,
            "previous": previous,
            "kind": "fence",
            "at": "2030-01-01T00:00:00.000000+00:00",
            "attempt": 0,
            "rank": 0,
            "steps": None,
            "records": 0,
            "objects": [],
        }
    )


@pytest.mark.parametrize("commits", [0, 2])
def test_a_fenced_writer_goes_on_under_a_new_id_and_loses_nothing(objects, settings, commits):
    writer = LogWriter(objects, settings)
    before = [commit(writer, b"before") for _ in range(commits)]
    fenced = writer.writer
    previous = before[-1].digest if before else None
    objects.create(f"log/{fenced}/{commits:012d}.json", fence(settings, fenced, commits, previous))
    made = commit(writer, b"a", b"b")
    assert writer.writer == made.writer != fenced
    assert made.seq == 0
    view = read_view(objects, settings)
    assert view.commits == (*before, made)
    assert contents(objects, view)[-1] == [b"a", b"b"]
    assert len(objects.list("data/")) == commits + 2
    assert commit(writer, b"c").seq == 1
    writer.close()
    assert [view.newest[fenced].kind, read_view(objects, settings).newest[made.writer].kind] == ["fence", "close"]


def test_a_writer_that_is_fenced_again_and_again_gives_up(objects, settings):
    writer = LogWriter(objects, settings)

    def fence_first(path, data):
        name = json.loads(data.split(b"\n")[0])["writer"]
        LocalObjects.create(objects, path, fence(settings, name, 0, None))
        raise AlreadyExistsError(path)

    objects.intercept = fence_first
    with pytest.raises(StateError, match="fenced"):
        commit(writer, b"a")
    assert objects.list("data/") == []


def test_a_fence_in_place_of_the_close_ends_the_writer_too(objects, settings):
    writer = LogWriter(objects, settings)
    made = commit(writer, b"a")
    objects.create(f"log/{writer.writer}/000000000001.json", fence(settings, writer.writer, 1, made.digest))
    writer.close()
    assert read_view(objects, settings).commits == (made,)


@pytest.mark.parametrize("foreign", [b"", b"torn", None])
def test_anything_else_in_place_of_the_record_is_corruption(objects, settings, foreign):
    writer = LogWriter(objects, settings)
    path = f"log/{writer.writer}/000000000000.json"
    data = foreign
    if foreign is None:
        data = forged(fence(settings, writer.writer, 0, None), kind="commit")
    objects.create(path, data)
    with pytest.raises(CorruptionError, match=path):
        commit(writer, b"a")
    assert objects.list("data/") == []
    assert objects.read(path) == data
