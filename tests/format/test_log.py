"""The commit protocol: what is acknowledged is there for every reader, whole, once, for good."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor

import pytest
from stores import STEPS, altered, commit, contents, forged

from timstore.errors import (
    CorruptionError,
    StateError,
)
from timstore.format.local_files import LocalObjects
from timstore.format.log import LogWriter, claim_attempt
from timstore.format.log_reader import read_view


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
    assert [info.crc32 for info in made.objects] == [zlib.crc32(b"first"), zlib.crc32(b"second")]
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
    assert (last["format"], last["reader_features"], last["writer_features"]) == ([1, 2], ["blosc-zstd"], [])
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
    monkeypatch.setattr("timstore.format.log.now", lambda: next(times))
    writer = LogWriter(objects, settings)
    made = [commit(writer, b"a"), commit(writer, b"b")]
    assert list(read_view(objects, settings).commits) == made


def test_a_forked_child_may_not_use_the_writer(objects):
    script = """
import os, sys
from timstore.errors import StateError
from timstore.format.log import LogWriter
from timstore.format.local_files import LocalObjects
from timstore.format.settings import read_settings

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


def test_two_callers_who_ask_for_the_same_get_two_attempts(objects, settings, monkeypatch):
    """Even within one tick of the clock: equal requests must not make equal files, or both believe to own one."""
    monkeypatch.setattr("timstore.format.log.now", lambda: "2030-01-01T00:00:00.000000+00:00")
    others = []

    def come_second(path, data):
        objects.intercept = None
        others.append(claim_attempt(objects, 0, 5, "all", 1))
        objects.create(path, data)

    objects.intercept = come_second
    mine = claim_attempt(objects, 0, 5, "all", 1)
    assert [other.attempt for other in others] == [1]
    assert mine.attempt == 2
    assert len(read_view(objects, settings).attempts) == 3
