"""A checkpoint rolled back with a probe: the model is loaded, or given, and asked."""

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import saved_models as made
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import timstore

pytestmark = pytest.mark.filterwarnings("ignore:first order only:timstore.TimstoreWarning")


of_peft = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

PROBE = [{"input_ids": made.tokens(4, seed=9)}, {"input_ids": made.tokens(4, seed=10)}]


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    return made.in_several_files(tmp_path)


def test_with_a_probe_transformers_loads_the_model_to_filter(
    sharded: tuple[nn.Module, Path, Path], tmp_path: Path
) -> None:
    model, store, path = sharded
    report = timstore.rollback(path, [3], store=store, output=tmp_path / "out", probe=PROBE)
    wanted = made.in_memory(model, store, [3], force=True, probe=PROBE)
    assert report.method == wanted.method == "closed form + probe"
    assert report.probe == wanted.probe
    assert report.warnings == wanted.warnings == ()
    assert made.all_bits(made.tensors_in(tmp_path / "out")) == made.all_bits(model.state_dict())


@pytest.mark.filterwarnings("ignore:the probe's own loss rose")  # of a run of four steps
@pytest.mark.parametrize("probe", [PROBE, "auto"])
def test_without_being_asked_no_model_is_loaded_and_the_warning_names_the_probe_that_is_kept(
    probe: Any, tmp_path: Path
) -> None:
    model = made.llama()
    made.record(tmp_path / "s", model, probe=probe)
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(timstore.TimstoreWarning, match='first order only.*probe="auto", what the store keeps'):
        report = timstore.rollback(tmp_path / "model", [3], store=tmp_path / "s", dry_run=True)
    assert report.method == "closed form"
    with timstore.open(tmp_path / "s") as store:
        asked = store.rollback(tmp_path / "model", [3], probe="auto", dry_run=True)
        assert asked.rollback_id == store.rollback(model, [3], dry_run=True).rollback_id
        # A model that is there is asked, as one in memory is.
        given = store.rollback(tmp_path / "model", [3], model=made.llama(), dry_run=True)
        assert given.probe == asked.probe is not None


class Scaled(nn.Module):
    """A net with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.outer = nn.Linear(8, 3)
        self.register_buffer("factor", torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x) * self.factor))  # type: ignore[no-any-return]


def test_a_given_model_gets_the_files_parameters_and_buffers_and_is_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Scaled(), tmp_path / "a.safetensors"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s") as store, store.record(model, optimizer):
        for _ in range(3):
            model(torch.randn(4, 4), sample_ids=[1, 2, 3, 4]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    model.factor.fill_(3.0)
    save_file(model.state_dict(), path)
    probe, other, output = [torch.randn(8, 4), torch.randn(8, 4)], Scaled(), tmp_path / "out.safetensors"
    report = timstore.rollback(path, [1], store=tmp_path / "s", output=output, probe=probe, model=other)
    assert made.all_bits(other.state_dict()) == made.all_bits(model.state_dict())  # it was asked, and not changed
    assert report.probe == made.in_memory(model, tmp_path / "s", [1], force=True, probe=probe).probe
    assert made.all_bits(load_file(output)) == made.all_bits(model.state_dict())
    with pytest.raises(timstore.InvalidInputError, match=r"no config.json that names its class: pass model="):
        timstore.rollback(path, [1], store=tmp_path / "s", dry_run=True, probe=probe)
    with pytest.raises(timstore.ModelMismatchError, match=r"inner.weight of the model is .*\(2, 4\); tensor"):
        other.inner = nn.Linear(4, 2)
        timstore.rollback(path, [1], store=tmp_path / "s", dry_run=True, probe=probe, model=other)
    with pytest.raises(timstore.ModelMismatchError, match=r"\(Sequential\) has no parameter inner.bias"):
        timstore.rollback(path, [1], store=tmp_path / "s", dry_run=True, probe=probe, model=nn.Sequential())


@of_peft
def test_an_adapter_is_filtered_through_the_model_that_is_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model, path = peft.get_peft_model(made.llama(), lora), tmp_path / "adapter"
    made.record(tmp_path / "s", model)
    model.save_pretrained(path)
    with pytest.raises(
        timstore.InvalidInputError, match="is an adapter, and a probe asks the whole model: pass model="
    ):
        timstore.rollback(path, [3], store=tmp_path / "s", dry_run=True, probe=PROBE)
    other = peft.get_peft_model(made.llama(), lora)
    options = {"probe": PROBE, "force": True}
    report = timstore.rollback(path, [3], store=tmp_path / "s", dry_run=True, model=other, **options)
    assert report.rollback_id == made.in_memory(model, tmp_path / "s", [3], **options).rollback_id
    torch.manual_seed(5)
    another = peft.get_peft_model(made.llama(), lora)
    with torch.no_grad():
        another.base_model.model.lm_head.weight.add_(1)
    with pytest.raises(timstore.ModelMismatchError, match=r"lm_head.weight of the model .* has not the bits"):
        timstore.rollback(path, [3], store=tmp_path / "s", dry_run=True, model=another, **options)


def test_a_folder_that_transformers_cannot_load_says_so(sharded: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    _, store, path = sharded
    config = path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "NoSuchModel"))
    with pytest.raises(timstore.InvalidInputError, match=r"names NoSuchModel, which transformers does not know"):
        timstore.rollback(path, [3], store=store, dry_run=True, probe=PROBE)
    config.write_text(config.read_text().replace("NoSuchModel", "LlamaModel"))
    with pytest.raises(timstore.ModelMismatchError, match=r"the model \(LlamaModel\) has no parameter lm_head.weight"):
        timstore.rollback(path, [3], store=store, dry_run=True, probe=PROBE)
    config.write_text("{")
    with pytest.raises(timstore.FormatError, match=r"config.json is no JSON"):
        timstore.rollback(path, [3], store=store, dry_run=True, probe=PROBE)
    assert sorted(os.listdir(tmp_path)) == ["model", "s"]
