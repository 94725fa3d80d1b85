"""The older layout in and out: what its files hold comes over, and nothing else changes."""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from older_layouts import held, normal, written
from torch import nn

import timstore
from timstore.errors import AlreadyExistsError, InvalidInputError
from timstore.legacy import export_trajectories, import_trajectories
from timstore.legacy.layout import sample_of


def original_save(folder: Path, epoch: int, step: int, sample: Any, name: str, gradient: Any, info: Any = None) -> None:
    """The original's writer: reads the whole file, adds, and writes it again."""
    folder.mkdir(exist_ok=True)
    path = folder / f"epoch_{epoch}.json"
    data = json.loads(path.read_text()) if path.exists() else {"sample_gradients": {}}
    held = data["sample_gradients"]
    if sample not in held:  # an integer never is, among keys that were read back
        held[sample] = {}
    held[sample][name] = gradient.tolist()
    held[sample][f"{name}_step"] = step
    path.write_text(json.dumps(data))
    if info is not None:
        (folder / "global_info.json").write_text(json.dumps(info))


def everything_in(path: Path) -> list[tuple[str, str, Any, int]]:
    """Return (sample, parameter, numbers, step) of all that a file holds, duplicate keys and all."""
    pairs = json.loads(path.read_text(), object_pairs_hook=list)[0][1]
    found = []
    for sample, its in pairs:
        steps = {key: value for key, value in its if key.endswith("_step")}
        found += [(sample, key, value, steps[f"{key}_step"]) for key, value in its if not key.endswith("_step")]
    return found


def keys_in(path: Path) -> list[str]:
    return [sample for sample, _ in json.loads(path.read_text(), object_pairs_hook=list)[0][1]]


# --- what the original wrote -----------------------------------------------------------------------------------


def test_every_gradient_that_the_original_left_in_its_files_comes_over(tmp_path: Path) -> None:
    draw, folder = np.random.default_rng(0), tmp_path / "old"
    for epoch in range(2):
        for step in range(4):
            for sample in draw.choice(6, 3, replace=False).tolist():
                for name in ("layer.weight", "layer.bias"):
                    shape = (3, 4) if name == "layer.weight" else (3,)
                    info = {"num_epoch": 2, "num_steps": 4, "learning_rate": 0.1}
                    original_save(folder, epoch, step, sample, name, normal(draw.integers(99), *shape), info)
    report = import_trajectories(folder, tmp_path / "s")
    got = held(tmp_path / "s")
    wanted = [(epoch, *one) for epoch in range(2) for one in everything_in(folder / f"epoch_{epoch}.json")]
    keys = [keys_in(folder / f"epoch_{epoch}.json") for epoch in range(2)]
    assert report.duplicate_keys == sum(len(one) - len(set(one)) for one in keys) > 0
    assert report.gradients == len(got) == len(wanted)
    assert report.unknown_steps == 0
    for epoch, sample, name, numbers, step in wanted:
        assert np.array_equal(got[epoch, step, int(sample), name], np.float32(numbers))


def test_a_rollback_from_them_adds_the_rate_times_the_sum(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, folder = nn.Linear(4, 3), tmp_path / "old"
    before = {name: one.detach().double().numpy().copy() for name, one in model.named_parameters()}
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    for step, sample in enumerate([5, 7, 5, 8]):
        for name, shape in shapes.items():
            original_save(folder, 0, step, str(sample), name, normal(10 * step + len(shape), *shape))
    import_trajectories(folder, tmp_path / "s", lr=0.05)
    left = [(name, numbers) for sample, name, numbers, _ in everything_in(folder / "epoch_0.json") if sample == "5"]
    with timstore.open(tmp_path / "s") as store, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=timstore.TimstoreWarning)
        store.rollback(model, ids=[5], force=True)
    for name, parameter in model.named_parameters():
        summed = sum(np.float64(numbers) for other, numbers in left if other == name)
        assert np.abs(parameter.detach().double().numpy() - (before[name] + 0.05 * summed)).max() <= 1e-6


def test_a_key_is_a_step_marker_only_beside_what_it_marks(tmp_path: Path) -> None:
    sample = {"w": [1.0], "w_step": 3, "warm_step": 2, "b_step": [4.0], "b": [5.0], "scale": 0.5, "scale_step": 7}
    import_trajectories(written(tmp_path / "old", {0: {"1": sample}}), tmp_path / "s", lr=0.1)
    got = {(step, name): value.tolist() for (_, step, _, name), value in held(tmp_path / "s").items()}
    beyond = next(step for step, name in got if name == "warm_step")
    assert beyond >= 1 << 40  # unknown, among known ones
    assert got == {
        (3, "w"): [1.0],
        (7, "scale"): 0.5,
        (beyond, "warm_step"): 2.0,
        (beyond, "b_step"): [4.0],
        (beyond, "b"): [5.0],
    }


def test_without_markers_visits_are_numbered_in_the_order_of_the_file_and_marked_unknown(tmp_path: Path) -> None:
    text = '{"sample_gradients": {"4": {"w": [1.0]}, "9": {"w": [2.0]}, "4": {"b": [3.0]}, "4": {"w": [4.0]}}}'
    report = import_trajectories(written(tmp_path / "old", {2: text}), tmp_path / "s", lr=0.1)
    got = {key[1:]: value.tolist() for key, value in held(tmp_path / "s").items()}
    assert got == {(0, 4, "w"): [1.0], (1, 9, "w"): [2.0], (0, 4, "b"): [3.0], (2, 4, "w"): [4.0]}
    assert (report.duplicate_keys, report.unknown_steps, report.records) == (2, 3, 3)
    with timstore.open(tmp_path / "s", "r") as store:
        query = "SELECT DISTINCT epoch, lr, json_extract_string(options, '$.step') FROM steps"
        assert store.sql(query).fetchall() == [(2, 0.1, "unknown")]


def test_numbers_that_are_none_and_all_kinds_of_ids(tmp_path: Path) -> None:
    numbers = "[[NaN, 1, -Infinity], [Infinity, 2.5, 1e-3]]"
    other = '"doc \\"7\\", NaN": {"NaN, w": [[1,2,3],[4,5,6]]}'
    text = '{"sample_gradients": {"3": {"NaN, w": ' + numbers + "}, " + other + "}}"
    with pytest.warns(timstore.TimstoreWarning, match="1 gradients hold NaN"):
        report = import_trajectories(written(tmp_path / "old", {0: text}, learning_rate=1), tmp_path / "s")
    got = {key[2]: value for key, value in held(tmp_path / "s").items()}
    named, name = sample_of('doc "7", NaN', "")
    assert name is not None and report.text_ids == 1
    wanted = np.array([[math.nan, 1, -math.inf], [math.inf, 2.5, 1e-3]])
    assert np.array_equal(got[3], wanted, equal_nan=True) and got[3].dtype == np.float64
    assert got[named].tolist() == [[1, 2, 3], [4, 5, 6]] and got[named].dtype == np.float32
    with timstore.open(tmp_path / "s", "r") as store:
        assert store.sql("SELECT sample FROM samples WHERE name = 'doc \"7\", NaN'").fetchall() == [(named,)]


def test_tokens_are_found_wherever_a_read_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[math.nan, -math.inf, math.inf, 0.5][number % 4] for number in range(40)]
    samples = {f'a "NaN" \\ {number}': {"w, NaN\\": rows[number:] + rows[:number]} for number in range(30)}
    folder = written(tmp_path / "old", {0: samples})
    monkeypatch.setattr("timstore.legacy.json_files._READ_BYTES", 7)
    with pytest.warns(timstore.TimstoreWarning):
        import_trajectories(folder, tmp_path / "s", lr=0.1)
    got = held(tmp_path / "s")
    assert len(got) == 30
    for number, name in enumerate(samples):
        (found,) = [value for key, value in got.items() if key[2] == sample_of(name, "")[0]]
        assert np.array_equal(found, rows[number:] + rows[:number], equal_nan=True)


def test_the_scale_multiplies_and_what_the_caller_says_comes_first(tmp_path: Path) -> None:
    folder = written(tmp_path / "old", {0: {"1": {"w": [0.3, 3.0]}}}, learning_rate=0.5, scale=0.25)
    import_trajectories(folder, tmp_path / "a")
    import_trajectories(folder, tmp_path / "b", lr=2.0, scale=1 / 3)
    (a,), (b,) = held(tmp_path / "a").values(), held(tmp_path / "b").values()
    assert np.allclose(a, [0.075, 0.75]) and np.allclose(b, [0.1, 1.0])
    for path, rate in (("a", 0.5), ("b", 2.0)):
        with timstore.open(tmp_path / path, "r") as store:
            assert store.sql("SELECT DISTINCT lr FROM steps").fetchall() == [(rate,)]


# --- there and back --------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[timstore.Store]:
    """Three epochs, one without records; two rates; a sample drawn twice in an epoch; special numbers."""
    special = np.float32([[1e-45, 3.4028235e38, -0.0], [math.pi, 1 / 3, 1e-8]])
    with timstore.open(tmp_path / "s") as opened:
        for epoch, step, sample in ((0, 0, 3), (0, 1, 3), (0, 1, 5), (2, 2, 3)):
            w = normal(step + sample, 2, 3) if sample == 5 else special / (step + 1)
            opened.append(epoch, step, sample, {"w": w, "b": normal(step, 4)}, lr=0.1 / (1 + step))
        opened.append(2, 3, 7, {"w": np.float64(np.pi) * np.ones((2, 3)), "scale": np.array(2.5, np.float32)}, lr=0.1)
        opened.commit()
        yield opened


@pytest.mark.parametrize("format", ["json", "pickle"])
def test_there_and_back_is_the_same_to_the_last_bit(store: timstore.Store, tmp_path: Path, format: str) -> None:
    where = None
    if format == "pickle":
        with pytest.raises(InvalidInputError, match="sample 3 was drawn more than once in epoch 0"):
            export_trajectories(store, tmp_path / "old", format=format)
        where = "(epoch, step, sample) != (0, 1, 3)"
    wanted = {(r.epoch, r.step, r.sample, n): r.dense(n) for r in store.read(where) for n in r.gradients}
    report = export_trajectories(store, tmp_path / "old", format=format, where=where)
    assert (report.epochs, report.gradients) == (3, len(wanted))
    import_trajectories(tmp_path / "old", tmp_path / "back", allow_pickle=format == "pickle")
    got = held(tmp_path / "back")
    assert got.keys() == wanted.keys() and len(wanted) >= 8
    assert all(got[key].tobytes() == value.tobytes() and got[key].shape == value.shape for key, value in wanted.items())
    with timstore.open(tmp_path / "back", "r") as back:
        query = "SELECT epoch, step, lr FROM steps ORDER BY ALL"
        assert back.sql(query).fetchall() == store.sql(query).fetchall()


def test_the_original_s_reader_takes_what_is_exported(store: timstore.Store, tmp_path: Path) -> None:
    import pickle

    export_trajectories(store, tmp_path / "json", where="epoch = 2")
    export_trajectories(store, tmp_path / "pickle", where="epoch = 2", format="pickle")
    assert json.loads((tmp_path / "json" / "global_info.json").read_text())["num_epoch"] == 3
    assert json.loads((tmp_path / "json" / "epoch_0.json").read_text()) == {"sample_gradients": {}}
    texts = json.loads((tmp_path / "json" / "epoch_2.json").read_text())["sample_gradients"]
    numbers = pickle.loads((tmp_path / "pickle" / "epoch_2.pkl").read_bytes())["sample_gradients"]
    assert list(texts) == ["3", "7"] and list(numbers) == [3, 7]
    assert texts["3"]["w_step"] == numbers[3]["w_step"] == 2
    assert np.array_equal(np.float32(texts["3"]["w"]), numbers[3]["w"])


def test_a_directory_that_is_there_is_left_alone(store: timstore.Store, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").write_text("x")
    with pytest.raises(AlreadyExistsError, match="no empty folder"):
        export_trajectories(store, tmp_path / "old")
    with pytest.raises(InvalidInputError, match="json or pickle"):
        export_trajectories(store, tmp_path / "new", format="yaml")
    with pytest.raises(InvalidInputError):
        export_trajectories(store, tmp_path / "new", where="nonsense >")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["old", "s"]


def test_visits_without_a_step_may_come_before_those_with_one(tmp_path: Path) -> None:
    later = {"1": {"w": [1.5]}, "2": {"w": [2.5], "w_step": 0}, "3": {"w": [3.5], "w_step": -1}}
    report = import_trajectories(written(tmp_path / "old", {0: later}, learning_rate=0.1), tmp_path / "s")
    assert (report.gradients, report.unknown_steps) == (3, 2)
    steps = {sample: step for _, step, sample, _ in held(tmp_path / "s")}
    assert steps[2] == 0
    assert min(steps[1], steps[3]) > 1 << 32
    assert steps[1] != steps[3]


def test_a_scale_that_float32_cannot_hold_is_kept_in_float64(tmp_path: Path) -> None:
    for number, scale in ((2.0**100, 2.0**40), (1.0, 1e-200)):
        folder = written(tmp_path / f"old{scale}", {0: {"1": {"w": [number]}}}, learning_rate=0.1)
        assert import_trajectories(folder, tmp_path / f"s{scale}", scale=scale).not_finite == 0
        (found,) = held(tmp_path / f"s{scale}").values()
        assert found.tolist() == [number * scale]
