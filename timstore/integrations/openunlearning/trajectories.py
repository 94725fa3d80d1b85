"""Where the trajectories are: a store, or an older layout that is made one."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from timstore.errors import InvalidInputError, NotFoundError
from timstore.format import paths
from timstore.integrations.openunlearning.arguments import RollbackArguments
from timstore.legacy import import_trajectories
from timstore.legacy.importing import STAGED
from timstore.legacy.layout import FORMATS, find
from timstore.legacy.staging import beside
from timstore.legacy.trajectory import STORE
from timstore.os_errors import reporting

IMPORTED = "imported.tim"
_ORIGIN = "imported.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trajectories:
    """Where they are.

    Attributes:
        path: of the store.
        as_original: whether they came by the original's files or by `save_gradient_trajectory`, whose callers chose
            whose gradients to save, and saved those of the samples to be forgotten.
    """

    path: Path
    as_original: bool


def trajectories_of(asked: RollbackArguments) -> Trajectories:
    """Return where the trajectories are; an older layout is imported into a store beside its files, once.

    Raises:
        NotFoundError: there is no directory, or nothing in it that was asked for.
        InvalidInputError: both a store and an older layout are there; what `import_trajectories` refuses.
    """
    folder = Path(asked.tim_output_dir)
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no directory {folder}: tim_output_dir is the one that TIMRecorder recorded into",
            path=str(folder),
        )
    stores = [one for one in (folder, folder / STORE) if (one / paths.SETTINGS).is_file()]
    endings = {end for ends in FORMATS.values() for end in ends}
    has_older = any(one.suffix in endings for one in folder.glob("epoch_*"))
    wanted = asked.trajectory_format
    if wanted == "timstore" or (wanted == "auto" and not has_older):
        if not stores:
            older = "" if wanted == "timstore" else ", and no epoch_N.json or epoch_N.pkl"
            raise NotFoundError(f"{folder} holds no store {STORE}{older}: nothing was recorded there", path=str(folder))
        return Trajectories(stores[0], as_original=stores[0] != folder)
    if wanted == "auto" and stores:
        raise InvalidInputError(
            f"{folder} holds a store and files of the older layout: set trajectory_format to timstore, json or pickle"
        )
    return Trajectories(_imported(folder, asked), as_original=True)


def _imported(folder: Path, asked: RollbackArguments) -> Path:
    """Return the store that an older layout was imported into, now or before.

    Raises:
        InvalidInputError: it was made of other files, or with other numbers.
    """
    files = find(folder, asked.trajectory_format).files.values()
    origin = {
        "files": {path.name: path.stat().st_size for path in files},
        "lr": asked.lr,
        "scale": asked.scale,
    }
    store, kept = folder / IMPORTED, folder / _ORIGIN
    half = beside(store, STAGED)
    with reporting("write", kept):
        if (store.exists() or half.exists()) and kept.exists() and json.loads(kept.read_bytes()) != origin:
            raise InvalidInputError(
                f"{store} was made of other files, or with another lr or scale: remove it, or {half.name} if that is "
                "there, to import again"
            )
        kept.write_text(json.dumps(origin, indent=1))
    if not store.exists():
        report = import_trajectories(
            folder,
            store,
            format=asked.trajectory_format,
            lr=asked.lr,
            scale=asked.scale,
            allow_pickle=asked.allow_pickle,
            progress=False,
        )
        logger.info("imported %s into %s: %s", folder, store, report)
    return store
