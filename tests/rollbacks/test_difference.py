"""A model that is not the recorded one is told apart by what was done to it: another dtype, an adapter merged."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from coverage_cases import llama
from networks import network, sgd, train
from torch import nn

import timstore
from timstore.errors import ModelMismatchError

pytestmark = [
    pytest.mark.filterwarnings("ignore:first order"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, in peft
]

TOKENS = torch.randint(0, 60, (4, 6), generator=torch.Generator().manual_seed(0))


def recorded(model: nn.Module, path: Path) -> None:
    optimizer = sgd(model)
    with timstore.open(path) as store, store.record(model, optimizer):
        train(model, optimizer, [1, 2], [3, 4])


def record_texts(model: nn.Module, path: Path) -> None:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    with timstore.open(path) as store, store.record(model, optimizer) as recorder:
        recorder.batch([1, 2, 3, 4])
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()


def refused(model: nn.Module, path: Path) -> str:
    with pytest.raises(ModelMismatchError) as caught:
        timstore.rollback(model, [1], path)
    return str(caught.value)


def adapted(name: str = "default", base: Callable[[], nn.Module] = llama, **options: object) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(base(), config, adapter_name=name)


@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_dtype_is_told_both(loaded: torch.dtype, tmp_path: Path) -> None:
    model = network()
    recorded(model, tmp_path / "s")
    other = copy.deepcopy(model).to(loaded)
    name = str(loaded).removeprefix("torch.")
    same = ", of the same numbers" if loaded == torch.float64 else ""
    words = f"Parameter 0.bias is {name}, and float32 was recorded{same}: load the model in the precision"
    said = refused(other, tmp_path / "s")
    assert words in said
    assert "torch_dtype=float32" in said
    assert all(one.dtype == loaded for one in other.parameters())
    timstore.rollback(model, [1], tmp_path / "s")


def test_a_model_that_was_trained_in_half_precision_and_loaded_in_full(tmp_path: Path) -> None:
    model = network().bfloat16()
    optimizer = sgd(model)
    with timstore.open(tmp_path / "s") as store, store.record(model, optimizer):
        model(torch.randn(2, 4).bfloat16(), sample_ids=[1, 2]).float().square().mean().backward()
        optimizer.step()
    said = refused(copy.deepcopy(model).float(), tmp_path / "s")
    assert "is float32, and bfloat16 was recorded, of the same numbers" in said


def test_an_undo_says_it_too(tmp_path: Path) -> None:
    model = network()
    recorded(model, tmp_path / "s")
    report = timstore.rollback(model, [1], tmp_path / "s", keep_delta=True)
    with timstore.open(tmp_path / "s") as store:
        with pytest.raises(ModelMismatchError, match="is float64, and float32 was recorded"):
            store.undo(copy.deepcopy(model).double(), report.rollback_id)
        store.undo(model, report.rollback_id)


def test_a_frozen_base_in_another_dtype_is_found_by_its_numbers(tmp_path: Path) -> None:
    model = adapted(base=lambda: llama().bfloat16())
    record_texts(model, tmp_path / "s")
    other = copy.deepcopy(model).float()
    for name, one in other.named_parameters():
        if "lora_" in name:
            one.data = dict(model.named_parameters())[name].data
    said = refused(other, tmp_path / "s")
    assert "is float32, and bfloat16 was recorded, of the same numbers" in said


def test_another_model_of_the_same_dtype_is_just_another(tmp_path: Path) -> None:
    recorded(network(), tmp_path / "s")
    assert refused(network(seed=1), tmp_path / "s").endswith("cannot be rolled back")


def test_a_merged_adapter_is_named(tmp_path: Path) -> None:
    model = adapted("person")
    record_texts(model, tmp_path / "s")
    merged = copy.deepcopy(model).merge_and_unload()
    said = refused(merged, tmp_path / "s")
    assert "is the LoRA adapter 'person' (base_model" in said
    assert "merged into the weights, or never loaded. Load the base model with the adapter" in said
    in_place = copy.deepcopy(model)
    in_place.merge_adapter()
    assert "An adapter is merged into its weights: load it again" in refused(in_place, tmp_path / "s")
    timstore.rollback(model, [1], tmp_path / "s")


def test_a_merged_checkpoint_is_told_of_the_adapter(tmp_path: Path) -> None:
    model = adapted()
    record_texts(model, tmp_path / "s")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    with pytest.raises(ModelMismatchError, match=r"the LoRA adapter 'default'.*merged into the weights"):
        timstore.rollback(tmp_path / "merged", [1], tmp_path / "s", output=tmp_path / "out")


def test_an_adapter_under_another_name_is_told_so(tmp_path: Path) -> None:
    record_texts(adapted("person"), tmp_path / "s")
    said = refused(adapted("default"), tmp_path / "s")
    assert "the LoRA adapter 'person'" in said
    assert "this model has 'default': load it under the recorded name" in said


def test_an_adapter_in_a_store_without_digests_is_named_as_well(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 1, {"q_proj.lora_a.weight": torch.ones(2, 4)}, lr=0.1)
    said = refused(nn.Linear(4, 4), tmp_path / "s")
    assert "is a LoRA adapter (q_proj.lora_a.weight), and this model has none" in said
