"""The code on pages of the documentation, run as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def sections(page: str) -> dict[str, str]:
    """Return what stands under each heading of the second level; what stands before the first one under ""."""
    first, *others = re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)
    return {"": first} | {text.splitlines()[0]: text for text in others}


def run(texts: list[str], folder: Path) -> int:
    """Run every block of Python in these texts, in order, and return how many there are."""
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    script = folder / "page.py"
    script.write_text("\n".join(["import torch", "torch.manual_seed(0)", *blocks]))
    # A process of its own, as a reader's is: `rollback(model, ids)` takes the only store that is open in it.
    ran = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return len(blocks)
