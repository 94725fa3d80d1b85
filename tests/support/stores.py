"""A small store for the tests of its log, and ways to break it."""

import hashlib
import json
from contextlib import contextmanager

from timstore.format.checksums import read_verified
from timstore.format.local_files import LocalObjects
from timstore.format.log import claim_attempt
from timstore.format.settings import create_settings

STEPS = ((0, 1), (0, 3))


def build(*contents):
    """Return a builder of objects with those contents."""
    return lambda: (
        (f"z/w8-float32/c/{number}/0", data, "shard", 2 * len(data), number) for number, data in enumerate(contents)
    )


def commit(writer, *contents, attempt=0, steps=STEPS, records=1):
    """Write one commit of objects with those contents."""
    return writer.commit(attempt, 0, steps, records, build(*contents))


def contents(objects, view):
    """Return what the objects of every commit hold, verified."""
    return [[read_verified(objects, info, one) for info in one.objects] for one in view.commits]


@contextmanager
def altered(path, change):
    """Hold changed bytes in a file for a while."""
    original = path.read_bytes()
    path.write_bytes(change(original))
    try:
        yield
    finally:
        path.write_bytes(original)


def sealed(fields):
    """Return a record with those fields and their check line."""
    body = json.dumps(fields).encode()
    return body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def forged(data, **changes):
    """Return a record with other fields and a check line that agrees with them."""
    return sealed({**json.loads(data.split(b"\n")[0]), **changes})


def flipped(data):
    """Yield (position, data with one bit of that byte turned)."""
    for position in range(len(data)):
        turned = bytearray(data)
        turned[position] ^= 1 << (position % 8)
        yield position, bytes(turned)


class Intercepted(LocalObjects):
    """Lets a test stand in for one operation."""

    intercept = None

    def create(self, path, data):
        if self.intercept is not None:
            self.intercept(path, data)
        else:
            super().create(path, data)


def made_store(root):
    """Return the objects of a new store with one attempt."""
    objects = Intercepted(root, durable=True)
    create_settings(objects)
    claim_attempt(objects, 0, 0, "all", 1, first=True)
    return objects


def record_files(objects, writer):
    """Return the paths of a writer's log records in order."""
    return sorted((objects.root / "log" / writer.writer).iterdir())


TABLES = ("records", "gradients", "steps", "parameters", "samples", "attempts", "fingerprints", "rollbacks", "commits")
_STATES = "SELECT attempt, epoch, step, role, parameter, commit, owner FROM stored.states ORDER BY ALL"


def everything(store):
    """Return all that a reader can get out of a store that has a probe."""
    # Ordered by all columns: without an order DuckDB promises none.
    tables = {name: store.sql(f"SELECT * FROM {name} ORDER BY ALL").fetchall() for name in TABLES}
    gradients = {
        (record.attempt, record.epoch, record.step, record.sample, name): record.dense(name).tobytes()
        for record in store.read()
        for name in record.gradients
    }
    batches, loss = store.probe()
    probe = [{name: array.tobytes() for name, array in batch.items()} for batch in batches]
    states = store.snapshot().catalog.rows(_STATES).to_pylist()
    return tables, gradients, probe, loss, store.latest_fingerprints(), states, store.settings


def one_object(**changes):
    """Return a record's description of an object."""
    described = {"path": "records.parquet", "bytes": 1, "crc32": 0, "kind": "records", "logical_bytes": 1, "rows": 1}
    return described | changes
