"""One forward and backward pass, and how the passes of a step become records."""

import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from timstore.arguments import plain_name
from timstore.arguments import sample_id as checked_id
from timstore.database.samples import sample_named
from timstore.errors import InvalidInputError, shown
from timstore.recording.batch_axis import Layout, Owners, owners_of
from timstore.recording.calls import Call, Input
from timstore.recording.chosen import Chosen
from timstore.recording.modules import Captured
from timstore.records import Factors, Gradient, Rows

# Shapes of the model's arguments for one sample.
Sizes = tuple[tuple[int, ...], ...]
# Address, shape and strides.
Place = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(eq=False, slots=True)
class Entry:
    """One of the model's outputs, where a backward pass may enter it.

    Attributes:
        path: of it, among what the model returned.
        layout: None where it has the samples nowhere: no gradient of its own may come to it.
        proven: a proof began here, so that none has to again.
        arrived: its gradient came.
        through: what of its gradient comes through other outputs.
    """

    path: str
    edge: GradientEdge
    layout: Layout | None
    proven: bool = False
    arrived: bool = False
    through: torch.Tensor | None = None


class MicroBatch:
    """One forward and backward pass.

    Attributes:
        ids: the sample id of every row; of packed rows, of every sample in them.
        chosen: the samples to capture.
        rows_given: rows of the model's arguments.
        layout: where the samples' tokens are, of packed rows.
        sizes: of its arguments.
        argument_axes: which axis of an argument of the model, by where it lies, is the batch.
        called: the model itself runs it, not its layers one by one.
        has_tokens: an argument is ids (rows, tokens) or states (rows, tokens, d).
        proving: where modules have the samples is proved in its backward pass.
        shared: calls of tables that are given one row of ids, (1, T), for all samples.
        edges: of calls, by identity, whose layout is to be proved: where their gradients arrive.
        arriving: by backward pass and parameter (identities): what a pass that may only look (`torch.autograd.grad`),
            or break off, has brought of the next two.
        captured: parameters and, per captured sample, a part of the gradient, as modules show it; accumulated.
        passed: the same from a backward pass of each sample.
        whole: parameters, by identity, whose gradient comes from a backward pass of each sample, not from modules.
        entries: where a backward pass may enter the model.
        block: it is one of several forward passes that a block names, of layers called one by one.
        unseen: modules, by identity, that ran without gradients: a checkpoint may compute them again in backward.
        tokens: labels that count for each of `ids`, None when the batch holds none.
        awaited: how many optimizers have yet to consume it.
        reached: some parameter was seen to get a gradient that is not zero.
    """

    def __init__(
        self, ids: list[int], chosen: Chosen, rows_given: int | None = None, layout: Owners | None = None
    ) -> None:
        self.ids = ids
        self.chosen = chosen
        self.rows_given = len(ids) if rows_given is None else rows_given
        self.layout = layout
        self.whole: set[int] = set()
        self.entries: list[Entry] = []
        self.passed: Captured = []
        self.sizes: Sizes = ()
        self.argument_axes: dict[Place, int] = {}
        self.called = False
        self.has_tokens = False
        self.proving = False
        self.shared: list[Call] = []
        self.edges: dict[int, GradientEdge] = {}
        self.unseen: set[int] = set()
        self.tokens: torch.Tensor | None = None
        self.captured: Captured = []
        self.arriving: dict[tuple[int, int], tuple[Captured, Captured]] = {}
        self.block = False
        self.awaited = 0
        self.reached = False
        self._task = -1
        self._settled: set[tuple[int, int]] = set()
        # Calls and inputs belong to the autograd graph, so that a pass without backward holds no activation.
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._inputs: dict[int, tuple[weakref.ref[torch.Tensor], int, weakref.ref[Input]]] = {}

    def axis_of(self, tensor: Any) -> int | None:
        """Return which axis is the batch, of a tensor that is an argument of the model; None of any other."""
        return self.argument_axes.get(_place(tensor)) if isinstance(tensor, torch.Tensor) else None

    @property
    def empty(self) -> bool:
        """Whether no sample of it is to be captured."""
        return not self.chosen.samples

    def reaches(self, parameters: Container[int]) -> bool:
        """Say whether its backward pass came to any of these, as far as can be told: of an empty one nothing is seen.

        Args:
            parameters: by identity.
        """
        return self.empty or any(id(one) in parameters for one, _ in (*self.captured, *self.passed))

    def entry_at(self, edge: GradientEdge | None) -> Entry | None:
        """Return the output of the model that is this very tensor, None where none is."""
        at = (entry for entry in self.entries if edge is not None and entry.edge[:2] == edge[:2])
        return next(at, None)

    def arrive(self, captured: Captured, *, passed: bool = False) -> None:
        """Take parts that the backward pass that runs has brought; they count once `settle` is told of them."""
        task = torch._C._current_graph_task_id()
        for pair in captured:
            at = task, id(pair[0])
            if at in self._settled:  # a table's gradient that another module shows may come after it was accumulated
                (self.passed if passed else self.captured).append(pair)
            else:
                self.arriving.setdefault(at, ([], []))[passed].append(pair)

    def settle(self, parameter: nn.Parameter) -> None:
        """The backward pass that runs has accumulated its gradient of a parameter."""
        at = torch._C._current_graph_task_id(), id(parameter)
        self._settled.add(at)
        found = self.arriving.pop(at, None)
        if found is not None:
            self.captured += found[0]
            self.passed += found[1]

    def enter(self) -> None:
        """A backward pass runs: what an earlier one brought to the entries is no part of it."""
        task = torch._C._current_graph_task_id()
        if self._task != task:
            self._task = task
            for entry in self.entries:
                entry.arrived, entry.through = False, None

    def parts(self) -> Captured:
        """Return parameters and, per captured sample, a part of the gradient."""
        return [pair for pair in self.captured if id(pair[0]) not in self.whole] + self.passed

    def share(self, tensor: torch.Tensor) -> Input:
        """Return the Input of a tensor, the same for all layers that were given this very tensor."""
        known = self._inputs.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            shared = known[2]()
            if shared is not None:
                return shared
        made = Input(tensor.detach())
        self._inputs[id(tensor)] = weakref.ref(tensor), tensor._version, weakref.ref(made)
        return made

    def watch(self, call: Call) -> None:
        """Let go of this call's tensors when the step is over."""
        self._calls.add(call)

    def leave(self, parameters: Container[int]) -> None:
        """Let go of the parts of these parameters (by identity): their optimizer's step is over, or was skipped."""
        self.awaited -= 1
        if not self.awaited:
            self.release()
            return
        self.captured = [pair for pair in self.captured if id(pair[0]) not in parameters]
        self.passed = [pair for pair in self.passed if id(pair[0]) not in parameters]

    def release(self) -> None:
        """Let go of every tensor: a loss that the user keeps still holds the graph, and the graph our hooks."""
        for call in self._calls:
            call.release()
        self.captured, self.passed, self.entries = [], [], []
        self.arriving.clear()
        self._settled.clear()
        self.shared.clear()
        self.edges.clear()


def by_parameter(captured: Captured) -> dict[int, list[Gradient]]:
    """Return every part of every sample, by the parameter's identity."""
    found: dict[int, list[Gradient]] = {}
    for parameter, parts in captured:
        found.setdefault(id(parameter), []).extend(parts)
    return found


def records_of(
    batches: Iterable[MicroBatch], samples: Container[int] | None, names: Mapping[int, str]
) -> dict[int, dict[str, list[Gradient]]]:
    """Return sample to parameter to parts, those of all micro-batches.

    Args:
        samples: the ids to record, None for all.
        names: parameter (by identity) to its name; others are left out.
    """
    records: dict[int, dict[str, list[Gradient]]] = {}
    for batch in batches:
        found = [pair for pair in batch.parts() if id(pair[0]) in names]
        for index, sample in enumerate(batch.chosen.samples):
            if samples is not None and sample not in samples:
                continue
            gradients = records.setdefault(sample, {})
            for parameter, parts in found:
                _join(gradients.setdefault(names[id(parameter)], []), parts[index])
    return {sample: gradients for sample, gradients in records.items() if gradients}


@dataclass(frozen=True, slots=True)
class Ids:
    """Who is in a batch: the samples, the rows that the model is given, and a layout where rows are packed."""

    samples: list[int]
    rows: int
    layout: Owners | None = None

    @classmethod
    def of_tokens(cls, ids: torch.Tensor) -> "Ids":
        """Return who is in packed rows, from (rows, T), the sample of every token."""
        samples, layout = owners_of(ids)
        return cls(samples, len(ids), layout)


def sample_ids(ids: Any, keys: Mapping[str, int] | None = None) -> Ids:
    """Return who is in a batch, from a tensor, an array or a sequence: an id per row, or per token of packed rows.

    Args:
        keys: the user's own names of samples, where there are any.

    Raises:
        InvalidInputError: if they are anything else.
    """
    try:
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    except Exception:  # whatever such an object raises
        values = None
    if not isinstance(values, list) or not values or isinstance(ids, str | bytes):
        raise InvalidInputError(
            f"sample_ids holds one integer per row of the batch, not {shown(ids)}", kind="wrong-ids"
        )
    if isinstance(values[0], list):
        try:
            packed = torch.as_tensor(values, device="cpu")
        except Exception:  # rows of several lengths, too deep a list, numbers beyond 64 bits, no numbers
            raise _not_integers(values[0]) from None
        if packed.ndim != 2 or packed.dtype != torch.int64 or not (packed >= 0).any():
            raise _not_integers(values[0])
        return Ids.of_tokens(packed)
    named = [sample_named(one, keys) if isinstance(one, str) else checked_id(one, "sample id") for one in values]
    return Ids(named, len(named))


def _not_integers(ids: Any) -> InvalidInputError:
    return InvalidInputError(
        f"sample_ids for packed rows is (rows, tokens), an integer sample id for every token, negative for none; not "
        f"{shown(ids)}",
        kind="wrong-ids",
    )


def check_length(rows: int, axis: int, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse ids of which no tensor that the model is given has as many rows.

    Raises:
        InvalidInputError: with both lengths.
    """
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor) and one.ndim > axis]
    lengths = [one.shape[axis] for one in given]
    if lengths and rows not in lengths:
        raise InvalidInputError(
            f"the batch has {lengths[0]} rows and {rows} sample ids; give one id per row", kind="wrong-ids"
        )


def sizes_of(args: Iterable[Any], kwargs: Mapping[str, Any], rows: int, axis: int) -> Sizes:
    """Return the shapes of the model's arguments for one sample."""
    return tuple(tuple(value.shape[1:]) for value in _by_row(args, kwargs, rows, axis))


def axes_of(args: Iterable[Any], kwargs: Mapping[str, Any], rows: int, axis: int) -> dict[Place, int]:
    """Return which axis of each of the model's arguments that hold the batch is the batch."""
    return {_place(value): number for value, number in _with_batch(args, kwargs, rows, axis)}


def _place(tensor: torch.Tensor) -> Place:
    """Return what tells a tensor from others that are alive: where it lies, and how."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return id(tensor), (), ()  # lies nowhere as a whole
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def have_tokens(args: Iterable[Any], kwargs: Mapping[str, Any], rows: int, axis: int) -> bool:
    """Say whether an argument of the model is ids, (rows, tokens), or states, (rows, tokens, d)."""
    return any(value.ndim == (3 if value.is_floating_point() else 2) for value in _by_row(args, kwargs, rows, axis))


def _by_row(args: Iterable[Any], kwargs: Mapping[str, Any], rows: int, axis: int) -> Iterator[torch.Tensor]:
    """Yield the model's arguments that hold the batch, its axis moved to the front."""
    for value, number in _with_batch(args, kwargs, rows, axis):
        yield value.movedim(number, 0)


def _with_batch(
    args: Iterable[Any], kwargs: Mapping[str, Any], rows: int, axis: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the model's arguments that hold the batch, and the axis that it is."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            numbers = (number for number in (axis, 0) if value.ndim > number and value.shape[number] == rows)
            number = next(numbers, None)
            if number is not None:
                yield value, number


def token_counts(
    model: nn.Module, kwargs: Mapping[str, Any], rows: int, packed: Owners | None = None
) -> torch.Tensor | None:
    """Return how many labels of each row count in a mean over tokens, (rows,), as transformers' models take `labels`.

    A model for causal language moves the labels by one, so that the first is never predicted.

    Args:
        packed: where each sample's tokens are, in packed rows: (samples,) is returned.
    """
    labels = kwargs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or len(labels) != rows or labels.is_floating_point():
        return None
    counted = labels != -100
    kind = getattr(model, "loss_type", None) or type(model).__name__
    if "CausalLM" in kind or "LMHead" in kind:
        counted[:, 0] = False
    if packed is None:
        return counted.sum(1)
    return (
        torch.stack([part.sum() for part in packed.parts(counted, rows)]) if packed.fits(labels.shape, rows) else None
    )


def on_host(batch: Any) -> Any:
    """Return a probe batch as numpy arrays, without its sample ids.

    Raises:
        InvalidInputError: if it is no mapping, sequence, tensor or array.
    """
    if hasattr(batch, "items"):
        return {
            plain_name(name, "a name in a batch"): _numbers(value)
            for name, value in batch.items()
            if name != "sample_ids"
        }
    if isinstance(batch, tuple | list):
        return tuple(_numbers(value) for value in batch)
    return _numbers(batch)


def _numbers(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, torch.Tensor):
        raise InvalidInputError(f"a probe batch is a mapping or a tuple of tensors, or a tensor, not of {shown(value)}")
    try:
        numbers: np.ndarray = (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
    except (TypeError, RuntimeError) as error:  # of a dtype or a layout that numpy has not
        raise InvalidInputError(f"a batch holds plain tensors, not {shown(value)}: {error}") from error
    return numbers


def apart(records: Mapping[int, Mapping[str, list[Gradient]]]) -> dict[int, dict[str, list[Gradient]]]:
    """Return copies of records, so that they do not keep what was captured beside them."""
    copies: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def copied(array: Any) -> np.ndarray:
        # What layers share stays shared; the original is kept, so that its id stays its own.
        return copies.setdefault(id(array), (array, array.copy()))[1]

    def one(part: Gradient) -> Gradient:
        if isinstance(part, Factors):
            square = None if part.square is None else float(part.square)
            return Factors(copied(part.inputs), copied(part.output_gradients), square)
        return Rows(copied(part.indices), copied(part.values), part.shape) if isinstance(part, Rows) else copied(part)

    return {
        sample: {name: [one(part) for part in parts] for name, parts in held.items()}
        for sample, held in records.items()
    }


def _join(parts: list[Gradient], part: Gradient) -> None:
    """Add a part: dense ones are summed, factors and rows stand beside each other."""
    if not isinstance(part, Factors | Rows):
        for number, other in enumerate(parts):
            # bfloat16 cannot be added without rounding; its parts stay beside each other too.
            if not isinstance(other, Factors | Rows) and other.dtype == part.dtype and other.dtype.names is None:
                parts[number] = other + part
                return
    parts.append(part)
