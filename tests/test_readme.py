"""Every block of Python in the README and the docs runs, in order, as a reader would run it."""

import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_code_is_shown_by_line_twenty() -> None:
    assert "```python" in "\n".join(README.splitlines()[:20])


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_every_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 4
    with warnings.catch_warnings():
        # The toy models of a README move a lot; the warnings about that are the library's own and wanted.
        warnings.filterwarnings("ignore", category=__import__("timstore").TimstoreWarning)
        for block in blocks:
            exec(compile(block, page, "exec"), namespace)


def test_the_recipe_for_a_trainer_takes_five_lines() -> None:
    recipe = re.search(r"(from timstore\.integrations\.transformers import .*?)```", README, re.DOTALL)
    assert recipe is not None
    assert len([line for line in recipe[1].splitlines() if line.strip()]) <= 5


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^(scripts/\w+)", README, re.MULTILINE))))
def test_every_command_exists(command: str) -> None:
    path = Path(__file__).parent.parent / command
    assert path.stat().st_mode & 0o111
