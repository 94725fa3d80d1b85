"""Death at any moment loses nothing acknowledged, and readers and writers never wait for each other."""

import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import timstore

KILLS = 100
SEED = int.from_bytes(os.urandom(4), "little")

# Forked from one interpreter: starting another for each kill would take most of the time.
WRITER = """
import os, sys
import numpy, timstore

timstore.database.writer.COMPACT_COMMITS = int(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        os.write(1, f"child {os.getpid()}\\n".encode())
        step = int(line)
        with timstore.open(sys.argv[1]) as store:
            for step in range(step, step + 100_000):
                for sample in range(3):
                    gradients = {"w": numpy.full(5, step + 1, "f4"), "v": numpy.full((2, 3), sample - 9, "f4")}
                    store.append(0, step, sample, gradients, lr=0.5)
                store.commit()
                os.write(1, f"committed {step}\\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def run(script, path, *arguments, **options):
    """Start a script with its output open, warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", script, str(path), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def assert_whole(path, acknowledged):
    """Check that every step up to the last acknowledged one is there, and at most one more, each whole and right."""
    with timstore.open(path, "r") as store:
        counts = dict(store.sql("SELECT step, count(*) FROM records GROUP BY step").fetchall())
        assert set(counts.values()) <= {3}
        assert list(range(len(counts))) == sorted(counts)
        assert len(counts) in (acknowledged + 1, acknowledged + 2)
        rows = store.sql("SELECT step, lr FROM steps ORDER BY step").fetchall()
        assert rows == [(step, 0.5) for step in range(len(counts))]
        # The arrays of the newest steps: those of earlier rounds were read before.
        for record in store.read(f"step > {acknowledged - 3}"):
            assert record.dense("w").tolist() == [record.step + 1.0] * 5
            assert record.dense("v").tolist() == [[record.sample - 9.0] * 3] * 2
        return len(counts)


@pytest.mark.parametrize("compact_commits", [1000, 2])
def test_kill_9_at_any_moment_loses_nothing_acknowledged_and_the_store_goes_on(tmp_path, compact_commits):
    """Commits alone, and with a compaction after every second one, which takes longer than they do."""
    draw = random.Random(SEED)
    print(f"seed {SEED}")
    path = tmp_path / "run"
    timstore.open(path, "x").close()  # a kill while it is made: the next test
    next_step = 0
    with run(WRITER, path, compact_commits) as writer:
        assert writer.stdout.readline() == "ready\n"
        for _ in range(KILLS):
            print(next_step, file=writer.stdin, flush=True)
            child = int(writer.stdout.readline().removeprefix("child "))
            acknowledged = next_step - 1
            for _ in range(draw.randrange(3)):
                acknowledged = int(writer.stdout.readline().removeprefix("committed "))
            threading.Event().wait(draw.uniform(0, 0.03))  # a commit takes about that long
            os.kill(child, signal.SIGKILL)
            while (line := writer.stdout.readline()) != "dead\n":
                acknowledged = int(line.removeprefix("committed "))
            next_step = assert_whole(path, acknowledged)
        writer.stdin.close()
        assert writer.wait(60) == 0
    with timstore.open(path) as store:
        assert store.frontier == (0, next_step - 1)
        store.append(0, next_step, 0, {"w": np.ones(5, np.float32)})
        store.commit()
        total = 3 * next_step + 1
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(total,)]
        assert sum(len(record.gradients) for record in store.read()) == 2 * (total - 1) + 1
    with timstore.open(path, "r") as store:
        view = store.snapshot().view
    compactions = view.compaction.number if view.compaction else 0
    named = {info.path.rpartition("/z/")[0] for commit in view.commits for info in commit.objects if "/z/" in info.path}
    unfinished = len(list(path.glob("data/*/*/z"))) - len(named)
    print(f"{unfinished} kills left a commit unfinished, {compactions} compactions")
    assert unfinished > 0
    # How many depends on how busy the machine is.
    assert compactions > KILLS / 10 if compact_commits == 2 else compactions == 0


def test_a_killed_store_is_never_seen_half_made(tmp_path):
    """Killed at each system call of creating a store and its first commit in turn."""
    script = """
import os, signal, sys
import numpy, timstore
from timstore.format.local_files import LocalObjects

for at in range(200):
    path = os.path.join(sys.argv[1], str(at))
    if (child := os.fork()) == 0:
        calls = 0

        def call(self, function, *args, **kwargs):
            global calls
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return function(*args, **kwargs)

        LocalObjects._call = call
        store = timstore.open(path, durability="commit")
        store.append(0, 0, 0, {"w": numpy.ones(3, "f4")})
        store.commit()
        os.write(1, f"{at} committed\\n".encode())
        store.close()
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    os.write(1, f"{at} killed\\n".encode())
"""
    writer = run(script, tmp_path)
    lines = [line.split() for line in writer.communicate(timeout=200)[0].splitlines()]
    killed = {number for number, word in lines if word == "killed"}
    committed = {number for number, word in lines if word == "committed"}
    assert len(killed) > 30 and committed - killed, "the last run met no kill"
    for number in sorted(killed, key=int):
        with timstore.open(tmp_path / number) as store:
            found = store.sql("SELECT count(*) FROM records").fetchall()[0][0]
            assert found in ((1,) if number in committed else (0, 1))
            store.append(0, 1, 0, {"w": np.ones(3, np.float32)})
            store.commit()
            assert sum(1 for _ in store.read()) == found + 1


READER = """
import sys
import timstore

store = timstore.open(sys.argv[1], "r")
print("ready", flush=True)
seen = rounds = 0
while seen < 3 * 40:
    store.refresh()
    steps = dict(store.sql("SELECT step, count(*) FROM records GROUP BY step").fetchall())
    assert set(steps.values()) <= {3}, steps
    assert sorted(steps) == list(range(len(steps))), steps
    count = store.sql("SELECT count(*) FROM gradients").fetchall()[0][0]
    assert count == 3 * len(steps) >= seen, (count, seen)
    if count > seen:
        newest = len(steps) - 1
        for record in store.read(f"step = {newest}"):
            assert record.dense("w").tolist() == [newest + 1.0] * 5
    seen, rounds = count, rounds + 1
print(rounds, flush=True)
"""


def test_a_reader_in_another_process_sees_whole_commits_only_and_more_and_more_of_them(tmp_path):
    with timstore.open(tmp_path) as store:
        reader = run(READER, tmp_path)
        assert reader.stdout.readline() == "ready\n"
        for step in range(40):
            for sample in range(3):
                store.append(0, step, sample, {"w": np.full(5, step + 1, np.float32)})
            store.commit()
        rounds, _ = reader.communicate(timeout=120)
        assert reader.returncode == 0
        assert int(rounds) >= 1


def test_neither_the_reader_nor_the_writer_waits_for_the_other(tmp_path):
    """Each is held in the middle of its work, in one thread, so that any wait would be for ever."""
    value = np.ones(5, np.float32)
    with timstore.open(tmp_path) as writer, timstore.open(tmp_path, "r") as reader:
        writer.append(0, 0, 0, {"w": value})
        writer.append(0, 0, 1, {"w": value})
        writer.commit()
        reader.refresh()
        relation = reader.sql("SELECT sample FROM records ORDER BY sample")
        assert relation.fetchall() == [(0,), (1,)]
        records = reader.read()
        assert next(records).sample == 0
        writer.append(0, 1, 0, {"w": value})
        writer.commit()  # the reader's relation and iterator are open
        assert relation.fetchall() == [(0,), (1,)]
        assert next(records).sample == 1
        assert next(records, None) is None  # steady: what was committed since is not in it

        entered, release = threading.Event(), threading.Event()
        create = writer._objects.create

        def held(path, data):
            entered.set()
            assert release.wait(60)
            create(path, data)

        writer._objects.create = held
        writer.append(0, 2, 0, {"w": value})
        commit = threading.Thread(target=writer.commit)
        commit.start()
        assert entered.wait(60)  # the data is there, its record is not
        reader.refresh()
        assert reader.sql("SELECT count(*) FROM records").fetchall() == [(3,)]
        assert len(list(reader.read())) == 3
        release.set()
        commit.join(60)
        reader.refresh()
        assert reader.sql("SELECT count(*) FROM records").fetchall() == [(4,)]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_an_exception_in_the_training_loop_still_commits(tmp_path, signal_number):
    script = """
import os, signal, sys, time
import numpy, timstore
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
signal.signal(signal.SIGINT, signal.default_int_handler)
with timstore.open(sys.argv[1]) as store:
    store.append(0, 0, 0, {"w": numpy.ones(3, "f4")})
    print("appended", flush=True)
    signal.pause()
"""
    writer = run(script, tmp_path, stderr=subprocess.DEVNULL)
    assert writer.stdout.readline() == "appended\n"
    writer.send_signal(signal_number)
    writer.communicate(timeout=60)
    with timstore.open(tmp_path, "r") as store:
        assert store.gradient(0, 0, 0, "w").tolist() == [1, 1, 1]


def test_an_interpreter_that_ends_without_close_has_committed(tmp_path):
    script = (
        "import sys, numpy, timstore\n"
        "store = timstore.open(sys.argv[1])\n"
        "store.append(0, 0, 1, {'w': numpy.arange(3, dtype='f4'), 'large': numpy.ones((6000, 1000), 'f4')})\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script, tmp_path], check=True, timeout=120)
    with timstore.open(tmp_path, "r") as store:
        assert store.gradient(0, 0, 1, "w").tolist() == [0, 1, 2]
        assert (store.gradient(0, 0, 1, "large") == 1).all()  # of several shards, which are made in threads


def test_a_forked_child_is_told_so_and_harms_nothing(tmp_path):
    script = """
import os, sys, numpy, timstore
store = timstore.open(sys.argv[1])
store.append(0, 0, 1, {"w": numpy.ones(3, "f4")})
store.commit()
assert store.sql("SELECT count(*) FROM records").fetchall() == [(1,)]
if (child := os.fork()) == 0:
    refused = 0
    for use in (
        lambda: store.append(0, 1, 1, {"w": numpy.ones(3, "f4")}), store.commit, lambda: store.sql("SELECT 1"),
        store.refresh, lambda: list(store.read()),
    ):
        try:
            use()
        except timstore.StateError as error:
            refused += "forked child" in str(error)
    store.close()
    store = None
    sys.exit(refused)  # runs what is left for the end of an interpreter
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
store.append(0, 2, 1, {"w": numpy.ones(3, "f4")})
store.commit()
assert store.sql("SELECT step FROM records ORDER BY step").fetchall() == [(0,), (2,)]
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, timeout=120)


def test_what_could_not_be_committed_at_exit_is_told(tmp_path):
    script = (
        "import sys, numpy, timstore\n"
        "from timstore.format.local_files import LocalObjects\n"
        "store = timstore.open(sys.argv[1])\n"
        "store.append(0, 0, 1, {'w': numpy.ones(3, 'f4')})\n"
        "def full(*_, **__): raise OSError(28, 'No space left on device')\n"
        "LocalObjects._call = full\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, tmp_path], stderr=subprocess.PIPE, text=True, timeout=120)
    assert "records were lost at exit: no space left" in ended.stderr
