"""Nothing is left in the temporary directory, however a process ends; and nothing is said when it ends."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

import timstore
from timstore.catalog import remove_leftovers
from timstore.errors import InvalidInputError

MAKING = """
import signal, sys, time
from timstore.catalog.folders import private_folder
if "handled" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
if "ignored" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with private_folder() as folder:
    (folder / "spill").mkdir()
    (folder / "spill" / "rows").write_text("rows")
    (folder / "elsewhere").symlink_to(sys.argv[1])
    print("making", flush=True)
    time.sleep(60)
"""
ENDINGS = """
import os, sys, tempfile
import timstore, torch
store = timstore.open(tempfile.mkdtemp(dir=sys.argv[2]) + "/s.tim")
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder = store.record(model, optimizer).__enter__()
recorder.batch([0])
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
held = store.sql("FROM records")
if sys.argv[1] == "exception":
    raise SystemExit(3)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
if sys.argv[1] == "terminate":
    os.kill(os.getpid(), 15)
if sys.argv[1] == "generator":
    def asked():
        with timstore.open(store.path, "r") as other:
            yield other.sql("FROM steps")
    kept = asked()
    next(kept)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Yield a temporary directory of the test's own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch's own, made with the first optimizer
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def making(elsewhere, *options):
    """Start a process that makes tables, and return it when it does."""
    command = [sys.executable, "-c", MAKING, str(elsewhere), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "making\n"
    return process


def ended(process, number):
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    ("number", "options", "code"),
    [(signal.SIGTERM, (), -15), (signal.SIGHUP, (), -1), (signal.SIGTERM, ("handled",), 7), (signal.SIGINT, (), -2)],
)
def test_a_signal_removes_the_folder_and_ends_the_process_as_without(temporary, tmp_path, number, options, code):
    assert ended(making(tmp_path, *options), number) == code
    assert list(temporary.iterdir()) == []


def test_the_next_process_removes_what_a_kill_left_and_nothing_of_the_living(temporary, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    ignores, living = making(tmp_path, "ignored"), making(tmp_path)
    ignores.send_signal(signal.SIGHUP)
    for _ in range(2):
        assert ended(making(tmp_path / "elsewhere"), signal.SIGKILL) == -9
    assert len(list(temporary.iterdir())) == 4
    timstore.open(tmp_path / "s.tim").close()
    assert len(list(temporary.iterdir())) == 2 and ignores.poll() is None
    for process in (ignores, living):
        process.kill()
        process.communicate()
    timstore.open(tmp_path / "s.tim", "r").close()
    assert list(temporary.iterdir()) == []
    assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"


def test_what_is_not_ours_to_remove_stays(temporary, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "lock").touch()
    (temporary / "timstore-catalogue-link").symlink_to(target)
    (temporary / "timstore-catalogue-file").touch()
    (temporary / "timstore-catalogue-older").mkdir()  # one of a version without locks, which may live
    (temporary / "timstore-catalogue-older" / "catalogue.duckdb").touch()
    (temporary / "timstore-catalogue-held").mkdir()
    (temporary / "timstore-catalogue-empty").mkdir()  # its process died before it locked it
    with open(temporary / "timstore-catalogue-held" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_leftovers()
        left = {path.name.removeprefix("timstore-catalogue-") for path in temporary.iterdir()}
        assert left == {"link", "file", "older", "held"} and (target / "lock").exists()
    remove_leftovers()
    assert not (temporary / "timstore-catalogue-held").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folders_of_other_users_are_left_alone(temporary):
    folder = temporary / "timstore-catalogue-other"
    folder.mkdir()
    (folder / "lock").touch()
    os.chown(folder, 12345, 12345)
    remove_leftovers()
    assert (folder / "lock").exists()


def test_many_that_make_and_remove_at_once_do_each_other_no_harm(temporary):
    code = """
from timstore.catalog.folders import private_folder, remove_leftovers
for number in range(300):
    with private_folder() as folder:
        (folder / "rows").write_text("rows")
        remove_leftovers()
        assert (folder / "rows").read_text() == "rows"
"""
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("ending", "code"), [("end", 0), ("exception", 3), ("generator", 0), ("kill", -9), ("terminate", -15)]
)
def test_a_process_that_ends_leaves_nothing_and_says_nothing(temporary, tmp_path, ending, code):
    command = [sys.executable, "-c", ENDINGS, ending, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, "")
    assert list(temporary.iterdir()) == []


def test_tables_are_read_after_their_file_lost_its_name(temporary, store):
    store.append(0, 0, 1, {"w": np.ones(3, np.float32)}, lr=0.1)
    store.commit()
    held = store.sql("SELECT sample FROM records")
    assert list(temporary.iterdir()) == [] and held.fetchall() == [(1,)]
    store.append(0, 1, 2, {"w": np.ones(3, np.float32)}, lr=0.1)
    store.commit()
    assert store.sql("SELECT sample FROM records ORDER BY 1").fetchall() == [(1,), (2,)]
    assert held.fetchall() == [(1,)]


def test_a_question_that_takes_more_memory_than_it_may_names_the_option(tmp_path):
    question = "SELECT i, hash(i) FROM range(5000000) t(i) ORDER BY hash(i)"
    with timstore.open(tmp_path / "s", sql_memory="64MB") as store:
        with pytest.raises(InvalidInputError, match="sql_memory"):
            store.sql(question).fetchall()
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(0,)]
    with timstore.open(tmp_path / "s", "r", sql_memory=2**70) as store:
        assert store.sql("SELECT current_setting('max_temp_directory_size') IS NOT NULL").fetchall() == [(True,)]


@pytest.mark.parametrize("memory", ["1KB", 0, -5, True, None, "much", 1.5e9])
def test_memory_that_cannot_be_right_is_refused_before_anything_is_made(tmp_path, memory):
    with pytest.raises(InvalidInputError, match="sql_memory"):
        timstore.open(tmp_path / "s", sql_memory=memory)
    assert not (tmp_path / "s").exists()
