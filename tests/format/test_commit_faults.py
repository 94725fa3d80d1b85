"""Faults in the middle of a commit: nothing acknowledged is lost, nothing is there twice."""

import errno
import json
import os

import pytest
from stores import (
    build,
    commit,
    contents,
    forged,
    sealed,
)

from timstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidInputError,
    StateError,
    StorageError,
)
from timstore.format.local_files import LocalObjects
from timstore.format.log import LogWriter, claim_attempt
from timstore.format.log_reader import read_view
from timstore.format.settings import create_settings


class Failing(LocalObjects):
    """Raises an error at the system call with a given number, counted from 0; None raises nowhere."""

    at = None
    count = 0

    def _call(self, function, *args, **kwargs):
        self.count += 1
        if self.count - 1 == self.at:
            raise OSError(self.code, os.strerror(self.code))
        return super()._call(function, *args, **kwargs)


@pytest.mark.parametrize("durable", [True, False])
def test_an_error_at_any_call_of_a_commit_loses_and_doubles_nothing(tmp_path, durable):
    """Every call once: what was there stays, what failed is absent, and the same rows then commit."""
    uncertain = 0
    for at in range(200):
        objects = Failing(tmp_path / str(at), durable=durable)
        objects.code = (errno.ENOSPC, errno.EIO)[at % 2]
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


def test_a_record_found_by_reading_back_is_synced_before_it_is_acknowledged(objects, settings, monkeypatch):
    """The request that made it may have died between the name and the sync."""
    writer = LogWriter(objects, settings)
    first = commit(writer, b"a")
    unsynced = LocalObjects(objects.root, durable=False)
    synced = []

    def lose_reply(path, data):
        unsynced.create(path, data)
        synced.clear()
        raise TimeoutError("no reply")

    objects.intercept = lose_reply
    monkeypatch.setattr(objects, "sync", lambda paths: synced.extend(paths))
    made = commit(writer, b"b")
    assert synced == [f"log/{writer.writer}/000000000001.json"]

    def fail(paths):
        if any(path.startswith("log/") for path in paths):
            raise StorageError("input/output error", kind="not-durable")

    monkeypatch.setattr(objects, "sync", fail)
    with pytest.raises(StorageError, match="is visible, but") as caught:
        commit(writer, b"c")
    assert caught.value.kind == "outcome-unknown"
    view = read_view(objects, settings)
    assert view.commits[:2] == (first, made)
    assert contents(objects, view) == [[b"a"], [b"b"], [b"c"]]


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


def test_an_interrupt_before_the_record_leaves_the_writer_usable(objects, settings):
    def interrupted():
        yield from build(b"a")()
        raise KeyboardInterrupt

    writer = LogWriter(objects, settings)
    with pytest.raises(KeyboardInterrupt):
        writer.commit(0, 0, None, 1, interrupted)
    assert read_view(objects, settings).commits == ()
    commit(writer, b"b")
    assert contents(objects, read_view(objects, settings)) == [[b"b"]]


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
