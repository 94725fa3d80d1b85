"""Stores with every kind of file that there is, and ways to forge them."""

import hashlib
import io
import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from stores import forged

import timstore
from timstore import Factors, Rows
from timstore.format.zarr_shards import ArrayLayout, stored_name


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gradients(step, sample):
    """Return one record: shared factors, a part with a row map, rows, a dense one, a zero and a wide one."""
    shared = normal(step, 4, 40)
    skipping = normal(20 + sample, 4, 48)
    skipping[1] = 0
    return {
        "q": Factors(shared, normal(10 + sample, 4, 48)),
        "k": Factors(shared, skipping),
        "table": Rows(np.array([sample, 7]), normal(30 + sample, 2, 16), (60, 16)),
        "bias": normal(40 + step, 9),
        "idle": np.zeros(5, np.float32),
        "wide": normal(60 + sample, 3, 100),
    }


def small_plan(rows, width, dtype):
    """Plan an array of chunks of 1 KB, two to a shard."""
    chunk_rows = min(rows, max(1, 1024 // (width * dtype.itemsize)))
    return ArrayLayout(rows, width, stored_name(dtype), chunk_rows, min(2, -(-rows // chunk_rows)))


def fill(path, monkeypatch, precision="int8", durability="commit"):
    """Write a store: two attempts, two writers, several shards to an array, matrices split by columns."""
    with monkeypatch.context() as small:
        # As if rows of 64 numbers were wide, and two chunks of 1 KB a full shard.
        small.setattr("timstore.format.segments.ROW_BYTES", 256)
        small.setattr(ArrayLayout, "plan", small_plan)
        with timstore.open(path, precision=precision, durability=durability) as store:
            for step in range(3):
                for sample in (1, 2, 30):
                    store.append(0, step, sample, gradients(step, sample), lr=0.1, loss=1.5)
                store.commit()
            store.samples.update([{"sample": 1, "owner": "ada"}, {"sample": 2, "owner": "bob"}])
            store.append_fingerprints(0, 2, {"q": "0" * 64})
            store.append_states(0, 2, "exp_avg_sq", {"q": normal(1, 48, 40), "bias": normal(2, 9)})
            store.append_states(0, 0, "start_state", {"q": np.ones((), np.float32)}, name="step")
            store.keep_probe([{"x": np.arange(4)}], loss="mse")
        with timstore.open(path) as store:
            store.begin_attempt(0, 2)
            store.append(0, 2, 1, gradients(5, 1), lr=0.1)
            store.append_rollback(
                {"at": "2026-01-01T00:00:00+00:00", "samples": [1], "strength": 1.0, "method": "closed form"}
                | {"records": 3, "delta_norm": 1.0, "digest_before": "a", "digest_after": "b"},
                before={"bias": normal(3, 9)},
            )
    return path


def files_of(root):
    """Return the relative paths of all files of a store, sorted."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def tree(root):
    """Return everything below a folder: bytes, modes and times."""
    found = {}
    for path in root.rglob("*"):
        status = path.stat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = data, status.st_mode, status.st_mtime_ns, status.st_ctime_ns
    return found


def body(path):
    """Return the fields of a checked record."""
    return json.loads(path.read_bytes().split(b"\n")[0])


def naming(root, name):
    """Return the file that names an object: a record, a compaction, or the row file in which that lists objects."""
    compactions = sorted(root.glob("ckpt/*.json"))
    for info in body(compactions[-1])["objects"] if compactions else ():
        if info["kind"] == "objects" and name in pq.read_table(root / info["path"])["path"].to_pylist():
            return root / info["path"]
    records = [*compactions[-1:], *root.glob("log/*/*.json")]
    return next(one for one in records if any(info["path"] == name for info in body(one)["objects"]))


def replace_object(root, name, data, rows=None):
    """Put other bytes into an object, and let every record agree: size, checksum, and the chain of its writer."""
    record = naming(root, name)
    (root / name).write_bytes(data)

    def changed(info):
        new = {"bytes": len(data), "crc32": zlib.crc32(data), "rows": info["rows"] if rows is None else rows}
        return info | new if info["path"] == name else info

    if record.suffix == ".json":
        reseal(root, record, objects=[changed(info) for info in body(record)["objects"]])
        return
    table = pq.read_table(record)
    described = [changed(info) for info in table.to_pylist()]
    replace_object(root, str(record.relative_to(root)), in_parquet(pa.Table.from_pylist(described, table.schema)))


def reseal(root, record, **changes):
    """Change fields of a record, and let the records after it follow it."""
    record.write_bytes(forged(record.read_bytes(), **changes))
    if record.parent.name == "ckpt":
        return
    for later in sorted(one for one in record.parent.iterdir() if one.name > record.name):
        digest = hashlib.sha256(record.read_bytes().split(b"\n")[0]).hexdigest()
        later.write_bytes(forged(later.read_bytes(), previous=digest))
        record = later


def forge_rows(root, name, change, count=True):
    """Change the rows of a row file, everything else in agreement; `count=False` leaves the number of rows said."""
    table = change(pq.read_table(root / name))
    replace_object(root, name, in_parquet(table), table.num_rows if count else None)


def in_parquet(table):
    """Return a table as the bytes of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
