"""Slices put together to the matrices that they are pieces of."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from timstore.format.schemas import coded
from timstore.format.segments import ROLE_CODES, ROLES
from timstore.format.zarr_shards import ArrayLayout

FIRST_STATE = len(ROLES)

Layouts = Mapping[str, ArrayLayout | None]


@dataclass(frozen=True, slots=True)
class Slices:
    """The slices of one commit in columns, one number of `array` per name in `names`."""

    owner: np.ndarray
    role: np.ndarray
    array: np.ndarray
    names: list[str]
    start: np.ndarray
    rows: np.ndarray

    def within(self, array: str, first: int, last: int) -> np.ndarray:
        """Say which slices hold any of rows [first, last) of an array."""
        if array not in self.names:
            return np.zeros(len(self.owner), bool)
        mine = self.array == self.names.index(array)
        return np.asarray(mine & (self.start < last) & (self.start + self.rows > first))

    def of_gradients(self, chosen: np.ndarray) -> np.ndarray:
        """Return the owners of chosen slices that are gradients."""
        return self.owner[chosen & (self.role >= 0) & (self.role < FIRST_STATE)]


def columns(table: pa.Table) -> Slices:
    """Return a slices table as numbers; a role that does not exist is -1."""
    array, names = coded(table["array"])
    role, roles = coded(table["role"])
    codes = np.array([ROLE_CODES.get(word, -1) for word in roles], np.int64)
    return Slices(
        owner=table["owner"].to_numpy(),
        role=codes[role] if len(codes) else np.zeros(0, np.int64),
        array=array.astype(np.int64),
        names=names,
        start=table["start"].to_numpy(),
        rows=table["rows"].to_numpy(),
    )


@dataclass(frozen=True, slots=True)
class Matrices:
    """Matrices put together of their slices: row n of each (owner, role) that has any.

    Attributes:
        unknown: whether a slice of the matrix could not be placed: then nothing is said about its owner.
        crooked: which slices do not fit the others of their matrix.
        slice: number of the first slice of each matrix.
    """

    owner: np.ndarray
    role: np.ndarray
    rows: np.ndarray
    width: np.ndarray
    dtype: np.ndarray
    unknown: np.ndarray
    slice: np.ndarray
    crooked: np.ndarray

    @classmethod
    def joined(cls, found: Slices, table: pa.Table, sound: np.ndarray, layouts: Layouts) -> "Matrices":
        """Join slices; `sound` says which of them lie in their arrays."""
        known = [layouts.get(name) for name in found.names]
        widths = np.array([layout.width if layout else 0 for layout in known] or [0], np.int64)[found.array]
        dtypes = np.array([layout.dtype if layout else "" for layout in known] or [""])[found.array]
        order = np.lexsort((np.arange(len(found.owner)), found.role, found.owner))
        owner, role = found.owner[order], found.role[order]
        new = np.ones(len(order), bool)
        new[1:] = (owner[1:] != owner[:-1]) | (role[1:] != role[:-1])
        starts = np.flatnonzero(new)
        group = np.cumsum(new) - 1
        first = order[starts]
        width = np.zeros(len(starts), np.int64)
        np.add.at(width, group, widths[order])
        unknown = np.zeros(len(starts), bool)
        np.logical_or.at(unknown, group, ~sound[order])
        crooked = np.zeros(len(order), bool)
        blocks = table["block"].combine_chunks()
        blocked = blocks.is_valid().to_numpy(zero_copy_only=False)
        sizes = np.diff(np.append(starts, len(order)))
        for number in np.flatnonzero((sizes > 1) | blocked[first]):
            members = order[starts[number] : starts[number] + sizes[number]]
            left = 0
            for member in members if not unknown[number] else ():
                right = left + int(widths[member])
                expected = [0, int(found.rows[first[number]]), left, right]
                same = dtypes[member] == dtypes[members[0]] and found.rows[member] == found.rows[members[0]]
                crooked[member] = not same or blocks[int(member)].as_py() != expected
                left = right
        return cls(owner[starts], role[starts], found.rows[first], width, dtypes[first], unknown, first, crooked)

    def of(self, role: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return of each of `count` owners (rows, width, slice, place here) of a role; -1 where it has none."""
        chosen = np.flatnonzero((self.role == ROLE_CODES[role]) & (self.owner >= 0) & (self.owner < count))
        columns = []
        for values in (self.rows, self.width, self.slice, np.arange(len(self.role))):
            column = np.full(count, -1, np.int64)
            column[self.owner[chosen]] = values[chosen]
            columns.append(column)
        return columns[0], columns[1], columns[2], columns[3]
