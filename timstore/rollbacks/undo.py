"""Take a rollback back: the parameters as they were, to the last bit."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial

import torch

from timstore.arguments import plain_name
from timstore.database.identity import combined_digest, recognise
from timstore.database.states import State
from timstore.database.store import Store
from timstore.errors import CorruptionError, CoverageError, NotFoundError, ReadOnlyError, StateError
from timstore.format.segments import ByteCache
from timstore.interrupts import CriticalSection
from timstore.model.fingerprints import digest, digests
from timstore.records import Parameter
from timstore.rollbacks.apply import Write, Writes
from timstore.rollbacks.targets import InModule, ModelInMemory
from timstore.rollbacks.vectors import KEPT_BYTES, Workspace

_log = logging.getLogger(__name__)

_CACHE_BYTES = 64 * 1024 * 1024


def undo(store: Store, model: torch.nn.Module, rollback_id: str, section: CriticalSection) -> str:
    """Give a model back what `rollback(keep_delta=True)` changed, and return its id; see `timstore.Store.undo`."""
    if store.mode == "r":
        raise ReadOnlyError(f"{store.path} was opened to read, and an undo is written down: open it with mode 'a'")
    rollback_id = plain_name(rollback_id, "rollback_id")
    snapshot = store.snapshot()
    rows = snapshot.catalog.rows(
        "SELECT * FROM rollbacks WHERE digest_after = ? AND method != 'undo'", [rollback_id]
    ).to_pylist()
    if not rows:
        raise NotFoundError(
            f"{store.path} has no rollback {rollback_id}; SELECT digest_after FROM rollbacks lists them"
        )
    old = State.find(snapshot, ByteCache(_CACHE_BYTES), "theta", rollback_id=rollback_id)
    if not old.places:
        raise CoverageError(
            f"rollback {rollback_id} kept nothing to go back to: pass keep_delta=True to rollback, or load the "
            "checkpoint that it began from",
            kind="no-delta",
        )
    after = digests(model)
    identity = recognise(snapshot, after)
    if identity.digest != rollback_id:
        raise StateError(
            f"the model is not the one that rollback {rollback_id} made: it was changed since; undo later rollbacks "
            "first, in turn",
            kind="not-the-rolled-back",
        )
    parameters = dict(model.named_parameters())

    def before_it(name: str) -> torch.Tensor:
        like = parameters[name]
        width = Parameter(name, tuple(like.shape), "").matrix_shape[1]
        return torch.from_numpy(old.read(name, width, 0, like.numel())).to(like.dtype).view(like.shape)

    # Twice through the store, a parameter at a time: everything is right before anything is changed.
    before = {**after, **{name: digest(before_it(name)) for name in old.places}}
    if combined_digest({name: before[name] for name in identity.names}) != rows[-1]["digest_before"]:
        raise CorruptionError(
            f"what rollback {rollback_id} kept is not what the model was before it; nothing was changed",
            kind="other-digest",
        )
    # The row of the rollback the other way round; the records that it took out are in the model again.
    row = {**rows[-1], "at": datetime.now(UTC).isoformat(), "method": "undo", "records": 0, "removed": None}
    row["digest_before"], row["digest_after"] = row["digest_after"], row["digest_before"]

    def blocks(name: str) -> Iterator[torch.Tensor]:
        yield before_it(name).reshape(-1)

    writes = [Write(InModule(parameters[name]), partial(blocks, name)) for name in old.places]
    with Workspace({}, memory_limit_bytes=KEPT_BYTES) as workspace:
        ModelInMemory(model).change(Writes(writes, workspace), lambda: store.append_rollback(row), section)
        _log.info("%s: rollback %s was undone", store.path, rollback_id)
        return section.finish(rollback_id)
