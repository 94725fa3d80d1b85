"""Memory for what a probe's answers leave behind, so that they need not be asked for again."""


class Room:
    """Bytes that several share: whoever comes first takes of them, and the first that does not fit ends it for all."""

    def __init__(self, size_bytes: int = 0) -> None:
        self._free_bytes = size_bytes

    @property
    def is_left(self) -> bool:
        """Whether anything may still fit."""
        return self._free_bytes > 0

    def take(self, size_bytes: int) -> bool:
        """Say whether so many bytes fit, and take them."""
        self._free_bytes -= size_bytes
        return self._free_bytes >= 0
