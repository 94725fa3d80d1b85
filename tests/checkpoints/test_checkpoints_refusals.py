"""What cannot be right is refused in sentences of ours; there is no output then, nothing beside it, and no row."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saved_models as made
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import timstore
from timstore.checkpoints.discover import opened
from timstore.checkpoints.patch import CheckpointTarget

pytestmark = pytest.mark.filterwarnings("ignore:first order only:timstore.TimstoreWarning")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store `s`, the file `a.safetensors` and the same model in the folder `model`."""
    root = tmp_path_factory.mktemp("recorded")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(root / "s") as store, store.record(model, optimizer) as recorder:
        for ids in ([1, 2], [3, 4], [1, 4]):
            recorder.batch(ids)
            model(torch.randn(len(ids), 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    save_file(model.state_dict(), root / "a.safetensors")
    (root / "model").mkdir()
    halves = {"one": ["0.weight", "0.bias"], "two": ["2.weight", "2.bias"]}
    for name, members in halves.items():
        held = {member: model.state_dict()[member] for member in members}
        save_file(held, root / "model" / f"{name}.safetensors")
    places = {member: f"{name}.safetensors" for name, members in halves.items() for member in members}
    (root / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (root / "model" / "config.json").write_text("{}")
    return root


@pytest.fixture
def recorded(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "recorded"))


def refused(folder: Path, error: type[Exception], match: str, path: str = "a.safetensors", **options: Any) -> None:
    """Hold a rollback to fail and to leave everything below the folder as it was."""
    before = made.files_in(folder)
    if not options.keys() & {"output", "in_place"}:
        options["output"] = folder / "out"
    with pytest.raises(error, match=match):
        timstore.rollback(folder / path, [1], store=folder / "s", **options)
    assert made.files_in(folder) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"output": None}, "say where the checkpoint goes"),
        ({"in_place": True, "output": "out"}, "and not both"),
        ({"optimizer": object()}, "optimizer= goes along with a model in memory"),
        ({"keep_delta": True}, "of a checkpoint keep the input"),
        ({"memory_limit": "much"}, "memory_limit"),
        ({"memory_limit": 1600}, "header has .* bytes, more than memory_limit leaves for it"),
        ({"strength": 2}, "strength"),
        ({"in_place": "no"}, "in_place is True or False, not 'no'"),
        ({"dry_run": "no"}, "dry_run is True or False, not 'no'"),
        ({"keep_delta": "no"}, "keep_delta is True or False, not 'no'"),
        ({"force": 1}, "force is True or False, not 1"),
        ({"where": "true"}, "say what to remove"),
        ({"probe": []}, r"no config.json that names its class"),
        ({"probe": [torch.ones(1, 4)], "model": "a"}, "model is a torch.nn.Module, not str"),
    ],
)
def test_arguments(recorded: Path, options: dict[str, Any], match: str) -> None:
    refused(recorded, timstore.InvalidInputError, match, **options)


def test_arguments_of_the_other_kind_of_target(recorded: Path) -> None:
    for options in ({"output": "out"}, {"in_place": True}, {"model": nn.Linear(1, 1)}):
        with pytest.raises(timstore.InvalidInputError, match="are for checkpoints; a model in memory is changed there"):
            timstore.rollback(nn.Linear(2, 2), [1], store=recorded / "s", **options)
    for name in ("in_place", "dry_run", "force", "keep_delta"):
        with pytest.raises(timstore.InvalidInputError, match=f"{name} is True or False, not 'no'"):
            timstore.rollback(nn.Linear(2, 2), [1], store=recorded / "s", **{name: "no"})
    with pytest.raises(timstore.InvalidInputError, match="local files"):
        timstore.rollback("s3://bucket/model", [1], store=recorded / "s", output="out")


def test_outputs_that_are_there_already(recorded: Path) -> None:
    (recorded / "full").mkdir()
    (recorded / "full" / "mine").write_text("kept")
    (recorded / "empty").mkdir()
    (recorded / "dangling").symlink_to("nothing")
    exists = timstore.AlreadyExistsError
    refused(recorded, exists, "choose another output", output=recorded / "full" / "mine")
    refused(recorded, exists, "choose another output", output=recorded / "dangling")
    refused(recorded, exists, "choose another output", output=recorded / "empty")  # a folder, for a file
    refused(recorded, exists, "choose another output", path="model", output=recorded / "full")
    refused(recorded, exists, "is the checkpoint itself: in_place=True", output=recorded / "a.safetensors")
    refused(recorded, exists, "is the checkpoint itself: in_place=True", path="model", output=recorded / "model")
    within = "lies within .*model, of which it is a copy"
    refused(recorded, timstore.InvalidInputError, within, path="model", output=recorded / "model" / "out")
    refused(recorded, timstore.NotFoundError, "no such file or folder", output=recorded / "nowhere" / "out")


def test_an_output_that_appears_meanwhile_is_not_overwritten(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CheckpointTarget.places
    out = recorded / "out"

    def and_someone_else(self: CheckpointTarget, wanted: Any) -> Any:
        out.write_text("mine")
        return plain(self, wanted)

    monkeypatch.setattr(CheckpointTarget, "places", and_someone_else)
    with pytest.raises(timstore.AlreadyExistsError, match="choose another output"):
        timstore.rollback(recorded / "a.safetensors", [1], store=recorded / "s", output=out)
    assert out.read_text() == "mine"
    assert not list(recorded.glob(".*"))


def test_an_input_that_changes_meanwhile_is_noticed(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CheckpointTarget.places

    def and_someone_else(self: CheckpointTarget, wanted: Any) -> Any:
        os.utime(recorded / "model" / "two.safetensors")
        return plain(self, wanted)

    monkeypatch.setattr(CheckpointTarget, "places", and_someone_else)
    refused(recorded, timstore.StateError, r"two.safetensors changed while it was rolled back", path="model")


def test_a_folder_without_permission(nobody: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        root = Path(folder)
        root.chmod(0o755)
        with timstore.open(root / "s") as store:
            store.append(0, 0, 1, {"w": torch.ones(3)}, lr=0.1)
        (root / "in").mkdir()
        save_file({"w": torch.zeros(3)}, root / "in" / "a.safetensors")
        (root / "in" / "a.safetensors").chmod(0o644)
        (root / "closed").mkdir()
        for name in ("in", "closed"):
            (root / name).chmod(0o555)
        before = made.files_in(root)
        nobody(root / "s")
        with timstore.open(root / "s") as store:
            for options in ({"output": root / "closed" / "out"}, {"in_place": True}):
                with pytest.raises(timstore.ReadOnlyError, match="is not writable for this process"):
                    store.rollback(root / "in" / "a.safetensors", [1], **options)
            assert store.sql("FROM rollbacks").fetchall() == []
        if os.getuid() == 0:
            os.seteuid(0)
        for name in ("in", "closed"):
            (root / name).chmod(0o755)
        assert made.files_in(root) == before


def test_links_are_read_and_not_replaced(recorded: Path) -> None:
    (recorded / "link.safetensors").symlink_to("a.safetensors")
    refused(recorded, timstore.InvalidInputError, "is a link to .*a.safetensors", "link.safetensors", in_place=True)
    (recorded / "model" / "cache").symlink_to(recorded / "s")
    refused(recorded, timstore.InvalidInputError, "cache is a link to a folder", "model")
    out = recorded / "out.safetensors"
    timstore.rollback(recorded / "link.safetensors", [1], store=recorded / "s", output=out)
    assert not out.is_symlink()


def saved(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    held = load_file(path)
    change(held)
    save_file(held, path)


def test_another_model(recorded: Path) -> None:
    path, mismatch = recorded / "a.safetensors", timstore.ModelMismatchError
    whole = load_file(path)
    saved(path, lambda held: held.update({"2.weight": torch.zeros(3, 7)}))
    shapes = (
        r"tensor 2.weight of .*a.safetensors has shape \(3, 7\); parameter 2.weight was recorded with shape \(3, 6\)"
    )
    refused(recorded, mismatch, shapes)
    saved(path, lambda held: held.pop("2.weight"))
    refused(recorded, mismatch, r"no tensor for parameter 2.weight \(1 of 4 recorded ones are missing\)")
    save_file({"x": torch.zeros(2)}, path)
    refused(
        recorded, mismatch, r"holds no recorded parameter: 0.bias, 0.weight, 2.bias, ... were recorded, and it has x"
    )
    save_file({**whole, "0.weight": whole["0.weight"] + 1e-3}, path)
    refused(recorded, mismatch, "none that the store recorded")
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in whole.items()}, path)
    refused(recorded, mismatch, r"Tensor 0.bias has dtype BF16, and float32 was recorded: roll back the checkpoint in")


def test_names_that_could_be_several(recorded: Path) -> None:
    whole = load_file(recorded / "a.safetensors")
    both = {f"{prefix}.{name}": tensor.clone() for prefix in ("one", "two") for name, tensor in whole.items()}
    save_file(both, recorded / "a.safetensors")
    match = r"parameter 0.bias could be tensor one.0.bias of .* as well as two.0.bias"
    refused(recorded, timstore.ModelMismatchError, match)


def test_a_tied_weight_that_nothing_makes_certain(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {"embed.weight": torch.ones(5, 2), "norm": torch.ones(2)}, lr=0.1)
    save_file({"head.weight": torch.zeros(5, 2), "norm": torch.zeros(2)}, tmp_path / "a.safetensors")
    match = r"no tensor for parameter embed.weight .* it holds head.weight beside the others"
    refused(tmp_path, timstore.ModelMismatchError, match)
    save_file(
        {"head.weight": torch.zeros(5, 2), "norm": torch.zeros(2)},
        tmp_path / "a.safetensors",
        metadata={"embed.weight": "head.weight"},
    )
    timstore.rollback(tmp_path / "a.safetensors", [1], tmp_path / "s", output=tmp_path / "out")
    assert load_file(tmp_path / "out")["head.weight"].eq(torch.tensor(0.1)).all()


def test_pickles_and_folders_that_hold_none_or_too_many(recorded: Path) -> None:
    (recorded / "old").mkdir()
    torch.save({}, recorded / "old" / "pytorch_model.bin")
    pickled = r"pytorch_model.bin is pickled: .* Convert it: load the model, and save it with save_pretrained"
    refused(recorded, timstore.InvalidInputError, pickled, "old")
    refused(recorded, timstore.InvalidInputError, pickled, "old/pytorch_model.bin")
    (recorded / "empty").mkdir()
    refused(recorded, timstore.NotFoundError, "holds no safetensors file", "empty")
    refused(recorded, timstore.NotFoundError, "there is no such file or folder", "nowhere.safetensors")
    (recorded / "model" / "model.safetensors.index.json").unlink()
    refused(recorded, timstore.InvalidInputError, "holds one.safetensors, two.safetensors, and not one index", "model")
    os.mkfifo(recorded / "pipe.safetensors")
    with pytest.raises(timstore.InvalidInputError, match="is no plain file"):
        timstore.rollback(recorded / "pipe.safetensors", [1], recorded / "s", output=recorded / "out")


@pytest.mark.parametrize("options", [{}, {"in_place": True}, {"output": None, "dry_run": True}])
@pytest.mark.parametrize("other", ["model.safetensors", "adapter_model.safetensors"])
def test_two_sets_of_weights_that_loaders_could_take(recorded: Path, other: str, options: dict[str, Any]) -> None:
    save_file(load_file(recorded / "a.safetensors"), recorded / "model" / other)
    match = f"holds model.safetensors.index.json and {other}, two sets of weights.*: remove one of them, or pass the"
    refused(recorded, timstore.InvalidInputError, match, "model", **options)


def test_two_sets_by_the_index_and_by_the_configuration(recorded: Path) -> None:
    folder, two = recorded / "model", timstore.InvalidInputError
    whole = load_file(recorded / "a.safetensors")
    (folder / "config.json").write_text('{"transformers_weights": "best.safetensors"}')
    save_file(whole, folder / "best.safetensors")
    refused(recorded, two, "index.json and best.safetensors, two sets", "model")
    (folder / "model.safetensors.index.json").unlink()
    save_file(whole, folder / "model.safetensors")
    refused(recorded, two, "model.safetensors and best.safetensors, two sets", "model")
    (folder / "config.json").write_text('{"transformers_weights": "model.safetensors"}')
    with pytest.warns(timstore.TimstoreWarning, match="3 other files of weights .*first is best.safetensors"):
        timstore.rollback(folder, [1], recorded / "s", dry_run=True)
    # An index that names the file alone is one set; one that has a name of its own is beside the file of that name.
    (folder / "config.json").unlink()
    places = dict.fromkeys(whole, "model.safetensors")
    (folder / "net.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.warns(timstore.TimstoreWarning, match="3 other files of weights .*first is best.safetensors"):
        timstore.rollback(folder, [1], recorded / "s", dry_run=True)
    save_file(whole, folder / "net.safetensors")
    refused(recorded, two, "net.safetensors.index.json and net.safetensors, two sets", "model")


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        ("{", timstore.FormatError, "is no JSON"),
        ("[]", timstore.FormatError, "is no JSON object"),
        ("{}", timstore.FormatError, "has no weight_map"),
        ({"0.weight": 3}, timstore.FormatError, "has no weight_map"),
        ({"0.weight": "../s/x.safetensors"}, timstore.FormatError, "is no safetensors file beside it"),
        ({"0.weight": "model.bin"}, timstore.FormatError, "is no safetensors file beside it"),
        ({"0.weight": "three.safetensors"}, timstore.NotFoundError, "names three.safetensors, and there is no such"),
        ({"0.weight": "two.safetensors"}, timstore.FormatError, "says that tensor 0.weight lies in two.safetensors"),
        ({"0.weight": "one.safetensors"}, timstore.ModelMismatchError, "no tensor for parameter 2.bias"),
    ],
)
def test_an_index_that_is_wrong(recorded: Path, index: Any, error: type[Exception], match: str) -> None:
    text = index if isinstance(index, str) else json.dumps({"weight_map": index})
    (recorded / "model" / "model.safetensors.index.json").write_text(text)
    refused(recorded, error, match, "model")


def test_a_tensor_in_two_files_and_an_index_alone(recorded: Path) -> None:
    saved(recorded / "model" / "two.safetensors", lambda held: held.update({"0.bias": torch.zeros(6)}))
    refused(recorded, timstore.FormatError, "tensor 0.bias lies in one.safetensors and in two.safetensors", "model")
    index = "model/model.safetensors.index.json"
    refused(recorded, timstore.InvalidInputError, "is the index of a checkpoint: pass its folder", index)


def forged(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


WORDS = bytes(8)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header is said to have 0 bytes, and the file has 0"),
    "short": (b"\x02\0\0", "and the file has 3"),
    "no header": (bytes(8), "said to have 0 bytes"),
    "longer than the file": (forged({}, length=100), "said to have 100 bytes, and the file has 10"),
    "length of all ones": (forged({}, length=2**64 - 1), "said to have 18,446,744,073,709,551,615 bytes"),
    "no JSON": (forged(b"{nothing"), "is not JSON as the format wants it"),
    "no text": (forged(b"\xff\xfe{}"), "is not JSON as the format wants it"),
    "no object": (forged([]), "no JSON object"),
    "too deep": (forged(b"[" * 100_000), "is not JSON as the format wants it"),
    "a name twice": (forged(b'{"a": {}, "a": {}}'), "a name is given twice"),
    "metadata of numbers": (forged({"__metadata__": {"a": 1}}), "__metadata__ holds something else than text"),
    "no entry": (forged({"a": 3}), "tensor a is not described as dtype, shape and data_offsets"),
    "no shape": (forged({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "tensor a is not described"),
    "three offsets": (forged({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}), "tensor a is not described"),
    "negative": (forged({"a": entry(-4, 0)}), "tensor a is not described"),
    "negative shape": (forged({"a": entry(0, 4, (-1, -1))}), "tensor a is not described"),
    "a float": (forged({"a": entry(0, 4, (1.0,))}), "tensor a is not described"),
    "true": (forged({"a": entry(0, 4, (True,))}), "tensor a is not described"),
    "huge": (forged({"a": entry(0, 2**70)}), "tensor a is not described"),
    "dtype of a number": (forged({"a": entry(0, 4, dtype=7)}), "tensor a is not described"),
    "ends before it begins": (forged({"a": entry(4, 0)}, WORDS), "cannot take -4 bytes"),
    "beyond the end": (forged({"a": entry(0, 16, (4,))}, WORDS), r"tensor a lies at bytes .* of"),
    "shape of other bytes": (forged({"a": entry(0, 8, (3,))}, WORDS), r"shape \(3,\) cannot take 8 bytes"),
    "shape that overflows": (forged({"a": entry(0, 8, (2**62, 4))}, WORDS), "cannot take 8 bytes"),
    "overlap": (
        forged({"a": entry(0, 8, (2,)), "b": entry(4, 8)}, WORDS),
        "tensor b lies at .* the one before it ends at",
    ),
    "same place": (
        forged({"a": entry(0, 8, (2,)), "b": entry(0, 8, (2,))}, WORDS),
        "tensor b lies at .* the one before it ends at",
    ),
    "hole": (forged({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "tensor b lies at .* the one before it ends at"),
    "more at the end": (forged({"a": entry(0, 4)}, WORDS), "its tensors end at byte"),
    "cut off": (forged({"a": entry(0, 8, (2,))}, WORDS)[:-1], "tensor a lies at bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_whole(template: Path, tmp_path: Path, name: str) -> None:
    data, match = HOSTILE[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(timstore.FormatError, match=f"a.safetensors is no whole .*{match}.*Restore it"):
        timstore.rollback(path, [1], template / "s", output=tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.safetensors"] and path.read_bytes() == data


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(10**9 + 8)  # takes no room
    with pytest.raises(timstore.FormatError, match="said to have 1,000,000,000 bytes"), opened(path, 10**10):
        pass


def test_tensors_of_an_unknown_dtype_are_carried_along_unless_they_are_needed(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {"a": torch.ones(2)}, lr=0.1)
    both = {"a": entry(0, 8, (2,)), "new": entry(8, 13, (40,), "F1"), "half": entry(13, 15, (4,), "F4")}
    (tmp_path / "a.safetensors").write_bytes(forged(both, bytes(15)))
    timstore.rollback(tmp_path / "a.safetensors", [1], tmp_path / "s", output=tmp_path / "out")
    assert (tmp_path / "out").read_bytes()[-7:] == bytes(7)
    (tmp_path / "a.safetensors").write_bytes(forged({"a": entry(0, 8, (2,), "F1")}, bytes(8)))
    (tmp_path / "out").unlink()
    refused(tmp_path, timstore.FormatError, "tensor a of .* has dtype F1, which this version cannot compare")
