"""What SQL answers with: DuckDB's relation, whose errors are ours and which Ctrl-C ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import duckdb

from timstore.catalog.zones import aware, has_zone, without_zone
from timstore.errors import InvalidInputError, StateError

T = TypeVar("T")
_Relation = duckdb.DuckDBPyRelation
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
        zoned = {at: kind for at, kind in enumerate(kinds) if has_zone(kind)}
        plain = [f"#{at + 1}" + (f"::{without_zone(kind)}" if at in zoned else "") for at, kind in enumerate(kinds)]
        rows = _Relation.iter_rows(self.project(", ".join(plain)) if zoned else self, batch_size)
        with in_our_words():
            row = interruptible(_cursors[self], lambda: next(rows, None))
            while row is not None:
                yield tuple(aware(zoned.get(at), value) for at, value in enumerate(row)) if zoned else row
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
for _name, _one in vars(_Relation).items():
    if _name in vars(Answer) or (_name.startswith("_") and _name not in _SPECIAL):
        continue
    if isinstance(_one, property) and _one.fget is not None:
        setattr(Answer, _name, property(in_our_words()(_one.fget), doc=_one.__doc__))
    elif callable(_one):
        setattr(Answer, _name, _answering(_one))
