"""KLoM on handwritten digits: nets, forget sets, trainings of many seeds at once, margins and the distance of them.

An `Ensemble` is many models of one architecture: parameter name to (models, *shape). Whatever works element by element
(an optimizer's step) works on it as on one model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from digits import MODELS, OPTIMIZERS, RATES, images
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import timstore

ROWS, BATCH, EPOCHS, WARM_UP = 1000, 50, 10, 10
BINS, SMOOTHING, LARGEST = 20, 1e-5, 100.0
# Seeds: those of the trained models begin at 0, these are where the others' begin: of the oracles, of the further ones,
# of the model that shows hidden states, of those that the rivals' settings are picked with.
ORACLES, FURTHER, SHOWN, PICKED = 100_000, 200_000, 300_000, 400_000
CLASS = 3
# Of the models that are asked about all samples at once: bounds memory.
CHUNK = 10

Ensemble = dict[str, torch.Tensor]


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.GroupNorm(4, 16),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": MODELS["MLP"], "conv": conv}
# The nets without numbers: those are an ensemble's.
_SHAPES = {name: make().to("meta") for name, make in NETS.items()}
# What they are called in scripts/digits.py, whose rates are used.
KINDS = {"sgd": "momentum", "adamw": "AdamW + clip"}


@dataclass(frozen=True)
class Training:
    """What is trained, and how; `wrong`: with the labels of some rows wrong."""

    net: str
    optimizer: str
    wrong: bool = False

    @property
    def name(self) -> str:
        return f"{self.net} {self.optimizer}{' mislabelled' * self.wrong}"

    @property
    def rate(self) -> float:
        return RATES["MLP"][KINDS[self.optimizer]]

    def new_optimizer(self, parameters: Sequence[torch.Tensor], rate: float) -> torch.optim.Optimizer:
        return OPTIMIZERS[KINDS[self.optimizer]](list(parameters), rate)  # type: ignore[arg-type]

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (pixels, labels): the first ROWS are trained on, the others held out."""
        pixels, labels = images()
        if self.wrong:
            labels, wrong = labels.clone(), torch.tensor(_drawn()["mislabelled 50"])
            draw = torch.Generator().manual_seed(1)
            labels[wrong] = (labels[wrong] + torch.randint(1, 10, wrong.shape, generator=draw)) % 10
        return pixels, labels


@dataclass(frozen=True)
class Forget:
    """Rows to be forgotten of what a training saw."""

    name: str
    training: Training
    ids: tuple[int, ...]

    @property
    def retained(self) -> list[int]:
        return sorted(set(range(ROWS)) - set(self.ids))


def _drawn() -> dict[str, list[int]]:
    """Return the forget sets that are drawn at random, one after another."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    sizes = {"random 5": 5, "random 10": 10, "random 20": 20, "random 35": 35, "random 50": 50, "mislabelled 50": 50}
    return {name: sorted(order.pop() for _ in range(size)) for name, size in sizes.items()}


@cache
def forget_sets(net: str, optimizer: str) -> list[Forget]:
    """Return ten forget sets, of 0.5 to 5 % of the rows."""
    plain, wrong = Training(net, optimizer), Training(net, optimizer, wrong=True)
    threes = torch.nonzero(images()[1][:ROWS] == CLASS)[:, 0].tolist()
    alike = _along_first_component(plain)
    ids = _drawn() | {"class 25": threes[:25], "class 50": threes[:50], "alike 25": alike[:25], "alike 50": alike[:50]}
    return [Forget(name, wrong if name.startswith("mislabelled") else plain, tuple(ids[name])) for name in ids]


def _along_first_component(training: Training) -> list[int]:
    """Return the rows by their place along the first principal component of a trained model's hidden states."""
    model = single(training, train(training, [SHOWN]), 0)
    with torch.no_grad():
        hidden = nn.Sequential(*list(model)[:-1])(training.rows()[0][:ROWS])  # type: ignore[call-overload]
    hidden = hidden - hidden.mean(0)
    places = hidden @ torch.linalg.svd(hidden, full_matrices=False).Vh[0]
    return (places * places[places.abs().argmax()].sign()).argsort(descending=True).tolist()


# --- training ---------------------------------------------------------------------------------------------------


def new_model(net: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[net]()


def batches(seed: int, ids: Sequence[int], epochs: int, size: int = BATCH) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (epoch, ids) of each step, in the order that belongs to a seed."""
    draw, rows = torch.Generator().manual_seed(seed), torch.tensor(ids)
    for epoch in range(epochs):
        for places in torch.randperm(len(rows), generator=draw).split(size):
            yield epoch, rows[places]


def batches_of_many(seeds: Sequence[int], ids: Sequence[int], epochs: int, size: int = BATCH) -> list[torch.Tensor]:
    """Return the ids of each step, (models, rows)."""
    each = zip(*(batches(seed, ids, epochs, size) for seed in seeds), strict=True)
    return [torch.stack([rows for _, rows in step]) for step in each]


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Warm up, then decay linearly to nothing."""
    optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARM_UP) * (1 - step / steps)


def record(training: Training, seed: int, samples: Sequence[int], store: timstore.Store) -> nn.Module:
    """Train one model on all rows, with the recorder."""
    model, (pixels, labels) = new_model(training.net, seed), training.rows()
    optimizer = training.new_optimizer(list(model.parameters()), training.rate)
    steps = list(batches(seed, range(ROWS), EPOCHS))
    with store.record(model, optimizer, samples=samples) as recorder:
        for step, (epoch, ids) in enumerate(steps):
            set_rate(optimizer, training.rate, step, len(steps))
            recorder.epoch = epoch
            recorder.batch(ids)
            F.cross_entropy(model(pixels[ids]), labels[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def train(training: Training, seeds: Sequence[int], without: Sequence[int] = (), epochs: int = EPOCHS) -> Ensemble:
    """Train a model from each seed, as `record` does but all at once, on the rows that stay."""
    retained = sorted(set(range(ROWS)) - set(without))
    return tune(training, new_models(training, seeds), batches_of_many(seeds, retained, epochs), training.rate)


def tune(
    training: Training,
    weights: Ensemble,
    steps: Sequence[torch.Tensor],
    rate: float,
    less: tuple[torch.Tensor, float] | None = None,
) -> Ensemble:
    """Train an ensemble on, with the ids of each step, (models, rows), that warm-up and decay spread over.

    Args:
        less: rows, and the share of each that is left out of the loss.
    """
    pixels, labels = training.rows()
    weights = leaves(weights)
    pixels = pixels.to(next(iter(weights.values())).dtype)
    optimizer = training.new_optimizer(list(weights.values()), rate)
    for step, ids in enumerate(steps):
        set_rate(optimizer, rate, step, len(steps))
        shares = None if less is None else 1 - less[1] * torch.isin(ids, less[0]).to(pixels.dtype)
        losses(answers(training.net, weights, pixels[ids]), labels[ids], shares).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: one.detach() for name, one in weights.items()}


def leaves(weights: Ensemble) -> Ensemble:
    """Return a copy that gradients come to."""
    return {name: one.detach().clone().requires_grad_() for name, one in weights.items()}


def new_models(training: Training, seeds: Sequence[int]) -> Ensemble:
    return stacked([new_model(training.net, seed) for seed in seeds])


def losses(logits: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum over models of each one's mean loss; rows count by their shares."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (each if shares is None else each * shares).sum() / labels.shape[1]


def stacked(models: Sequence[nn.Module]) -> Ensemble:
    return {name: one.detach() for name, one in stack_module_state(list(models))[0].items()}


def single(training: Training, weights: Ensemble, number: int) -> nn.Module:
    model = NETS[training.net]()
    model.load_state_dict({name: one[number] for name, one in weights.items()})
    return model


def ask(net: str, weights: Mapping[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Return one model's logits, (rows, classes)."""
    found: torch.Tensor = functional_call(_SHAPES[net], weights, pixels)
    return found


def answers(net: str, weights: Ensemble, pixels: torch.Tensor) -> torch.Tensor:
    """Return each model's logits, (models, rows, classes), of its own rows."""
    return vmap(partial(ask, net))(weights, pixels)


# --- what is judged ---------------------------------------------------------------------------------------------


@torch.no_grad()
def margins(training: Training, weights: Ensemble) -> torch.Tensor:
    """Return, (models, rows), the label's logit less the log-sum-exp of the others, of trained and held-out rows."""
    pixels, labels = training.rows()
    logits = vmap(partial(ask, training.net), in_dims=(0, None), chunk_size=CHUNK)(weights, pixels).double()
    own = F.one_hot(labels, logits.shape[-1]).bool()
    return logits[:, own] - logits.masked_fill(own, -torch.inf).logsumexp(-1)


def klom(unlearned: torch.Tensor, oracles: torch.Tensor) -> torch.Tensor:
    """Return, (rows,), KL(unlearned || oracles) of the margins' distributions over models.

    Both are histograms over the same bins, from the smallest to the largest margin of either; an empty bin of the
    oracles counts as SMOOTHING. A margin that is no number counts as the largest.

    Args:
        unlearned, oracles: margins, (models, rows).
    """
    both = torch.cat([unlearned, oracles]).nan_to_num(LARGEST).clamp(-LARGEST, LARGEST)
    low, high = both.min(0).values, both.max(0).values
    width = torch.where(high > low, high - low, 1.0) / BINS
    places = ((both - low) / width).long().clamp(max=BINS - 1)
    found, wanted = (F.one_hot(part, BINS).double().mean(0) for part in places.split([len(unlearned), len(oracles)]))
    return torch.xlogy(found, found / wanted.clamp(min=SMOOTHING)).sum(-1)


def judged(unlearned: torch.Tensor, oracles: torch.Tensor, forget: Forget) -> dict[str, float]:
    """Return the distance of margins to the oracles', the 95th percentile over the rows of each kind."""
    distances = klom(unlearned, oracles)
    kinds = {"forget": list(forget.ids), "retained": forget.retained, "held-out": slice(ROWS, None)}
    return {kind: float(distances[rows].quantile(0.95)) for kind, rows in kinds.items()}
