"""Every block of Python in the README and the docs runs, in order, as a reader would run it."""

import re
from pathlib import Path

import pytest
from pages import ROOT, run, sections

README = (ROOT / "README.md").read_text()
# Sections that run where these are installed: in test_trl.py and test_lightning.py.
FRAMEWORKS = {"TRL", "Lightning"}


def test_the_readme_is_short_and_shows_code_early() -> None:
    lines = README.splitlines()
    assert "```python" in lines[:25]
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 100


PAGES = {"README.md": 4, "docs/training.md": 4, "docs/openunlearning.md": 4, "docs/sql.md": 3, "docs/operating.md": 1}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page: str, tmp_path: Path) -> None:
    texts = [text for title, text in sections(page).items() if title not in FRAMEWORKS]
    assert run(texts, tmp_path) >= PAGES[page]


def test_a_recipe_takes_seven_lines() -> None:
    recipes = re.findall(r"```python\n(.*?)```", sections("README.md")["Recipes"], re.DOTALL)
    assert recipes
    assert all(len([line for line in recipe.splitlines() if line.strip()]) <= 7 for recipe in recipes)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^(scripts/\w+)", README, re.MULTILINE))))
def test_every_command_exists(command: str) -> None:
    path = ROOT / command
    assert path.stat().st_mode & 0o111
