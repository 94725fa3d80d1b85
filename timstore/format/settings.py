"""What a store is: `timstore.json`, written once when the store is created."""

import secrets
from dataclasses import dataclass

from timstore.encoding import PRECISIONS
from timstore.errors import AlreadyExistsError, CorruptionError, InvalidInputError
from timstore.format import layout
from timstore.format.objects import Objects

DURABILITIES = ("commit", "os")


@dataclass(frozen=True, slots=True)
class Settings:
    """The options that a store was created with.

    Attributes:
        store_id: random; every log record carries it, so that records of another store are noticed.
        durability: `commit` (a commit survives a power loss) or `os` (it survives the process).
        precision: exact, bfloat16 or int8.
        max_rel_error: the largest relative error a part may have under that precision.
        reader_features, writer_features: what readers and writers must know beyond the format version.
    """

    store_id: str
    durability: str
    precision: str
    max_rel_error: float
    format: tuple[int, int] = layout.FORMAT
    reader_features: tuple[str, ...] = tuple(sorted(layout.READER_FEATURES))
    writer_features: tuple[str, ...] = ()

    @property
    def durable(self) -> bool:
        """Whether commits are fsynced."""
        return self.durability == "commit"

    @property
    def unknown_writer_features(self) -> tuple[str, ...]:
        """What a writer of this store must do and this version cannot."""
        return tuple(name for name in self.writer_features if name not in layout.WRITER_FEATURES)

    @property
    def writable(self) -> bool:
        """Whether this version may write to the store."""
        return not self.unknown_writer_features


def create_settings(
    objects: Objects, *, precision: str = "exact", max_rel_error: float = 0.02, durability: str = "commit"
) -> Settings:
    """Make a store: write its settings, durable at return when `objects` is.

    Raises:
        InvalidInputError: for an unknown precision or durability or an error that is no fraction.
        AlreadyExistsError: a store is there already.
        CorruptionError: the remains of one are: records without settings.
        StorageError, ReadOnlyError: nothing became visible.
    """
    settings = Settings(secrets.token_hex(16), durability, precision, float(max_rel_error))
    fault = _fault(settings)
    if fault:
        raise InvalidInputError(fault)
    if (objects.list(layout.LOG) or objects.list(layout.RUNS)) and not objects.exists(layout.SETTINGS):
        raise CorruptionError(
            f"{layout.SETTINGS} is missing from a store that has records. Restore it from a copy, or take another path",
            path=layout.SETTINGS,
        )
    fields = {
        **layout.header(settings.reader_features, settings.writer_features),
        "store": settings.store_id,
        "durability": settings.durability,
        "precision": settings.precision,
        "max_rel_error": settings.max_rel_error,
    }
    data, _ = layout.seal(fields)
    try:
        objects.create(layout.SETTINGS, data)
    except AlreadyExistsError:
        if objects.read(layout.SETTINGS) != data:
            raise
    return settings


def read_settings(objects: Objects) -> Settings:
    """Return a store's settings, verified.

    Raises:
        NotFoundError: there is no store.
        CorruptionError: the file is not what was written.
        FormatError: a newer version is needed.
    """
    path = layout.SETTINGS
    fields, _ = layout.unseal(objects.read(path, most=layout.RECORD_BYTES), path)
    settings = Settings(
        store_id=layout.take(fields, "store", str, path),
        durability=layout.take(fields, "durability", str, path),
        precision=layout.take(fields, "precision", str, path),
        max_rel_error=layout.take(fields, "max_rel_error", float, path),
        format=(fields["format"][0], fields["format"][1]),
        reader_features=layout.take_names(fields, "reader_features", path),
        writer_features=layout.take_names(fields, "writer_features", path),
    )
    fault = _fault(settings)
    if fault:
        raise CorruptionError(f"{path}: {fault}", path=path)
    return settings


def _fault(settings: Settings) -> str | None:
    if settings.durability not in DURABILITIES:
        return f"durability is {' or '.join(DURABILITIES)}, not {settings.durability!r:.80}"
    if settings.precision not in PRECISIONS:
        return f"precision is {', '.join(PRECISIONS)}, not {settings.precision!r:.80}"
    if not 0 <= settings.max_rel_error <= 1:
        return f"max_rel_error is a fraction between 0 and 1, not {settings.max_rel_error}"
    return None
