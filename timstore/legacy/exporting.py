"""A store as a directory of the older layout."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timstore.database.store import Store
from timstore.errors import AlreadyExistsError, InvalidInputError
from timstore.legacy.json_files import json_pieces
from timstore.legacy.layout import FORMATS, INFO, MARKER, Samples, sample_of
from timstore.legacy.pickle_files import pickle_pieces
from timstore.legacy.staging import place_of, staged
from timstore.os_errors import reporting
from timstore.progress import shown

# So many epochs without records get an empty file each; where there are more, the others' files have no announcement.
_HOLES = 1000


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote; prints well."""

    epochs: int = 0
    records: int = 0
    gradients: int = 0

    def __str__(self) -> str:
        return f"{self.gradients:,} gradients of {self.records:,} records in {self.epochs} epochs"


def export_trajectories(
    store: Store | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    format: str = "json",
    where: str | None = None,
    progress: bool | None = None,
) -> Exported:
    """Write the older layout: `global_info.json` and an `epoch_N.json` or `epoch_N.pkl` for each epoch.

    Whole gradients, as float32 (float64 where they were recorded so), with the step of each beside it; imported again
    they are the same to the last bit. A sample that was drawn several times in an epoch has as many keys in its JSON;
    a reader that makes a dict of it sees the last, and a pickle has room for one. The rate is each step's own times
    what clipping left of the gradient; momentum, second moments and the digests of the model have no place in this
    layout. Keys are text in JSON, integers in a pickle.

    The directory is there when all of it is. Memory: of one record, and what `Store.read` takes.

    Args:
        store: one that is open, or a path.
        where: an SQL condition on the `records` table.
        progress: True for bars, or lines where there is no terminal; by default bars on a terminal.

    Raises:
        AlreadyExistsError: the directory exists and is not empty.
        InvalidInputError: another format; parameters that were trained at several rates in one step; a sample that a
            pickle has no room for; two parameters of which one is called as the step marker of the other.
        ReadOnlyError, StorageError: it cannot be written.
    """
    if format not in FORMATS:
        raise InvalidInputError(f"format is json or pickle, not {format!r}")
    folder = place_of(directory)
    with reporting("write", folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise AlreadyExistsError(f"{folder} is there, and no empty folder: choose a new one", path=str(folder))
    with ExitStack() as stack:
        opened = store if isinstance(store, Store) else stack.enter_context(Store(store, "r"))
        if opened.mode != "r":
            opened.commit()
        bars = stack.enter_context(shown(progress, "pieces"))
        work = _Export(opened, f"({where})" if where else "true", format)
        task = bars.add_task("exporting", total=work.count())
        with staged(folder, "exporting") as half, reporting("write", folder):
            return work.write(half, lambda: bars.advance(task))


class _Export:
    """One store on its way into a directory.

    Args:
        chosen: an SQL condition on the `records` table.
    """

    def __init__(self, store: Store, chosen: str, format: str) -> None:
        self._store = store
        self._chosen = chosen
        self._format = format
        self._records = 0
        self._gradients = 0

    def count(self) -> int:
        return int(self._ask(f"SELECT count(*) FROM records WHERE {self._chosen}")[0][0])

    def write(self, folder: Path, advance: Callable[[], None]) -> Exported:
        self._check_names()
        if self._format == "pickle":
            self._check_slots()
        query = f"SELECT DISTINCT epoch FROM records WHERE {self._chosen} ORDER BY 1"
        epochs = [epoch for (epoch,) in self._ask(query)]
        rates = self._rates()
        info: dict[str, Any] = {"num_steps": len(rates)}
        if not epochs or epochs[-1] < len(epochs) + _HOLES:
            # The original's reader wants a file of every epoch from 0 on.
            epochs = list(range(epochs[-1] + 1)) if epochs else []
            info["num_epoch"] = len(epochs)
        known = {moment: rate for moment, rate in sorted(rates.items()) if rate is not None}
        if len(known) == len(rates) and len(set(known.values())) == 1:
            info["learning_rate"] = next(iter(known.values()))
        elif known:
            info["learning_rates"] = [[*moment, rate] for moment, rate in known.items()]
        (folder / INFO).write_text(json.dumps(info, indent=1))
        names, unknown = self._names(), self._unknown()
        pieces = json_pieces if self._format == "json" else pickle_pieces
        for epoch in epochs:
            with open(folder / f"epoch_{epoch}{FORMATS[self._format][0]}", "wb") as file:
                file.writelines(pieces(self._samples(epoch, names, unknown, advance)))
        return Exported(len(epochs), self._records, self._gradients)

    def _ask(self, query: str) -> list[tuple[Any, ...]]:
        return self._store.snapshot().catalog.fetch(query)

    def _samples(
        self, epoch: int, names: Mapping[int, str], unknown: set[tuple[int, int]], advance: Callable[[], None]
    ) -> Samples:
        """Yield every record's key, step (None where an import made it up) and gradients."""
        for record in self._store.read(f"epoch = {epoch} AND {self._chosen}"):
            step = None if (epoch, record.step) in unknown else record.step
            gradients = ((name, record.dense(name)) for name in record.gradients)
            yield names.get(record.sample, record.sample), step, gradients
            self._records, self._gradients = self._records + 1, self._gradients + len(record.gradients)
            advance()

    def _rates(self) -> dict[tuple[int, int], float | None]:
        """Return what each step's gradient was multiplied by, None where a step with records has no rate.

        Raises:
            InvalidInputError: several rates in one step.
        """
        taken = "lr * coalesce(consumed_ratio, 1) * if(maximize, -1, 1)"
        rows = self._ask(
            f"SELECT epoch, step, min({taken}), max({taken}) FROM steps FULL JOIN (SELECT DISTINCT epoch, step FROM "
            f"records WHERE {self._chosen}) USING (epoch, step) GROUP BY ALL"
        )
        several = next(((epoch, step) for epoch, step, low, high in rows if low != high), None)
        if several is not None:
            raise InvalidInputError(
                f"epoch {several[0]}, step {several[1]} has several learning rates, and the older layout one: export "
                "the parameters of one group into a store of their own first"
            )
        return {(epoch, step): rate for epoch, step, rate, _ in rows}

    def _check_names(self) -> None:
        """Refuse a parameter that is called as the step marker of another: nobody could tell them apart."""
        names = set(self._store.snapshot().parameters())
        marked = next((name for name in sorted(names) if name + MARKER in names), None)
        if marked is not None:
            raise InvalidInputError(
                f"parameters {marked} and {marked}{MARKER}: in the older layout the second name is the step of the "
                "first; keep this store as it is",
                parameter=marked,
            )

    def _check_slots(self) -> None:
        """Refuse samples that were drawn several times in one epoch: a dict has one slot for each."""
        twice = self._ask(
            f"SELECT epoch, sample FROM records WHERE {self._chosen} GROUP BY ALL HAVING count(*) > 1 LIMIT 1"
        )
        if twice:
            epoch, sample = twice[0]
            raise InvalidInputError(
                f"sample {sample} was drawn more than once in epoch {epoch}, and a pickle of this layout has one slot "
                "for it: export as JSON, or choose with where=",
                sample=sample,
            )

    def _names(self) -> dict[int, str]:
        """Return the samples whose ids were made of text."""
        rows = self._store.snapshot().catalog.rows("SELECT * FROM samples")
        if "name" not in rows.column_names:
            return {}
        pairs = zip(rows["sample"].to_pylist(), rows["name"].to_pylist(), strict=True)
        return {
            sample: name for sample, name in pairs if isinstance(name, str) and sample_of(name, "") == (sample, name)
        }

    def _unknown(self) -> set[tuple[int, int]]:
        """Return the moments whose numbers an import made up."""
        query = "SELECT DISTINCT epoch, step FROM steps WHERE json_extract_string(options, '$.step') = 'unknown'"
        return set(self._ask(query))
