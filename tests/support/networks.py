"""Small models, data and training loops."""

from typing import Any

import torch
from torch import nn

import timstore


class Net(nn.Module):
    """Any layers, called as the recorder's users call models."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def backward(model: nn.Module, ids: list[int]) -> torch.Tensor:
    loss: torch.Tensor = model(torch.randn(len(ids), 4), sample_ids=ids).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: list[int]) -> None:
    for ids in batches:
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Count everything that is hooked on modules, parameters and the optimizer."""
    count = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    for module in model.modules():
        count += len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        count += len(module._forward_hooks_with_kwargs) + len(module._forward_hooks_always_called)
    for parameter in model.parameters():
        count += len(parameter._backward_hooks or ()) + len(parameter._post_accumulate_grad_hooks or ())
    return count


def moments(store: timstore.Store) -> list[tuple[int, int, int]]:
    store.commit()
    found = store.sql("SELECT epoch, step, sample FROM records ORDER BY ALL").fetchall()
    return [(epoch, step, sample) for epoch, step, sample in found]
