"""Several threads at one list of tasks: each loads, decodes and multiplies, so that no core waits for another."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from timstore.interrupts import Held

# What one task is asked to do: it yields how many gradients it has added, now and then.
Task = tuple[int, Callable[[], Iterator[int]]]

MOST = 4
_WAIT_SECONDS = 0.1


def side_by_side(tasks: Iterable[Task], workers: int, advance: Callable[[int], None]) -> None:
    """Run tasks in several threads; `advance` is called in this one.

    Tasks of equal number run one at a time and in their order, so that sums come out the same however many threads
    there are. Torch's own threads are divided among the workers: those of several products at once would wait for
    each other.

    Args:
        tasks: (number, what to run).

    Raises:
        BaseException: whatever a task raised first; the other threads have ended by then.
    """
    if workers == 1:
        for _, run in tasks:
            for done in run():
                advance(done)
        return
    crew = _Crew(iter(tasks))
    with _divided(workers) as each:
        threads = [
            threading.Thread(target=crew.work, args=(each,), name=f"timstore-rollback-{number}", daemon=True)
            for number in range(workers)
        ]
        try:
            with Held():
                for thread in threads:
                    thread.start()
            working = workers
            while working:
                said = crew.said.get()
                if isinstance(said, BaseException):
                    raise said
                if said is None:
                    working -= 1
                else:
                    advance(said)
        finally:
            # However often the caller is interrupted: what they write to is closed afterwards.
            with Held():
                crew.stop.set()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join()


class _Crew:
    def __init__(self, tasks: Iterator[Task]) -> None:
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stop = threading.Event()
        self._tasks = tasks
        self._taking = threading.Lock()
        self._busy: dict[int, threading.Lock] = {}

    def work(self, torch_threads: int) -> None:
        try:
            torch.set_num_threads(torch_threads)
            while (taken := self._take()) is not None:
                busy, run = taken
                try:
                    for done in run():
                        self.said.put(done)
                        if self.stop.is_set():
                            return
                finally:
                    busy.release()
            self.said.put(None)
        except BaseException as error:
            self.said.put(error)

    def _take(self) -> tuple[threading.Lock, Callable[[], Iterator[int]]] | None:
        """Return the next task and the lock of its number, held; whoever waits for one keeps the others in order."""
        with self._taking:
            task = None if self.stop.is_set() else next(self._tasks, None)
            if task is None:
                return None
            number, run = task
            busy = self._busy.setdefault(number, threading.Lock())
            while not busy.acquire(timeout=_WAIT_SECONDS):
                if self.stop.is_set():
                    return None
            return busy, run


@contextmanager
def _divided(workers: int) -> Iterator[int]:
    """Yield how many of torch's threads each worker has. New threads of others have as many as before, in the end."""
    threads = torch.get_num_threads()
    try:
        yield max(1, threads // workers)
    finally:
        # Set by a worker, the number holds for that worker and for threads made later.
        torch.set_num_threads(threads)
