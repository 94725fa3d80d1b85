"""The small Llama's cases: optimizers, LoRA, and what is forgotten of its fine-tuning."""

import copy
from collections.abc import Callable, Sequence
from functools import cache

import torch
from judging import AfterStep, Case, Row, trained
from language import CONTEXT, EPOCHS, FORGET, FORGOTTEN, Text, fine_tune, log_chances, new_model, pre_train
from torch import nn

import timstore

FORGETS = ("document", "random", "outliers", "memorised")
RANK = 8
# Nonsense is made of so many of the commonest words; a sequence to be memorised repeats a few of them.
COMMON, REPEATED = 1024, 8
PROBES = {"8 public": 8, "32 public": 32, "64 public": 64, "64 retained": 64}


class Lora(nn.Module):
    """A frozen Linear layer and a low-rank change of it, written as two Linear layers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def with_lora(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Lora(child))
    return model


def adamw(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(trained(model), lr=rate, weight_decay=0.01)


def sgd(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(trained(model), lr=rate, momentum=0.9)


Kind = tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], torch.optim.Optimizer]]
KINDS: dict[str, Kind] = {
    "AdamW": (lambda model: model, adamw(2e-4)),
    "LoRA": (with_lora, adamw(1e-3)),
    "SGD": (lambda model: model, sgd(0.02)),
}
# Heavy memorisation: epochs and the optimizer.
MEMORISING = {"SGD": (6, sgd(0.02)), "AdamW": (8, adamw(5e-4))}


@cache
def pre_trained(seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = new_model()
    pre_train(model, Text.read(seed).pre, seed, steps)
    return model


def text_to_forget(seed: int, forgotten: str) -> Text:
    """Draw a run's text: a document, sequences like the others, random words, or a few words over and over."""
    text = Text.read(seed, "" if forgotten == "random" else FORGOTTEN)
    if forgotten in ("document", "random"):
        return text
    draw = torch.Generator().manual_seed(seed + 11)
    common = [number for word, number in text.tokenizer.numbers.items() if word.isalpha()][:COMMON]
    words = torch.tensor(common)[torch.randint(COMMON, (FORGET, CONTEXT), generator=draw)]
    if forgotten == "memorised":
        words = words.gather(1, torch.randint(REPEATED, words.shape, generator=draw))
    return text.forgetting(words)


class Language(Case):
    """A recorded fine-tuning of the small Llama from a start of so many pre-training steps."""

    def __init__(self, kind: str, steps: int, forgotten: str, seed: int) -> None:
        self._text = text_to_forget(seed, forgotten)
        wrap, self._optimizer = KINDS[kind]
        self._epochs = EPOCHS
        if forgotten == "memorised":
            self._epochs, self._optimizer = MEMORISING[kind]
        start = copy.deepcopy(pre_trained(seed, steps))
        torch.manual_seed(seed)
        self.begin = wrap(start)
        self.forget = self._text.forget_ids
        self.targets = {name: tokens[:, 1:] for name, tokens in self._text.judged().items()}
        draw = torch.Generator().manual_seed(seed + 7)
        public = self._text.pre[torch.randperm(len(self._text.pre), generator=draw)]
        kept = self._text.tuning[:-FORGET][torch.randperm(len(self._text.tuning) - FORGET, generator=draw)]
        self.probes = {
            name: [{"input_ids": one} for one in (kept if "retained" in name else public)[:count].split(16)]
            for name, count in PROBES.items()
        }

    def train(
        self,
        model: nn.Module,
        order: int,
        store: timstore.Store | None = None,
        *,
        history: str = "final",
        without: Sequence[int] = (),
        after_step: AfterStep = lambda ids: None,
    ) -> None:
        optimizer, options = self._optimizer(model), {"history": history, "without": without, "after_step": after_step}
        fine_tune(model, self._text, optimizer, order, store, epochs=self._epochs, **options)

    def log_chances(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return log_chances(model, self._text)

    def gaps(self, own: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> Row:
        """Return losses over the retrained model's, minus one."""
        return {
            f"loss gap {name}": float(self.losses(own, name).mean() / self.losses(reference, name).mean()) - 1
            for name in ("forget", "held-out")
        }
