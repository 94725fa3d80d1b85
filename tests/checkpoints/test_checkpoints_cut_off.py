"""Checkpoints that are rolled back in place: interrupted, killed, and taken up again by the next rollback."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saved_models
import torch
from safetensors.torch import save_file
from torch import nn

import timstore
from timstore.checkpoints import publish
from timstore.model.fingerprints import digests

pytestmark = pytest.mark.filterwarnings("ignore:first order only:timstore.TimstoreWarning")


@pytest.fixture
def in_files(tmp_path: Path) -> Path:
    """A store `s`, and a model in three files, with its fingerprint in the store."""
    tensors = {name: torch.full((2, 2), float(number)) for number, name in enumerate("abc")}
    (tmp_path / "model").mkdir()
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / "model" / f"{name}.safetensors")
    index = "".join(f'"{name}": "{name}.safetensors", ' for name in tensors)[:-2]
    (tmp_path / "model" / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {name: torch.ones(2, 2) for name in tensors}, lr=0.5)
        store.append_fingerprints(0, 0, digests(nn.ParameterDict(tensors)))
    return tmp_path


def numbers_in(folder: Path) -> list[float]:
    return [float(one[0, 0]) for _, one in sorted(saved_models.tensors_in(folder).items())]


OLD, NEW = [0.0, 1.0, 2.0], [0.5, 1.5, 2.5]


class Disturbed:
    """The module `os`, which does something at a call of one function, before it."""

    def __init__(self, name: str, number: int, act: Callable[[], None]) -> None:
        self._name, self._left, self._act = name, number, act

    def __getattr__(self, name: str) -> Any:
        plain = getattr(os, name)
        if name != self._name:
            return plain

        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self._act()
            return plain(*arguments, **options)

        return call


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("call", ["link", "replace"])
def test_ctrl_c_while_files_are_renamed_comes_when_all_of_them_are(
    in_files: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    monkeypatch.setattr(publish, "os", Disturbed(call, number, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt) as told:
        timstore.rollback(in_files / "model", [1], in_files / "s", in_place=True)
    assert numbers_in(in_files / "model") == NEW
    assert told.value.report.samples == (1,)
    assert not list((in_files / "model").glob(".*"))


def killed(in_files: Path, call: str, number: int) -> None:
    """Roll back in place in another process, which is killed before a call."""
    if (process := os.fork()) == 0:
        publish.os = Disturbed(call, number, lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[assignment]
        try:
            timstore.rollback(in_files / "model", [1], in_files / "s", in_place=True)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize(
    ("call", "number", "left"),
    [("pwrite", 1, OLD), ("link", 2, OLD), ("replace", 1, OLD), ("replace", 2, None), ("replace", 3, None)],
)
def test_a_rollback_in_place_that_was_killed_is_taken_up_by_the_next(
    in_files: Path, call: str, number: int, left: list[float] | None
) -> None:
    killed(in_files, call, number)
    assert left is None or numbers_in(in_files / "model") == left
    before = saved_models.files_in(in_files / "model")
    if left is None:
        with pytest.raises(timstore.StateError, match="mixture of two models"):
            timstore.rollback(in_files / "model", [1], in_files / "s", output=in_files / "out")
        assert saved_models.files_in(in_files / "model") == before
    with pytest.warns(timstore.TimstoreWarning, match="cut off"):
        report = timstore.rollback(in_files / "model", [1], in_files / "s", in_place=True)
    assert numbers_in(in_files / "model") == NEW
    assert any("were put back first" in one for one in report.warnings) == (left is None)
    # What the killed one left is never put over the new files.
    with pytest.raises(timstore.StateError, match="removed from this model before"):
        timstore.rollback(in_files / "model", [1], in_files / "s", in_place=True)
    assert numbers_in(in_files / "model") == NEW


def test_files_that_were_saved_over_a_mixture_are_never_replaced_by_what_was_left(in_files: Path) -> None:
    saved = {path.name: path.read_bytes() for path in (in_files / "model").iterdir()}
    killed(in_files, "replace", 2)
    for name, data in saved.items():
        (in_files / "model" / name).unlink()
        (in_files / "model" / name).write_bytes(data)
    with pytest.warns(timstore.TimstoreWarning, match="cut off"):
        timstore.rollback(in_files / "model", [1], in_files / "s", in_place=True)
    assert numbers_in(in_files / "model") == NEW
