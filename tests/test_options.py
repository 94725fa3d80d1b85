"""Options of recording: checked once when they are made, the same as the keywords of `Store.record`."""

import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

import timstore
from timstore.errors import InvalidInputError
from timstore.options import RecordOptions

WRONG: list[dict[str, Any]] = [
    {"resume_from": 3},
    {"probe": 5},
    {"probe": "kept"},
    {"optimizer_history": "all"},
    {"waypoints": "no"},
    {"scaler": 7},
    {"mean_over": "rows"},
    {"budget": "much", "steps": 1},
    {"budget": "1GB"},
    {"steps": 0},
    {"epochs": 0},
    {"rank": -1},
    {"allow_zero": 1},
    {"capture": "everything"},
    {"batch_axis": -1},
    {"id_column": ""},
    {"by_content": "yes"},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_an_option_that_cannot_be_right_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        RecordOptions(**options)


def test_options_are_the_keywords_of_record_with_the_same_defaults() -> None:
    keywords = inspect.signature(timstore.Store.record).parameters
    record = {name: one.default for name, one in keywords.items()}
    assert {field.name: field.default for field in fields(RecordOptions)} == {
        name: default for name, default in record.items() if name not in ("self", "model", "optimizer", "samples")
    }


def test_options_do_not_change_and_hold_what_they_mean() -> None:
    options = RecordOptions(budget="2 kB", steps=3, resume_from=[1, 5], probe=False)  # type: ignore[arg-type]
    assert (options.budget, options.resume_from, options.probe) == (2000, (1, 5), None)
    with pytest.raises(FrozenInstanceError):
        options.epochs = 2  # type: ignore[misc]


def test_options_are_made_without_torch() -> None:
    script = (
        "import sys; from timstore.options import RecordOptions; RecordOptions(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
