"""A checkpoint rolled back on disk has the bits of the model rolled back in memory and saved; the rest stays."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import saved_models as made
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import timstore

pytestmark = pytest.mark.filterwarnings("ignore:first order only:timstore.TimstoreWarning")


of_peft = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("SGD", torch.float64), ("SGD", torch.float16), ("AdamW", torch.float32), ("AdamW", torch.bfloat16)],
    ids=str,
)
def test_a_file_gets_the_bits_of_the_model_in_memory(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = made.llama().to(dtype)
    made.record(tmp_path / "s", model, OPTIMIZERS[kind](model))
    path, output = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(model.state_dict(), path, metadata={"format": "pt", "note": "kept"})
    path.chmod(0o640)
    wanted = made.in_memory(model, tmp_path / "s", [3, 5])
    before = path.read_bytes()
    report = timstore.rollback(path, [3, 5], store=tmp_path / "s", output=output)
    assert made.all_bits(load_file(output)) == made.all_bits(model.state_dict())
    assert made.places_in(output)[0] == made.places_in(path)[0]
    assert path.read_bytes() == before
    assert output.stat().st_mode == path.stat().st_mode
    assert (report.rollback_id, report.method, report.rounding) == (wanted.rollback_id, wanted.method, wanted.rounding)
    assert report.delta_norm == pytest.approx(wanted.delta_norm) and report.delta_norm > 0
    assert "21 of 21 tensors in 1 of 1 files change; written to" in str(report)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Path]:
    return made.in_several_files(tmp_path_factory.mktemp("sharded"))


@pytest.fixture
def sharded(template: tuple[nn.Module, Path, Path], tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    """A recorded model, its store and its folder, in several files beside others."""
    model, store, path = template
    return copy.deepcopy(model), shutil.copytree(store, tmp_path / "s"), shutil.copytree(path, tmp_path / "model")


def test_a_folder_of_several_files_is_copied_whole(sharded: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    model, store, path = sharded
    before, output = made.files_in(path), tmp_path / "out"
    output.mkdir()  # an empty one may be there
    report = timstore.rollback(path, [3], store=store, output=output)
    made.in_memory(model, store, [3], force=True)
    assert made.all_bits(made.tensors_in(output)) == made.all_bits(model.state_dict())
    assert made.files_in(path) == before
    after = made.files_in(output)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {name for name in after if "-of-" in name}
    assert (output / "original" / "notes.md").stat().st_mode & 0o777 == 0o600
    assert report.checkpoint is not None
    assert sorted(one.name for one in tmp_path.iterdir()) == ["memory-s", "model", "out", "s"]


def test_other_weights_in_a_folder_are_copied_and_warned_of(
    sharded: tuple[nn.Module, Path, Path], tmp_path: Path
) -> None:
    _, store, path = sharded
    harmless = ("training_args.bin", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "tokenizer.model")
    for name in harmless:
        (path / name).write_bytes(b"kept")
    assert not any("may hold" in one for one in timstore.rollback(path, [3], store, dry_run=True).warnings)
    inner = path / "checkpoint-2"
    inner.mkdir()
    shutil.copy(next(path.glob("*.safetensors")), inner / "model.safetensors")
    others = ("pytorch_model.bin", "optimizer.pt", "consolidated.00.pth", "consolidated.safetensors")
    for name in (*others, "model.fp16.safetensors"):
        (path / name).write_bytes(b"old")
    said = r"model holds 6 other files of weights .*\(the first is consolidated.00.pth\),.* may hold the samples still"
    with pytest.warns(timstore.TimstoreWarning, match=said) as caught:
        report = timstore.rollback(path, [3], store, output=tmp_path / "out")
    assert [str(one.message) for one in caught if "may hold" in str(one.message)] == [report.warnings[-1]]
    assert (tmp_path / "out" / "pytorch_model.bin").read_bytes() == b"old"
    with pytest.warns(timstore.TimstoreWarning, match=said):
        timstore.rollback(path, [3], store, in_place=True, force=True)


def test_what_does_not_change_is_the_same_to_the_byte(sharded: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    _, store, path = sharded
    name = "model.layers.1.mlp.up_proj.weight"
    report = timstore.rollback(path, [3], store=store, output=tmp_path / "out", parameters=[name])
    before, after = made.files_in(path), made.files_in(tmp_path / "out")
    changed = [file for file in before if before[file] != after[file]]
    assert len(changed) == 1
    old, new = (made.places_in(folder / changed[0]) for folder in (path, tmp_path / "out"))
    assert old[0] == new[0]
    assert [one for one in old[1] if old[1][one] != new[1][one]] == [name]
    assert "1 of 21 tensors in 1 of" in str(report)


def test_tensors_of_any_dtype_are_copied_and_refused_only_when_they_must_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {"weight": torch.randn(4, 6), "bias": torch.randn(4)}, lr=0.5)
    held = {
        **model.state_dict(),
        "small": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "scale": torch.tensor(2.0),
        "empty": torch.zeros(0, 5),
        "count": torch.arange(5),
    }
    path, output = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_file(held, path)
    timstore.rollback(path, [1], store=tmp_path / "s", output=output)
    old, new = made.places_in(path), made.places_in(output)
    assert old[0] == new[0]
    assert {name for name in held if old[1][name] != new[1][name]} == {"weight", "bias"}
    output.unlink()
    save_file({**held, "bias": held["bias"].to(torch.float8_e5m2)}, path)
    with pytest.raises(timstore.FormatError, match=r"tensor bias of .* has dtype F8_E5M2; F64, F32, F16, BF16 can be"):
        timstore.rollback(path, [1], store=tmp_path / "s", output=output, force=True)
    # The store holds no fingerprints, and this file is not the one that was rolled back.
    with pytest.warns(timstore.TimstoreWarning, match="cannot be told"):
        timstore.rollback(path, [1], store=tmp_path / "s", output=output, parameters=["weight"])
    assert [name for name in held if made.places_in(path)[1][name] != made.places_in(output)[1][name]] == ["weight"]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A recorded model with tied weights, and its store."""
    model, store = made.llama(tie_word_embeddings=True), tmp_path_factory.mktemp("tied") / "s"
    made.record(store, model)
    return model, store


def saved_by_transformers(model: Any, path: Path) -> None:
    model.save_pretrained(path)


def saved_under_the_other_name(model: Any, path: Path) -> None:
    path.mkdir()
    save_model(model, str(path / "model.safetensors"))  # notes in the metadata which name stands for which


def saved_under_the_other_name_without_a_note(model: Any, path: Path) -> None:
    held = dict(model.state_dict())
    del held["model.embed_tokens.weight"]
    path.mkdir()
    save_file(held, path / "model.safetensors")


def saved_under_both_names(model: Any, path: Path) -> None:
    path.mkdir()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path / "model.safetensors")


@pytest.mark.parametrize(
    "save",
    [
        saved_by_transformers,
        saved_under_the_other_name,
        saved_under_the_other_name_without_a_note,
        saved_under_both_names,
    ],
)
def test_tied_weights_are_found_under_either_name_and_changed_under_both(
    tied: tuple[nn.Module, Path], tmp_path: Path, save: Callable[[Any, Path], None]
) -> None:
    path, output = tmp_path / "model", tmp_path / "out"
    model, store = copy.deepcopy(tied[0]), shutil.copytree(tied[1], tmp_path / "s")
    save(model, path)
    report = timstore.rollback(path, [3], store=store, output=output)
    assert report.rollback_id == made.in_memory(model, store, [3], force=True).rollback_id
    found, wanted = made.tensors_in(output), model.state_dict()
    assert found.keys() == made.tensors_in(path).keys()
    assert made.all_bits(found) == made.all_bits({name: wanted[name] for name in found})
    assert ("lm_head.weight is tied to" in str(report)) == (save is saved_under_both_names)


@of_peft
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_an_adapter_is_rolled_back_without_the_model_under_it(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    model, path, output = peft.get_peft_model(made.llama(), lora), tmp_path / "adapter", tmp_path / "out"
    made.record(tmp_path / "s", model, capture="per-sample" if "use_dora" in options else "modules")
    model.save_pretrained(path)
    report = timstore.rollback(path, [3], store=tmp_path / "s", output=output)
    assert "are taken to be as they were recorded" in str(report)
    assert report.rollback_id == made.in_memory(model, tmp_path / "s", [3], force=True).rollback_id
    model.save_pretrained(tmp_path / "wanted")
    assert made.all_bits(made.tensors_in(output)) == made.all_bits(made.tensors_in(tmp_path / "wanted"))
    assert made.all_bits(made.tensors_in(output)) != made.all_bits(made.tensors_in(path))
    assert made.files_in(output).keys() == made.files_in(path).keys()


def test_a_bare_model_is_found_in_one_with_a_head_and_the_other_way_round(tmp_path: Path) -> None:
    whole = made.llama()
    made.record(tmp_path / "bare", whole.model)
    whole.save_pretrained(tmp_path / "whole")
    timstore.rollback(tmp_path / "whole", [3], store=tmp_path / "bare", output=tmp_path / "out")
    made.in_memory(whole.model, tmp_path / "bare", [3], force=True)
    assert made.all_bits(made.tensors_in(tmp_path / "out")) == made.all_bits(whole.state_dict())

    tied = made.llama(tie_word_embeddings=True)
    made.record(tmp_path / "headed", tied)
    tied.model.save_pretrained(tmp_path / "inner")
    timstore.rollback(tmp_path / "inner", [3], store=tmp_path / "headed", output=tmp_path / "inner-out")
    made.in_memory(tied, tmp_path / "headed", [3], force=True)
    assert made.all_bits(made.tensors_in(tmp_path / "inner-out")) == made.all_bits(tied.model.state_dict())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "transformer.h."])
def test_a_prefix_before_all_names_is_seen_through_either_way(tmp_path: Path, prefix: str) -> None:
    names = {"0.weight": (2, 3), "0.bias": (2,), "1.weight": (3, 2)}
    held = {name: torch.zeros(shape) for name, shape in names.items()}
    for recorded, saved in (("", prefix), (prefix, "")):
        store, path, output = (tmp_path / f"{recorded}{what}" for what in ("s", "a.safetensors", "out"))
        with timstore.open(store) as opened:
            opened.append(0, 0, 1, {recorded + name: torch.ones(shape) for name, shape in names.items()}, lr=0.5)
        save_file({saved + name: tensor for name, tensor in held.items()} | {"other.weight": torch.zeros(2, 3)}, path)
        timstore.rollback(path, [1], store, output=output)
        found = load_file(output)
        assert not found["other.weight"].any()
        assert all(found[saved + name].eq(0.5).all() for name in names)


def test_in_place_replaces_the_files_that_change_and_nothing_else(
    sharded: tuple[nn.Module, Path, Path], tmp_path: Path
) -> None:
    model, store, path = sharded
    before, numbers = made.files_in(path), {one.name: one.stat().st_ino for one in path.iterdir()}
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    report = timstore.rollback(path, [3], store=store, in_place=True, parameters=names)
    made.in_memory(model, store, [3], force=True, parameters=names)
    assert made.all_bits(made.tensors_in(path)) == made.all_bits(model.state_dict())
    after = made.files_in(path)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert len(changed) == 2
    assert {one.name for one in path.iterdir() if one.stat().st_ino != numbers[one.name]} == changed
    assert "written over the input" in str(report)


def test_a_single_file_is_replaced_in_place(tmp_path: Path) -> None:
    model, path = made.llama(), tmp_path / "model.safetensors"
    made.record(tmp_path / "s", model)
    save_file(model.state_dict(), path)
    timstore.open(tmp_path / "s").rollback(str(path), [3], in_place=True)
    made.in_memory(model, tmp_path / "s", [3], force=True)
    assert made.all_bits(load_file(path)) == made.all_bits(model.state_dict())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["memory-s", "model.safetensors", "s"]


def test_the_same_samples_are_refused_twice_on_disk_and_in_memory(
    sharded: tuple[nn.Module, Path, Path], tmp_path: Path
) -> None:
    model, store, path = sharded
    first = timstore.rollback(path, [3], store=store, output=tmp_path / "out")
    with pytest.raises(timstore.StateError, match="removed from this model before"):
        timstore.rollback(tmp_path / "out", [3], store=store, output=tmp_path / "again")
    assert not (tmp_path / "again").exists()
    model.load_state_dict(made.tensors_in(tmp_path / "out"))
    with pytest.raises(timstore.StateError, match="removed from this model before"):
        timstore.rollback(model, [3], store=store)
    second = timstore.rollback(tmp_path / "out", [3, 4], store=store, output=tmp_path / "again")
    assert (second.samples, second.left_out) == ((4,), first.records)
    assert "1 samples removed before" in second.model
    with timstore.open(store, "r") as opened:
        rows = opened.sql('SELECT samples, digest_before, digest_after FROM rollbacks ORDER BY "at"').fetchall()
    assert [row[0] for row in rows] == [[3], [4]]
    assert rows[0][2] == rows[1][1] == first.rollback_id
    assert rows[1][2] == second.rollback_id


def test_dry_run_computes_and_writes_nothing(sharded: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    _, store, path = sharded
    before = made.files_in(tmp_path)
    with timstore.open(store, "r") as opened:
        report = opened.rollback(path, [3], dry_run=True)
    assert "written nowhere" in str(report)
    assert made.files_in(tmp_path) == before
    timstore.rollback(path, [3], store=store, dry_run=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(timstore.AlreadyExistsError):
        timstore.rollback(path, [3], store=store, dry_run=True, output=store)
    assert timstore.rollback(path, [3], store=store, output=tmp_path / "out").rollback_id == report.rollback_id
    with timstore.open(store, "r") as opened, pytest.raises(timstore.ReadOnlyError):
        opened.rollback(path, [3], output=tmp_path / "out2")


def test_less_memory_changes_no_more_than_the_order_of_sums(
    sharded: tuple[nn.Module, Path, Path], tmp_path: Path
) -> None:
    _, store, path = sharded
    for limit in ("512MB", "17 MiB"):
        timstore.rollback(path, [3], store=store, output=tmp_path / limit, memory_limit=limit)
    for one, other in zip(*(made.tensors_in(tmp_path / limit).values() for limit in ("512MB", "17 MiB")), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)


def test_exact_replay_needs_no_model(tmp_path: Path) -> None:
    model = made.llama()
    made.record(tmp_path / "s", model, OPTIMIZERS["AdamW"](model), optimizer_history="gradients")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    report = timstore.rollback(
        tmp_path / "a.safetensors", [3], store=tmp_path / "s", output=tmp_path / "out.safetensors"
    )
    assert report.method == "exact replay"
    wanted = made.in_memory(model, tmp_path / "s", [3], force=True)
    assert report.replay_off == pytest.approx(wanted.replay_off, rel=1e-9)
    assert made.all_bits(load_file(tmp_path / "out.safetensors")) == made.all_bits(model.state_dict())


def test_a_store_within_the_folder_does_no_harm(sharded: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    model, store, path = sharded
    shutil.move(store, path / "run.tim")
    timstore.rollback(path, [3], store=path / "run.tim", output=tmp_path / "out")
    assert made.rolled_back(path / "run.tim") == 1
    assert made.rolled_back(tmp_path / "out" / "run.tim") == 0
    made.in_memory(model, path / "run.tim", [3], force=True)
    assert made.all_bits(made.tensors_in(tmp_path / "out")) == made.all_bits(model.state_dict())
