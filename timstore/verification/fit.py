"""Whether the matrices of gradients and states are those that their encoding, precision and parameter ask for."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timstore.encoding.precision import SCALE_BLOCK
from timstore.format.schemas import coded
from timstore.format.segments import STATE_ROLES
from timstore.verification.matrices import FIRST_STATE, Matrices

# Parameter to the matrix shapes that it was declared with, anywhere in the store; None if that cannot be told.
Shapes = Mapping[str, set[tuple[int, int]]] | None

_STORED = {"exact": ("float64", "float32", "float16", "bfloat16"), "bfloat16": ("bfloat16",), "int8": ("int8",)}
_ROLES = {"factors": {"inputs", "output_gradients"}, "dense": {"values"}, "rows": {"values", "indices"}}
_NUMBERS = ("inputs", "output_gradients", "values")


def misfits(kind: str, table: pa.Table, matrices: Matrices, slices: pa.Table, shapes: Shapes) -> dict[str, np.ndarray]:
    """Return what is wrong with gradients or states, in words, and the row numbers that it is wrong with."""
    fit = _Fit(table, matrices, shapes)
    if kind == "gradients":
        fit.gradients(slices)
    else:
        fit.states()
    return {message: owners for message, owners in fit.wrong.items() if len(owners)}


def index_bounds(gradients: pa.Table, shapes: Shapes) -> np.ndarray:
    """Return below what the row indices of each gradient must be; the largest number where that is not known."""
    codes, names = coded(gradients["parameter"])
    known = [shapes.get(name) if shapes else None for name in names]
    bounds = [max(rows for rows, _ in options) if options else 2**62 for options in known]
    of_words = np.array(bounds or [0], np.int64)
    return np.asarray(of_words[codes])


class _Role:
    """The matrices of one role, one per owner."""

    def __init__(self, matrices: Matrices, role: str, count: int) -> None:
        self.rows, self.width, self.slice, place = matrices.of(role, count)
        self.there = place >= 0
        self.dtype = matrices.dtype[place] if len(matrices.dtype) else np.full(count, "")


class _Fit:
    def __init__(self, table: pa.Table, matrices: Matrices, shapes: Shapes) -> None:
        self._table = table
        self._matrices = matrices
        self._count = table.num_rows
        self.wrong: dict[str, np.ndarray] = {}
        codes, names = coded(table["parameter"])
        options = [sorted(shapes.get(name, ())) if shapes is not None else [] for name in names]
        self._undeclared = np.array([shapes is not None and not one for one in options] or [False], bool)[codes]
        self._empty = np.array([any(0 in shape for shape in one) for one in options] or [False], bool)[codes]
        self._options = [
            np.array([one[number] if number < len(one) else (-1, -1) for one in options] or [(-1, -1)], np.int64)[codes]
            for number in range(max(map(len, options), default=0))
        ]
        self._unknown_shape = np.array([not one for one in options] or [True], bool)[codes]

    def gradients(self, slices: pa.Table) -> None:
        table = self._table
        roles = {role: _Role(self._matrices, role, self._count) for role in (*_NUMBERS, "indices")}
        scales = {role: _Role(self._matrices, f"{role}_scales", self._count) for role in _NUMBERS}
        there = np.logical_or.reduce([one.there for one in (*roles.values(), *scales.values())])
        self._note("are of a parameter that no commit declares", self._undeclared)
        norms = pc.fill_null(table["norm"], 0.0).to_numpy()
        settled = self._settled(self._matrices.role < FIRST_STATE)
        self._note("have a norm and no numbers", settled & ~there & (norms != 0) & ~self._empty)
        looked = settled & there & ~self._empty
        for encoding, needed in _ROLES.items():
            mine = looked & self._is("encoding", encoding)
            complete = np.logical_and.reduce([one.there == (role in needed) for role, one in roles.items()])
            scaled = self._is("precision", "int8")
            for role, one in scales.items():
                complete &= one.there == (scaled & (role in needed))
            self._note(f"do not have the matrices that {encoding} and their precision ask for", mine & ~complete)
            mine &= complete
            for role in needed - {"indices"}:
                self._stored(mine, roles[role])
                self._scales(mine & scaled, roles[role], scales[role])
            if encoding == "factors":
                self._factors(mine, roles, slices)
            elif encoding == "dense":
                values = roles["values"]
                self._shaped(mine, lambda m, d, v=values: (v.rows == m) & (v.width == d))
            else:
                self._rows(mine, roles["values"], roles["indices"])

    def states(self) -> None:
        settled = self._settled(self._matrices.role >= FIRST_STATE)
        for role in STATE_ROLES:
            one = _Role(self._matrices, role, self._count)
            mine = self._is("role", role)
            self._note("have numbers of another role", settled & one.there & ~mine)
            self._note("have no numbers", settled & mine & ~one.there & ~self._empty)
            looked = settled & mine & one.there & ~self._empty
            self._stored(looked, one)
            single = (one.rows == 1) & (one.width == 1) & (role == "start_state")
            self._shaped(looked & ~single, lambda m, d, one=one: (one.rows == m) & (one.width == d))

    def _factors(self, mine: np.ndarray, roles: Mapping[str, _Role], slices: pa.Table) -> None:
        inputs, outputs = roles["inputs"], roles["output_gradients"]
        lengths, least, most = _row_maps(slices)
        mapped = mine.copy()
        mapped[mine] = lengths[outputs.slice[mine]] >= 0
        self._note("have as many inputs as output gradients not", mine & ~mapped & (inputs.rows != outputs.rows))
        at = np.flatnonzero(mapped)
        place = outputs.slice[at]
        beyond = (lengths[place] > 0) & ((least[place] < 0) | (most[place] >= inputs.rows[at]))
        self._note(
            "have a row_map of another length than their output gradients", at[lengths[place] != outputs.rows[at]]
        )
        self._note("have a row_map that leads outside their inputs", at[beyond])
        self._shaped(mine, lambda m, d: (outputs.width == m) & (inputs.width == d))

    def _rows(self, mine: np.ndarray, values: _Role, indices: _Role) -> None:
        uneven = (indices.width != 1) | (indices.rows != values.rows) | ~np.isin(indices.dtype, ("int32", "int64"))
        self._note("have indices that are not one whole number per row", mine & uneven)
        self._shaped(mine, lambda _, d: values.width == d)

    def _stored(self, mine: np.ndarray, one: _Role) -> None:
        for precision, dtypes in _STORED.items():
            wrong = mine & self._is("precision", precision) & ~np.isin(one.dtype, dtypes)
            self._note("are not stored in their precision", wrong)

    def _scales(self, mine: np.ndarray, values: _Role, scales: _Role) -> None:
        fits = (scales.rows == values.rows) & (scales.width == -(-values.width // SCALE_BLOCK))
        self._note("have scales that do not fit their values", mine & ~(fits & (scales.dtype == "bfloat16")))

    def _shaped(self, mine: np.ndarray, fits: Callable[..., Any]) -> None:
        """Find what fits none of the shapes with which its parameter was declared."""
        sound = self._unknown_shape.copy()
        for option in self._options:
            sound |= np.asarray(fits(option[:, 0], option[:, 1])) & (option[:, 0] >= 0)
        self._note("do not have the shape of their parameter", mine & ~sound)

    def _settled(self, roles: np.ndarray) -> np.ndarray:
        """Say of which rows every slice could be placed."""
        matrices = self._matrices
        unsettled = roles & matrices.unknown & (matrices.owner >= 0) & (matrices.owner < self._count)
        settled = np.ones(self._count, bool)
        settled[matrices.owner[unsettled]] = False
        return settled

    def _is(self, column: str, word: str) -> np.ndarray:
        return np.asarray(pc.equal(self._table[column], word).to_numpy())

    def _note(self, message: str, wrong: np.ndarray) -> None:
        owners = np.flatnonzero(wrong) if wrong.dtype == bool else wrong
        if len(owners):
            self.wrong[message] = np.union1d(self.wrong.get(message, owners), owners)


def _row_maps(slices: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each slice the length of its row_map, -1 where it has none, and its least and largest number."""
    column = slices["row_map"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy().astype(np.int64)
    least, most = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    filled = np.flatnonzero(lengths > 0)
    if len(filled):
        # A row_map with nothing in a place is read as a number there: the largest, so that it is found.
        values = pc.fill_null(column.flatten(), 2**31 - 1).to_numpy()
        starts = np.concatenate([[0], np.cumsum(lengths[filled])[:-1]])
        least[filled] = np.minimum.reduceat(values, starts)
        most[filled] = np.maximum.reduceat(values, starts)
    return lengths, least, most
