"""Imports and exports beside one another, cut off, at places of all kinds: nothing twice, nothing foreign touched."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from older_layouts import held, normal, written

import timstore
from timstore.database import lifetime
from timstore.errors import AlreadyExistsError, InvalidInputError, StateError
from timstore.format.local_files import folder_held
from timstore.legacy import export_trajectories, import_trajectories, staging

GOOD = {"1": {"w": [1.5, 2.0], "w_step": 0}, "2": {"w": [2.5, 3.0], "w_step": 1}}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return written(tmp_path / "old", {0: GOOD, 1: GOOD}, learning_rate=0.1)


@pytest.fixture
def store(old: Path, tmp_path: Path) -> Path:
    import_trajectories(old, tmp_path / "s")
    return tmp_path / "s"


def test_two_at_one_place_do_not_mix(old: Path, store: Path, tmp_path: Path) -> None:
    with staging.staged(tmp_path / "new", "importing"), pytest.raises(StateError, match="another process is importing"):
        import_trajectories(old, tmp_path / "new")
    before = held(store)
    later = written(tmp_path / "later", {7: GOOD}, learning_rate=0.1)
    with folder_held(store, "another process is importing into it"):
        for target in (store, timstore.open(store)):
            with pytest.raises(StateError, match="another process is importing"):
                import_trajectories(later, target)
        target.close()
    assert held(store).keys() == before.keys()
    with staging.staged(tmp_path / "out", "exporting"), pytest.raises(StateError, match="another process is exporting"):
        export_trajectories(store, tmp_path / "out")
    import_trajectories(old, tmp_path / "new")
    export_trajectories(store, tmp_path / "out")
    assert not [one.name for one in tmp_path.iterdir() if one.name.startswith(".")]


@pytest.mark.parametrize("format", ["json", "pickle"])
def test_another_file_of_the_same_name_and_size_is_not_taken_for_known(tmp_path: Path, format: str) -> None:
    def layout(name: str, number: float) -> Path:
        folder = written(tmp_path / name, {}, learning_rate=0.1)
        samples = {"5": {"w": [number] * 3, "w_step": 0}}
        if format == "json":
            return written(folder, {0: samples})
        (folder / "epoch_0.pkl").write_bytes(pickle.dumps({"sample_gradients": samples}))
        return folder

    import_trajectories(layout("a", 1.5), tmp_path / "s", allow_pickle=True)
    with pytest.raises(InvalidInputError, match="holds other numbers for w of sample 5, epoch 0, step 0"):
        import_trajectories(layout("b", 9.5), tmp_path / "s", allow_pickle=True)
    assert import_trajectories(tmp_path / "a", tmp_path / "s", allow_pickle=True).known == 1
    assert [one.tolist() for one in held(tmp_path / "s").values()] == [[1.5] * 3]


def test_known_numbers_may_be_as_far_off_as_the_store_s_precision(old: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "x", {0: {"1": {"w": normal(0, 40, 30).tolist()}}}, learning_rate=0.1)
    with timstore.open(tmp_path / "s", precision="int8") as store:
        import_trajectories(folder, store)
        assert import_trajectories(folder, store).known == 1


@pytest.mark.parametrize("left", ["an empty folder", "a torn store", "something else"])
def test_what_a_kill_left_does_not_stand_in_the_way(old: Path, tmp_path: Path, left: str) -> None:
    beside = tmp_path / ".new.importing"
    beside.mkdir()
    if left != "an empty folder":
        (beside / ("timstore.json" if left == "a torn store" else ".timstore.json.1f2e")).write_text('{"for')
    assert import_trajectories(old, tmp_path / "new").gradients == 4
    assert len(held(tmp_path / "new")) == 4
    assert not beside.exists()


def test_folders_that_are_called_alike_are_left_alone(old: Path, store: Path, tmp_path: Path) -> None:
    for name in ("out.exporting", "out.importing", "new.importing", "new.exporting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("")
    import_trajectories(old, tmp_path / "new")
    export_trajectories(store, tmp_path / "out")
    assert len(list(tmp_path.glob("*.*porting/mine"))) == 4


@pytest.mark.parametrize("kind", ["a link to an empty folder", "a link to nothing", "an empty folder", "the one here"])
def test_a_place_may_be_a_link_or_an_empty_folder(
    old: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for number, work in enumerate((lambda to: import_trajectories(old, to), lambda to: export_trajectories(store, to))):
        path, real = tmp_path / f"place-{number}", tmp_path / f"real-{number}"
        if kind != "a link to nothing":
            (real if "link" in kind else path).mkdir()
        if "link" in kind:
            path.symlink_to(real)
        if kind == "the one here":
            monkeypatch.chdir(path)
            work(".")
        else:
            work(path)
        assert path.is_symlink() == ("link" in kind)
        assert any(path.iterdir())
    assert len(held(tmp_path / "place-0")) == 4


def test_a_mount_point_is_refused_before_any_work(old: Path, store: Path) -> None:
    for work in (lambda: import_trajectories(old, "/proc"), lambda: export_trajectories(store, "/proc")):
        with pytest.raises(InvalidInputError, match="is a mount point: choose a folder in it"):
            work()


@pytest.mark.filterwarnings("ignore:save_gradient_trajectory:DeprecationWarning")
def test_a_store_that_was_removed_does_not_come_to_life_again(tmp_path: Path) -> None:
    timstore.save_gradient_trajectory(tmp_path / "run", 0, 0, 1, "w", np.ones(3), {"learning_rate": 0.1})
    (opened,) = [one for one in lifetime.open_stores() if one.path == tmp_path / "run" / "trajectories.tim"]
    opened.commit()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(timstore.StorageError, match="the store is gone"):
        timstore.save_gradient_trajectory(tmp_path / "run", 0, 1, 1, "w", np.ones(3), {"learning_rate": 0.1})
    with pytest.raises(timstore.StorageError, match="gone"):
        opened.append(0, 2, 1, {"w": np.ones(3, np.float32)}, lr=0.1)
    with pytest.raises(timstore.StorageError, match="gone"):
        opened.close()
    assert not (tmp_path / "run").exists()


# --- what an export says ---------------------------------------------------------------------------------------


def info_of(folder: Path) -> Any:
    return json.loads((folder / "global_info.json").read_text())


def test_an_open_store_is_exported_with_all_that_it_accepted(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {"w": normal(0, 3)}, lr=0.1)
        assert export_trajectories(store, tmp_path / "out").gradients == 1


def test_no_step_gets_the_rate_of_another(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {"w": normal(0, 3)}, lr=0.1)
        store.append(0, 1, 1, {"w": normal(1, 3)})
        export_trajectories(store, tmp_path / "out")
    assert info_of(tmp_path / "out") == {"num_epoch": 1, "num_steps": 2, "learning_rates": [[0, 0, 0.1]]}
    with pytest.raises(InvalidInputError, match="no learning rate of epoch 0, step 1: pass lr="):
        import_trajectories(tmp_path / "out", tmp_path / "again")


def test_a_step_that_climbed_has_a_rate_below_zero(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {"w": normal(0, 3)})
        store.append_step(0, 0, [{"lr": 0.1, "maximize": True}])
        export_trajectories(store, tmp_path / "out")
    assert info_of(tmp_path / "out")["learning_rate"] == -0.1


@pytest.mark.parametrize("format", ["json", "pickle"])
def test_a_parameter_called_as_a_marker_is_refused(tmp_path: Path, format: str) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 3, 1, {"w": normal(0, 2), "w_step": np.array(0.5, np.float32)}, lr=0.1)
        with pytest.raises(InvalidInputError, match="parameters w and w_step: in the older layout"):
            export_trajectories(store, tmp_path / "out", format=format)
    assert sorted(os.listdir(tmp_path)) == ["s"]


def test_epochs_far_apart_get_a_file_each_and_no_others(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        for epoch in (3, 20240101):
            store.append(epoch, 0, 1, {"w": normal(0, 2)}, lr=0.1)
        assert export_trajectories(store, tmp_path / "out").epochs == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["epoch_20240101.json", "epoch_3.json", "global_info.json"]
    import_trajectories(tmp_path / "out", tmp_path / "again")
    assert held(tmp_path / "again").keys() == held(tmp_path / "s").keys()


def test_a_condition_that_fails_on_the_way_is_an_error_of_ours(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="DuckDB says: Conversion Error"):
        export_trajectories(store, tmp_path / "out", where="CAST(sample || 'x' AS INTEGER) = 1")
    with timstore.open(store) as opened, pytest.raises(InvalidInputError, match="DuckDB says: Conversion Error"):
        opened.rollback(torch.nn.Linear(1, 1), where="CAST(sample || 'x' AS INTEGER) = 1")
    with pytest.raises(AlreadyExistsError, match="no empty folder"):
        export_trajectories(store, store)
