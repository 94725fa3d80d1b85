"""What is not recorded: each is refused with its reason, one row of docs/coverage.md.

test_coverage_table runs them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from coverage_cases import BY_SAMPLE, IDS
from coverage_models import (
    Applied,
    Bag,
    Checkpointed,
    Own,
    direct,
    lstm,
    mixtral,
    mlp,
    only_a_loss,
    overwritten,
    t5,
    tabled,
)
from networks import Net
from references import (
    Batch,
    Loss,
    language,
    masked,
    seq2seq,
    squares,
    tokens,
    vectors,
    words,
)
from torch import nn

import timstore

# A run yields what comes next, so that it is known when it was refused.
BEGIN, FORWARD, BACKWARD, STEP = "recording begins", "forward pass", "backward pass", "optimizer step"
Run = Callable[[nn.Module, torch.optim.Optimizer, list[Batch], Loss], Iterator[str]]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], loss: Loss) -> Iterator[str]:
    yield FORWARD
    value = loss(model, {**batches[0], "sample_ids": IDS[0]}, torch.ones(4))
    yield BACKWARD
    value.backward()
    yield STEP
    optimizer.step()


def trained_at_once(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], loss: Loss
) -> Iterator[str]:
    """Two batches, one backward pass."""
    yield FORWARD
    values = [loss(model, {**batch, "sample_ids": ids}, torch.ones(4)) for batch, ids in zip(batches, IDS, strict=True)]
    yield BACKWARD
    (values[0] + values[1]).backward()
    yield STEP
    optimizer.step()


def trained_by_closure(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], loss: Loss
) -> Iterator[str]:
    yield STEP

    def closure() -> float:
        value = loss(model, {**batches[0], "sample_ids": IDS[0]}, torch.ones(4))
        value.backward()
        return float(value.detach())

    optimizer.step(closure)


class Twice(torch.optim.SGD):
    """Evaluates its closure twice."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


@dataclass(frozen=True)
class Refused:
    """What is refused, with the model as it was and no step in the store.

    Attributes:
        message: a regular expression.
        when: what was to come next.
    """

    group: str
    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[], list[Batch]]
    message: str
    when: str
    loss: Loss = squares
    options: dict[str, Any] = field(default_factory=dict)
    run: Run = trained
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    error: type[timstore.TimstoreError] = timstore.CoverageError


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="eager")
    return model


MODULES = {"capture": "modules"}
_HELPS = ".*capture='per-sample'"

REFUSED = [
    *(
        Refused(
            "Embedding",
            f"`{option}={value}`",
            lambda option=option, value=value: Bag(nn.Embedding(20, 6, **{option: value})),  # type: ignore[misc]
            words,
            rf"module table.*{option}",
            BEGIN,
        )
        for option, value in {"scale_grad_by_freq": True, "sparse": True, "max_norm": 1.0}.items()
    ),
    Refused(
        "With `capture='modules'`", "LSTM", lstm, vectors(5, 6), r"lstm \(LSTM\)" + _HELPS, FORWARD, options=MODULES
    ),
    Refused(
        "With `capture='modules'`",
        "T5: relative-bias tables",
        t5,
        seq2seq,
        r"relative_attention_bias" + _HELPS,
        FORWARD,
        masked,
        MODULES,
    ),
    Refused(
        "With `capture='modules'`",
        "Mixtral: experts and router",
        mixtral,
        tokens(60, 8),
        r"model\.layers\.0\.\S*(gate|expert)" + _HELPS,
        FORWARD,
        language,
        MODULES,
    ),
    Refused(
        "With `capture='modules'`",
        "a weight used directly",
        lambda: Applied(direct, layer=nn.Linear(6, 6)),
        vectors(5, 6),
        r"parameter layer\.weight.*add up to something else" + _HELPS,
        BACKWARD,
        options=MODULES,
    ),
    Refused(
        "With `capture='per-sample'`",
        "an LSTM in a model that returns its loss alone",
        lambda: lstm(only_a_loss),
        vectors(5, 6),
        "the loss alone cannot be told apart",
        FORWARD,
        lambda model, batch, weights: model(**batch),
        BY_SAMPLE,
    ),
    Refused(
        "An input that does not follow the batch",
        "a table of the model's own, of as many rows as samples",
        lambda: Applied(tabled, layer=nn.Linear(4, 4), table=nn.Parameter(torch.rand(4, 4))),
        vectors(4),
        r"layer \(Linear\): its input \(4, 4\) does not follow" + _HELPS,
        BACKWARD,
        options=MODULES,
    ),
    Refused(
        "An input changed in place",
        "after a layer of one's own ran on it",
        lambda: Applied(overwritten, inner=Own(lambda self, x: x.exp() * self.weight, "weight")),
        vectors(6),
        r"inner \(Own\).*changed in place",
        BACKWARD,
        options=MODULES,
    ),
    Refused(
        "SyncBatchNorm", "in training mode", lambda: Net(nn.SyncBatchNorm(5)), vectors(5, 6), "SyncBatchNorm", FORWARD
    ),
    Refused(
        "Checkpointing",
        "reentrant, two batches in one backward pass",
        lambda: Checkpointed(True),
        vectors(5, 6),
        "use_reentrant",
        BACKWARD,
        run=trained_at_once,
    ),
    Refused(
        "torch.compile",
        "`torch.compile(model)`",
        lambda: torch.compile(mlp(), backend="eager"),
        vectors(9),
        "is compiled",
        BEGIN,
    ),
    Refused("torch.compile", "`model.compile()`", compiled_in_place, vectors(9), "is compiled", BEGIN),
    Refused("DataParallel", "", lambda: nn.DataParallel(mlp()), vectors(9), "DistributedDataParallel", BEGIN),
    Refused(
        "Optimizer",
        "`step(closure)` that evaluates it twice",
        mlp,
        vectors(9),
        "Twice evaluates its closure more than once",
        STEP,
        run=trained_by_closure,
        make_optimizer=Twice,
    ),
    Refused(
        "Optimizer",
        "LBFGS",
        mlp,
        vectors(9),
        "LBFGS",
        BEGIN,
        make_optimizer=torch.optim.LBFGS,
        error=timstore.InvalidInputError,
    ),
    Refused(
        "Arguments",
        "`capture='nonsense'`",
        mlp,
        vectors(9),
        "capture is 'auto' or 'modules' or 'per-sample', not 'nonsense'",
        BEGIN,
        options={"capture": "nonsense"},
        error=timstore.InvalidInputError,
    ),
]
