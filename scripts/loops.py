"""The training loop that the cost of recording is measured on, and other people's ways to take gradients in it.

Needs torch and nothing else, so that it runs in the environments of other libraries as well.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH, CLIP, RATE = 8, 1.0, 2e-4
SETTLED = 5
WIDTH, INNER, DEPTH, HEADS, VOCABULARY = 128, 256, 4, 4, 2048


class Block(nn.Module):
    """Attention and a gated MLP, of Linear layers without biases; norms without weights."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        queries, keys, values = self.qkv(F.layer_norm(x, (width,))).view(rows, tokens, 3, HEADS, -1).unbind(2)
        heads = [one.transpose(1, 2) for one in (queries, keys, values)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
        x = x + self.out(mixed.reshape(rows, tokens, width))
        normed = F.layer_norm(x, (width,))
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Transformer(nn.Module):
    """Four blocks, 655,360 trained weights at width 128, between a fixed embedding and its transpose."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(VOCABULARY, width) / 8)
        self.blocks = nn.Sequential(*[Block(width, width * INNER // WIDTH) for _ in range(DEPTH)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.embedding(tokens, self.table))
        return F.layer_norm(x, (x.shape[-1],)) @ self.table.T


def token_mean(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the loss of predicting each next token: a mean over the tokens of a whole batch."""
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return summed / (BATCH * (tokens.shape[1] - 1))


@dataclass(frozen=True)
class Work:
    """What is trained on what.

    Attributes:
        tokens: (samples, T), of sequences or of whatever `logits` and `loss` take, as an image's pixels and its label;
            batches of BATCH are taken in order, over and over.
        logits: of a model and rows of `tokens`, with keyword arguments for the model.
        loss: of what `logits` returned and the same rows, which may be fewer than BATCH: a sum over samples, divided
            by what a whole batch has of them.
        device: where it is trained.
        settled: the first of the steps that `later_seconds` is of.
        moments: when that one began in the latest run, and when the last one was over.
    """

    new_model: Callable[[], nn.Module]
    logits: Callable[..., torch.Tensor]
    tokens: torch.Tensor
    steps: int
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = token_mean
    device: str = "cpu"
    settled: int = SETTLED
    moments: list[float] = field(default_factory=list)

    @property
    def later_seconds(self) -> float:
        """What one step took, but for the first ones, which carry what is done once."""
        began, ended = self.moments or (math.nan, math.nan)
        return (ended - began) / (self.steps - self.settled)

    def batches(self) -> Iterator[torch.Tensor]:
        """Yield the sample ids of each step."""
        self.moments.clear()
        for step in range(self.steps):
            if step == self.settled:
                self._note()
            yield torch.arange(step * BATCH, (step + 1) * BATCH) % len(self.tokens)
        if self.moments:
            self._note()

    def _note(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return a batch, on its way to the device."""
        taken = self.tokens[ids]
        return taken if self.device == "cpu" else taken.pin_memory().to(self.device, non_blocking=True)

    def begin(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = self.new_model()
        return model, torch.optim.AdamW(model.parameters(), lr=RATE)


def transformer_work(tokens: torch.Tensor, steps: int, width: int = WIDTH) -> Work:
    return Work(lambda: Transformer(width), lambda model, tokens, **more: model(tokens, **more), tokens, steps)


def bare(work: Work, model: nn.Module, optimizer: torch.optim.Optimizer, *, named: bool = False) -> None:
    """Train; `named` hands the sample ids to the model, for whoever takes them out again."""
    for ids in work.batches():
        tokens = work.rows(ids)
        more: dict[str, Any] = {"sample_ids": ids} if named else {}
        work.loss(work.logits(model, tokens, **more), tokens).backward()
        finish(model, optimizer)


def finish(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


class Npy:
    """One array file per step, (samples, weights), synced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, step: int, gradients: list[torch.Tensor]) -> None:
        """Write per-sample gradients, each (samples, *shape)."""
        with open(self._folder / f"{step}.npy", "wb") as file:
            np.save(file, torch.cat([one.flatten(1) for one in gradients], 1).numpy())
            file.flush()
            os.fsync(file.fileno())


def backward_per_sample(work: Work, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """One forward and backward pass per sample, as without any library."""
    files, parameters = Npy(folder), [one for one in model.parameters() if one.requires_grad]
    for step, ids in enumerate(work.batches()):
        each = work.tokens[ids].split(1)
        rows = [torch.autograd.grad(work.loss(work.logits(model, one), one), parameters) for one in each]
        gradients = [torch.stack(list(of_one)) for of_one in zip(*rows, strict=True)]
        for parameter, one in zip(parameters, gradients, strict=True):
            parameter.grad = one.sum(0)
        files.write(step, gradients)
        finish(model, optimizer)


def vmapped(work: Work, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """`torch.func`: the gradient of one sample's loss, mapped over the batch."""
    files = Npy(folder)
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}

    def loss(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        def called(one: torch.Tensor) -> torch.Tensor:
            return work.logits(lambda *args, **more: functional_call(model, weights, args, more), one)

        return work.loss(called(tokens[None]), tokens[None])

    taken = vmap(grad_and_value(loss), in_dims=(None, 0), randomness="same")
    for step, ids in enumerate(work.batches()):
        detached = {name: one.detach() for name, one in parameters.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the one that vmap has a rule for
            by_name, _ = taken(detached, work.tokens[ids])
        for name, parameter in parameters.items():
            parameter.grad = by_name[name].sum(0)
        files.write(step, [by_name[name] for name in parameters])
        finish(model, optimizer)


@dataclass
class Run:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    device_bytes: int = 0
    later_seconds: float = math.nan


def timed(run: Callable[[], object]) -> Run:
    """Return what a call costs: seconds, those of all cores, peak memory beyond what was there before (Linux; else 0).

    The kernel keeps the peak, so that nothing has to watch beside what is measured.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def memory(field: str) -> int:
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)

    try:
        reset.write_text("5")
    except OSError:
        status = Path("/nonexistent")
    before = memory("VmRSS")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun, cpu = time.perf_counter(), time.process_time()
    run()
    if cuda:
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return Run(seconds, cpu, memory("VmHWM") - before, torch.cuda.max_memory_allocated() if cuda else 0)
