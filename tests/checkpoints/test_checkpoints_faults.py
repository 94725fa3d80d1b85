"""Checkpoints whose rollback fails, is interrupted or killed: everything is as it was, or is put back by the next."""

import errno
import itertools
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import saved_models as made
import torch
from safetensors.torch import save_file

import timstore
from timstore.checkpoints import publish
from timstore.database.store import Store
from timstore.model.fingerprints import digest

pytestmark = pytest.mark.filterwarnings("ignore:first order only:timstore.TimstoreWarning")

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3), "c": torch.zeros(2, 2)}
OLD, NEW = ({name: tensor + change for name, tensor in TENSORS.items()} for change in (0, 0.5))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A store `s`, the file `all.safetensors`, and the folder `model` with the same in three files and an index."""
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}, lr=0.5)
    save_file(TENSORS, tmp_path / "all.safetensors")
    (tmp_path / "model").mkdir()
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / "model" / f"{name}.safetensors")
    index = ", ".join(f'"{name}": "{name}.safetensors"' for name in TENSORS)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    return tmp_path


@pytest.fixture
def known(recorded: Path) -> Path:
    """The same, and the store knows the model by its bits."""
    with timstore.open(recorded / "s") as store:
        store.append_fingerprints(0, 0, {name: digest(tensor) for name, tensor in TENSORS.items()})
    return recorded


class Disturbed:
    """The module `os`; something is done before one of the calls by which a checkpoint is written.

    Args:
        act: it may raise, or kill the process.
        at: before which call, of one function or (None) of all of them.
        for_ever: whether before the later ones too.
    """

    CHANGES = ("fchmod", "fsync", "link", "open", "pwrite", "replace")

    def __init__(self, act: Callable[[], None], at: tuple[str | None, int], *, for_ever: bool = False) -> None:
        self.calls: list[str] = []
        self._act, self._at, self._for_ever = act, at, for_ever

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        return partial(self._call, name, function) if name in self.CHANGES else function

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(name)
        only, last = self._at
        count = len(self.calls) if only is None else self.calls.count(only)
        if only in (None, name) and (count == last or (self._for_ever and count > last)):
            self._act()
        return function(*args, **kwargs)


def failing(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def everything(folder: Path) -> dict[str, bytes]:
    """Return every file outside the store."""
    return {name: data for name, data in made.files_in(folder).items() if not name.startswith("s/")}


def is_at(path: Path, wanted: dict[str, torch.Tensor]) -> bool:
    return made.all_bits(made.tensors_in(path)) == made.all_bits(wanted)


NO_SPACE, BROKEN = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("path", "output", "error"),
    [
        ("all.safetensors", "out", BROKEN),
        ("model", "out", NO_SPACE),
        ("model", None, NO_SPACE),
        ("model", None, KeyboardInterrupt()),
    ],
    ids=["a new file", "a new folder", "in place", "interrupted in place"],
)
def test_any_call_that_fails_leaves_everything_as_it_was(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, path: str, output: str | None, error: BaseException
) -> None:
    options: dict[str, Any] = {"output": recorded / output} if output else {"in_place": True}
    before, seen = everything(recorded), []
    with timstore.open(recorded / "s") as store:
        for last in itertools.count(1):
            disturbed = Disturbed(failing(error), (None, last))
            monkeypatch.setattr(publish, "os", disturbed)
            try:
                store.rollback(recorded / path, [1], **options)
            except KeyboardInterrupt:
                assert isinstance(error, KeyboardInterrupt)
            except timstore.StorageError as raised:
                assert isinstance(error, OSError)
                assert raised.errno == error.errno
                assert str(raised).endswith("Make room, and try again" if error is NO_SPACE else "Nothing was changed")
            else:
                break
            assert everything(recorded) == before, f"call {last}, {disturbed.calls[-1]}"
            seen.append(disturbed.calls[-1])
    assert set(seen) == set(Disturbed.CHANGES) - ({"link"} if output else set())
    assert is_at(recorded / (output or path), NEW)
    new = {name.replace(path, "out", 1) for name in before if name.startswith(path)} if output else set()
    assert everything(recorded).keys() == before.keys() | new


def test_a_store_that_cannot_be_written_leaves_no_output(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(recorded)
    monkeypatch.setattr(Store, "append_rollback", lambda *_: failing(timstore.StorageError("no space"))())
    for options in ({"output": recorded / "out"}, {"in_place": True}):
        with pytest.raises(timstore.StorageError, match="no space"):
            timstore.rollback(recorded / "model", [1], recorded / "s", **options)
        assert everything(recorded) == before
    assert made.rolled_back(recorded / "s") == 0


def test_a_store_that_was_changed_leaves_no_output(recorded: Path) -> None:
    shard = max((recorded / "s").rglob("c/0/0"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    before = made.files_in(recorded)
    for options in ({"output": recorded / "out"}, {"in_place": True}):
        with pytest.raises(timstore.CorruptionError, match="crc32"):
            timstore.rollback(recorded / "model", [1], recorded / "s", **options)
    assert made.files_in(recorded) == before


def test_a_change_that_is_not_finite_leaves_no_output(recorded: Path) -> None:
    with timstore.open(recorded / "s") as store:
        gradients = {name: torch.full_like(tensor, float("nan")) for name, tensor in TENSORS.items()}
        store.append(0, 1, 2, gradients, lr=0.5, allow_nonfinite=True)
    before = made.files_in(recorded)
    with pytest.raises(timstore.StateError, match="NaN or Inf"):
        timstore.rollback(recorded / "model", [2], recorded / "s", in_place=True)
    assert made.files_in(recorded) == before


@pytest.mark.parametrize(("call", "number"), [("link", 1), ("link", 3), ("replace", 1), ("replace", 3)])
def test_ctrl_c_while_files_are_renamed_comes_when_all_of_them_are(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    disturbed = Disturbed(lambda: os.kill(os.getpid(), signal.SIGINT), (call, number))
    monkeypatch.setattr(publish, "os", disturbed)
    with pytest.raises(KeyboardInterrupt) as told:
        timstore.rollback(recorded / "model", [1], recorded / "s", in_place=True)
    assert is_at(recorded / "model", NEW)
    assert told.value.report.samples == (1,)  # type: ignore[attr-defined]
    assert not list((recorded / "model").glob(".*"))


def test_what_cannot_be_put_back_is_said(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made.files_in(recorded / "model")
    monkeypatch.setattr(publish, "os", Disturbed(failing(BROKEN), ("replace", 2), for_ever=True))
    match = r"could not be put back .*: the old ones lie beside them"
    with pytest.raises(timstore.StorageError, match=match) as raised:
        timstore.rollback(recorded / "model", [1], recorded / "s", in_place=True)
    assert raised.value.kind == "half-replaced"
    old = {named(path): path for path in (recorded / "model").glob(".*.old")}
    assert {name: path.read_bytes() for name, path in old.items()} == {name: before[name] for name in old}
    assert old.keys() == {f"{name}.safetensors" for name in TENSORS}


def killed(folder: Path, call: str, number: int) -> None:
    """Roll back in place in another process, which is killed before a call."""
    if (process := os.fork()) == 0:
        disturbed = Disturbed(lambda: os.kill(os.getpid(), signal.SIGKILL), (call, number))
        pytest.MonkeyPatch().setattr(publish, "os", disturbed)
        try:
            timstore.rollback(folder / "model", [1], folder / "s", in_place=True)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def named(hidden: Path) -> str:
    """Return the name in a hidden one, as docs/checkpoints.md has a user read it."""
    return hidden.name[1:].rsplit(".", 2)[0]


@pytest.mark.parametrize(
    ("call", "number", "is_mixture"),
    [("pwrite", 1, False), ("link", 2, False), ("replace", 1, False), ("replace", 2, True), ("replace", 3, True)],
)
def test_a_rollback_in_place_that_was_killed_is_taken_up_by_the_next(
    known: Path, call: str, number: int, is_mixture: bool
) -> None:
    path, store = known / "model", known / "s"
    killed(known, call, number)
    assert is_at(path, OLD) != is_mixture
    before = made.files_in(path)
    if is_mixture:
        match = r"lies \.a.safetensors\..*\.old: .* mixture of two models.* rename all .old"
        for options in ({"output": known / "out"}, {"in_place": True, "dry_run": True}):
            with pytest.raises(timstore.StateError, match=match) as refused:
                timstore.rollback(path, [1], store, **options)
            assert refused.value.kind == "half-replaced"
        assert made.files_in(path) == before
    with pytest.warns(timstore.TimstoreWarning, match="cut off"):
        report = timstore.rollback(path, [1], store, in_place=True)
    assert is_at(path, NEW)
    assert any("were put back first" in warning for warning in report.warnings) == is_mixture
    # What the killed one left is never put over the new files.
    with pytest.raises(timstore.StateError, match="removed from this model before"):
        timstore.rollback(path, [1], store, in_place=True)
    assert is_at(path, NEW)


@pytest.mark.parametrize("chosen", ["old", "new"])
def test_a_mixture_can_be_made_whole_by_hand_either_way(known: Path, chosen: str) -> None:
    killed(known, "replace", 2)
    left = [path for path in (known / "model").iterdir() if path.name.startswith(".")]
    assert sorted(path.suffix for path in left) == [".new"] * 2 + [".old"] * 3
    for path in left:
        if path.suffix == f".{chosen}":
            path.rename(path.with_name(named(path)))
    # Of the files that were not replaced, the old one is a second name: renaming that does nothing.
    rest = [path for path in left if path.exists()]
    assert sorted(path.suffix for path in rest) == ([".new"] * 2 + [".old"] * 2 if chosen == "old" else [".old"] * 3)
    for path in rest:
        path.unlink()
    assert is_at(known / "model", OLD if chosen == "old" else NEW)


def test_files_that_were_saved_over_a_mixture_are_never_replaced_by_what_was_left(known: Path) -> None:
    saved = {path.name: path.read_bytes() for path in (known / "model").iterdir()}
    killed(known, "replace", 2)
    for name, data in saved.items():
        (known / "model" / name).unlink()
        (known / "model" / name).write_bytes(data)
    with pytest.warns(timstore.TimstoreWarning, match="cut off"):
        timstore.rollback(known / "model", [1], known / "s", in_place=True)
    assert is_at(known / "model", NEW)


def test_what_a_kill_left_is_said_until_it_is_deleted(known: Path) -> None:
    killed(known, "replace", 1)
    for path in (known / "model").glob(".*.old"):
        path.unlink()
    said = r"model holds 3 hidden files of a rollback that was cut off \(the first is \.a\.safetensors\.\w{8}\.new\)"
    with pytest.warns(timstore.TimstoreWarning, match=said):
        report = timstore.rollback(known / "model", [1], known / "s", in_place=True)
    assert any("delete them" in warning for warning in report.warnings)
    with pytest.raises(timstore.StateError, match=f"removed from this model before.*{said}") as raised:
        timstore.rollback(known / "model", [1], known / "s", in_place=True)
    assert (raised.value.kind, raised.value.fields["samples"]) == ("removed-before", [1])
    # Beside a single file, only those of its name are of it.
    for name in (".all.safetensors.0123abcd.old", ".other.safetensors.0123abcd.old"):
        (known / name).write_bytes(b"")
    with pytest.warns(timstore.TimstoreWarning, match=r"holds 1 hidden file of .* cut off \(the first is \.all"):
        timstore.rollback(known / "all.safetensors", [1], known / "s", dry_run=True)
    for path in [*(known / "model").glob(".*"), *known.glob(".*")]:
        path.unlink()
    for name in ("model", "all.safetensors"):
        report = timstore.rollback(known / name, [1], known / "s", dry_run=True, force=True)
        assert not any("cut off" in warning for warning in report.warnings)
