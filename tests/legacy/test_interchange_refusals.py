"""Files of the older layout that are broken, cut off or of something else: the store stays as it was."""

import json
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from older_layouts import held, normal, written

import timstore
from timstore.errors import FormatError, InvalidInputError, NotFoundError, ReadOnlyError, StorageError
from timstore.legacy import export_trajectories, import_trajectories

GOOD = {"1": {"w": [[1.0, 2.0], [3.0, 4.0]], "b": [1.0]}}
BAD = {
    "broken off": ('{"sample_gradients": {"1": {"w": [[1.0, 2.0], [3.0', "broken off"),
    "a trailing comma": ('{"sample_gradients": {"1": {"w": [[1.0, 2.0], [3.0, 4.0],]}}}', "no JSON"),
    "nested deep": ('{"sample_gradients": {"1": {"w": ' + "[" * 3_000_000, "nested more than"),
    "nested deep elsewhere": ('{"other": ' + "[" * 3_000_000, "nested more than"),
    "ragged": ('{"sample_gradients": {"1": {"w": [[1.0, 2.0], [3.0]]}}}', "sample '1', parameter 'w'.*ragged"),
    "lists and numbers": ('{"sample_gradients": {"1": {"w": [1.0, [3.0]]}}}', "ragged"),
    "deeper later": ('{"sample_gradients": {"1": {"w": [[1.0], [[3.0]]]}}}', "ragged"),
    "text for a number": ('{"sample_gradients": {"1": {"w": [1.0, "3.0"]}}}', 'numbers in lists, not "3.0"'),
    "null": ('{"sample_gradients": {"1": {"w": [null]}}}', "not null"),
    "an object": ('{"sample_gradients": {"1": {"w": [{"a": 1}]}}}', "not an object"),
    "text": ('{"sample_gradients": {"1": {"w": "NaN"}}}', "numbers in lists"),
    "beyond floats": ('{"sample_gradients": {"1": {"w": [' + "9" * 400 + "]}}}", "float|no JSON"),
    "another layout": ('{"gradients": {"1": {"w": [1.0]}}}', "another layout"),
    "a list": ("[1, 2]", "expected an object"),
    "a sample without parameters": ('{"sample_gradients": {"1": [1.0]}}', "object of parameters"),
    "nothing": ("", "no JSON"),
    "two values": (json.dumps({"sample_gradients": GOOD}) * 2, "no JSON"),
    "not text": ("\x00\x01", "no JSON"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("into", ["a new store", "a store with records"])
def test_a_file_that_is_none_leaves_the_store_as_it_was(tmp_path: Path, name: str, into: str) -> None:
    text, message = BAD[name]
    folder = written(tmp_path / "old", {0: GOOD, 1: text}, learning_rate=0.1)
    path = tmp_path / "s"
    if into == "a store with records":
        with timstore.open(path) as store:
            store.append(7, 0, 1, {"w": normal(0, 2, 2)}, lr=0.1)
    before = held(path) if path.exists() else None
    with pytest.raises(FormatError, match=message) as caught:
        import_trajectories(folder, path)
    assert "epoch_1.json" in str(caught.value) and len(str(caught.value)) < 600
    after = held(path) if path.exists() else None
    assert (before is None) == (after is None)
    assert before is None or (after is not None and before.keys() == after.keys())
    assert not (tmp_path / ".s.importing").exists()


def test_what_is_missing_or_said_twice_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "old", {0: GOOD})
    with pytest.raises(InvalidInputError, match="pass lr=") as caught:
        import_trajectories(folder, tmp_path / "s")
    assert caught.value.kind == "no-learning-rate"
    written(folder, {}, num_epoch=3, learning_rate=0.1)
    with pytest.raises(InvalidInputError, match=r"announces 3 epochs.*no file of epoch 1"):
        import_trajectories(folder, tmp_path / "s")
    written(folder, {1: GOOD, 2: GOOD, 3: GOOD})
    with pytest.warns(timstore.TimstoreWarning, match=r"epoch_3\.json left out"):
        assert import_trajectories(folder, tmp_path / "s").epochs == 3
    (folder / "epoch_01.json").write_text("{}")
    with pytest.raises(InvalidInputError, match=r"epoch_01\.json and epoch_1\.json both claim epoch 1"):
        import_trajectories(folder, tmp_path / "t")
    (folder / "epoch_01.json").rename(folder / "epoch_1.pkl")
    with pytest.raises(InvalidInputError, match="both claim epoch 1"):
        import_trajectories(folder, tmp_path / "t")
    (folder / "global_info.json").write_text("[")
    with pytest.raises(InvalidInputError, match=r"global_info\.json is not JSON"):
        import_trajectories(folder, tmp_path / "t", format="json")
    with pytest.raises(NotFoundError, match="no directory"):
        import_trajectories(tmp_path / "nowhere", tmp_path / "t")
    with pytest.raises(NotFoundError, match=r"holds no epoch_N\.json"):
        import_trajectories(tmp_path / "s", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_another_shape_than_before_is_refused_whole(tmp_path: Path) -> None:
    folder = written(tmp_path / "old", {0: GOOD, 1: {"2": {"w": [1.0]}}}, learning_rate=0.1)
    for path in (tmp_path / "new", tmp_path / "s"):
        if path.name == "s":
            with timstore.open(path) as store:
                store.append(7, 0, 1, {"b": normal(0, 1)}, lr=0.1)
        with pytest.raises(InvalidInputError, match="w"):
            import_trajectories(folder, path)
    assert not (tmp_path / "new").exists()
    assert len(held(tmp_path / "s")) == 1


def test_records_of_these_epochs_from_elsewhere_are_not_mixed_with(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {"w": normal(0, 2, 2)}, lr=0.1)
        folder = written(tmp_path / "old", {0: GOOD}, learning_rate=0.1)
        with pytest.raises(InvalidInputError, match="holds records of epoch 0 that are not of"):
            import_trajectories(folder, store)
        assert store.sql("SELECT count(*) FROM gradients").fetchall() == [(1,)]
        written(tmp_path / "later", {1: GOOD}, learning_rate=0.1)
        import_trajectories(tmp_path / "later", store)
        assert store.sql("SELECT count(*) FROM gradients").fetchall() == [(3,)]


@pytest.mark.parametrize("into", ["a new store", "a store with records"])
@pytest.mark.parametrize("after", [1, 5, 9])
def test_an_import_that_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into: str, after: int
) -> None:
    def sample(number: int) -> Any:
        return {"w": normal(number, 2, 2).tolist(), "b": [1.0]}

    epochs = {epoch: {str(one): sample(one + 9 * epoch) for one in range(4)} for epoch in range(2)}
    folder = written(tmp_path / "old", epochs, learning_rate=0.1)
    path = tmp_path / "s"
    if into == "a store with records":
        with timstore.open(path) as store:
            store.append(7, 0, 1, {"w": normal(0, 2, 2)}, lr=0.1)
    import_trajectories(folder, tmp_path / "whole")
    append, calls = timstore.database.store.Store.append, []

    def cut(self: Any, *args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        append(self, *args, **options)
        self.commit()

    with monkeypatch.context() as patched:
        patched.setattr(timstore.database.store.Store, "append", cut)
        with pytest.raises(KeyboardInterrupt):
            import_trajectories(folder, path)
    for given in ({"lr": 0.2}, {"scale": 2.0}) if path.exists() else ():
        with pytest.raises(InvalidInputError, match="or came with another lr or scale"):
            import_trajectories(folder, path, **given)
    report = import_trajectories(folder, path)
    assert report.known == after
    got = {key: value for key, value in held(path).items() if key[0] != 7}
    wanted = held(tmp_path / "whole")
    assert got.keys() == wanted.keys() and all(np.array_equal(got[key], wanted[key]) for key in got)
    assert import_trajectories(folder, path).known == report.gradients


def test_what_was_cut_off_with_another_rate_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "old", {0: GOOD, 1: GOOD}, learning_rate=0.1)

    def cut(self: Any, *args: Any, **options: Any) -> None:
        self.commit()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(timstore.database.store.Store, "append", cut)
        with pytest.raises(KeyboardInterrupt):
            import_trajectories(folder, tmp_path / "s")
    assert (tmp_path / ".s.importing").exists()
    assert import_trajectories(folder, tmp_path / "s", lr=0.2).known == 0
    with timstore.open(tmp_path / "s", "r") as store:
        assert store.sql("SELECT DISTINCT lr FROM steps").fetchall() == [(0.2,)]


@pytest.mark.parametrize("place", ["nowhere", "an open store", "a store that was closed"])
def test_a_dry_run_reads_everything_and_writes_nothing(tmp_path: Path, place: str) -> None:
    folder = written(tmp_path / "old", {0: GOOD, 1: GOOD}, learning_rate=0.1)
    path = tmp_path / "s"
    if place != "nowhere":
        with timstore.open(path) as store:
            store.append(7, 0, 1, {"w": normal(0, 2, 2)}, lr=0.1)
    with ExitStack() as stack:
        target = stack.enter_context(timstore.open(path)) if place == "an open store" else path
        before = sorted(tmp_path.rglob("*"))
        report = import_trajectories(folder, target, dry_run=True)
        (folder / "epoch_1.json").write_text("[")
        with pytest.raises(FormatError):
            import_trajectories(folder, target, dry_run=True)
        written(folder, {1: GOOD})
        assert sorted(tmp_path.rglob("*")) == before
        assert report == import_trajectories(folder, target)
    assert report.gradients == 4


def test_what_the_system_does_not_allow_is_an_error_of_ours(nobody: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        root = Path(name)
        root.chmod(0o755)
        written(root / "old", {0: GOOD}, learning_rate=0.1)
        import_trajectories(root / "old", root / "s")
        (root / "shut").mkdir()
        written(root / "shut" / "old", {0: GOOD}, learning_rate=0.1)
        (root / "old" / "epoch_0.json").chmod(0o000)
        for folder, mode in ((root / "shut", 0o000), (root, 0o555)):
            folder.chmod(mode)
        nobody(root / "s")
        for folder in (root / "shut" / "old", root / "old"):
            with pytest.raises(StorageError, match=r"cannot read .*Permission denied"):
                import_trajectories(folder, root / "s", dry_run=True)
        with pytest.raises(ReadOnlyError, match="cannot"):
            import_trajectories(root / "old", root / "new")
        with pytest.raises(StorageError, match=r"cannot read .*Permission denied"):
            import_trajectories(root / "old", root / "shut" / "new")
        with pytest.raises(ReadOnlyError, match=r"cannot make .*choose an output where you may write"):
            export_trajectories(root / "s", root / "out")
        if os.getuid() == 0:
            os.seteuid(0)
        for folder in (root, root / "shut"):
            folder.chmod(0o755)
        assert sorted(one.name for one in root.iterdir()) == ["old", "s", "shut"]


@pytest.mark.parametrize(
    ("info", "given", "message"),
    [
        ({"learning_rates": [[0, 0, math.nan]]}, {}, "learning_rates must be a finite number"),
        ({"learning_rates": [[0.5, 0, 0.1]]}, {}, "learning_rates"),
        ({"learning_rates": [[0, 0, 10**400]]}, {}, "learning_rates must be a number"),
        ({"learning_rate": True}, {}, "learning_rate must be a finite number, not True"),
        ({"num_epoch": 2 * 10**9, "learning_rate": 0.1}, {}, "no file of epoch 1"),
        ({"learning_rate": 0.1}, {"lr": 10**400}, "lr must be a number"),
        ({"learning_rate": 0.1}, {"scale": 10**400}, "scale must be a number"),
        ({"learning_rate": 0.1}, {"scale": 0}, "scale is a number other than zero"),
    ],
)
def test_rates_and_scales_are_finite_numbers(tmp_path: Path, info: Any, given: Any, message: str) -> None:
    folder = written(tmp_path / "old", {0: GOOD}, **info)
    with pytest.raises(InvalidInputError, match=message):
        import_trajectories(folder, tmp_path / "s", **given)
    assert not (tmp_path / "s").exists()


def test_text_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "old", {}, learning_rate=0.1)
    (folder / "epoch_0.json").write_bytes(b'{"sample_gradients": {"1": {"\xed\xa0\x80": [1.0]}}}')
    with pytest.raises(FormatError, match=r"epoch_0\.json.*no JSON"):
        import_trajectories(folder, tmp_path / "s")
