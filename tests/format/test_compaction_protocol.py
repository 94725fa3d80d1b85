"""The protocol of compaction: disturbed at every single operation, it loses nothing and shows nothing twice."""

import errno
import os
from contextlib import suppress

import pyarrow as pa
import pytest
from stores import forged

from timstore.errors import StorageError
from timstore.format import compacting
from timstore.format.compacting import compact
from timstore.format.compaction import read_rows, read_tables
from timstore.format.local_files import LocalObjects
from timstore.format.log import LogWriter, claim_attempt
from timstore.format.log_reader import read_view
from timstore.format.schemas import SCHEMAS, write_rows
from timstore.format.settings import create_settings


class Watched(LocalObjects):
    """Calls a test before every operation that changes or lists something."""

    before = None

    def _at(self, name):
        if self.before is not None:
            self.before(name)

    def put(self, path, data):
        self._at("put")
        super().put(path, data)

    def create(self, path, data):
        self._at("create")
        super().create(path, data)
        self._at("created")

    def list(self, prefix):
        self._at("list")
        return super().list(prefix)

    def delete(self, path):
        self._at("delete")
        super().delete(path)


def made(root):
    objects = Watched(root, durable=False)
    settings = create_settings(objects, durability="os")
    claim_attempt(objects, 0, 0, "all", 1, first=True)
    return objects, settings


def put_sample(writer, sample):
    row = {name: sample for name in SCHEMAS["records"].names}
    table = pa.Table.from_pylist([row], SCHEMAS["records"])

    def build():
        yield "records.parquet", write_rows(table, "records"), "records", table.nbytes, 1
        yield "z/w8-float32/c/0/0", b"%d" % sample, "shard", 8, 1

    writer.commit(0, 0, ((0, sample), (0, sample)), 1, build)


def samples_in(root, settings):
    """Return the samples of every commit that a new reader sees, by its rows and by its tensors; both verified."""
    objects = LocalObjects(root, durable=False)
    view = read_view(objects, settings)
    tables = read_tables(objects, view.compaction, "records") if view.compaction else []
    numbers = [one for table in tables for one in table["commit"].to_pylist()]
    assert sorted(numbers) == list(range(view.compaction.commits if view.compaction else 0))
    for commit in view.since_compaction:
        tables += [read_rows(objects, info, commit) for info in commit.objects if info.kind == "records"]
    rows = sorted(one for table in tables for one in table["sample"].to_pylist())
    shards = [[info for info in commit.objects if info.kind == "shard"] for commit in view.commits]
    kept = [objects.read(info.path) for infos in shards for info in infos]
    assert sorted(int(data) for data in kept) == rows
    return rows


def operations(tmp_path, disturb):
    """Yield for each operation of a compaction: a store in which `disturb` ran just before it, and the samples put."""
    for at in range(200):
        root = tmp_path / str(at)
        objects, settings = made(root)
        others = LocalObjects(root, durable=False)
        writers = [LogWriter(others, settings) for _ in range(2)]
        put = []

        def add(number, writers=writers, put=put):
            put_sample(writers[number], len(put))
            put.append(len(put))

        for number in (0, 1, 0):
            add(number)
        compact(others, settings)
        for number in (0, 0, 1):
            add(number)
        count = 0

        def before(_, at=at, others=others, settings=settings, add=add):
            nonlocal count
            count += 1
            if count - 1 == at:
                disturb(add, others, settings)

        objects.before = before
        compact(objects, settings)
        objects.before = None
        yield root, settings, put, add
        if count <= at:
            return
    raise AssertionError("the last run was disturbed too")


def test_commits_at_any_moment_of_a_compaction_are_all_there(tmp_path):
    for root, settings, put, add in operations(tmp_path, lambda add, *_: (add(0), add(1))):
        assert samples_in(root, settings) == put
        add(0)
        compact(LocalObjects(root, durable=False), settings)
        assert samples_in(root, settings) == put


@pytest.mark.parametrize(("times", "file_rows"), [(1, 1000), (2, 2)])
def test_other_compactions_at_any_moment_of_a_compaction_lose_nothing(tmp_path, monkeypatch, times, file_rows):
    monkeypatch.setattr(compacting, "FILE_ROWS", file_rows)  # two: row files are carried from one to the next

    def disturb(add, objects, settings):
        for _ in range(times):
            add(0)
            compact(objects, settings)
            add(1)

    for root, settings, put, add in operations(tmp_path, disturb):
        assert samples_in(root, settings) == put
        add(1)
        compact(LocalObjects(root, durable=False), settings)
        assert samples_in(root, settings) == put
        assert len(list(root.glob("ckpt/*"))) == 1


def test_a_reader_at_any_moment_of_a_compaction_sees_all_that_was_committed(tmp_path):
    looked = []

    def look(add, objects, settings):
        looked.append(samples_in(objects.root, settings))

    for _, _, put, _ in operations(tmp_path, look):
        assert looked[-1] == put


def test_a_compaction_that_dies_at_any_operation_leaves_a_whole_store_and_the_next_one_cleans_up(tmp_path):
    class DiedError(BaseException):
        """Not an error that anything cleans up after."""

    for at in range(200):
        root = tmp_path / str(at)
        objects, settings = made(root)
        writer = LogWriter(objects, settings)
        for sample in range(3):
            put_sample(writer, sample)
        compact(objects, settings)
        for sample in range(3, 6):
            put_sample(writer, sample)
        count = 0

        def before(_, at=at):
            nonlocal count
            count += 1
            if count - 1 == at:
                raise DiedError

        objects.before = before
        with suppress(DiedError):
            compact(objects, settings)
        objects.before = None
        assert samples_in(root, settings) == list(range(6))
        put_sample(writer, 6)
        compact(objects, settings)
        assert samples_in(root, settings) == list(range(7))
        assert (
            len(list(root.glob("ckpt/*"))) == len(list(root.glob("data/m-*"))) == len(list(root.glob("log/*/*"))) == 1
        )
        assert len(list(root.glob("data/*/*/records.parquet"))) == 0
        if count <= at:
            return
    raise AssertionError("the last run died too")


def test_an_error_at_any_system_call_of_a_compaction_is_told_and_the_store_stays_whole(tmp_path):
    class Failing(LocalObjects):
        calls, at = 0, None

        def _call(self, function, *args, **kwargs):
            self.calls += 1
            if self.calls - 1 == self.at:
                code = (errno.ENOSPC, errno.EIO)[self.at % 2]
                raise OSError(code, os.strerror(code))
            return super()._call(function, *args, **kwargs)

    for at in range(300):
        root = tmp_path / str(at)
        _, settings = made(root)
        writer = LogWriter(LocalObjects(root, durable=False), settings)
        for sample in range(3):
            put_sample(writer, sample)
        objects = Failing(root, durable=True)
        objects.at = at
        try:
            compact(objects, settings)
        except StorageError:
            assert objects.calls > at
        assert samples_in(root, settings) == [0, 1, 2]
        put_sample(writer, 3)
        compact(LocalObjects(root, durable=False), settings)
        assert samples_in(root, settings) == [0, 1, 2, 3]
        if objects.calls <= at:
            return
    raise AssertionError("the last run met no end")


def test_a_writer_that_lost_the_reply_to_its_record_finds_it_after_a_compaction(tmp_path):
    """Were the newest record deleted, the writer would take it for absent, and delete the tensors of its commit."""
    objects, settings = made(tmp_path)
    writer = LogWriter(objects, settings)
    put_sample(writer, 0)

    def lose_reply(name):
        if name == "created":
            objects.before = None
            compact(LocalObjects(tmp_path, durable=False), settings)
            raise TimeoutError("no reply")

    objects.before = lose_reply
    put_sample(writer, 1)
    assert samples_in(tmp_path, settings) == [0, 1]
    put_sample(writer, 2)
    assert samples_in(tmp_path, settings) == [0, 1, 2]


def test_a_fence_is_met_after_a_compaction(tmp_path):
    objects, settings = made(tmp_path)
    writer = LogWriter(objects, settings)
    put_sample(writer, 0)
    fenced = writer.writer
    path = tmp_path / "log" / fenced / "000000000000.json"
    previous = read_view(objects, settings).newest[fenced].digest
    fence = forged(path.read_bytes(), seq=1, kind="fence", previous=previous, objects=[], records=0)
    objects.create(f"log/{fenced}/000000000001.json", fence)
    compact(objects, settings)
    put_sample(writer, 1)
    assert writer.writer != fenced
    assert samples_in(tmp_path, settings) == [0, 1]
    compact(objects, settings)
    assert read_view(objects, settings).newest[fenced].kind == "fence"
