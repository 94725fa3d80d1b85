"""The frozen nouns that every layer speaks: gradients, records, steps, parameters."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from timstore.errors import InvalidInputError

# numpy has no bfloat16. A dtype of one named 16-bit field lets arrays carry the fact themselves, so that
# slicing, concatenating and comparing bits need no wrapper; `widen` and `narrow` do the arithmetic.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": BFLOAT16,
}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the stored name of a gradient dtype: float64, float32, float16 or bfloat16.

    Raises:
        InvalidInputError: for any other dtype.
    """
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise InvalidInputError(f"gradients are float64, float32, float16 or bfloat16, not {dtype}", dtype=str(dtype))


def widen(array: np.ndarray) -> np.ndarray:
    """Return the values in a dtype numpy can calculate with: bfloat16 and float16 become float32."""
    if array.dtype == BFLOAT16:
        return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def narrow(array: np.ndarray) -> np.ndarray:
    """Return the values rounded to bfloat16, ties to even, NaN kept NaN."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    rounded[np.isnan(array)] = 0x7FC0
    return rounded.view(BFLOAT16)


def as_array(value: Any) -> np.ndarray:
    """Return a numpy array, or a torch tensor on any device, as a numpy array of a supported dtype.

    A CPU tensor shares its memory with the result. torch is not imported: a tensor brings it along.

    Raises:
        InvalidInputError: if the value is neither, or its dtype is not one of `DTYPES`.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        try:
            value = _numbers_of(value.detach().cpu(), torch)
        except Exception as error:  # meta, nested, quantized tensors, dtypes that numpy lacks: each says so its own way
            raise InvalidInputError(
                f"a tensor of {value.dtype} on {value.device} has no numbers to be had: {error}"
            ) from error
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise InvalidInputError(f"a gradient is a numpy array or a torch tensor, not {type(value).__name__}")
    dtype_name(value.dtype)
    return np.asarray(value)


def _numbers_of(tensor: Any, torch: Any) -> np.ndarray:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """One gradient as a product: `output_gradients.T @ inputs`.

    Attributes:
        inputs: (T, d_in), the layer's input, T tokens. Layers that share the same array share its storage.
        output_gradients: (T, d_out), the gradient of the loss at the layer's output.
        square: of the product's norm, a number or an array of one, where the recorder took it already; rounding may
            leave it below zero. `Store.append` does not go by it.
    """

    inputs: Any
    output_gradients: Any
    square: Any = None


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """One gradient that is zero except for some rows, such as an embedding's.

    Attributes:
        indices: (n,) integers, which rows; a row named twice is summed.
        values: (n, d), those rows.
        shape: the parameter's whole shape, (rows, d).
    """

    indices: Any
    values: Any
    shape: tuple[int, ...]


Gradient = np.ndarray | Factors | Rows


@dataclass(frozen=True, slots=True)
class Parameter:
    """A name from `named_parameters()`, its shape, dtype and optimizer group."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group_id: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape as stored: rows x the product of the trailing axes; 1-D and 0-d are a single row."""
        if len(self.shape) < 2:
            return 1, self.numel
        return self.shape[0], math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class StepGroup:
    """The scalars one optimizer group used in one `optimizer.step()`.

    Attributes:
        counter: the optimizer's own count of steps, this one included; None when unknown, or not one for all.
        idle: names of parameters of the group that had no gradient, hence were left alone by the step.
        fresh: names whose buffers (momentum, moments) the step created; None when unknown (then: the first live step).
        options: every hyperparameter of the group as JSON, for running the optimizer again; None when unknown.
    """

    group_id: int = 0
    optimizer: str = "SGD"
    lr: float | None = None
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False
    amsgrad: bool = False
    counter: int | None = None
    idle: tuple[str, ...] = ()
    fresh: tuple[str, ...] | None = None
    options: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer update, recorded samples in it or not.

    Attributes:
        consumed_ratio: gradient that the optimizer consumed over the gradient accumulated by backward
            (the clip factor, and 1/scale under a GradScaler).
        sample_ids: the ordered sample ids of the whole batch, None when unknown.
        tokens: tokens in the batch, None when unknown.
        grad_norm: norm of the accumulated gradient over all trained parameters, before clipping; in the units of
            the records, a GradScaler's scale included.
        amp_scale: what the GradScaler had multiplied the loss by; 1 without one.
        clip_value: the bound of clipping by value; None where there was none.
        mean_over: what the loss's mean divides by, `samples` or `tokens`; None when unknown.
        micro_batches: rows of each micro-batch, in the order of `sample_ids`; None when unknown.
        skipped: steps that were skipped since the one before (an overflow under a GradScaler).
    """

    epoch: int
    step: int
    groups: tuple[StepGroup, ...]
    rank: int = 0
    consumed_ratio: float = 1.0
    sample_ids: tuple[int, ...] | None = None
    tokens: int | None = None
    grad_norm: float | None = None
    amp_scale: float = 1.0
    clip_value: float | None = None
    mean_over: str | None = None
    micro_batches: tuple[int, ...] | None = None
    skipped: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """All gradients of one (epoch, step, sample).

    Attributes:
        gradients: parameter name to its parts; their sum is the gradient, in the loss's own normalisation.
        loss, tokens: of this sample in this step, None when unknown.
        dot: inner product of this record's gradient with the step's whole one, before clipping; None when unknown.
    """

    epoch: int
    step: int
    sample: int
    gradients: Mapping[str, tuple[Gradient, ...]]
    rank: int = 0
    loss: float | None = None
    tokens: int | None = None
    attempt: int = field(default=0)
    dot: float | None = None
