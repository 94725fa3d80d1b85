"""Times with a time zone among the rows of an answer, as Python's own: DuckDB itself makes them with pytz only."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from duckdb.sqltypes import DuckDBPyType

from timstore.catalog.tables import quoted

_ZONED = "timestamp with time zone"


def has_zone(kind: DuckDBPyType) -> bool:
    """Say whether there are times with a zone in values of a type."""
    return kind.id == _ZONED or any(has_zone(part) for part in _parts(kind).values())


def without_zone(kind: DuckDBPyType) -> str:
    """Return the type, in SQL, of the same values with their times as the session's zone has them."""
    if not has_zone(kind):
        return str(kind)
    parts = {name: without_zone(part) for name, part in _parts(kind).items()}
    match kind.id:
        case "list":
            return f"{parts['child']}[]"
        case "array":
            return f"{parts['child']}[{dict(kind.children)['size']}]"
        case "map":
            return f"MAP({parts['key']}, {parts['value']})"
        case "struct" | "union":
            return f"{kind.id}({', '.join(f'{quoted(name)} {part}' for name, part in parts.items())})"
    return "TIMESTAMP"


def aware(kind: DuckDBPyType | None, value: Any) -> Any:
    """Return a value that came `without_zone`, its times in UTC. A union does not say what it holds, and stays so."""
    if value is None or kind is None or not has_zone(kind) or kind.id == "union":
        return value
    parts = _parts(kind)
    if kind.id == _ZONED:
        return value.replace(tzinfo=UTC)
    if kind.id == "struct":
        return {name: aware(part, value[name]) for name, part in parts.items()}
    if kind.id == "map":
        return {aware(parts["key"], key): aware(parts["value"], one) for key, one in value.items()}
    return type(value)(aware(parts["child"], one) for one in value)


def _parts(kind: DuckDBPyType) -> dict[str, DuckDBPyType]:
    """Return the types that a type is made of."""
    if kind.id not in ("list", "array", "map", "struct", "union"):
        return {}
    # Beside them an array names its size, and a union its tag, under no name.
    return {name: part for name, part in kind.children if name and isinstance(part, DuckDBPyType)}
