"""What was read lately: objects and decoded chunks, up to a number of bytes, for one task and all of its threads."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class ByteCache:
    """The least recently used entries, up to a number of bytes; the newest one always stays.

    May be used by several threads: one of them makes an entry, others that want the same one wait for it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._making: dict[Hashable, threading.Event] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """Return the entry, made by `make` when it is not here; what `make` raises, one caller gets."""
        while True:
            with self._lock:
                if key in self._entries:
                    self._entries.move_to_end(key)
                    return self._entries[key][0]
                made_by_other = self._making.get(key)
                if made_by_other is None:
                    self._making[key] = threading.Event()
                    break
            made_by_other.wait()
        try:
            entry = make()
            self._keep(key, entry, size(entry))
        finally:
            with self._lock:
                self._making.pop(key).set()
        return entry

    def _keep(self, key: Hashable, entry: Any, size_bytes: int) -> None:
        with self._lock:
            self._entries[key] = entry, size_bytes
            self._bytes += size_bytes
            while self._bytes > self.limit_bytes and len(self._entries) > 1:
                _, (_, oldest_bytes) = self._entries.popitem(last=False)
                self._bytes -= oldest_bytes
