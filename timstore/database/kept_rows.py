"""What a rollback asks the model about, as a store keeps it: a probe that was given, or rows of the training stream.

A row is one sample as the model takes it. Which samples' are kept follows from their ids alone, so that a resumed run
and several processes choose the same ones without a word.
"""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import pairwise
from typing import Any, Self

import numpy as np
import pyarrow as pa

from timstore.arguments import listed, plain_name
from timstore.errors import CorruptionError, InvalidInputError, shown

KIND = "kept_rows"
# What stands for them where a probe may be given.
KEPT = "auto"
# How many are kept, and how many a rollback asks at once at most.
ROWS = 256
ROWS_BYTES = 64_000_000
_TOGETHER = 16
_NO_LABEL = -100

_SCHEMA = pa.schema(
    [
        ("epoch", pa.int64()),
        ("step", pa.int64()),
        ("sample", pa.int64()),
        ("content_hash", pa.string()),
        ("batch_rows", pa.int64()),
        ("loss", pa.string()),
        ("reason", pa.string()),
        ("layout", pa.string()),
        ("data", pa.binary()),
    ]
)


@dataclass(frozen=True, eq=False, slots=True)
class KeptRow:
    """One sample as the model takes it.

    Attributes:
        epoch, step: when it was drawn first.
        content_hash: of what it consists of; None where that is not known.
        batch_rows: how many rows the batch had that it was drawn in.
        by_row: what the model takes of it, by name or, as text, by place: arrays whose first axis holds this row alone.
        shared: what the model takes besides, the same for all rows of a batch: arrays and plain values.
        is_text: all of it is tokens, or beside tokens, which the attention mask lets be padded.
    """

    sample: int
    epoch: int
    step: int
    content_hash: str | None
    batch_rows: int
    by_row: Mapping[str, Any]
    shared: Mapping[str, Any]
    is_text: bool = False

    def without_padding(self) -> "KeptRow":
        """Return tokens without what the attention mask leaves out at their end; anything else as it is."""
        mask, tokens = self.by_row.get("attention_mask"), self.by_row.get("input_ids")
        if mask is None or tokens is None or mask.ndim != 2:
            return self
        beside = any(one.ndim > 1 and one.shape[:2] != mask.shape for one in self.by_row.values())
        if beside or any(isinstance(one, np.ndarray) and one.ndim for one in self.shared.values()):
            return self
        length = max(1, int(mask[0].astype(bool).nonzero()[0].max(initial=0)) + 1)
        cut = {name: one[:, :length] if one.ndim > 1 else one for name, one in self.by_row.items()}
        return replace(self, by_row=cut, is_text=True)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What rows have in common that one batch can hold; texts may have any length."""
        skipped = 2 if self.is_text else 1
        own = tuple((name, str(one.dtype), one.ndim, one.shape[skipped:]) for name, one in self.by_row.items())
        return self.is_text, own, tuple((name, _comparable(one)) for name, one in self.shared.items())

    @property
    def length(self) -> int:
        """Tokens of a text, 0 of anything else."""
        return int(self.by_row["input_ids"].shape[1]) if self.is_text else 0


@dataclass(frozen=True, eq=False, slots=True)
class KeptRows:
    """Rows in the order of the run.

    Attributes:
        loss: what kind the training loss is, `cross_entropy` or `mse`; None where that is not known.
        reason: why it is not; None also where no gradient was seen that would tell.
    """

    rows: tuple[KeptRow, ...]
    loss: str | None
    reason: str | None = None

    @classmethod
    def read(cls, tables: Iterable[pa.Table], recorded: Container[int] | None) -> Self:
        """Return what several writes hold together: of a sample the newest row, as many rows as one write may hold.

        Args:
            recorded: the samples that were chosen to be recorded, whose rows count only where there are no others;
                None where all were.

        Raises:
            CorruptionError: a row is none.
        """
        newest: dict[int, tuple[KeptRow, str | None, str | None]] = {}
        for one in (one for table in tables for one in table.to_pylist()):
            newest[one["sample"]] = _row(one), one["loss"], one["reason"]
        chosen = [sample for sample in newest if recorded is None or sample not in recorded] or list(newest)
        order = np.argsort(places_of(chosen), kind="stable")[:ROWS]
        held = [newest[chosen[number]] for number in order]
        losses = {loss for _, loss, _ in held if loss is not None}
        reasons = [reason for _, _, reason in held if reason is not None]
        reasons += ["it was not the same throughout"] * (len(losses) > 1)
        loss, reason = (None, reasons[0]) if reasons else (min(losses, default=None), None)
        return cls(tuple(sorted((row for row, _, _ in held), key=_in_time)), loss, reason)

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, samples: Container[int], contents: Container[str]) -> Self:
        """Return the rows of other samples that do not consist of the same either."""
        kept = (row for row in self.rows if row.sample not in samples and row.content_hash not in contents)
        return replace(self, rows=tuple(kept))

    def batches(self) -> list[Any]:
        """Return the rows as batches of rows that fit together, no larger than those of the training.

        Texts of about the same length are padded to the longest of their batch. Rows of one kind make one batch, or
        an even number of about equal ones (if there are as many rows), so that every other batch is half of the rows.
        """
        alike: dict[Any, list[KeptRow]] = {}
        for row in (row.without_padding() for row in self.rows):
            alike.setdefault(row.kind, []).append(row)
        most = min(_TOGETHER, max((row.batch_rows for row in self.rows), default=1))
        found = []
        for rows in alike.values():
            rows.sort(key=lambda row: row.length)
            count = -(-len(rows) // most)
            if count > 1:
                count = min(count + count % 2, len(rows))
            ends = np.linspace(0, len(rows), 1 + count).round().astype(int).tolist()
            found += [_batch(rows[start:end]) for start, end in pairwise(ends)]
        return found


def asks_kept(given: Any) -> bool:
    """Say whether what is given as a probe stands for what a store keeps."""
    return isinstance(given, str) and given == KEPT


def places_of(samples: Sequence[int]) -> np.ndarray:
    """Return each sample's place, uint64, in an order that is as good as random; the first in it are kept."""
    # SplitMix64, whose three rounds leave nothing of the order that ids have.
    numbers = np.asarray(samples, np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def rows_table(rows: Iterable[KeptRow], loss: str | None, reason: str | None) -> pa.Table:
    """Return rows as they are written, with what is known of the training loss."""
    written = []
    for row in rows:
        layout, data = [], []
        for values, shared in ((row.by_row, False), (row.shared, True)):
            for name, value in values.items():
                if isinstance(value, np.ndarray):
                    data.append(value.tobytes())
                    layout.append({"name": name, "shared": shared, "dtype": value.dtype.str, "shape": value.shape})
                else:
                    layout.append({"name": name, "shared": shared, "value": value})
        told = {"loss": loss, "reason": reason, "layout": json.dumps(layout), "data": b"".join(data)}
        written.append({**{name: getattr(row, name) for name in _SCHEMA.names if name not in told}, **told})
    return pa.Table.from_pylist(written, _SCHEMA)


def check_table(rows: Any) -> None:
    """Refuse what `rows_table` did not make.

    Raises:
        InvalidInputError: it is no table, or has other columns.
    """
    if not isinstance(rows, pa.Table) or not rows.schema.equals(_SCHEMA):
        raise InvalidInputError(f"rows of the training stream are a table as rows_table makes it, not {shown(rows)}")


def _row(written: Mapping[str, Any]) -> KeptRow:
    try:
        values: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        start = 0
        for one in json.loads(written["layout"]):
            value = one.get("value")
            if "dtype" in one:
                dtype, shape = np.dtype(one["dtype"]), tuple(one["shape"])
                size = int(np.prod(shape, dtype=np.int64))
                value = np.frombuffer(written["data"], dtype, size, start).reshape(shape).copy()
                start += value.nbytes
            values[bool(one["shared"])][str(one["name"])] = value
        moment = int(written["epoch"]), int(written["step"])
        return KeptRow(
            int(written["sample"]), *moment, written["content_hash"], int(written["batch_rows"]), values[0], values[1]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptionError(f"a row of the training stream that is kept is none: {error!s:.200}") from error


def _batch(rows: Sequence[KeptRow]) -> Any:
    """Return rows of one kind as one batch: a mapping, or a tuple where the model takes them by place."""
    length = max(row.length for row in rows)
    joined = {
        name: np.concatenate([_padded(row.by_row[name], name, length - row.length) for row in rows])
        for name in rows[0].by_row
    }
    batch = {**joined, **rows[0].shared}
    # No argument has a number for a name.
    return tuple(batch[place] for place in sorted(batch, key=int)) if all(map(str.isdigit, batch)) else batch


def _padded(values: np.ndarray, name: str, count: int) -> np.ndarray:
    if not count or values.ndim < 2:
        return values
    widths = [(0, 0), (0, count), *[(0, 0)] * (values.ndim - 2)]
    return np.pad(values, widths, constant_values=_NO_LABEL if name == "labels" else 0)


def _comparable(value: Any) -> Any:
    return (str(value.dtype), value.shape, value.tobytes()) if isinstance(value, np.ndarray) else repr(value)


def _in_time(row: KeptRow) -> tuple[int, int, int]:
    return row.epoch, row.step, row.sample


def pack_probe(batches: list[Any], loss: str) -> bytes:
    """Return probe batches (mappings, sequences or single arrays) as the bytes of one .npz file."""
    arrays: dict[str, np.ndarray] = {}
    layout = []
    for number, batch in enumerate(batches):
        kind = "mapping" if isinstance(batch, Mapping) else "array" if isinstance(batch, np.ndarray) else "sequence"
        if kind == "mapping":
            named = [(plain_name(name, "a name in a batch"), value) for name, value in batch.items()]
        else:
            values = [batch] if kind == "array" else listed(batch, "a batch")
            named = [(str(place), value) for place, value in enumerate(values)]
        for place, (_, value) in enumerate(named):
            arrays[f"{number}.{place}"] = _of_probe(value)
        layout.append({"kind": kind, "names": [name for name, _ in named]})
    header = json.dumps({"loss": loss, "batches": layout})
    sink = BytesIO()
    np.savez_compressed(sink, header=np.frombuffer(header.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    return sink.getvalue()


def _of_probe(value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever such an object raises
        raise InvalidInputError(f"a probe holds arrays of numbers, not {shown(value)}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise InvalidInputError(f"a probe holds arrays of numbers, not of {array.dtype}: {shown(value)}")
    return array


def unpack_probe(data: bytes) -> tuple[list[Any], str]:
    """Return what `pack_probe` was given.

    Raises:
        CorruptionError: these are not the bytes that it returned.
    """
    batches: list[Any] = []
    try:
        with np.load(BytesIO(data), allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            for number, entry in enumerate(header["batches"]):
                values = [arrays[f"{number}.{position}"] for position in range(len(entry["names"]))]
                if entry["kind"] == "mapping":
                    batches.append(dict(zip(entry["names"], values, strict=True)))
                else:
                    batches.append(values[0] if entry["kind"] == "array" else tuple(values))
        return batches, header["loss"]
    except Exception as error:  # a zip file in a zip file's many ways of being none
        raise CorruptionError(f"the probe that is kept is none: {type(error).__name__}: {error}") from error
