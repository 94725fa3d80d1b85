"""A stand-in for OpenUnlearning: the interfaces that its trainers meet, in either revision of `load_trainer`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from trainers import arguments

END = 1  # ends every text and, as the tokenizer has no token for padding, pads too


class FinetuneTrainer(transformers.Trainer):
    """Evaluates by evaluators; takes what its revision hands over."""

    def __init__(self, evaluators: Any = None, template_args: Any = None, *args: Any, **kwargs: Any) -> None:
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        if not self.evaluators:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix) if eval_dataset is not None else {}
        metrics = {}
        for one in self.evaluators.values():
            metrics.update(one.evaluate(model=self.model, tokenizer=self.tokenizer, template_args=self.template_args))
        self.log(metrics)
        return metrics


class Tokenizer:
    pad_token_id = eos_token_id = END

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


class Texts(torch.utils.data.Dataset):
    """Rows by number and a length, no iterator; the numbering begins anew in every split."""

    def __init__(self, rows: Sequence[list[int]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        tokens = torch.tensor([*self._rows[number], END])
        labels = torch.where(torch.arange(len(tokens)) < 2, -100, tokens)
        return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens), "index": number}


class ForgetRetainDataset(torch.utils.data.Dataset):
    def __init__(self, forget: Any, retain: Any) -> None:
        self.forget, self.retain = forget, retain

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"forget": self.forget[number], "retain": self.retain[number % len(self.retain)]}


class Collator:
    """Pads, and takes every token that is the padding's for padding."""

    def __init__(self, side: str = "right") -> None:
        self._side = side

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "input_ids" not in rows[0]:
            return {name: self([row[name] for row in rows]) for name in rows[0]}
        tokens = self._padded([row["input_ids"] for row in rows], END)
        labels = self._padded([row["labels"] for row in rows], -100)
        return {"input_ids": tokens, "attention_mask": tokens.ne(END), "labels": labels}

    def _padded(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self._side)


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Return texts of 4 to 11 tokens, none of them the end."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=draw).tolist()
    return [torch.randint(2, 60, (length,), generator=draw).tolist() for length in lengths]


class Checkout:
    """The modules of a checkout, as `src/train.py` has imported them.

    Args:
        names_it: what its `load_trainer` calls the tokenizer.
    """

    def __init__(self, names_it: str) -> None:
        self._names_it = names_it
        self.registry: dict[str, Any] = {"FinetuneTrainer": FinetuneTrainer}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer: Any = ModuleType("trainer")
        trainer.TRAINER_REGISTRY, trainer.FinetuneTrainer = self.registry, FinetuneTrainer
        data: Any = ModuleType("data")
        data.get_datasets = self.get_datasets
        for module in (trainer, data):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def get_datasets(self, configurations: Any, tokenizer: Any, template_args: Any) -> Texts:
        assert isinstance(tokenizer, Tokenizer)
        (configuration,) = configurations.values()
        return Texts(configuration["args"]["rows"])

    def load_trainer(self, handler: str, folder: Path, *, method_args: Any = None, **given: Any) -> Any:
        """Make a trainer as `src/train.py` does; `given` has model, train_dataset and what differs from that."""
        options = given.pop("args", {})
        return self.registry[handler](
            **{
                "eval_dataset": None,
                self._names_it: Tokenizer(),
                "data_collator": Collator(),
                "args": arguments(folder, remove_unused_columns=False, **options),
                "evaluators": None,
                "template_args": {"apply_chat_template": False},
                **given,
                **(method_args or {}),
            }
        )
