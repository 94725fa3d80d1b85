"""Stores of factors in a Llama's shapes, made without training: layers of width 512, 64 tokens or more a record."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import timstore

WIDTH, INNER = 512, 1408


@dataclass(frozen=True)
class Shapes:
    """A model's matrices, and how many tokens a record has."""

    layers: int
    tokens: int

    @property
    def parameters(self) -> dict[str, tuple[int, int]]:
        found = {}
        for layer in range(self.layers):
            found |= {f"{layer}.{name}.weight": (WIDTH, WIDTH) for name in "qkvo"}
            found |= {f"{layer}.{name}.weight": (INNER, WIDTH) for name in ("gate", "up")}
            found[f"{layer}.down.weight"] = WIDTH, INNER
        return found

    @property
    def elements(self) -> int:
        return sum(rows * columns for rows, columns in self.parameters.values())

    def model(self) -> nn.Module:
        layers = [nn.ModuleDict() for _ in range(self.layers)]
        for name, (rows, columns) in self.parameters.items():
            layer, module, _ = name.split(".")
            layers[int(layer)][module] = nn.Linear(columns, rows, bias=False)
        return nn.ModuleList(layers)

    def factors(self, number: int) -> dict[str, timstore.Factors]:
        """Return record `number`: standard normal factors, q, k and v of one input, gate and up of another."""
        random = np.random.default_rng(number)
        found = {}
        for layer in range(self.layers):
            shared = {name: random.standard_normal((self.tokens, WIDTH), "float32") for name in ("q", "o", "gate")}
            inputs = shared | {"k": shared["q"], "v": shared["q"], "up": shared["gate"]}
            inputs["down"] = random.standard_normal((self.tokens, INNER), "float32")
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                rows = INNER if name in ("gate", "up") else WIDTH
                output_gradients = random.standard_normal((self.tokens, rows), "float32")
                found[f"{layer}.{name}.weight"] = timstore.Factors(inputs[name], output_gradients)
        return found

    def dense(self, number: int) -> np.ndarray:
        """Return record `number` as one flat array."""
        factors = self.factors(number).values()
        return np.concatenate([(one.output_gradients.T @ one.inputs).reshape(-1) for one in factors])

    def fill(
        self, path: Path, records: int, *, batch: int = 8, sample: Callable[[int], int] = lambda number: number
    ) -> None:
        """Make a store of so many records, `batch` of them to a step."""
        with timstore.open(path, "x", durability="os") as store:
            for number in range(records):
                store.append(0, number // batch, sample(number), self.factors(number), lr=1e-5)


def products(shapes: Shapes, records: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each parameter's (output gradients, inputs), the tokens of so many records one below the other."""
    rows = records * shapes.tokens
    for height, width in shapes.parameters.values():
        yield torch.randn(rows, height), torch.randn(rows, width)
