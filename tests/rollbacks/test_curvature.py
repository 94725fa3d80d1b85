"""The probe filter against the dense matrix function, computed by eigendecomposition in float64."""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from timstore.errors import InvalidInputError
from timstore.rollbacks.curvature import GaussNewton
from timstore.rollbacks.filtering import Filtered, probe_filter
from timstore.rollbacks.krylov import krylov, random_signs
from timstore.rollbacks.probe import Answer, Outcome, Probe, Room
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


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def dense_gauss_newton(model: nn.Module, loss: str, given: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """J' H_out J from whole Jacobians, position by position."""
    theta = flat(model)
    total, positions = torch.zeros(len(theta), len(theta), dtype=DOUBLE), 0
    for batch in given:
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


def divergence_by_hand(model: nn.Module, loss: str, batch: dict[str, torch.Tensor], change: torch.Tensor) -> float:
    old, new = (flat_outputs(model, theta, batch) for theta in (flat(model), flat(model) + change))
    if loss == "mse":
        return float((new - old).square().mean())
    before, after = (one[batch["labels"] >= 0].log_softmax(-1) for one in (old, new))
    return float((before.exp() * (before - after)).sum(-1).mean())


def filtered_densely(
    matrix: torch.Tensor, increments: list[torch.Tensor], lengths: list[torch.Tensor], damping: float
) -> torch.Tensor:
    """One bin after another: what is left of those before decays, the new push is answered while it comes."""
    whole = torch.stack(lengths).sum(0)
    scale, moving = whole.sqrt(), whole > 0
    values, vectors = torch.linalg.eigh(scale[:, None] * matrix * scale[None, :])
    values = values + damping
    left = torch.zeros_like(scale)
    for increment, tau in zip(increments, lengths, strict=True):
        push = vectors.T @ torch.where(moving, increment / scale.where(moving, torch.ones_like(scale)), 0)
        bent = values * (tau.sum() / whole.sum())
        answered = torch.where(bent > 1e-12, -torch.expm1(-bent) / bent.clamp(min=1e-12), torch.ones_like(bent))
        left = torch.exp(-bent) * left + answered * push
    return torch.where(moving, scale * (vectors @ left), torch.stack(increments).sum(0))


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


@dataclass(frozen=True)
class Run:
    """The filter, and what it was given, flat.

    Attributes:
        matrices: either half's curvature.
    """

    found: Filtered
    delta: torch.Tensor
    matrices: list[torch.Tensor]
    increments: list[torch.Tensor]
    lengths: list[torch.Tensor]

    def densely(self, half: int, damping: float) -> torch.Tensor:
        return filtered_densely(self.matrices[half], self.increments, self.lengths, damping)


def run(
    model: nn.Module, loss: str, bins: int, limit_bytes: int = 2**26, *, adam: bool = False, size: float = 1.0
) -> Run:
    torch.manual_seed(2)
    count = sum(parameter.numel() for parameter in model.parameters())
    increments = [torch.randn(count, dtype=DOUBLE) * size for _ in range(bins)]
    names = [name for name, _ in model.named_parameters()]
    lengths = [{name: (number + 1) * (1 + place) for place, name in enumerate(names)} for number in range(bins)]
    for taus in lengths:
        taus[names[3]] = 0
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
            depth=120,
            preconditioner=vector_of(workspace, factors, model) if adam else None,
            decays=decays,
        )
        delta = torch.cat([found.delta.read(name).clone() for name in names])
    bent = torch.diag(spread({name: decays.get(name, 0.0) for name in names}, model))
    matrices = [dense_gauss_newton(model, loss, [half]) + bent for half in batches()]
    return Run(found, delta, matrices, increments, [spread(taus, model) * factors for taus in lengths])


@pytest.mark.parametrize("adam", [False, True], ids=["", "adam"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("bins", [1, 4])
def test_the_filter_is_the_dense_matrix_function(loss: str, bins: int, adam: bool) -> None:
    one = run(small(), loss, bins, adam=adam, size=0.1)
    first, second = (one.densely(half, one.found.ways[half].damping) for half in (0, 1))
    want = (first + second) / 2
    assert float((one.delta - want).norm() / want.norm()) < 1e-6
    assert one.found.apart == pytest.approx(float((first - want).norm() / want.norm()), rel=1e-5)


def test_the_spectrum_adds_up_to_traces_as_its_random_vector_sees_them() -> None:
    model = small()
    one = run(model, "cross_entropy", 2, size=0.1)
    scale = torch.stack(one.lengths).sum(0).sqrt()
    with workspace_for(model) as workspace:
        signs = random_signs(workspace)
        vector = torch.cat([signs.read(name).clone() for name in workspace.sizes])
    assert set(vector.tolist()) == {-1.0, 1.0}
    assert len(vector) / 4 < float((vector > 0).sum()) < len(vector) * 3 / 4
    for curvature, way in zip(one.matrices, one.found.ways, strict=True):
        matrix = scale[:, None] * curvature * scale
        for power in (1, 2, 3):
            want = float(vector @ torch.linalg.matrix_power(matrix, power) @ vector)
            assert sum(weight * value**power for value, weight in way.spectrum) == pytest.approx(want)


@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_damping_leaves_least_of_what_curvature_misses_and_of_what_is_taken_back(loss: str, size: float) -> None:
    model = small()
    one = run(model, loss, 2, size=size)
    for half in (0, 1):
        check_damping(model, loss, one, half)


def check_damping(model: nn.Module, loss: str, one: Run, half: int) -> None:
    whole, way = torch.stack(one.lengths).sum(0), one.found.ways[half]
    scale = whole.sqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * one.matrices[half] * scale[None, :])
    values = values.clamp(min=0)
    passing = torch.where(values > 1e-8, -torch.expm1(-values) / values.clamp(min=1e-12), 1.0)

    def x_of(damping: float) -> torch.Tensor:
        return vectors.T @ torch.where(whole > 0, one.densely(half, damping) / scale, 0)

    def seen(damping: float) -> float:
        return divergence_by_hand(model, loss, batches()[1 - half], one.densely(half, damping))

    def left(damping: float) -> float:
        x, back = x_of(damping), x_of(damping) - x_of(0.0)
        return seen(damping) - float(values @ x.square()) / 2 + float((back.square() / passing).sum()) / 2

    others = [left(10**power) for power in torch.linspace(-3, 4, 40, dtype=DOUBLE).tolist()]
    assert left(way.damping) <= min(others) + 0.02 * abs(min(others))
    assert way.seen == pytest.approx(seen(way.damping), rel=1e-6)


def test_what_damps_a_small_change_damps_one_beyond_a_linearisation_more() -> None:
    """A saturated answer hides its own gradient: the true loss bends where the matrix at the model is flat."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.mul_(20)
    inputs = [torch.randn(6, 4, dtype=DOUBLE) for _ in range(2)]

    def damping(size: float) -> float:
        sizes = {name: one.numel() for name, one in model.named_parameters()}
        with Workspace(sizes, dtype=DOUBLE, memory_limit_bytes=2**20) as workspace:
            push = vector_of(workspace, -flat(model) * size, model)
            found = probe_filter(model, [push], [dict.fromkeys(sizes, 1.0)], Probe(model, inputs), workspace, depth=20)
        return found.ways[0].damping

    assert damping(1.0) > damping(0.5) > damping(0.1)


def test_the_spill_file_changes_nothing_but_the_order_of_sums() -> None:
    in_memory, spilled = (run(small(), "cross_entropy", 2, limit) for limit in (2**26, 500))
    torch.testing.assert_close(in_memory.delta, spilled.delta, rtol=1e-10, atol=1e-10)


def test_a_space_of_several_vectors_holds_their_products() -> None:
    torch.manual_seed(3)
    matrix = torch.randn(40, 40, dtype=DOUBLE)
    both, weights = [matrix @ matrix.T, matrix[:, :9] @ matrix[:, :9].T], (0.25, 0.75)
    matrix = weights[0] * both[0] + weights[1] * both[1]
    given = torch.randn(3, 40, dtype=DOUBLE)
    given[2] = given[0] - 2 * given[1]  # adds nothing
    with Workspace({"w": 40}, dtype=DOUBLE, memory_limit_bytes=2**20) as workspace:
        starts = [workspace.new() for _ in given]
        for vector, numbers in zip(starts, given, strict=True):
            vector.write("w", 0, numbers)
        space = krylov(starts, lambda vector: [{"w": one @ vector.read("w")} for one in both], weights, workspace, 3)
        basis = torch.stack([one.read("w").clone() for one in space.basis])
    assert len(basis) == 6
    torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=DOUBLE))
    torch.testing.assert_close(basis @ matrix @ basis.T, space.mean)
    for one, known in zip(both, space.matrices, strict=True):
        torch.testing.assert_close(basis @ one @ basis.T, known)
    torch.testing.assert_close(basis.T @ space.starts, given.T)
    for power in range(3):
        images = torch.linalg.matrix_power(matrix, power) @ given[:2].T
        torch.testing.assert_close(basis.T @ (basis @ images), images)


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
            curvature = GaussNewton(model, names, probe, room=Room(keep_bytes))
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
    shift = torch.randn(sum(one.numel() for one in before), dtype=DOUBLE) * 0.1

    def by_hand() -> float:
        outputs = torch.cat([model(batch["input"]) for batch in batches()])
        labels = torch.cat([batch["labels"] for batch in batches()])
        return float(nn.functional.cross_entropy(outputs, labels).detach())

    with workspace_for(model) as workspace:
        losses = Outcome(model, Probe(model, batches())).losses(vector_of(workspace, shift, model))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert losses[0] == pytest.approx(by_hand())
    done = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift[done : done + parameter.numel()].view(parameter.shape)
            done += parameter.numel()
    assert losses[1] == pytest.approx(by_hand())


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_answers_kept_before_changes_change_time_and_nothing_else(loss: str) -> None:
    model = small()
    probe = Probe(model, [one if loss == "cross_entropy" else one["input"] for one in batches()], loss=loss)
    shifts = [torch.randn(len(flat(model)), dtype=DOUBLE) * 0.1 for _ in range(2)]
    outcomes = [Outcome(model, probe, room=Room(keep_bytes)) for keep_bytes in (0, 200, 2**20)]
    with workspace_for(model) as workspace:
        for shift in shifts:
            delta = vector_of(workspace, shift, model)
            first, *others = [outcome.divergence(delta) for outcome in outcomes]
            assert first > 0
            assert others == [first, first]
    # Four outputs of each of the six positions that count (seven of mse), and of four.
    assert [len(outcome._answered) for outcome in outcomes] == [0, int(loss == "cross_entropy"), 2]


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
            with pytest.raises(InvalidInputError, match="batch 0 of the probe: RuntimeError: the model failed"):
                probe_filter(*arguments, depth=8)
        else:
            probe_filter(*arguments, depth=8)
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
    curvature = GaussNewton(model, names, probe, room=Room(keep_bytes))
    curvature.product({name: one.detach().flatten() for name, one in model.named_parameters()})
    alive = [
        weakref.ref(graph.outputs) for graph in curvature._graphs(curvature._graph_tensors or curvature._tensors())
    ]
    del curvature
    assert [one() for one in alive] == [None, None]
