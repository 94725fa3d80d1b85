"""The command line as a process: what it imports, pipes, signals, terminals, tracebacks."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_stores import RECORDED, fill, process

import timstore

SQL = "SELECT sample, sum(norm) AS pull FROM records GROUP BY sample ORDER BY sample"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("cli") / "run.tim")


def test_asking_imports_neither_torch_nor_pandas_nor_what_draws_tables(filled):
    script = f"""
import sys
from timstore.cli import app
for arguments in ["info"], ["sql", {SQL!r}], ["sql", {SQL!r}, "--json"]:
    assert app([arguments[0], {str(filled)!r}, *arguments[1:]], standalone_mode=False) in (None, 0)
heavy = "torch", "transformers", "pandas", "polars", "zarr", "numcodecs", "rich", "pyarrow.compute"
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n" and len(done.stdout.splitlines()) > 2 * RECORDED


def test_the_process_ends_with_the_code_and_says_nothing_else(filled):
    done = process("sql", filled, SQL)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == RECORDED + 1
    done = process("sql", filled, "nonsense")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr and "nanobind" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(filled):
    command = f"{sys.executable} -m timstore sql {filled} 'SELECT i FROM range(300000) t(i)' | head -n 2"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "i\n0\n141\n" and done.stderr == ""


def test_output_that_cannot_be_written_is_said(filled):
    with open("/dev/full", "w") as full:
        done = process("sql", filled, SQL, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "error: the output could not be written: No space left on device\n"


def has_tables(pid):
    """Say whether a process holds the file of SQL's tables, which has no name by then."""
    with contextlib.suppress(OSError):
        for one in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(one).endswith("catalogue.duckdb (deleted)"):
                    return True
    return False


def test_an_interrupt_ends_it_with_130(filled, tmp_path):
    endless = "SELECT count(*) FROM range(1000000000) a(i), range(1000000) b(j) WHERE i * j % 7 = 3"
    command = [sys.executable, "-m", "timstore", "sql", str(filled), endless]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 100
        # Everything is imported by then, and the question is about to be asked.
        while not has_tables(running.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        # One that comes between two steps of DuckDB can get lost; a person presses again.
        while running.poll() is None and time.monotonic() < deadline:
            running.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(timeout=10)
        running.kill()
        text, messages = running.communicate()
    assert (running.returncode, text, messages) == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def on_a_terminal(*arguments, answer=None):
    """Run the command line on a terminal of its own and return (exit code, what the terminal showed)."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "timstore", *map(str, arguments)]
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        if answer is not None:
            os.write(ours, answer)
        shown = b""
        with contextlib.suppress(OSError):  # nobody holds the other end any more
            while piece := os.read(ours, 65536):
                shown += piece
        code = running.wait(timeout=60)
    os.close(ours)
    return code, shown.decode().replace("\r\n", "\n")


def test_a_person_sees_a_table_of_what_can_be_read_and_a_wide_row_as_lines(filled):
    code, shown = on_a_terminal("sql", filled, "SELECT 'a b' AS words, i FROM range(2000) t(i)")
    lines = shown.splitlines()
    assert code == 0 and [line.split() for line in lines[:2]] == [["words", "i"], ["a", "b", "0"]]
    assert len(lines) == 1002 and "only the first 1,000 rows" in lines[-1]
    code, shown = on_a_terminal("sql", filled, "FROM steps ORDER BY epoch, step LIMIT 1")
    lines = shown.splitlines()
    assert code == 0 and lines[0] == "row 1"
    assert ["optimizer", "SGD"] in [line.split() for line in lines] and max(map(len, lines)) <= 80


@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 1)])
def test_a_person_is_asked_before_values_are_replaced(tmp_path, answer, code):
    path = fill(tmp_path / "run.tim")
    (tmp_path / "owners.csv").write_text("sample,owner\n0,somebody\n")
    ended, shown = on_a_terminal("samples", "import", path, tmp_path / "owners.csv", answer=answer)
    assert ended == code and "1 stored value will be replaced by others. Go on? [y/N]" in shown
    with timstore.open(path, "r") as store:
        owner = store.sql("SELECT owner FROM samples WHERE sample = 0").fetchall()
    assert owner == [("somebody" if code == 0 else "u-0",)]


def test_warnings_are_lines_on_stderr(tmp_path):
    path = fill(tmp_path / "run.tim")
    path.chmod(0o755)
    (path / "timstore.json").chmod(0o644)
    done = process("info", path, "--json")
    assert done.returncode == 0 and done.stderr.startswith("warning: every user of this machine can read ")
    assert len(done.stderr.splitlines()) == 1 and json.loads(done.stdout)["samples"] == RECORDED


def test_names_that_the_terminal_cannot_show_are_no_error(filled):
    done = process("sql", filled, "SELECT 'é' AS \"ü\"", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout == "\\xfc\n\\xe9\n"


def test_a_question_that_is_no_text_is_a_sentence(filled, tmp_path):
    (tmp_path / "question").write_bytes(b"SELECT '\xff' AS \xff")
    with (tmp_path / "question").open() as question:
        done = process("sql", filled, stdin=question)
    assert done.returncode == 1 and done.stderr.startswith("error: DuckDB says: ")


def test_verbs_are_completed():
    done = process(env={"_TIMSTORE_COMPLETE": "complete_bash", "COMP_WORDS": "timstore in", "COMP_CWORD": "1"})
    assert done.returncode == 0 and "info" in done.stdout and "sql" not in done.stdout


def test_an_import_that_cannot_be_written_is_said_once(tmp_path):
    path = fill(tmp_path / "run.tim")
    (tmp_path / "a.csv").write_text("sample,note\n3,a\n")
    # A writer that finds no room, then or at the end.
    script = (
        "import sys, timstore.format.log as log\n"
        "from timstore.errors import StorageError\n"
        "def full(*_, **__): raise StorageError('no space is left')\n"
        "log.LogWriter.commit = full\n"
        "from timstore.cli import main\n"
        "main()\n"
    )
    arguments = [sys.executable, "-c", script, "samples", "import", str(path), str(tmp_path / "a.csv")]
    done = subprocess.run(arguments, text=True, capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (1, "error: no space is left\n")
