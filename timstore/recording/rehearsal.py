"""One batch recorded into a store of its own, to measure what a recording will write before hours are spent."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from timstore.arguments import choice, flag, positive_number
from timstore.database.store import Store
from timstore.errors import InvalidInputError, shown
from timstore.model.eval_guard import given, undisturbed
from timstore.model.unwrap import inner_model, inner_optimizers
from timstore.recording.batches import on_host
from timstore.recording.forecast import Forecast, is_adam, predict, written
from timstore.recording.history import KINDS
from timstore.recording.recorder import Options, Recorder


def rehearse(
    store: Store,
    model: nn.Module,
    *,
    samples: int,
    steps: int,
    tokens: int | None = None,
    epochs: int = 1,
    batch: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_history: str = "final",
    waypoints: bool = True,
) -> Forecast:
    """Measure what recording would write; see `timstore.Store.forecast`."""
    samples, steps = positive_number(samples, "samples"), positive_number(steps, "steps")
    epochs = positive_number(epochs, "epochs")
    tokens = None if tokens is None else positive_number(tokens, "tokens")
    choice(optimizer_history, KINDS, "optimizer_history")
    has_moment = optimizer is None or any(map(is_adam, inner_optimizers(optimizer)[0]))
    inner, _ = inner_model(model)
    rows = _rows(inner, tokens, batch)
    trained = {name: one for name, one in inner.named_parameters() if one.requires_grad}
    with undisturbed(model):
        # What one record adds to others, since every commit has a size of its own.
        few, gradients = _recorded_bytes(store, model, trained, rows, 2)
        many, _ = _recorded_bytes(store, model, trained, rows, 4)
    return predict(
        (many - few) / 2,
        records=samples * epochs,
        steps=steps,
        batch_size=max(1, round(samples * epochs / steps)),
        gradients=gradients,
        numel=sum(one.numel() for one in trained.values()),
        fingerprints=len(list(model.named_parameters())),
        has_moment=has_moment,
        optimizer_history=optimizer_history,
        waypoints=flag(waypoints, "waypoints"),
        precision=store.settings.precision,
    )


def _recorded_bytes(
    store: Store, model: nn.Module, trained: Mapping[str, nn.Parameter], rows: Callable[[int], Any], count: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return what records of this many rows take, and the step's gradients; the model stays as it is."""
    kept = {name: one.grad for name, one in trained.items()}
    gradients: dict[str, torch.Tensor] = {}
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)  # moves nothing
    for one in trained.values():
        one.grad = None

    def fill(temporary: Store) -> None:
        recorder = Recorder(temporary, model, optimizer, Options(probe=False, waypoints=False, allow_zero=True))
        with recorder, torch.enable_grad():
            args, kwargs = rows(count)
            recorder.batch(list(range(count)))
            with given("this batch (of batch=, or of tokens= for a language model)"):
                returned = model(*args, **kwargs)
                loss = getattr(returned, "loss", None)
                if loss is None:
                    loss = getattr(returned, "logits", returned).float().logsumexp(-1).mean()
                loss.backward()
            gradients.update({name: one.grad.detach().cpu() for name, one in trained.items() if one.grad is not None})
            optimizer.step()

    try:
        size = written(store.settings.precision, fill)
    finally:
        for name, one in trained.items():
            one.grad = kept[name]
    return size, gradients


def _rows(model: nn.Module, tokens: int | None, batch: Any) -> Callable[[int], Any]:
    """Return a function from a number of rows to the model's arguments."""
    device = next(model.parameters()).device
    if batch is None:
        config = getattr(model, "config", None)
        vocabulary, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
        if vocabulary is None or tokens is None:
            raise InvalidInputError(
                "forecast measures on a batch: pass batch=, as the model takes it, or tokens= for a language model of "
                "transformers"
            )
        if longest is not None and tokens > longest:
            raise InvalidInputError(f"tokens is at most the {longest:,} positions that this model has; got {tokens:,}")
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (4, tokens), generator=draw, device="cpu").to(device)
        return lambda count: ((), {"input_ids": ids[:count], "labels": ids[:count]})
    host = on_host(batch)

    def cut(value: Any, count: int) -> Any:
        try:
            array = torch.from_numpy(value)
            return torch.cat([array] * -(-count // len(array)))[:count].to(device)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise InvalidInputError(f"a batch holds arrays of one row or more, not {shown(value)}: {error}") from error

    def taken(count: int) -> Any:
        if isinstance(host, dict):
            return (), {name: cut(value, count) for name, value in host.items()}
        return tuple(cut(value, count) for value in (host if isinstance(host, tuple) else (host,))), {}

    return taken
