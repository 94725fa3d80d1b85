"""Which positions of a probe count, what they are measured against, and which probes are refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from timstore.errors import InvalidInputError
from timstore.rollbacks.curvature import GaussNewton
from timstore.rollbacks.probe import Answer, Probe, tensors_of

IDS = torch.tensor([[3, 1, 4, 1], [5, 2, 6, 0]])


class Language(nn.Module):
    """Logits that depend on the token alone; refuses to be shown labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 7)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids), loss=None)


def asked(model: nn.Module, batch: Any, **options: Any) -> Answer:
    (answer,) = Probe(model, [batch], **options).answers(tensors_of(model))
    return answer


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 5)


def test_token_ids_alone_are_their_own_next_tokens() -> None:
    model = Language()
    for batch in (IDS, (IDS,), [IDS], {"input_ids": IDS}, {"input_ids": IDS.numpy(), "sample_ids": [1, 2]}):
        answer = asked(model, batch)
        assert answer.targets is not None and answer.targets.tolist() == [1, 4, 1, 2, 6, 0]
        assert torch.equal(answer.outputs, model.table(IDS)[:, :-1].flatten(0, 1))


def test_padding_and_labels_of_minus_100_do_not_count() -> None:
    model = Language()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    answer = asked(model, {"input_ids": IDS, "attention_mask": mask})
    assert answer.targets is not None and answer.targets.tolist() == [1, 4, 1, 2]
    labels = torch.tensor([[-100, -100, 4, 1], [5, 2, -100, -100]])
    answer = asked(model, {"input_ids": IDS, "attention_mask": mask, "labels": labels})
    assert answer.targets is not None and answer.targets.tolist() == [4, 1, 2]
    assert torch.equal(answer.outputs, model.table(torch.tensor([1, 4, 5])))


def test_labels_of_a_classifier_are_taken_as_they_stand() -> None:
    model, inputs = linear(), torch.randn(4, 3)
    answer = asked(model, {"input": inputs, "labels": torch.tensor([0, 4, -100, 1])})
    assert answer.targets is not None and answer.targets.tolist() == [0, 4, 1]
    torch.testing.assert_close(answer.outputs, model(inputs[[0, 1, 3]]))


def test_without_labels_every_position_counts_and_there_is_no_target() -> None:
    model, inputs = linear(), torch.randn(2, 4, 3)
    answer = asked(model, inputs)
    assert answer.targets is None
    torch.testing.assert_close(answer.outputs, model(inputs).flatten(0, 1))


def test_numbers_are_compared_value_by_value_under_mse() -> None:
    model, inputs, numbers = linear(), torch.randn(4, 3), torch.randn(4, 5)
    answer = asked(model, {"input": inputs, "labels": numbers}, loss="mse")
    assert answer.targets is not None and torch.equal(answer.targets, numbers)


def test_outputs_extracts_the_logits_and_batches_are_counted_by_rows() -> None:
    model = nn.Sequential(linear())
    probe = Probe(model, [np.ones((4, 3), np.float32), torch.ones(2, 3)], outputs=lambda returned: returned[:, :2])
    assert probe.sequences == 6
    assert [answer.outputs.shape for answer in probe.answers(tensors_of(model))] == [(4, 2), (2, 2)]


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "the probe is empty"),
        (torch.ones(2, 3), {}, "put a single batch into a list"),
        ({"input": torch.ones(2, 3)}, {}, "put a single batch into a list"),
        (7, {}, "an iterable of batches"),
        ([torch.ones(2, 3), "text"], {}, "probe batch 1 is a str"),
        ([torch.ones(2, 3)], {"loss": "hinge"}, "'cross_entropy' or 'mse', not 'hinge'"),
        ([torch.ones(2, 3)], {"outputs": lambda _: None}, r"outputs= must return .* NoneType"),
        ([torch.ones(2, 3)], {"outputs": lambda returned: returned.sum()}, "outputs= must return"),
        ([{"input": torch.ones(2, 3), "labels": torch.ones(3)}], {}, r"labels have shape \(3,\), the outputs \(2, 5\)"),
        ([{"input": torch.ones(2, 3), "labels": torch.ones(3)}], {"loss": "mse"}, r"labels have shape \(3,\)"),
    ],
)
def test_a_probe_that_says_nothing_is_refused(batches: Any, options: dict[str, Any], message: str) -> None:
    model = linear()
    with pytest.raises(InvalidInputError, match=message):
        list(Probe(model, batches, **options).answers(tensors_of(model)))


def test_outputs_that_have_no_curvature_are_refused() -> None:
    model = linear()
    sizes = {name: one.numel() for name, one in model.named_parameters()}
    direction = {name: torch.ones(size) for name, size in sizes.items()}
    bad = torch.tensor([[1.0, 2.0, float("inf")]])
    with pytest.raises(InvalidInputError, match="batch 1 hold NaN or Inf"):
        GaussNewton(model, list(sizes), Probe(model, [torch.ones(2, 3), bad]))
    detached = GaussNewton(model, list(sizes), Probe(model, [torch.ones(2, 3)], outputs=lambda out: out.detach()))
    with pytest.raises(InvalidInputError, match="cannot be differentiated"):
        detached.product(direction)
