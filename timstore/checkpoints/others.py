"""What else lies where a checkpoint is, and may hold the samples still: a rollback changes none of it, and says so."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from timstore.checkpoints.cut_off import LEFT
from timstore.checkpoints.discover import PICKLES, SUFFIX, Checkpoint

# Weights in other formats, and what optimizers saved: their moments are sums of the samples' gradients.
_WEIGHTS = (SUFFIX, *PICKLES, ".pickle", ".gguf", ".h5", ".keras", ".msgpack", ".onnx", ".npz", ".npy", ".distcp")
# What a Trainer saves in the same formats, and nothing of the samples is in.
_HARMLESS = re.compile(
    r"training_args\.bin|scheduler\.(pt|bin)|scaler\.pt|rng_state(_\d+)?\.pth|random_states_\d+\.pkl"
)


def warnings_of(checkpoint: Checkpoint) -> list[str]:
    """Return what a report warns of: other files that may hold the samples, and what earlier rollbacks left."""
    return [one for one in (_other_weights(checkpoint), left_of(checkpoint)) if one is not None]


def left_of(checkpoint: Checkpoint) -> str | None:
    """Return a sentence on the files that rollbacks left when they were cut off; None where there are none."""
    if checkpoint.is_folder:
        left = [name for name in _below(checkpoint.path) if LEFT.fullmatch(os.path.basename(name))]
    else:
        # The other files beside it are those of others.
        found = ((name, LEFT.fullmatch(name)) for name in sorted(_beside(checkpoint.path)))
        left = [name for name, match in found if match is not None and match[1] == checkpoint.path.name]
    if not left:
        return None
    folder = checkpoint.path if checkpoint.is_folder else checkpoint.path.absolute().parent
    return (
        f"{folder} holds {_counted(left, 'hidden file')} of a rollback that was cut off (the first is {left[0]}): .old "
        "ones are weights from before it, with the samples in them; delete them where the checkpoint is whole without"
    )


def _other_weights(checkpoint: Checkpoint) -> str | None:
    if not checkpoint.is_folder:
        return None
    held = {file.path.name for file in checkpoint.files}
    others = [
        name
        for name in _below(checkpoint.path)
        if name.lower().endswith(_WEIGHTS) and name not in held and not _HARMLESS.fullmatch(os.path.basename(name))
    ]
    if not others:
        return None
    return (
        f"{checkpoint.path} holds {_counted(others, 'other file')} of weights or of an optimizer's state (the first is "
        f"{others[0]}), which stay or are copied as they are and may hold the samples still: delete what must not"
    )


def _counted(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) > 1)}"


def _below(root: Path) -> Iterator[str]:
    """Yield the path in a folder of every file below it, those of its own first; what cannot be read is passed over."""
    for folder, inner, names in os.walk(root):
        inner.sort()
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in sorted(names))


def _beside(path: Path) -> list[str]:
    return next((names for _, _, names in os.walk(path.absolute().parent)), [])
