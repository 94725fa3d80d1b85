"""What SQL answers with: DuckDB's relation, whose errors are ours and which Ctrl-C ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC
from functools import partial, wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import duckdb
from duckdb.sqltypes import DuckDBPyType

from timstore.catalog.tables import quoted
from timstore.errors import InvalidInputError, StateError

T = TypeVar("T")
_Relation = duckdb.DuckDBPyRelation
_ZONED = "timestamp with time zone"
_cursors: WeakKeyDictionary[_Relation, duckdb.DuckDBPyConnection] = WeakKeyDictionary()


@contextmanager
def in_our_words() -> Iterator[None]:
    """Turn what DuckDB says of a question into errors of ours."""
    try:
        yield
    except duckdb.ConnectionException as error:
        raise StateError(
            "the store that this was asked of was closed: open it again and ask again, or take the rows before "
            "(.df(), .fetchall())",
            kind="closed",
        ) from error
    except duckdb.OutOfMemoryException as error:
        raise InvalidInputError(
            "the answer takes more memory than SQL has here: ask for fewer rows or columns, or open the store with "
            f"more, timstore.open(path, sql_memory='4GB'). DuckDB says: {error}",
            kind="sql-memory",
        ) from error
    except duckdb.Error as error:
        raise InvalidInputError(f"DuckDB says: {error}", kind="sql") from error


def interruptible(cursor: duckdb.DuckDBPyConnection, work: Callable[[], T]) -> T:
    """Return what work on a cursor returns; Ctrl-C ends it, and the cursor works afterwards.

    DuckDB looks for signals only now and then, and not at all while its own threads do the work; what a handler
    raises it turns into a RuntimeError. So the main thread, where signals arrive, waits for another one.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    with ThreadPoolExecutor(1, "timstore-sql") as pool:
        try:
            answer = pool.submit(work)
        except RuntimeError:
            return work()  # the interpreter ends, and starts no more threads
        try:
            # Again and again: where another library took the signal over (polars does), it wakes no wait without end.
            while wait([answer], timeout=0.1).not_done:
                pass
        except BaseException:
            while wait([answer], timeout=0.02).not_done:
                cursor.interrupt()
            raise
        return answer.result()


class Answer(_Relation):
    """DuckDB's relation: what it says, be it of the last row or after `close`, it says in errors of ours.

    Rows of Python objects hold times with a zone as datetimes in UTC; DuckDB alone would need pytz for them.
    """

    __slots__ = ()

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return all rows."""
        return list(self.iter_rows())

    def iter_rows(self, batch_size: int = 1024) -> Iterator[tuple[Any, ...]]:
        """Yield the rows; DuckDB holds them from the first one on."""
        kinds = self.types
        zoned = {at: kind for at, kind in enumerate(kinds) if _has_zone(kind)}
        plain = [f"#{at + 1}" + (f"::{_without_zone(kind)}" if at in zoned else "") for at, kind in enumerate(kinds)]
        rows = _Relation.iter_rows(self.project(", ".join(plain)) if zoned else self, batch_size)
        with in_our_words():
            row = interruptible(_cursors[self], lambda: next(rows, None))
            while row is not None:
                yield tuple(_aware(zoned.get(at), value) for at, value in enumerate(row)) if zoned else row
                row = next(rows, None)


def as_answer(result: Any, cursor: duckdb.DuckDBPyConnection) -> Any:
    """Return a relation as an answer, anything else as it is."""
    if type(result) is _Relation:
        result.__class__ = Answer
        _cursors[result] = cursor
    return result


def _answering(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def answered(relation: Answer, *args: Any, **kwargs: Any) -> Any:
        cursor = _cursors[relation]
        with in_our_words():
            return as_answer(interruptible(cursor, partial(method, relation, *args, **kwargs)), cursor)

    return answered


_SPECIAL = ("__str__", "__repr__", "__len__", "__contains__", "__getattr__", "__getitem__", "__arrow_c_stream__")
for _name, _member in vars(_Relation).items():
    if _name in vars(Answer) or (_name.startswith("_") and _name not in _SPECIAL):
        continue
    if isinstance(_member, property) and _member.fget is not None:
        setattr(Answer, _name, property(in_our_words()(_member.fget), doc=_member.__doc__))
    elif callable(_member):
        setattr(Answer, _name, _answering(_member))


def _has_zone(kind: DuckDBPyType) -> bool:
    """Say whether there are times with a zone in values of a type."""
    return kind.id == _ZONED or any(_has_zone(part) for part in _parts(kind).values())


def _without_zone(kind: DuckDBPyType) -> str:
    """Return the type, in SQL, of the same values with their times as the session's zone has them."""
    if not _has_zone(kind):
        return str(kind)
    parts = {name: _without_zone(part) for name, part in _parts(kind).items()}
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


def _aware(kind: DuckDBPyType | None, value: Any) -> Any:
    """Return a value that came `_without_zone`, its times in UTC. A union does not say what it holds, and stays so."""
    if value is None or kind is None or not _has_zone(kind) or kind.id == "union":
        return value
    parts = _parts(kind)
    if kind.id == _ZONED:
        return value.replace(tzinfo=UTC)
    if kind.id == "struct":
        return {name: _aware(part, value[name]) for name, part in parts.items()}
    if kind.id == "map":
        return {_aware(parts["key"], key): _aware(parts["value"], part) for key, part in value.items()}
    return type(value)(_aware(parts["child"], part) for part in value)


def _parts(kind: DuckDBPyType) -> dict[str, DuckDBPyType]:
    """Return the types that a type is made of."""
    if kind.id not in ("list", "array", "map", "struct", "union"):
        return {}
    # Beside them an array names its size, and a union its tag, under no name.
    return {name: part for name, part in kind.children if name and isinstance(part, DuckDBPyType)}
