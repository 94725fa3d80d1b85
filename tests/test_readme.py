"""Every block of Python in the README runs, in order, as a reader would run it."""

import re
import warnings
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_code_is_shown_by_line_twenty() -> None:
    assert "```python" in "\n".join(README.splitlines()[:20])


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    assert len(BLOCKS) >= 4
    with warnings.catch_warnings():
        # The toy models of a README move a lot; the warnings about that are the library's own and wanted.
        warnings.filterwarnings("ignore", category=__import__("timstore").TimstoreWarning)
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^(scripts/\w+)", README, re.MULTILINE))))
def test_every_command_exists(command: str) -> None:
    path = Path(__file__).parent.parent / command
    assert path.stat().st_mode & 0o111
