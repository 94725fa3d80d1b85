"""Other ways to make trained models forget, on many models at once; none asks what was recorded.

Each takes the forget set, the trained models, their seeds, and settings. `CHOSEN` holds the settings, picked from
`GRIDS` on one forget set, with models of other seeds (`bench_klom.py --choose --sets "random 50"`).
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from klom import (
    CHUNK,
    EPOCHS,
    ROWS,
    Ensemble,
    Forget,
    Training,
    answers,
    ask,
    batches_of_many,
    leaves,
    losses,
    new_models,
    single,
    stacked,
    tune,
)
from torch import nn
from torch.func import jvp, vjp, vmap

Rival = Callable[..., Ensemble]
Eigen = tuple[torch.Tensor, torch.Tensor]
# Batches of what is to be forgotten; of SCRUB, the temperature and the weight of the original's answers, as published.
FEW, TEMPERATURE, ALPHA = 32, 4.0, 0.5
ITERATIONS = 20
# The share of the forget set that is taken out of the loss to see how a training answers.
SLIGHT = 1e-3


def gradient_ascent(
    forget: Forget, weights: Ensemble, seeds: Sequence[int], *, rate: float, epochs: int = 5
) -> Ensemble:
    """Climb the loss of what is to be forgotten, by plain steps."""
    pixels, labels = forget.training.rows()
    weights = leaves(weights)
    optimizer = torch.optim.SGD(list(weights.values()), rate)
    for ids in batches_of_many(seeds, forget.ids, epochs, FEW):
        (-losses(answers(forget.training.net, weights, pixels[ids]), labels[ids])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights


def fine_tuning(forget: Forget, weights: Ensemble, seeds: Sequence[int], *, share: float, epochs: int) -> Ensemble:
    """Train on, on what is retained, at a share of the training's rate."""
    steps = batches_of_many(seeds, forget.retained, epochs)
    return tune(forget.training, weights, steps, share * forget.training.rate)


def scrub(
    forget: Forget, weights: Ensemble, seeds: Sequence[int], *, rate: float, epochs: int = 5, ascents: int = 3
) -> Ensemble:
    """SCRUB (arXiv 2302.09880): leave the original's answers on what is forgotten, hold on to them on the rest."""
    net, (pixels, labels) = forget.training.net, forget.training.rows()
    students = leaves(weights)
    optimizer = torch.optim.SGD(list(students.values()), rate, momentum=0.9)

    def apart(ids: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            taught = (answers(net, weights, pixels[ids]) / TEMPERATURE).log_softmax(-1)
        learnt = (own / TEMPERATURE).log_softmax(-1)
        return F.kl_div(learnt, taught, log_target=True, reduction="sum") * TEMPERATURE**2 / ids.shape[1]

    for epoch in range(epochs):
        orders = [1000 * epoch + seed for seed in seeds]
        leaving = batches_of_many(orders, forget.ids, 1, FEW) if epoch < ascents else []
        staying = batches_of_many(orders, forget.retained, 1)
        for ids, leaves_it in [*((ids, True) for ids in leaving), *((ids, False) for ids in staying)]:
            own = answers(net, students, pixels[ids])
            loss = -apart(ids, own) if leaves_it else ALPHA * apart(ids, own) + losses(own, labels[ids])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return students


def hessian_free(forget: Forget, weights: Ensemble, seeds: Sequence[int], *, damping: float) -> Ensemble:
    """A Newton step (influence) on the retained rows: conjugate gradients with products of the Gauss-Newton matrix."""
    pixels = forget.training.rows()[0][forget.retained]
    product = partial(_curved, forget.training.net, pixels, weights, damping)
    wanted = _gradient(forget, weights)
    found, left = {name: torch.zeros_like(one) for name, one in wanted.items()}, wanted
    direction, size = left, _dot(left, left)
    for _ in range(ITERATIONS):
        bent = product(direction)
        length = size / _dot(direction, bent).clamp(min=1e-30)
        found, left = _moved(found, direction, length), _moved(left, bent, -length)
        size, before = _dot(left, left), size
        direction = _moved(left, direction, size / before.clamp(min=1e-30))
    return _moved(weights, found, torch.full_like(size, len(forget.ids) / len(forget.retained)))


def _curved(net: str, pixels: torch.Tensor, weights: Ensemble, damping: float, vector: Ensemble) -> Ensemble:
    """Return each model's product of its Gauss-Newton matrix, plus the damping, with its own vector."""

    def product(own: Ensemble, along: Ensemble) -> Ensemble:
        logits, pushed = jvp(lambda one: ask(net, one, pixels), (own,), (along,))
        chances = logits.softmax(-1)
        bent = chances * (pushed - (chances * pushed).sum(-1, keepdim=True)) / len(pixels)
        return vjp(lambda one: ask(net, one, pixels), own)[1](bent)[0]

    with torch.no_grad():
        found = vmap(product, chunk_size=CHUNK)(weights, vector)
    return {name: one + damping * vector[name] for name, one in found.items()}


def _gradient(forget: Forget, weights: Ensemble) -> Ensemble:
    """Return each model's mean gradient of the samples to be forgotten."""
    pixels, labels = forget.training.rows()
    weights = leaves(weights)
    ids = torch.tensor(forget.ids).expand(len(next(iter(weights.values()))), -1)
    losses(answers(forget.training.net, weights, pixels[ids]), labels[ids]).backward()
    return {name: one.grad for name, one in weights.items() if one.grad is not None}


def _dot(one: Ensemble, other: Ensemble) -> torch.Tensor:
    return torch.stack([(value * other[name]).flatten(1).sum(1) for name, value in one.items()]).sum(0)


def _moved(place: Ensemble, direction: Ensemble, length: torch.Tensor) -> Ensemble:
    """Return the place plus the direction times one length for each model."""
    return {
        name: one + length.view(-1, *[1] * (one.ndim - 1)) * direction[name].to(one.dtype)
        for name, one in place.items()
    }


def kfac(forget: Forget, weights: Ensemble, seeds: Sequence[int], *, damping: float, steps: int) -> Ensemble:
    """Uphill Gauss-Newton steps on what is forgotten, by K-FAC blocks of what is retained (K-FADE, arXiv 2602.10568).

    Each step is an influence step by the forget set's share. Norms have no block, and stay.
    """
    training, share = forget.training, len(forget.ids) / len(forget.retained)
    pixels, labels = training.rows()
    ids = list(forget.ids)
    done = []
    for number, seed in enumerate(seeds):
        model = single(training, weights, number)
        blocks = _blocks(model, pixels[forget.retained], torch.Generator().manual_seed(seed))
        for _ in range(steps):
            model.zero_grad()
            F.cross_entropy(model(pixels[ids]), labels[ids]).backward()
            for layer, ((a, inputs), (b, outputs)) in blocks.items():
                gradient = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
                solved = outputs @ ((outputs.T @ gradient @ inputs) / (b[:, None] * a + damping)) @ inputs.T
                with torch.no_grad():
                    layer.weight += share * solved[:, :-1].reshape(layer.weight.shape)
                    layer.bias += share * solved[:, -1]
        done.append(model)
    return stacked(done)


def _blocks(model: nn.Module, pixels: torch.Tensor, draw: torch.Generator) -> dict[Any, tuple[Eigen, Eigen]]:
    """Return of each layer the eigenvalues and vectors of its inputs' and of its output gradients' second moments.

    The Fisher matrix is that of labels drawn from the model. A convolution's positions are taken as independent.
    """
    seen: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def look(layer: Any, given: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.retain_grad()
        seen[layer] = given[0].detach(), output

    layers = [one for one in model.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    logits = model(pixels)
    for hook in hooks:
        hook.remove()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
    F.cross_entropy(logits, drawn, reduction="sum").backward()
    blocks = {}
    for layer, (inputs, output) in seen.items():
        gradients = output.grad
        assert gradients is not None
        if isinstance(layer, nn.Conv2d):
            patches = F.unfold(inputs, layer.kernel_size, padding=layer.padding, stride=layer.stride)
            inputs, gradients = patches.mT.flatten(0, 1), gradients.flatten(2).mT.flatten(0, 1)
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        first, second = inputs.T @ inputs / len(pixels), gradients.T @ gradients / len(gradients)
        blocks[layer] = tuple(torch.linalg.eigh(first)), tuple(torch.linalg.eigh(second))
    return blocks


def linear_response(forget: Forget, weights: Ensemble, seeds: Sequence[int]) -> Ensemble:
    """Add what taking a little of the forget set out of the whole training changes, scaled up to all of it.

    The first order of the training itself (what the Hessian-free recursion of arXiv 2404.01712 aims at): it takes two
    trainings from the same seeds, with the same batches.
    """
    whole = _trained(forget.training, tuple(seeds))
    slightly = _trained(forget.training, tuple(seeds), forget.ids)
    change = {name: (slightly[name] - one) / SLIGHT for name, one in whole.items()}
    return _moved(weights, change, torch.ones(len(seeds)))


@cache
def _trained(training: Training, seeds: tuple[int, ...], less: tuple[int, ...] = ()) -> Ensemble:
    """Return what the training came to, in double precision, with a little less of some rows."""
    start = {name: one.double() for name, one in new_models(training, seeds).items()}
    steps = batches_of_many(seeds, range(ROWS), EPOCHS)
    return tune(training, start, steps, training.rate, less=(torch.tensor(less), SLIGHT))


RIVALS: dict[str, Rival] = {
    "gradient ascent": gradient_ascent,
    "fine-tuning": fine_tuning,
    "SCRUB": scrub,
    "Hessian-free (CG)": hessian_free,
    "K-FAC": kfac,
}
GRIDS: dict[str, list[dict[str, Any]]] = {
    "gradient ascent": [{"rate": rate} for rate in (3e-3, 1e-2, 3e-2, 1e-1)],
    "fine-tuning": [{"share": share, "epochs": epochs} for share in (0.1, 0.3, 1.0) for epochs in (1, 3)],
    "SCRUB": [{"rate": rate} for rate in (5e-4, 2e-3, 5e-3, 1e-2)],
    "Hessian-free (CG)": [{"damping": damping} for damping in (3e-3, 1e-2, 3e-2, 1e-1)],
    "K-FAC": [{"damping": damping, "steps": steps} for damping in (1e-2, 3e-2, 1e-1) for steps in (1, 3)],
}
CHOSEN: dict[str, dict[str, Any]] = {
    "gradient ascent": {"rate": 0.03},
    "fine-tuning": {"share": 0.3, "epochs": 1},
    "SCRUB": {"rate": 5e-3},
    "Hessian-free (CG)": {"damping": 0.01},
    "K-FAC": {"damping": 0.03, "steps": 1},
}
