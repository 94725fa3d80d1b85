"""Objects on a local disk: written once, whole or not at all, never through a link."""

import errno
import multiprocessing
import os
import shutil
import stat
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from timstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    ReadOnlyError,
    StorageError,
)
from timstore.format.local_files import LocalObjects


class Recording(LocalObjects):
    """Notes every system call that changes the disk, with the name it changes."""

    def __init__(self, root, *, durable=True):
        super().__init__(root, durable=durable)
        self.calls = []

    def _call(self, function, *args, **kwargs):
        subject = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
        self.calls.append((function.__name__, Path(subject).name))
        return super()._call(function, *args, **kwargs)


class Failing(LocalObjects):
    """Raises an error at the system call with a given number, counted from 0."""

    def __init__(self, root, *, at, code=errno.ENOSPC, durable=True):
        super().__init__(root, durable=durable)
        self.at, self.code, self.count = at, code, 0

    def _call(self, function, *args, **kwargs):
        self.count += 1
        if self.count - 1 == self.at:
            raise OSError(self.code, os.strerror(self.code))
        return super()._call(function, *args, **kwargs)


@pytest.fixture(params=[True, False], ids=["commit", "os"])
def objects(request, tmp_path):
    return LocalObjects(tmp_path / "store", durable=request.param)


def test_what_was_written_is_read_and_listed(objects):
    assert objects.list("") == []
    objects.put("a/b/c", b"123")
    objects.create("a/d", b"")
    objects.sync(["a/b/c"])
    assert objects.read("a/b/c") == b"123"
    assert objects.read("a/d") == b""
    assert objects.list("") == ["a/b/c", "a/d"]
    assert objects.list("a/b/") == objects.list("a/b") == ["a/b/c"]
    assert objects.list("nothing/") == []
    assert objects.mark("a/b/c") != objects.mark("a/d")
    for look in (objects.read, objects.mark):
        with pytest.raises(NotFoundError, match="a/e does not exist"):
            look("a/e")


def test_a_second_write_is_refused_and_the_first_stays(objects):
    objects.put("a/x", b"first")
    objects.create("a/y", b"first")
    for write in (objects.put, objects.create):
        for path in ("a/x", "a/y"):
            with pytest.raises(AlreadyExistsError, match=path):
                write(path, b"second")
            assert objects.read(path) == b"first"
    assert sorted(os.listdir(objects.root / "a")) == ["x", "y"]


def test_a_deleted_folder_takes_only_itself_along(objects):
    for path in ("a/b/c/d", "a/b/e", "a/f"):
        objects.put(path, b"1")
    objects.delete_prefix("a/b/")
    objects.delete_prefix("a/b/")
    objects.delete_prefix("x/y/")
    assert objects.list("") == ["a/f"]


def test_files_and_folders_are_private_whatever_the_umask(objects):
    before = os.umask(0)
    try:
        objects.put("a/b/x", b"1")
        objects.create("c/y", b"1")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [objects.root, *objects.root.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert len(modes) == 6


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a//b", ".hidden", "a/.b", "a/../b", "a/./b", "a/", "", "A", "a\n", "a\0b", "a b", "a\\b"],
)
def test_a_path_out_of_pattern_is_refused_everywhere(objects, path):
    for action in (
        lambda: objects.put(path, b""),
        lambda: objects.create(path, b""),
        lambda: objects.read(path),
        lambda: objects.sync([path]) if objects.durable else objects.read(path),
    ):
        with pytest.raises(InvalidInputError):
            action()
    assert not objects.root.exists()


def test_no_symbolic_link_is_followed(objects, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    objects.put("a/x", b"1")
    (objects.root / "a/link").symlink_to(outside / "secret")
    (objects.root / "folder").symlink_to(outside)
    for action in (
        lambda: objects.read("a/link"),
        lambda: objects.read("folder/secret"),
        lambda: objects.put("folder/new", b""),
        lambda: objects.create("folder/new", b""),
        lambda: objects.list("folder/"),
        lambda: objects.list("a/"),
        lambda: objects.list(""),
        lambda: objects.delete_prefix("folder/secret"),
    ):
        with pytest.raises(CorruptionError, match="symbolic link"):
            action()
    for write in (objects.put, objects.create):
        with pytest.raises(AlreadyExistsError):
            write("a/link", b"changed")
    with pytest.raises(StorageError):
        objects.delete_prefix("folder")
    objects.delete_prefix("a/")
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_dangling_link_is_no_way_out(objects, tmp_path):
    objects.put("a/x", b"1")
    (objects.root / "a/link").symlink_to(tmp_path / "elsewhere")
    for write in (objects.put, objects.create):
        with pytest.raises(AlreadyExistsError):
            write("a/link", b"1")
    assert not (tmp_path / "elsewhere").exists()


def test_a_pipe_or_a_folder_is_no_object_and_nobody_waits_for_it(objects):
    objects.put("a/x", b"1")
    os.mkfifo(objects.root / "a/pipe")
    for path in ("a/pipe", "a"):
        with pytest.raises(CorruptionError, match="neither file nor folder"):
            objects.read(path)


def test_the_root_may_be_a_link_and_is_made_with_its_parents(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    LocalObjects(tmp_path / "link/deep/store", durable=True).put("x", b"1")
    assert (tmp_path / "real/deep/store/x").read_bytes() == b"1"
    assert stat.S_IMODE((tmp_path / "real/deep/store").stat().st_mode) == 0o700


def test_a_relative_root_stays_where_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = LocalObjects("store", durable=False)
    monkeypatch.chdir("/")
    objects.put("x", b"1")
    assert (tmp_path / "store/x").exists()


def test_a_file_in_place_of_the_root_or_above_it_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    for root in (tmp_path / "file", tmp_path / "file/store"):
        objects = LocalObjects(root, durable=True)
        for action, *arguments in ((objects.put, "x", b""), (objects.read, "x"), (objects.list, "")):
            with pytest.raises(InvalidInputError, match="is not a folder"):
                action(*arguments)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_short_writes_are_continued(tmp_path):
    class Short(LocalObjects):
        def _call(self, function, *args, **kwargs):
            if function is os.write:
                args = (args[0], args[1][:7])
            return super()._call(function, *args, **kwargs)

    objects = Short(tmp_path, durable=True)
    data = bytes(range(256))
    objects.put("x", data)
    objects.create("y", data)
    assert objects.read("x") == objects.read("y") == data


def test_a_write_that_makes_no_progress_is_an_error(tmp_path):
    class Stuck(LocalObjects):
        def _call(self, function, *args, **kwargs):
            return 0 if function is os.write else super()._call(function, *args, **kwargs)

    objects = Stuck(tmp_path, durable=True)
    for write in (objects.put, objects.create):
        with pytest.raises(StorageError, match="no more bytes"):
            write("x" if write == objects.put else "y", b"1")
    assert "y" not in objects.list("")


def test_a_created_object_is_synced_before_its_name_and_its_folders_after(tmp_path):
    objects = Recording(tmp_path / "store")
    objects.create("a/b/x", b"12")
    names = [(call, name[:3] if name.startswith(".x.") else name) for call, name in objects.calls]
    assert names == [
        ("mkdir", "store"),
        ("fsync", tmp_path.name),
        ("mkdir", "a"),
        ("mkdir", "b"),
        ("open", ".x."),
        ("write", ".x."),
        ("fsync", ".x."),
        ("link", ".x."),
        ("unlink", ".x."),
        ("fsync", "b"),
        ("fsync", "a"),
        ("fsync", "store"),
    ]


def test_put_objects_are_synced_first_and_then_every_folder_from_the_bottom_up(tmp_path):
    objects = Recording(tmp_path)
    paths = ["a/b/x", "a/b/y", "a/c/d/z"]
    for path in paths:
        objects.put(path, b"1")
    files = [name for call, name in objects.calls if call == "fsync"]
    objects.sync(paths)
    folders = [name for call, name in objects.calls if call == "fsync"][len(files) :]
    assert files == ["x", "y", "z"]
    assert folders == ["d", "b", "c", "a", tmp_path.name]


def test_without_durability_nothing_is_synced(tmp_path):
    objects = Recording(tmp_path / "store", durable=False)
    objects.put("a/x", b"1")
    objects.create("b/y", b"1")
    objects.sync(["a/x", "b/y"])
    calls = {call for call, _ in objects.calls}
    assert "fsync" not in calls
    assert {"open", "write", "link"} <= calls


def test_a_file_whose_sync_failed_is_never_synced_again(tmp_path):
    synced = []

    class Broken(LocalObjects):
        def _call(self, function, *args, **kwargs):
            if function is os.fsync:
                synced.append(os.fstat(args[0]).st_ino)
                raise OSError(errno.EIO, "Input/output error")
            return super()._call(function, *args, **kwargs)

    objects = Broken(tmp_path, durable=True)
    for attempt in range(3):
        with pytest.raises(StorageError):
            objects.put(f"x{attempt}", b"1")
        with pytest.raises(StorageError):
            objects.create("y", b"1")
    assert len(synced) == 6
    assert "y" not in objects.list("")


@pytest.mark.parametrize("durable", [True, False])
def test_an_error_at_any_call_leaves_the_name_absent_or_whole(tmp_path, durable):
    data = b"0123456789" * 100
    outcomes = set()
    for at in range(100):
        objects = Failing(tmp_path / str(at), at=at, durable=durable)
        try:
            objects.create("a/b/x", data)
            raised = None
        except StorageError as error:
            raised = error
        visible = objects.list("") == ["a/b/x"] and objects.read("a/b/x") == data
        assert visible or objects.list("") == []
        assert visible == (raised is None or raised.kind == "not-durable")
        if raised is not None:
            assert raised.errno == raised.fields["errno"] == errno.ENOSPC
            assert "no space left to create" in str(raised) or "No space left on device" in str(raised)
        outcomes.add((visible, raised is None))
        if objects.count <= at:
            break
        if not visible:
            objects.create("a/b/x", data)
            assert objects.read("a/b/x") == data
    assert objects.count <= at, "the last run met no fault"
    assert outcomes == {(False, False), (True, True)} | ({(True, False)} if durable else set())


def test_no_space_says_how_many_bytes_and_where(tmp_path):
    objects = Failing(tmp_path, at=1)
    with pytest.raises(
        StorageError, match=r"no space left to write .*/x \(1234 bytes\); nothing became visible"
    ) as caught:
        objects.put("x", bytes(1234))
    assert caught.value.fields["path"] == "x"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_place_one_may_not_write_is_read_only(tmp_path, code):
    with pytest.raises(ReadOnlyError, match=r"cannot write .*/x") as caught:
        Failing(tmp_path, at=0, code=code).put("x", b"1")
    assert caught.value.errno == code


def test_a_file_system_without_hard_links_is_named_as_the_cause(tmp_path):
    class Unlinkable(LocalObjects):
        def _call(self, function, *args, **kwargs):
            if function is os.link:
                raise OSError(errno.EPERM, "Operation not permitted")
            return super()._call(function, *args, **kwargs)

    objects = Unlinkable(tmp_path, durable=True)
    with pytest.raises(StorageError, match="makes no hard links"):
        objects.create("x", b"1")
    assert os.listdir(tmp_path) == []


def test_a_failed_deletion_is_reported(tmp_path):
    objects = Failing(tmp_path, at=5, code=errno.EIO, durable=False)
    objects.put("a/x", b"1")
    objects.at = objects.count
    with pytest.raises(StorageError, match="cannot delete"):
        objects.delete_prefix("a/")


def test_no_descriptor_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "outside").mkdir()
    for at in range(12):
        objects = Failing(tmp_path / "store" / str(at), at=at)
        for action in (objects.put, objects.create):
            with suppress(StorageError):
                action(f"a/{action.__name__}", b"1")
        objects = LocalObjects(objects.root, durable=False)
        objects.put("c/x", b"1")
        (objects.root / "b").symlink_to(tmp_path / "outside")
        for action, path in ((objects.read, "c"), (objects.read, "b/x"), (objects.list, "")):
            with pytest.raises(CorruptionError):
                action(path)
    assert len(os.listdir("/proc/self/fd")) == before


def _create_all(root: str, mark: bytes, names: list[str]) -> list[str]:
    """Return the names that this process was the one to create."""
    objects = LocalObjects(root, durable=False)
    won = []
    for name in names:
        with suppress(AlreadyExistsError):
            objects.create(name, mark * 1000)
            won.append(name)
    return won


def test_of_racing_processes_exactly_one_creates_each_name(tmp_path):
    names = [f"a/{number}" for number in range(200)]
    marks = [b"p", b"q", b"r"]
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        won = list(pool.map(_create_all, [str(tmp_path)] * 3, marks, [names] * 3))
    assert sorted(name for mine in won for name in mine) == sorted(names)
    objects = LocalObjects(tmp_path, durable=False)
    for mark, mine in zip(marks, won, strict=True):
        assert all(objects.read(name) == mark * 1000 for name in mine)
    assert len(os.listdir(tmp_path / "a")) == len(names)


def test_deleting_is_safe_from_swapped_folders():
    assert shutil.rmtree.avoids_symlink_attacks
