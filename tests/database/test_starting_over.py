"""`timstore.open(path, "w")` starts over: it removes a store, whole or half removed, and nothing else."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import timstore
from timstore.format.local_files import folder_held


def filled(path, **options):
    """Return the path of a store with records in two commits, folded, a probe and columns of samples."""
    with timstore.open(path, **options) as store:
        for step in range(2):
            store.append(epoch=0, step=step, sample=7, gradients={"w": np.ones((2, 3), np.float32)}, lr=0.1)
            store.commit()
        store.compact()
        store.append(epoch=0, step=2, sample=8, gradients={"w": np.ones((2, 3), np.float32)}, lr=0.1)
        store.samples.update([{"sample": 7, "owner": "u-1"}])
        store.keep_probe([np.zeros(3, np.float32)], loss="mse")
    return path


def count(path, mode="r"):
    with timstore.open(path, mode) as store:
        return store.sql("SELECT count(*) FROM records").fetchall()[0][0]


def test_nothing_of_the_old_store_is_kept_and_the_settings_may_differ(tmp_path):
    path = filled(tmp_path / "run.tim", precision="exact")
    with timstore.open(path, "w", precision="int8", durability="os") as store:
        assert store.settings.precision == "int8"
        assert store.sql("FROM records UNION ALL FROM records").fetchall() == []
        assert store.sql("FROM samples").fetchall() == []
        assert store.probe() is None
        assert store.frontier is None
        store.append(epoch=0, step=0, sample=1, gradients={"other": np.ones((4, 4), np.float32)}, lr=0.1)
    assert count(path) == 1
    report = timstore.verify(path)
    assert report.sound and not report.leftovers, report


@pytest.mark.parametrize("before", [None, "an empty folder"])
def test_where_nothing_is_a_store_is_made(tmp_path, before):
    path = tmp_path / "deep" / "run.tim"
    if before is not None:
        path.mkdir(parents=True)
    assert count(path, "w") == 0
    assert count(path, "w") == 0


def test_a_link_to_a_store_stays_one(tmp_path):
    path = filled(tmp_path / "run.tim")
    (tmp_path / "link").symlink_to(path)
    assert count(tmp_path / "link", "w") == 0
    assert (tmp_path / "link").is_symlink()
    assert count(path) == 0


def something_else(path):
    path.mkdir()
    (path / "data").mkdir()
    (path / "data" / "train.csv").write_text("1,2")


def a_file(path):
    path.write_text("precious")


def beside_a_store(path):
    (filled(path) / "model.safetensors").write_text("weights")


def within_a_store(path):
    (filled(path) / "data" / "train.csv").write_text("1,2")


def hidden_in_a_store(path):
    (filled(path) / ".git").mkdir()


def a_link_in_a_store(path):
    (path.parent / "elsewhere").mkdir()
    (path.parent / "elsewhere" / "photo.png").write_text("x")
    shutil.rmtree(filled(path) / "data")
    (path / "data").symlink_to(path.parent / "elsewhere")


def settings_of_another_program(path):
    path.mkdir()
    (path / "timstore.json").write_text('{"name": "mine"}')


@pytest.mark.parametrize(
    "make",
    [
        something_else,
        a_file,
        beside_a_store,
        within_a_store,
        hidden_in_a_store,
        a_link_in_a_store,
        settings_of_another_program,
    ],
)
def test_what_is_no_store_is_left_alone(tmp_path, make):
    make(tmp_path / "run.tim")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(timstore.TimstoreError):
        timstore.open(tmp_path / "run.tim", "w")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


CUT = """
import os, sys
import timstore
from timstore.database import opening

left = int(sys.argv[2])

def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return function(*args, **kwargs)
    return call

os.rename, os.unlink, os.rmdir = counted(os.rename), counted(os.unlink), counted(os.rmdir)
os.fsync = counted(os.fsync)
opening.remove_store(opening.Path(sys.argv[1]))
"""


def test_a_removal_that_was_cut_off_anywhere_is_taken_up_and_never_taken_for_a_store(tmp_path):
    whole = filled(tmp_path / "whole.tim")
    files = sum(path.is_file() for path in whole.rglob("*"))
    ended = set()
    for left in [0, 1, 2, 3, 5, 9, files // 2, files, 3 * files]:
        path = tmp_path / f"cut-{left}.tim"
        shutil.copytree(whole, path)
        ended.add(subprocess.run([sys.executable, "-c", CUT, path, str(left)]).returncode)
        if (path / "timstore.json").exists():
            assert left == 0
            assert count(path) == 3
        elif any(path.iterdir()) and any((path / folder).exists() for folder in ("data", "log", "ckpt", "runs")):
            for mode in ("r", "a", "x"):
                with pytest.raises(timstore.CorruptionError, match="mode 'w' again") as caught:
                    timstore.open(path, mode)
                assert caught.value.kind == "half-removed"
        assert count(path, "w") == 0
        assert timstore.verify(path).sound
        assert not list(path.glob(".*"))
    assert ended == {0, 9}


def test_a_handle_that_is_open_on_what_was_removed_is_closed(tmp_path):
    path = filled(tmp_path / "run.tim")
    old = timstore.open(path)
    old.append(epoch=9, step=9, sample=9, gradients={"w": np.ones((2, 3), np.float32)}, lr=0.1)
    reader = timstore.open(tmp_path / "." / "run.tim", "r")
    with timstore.open(path, "w") as new:
        for verb in (old.commit, reader.refresh, lambda: old.sql("FROM records")):
            with pytest.raises(timstore.StateError):
                verb()
        old.close()
        new.append(epoch=0, step=0, sample=1, gradients={"w": np.ones((2, 3), np.float32)}, lr=0.1)
    assert count(path) == 1


def test_a_handle_keeps_all_it_has_where_starting_over_is_refused(tmp_path):
    path = filled(tmp_path / "run.tim")
    (path / "model.safetensors").write_text("weights")
    with timstore.open(path) as store:
        store.append(epoch=9, step=9, sample=9, gradients={"w": np.ones((2, 3), np.float32)}, lr=0.1)
        with pytest.raises(timstore.InvalidInputError, match=r"model\.safetensors"):
            timstore.open(path, "w")
        with pytest.raises(timstore.InvalidInputError, match="precision"):
            timstore.open(path, "w", precision="float7")
    assert count(path) == 4


def test_a_loop_that_is_still_recording_into_it_stops_with_an_error(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(timstore.StateError), timstore.open(tmp_path / "run.tim") as store:  # noqa: SIM117
        with store.record(model, optimizer) as recorder:
            for _ in range(2):
                recorder.batch([1, 2])
                model(torch.ones(2, 2)).sum().backward()
                optimizer.step()
                timstore.open(tmp_path / "run.tim", "w").close()


def test_two_at_once_do_not_remove_each_others_store(tmp_path):
    path = filled(tmp_path / "run.tim")
    with (
        folder_held(path, "a test"),
        pytest.raises(timstore.StateError, match="removing it"),
    ):
        timstore.open(path, "w")
    assert count(path) == 3


@pytest.mark.filterwarnings("ignore:every user of this machine can read")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_the_store_of_another_user_stays(tmp_path):
    path = filled(tmp_path / "run.tim")
    os.chmod(path, 0o755)
    for folder in path.rglob("*"):
        os.chmod(folder, 0o755 if folder.is_dir() else 0o644)
    code = (
        "import os, sys, warnings, timstore; warnings.simplefilter('ignore'); os.setuid(65534)\n"
        "try: timstore.open(sys.argv[1], 'w')\n"
        "except timstore.ReadOnlyError as error: print(error)"
    )
    for above in path.parents:
        if above == Path(tempfile.gettempdir()):
            break
        os.chmod(above, os.stat(above).st_mode | 0o055)
    said = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert str(path) in said
    assert count(path) == 3
