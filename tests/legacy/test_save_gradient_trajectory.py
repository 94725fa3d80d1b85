"""The older function: what it is given is in a store, whatever ends the program."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import timstore
from timstore.errors import InvalidInputError, StateError, StorageError
from timstore.legacy import export_trajectories, trajectory

INFO = {"num_epoch": 1, "num_steps": 2, "learning_rate": 0.25}


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "_told", [True])
    monkeypatch.setattr(trajectory, "_directories", {})


def written(folder: Path) -> timstore.Store:
    return timstore.open(folder / trajectory.STORE, "r")


def test_calls_become_records_with_their_rate(tmp_path: Path) -> None:
    gradients = {"w": torch.randn(2, 3), "b": torch.randn(3).bfloat16(), "scale": np.array(2.0)}
    for step, sample in ((0, 5), (0, np.int64(6)), (1, torch.tensor(5)), (1, "doc-1")):
        for name, gradient in gradients.items():
            timstore.save_gradient_trajectory(tmp_path / "new", 0, step, sample, name, gradient, INFO)
    for directory in trajectory._directories.values():
        directory.store.commit()
    with written(tmp_path / "new") as store:
        assert store.sql("SELECT DISTINCT step, lr FROM steps ORDER BY ALL").fetchall() == [(0, 0.25), (1, 0.25)]
        assert len(store.sql("SELECT sample FROM samples WHERE name = 'doc-1'").fetchall()) == 1
        records = list(store.read())
        assert len(records) == 4
        for record in records:
            for name, gradient in gradients.items():
                wanted = gradient.float().numpy() if isinstance(gradient, torch.Tensor) else gradient
                assert np.array_equal(record.dense(name), wanted)
    assert json.loads((tmp_path / "new" / "global_info.json").read_text()) == INFO


def test_it_says_once_what_to_call_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "_told", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for sample in range(3):
            timstore.save_gradient_trajectory(str(tmp_path), 0, 0, sample, "w", np.ones(2))
    (one,) = caught
    assert one.category is DeprecationWarning and "store.append(" in str(one.message)
    assert "has it from trainer.unlearn.tim_rollback writes `from timstore import save_gradient_traj" in str(
        one.message
    )
    assert one.filename == __file__


def test_other_stores_open_after_the_folder_that_it_was_saved_from_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    timstore.save_gradient_trajectory(tmp_path / "run", 0, 0, 5, "weight", np.ones((2, 2), np.float32), INFO)
    timstore.save_gradient_trajectory(os.path.relpath(tmp_path / "other"), 0, 0, 5, "weight", np.ones((2, 2)), INFO)
    (tmp_path / "gone").rmdir()
    with written(tmp_path / "run") as store:
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(1,)]
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("none_open")
def test_what_was_saved_is_seen_in_the_same_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(step: int) -> None:
        timstore.save_gradient_trajectory("run", 0, step, 5, "weight", np.full((2, 2), 1.0, np.float32), INFO)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    model = torch.nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    for step, name in enumerate(["run", "link", str(tmp_path / "run")]):
        save(step)
        with timstore.open(f"{name}/{trajectory.STORE}", "r") as store:
            assert store.sql("SELECT count(*) FROM records").fetchall() == [(step + 1,)]
    save(3)
    with pytest.warns(timstore.TimstoreWarning, match="first order"):
        report = timstore.rollback(model, [5], f"run/{trajectory.STORE}")
    assert report.records == 4
    torch.testing.assert_close(model.weight.detach(), before + 4 * 0.25, rtol=0, atol=1e-6)
    save(4)
    export_trajectories(f"run/{trajectory.STORE}", "out")
    assert len(json.loads((tmp_path / "out" / "epoch_0.json").read_text(), object_pairs_hook=list)[0][1]) == 5
    # What nobody opened is not the only open store.
    with pytest.raises(StateError, match="no store is open"):
        timstore.rollback(model, [5])


@pytest.mark.parametrize("end", ["", "raise RuntimeError('lost')", "sys.exit(3)", "del sys.modules['timstore']"])
def test_everything_is_on_disk_when_the_interpreter_ends(tmp_path: Path, end: str) -> None:
    program = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "import numpy as np\n"
        "from timstore import save_gradient_trajectory as save\n"
        "for sample in range(50): save(sys.argv[1], 0, sample, sample, 'w', np.full((2, 2), sample, np.float32))\n"
        + end
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True)
    with written(tmp_path / "run") as store:
        assert [record.dense("w")[0, 0] for record in store.read()] == list(range(50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": "text"}, "numpy array"),
        ({"gradient": [[1.0], [2.0]]}, None),
        ({"gradient": np.ones(5)}, "shape"),
        ({"gradient": np.full((2, 2), np.nan)}, "NaN"),
        ({"sample_idx": 1.5}, "integers or text"),
        ({"param_name": ""}, "param_name"),
        ({"epoch": -1}, "epoch"),
        ({"gradient": [np.ones((2, 2)), np.ones((2, 2))]}, "shape"),
        ({"gradient": [[1.0], [1.0, 2.0]]}, "numbers in lists of one length"),
        ({"sample_idx": np.array([1, 2])}, "integers or text"),
        ({"global_info": {"learning_rate": "fast"}}, "learning_rate must be a number"),
        ({"global_info": {"learning_rate": float("nan")}}, "learning_rate must be a finite number"),
        ({"global_info": [1]}, "a mapping that JSON can hold"),
        ({"global_info": {("a", 1): 2}}, "a mapping that JSON can hold"),
    ],
)
def test_what_cannot_be_right_is_refused_and_the_rest_stays(tmp_path: Path, change: Any, message: str | None) -> None:
    good = {"epoch": 0, "step": 0, "sample_idx": 1, "param_name": "w", "gradient": np.ones((2, 2), np.float32)}
    timstore.save_gradient_trajectory(tmp_path, **good)
    later = {**good, "step": 1, **change}
    if message is None:
        later["gradient"] = later["gradient"] * 2
    with pytest.raises(InvalidInputError, match=message):
        timstore.save_gradient_trajectory(tmp_path, **later)
    with pytest.raises(InvalidInputError, match="recorded before"):
        timstore.save_gradient_trajectory(tmp_path, **good)
    timstore.save_gradient_trajectory(tmp_path, **{**good, "step": 2})
    for directory in trajectory._directories.values():
        directory.store.close()
    timstore.save_gradient_trajectory(tmp_path, **{**good, "step": 3})
    for directory in trajectory._directories.values():
        directory.store.close()
    with written(tmp_path) as store:
        assert store.sql("SELECT step FROM records ORDER BY step").fetchall() == [(0,), (2,), (3,)]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot make .*file/run"):
        timstore.save_gradient_trajectory(tmp_path / "file" / "run", 0, 0, 1, "w", np.ones(2))
