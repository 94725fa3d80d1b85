"""The probe filter against the dense matrix function, computed by eigendecomposition in float64."""

import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from timstore.rollbacks.curvature import GaussNewton, probe_filter, probe_losses
from timstore.rollbacks.probe import Answer, Probe
from timstore.rollbacks.vectors import Vector, Workspace

DOUBLE = torch.float64


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    made = [{"input": torch.randn(rows, 5, dtype=DOUBLE), "labels": torch.randint(0, 4, (rows,))} for rows in (7, 4)]
    made[0]["labels"][2] = -100
    return made


def flat_outputs(model: nn.Module, theta: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    sizes = [parameter.numel() for parameter in model.parameters()]
    parts = theta.split(sizes)
    named = {
        name: part.view(parameter.shape)
        for (name, parameter), part in zip(model.named_parameters(), parts, strict=True)
    }
    out: torch.Tensor = torch.func.functional_call(model, named, (batch["input"],))
    return out


def dense_gauss_newton(model: nn.Module, loss: str) -> torch.Tensor:
    """J' H_out J from whole Jacobians, position by position."""
    theta = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    total, positions = torch.zeros(len(theta), len(theta), dtype=DOUBLE), 0
    for batch in batches():
        jacobian = torch.autograd.functional.jacobian(lambda one, b=batch: flat_outputs(model, one, b), theta)
        outputs = flat_outputs(model, theta, batch)
        for row in range(len(outputs)):
            if loss == "cross_entropy" and batch["labels"][row] == -100:
                continue
            chances = outputs[row].detach().softmax(-1)
            middle = torch.diag(chances) - torch.outer(chances, chances)
            if loss == "mse":
                middle = torch.eye(4, dtype=DOUBLE) * 2 / 4
            total += jacobian[row].T @ middle @ jacobian[row]
            positions += 1
    return total / positions


def filtered_densely(matrix: torch.Tensor, increments: list[torch.Tensor], lengths: list[torch.Tensor]) -> torch.Tensor:
    delta = torch.zeros_like(increments[0])
    for increment, tau in zip(increments, lengths, strict=True):
        scale = tau.sqrt()
        moving = scale > 0
        inner = scale[:, None] * matrix * scale[None, :]
        values, vectors = torch.linalg.eigh(inner)
        phi = torch.where(values > 1e-12, -torch.expm1(-values) / values.clamp(min=1e-12), torch.ones_like(values))
        start = torch.where(moving, increment / scale.where(moving, torch.ones_like(scale)), 0) - scale * (
            matrix @ delta
        )
        step = scale * (vectors @ (phi * (vectors.T @ (start * moving))))
        delta = delta + torch.where(moving, step, increment)
    return delta


def spread(values: dict[str, float], model: nn.Module) -> torch.Tensor:
    return torch.cat([torch.full((one.numel(),), values[name], dtype=DOUBLE) for name, one in model.named_parameters()])


def vector_of(workspace: Workspace, flat: torch.Tensor, model: nn.Module) -> Vector:
    vector, done = workspace.new(), 0
    for name, parameter in model.named_parameters():
        vector.write(name, 0, flat[done : done + parameter.numel()])
        done += parameter.numel()
    return vector


def workspace_for(model: nn.Module, limit_bytes: int = 2**26) -> Workspace:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Workspace(sizes, dtype=DOUBLE, memory_limit_bytes=limit_bytes)


def run(
    model: nn.Module, loss: str, bins: int, limit_bytes: int = 2**26, *, adam: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    count = sum(parameter.numel() for parameter in model.parameters())
    increments = [torch.randn(count, dtype=DOUBLE) for _ in range(bins)]
    names = [name for name, _ in model.named_parameters()]
    lengths = [{name: 0.5 * (number + 1) + place for place, name in enumerate(names)} for number in range(bins)]
    for taus in lengths:
        taus[names[3]] = 0.0
    factors = torch.rand(count, dtype=DOUBLE).square() * 3 if adam else torch.ones(count, dtype=DOUBLE)
    decays = {names[0]: 0.2, names[4]: 0.1} if adam else {}
    probe = [one if loss == "cross_entropy" else {"input": one["input"]} for one in batches()]
    with workspace_for(model, limit_bytes) as workspace:
        found = probe_filter(
            model,
            [vector_of(workspace, one, model) for one in increments],
            lengths,
            Probe(model, probe, loss=loss),
            workspace,
            steps=120,
            coordinates=vector_of(workspace, factors, model) if adam else None,
            decays=decays,
        )
        got = torch.cat([found.delta.read(name).clone() for name in names])
    matrix = dense_gauss_newton(model, loss) + torch.diag(
        spread({name: decays.get(name, 0.0) for name in names}, model)
    )
    return got, filtered_densely(matrix, increments, [spread(taus, model) * factors for taus in lengths])


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("bins", [1, 4])
def test_the_filter_is_the_dense_matrix_function(loss: str, bins: int) -> None:
    got, want = run(small(), loss, bins)
    assert float((got - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize("bins", [1, 3])
def test_in_adam_s_coordinates_every_element_has_its_own_step_length(bins: int) -> None:
    got, want = run(small(), "cross_entropy", bins, adam=True)
    assert float((got - want).norm() / want.norm()) < 1e-6


def test_the_spill_file_changes_nothing_but_the_order_of_sums() -> None:
    in_memory, _ = run(small(), "cross_entropy", 2)
    spilled, _ = run(small(), "cross_entropy", 2, limit_bytes=1)
    torch.testing.assert_close(in_memory, spilled, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_kept_graphs_change_time_and_nothing_else(loss: str) -> None:
    model, probe = small(), Probe(small(), [one if loss == "cross_entropy" else one["input"] for one in batches()])
    names = [name for name, _ in model.named_parameters()]
    asked: list[int] = []
    answers = probe.answers

    def counted(tensors: Mapping[str, torch.Tensor], first: int = 0) -> Iterator[Answer]:
        for answer in answers(tensors, first):
            asked.append(len(answer.outputs))
            yield answer

    probe.answers = counted  # type: ignore[method-assign]
    directions = [
        {name: torch.randn(one.numel(), dtype=DOUBLE) for name, one in model.named_parameters()} for _ in "ab"
    ]
    found, counts = [], []
    with probe.undisturbed():
        for keep_bytes in (0, 2**26, 3500):
            curvature = GaussNewton(model, names, probe, keep_bytes=keep_bytes)
            asked.clear()
            found.append([curvature.product(one) for one in directions])
            counts.append(len(asked))
    for other in found[1:]:
        for product, same in zip(found[0], other, strict=True):
            assert all(torch.equal(product[name], same[name]) for name in names)
    # Two batches, two products: none kept, both, the first.
    assert counts == [4, 2, 3]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_products_on_a_transformer_equal_those_from_its_jacobian(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=8, tie_word_embeddings=True,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        )
    model = model.double().eval()
    ids = torch.randint(0, 11, (2, 5))
    names = [name for name, _ in model.named_parameters()]
    probe = Probe(model, [{"input_ids": ids}])
    direction = {name: torch.randn(one.numel(), dtype=DOUBLE) for name, one in model.named_parameters()}
    with probe.undisturbed():
        got = GaussNewton(model, names, probe).product(direction)
    parameters = list(model.parameters())
    outputs = model(input_ids=ids).logits[:, :-1].reshape(-1, 11)
    flat = torch.cat([direction[name] for name in names])
    want = torch.zeros_like(flat)
    for row in outputs:
        rows = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in row]
        jacobian = torch.stack(
            [
                torch.cat(
                    [
                        (torch.zeros_like(parameter) if grad is None else grad).reshape(-1)
                        for grad, parameter in zip(grads, parameters, strict=True)
                    ]
                )
                for grads in rows
            ]
        )
        chances = row.detach().softmax(-1)
        want += jacobian.T @ ((torch.diag(chances) - torch.outer(chances, chances)) @ (jacobian @ flat))
    want /= len(outputs)
    result = torch.cat([got[name] for name in names])
    # transformers takes the root mean square of a Llama's norms in float32, whatever the model's dtype.
    assert float((result - want).norm() / want.norm()) < 1e-6


def test_probe_losses_are_the_models_own_before_and_after() -> None:
    model = small()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    shift = torch.randn(sum(one.numel() for one in before), dtype=DOUBLE) * 0.1

    def by_hand() -> float:
        outputs = torch.cat([model(batch["input"]) for batch in batches()])
        labels = torch.cat([batch["labels"] for batch in batches()])
        return float(nn.functional.cross_entropy(outputs, labels).detach())

    with workspace_for(model) as workspace:
        losses = probe_losses(model, Probe(model, batches()), vector_of(workspace, shift, model), names)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert losses[0] == pytest.approx(by_hand())
    done = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift[done : done + parameter.numel()].view(parameter.shape)
            done += parameter.numel()
    assert losses[1] == pytest.approx(by_hand())


class Stateful(nn.Module):
    """A model with modes, buffers, chance, and a way to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.fails_after = 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.calls, torch.Tensor)
        self.calls += 1
        if self.calls > self.fails_after:
            raise RuntimeError("the model failed")
        out: torch.Tensor = self.out(self.drop(self.norm(x)))
        return out


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails: bool) -> None:
    torch.manual_seed(0)
    model = Stateful().double().train()
    model.drop.eval()
    model.fails_after = 3 if fails else 1000
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.random.get_rng_state()
    names = [name for name, _ in model.named_parameters()]
    with workspace_for(model) as workspace:
        increment = vector_of(
            workspace, torch.ones(sum(one.numel() for one in model.parameters()), dtype=DOUBLE), model
        )
        probe = Probe(model, [torch.randn(6, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))])
        arguments = (model, [increment], [dict.fromkeys(names, 1.0)], probe, workspace)
        if fails:
            with pytest.raises(RuntimeError, match="the model failed"):
                probe_filter(*arguments, steps=8)
        else:
            probe_filter(*arguments, steps=8)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one.grad, torch.ones_like(one)) for one in model.parameters() if one.grad is not None)
    assert all(one.grad is not None and one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("keep_bytes", [0, 2**30], ids=["asked again", "kept"])
def test_no_graph_outlives_its_use(keep_bytes: int) -> None:
    # tanh saves its own output, which a graph must not hold in a circle.
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
    names = [name for name, _ in model.named_parameters()]
    probe = Probe(model, [torch.ones(3, 5, dtype=DOUBLE), torch.zeros(2, 5, dtype=DOUBLE)], loss="mse")
    curvature = GaussNewton(model, names, probe, keep_bytes=keep_bytes)
    curvature.product({name: one.detach().flatten() for name, one in model.named_parameters()})
    alive = [weakref.ref(graph.outputs) for graph in curvature._graphs()]
    del curvature
    assert [one() for one in alive] == [None, None]
