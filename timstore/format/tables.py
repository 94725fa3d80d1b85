"""The row tables of a commit: their columns, as Parquet holds them and DuckDB loads them.

The row number in a commit's gradients file is that gradient's `owner` number in its slices; likewise for the
states file, whose roles are others.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from timstore.errors import CorruptionError

_INT, _SMALL, _FLOAT, _TEXT, _BOOL = pa.int64(), pa.int32(), pa.float64(), pa.string(), pa.bool_()
_MOMENT = [("attempt", _INT), ("epoch", _INT), ("step", _INT)]
_RECORD = [*_MOMENT, ("rank", _INT), ("sample", _INT)]

SCHEMAS: dict[str, pa.Schema] = {
    "records": pa.schema(
        [*_RECORD, ("loss", _FLOAT), ("tokens", _INT), ("norm", _FLOAT), ("bytes", _INT), ("dot", _FLOAT)]
    ),
    "gradients": pa.schema(
        [
            *_RECORD,
            ("parameter", _TEXT),
            ("part", _SMALL),
            ("encoding", _TEXT),
            ("precision", _TEXT),
            ("norm", _FLOAT),
            ("rel_error", _FLOAT),
            ("bytes", _INT),
            ("dense_bytes", _INT),
        ]
    ),
    "slices": pa.schema(
        [
            ("owner", _INT),
            ("role", _TEXT),
            ("array", _TEXT),
            ("start", _INT),
            ("rows", _INT),
            ("row_map", pa.list_(_SMALL)),
            ("block", pa.list_(_INT)),
        ]
    ),
    # Where chunks lie in shards that hold several, so that one of them can be read, and checked, without the others.
    "chunks": pa.schema(
        [("array", _TEXT), ("chunk", _SMALL), ("offset", _SMALL), ("bytes", _SMALL), ("crc32", _INT)],
    ),
    "steps": pa.schema(
        [
            *_MOMENT,
            ("rank", _INT),
            ("group_id", _SMALL),
            ("optimizer", _TEXT),
            *((name, _FLOAT) for name in ("lr", "momentum", "dampening")),
            ("nesterov", _BOOL),
            *((name, _FLOAT) for name in ("beta1", "beta2", "eps", "weight_decay")),
            ("decoupled", _BOOL),
            ("maximize", _BOOL),
            ("consumed_ratio", _FLOAT),
            ("samples", _INT),
            ("tokens", _INT),
            ("sample_ids", pa.list_(_INT)),
            ("idle", pa.list_(_TEXT)),
            ("fresh", pa.list_(_TEXT)),
            ("amsgrad", _BOOL),
            ("counter", _INT),
            ("grad_norm", _FLOAT),
            ("amp_scale", _FLOAT),
            ("clip_value", _FLOAT),
            ("mean_over", _TEXT),
            ("micro_batches", pa.list_(_INT)),
            ("skipped", _INT),
            ("options", _TEXT),
        ]
    ),
    "parameters": pa.schema(
        [
            ("attempt", _INT),
            ("parameter", _TEXT),
            ("shape", pa.list_(_INT)),
            ("dtype", _TEXT),
            ("numel", _INT),
            ("group_id", _SMALL),
        ]
    ),
    # The user's own columns follow.
    "samples": pa.schema([("sample", _INT)]),
    "fingerprints": pa.schema([*_MOMENT, ("parameter", _TEXT), ("digest", _TEXT)]),
    # One whole parameter's worth of numbers of one role each; the row number is the `owner` of its slices.
    "states": pa.schema(
        [
            *_MOMENT,
            ("role", _TEXT),
            ("name", _TEXT),
            ("parameter", _TEXT),
            ("precision", _TEXT),
            ("rel_error", _FLOAT),
            ("bytes", _INT),
            ("rollback_id", _TEXT),
        ]
    ),
    "rollbacks": pa.schema(
        [
            ("at", _TEXT),
            ("samples", pa.list_(_INT)),
            ("strength", _FLOAT),
            ("method", _TEXT),
            ("records", _INT),
            ("delta_norm", _FLOAT),
            ("digest_before", _TEXT),
            ("digest_after", _TEXT),
            # [attempt, epoch, step, rank, sample] of each record that was taken out.
            ("removed", pa.list_(pa.list_(_INT))),
            ("parameters", pa.list_(_TEXT)),
            ("optimizer_states", pa.list_(_TEXT)),
        ]
    ),
}

# What a checkpoint says of the commits that it covers, beside their rows.
COMMITS = pa.schema(
    [
        ("writer", pa.string()),
        ("seq", pa.int64()),
        ("at", pa.string()),
        ("attempt", pa.int64()),
        ("rank", pa.int64()),
        *((name, pa.int64()) for name in ("first_epoch", "first_step", "last_epoch", "last_step")),
        ("records", pa.int64()),
        ("bytes", pa.int64()),
        ("digest", pa.string()),
    ]
)
OBJECTS = pa.schema(
    [
        ("commit", pa.int32()),
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("crc32", pa.int64()),
        ("kind", pa.string()),
        ("logical_bytes", pa.int64()),
        ("rows", pa.int64()),
    ]
)

# Columns that stores written before them lack; there they read as NULL.
ADDED = {
    "records": ("dot",),
    "steps": (
        *("amsgrad", "counter", "grad_norm", "amp_scale", "clip_value", "mean_over", "micro_batches", "skipped"),
        "options",
    ),
    "states": ("name",),
    "rollbacks": ("removed", "parameters", "optimizer_states"),
}

# Columns in which every row says something; readers refuse a table in which one does not.
REQUIRED = {
    "records": ("attempt", "epoch", "step", "rank", "sample"),
    "gradients": ("attempt", "epoch", "step", "rank", "sample", "parameter", "part", "encoding", "precision"),
    "slices": ("owner", "role", "array", "start", "rows"),
    "chunks": ("array", "chunk", "offset", "bytes", "crc32"),
    "steps": ("attempt", "epoch", "step", "rank", "group_id"),
    "parameters": ("parameter", "shape"),
    "samples": ("sample",),
    "fingerprints": ("attempt", "epoch", "step", "parameter", "digest"),
    "states": ("attempt", "epoch", "step", "role", "parameter"),
    "rollbacks": (),
    "commits": ("writer", "seq", "at", "attempt", "rank", "records", "digest"),
    "objects": ("commit", "path", "bytes", "crc32", "kind", "rows"),
}

_TYPES = {
    kind: dict(zip(schema.names, schema.types, strict=True))
    for kind, schema in {**SCHEMAS, "commits": COMMITS, "objects": OBJECTS}.items()
}

# What roll-up folds and SQL shows. Slices and chunks are read with their arrays, and stay beside them.
ROLLED = tuple(kind for kind in SCHEMAS if kind not in ("slices", "chunks"))

_LARGE_BYTES = 1_000_000
# Few distinct words in many rows.
_WORDS = ["parameter", "encoding", "precision", "optimizer", "role"]


def write_rows(table: pa.Table, kind: str) -> bytes:
    """Return a row table as Parquet, without what no reader of a store asks for: most bytes of a small commit."""
    words = [column.name for column in table.schema if pa.types.is_dictionary(column.type)]
    texts = [column.name for column in table.schema if pa.types.is_string(column.type)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        # Numbers repeat in a folded file: decoding them takes most of the time of opening a large store.
        use_dictionary=True if words else texts,
        write_statistics=False,
        # Only these have types that Parquet alone does not tell: dictionaries, and what users attach to samples.
        store_schema=bool(words) or kind == "samples" or kind not in SCHEMAS,
    )
    return bytes(sink.getvalue())


def read_rows(
    data: bytes,
    path: str,
    columns: Sequence[str] | None = None,
    *,
    kind: str | None = None,
    rows: int | None = None,
    words: bool = False,
) -> pa.Table:
    """Return the row table that a Parquet file holds, or some columns of it.

    Args:
        path: of the file, for errors.
        kind: of the rows, whose columns and types they must have, and something in every row of those in `REQUIRED`.
        rows: how many it must hold, where that is known.
        words: hold repeating words as numbers into a dictionary: smaller in memory, and sooner in DuckDB.

    Raises:
        CorruptionError: it holds no such table, though its checksum may be right.
    """
    try:
        # The dataset reader behind `read_table` takes three times as long for the few rows of one commit.
        source = pa.BufferReader(data)
        metadata = pq.read_metadata(source)
        if rows is not None and metadata.num_rows != rows:
            message = f"{path} holds {metadata.num_rows} rows instead of {rows}"
            raise CorruptionError(message, kind="count", path=path)
        held = [name for name in _WORDS if name in metadata.schema.to_arrow_schema().names] if words else None
        file = pq.ParquetFile(source, metadata=metadata, pre_buffer=False, read_dictionary=held)
        table = file.read(columns, use_threads=len(data) > _LARGE_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise CorruptionError(f"{path} holds no readable rows: {error!s:.200}", path=path) from error
    misfit = _misfit(table, kind, columns) if kind in REQUIRED else None
    if misfit:
        raise CorruptionError(f"{path} {misfit}", path=path)
    return table


def _misfit(table: pa.Table, kind: str, columns: Sequence[str] | None) -> str | None:
    """Say in what way a table is not one of its kind; further columns are those of a newer version."""
    wanted = _TYPES[kind]
    held = dict(zip(table.schema.names, table.schema.types, strict=True))
    if len(held) < len(table.schema.names):
        return "has a column twice"
    for name in wanted if columns is None else columns:
        if name not in held:
            if name in ADDED.get(kind, ()):
                continue
            return f"has no column {name}"
        if held[name] != wanted[name] and not _may_be(held[name], wanted[name]):
            return f"has a column {name} of {held[name]}, not of {wanted[name]}"
    for name in (*REQUIRED[kind], "commit", "owner"):
        if name in held and table[name].null_count:
            return f"has a column {name} that is empty in {table[name].null_count} rows"
    return None


def _may_be(held: pa.DataType, wanted: pa.DataType) -> bool:
    # Of a column in which no row says anything, a file need not know the type.
    return bool(pa.types.is_null(held) or (pa.types.is_dictionary(held) and held.value_type == wanted))


def coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return a column of text as numbers, and the words that they stand for."""
    words = column.combine_chunks().dictionary_encode()
    return words.indices.to_numpy(zero_copy_only=False), words.dictionary.to_pylist()


def numbered(table: pa.Table, kind: str, commit: int) -> pa.Table:
    """Say which commit the rows are of, and which rows of it they are where slices name them by number."""
    if kind in ("gradients", "states"):
        table = table.add_column(0, "owner", integers(np.arange(table.num_rows, dtype=np.int32)))
    return table.add_column(0, "commit", integers(np.full(table.num_rows, commit, np.int32)))


def integers(numbers: np.ndarray) -> pa.Array:
    """Return a column of numbers; `pa.array` would import pandas for it, which takes longer than opening a store."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(numbers), [None, pa.py_buffer(numbers)])


def as_text(table: pa.Table) -> pa.Table:
    """Hold words as plain text, not as numbers into a dictionary."""
    plain = [
        column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    return pa.table(plain, names=table.column_names)


def alike(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Spell columns alike, since SQL does not tell Owner from owner, and hold words as plain text."""
    spelled: dict[str, str] = {}
    tables_alike = []
    for table in tables:
        names = [spelled.setdefault(name.lower(), name) for name in table.column_names]
        tables_alike.append(as_text(table).rename_columns(names))
    return tables_alike
