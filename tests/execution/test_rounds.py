"""Rounds end when anything in them fails: no thread waits for another that is gone."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from outliermerge.execution.rounds import Round, Steps, run_all

LIMIT_SECONDS = 300  # a hang, however busy the machine is
SIZES = (1, 3, 2, 5)  # of the rounds of a generator
NUM_GENERATORS = 4
# Calls of a run: a begun generator, its items, and the step after each round.
NUM_POINTS = NUM_GENERATORS * (1 + sum(SIZES) + len(SIZES))


class Failing:
    """Counts what is called, and raises at one of the calls."""

    def __init__(self, point: int, error: BaseException) -> None:
        self.point, self.error = point, error
        self.calls = itertools.count()

    def call(self) -> None:
        if next(self.calls) == self.point:
            raise self.error

    def generators(self) -> Iterator[Steps[None]]:
        for _ in range(NUM_GENERATORS):
            yield self.steps()

    def steps(self) -> Steps[None]:
        self.call()
        for size in SIZES:
            yield Round(lambda item: self.call(), range(size))
            self.call()


def _ended(run: threading.Thread) -> bool:
    run.start()
    run.join(LIMIT_SECONDS)
    return not run.is_alive()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_at_any_call_ends_all_threads(threads: int, kind: type[BaseException]) -> None:
    for point in range(NUM_POINTS):
        failing, raised = Failing(point, kind("here")), []

        def run(failing: Failing = failing, raised: list[BaseException] = raised) -> None:
            try:
                run_all(failing.generators(), threads=threads)
            except BaseException as error:
                raised.append(error)

        assert _ended(threading.Thread(target=run, daemon=True)), f"call {point} hangs"
        assert raised == [failing.error]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_without_an_error_all_is_called(threads: int) -> None:
    failing = Failing(-1, ValueError())
    run_all(failing.generators(), threads=threads)
    assert next(failing.calls) == NUM_POINTS


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_work_list_that_fails_ends_all_threads(threads: int) -> None:
    def work() -> Iterator[Steps[None]]:
        yield from Failing(-1, ValueError()).generators()
        raise RuntimeError("no more")

    raised: list[BaseException] = []

    def run() -> None:
        try:
            run_all(work(), threads=threads)
        except RuntimeError as error:
            raised.append(error)

    assert _ended(threading.Thread(target=run, daemon=True))
    assert str(raised[0]) == "no more"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_thread_that_cannot_begin_ends_the_run(threads: int) -> None:
    def prepare() -> None:
        raise OSError("no")

    raised: list[BaseException] = []

    def run() -> None:
        try:
            run_all(Failing(-1, ValueError()).generators(), threads=threads, prepare=prepare)
        except BaseException as error:
            raised.append(error)

    assert _ended(threading.Thread(target=run, daemon=True))
    assert len(raised) == 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("num_interrupts", [1, 2, 3])
def test_an_interrupt_is_raised_when_no_thread_works_any_more(
    threads: int, num_interrupts: int
) -> None:
    heard = threading.Semaphore(0)
    began: list[int] = []
    ended: list[int] = []

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        heard.release()
        raise KeyboardInterrupt

    def interrupts(item: int) -> None:
        for _ in range(num_interrupts):
            os.kill(os.getpid(), signal.SIGINT)
            assert heard.acquire(timeout=LIMIT_SECONDS)
        works(item)

    def works(item: int) -> None:
        began.append(item)
        time.sleep(0.02)  # who does not wait for this item returns before its end
        ended.append(item)

    def steps(function: Callable[[int], None]) -> Steps[None]:
        yield Round(function, range(1))

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all((steps(interrupts if n == 2 else works) for n in range(300)), threads=threads)
        num_ended = len(ended)
        assert len(began) == num_ended < 300
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(0.1)
    assert len(began) == num_ended
