"""What the system refuses is said in errors of ours, with what to do: odd paths, other users' folders, no room."""

import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest

import timstore
from timstore.legacy import export_trajectories, import_trajectories

ONE = {"w": np.ones((2, 2), np.float32)}


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "good.tim"
    with timstore.open(path) as opened:
        opened.append(epoch=0, step=0, sample=1, gradients=ONE, lr=0.1)
    return path


def odd_paths(root):
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("mine")
    return {
        "a NUL": "a\0b",
        "a long name": root / ("x" * 300),
        "a long path": "/".join([str(root), *["y" * 200] * 30]),
        "half a character": f"{root}/\ud800",
        "below a file": root / "file" / "x",
        "a file": root / "file",
        "a device": "/dev/null",
        "a loop": root / "loop",
        "empty": "",
        "bytes": b"abc",
        "an integer": 5,
        "nothing": None,
        "a list": [root],
        "another protocol": "ftp://host/x",
    }


VERBS = {
    "open r": lambda path, root: timstore.open(path, "r"),
    "open a": lambda path, root: timstore.open(path, "a").append(epoch=0, step=0, sample=1, gradients=ONE),
    "open x": lambda path, root: timstore.open(path, "x").append(epoch=0, step=0, sample=1, gradients=ONE),
    "open w": lambda path, root: timstore.open(path, "w").append(epoch=0, step=0, sample=1, gradients=ONE),
    "verify": lambda path, root: timstore.verify(path),
    "import": lambda path, root: import_trajectories(path, root / "imported"),
    "import to": lambda path, root: import_trajectories(root, path),
    "export": lambda path, root: export_trajectories(path, root / "exported"),
    "checkpoint": lambda path, root: timstore.rollback(path, [1], root / "good.tim", output=root / "out"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_odd_path_is_refused_in_our_words(tmp_path, store, verb):
    for name, path in odd_paths(tmp_path).items():
        with pytest.raises(timstore.TimstoreError) as caught:
            VERBS[verb](path, tmp_path)
        assert len(str(caught.value)) > 10, (verb, name)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", ["open r", "open a", "open x", "open w", "verify", "import", "export"])
def test_a_working_directory_that_is_gone_is_named(tmp_path, store, verb, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(timstore.NotFoundError, match="working directory"):
        VERBS[verb]("run.tim", tmp_path)
    with timstore.open(store, "r") as opened:  # what has a whole path needs no working directory
        assert len(opened.sql("FROM records").fetchall()) == 1


def as_nobody(code, *arguments):
    """Return what a process of another user prints."""
    # Imported before: the interpreter's own files may be where this user may not go.
    before = (
        "import os, sys, torch, timstore, timstore.rollbacks, timstore.verification\n"
        "os.setgid(65534); os.setuid(65534)\n"
    )
    return subprocess.run([sys.executable, "-c", before + code, *arguments], capture_output=True, text=True, check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("what", ["the store's own folder", "a folder above it"])
def test_the_folder_of_another_user_is_said_to_be_that(tmp_path, store, what):
    for above in [tmp_path, *tmp_path.parents][:3]:
        above.chmod(0o755)
    if what == "a folder above it":
        tmp_path.chmod(0o700)
    code = """
path = sys.argv[1]
for verb in (
    lambda: timstore.open(path, "r"),
    lambda: timstore.open(path, "a"),
    lambda: timstore.open(path, "w"),
    lambda: timstore.open(path + ".new", "a"),
    lambda: timstore.rollback(torch.nn.Linear(2, 2), [1], path),
    lambda: timstore.verify(path),
):
    try: found = verb()
    except timstore.TimstoreError as error: print(type(error).__name__, error)
    else: print("opened", found)
"""
    said = as_nobody(code, str(store)).stdout.splitlines()
    refused = [line for line in said if "ermission" in line or "not writable" in line or "cannot" in line]
    # A verification says of every folder that it cannot be read, as of any other damage.
    assert len(refused) >= 5, said
    with timstore.open(store, "r") as opened:
        assert len(opened.sql("FROM records").fetchall()) == 1


def asked(store, **environment):
    """Return what a process with these variables says when it asks a store of many rows one question."""
    code = (
        "import resource, signal, sys, timstore\n"
        "store = timstore.open(sys.argv[1], 'r')\n"
        "if len(sys.argv) > 2:\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try: print(store.sql('SELECT count(*) FROM records').fetchall())\n"
        "except timstore.TimstoreError as error: print(error.kind, error)\n"
    )
    limit = [str(environment.pop("largest_file"))] if "largest_file" in environment else []
    ran = subprocess.run(
        [sys.executable, "-c", code, store, *limit], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return ran.stdout, ran.stderr


@pytest.mark.parametrize("odd", ["missing", "a file", "not writable"])
def test_an_odd_temporary_directory_is_passed_over(tmp_path, store, odd):
    (tmp_path / "a file").write_text("")
    place = "/proc" if odd == "not writable" else tmp_path / odd
    assert asked(store, TMPDIR=str(place))[0].strip() == "[(1,)]"


@pytest.mark.parametrize("largest_file", [1, 5000, 12500])
def test_a_temporary_directory_without_room_is_named_with_what_to_do(tmp_path, store, largest_file):
    (tmp_path / "tmp").mkdir()
    said, errors = asked(store, TMPDIR=str(tmp_path / "tmp"), largest_file=largest_file)
    assert said.startswith("temporary-space SQL's tables cannot be kept in"), (said, errors)
    assert "TMPDIR" in said
    assert os.listdir(tmp_path / "tmp") == []


def test_a_temporary_directory_that_went_away_is_named(tmp_path, store, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "went"))
    with timstore.open(store) as opened:
        with pytest.raises(timstore.StorageError, match=re.escape(str(tmp_path / "went"))) as caught:
            opened.sql("FROM records")
        assert caught.value.kind == "temporary-space"
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert len(opened.sql("FROM records").fetchall()) == 1  # the handle works when there is room again
