"""Small models that were recorded and saved, for rolling their checkpoints back."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import timstore
from timstore.rollbacks import RollbackReport

ROWS, LENGTH, VOCABULARY = 8, 6, 24


def llama(**changed: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changed}))


def tokens(rows: int = ROWS, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def record(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, probe: Any = False, **options: Any
) -> None:
    """Train a language model for four steps, and record it."""
    text = tokens()
    steps = optimizer or torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.2, momentum=0.9)
    with timstore.open(path) as store, store.record(model, steps, probe=probe, **options):
        for ids in torch.arange(ROWS).repeat(2).split(4):
            answer = model(input_ids=text[ids], sample_ids=ids)
            hidden = answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
            labels = text[ids] % hidden.shape[-1]
            nn.functional.cross_entropy(hidden[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).backward()
            steps.step()
            steps.zero_grad()


def copied(path: Path, name: str = "copy") -> Path:
    """Return a copy of a store or a checkpoint, beside it."""
    to = path.with_name(f"{name}-{path.name}")
    if path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copy(path, to)
    return to


def in_memory(model: nn.Module, store: Path, ids: list[int], **options: Any) -> RollbackReport:
    """Roll the model itself back, with a copy of the store."""
    return timstore.rollback(model, ids, copied(store, "memory"), **options)


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, as the format's own library reads it."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """Return what makes two tensors the same."""
    whole = tensor.detach().cpu().contiguous()
    return whole.dtype, whole.shape, whole.reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def places_in(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """Return the bytes before a file's data, and the bytes of each tensor."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = {name: entry for name, entry in json.loads(data[8:end]).items() if name != "__metadata__"}
    spans = {name: [end + one for one in entry["data_offsets"]] for name, entry in entries.items()}
    return data[:end], {name: data[start:stop] for name, (start, stop) in spans.items()}


def files_in(path: Path) -> dict[str, bytes]:
    """Return every file at or below a path, hidden ones as well."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


def rolled_back(store: Path) -> int:
    """Return how many rollbacks a store knows of."""
    with timstore.open(store, "r") as opened:
        return len(opened.sql("SELECT * FROM rollbacks").fetchall())


def in_several_files(folder: Path) -> tuple[LlamaForCausalLM, Path, Path]:
    """A recorded model, its store and its folder, in several files beside others."""
    model, path = llama(), folder / "model"
    record(folder / "s", model)
    model.save_pretrained(path, max_shard_size="6KB")
    (path / "tokenizer.json").write_text("{}")
    (path / "original").mkdir()
    (path / "original" / "notes.md").write_text("kept")
    (path / "original" / "notes.md").chmod(0o600)
    assert len(list(path.glob("*.safetensors"))) > 3
    return model, folder / "s", path
