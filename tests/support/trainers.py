"""Trainings by transformers' Trainer, recorded; tiny models and token rows of their own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from coverage_cases import gpt2, llama, lora
from torch import nn

import timstore
from timstore.integrations.transformers import TrajectoryCallback

ROWS, LENGTH = 12, 10

MODELS = {
    "llama": lambda: llama(attention_dropout=0.0),
    "gpt2": gpt2,
    "lora": lambda: lora(llama(attention_dropout=0.0)),
}


def new_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def rows(
    count: int = ROWS, *, key: str | None = "idx", text: bool = False, masked: bool = True
) -> list[dict[str, Any]]:
    """Rows with a column that no model knows; `masked`, of unequal numbers of labels, as masked prompts leave them."""
    draw = torch.Generator().manual_seed(5)
    found = []
    for number in range(count):
        tokens = torch.randint(2, 60, (LENGTH,), generator=draw).tolist()
        hidden = number % 4 if masked else 0
        row = {"input_ids": tokens, "labels": [-100] * hidden + tokens[hidden:], "source": f"file {number}"}
        if key is not None:
            row[key] = f"document {number}" if text else 100 + number
        found.append(row)
    return found


class Rows(torch.utils.data.Dataset):
    def __init__(self, held: Sequence[dict[str, Any]]) -> None:
        self._held = held

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return dict(self._held[number])


# Of every Trainer here: plain SGD, nothing saved, nothing printed.
USUAL = {
    "per_device_train_batch_size": 3,
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "seed": 1,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(folder),
        **{**USUAL, "num_train_epochs": 2, **options},
    )


class Consumed(transformers.TrainerCallback):
    """What `p.grad` holds at each optimizer step, before clipping is undone by it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})


def trained(
    model: nn.Module,
    callbacks: Sequence[Any],
    folder: Path,
    dataset: Any = None,
    *,
    resume: Any = None,
    evaluated: Any = None,
    collate: Any = None,
    kind: type[transformers.Trainer] = transformers.Trainer,
    **options: Any,
) -> transformers.Trainer:
    """Train a model by a Trainer, of this kind, and return that."""
    trainer = kind(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Rows(rows()) if dataset is None else dataset,
        eval_dataset=evaluated,
        data_collator=collate or transformers.default_data_collator,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def live(store: timstore.Store) -> list[tuple[Any, ...]]:
    """Return every live record with its numbers, but for the attempt that made it."""
    found = []
    for record in store.read():
        gradients = {name: record.dense(name).tobytes() for name in sorted(record.gradients)}
        found.append((record.epoch, record.step, record.rank, record.sample, record.tokens, gradients))
    return found


def recorder(store: Any, samples: Any = None, **options: Any) -> TrajectoryCallback:
    return TrajectoryCallback(store, samples, **{"id_column": "idx", **options})
