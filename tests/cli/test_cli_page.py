"""docs/cli.md: every command on it is run, in order, and ends and prints as the page says.

Renew what they print with `TIMSTORE_CLI=write pytest tests/cli/test_cli_page.py`.
"""

import os
import re
import shlex
import subprocess
import warnings
from pathlib import Path

import pytest
from cli_stores import run
from test_cli import VERBS

import timstore

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
CONSOLE = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
ENDS = re.compile(r"(.*?)(?:\s+# exits with (\d+))?")


def commands(block):
    """Yield (line, command, exit code) of a block."""
    for line in block.splitlines():
        if line.startswith("$ "):
            command, code = ENDS.fullmatch(line[2:]).groups()
            yield line, command, int(code or 0)


def printed(command, code):
    """Return what a command prints; of one that fails, what it says."""
    if not command.startswith("timstore "):
        return subprocess.run(command, shell=True, check=True, capture_output=True, text=True, timeout=60).stdout
    stdout, stderr = run(*shlex.split(command)[1:], code=code)
    return stderr if code in (1, 2) else stdout


def rerun(block):
    return "".join(f"{line}\n{printed(command, code)}" for line, command, code in commands(block))


def kept(text):
    """Return what does not depend on the machine: no number, no unit of one, no space that makes room for it."""
    return re.sub(r"\s+", " ", re.sub(r"\d+(?:[.,e:+-]+\d+)*(?: (?:[kMG]?B|UTC)\b)?", "N", text)).strip()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_command_on_the_page_does_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    (training,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=timstore.TimstoreWarning)
        exec(compile(training, PAGE.name, "exec"), {})
        blocks = CONSOLE.findall(page)
        found = [rerun(block) for block in blocks]
    if os.environ.get("TIMSTORE_CLI") == "write":
        renewed = iter(found)
        PAGE.write_text(CONSOLE.sub(lambda _: next(renewed), page))
    else:
        assert list(map(kept, found)) == list(map(kept, blocks))


def test_every_verb_has_an_example_on_the_page():
    shown = " ".join(command for block in CONSOLE.findall(PAGE.read_text()) for _, command, _ in commands(block))
    assert all(f"timstore {verb} " in shown for verb in VERBS if verb != "samples")
