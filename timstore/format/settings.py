"""What a store is: `timstore.json`, written once when the store is created."""

import secrets
from dataclasses import dataclass

from timstore.encoding import PRECISIONS
from timstore.errors import AlreadyExistsError, CorruptionError, InvalidInputError, NotFoundError, StorageError
from timstore.format import paths
from timstore.format.local_files import Mark, Objects

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
    format: tuple[int, int] = paths.FORMAT
    reader_features: tuple[str, ...] = tuple(sorted(paths.READER_FEATURES))
    writer_features: tuple[str, ...] = ()

    @property
    def durable(self) -> bool:
        """Whether commits are fsynced."""
        return self.durability == "commit"

    @property
    def unknown_writer_features(self) -> tuple[str, ...]:
        """What a writer of this store must do and this version cannot."""
        return tuple(name for name in self.writer_features if name not in paths.WRITER_FEATURES)

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
    if objects.list(paths.LOG) or objects.list(paths.RUNS):
        try:
            objects.mark(paths.SETTINGS)
        except NotFoundError:
            raise CorruptionError(
                f"{paths.SETTINGS} is missing from a store that has records. Restore it from a copy, or take "
                "another path",
                path=paths.SETTINGS,
            ) from None
    data = paths.seal(
        {
            **paths.header(settings.reader_features, settings.writer_features),
            "store": settings.store_id,
            "durability": settings.durability,
            "precision": settings.precision,
            "max_rel_error": settings.max_rel_error,
        }
    )
    try:
        objects.create(paths.SETTINGS, data)
    except AlreadyExistsError:
        if objects.read(paths.SETTINGS) != data:
            raise
    return settings


def read_settings(objects: Objects) -> Settings:
    """Return a store's settings, verified.

    Raises:
        NotFoundError: there is no store.
        CorruptionError: the file is not what was written.
        FormatError: a newer version is needed.
    """
    path = paths.SETTINGS
    fields, _ = paths.unseal(objects.read(path, most=paths.RECORD_BYTES), path)
    settings = Settings(
        store_id=paths.take(fields, "store", str, path),
        durability=paths.take(fields, "durability", str, path),
        precision=paths.take(fields, "precision", str, path),
        max_rel_error=paths.take(fields, "max_rel_error", float, path),
        format=(fields["format"][0], fields["format"][1]),
        reader_features=paths.take_names(fields, "reader_features", path),
        writer_features=paths.take_names(fields, "writer_features", path),
    )
    fault = _fault(settings)
    if fault:
        raise CorruptionError(f"{path}: {fault}", path=path)
    return settings


class Place:
    """Whether the store that was opened still lies where it was.

    Its settings file was made once: another one is another store's, or a copy's.
    """

    def __init__(self, objects: Objects, settings: Settings) -> None:
        self._objects = objects
        self._store = settings.store_id
        self._mark: Mark | None = None

    def require(self) -> Mark:
        """Return the mark of the settings file, in one system call.

        Raises:
            StorageError: kind `gone`: there is no store any more.
        """
        try:
            return self._objects.mark(paths.SETTINGS)
        except NotFoundError as error:
            raise StorageError(
                f"the store is gone: {error}. It was moved or deleted while it was open. Move it back "
                "and try again, or open it where it is now.",
                kind="gone",
            ) from error

    def check(self) -> bool:
        """Say whether nothing happened to it since the last check; False when a copy of the store took its place.

        Raises:
            StorageError: kind `gone`; kind `replaced`: there is another store.
        """
        mark, known = self.require(), self._mark
        if mark == known:
            return True
        try:
            store = read_settings(self._objects).store_id
        except (CorruptionError, NotFoundError) as error:
            raise replaced(f"its settings are others now: {error}") from error
        if store != self._store:
            raise replaced("another store was made in its place")
        self._mark = mark
        return known is None


def replaced(why: str) -> StorageError:
    """Return the error of a store that another one, or an earlier copy of it, took the place of."""
    return StorageError(
        f"the store that was opened is not there any more: {why}. Open it again; this handle writes nothing more.",
        kind="replaced",
    )


def _fault(settings: Settings) -> str | None:
    if settings.durability not in DURABILITIES:
        return f"durability is {' or '.join(DURABILITIES)}, not {settings.durability!r:.80}"
    if settings.precision not in PRECISIONS:
        return f"precision is {', '.join(PRECISIONS)}, not {settings.precision!r:.80}"
    if not 0 <= settings.max_rel_error <= 1:
        return f"max_rel_error is a fraction between 0 and 1, not {settings.max_rel_error}"
    return None
