"""Work in rounds, on threads: a generator yields a round of parallel calls and gets the results.

A tensor's merge is such a generator: a round for each statistic's pass over its blocks, one for
the merge. Threads take the oldest generator's items first. If it has none left, they start the next
generator, so that no thread waits at the end of a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from outliermerge.errors import OutlierMergeError

T = TypeVar("T")

_WAIT_SECONDS = 1.0  # then a waiting thread looks again, so a lost wake-up costs no more than that


@dataclass(frozen=True, slots=True)
class Round:
    """A function and the items that it is called with, in any order, on any threads."""

    function: Callable[[Any], Any]
    items: Sequence[Any]


Steps: TypeAlias = Generator[Round, list[Any], T]
"""Yields rounds, is sent each round's results in the order of its items, and returns a result."""


def run_all(
    work: Iterable[Steps[None]],
    *,
    threads: int,
    prepare: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Run generators on threads; if the system gives fewer threads, those are used.

    Args:
        prepare: called by each thread first.
        on_stop: called when an error or an interruption ends the work, so that no thread goes on
            waiting for what comes from elsewhere.

    Raises:
        BaseException: the first exception, of any kind, that a generator, an item or `prepare`
            raised. The other threads stop before their next item, as they do when this call is
            interrupted.
        OutlierMergeError: no thread can be started.
    """
    queue = _Queue(iter(work), on_stop)
    started: list[threading.Thread] = []
    first: BaseException | None = None
    try:
        for _ in range(threads):
            thread = threading.Thread(target=queue.run, args=(prepare,))
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:  # the system gives no more threads
                if not started:
                    raise OutlierMergeError(f"no thread can be started: {error}") from error
                break
            started.append(thread)
        queue.wait()
    except BaseException as error:
        first = error
    while first is not None:  # wait for the threads: the caller then closes files that they use
        try:
            queue.stop()
            queue.wait()
            break
        except BaseException:  # interrupted again while waiting
            continue
    for thread in started:
        thread.join()
    first = first or queue.error
    if first is not None:
        raise first


def run_here(steps: Steps[T]) -> T:
    """Run one generator in this thread, and return its result.

    >>> def doubled():
    ...     return sum((yield Round(lambda item: 2 * item, [1, 2])))
    >>> run_here(doubled())
    6
    """
    results: Any = None
    while True:
        try:
            todo = steps.send(results)
        except StopIteration as end:
            result: T = end.value
            return result
        results = [todo.function(item) for item in todo.items]


class _Running:
    """A generator that has begun, and the state of its round."""

    def __init__(self, steps: Steps[None]) -> None:
        self.steps = steps
        self.round = Round(lambda item: None, ())
        self.results: list[Any] = []
        self.num_issued = self.num_done = 0


class _Queue:
    """The work that threads take from.

    The thread that waits for the workers can be interrupted at any call. So it does not join a
    thread that may still work (if interrupted, Python 3.11 regards the thread as ended), and it
    does not enter a condition (if interrupted, the condition's lock can stay held).
    """

    def __init__(self, work: Iterator[Steps[None]], on_stop: Callable[[], None]) -> None:
        self._work, self._on_stop = work, on_stop
        self._active: list[_Running] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._stopped = self._exhausted = False
        self._num_threads = 0  # threads that work
        self._ended = threading.Lock()  # held until the last thread leaves
        self._ended.acquire()
        self.error: BaseException | None = None

    def stop(self) -> None:
        """Let no thread begin another item; working threads wake those that wait."""
        self._stopped = True
        self._on_stop()

    def wait(self) -> None:
        """Return when all threads have ended."""
        while self._goes_on():
            self._ended.acquire(timeout=_WAIT_SECONDS)

    def _goes_on(self) -> bool:
        with self._lock:
            is_done = self._exhausted and not self._active
            return self._num_threads > 0 or not (is_done or self._stopped)

    def run(self, prepare: Callable[[], None]) -> None:
        """Work until nothing is left or any thread fails; keep the first error."""
        with self._lock:
            if self._stopped:
                return
            self._num_threads += 1
        try:
            prepare()
            self._work_on()
        except BaseException as error:
            if self.error is None:
                self.error = error
            self.stop()
        with self._changed:
            self._num_threads -= 1
            self._changed.notify_all()
            if self._num_threads == 0 and self._ended.locked():
                self._ended.release()

    def _work_on(self) -> None:
        while (task := self._take()) is not None:
            running, index = task
            if index is None:
                self._advance(running)
                continue
            running.results[index] = running.round.function(running.round.items[index])
            with self._changed:
                running.num_done += 1
                is_last = running.num_done == len(running.results)
            if is_last:
                self._advance(running)

    def _take(self) -> tuple[_Running, int | None] | None:
        """Return an item of the oldest round that has one left, or a generator to begin."""
        with self._changed:
            while not self._stopped:
                for running in self._active:
                    if running.num_issued < len(running.results):
                        running.num_issued += 1
                        return running, running.num_issued - 1
                if not self._exhausted:
                    steps = next(self._work, None)
                    if steps is not None:
                        self._active.append(_Running(steps))
                        return self._active[-1], None
                    self._exhausted = True
                if not self._active:
                    break
                self._changed.wait(_WAIT_SECONDS)
        return None

    def _advance(self, running: _Running) -> None:
        """Advance to a round that several threads can share; run smaller rounds here."""
        begun, results = bool(running.num_issued), running.results
        while True:
            try:
                todo = running.steps.send(results) if begun else next(running.steps)
            except StopIteration:
                with self._changed:
                    self._active.remove(running)
                    self._changed.notify_all()
                return
            begun = True
            if len(todo.items) > 1:
                break
            results = [todo.function(item) for item in todo.items]
        with self._changed:
            running.round, running.results = todo, [None] * len(todo.items)
            running.num_issued = running.num_done = 0
            self._changed.notify_all()
