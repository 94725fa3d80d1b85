"""A user's mypy sees the types of timstore."""

import os
import subprocess
import sys
from pathlib import Path

USER = """\
import timstore

reveal_type(timstore.open("run.tim", "w"))
reveal_type(timstore.verify("run.tim").sound)
timstore.open("run.tim").append(epoch="first", step=0, sample=1, gradients={})
"""
# Only to be quick: what is known of these libraries is not looked at.
SKIPPED = """\
[mypy]
[mypy-torch.*,numpy.*,pyarrow.*,duckdb.*,rich.*]
follow_imports = skip
"""


def test_mypy_knows_what_is_returned_and_what_is_taken(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(SKIPPED)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "user.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    said = ran.stdout.splitlines()
    assert 'Revealed type is "timstore.database.store.Store"' in said[0], ran.stdout
    assert 'Revealed type is "bool"' in said[1], ran.stdout
    assert "user.py:5" in said[2] and '"epoch"' in said[2], ran.stdout
    assert len(said) == 4, ran.stdout
