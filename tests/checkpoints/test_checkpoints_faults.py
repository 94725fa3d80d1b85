"""Whatever fails while a checkpoint is written, everything is as it was, and the same call works afterwards."""

import errno
import itertools
import os
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


class FailingOs:
    """The module `os`, of which a call fails that changes the disk.

    Attributes:
        at: which call, of one function or (None) of all of them.
        for_ever: whether the later ones fail too.
    """

    CHANGES = ("open", "pwrite", "fsync", "fchmod", "link", "replace")

    def __init__(self, error: BaseException, at: tuple[str | None, int], *, for_ever: bool = False) -> None:
        self.calls: list[str] = []
        self._error, self._at, self._for_ever = error, at, for_ever

    def __getattr__(self, name: str) -> Any:
        plain = getattr(os, name)
        if name not in self.CHANGES:
            return plain

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            function, last = self._at
            count = len(self.calls) if function is None else self.calls.count(function)
            if function in (None, name) and (count == last or (self._for_ever and count > last)):
                raise self._error
            return plain(*args, **kwargs)

        return counted


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A store `s`, the file `both.safetensors`, and the folder `model` with the same in two files and an index."""
    held = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3)}
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {name: torch.ones_like(tensor) for name, tensor in held.items()}, lr=0.5)
    save_file(held, tmp_path / "both.safetensors")
    (tmp_path / "model").mkdir()
    for name, tensor in held.items():
        save_file({name: tensor}, tmp_path / "model" / f"{name}.safetensors")
    index = '{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}'
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    """Return every file outside the store."""
    return {name: data for name, data in made.files_in(folder).items() if not name.startswith("s/")}


def is_rolled_back(path: Path) -> bool:
    found = made.tensors_in(path)
    return torch.equal(found["a"], torch.arange(6.0).view(2, 3) + 0.5) and torch.equal(found["b"], torch.ones(3) + 0.5)


NO_SPACE, BROKEN = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("path", "output", "error"),
    [
        ("both.safetensors", "out", BROKEN),
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
            failing = FailingOs(error, (None, last))
            monkeypatch.setattr(publish, "os", failing)
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
            assert everything(recorded) == before, f"call {last}, {failing.calls[-1]}"
            seen.append(failing.calls[-1])
    assert {"open", "pwrite", "fsync", "fchmod", "replace"} <= set(seen)
    assert ("link" in seen) == (output is None)
    assert is_rolled_back(recorded / (output or path))
    new = {name.replace(path, "out", 1) for name in before if name.startswith(path)} if output else set()
    assert everything(recorded).keys() == before.keys() | new


def test_a_store_that_cannot_be_written_leaves_no_output(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise timstore.StorageError("no space")

    before = everything(recorded)
    monkeypatch.setattr(Store, "append_rollback", full)
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
        gradients = {"a": torch.full((2, 3), float("nan")), "b": torch.ones(3)}
        store.append(0, 1, 2, gradients, lr=0.5, allow_nonfinite=True)
    before = made.files_in(recorded)
    with pytest.raises(timstore.StateError, match="NaN or Inf"):
        timstore.rollback(recorded / "model", [2], recorded / "s", in_place=True)
    assert made.files_in(recorded) == before


def killed(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roll back in place, and stop between the two renames as a killed process does."""
    with monkeypatch.context() as patched:
        patched.setattr(publish, "os", FailingOs(SystemExit(), ("replace", 2)))
        patched.setattr(publish.Writing, "_take_back", lambda *_: None)
        patched.setattr(publish.Writing, "end", lambda *_: None)
        with pytest.raises(SystemExit):
            timstore.rollback(recorded / "model", [1], recorded / "s", in_place=True)


@pytest.mark.parametrize("kept", ["old", "new"])
def test_a_kill_between_two_renames_leaves_both_versions_of_each_file(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    before = made.tensors_in(recorded / "model")
    with timstore.open(recorded / "s") as store:  # so that the model is known by its bits
        store.append_fingerprints(0, 0, {name: digest(tensor) for name, tensor in before.items()})
    killed(recorded, monkeypatch)
    left = [path for path in (recorded / "model").iterdir() if path.name.startswith(".")]
    assert sorted(path.suffix for path in left) == [".new", ".old", ".old"]
    for options in ({"output": recorded / "out"}, {"in_place": True, "dry_run": True}):
        with pytest.raises(
            timstore.StateError, match=r"lies \.a.safetensors\..*\.old: .* mixture .* rename all .old"
        ) as no:
            timstore.rollback(recorded / "model", [1], recorded / "s", **options)
        assert no.value.kind == "half-replaced"
    for path in left:
        if path.suffix == f".{kept}":
            path.rename(path.with_name(path.name[1:].rsplit(".", 2)[0]))
    # Of the file that was not replaced, the old one is a second name: renaming that does nothing.
    rest = [path for path in left if path.exists()]
    assert sorted(path.suffix for path in rest) == ([".new", ".old"] if kept == "old" else [".old", ".old"])
    for path in rest:
        path.unlink()
    if kept == "old":
        assert made.all_bits(made.tensors_in(recorded / "model")) == made.all_bits(before)
        timstore.rollback(recorded / "model", [1], recorded / "s", in_place=True)
    else:
        with pytest.raises(timstore.StateError, match="removed from this model before"):
            timstore.rollback(recorded / "model", [1], recorded / "s", in_place=True)
    assert is_rolled_back(recorded / "model")


def test_what_cannot_be_put_back_is_said(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made.files_in(recorded / "model")
    monkeypatch.setattr(publish, "os", FailingOs(BROKEN, ("replace", 2), for_ever=True))
    with pytest.raises(
        timstore.StorageError, match=r"could not be put back .*: the old ones lie beside them"
    ) as raised:
        timstore.rollback(recorded / "model", [1], recorded / "s", in_place=True)
    assert raised.value.kind == "half-replaced"
    old = {path.name[1:].rsplit(".", 2)[0]: path for path in (recorded / "model").glob(".*.old")}
    assert {name: path.read_bytes() for name, path in old.items()} == {name: before[name] for name in old}
    assert old.keys() == {"a.safetensors", "b.safetensors"}


def test_what_a_kill_left_is_said_until_it_is_deleted(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with timstore.open(recorded / "s") as store:
        tensors = made.tensors_in(recorded / "model")
        store.append_fingerprints(0, 0, {name: digest(tensor) for name, tensor in tensors.items()})
    killed(recorded, monkeypatch)
    left = sorted((recorded / "model").glob(".*"))
    for path in left:
        if path.suffix == ".old":
            path.rename(path.with_name(path.name[1:].rsplit(".", 2)[0]))
    said = r"model holds 2 hidden files of a rollback that was cut off \(the first is \.b\.safetensors\.\w{8}\.new\)"
    with pytest.warns(timstore.TimstoreWarning, match=said):
        report = timstore.rollback(recorded / "model", [1], recorded / "s", in_place=True)
    assert any("delete them" in one for one in report.warnings)
    with pytest.raises(timstore.StateError, match=f"removed from this model before.*{said}") as raised:
        timstore.rollback(recorded / "model", [1], recorded / "s", in_place=True)
    assert (raised.value.kind, raised.value.fields["samples"]) == ("removed-before", [1])
    # Beside a single file, only those of its name are of it.
    for name in (".both.safetensors.0123abcd.old", ".other.safetensors.0123abcd.old"):
        (recorded / name).write_bytes(b"")
    with pytest.warns(timstore.TimstoreWarning, match=r"holds 1 hidden file of .* cut off \(the first is \.both"):
        timstore.rollback(recorded / "both.safetensors", [1], recorded / "s", dry_run=True)
    for path in [*(recorded / "model").glob(".*"), *recorded.glob(".*")]:
        path.unlink()
    for name in ("model", "both.safetensors"):
        report = timstore.rollback(recorded / name, [1], recorded / "s", dry_run=True, force=True)
        assert not any("cut off" in one for one in report.warnings)
