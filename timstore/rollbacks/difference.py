"""Why a model is not the recorded one, where that can be seen: another dtype, an adapter merged or never loaded."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch

from timstore.database.snapshot import Snapshot
from timstore.database.store import Store
from timstore.errors import ModelMismatchError
from timstore.model.fingerprints import digest

_DTYPES = ("float64", "float32", "bfloat16", "float16")
# As peft names what it adds: `q_proj.lora_A.default.weight`, `embed_tokens.lora_embedding_A.default`.
_LORA = re.compile(r"\.lora_[^.]+(?:\.(?!weight$|bias$)([^.]+))?")


@contextmanager
def explained(store: Store, model: torch.nn.Module) -> Iterator[None]:
    """Have the refusal of a model say what sets it apart from the recorded one, if that can be found."""
    try:
        yield
    except ModelMismatchError as error:
        parameters, snapshot = dict(model.named_parameters()), store.snapshot()
        recorded = recorded_digests(snapshot)
        why = other_adapter(recorded.keys() | snapshot.parameters().keys(), parameters)
        if why is None and error.kind == "unknown-model":
            why = _merged(model) or _other_dtype(snapshot, recorded, parameters)
        if why is None:
            raise
        raise ModelMismatchError(f"{error}. {why}", kind=error.kind, **error.fields) from error


def recorded_digests(snapshot: Snapshot) -> dict[str, set[str]]:
    """Return every digest that each parameter had when digests were kept."""
    digests: dict[str, set[str]] = {}
    for row in snapshot.catalog.rows("SELECT DISTINCT parameter, digest FROM fingerprints").to_pylist():
        digests.setdefault(row["parameter"], set()).add(row["digest"])
    return digests


def other_adapter(recorded: Iterable[str], parameters: Iterable[str]) -> str | None:
    """Return what to do where a LoRA adapter was recorded that a model with these parameters lacks."""
    wanted, there = _adapters(recorded), _adapters(parameters)
    missing = sorted(wanted.keys() - there.keys())
    if not missing:
        return None
    what = f"the LoRA adapter {missing[0]!r}" if missing[0] else "a LoRA adapter"
    what = f"What was recorded is {what} ({wanted[missing[0]]}), and this model has "
    if there:
        return what + f"{sorted(there)[0]!r}: load it under the recorded name"
    return what + (
        "none: it was merged into the weights, or never loaded. Load the base model with the adapter, roll back, and "
        "merge it afterwards"
    )


def _adapters(names: Iterable[str]) -> dict[str, str]:
    """Return the first parameter of each LoRA adapter, by the adapter's name, which is empty where it has none."""
    adapters: dict[str, str] = {}
    for name in sorted(names):
        match = _LORA.search(name)
        if match is not None:
            adapters.setdefault(match[1] or "", name)
    return adapters


def _merged(model: torch.nn.Module) -> str | None:
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        return "An adapter is merged into its weights: load it again, roll back, and merge it afterwards"
    return None


def _other_dtype(
    snapshot: Snapshot, recorded: Mapping[str, set[str]], parameters: Mapping[str, torch.Tensor]
) -> str | None:
    """Return what to do about parameters of another dtype than they were recorded in."""
    trained = snapshot.parameters()
    shared = sorted(recorded.keys() & parameters.keys())
    known = [(name, trained[name].dtype) for name in shared if name in trained]
    other = [(name, dtype) for name, dtype in known if _name_of(parameters[name].dtype) != dtype]
    if not other:
        # Of a frozen parameter the digest alone is kept: its dtype is the one in which it has that.
        frozen = (name for name in shared if name not in trained and digest(parameters[name]) not in recorded[name])
        for name in islice(frozen, 1):
            other = [(name, dtype) for dtype in _DTYPES if _is_recorded(name, dtype, recorded, parameters)]
    if not other:
        return None
    name, dtype = other[0]
    same = ", of the same numbers" if _is_recorded(name, dtype, recorded, parameters) else ""
    now = _name_of(parameters[name].dtype)
    return (
        f"Parameter {name} is {now}, and {dtype} was recorded{same}: load the model in the "
        f"precision of the training, such as by torch_dtype={dtype}, roll back, and convert it afterwards"
    )


def _is_recorded(
    name: str, dtype: str, recorded: Mapping[str, set[str]], parameters: Mapping[str, torch.Tensor]
) -> bool:
    """Say whether a parameter, converted, is one that was recorded."""
    return digest(parameters[name].to(getattr(torch, dtype))) in recorded[name]


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
