"""Inner products of records with the step's gradient, against autograd's gradients in float64."""

import numpy as np
import pytest
import torch

from timstore.recording.buffers import Buffers
from timstore.recording.gradient_dots import inner_products
from timstore.records import Factors, Rows


def dense(part: object, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(part, Factors):
        return part.output_gradients.astype(np.float64).T @ part.inputs.astype(np.float64)
    if isinstance(part, Rows):
        whole = np.zeros(shape)
        np.add.at(whole, part.indices, part.values)
        return whole
    return np.asarray(part, np.float64).reshape(shape)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [0, 2], [1]])
def test_pieces_of_a_batch_in_any_order_and_arrays_of_any_length(order: list[int]) -> None:
    draw = np.random.default_rng(0)
    buffers = Buffers()
    drawn = (torch.from_numpy(draw.standard_normal((3, 5, width), "float32")) for width in (6, 4))
    inputs, outputs = map(buffers.copy, drawn)
    long = Factors(draw.standard_normal((9, 6), "float32"), draw.standard_normal((9, 4), "float32"))
    rows = Rows(np.array([3, 1, 3]), draw.standard_normal((3, 6), "float32"), (4, 6))
    records = {
        10 + number: {
            "weight": [Factors(inputs[number], outputs[number])],
            "bias": [draw.standard_normal(4, "float32")],
            "table": [rows, long] if number == 2 else [],
        }
        for number in order
    }
    shapes = {"weight": (4, 6), "bias": (4,), "table": (4, 6)}
    gradients = {name: torch.from_numpy(draw.standard_normal(shape, "float32")) for name, shape in shapes.items()}
    found = inner_products(records, gradients)
    assert list(found) == list(records)
    for sample, held in records.items():
        wanted = sum(
            float((dense(part, shapes[name]) * gradients[name].numpy().astype(np.float64)).sum())
            for name, parts in held.items()
            for part in parts
        )
        assert found[sample] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_no_record_has_no_product() -> None:
    assert inner_products({}, {"weight": torch.ones(2, 2)}) == {}
