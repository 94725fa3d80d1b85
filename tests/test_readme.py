"""Every block of Python in the README and the docs runs, in order, as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_code_is_shown_by_line_twenty() -> None:
    assert "```python" in "\n".join(README.splitlines()[:20])


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/openunlearning.md"])
def test_every_block_runs(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 4
    script = tmp_path / "page.py"
    script.write_text("\n".join(["import torch", "torch.manual_seed(0)", *blocks]))
    # A process of its own, as a reader's is: `rollback(model, ids)` takes the only store that is open in it.
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_recipe_for_a_trainer_takes_five_lines() -> None:
    recipe = re.search(r"(from timstore\.integrations\.transformers import .*?)```", README, re.DOTALL)
    assert recipe is not None
    assert len([line for line in recipe[1].splitlines() if line.strip()]) <= 5


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^(scripts/\w+)", README, re.MULTILINE))))
def test_every_command_exists(command: str) -> None:
    path = Path(__file__).parent.parent / command
    assert path.stat().st_mode & 0o111
