"""Interrupts held back while something is done as a whole, and what they say of it when they are raised."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Held:
    """A `with` block in which no handler of a signal runs.

    Python runs the handlers of signals (Ctrl-C, and SIGTERM where a program handles it) in the main thread, between
    any two instructions, and most of them raise. Here they wait; they run when the block ends. In other threads none
    ever run.
    """

    def __init__(self) -> None:
        self._holding = False
        self._handlers: dict[int, Any] = {}
        self._waiting: dict[int, FrameType | None] = {}

    def __enter__(self) -> Self:
        self._hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _hold(self) -> None:
        if self._holding or threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._take)
        # At last: an interrupt before leaves handlers behind that only pass on.
        self._holding = True

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._waiting[number] = frame
        else:
            self._handlers[number](number, frame)

    def _release(self) -> None:
        self._holding = False
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._run_waiting()

    def _run_waiting(self) -> None:
        if self._waiting:
            number, frame = self._waiting.popitem()
            try:
                self._handlers[number](number, frame)
            finally:
                self._run_waiting()


class CriticalSection(Held):
    """The end of a call that is done wholly or not at all: from `enter` to the end of the `with` block.

    Whatever is raised once `finish` was called, late interrupts included, has the result as its attribute `report`
    and says in a note what is done. An interrupt before that has None there, and a note that nothing was changed.

    Args:
        done: what is done after `finish`, as a clause.
    """

    def __init__(self, done: str) -> None:
        super().__init__()
        self._done = done
        self._finished = False
        self._result: Any = None

    def enter(self) -> None:
        """Hold interrupts back from now on."""
        self._hold()

    def finish(self, result: T) -> T:
        """Say that it is done, with this result, and return that."""
        self._result, self._finished = result, True
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._tell(error)
        try:
            self._release()
        except BaseException as late:
            self._tell(late)
            raise

    def _tell(self, error: BaseException) -> None:
        """Tell an error what was done, unless an inner section did."""
        if hasattr(error, "report"):
            return
        if self._finished:
            error.report = self._result  # type: ignore[attr-defined]
            error.add_note(f"timstore: {self._done}, before this was raised; its attribute `report` is the result")
        elif not isinstance(error, Exception):
            error.report = None  # type: ignore[attr-defined]
            error.add_note("timstore: interrupted before anything was changed; the same call can be made again")
