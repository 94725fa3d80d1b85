"""Every block of Python in the README and the docs runs, in order, as a reader would run it."""

import re
from pathlib import Path

import pytest
from pages import ROOT, run, sections

README = (ROOT / "README.md").read_text()
# Sections that run where these are installed: in test_trl.py and test_lightning.py.
FRAMEWORKS = {"TRL", "Lightning"}


def test_code_is_shown_by_line_twenty() -> None:
    assert "```python" in "\n".join(README.splitlines()[:20])


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/openunlearning.md"])
def test_every_block_runs(page: str, tmp_path: Path) -> None:
    texts = [text for title, text in sections(page).items() if title not in FRAMEWORKS]
    assert run(texts, tmp_path) >= 4


def test_the_recipe_for_a_trainer_takes_five_lines() -> None:
    recipe = re.search(r"(from timstore\.integrations\.transformers import .*?)```", README, re.DOTALL)
    assert recipe is not None
    assert len([line for line in recipe[1].splitlines() if line.strip()]) <= 5


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^(scripts/\w+)", README, re.MULTILINE))))
def test_every_command_exists(command: str) -> None:
    path = ROOT / command
    assert path.stat().st_mode & 0o111
