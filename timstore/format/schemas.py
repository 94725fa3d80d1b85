"""The row tables of a commit: their columns, as Parquet holds them and DuckDB loads them.

The row number in a commit's gradients file is that gradient's `owner` number in its slices; likewise for the
states file, whose roles are others.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from timstore.errors import CorruptionError

_TYPES = {
    "int": pa.int64(),
    "int32": pa.int32(),
    "float": pa.float64(),
    "text": pa.string(),
    "bool": pa.bool_(),
    "int[]": pa.list_(pa.int64()),
    "int32[]": pa.list_(pa.int32()),
    "text[]": pa.list_(pa.string()),
    "int[][]": pa.list_(pa.list_(pa.int64())),
}
_MOMENT = "attempt int, epoch int, step int"
_RECORD = f"{_MOMENT}, rank int, sample int"

# Each column by name and type. `?`: a row may say nothing there. `+`: a store that was written before there was such a
# column lacks it, and it reads as NULL.
_COLUMNS = {
    "records": f"{_RECORD}, loss float?, tokens int?, norm float?, bytes int?, dot float+",
    "gradients": f"{_RECORD}, parameter text, part int32, encoding text, precision text, norm float?, "
    "rel_error float?, bytes int?, dense_bytes int?",
    "slices": "owner int, role text, array text, start int, rows int, row_map int32[]?, block int[]?",
    # Where chunks lie in shards that hold several, so that one of them can be read, and checked, without the others.
    "chunks": "array text, chunk int32, offset int32, bytes int32, crc32 int",
    "steps": f"{_MOMENT}, rank int, group_id int32, optimizer text?, lr float?, momentum float?, dampening float?, "
    "nesterov bool?, beta1 float?, beta2 float?, eps float?, weight_decay float?, decoupled bool?, maximize bool?, "
    "consumed_ratio float?, samples int?, tokens int?, sample_ids int[]?, idle text[]?, fresh text[]?, amsgrad bool+, "
    "counter int+, grad_norm float+, amp_scale float+, clip_value float+, mean_over text+, micro_batches int[]+, "
    "skipped int+, options text+",
    "parameters": "attempt int?, parameter text, shape int[], dtype text?, numel int?, group_id int32?",
    # The user's own columns follow.
    "samples": "sample int",
    "fingerprints": f"{_MOMENT}, parameter text, digest text",
    # One whole parameter's worth of numbers of one role each; the row number is the `owner` of its slices.
    "states": f"{_MOMENT}, role text, name text+, parameter text, precision text?, rel_error float?, bytes int?, "
    "rollback_id text?",
    # `removed`: [attempt, epoch, step, rank, sample] of each record that was taken out.
    "rollbacks": "at text?, samples int[]?, strength float?, method text?, records int?, delta_norm float?, "
    "digest_before text?, digest_after text?, removed int[][]+, parameters text[]+, optimizer_states text[]+",
    # What a compaction says of the commits that it covers, beside their rows.
    "commits": "writer text, seq int, at text, attempt int, rank int, first_epoch int?, first_step int?, "
    "last_epoch int?, last_step int?, records int, bytes int?, digest text",
    "objects": "commit int32, path text, bytes int, crc32 int, kind text, logical_bytes int?, rows int",
}


def _schema(kind: str) -> pa.Schema:
    # Every column is optional in a file: what may be missing is for readers to know.
    columns = (column.rstrip("?+").split() for column in _COLUMNS[kind].split(", "))
    return pa.schema([(name, _TYPES[type_name]) for name, type_name in columns])


def _named(kind: str, is_wanted: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(column.split()[0] for column in _COLUMNS[kind].split(", ") if is_wanted(column))


COMMITS, OBJECTS = _schema("commits"), _schema("objects")
SCHEMAS: dict[str, pa.Schema] = {kind: _schema(kind) for kind in _COLUMNS if kind not in ("commits", "objects")}

# Columns in which every row says something, else readers refuse a table; and those that stores written earlier lack.
REQUIRED = {kind: _named(kind, lambda column: not column.endswith(("?", "+"))) for kind in _COLUMNS}
ADDED = {kind: _named(kind, lambda column: column.endswith("+")) for kind in _COLUMNS}

_COLUMN_TYPES = {
    kind: dict(zip(schema.names, schema.types, strict=True))
    for kind, schema in {**SCHEMAS, "commits": COMMITS, "objects": OBJECTS}.items()
}

# What a compaction folds and SQL shows. Slices and chunks are read with their arrays, and stay beside them.
FOLDED = tuple(kind for kind in SCHEMAS if kind not in ("slices", "chunks"))

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
        coded_words = [name for name in _WORDS if name in metadata.schema.to_arrow_schema().names] if words else None
        file = pq.ParquetFile(source, metadata=metadata, pre_buffer=False, read_dictionary=coded_words)
        table = file.read(columns, use_threads=len(data) > _LARGE_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise CorruptionError(f"{path} holds no readable rows: {error!s:.200}", path=path) from error
    misfit = _misfit(table, kind, columns) if kind in REQUIRED else None
    if misfit:
        raise CorruptionError(f"{path} {misfit}", path=path)
    return table


def _misfit(table: pa.Table, kind: str, columns: Sequence[str] | None) -> str | None:
    """Say in what way a table is not one of its kind; further columns are those of a newer version."""
    wanted = _COLUMN_TYPES[kind]
    present = dict(zip(table.schema.names, table.schema.types, strict=True))
    if len(present) < len(table.schema.names):
        return "has a column twice"
    for name in wanted if columns is None else columns:
        if name not in present:
            if name in ADDED[kind]:
                continue
            return f"has no column {name}"
        if present[name] != wanted[name] and not _may_be(present[name], wanted[name]):
            return f"has a column {name} of {present[name]}, not of {wanted[name]}"
    # A compaction adds these two, but to samples, whose further columns are the user's.
    numbers = () if kind == "samples" else ("commit", "owner")
    for name in (*REQUIRED[kind], *numbers):
        if name in present and table[name].null_count:
            return f"has a column {name} that is empty in {table[name].null_count} rows"
    return None


def _may_be(present: pa.DataType, wanted: pa.DataType) -> bool:
    # Of a column in which no row says anything, a file need not know the type.
    return bool(pa.types.is_null(present) or (pa.types.is_dictionary(present) and present.value_type == wanted))


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
