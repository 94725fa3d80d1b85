"""Whole parameters' worth of numbers beside the records: optimizer state, and parameters at some moments."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from timstore.arguments import mapped, plain_name
from timstore.database.snapshot import Snapshot
from timstore.database.writer import Item, table
from timstore.encoding import Matrix
from timstore.encoding.precision import store_as
from timstore.encoding.products import norm
from timstore.errors import CorruptionError, InvalidInputError
from timstore.format.segments import ByteCache, SegmentReader
from timstore.records import BFLOAT16, Parameter, as_array, narrow, widen

_BLOCK_NUMBERS = 1 << 16


def state_precision(role: str, of_records: str) -> str:
    """Return how numbers of a role are kept in a store whose records have that precision."""
    # The second moment enters under a square root and a division: bfloat16 is off by 0.1 % of a step at most.
    # Parameters at a waypoint are asked for a curvature, which is an estimate.
    if role in ("exp_avg_sq", "theta"):
        return "bfloat16"
    # Whole gradients are as fine as the records that are subtracted from them; what a run is started or restored
    # from is kept bit for bit.
    return "bfloat16" if role == "gradient" and of_records != "exact" else "exact"


def state_item(
    moment: tuple[int, int],
    attempt: int,
    role: str,
    numbers: Mapping[str, Any],
    precision: str,
    *,
    name: str | None = None,
    rollback_id: str | None = None,
    known: Mapping[str, Parameter] | None = None,
) -> Item:
    """Return what the writer is given for one role: a row and a matrix per parameter.

    Args:
        numbers: parameter name to an array or tensor of its shape; not copied.
        name: of the optimizer's state, for role `start_state`.
        known: the parameters of the store so far.

    Raises:
        InvalidInputError: naming the parameter whose numbers cannot be kept.
    """
    rows, matrices = [], []
    state = None if name is None else plain_name(name, "name")
    for given, value in mapped(numbers, f"{role} maps parameter names to arrays").items():
        parameter = plain_name(given, f"{role}: a parameter's name")
        array = _numbers(role, parameter, value, (known or {}).get(parameter))
        wide = array.reshape(Parameter(parameter, array.shape, "").matrix_shape)
        stored, error = _stored(wide, precision)
        rows.append(
            {
                "attempt": attempt,
                "epoch": moment[0],
                "step": moment[1],
                "role": role,
                "name": state,
                "parameter": parameter,
                "precision": precision,
                "rel_error": error,
                "bytes": stored.nbytes,
                "rollback_id": rollback_id,
            }
        )
        matrices.append((role, Matrix(stored)))
    size_bytes = sum(matrix.values.nbytes for _, matrix in matrices)
    return Item(size_bytes, tables={"states": table("states", rows)}, moment=moment, states=matrices)


def _numbers(role: str, name: str, value: Any, known: Parameter | None) -> np.ndarray:
    try:
        array = as_array(value)
    except InvalidInputError as error:
        raise InvalidInputError(f"{role} of {name}: {error}", parameter=name) from error
    if not array.size:
        raise InvalidInputError(
            f"{role} of {name}: its shape {array.shape} has an empty axis, leave it out", parameter=name
        )
    counter = role == "start_state" and array.size == 1
    if known is not None and array.shape != known.shape and not counter:
        raise InvalidInputError(
            f"{role} of {name}: its shape is {array.shape}, and the parameter's {known.shape}", parameter=name
        )
    return array


def _stored(numbers: np.ndarray, precision: str) -> tuple[np.ndarray, float]:
    """Return a matrix as it is kept, exact or as bfloat16, and its relative error."""
    if precision == "exact" or numbers.dtype == BFLOAT16:
        return store_as(numbers, "exact")[0], 0.0
    stored = np.empty(numbers.shape, BFLOAT16)
    norms, errors = [], []
    # By blocks that a cache holds: the whole would be read a dozen times.
    for rows in range(0, len(numbers), step := max(1, _BLOCK_NUMBERS // max(1, numbers.shape[1]))):
        block = widen(numbers[rows : rows + step])
        stored[rows : rows + step] = narrow(block)
        norms.append(norm(block))
        errors.append(norm(block - widen(stored[rows : rows + step])))
    size = math.hypot(*norms)
    return stored, math.hypot(*errors) / size if size else 0.0


@dataclass(frozen=True, eq=False, slots=True)
class State:
    """Numbers of one role for some parameters, read a block of rows at a time.

    Attributes:
        places: parameter name to (commit, owner).
    """

    snapshot: Snapshot
    cache: ByteCache
    role: str
    places: Mapping[str, tuple[int, int]]
    _readers: dict[int, SegmentReader] = field(default_factory=dict)

    @classmethod
    def find(
        cls,
        snapshot: Snapshot,
        cache: ByteCache,
        role: str,
        *,
        moment: tuple[int, int] | None = None,
        rollback_id: str | None = None,
        name: str | None = None,
    ) -> "State":
        """Return the state kept at a moment (the newest live one when None), or before a rollback.

        Args:
            name: of the optimizer's state, for role `start_state`.
        """
        # Only live moments: what a later attempt superseded belongs to another model.
        live = "SELECT DISTINCT attempt, epoch, step FROM states WHERE role = ? AND rollback_id IS NULL"
        at = "true" if moment is None else "epoch = ? AND step = ?"
        newest = (
            f"(attempt, epoch, step) IN (SELECT (attempt, epoch, step) FROM ({live}) WHERE {at} "
            "ORDER BY attempt DESC, epoch DESC, step DESC LIMIT 1)"
        )
        condition, params = (newest, [role, *(moment or ())]) if rollback_id is None else ("true", [])
        rows = snapshot.catalog.rows(
            "SELECT parameter, commit, owner FROM stored.states WHERE role = ? AND name IS NOT DISTINCT FROM ? "
            f"AND rollback_id IS NOT DISTINCT FROM ? AND {condition} ORDER BY commit, owner",
            [role, name, rollback_id, *params],
        ).to_pylist()
        return cls(snapshot, cache, role, {row["parameter"]: (row["commit"], row["owner"]) for row in rows})

    def size(self, name: str) -> int:
        """Return how many numbers are kept of one parameter."""
        reader, owner = self._place(name)
        return reader.count(owner, self.role) * reader.width(owner, self.role)

    def read(self, name: str, width: int, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of one parameter, flat, in float32 or float64.

        Args:
            width: of the parameter's matrix.
        """
        reader, owner = self._place(name)
        first = start // max(1, width)
        found = reader.rows([owner], self.role, first, -(-stop // max(1, width))).reshape(-1)
        found = found[start - first * width : stop - first * width]
        if len(found) != stop - start:
            raise CorruptionError(f"the {self.role} of {name} has not the size of the parameter", parameter=name)
        return found

    def _place(self, name: str) -> tuple[SegmentReader, int]:
        """Return where one parameter's numbers are; a commit's tables are read once."""
        commit, owner = self.places[name]
        if commit not in self._readers:
            self._readers[commit] = self.snapshot.reader(commit, self.cache)
        return self._readers[commit], owner
