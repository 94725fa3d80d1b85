"""Whether the store that was opened still lies where it was."""

from timstore.errors import CorruptionError, NotFoundError, StorageError
from timstore.format import layout
from timstore.format.objects import Mark, Objects
from timstore.format.settings import Settings, read_settings


class Place:
    """The settings file of a store: made once, so that another one is another store's, or a copy's."""

    def __init__(self, objects: Objects, settings: Settings) -> None:
        self._objects = objects
        self._store = settings.store_id
        self._mark: Mark | None = None

    def require(self) -> None:
        """Refuse a store that is gone, in one system call.

        Raises:
            StorageError: kind `gone`.
        """
        self._look()

    def check(self) -> bool:
        """Say whether nothing happened to it since the last look; False when a copy of the store took its place.

        Raises:
            StorageError: kind `gone`: there is no store any more; kind `replaced`: there is another one.
        """
        mark, known = self._look(), self._mark
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

    def _look(self) -> Mark:
        try:
            return self._objects.mark(layout.SETTINGS)
        except NotFoundError as error:
            raise StorageError(
                f"the store is gone: {error}. It was moved or deleted while it was open. Move it back "
                "and try again, or open it where it is now.",
                kind="gone",
            ) from error


def replaced(why: str) -> StorageError:
    """Return the error of a store that another one, or an earlier copy of it, took the place of."""
    return StorageError(
        f"the store that was opened is not there any more: {why}. Open it again; this handle writes nothing more.",
        kind="replaced",
    )
