"""Runs a plan: the loop over jobs, on threads and devices."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from outliermerge.blocks import Map, Span
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import SpecError
from outliermerge.job_runner import JobResult, JobRunner, Options, Sink
from outliermerge.jobs import Job, Plan

_MAX_DEFAULT_THREADS = 8


def num_threads(wanted: int) -> int:
    """Return the number of worker threads for an option; 0 takes the processors at hand."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return wanted or min(available or 1, _MAX_DEFAULT_THREADS)


def choose_device(name: str) -> str:
    """Return the device that an option names, `auto` resolved.

    Raises:
        SpecError: it is unknown or not on this machine.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise SpecError(f"--device: found {name!r}, expected cpu, cuda, cuda:N or auto")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise SpecError(f"--device: {name} is not on this machine: it has {count} CUDA device(s)")
    return name


def execute(
    plan: Plan,
    jobs: Iterable[Job],
    sink: Sink,
    options: Options,
    *,
    on_result: Callable[[Job, JobResult], None],
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Run jobs; each result is reported once its bytes are written.

    The bytes are the same for any number of threads and any memory budget on a device.

    Args:
        on_result: called by one thread at a time, in any order of jobs.
        on_progress: called with the bytes just worked on, by any thread.

    Raises:
        OutlierMergeError: a source cannot be read, tensors that must be equal differ, or a value
            is not finite. Jobs already reported stay valid.
    """
    keep_freed_memory()
    # What can refuse a merge is done first: buffers that must be equal.
    ordered = sorted(jobs, key=lambda job: job.action != "equal")
    lock = threading.Lock()
    with Reader() as reader, worker_pool(options.threads) as (pool, on_all_threads):
        runner = JobRunner(plan, reader, sink, options, on_progress)
        for job in plan.checks:
            runner.check_equal(job, on_all_threads)
        pending: list[Future[None]] = []

        def finish(job: Job, run: Map) -> None:
            result = runner.run_job(job, run)
            with lock:
                on_result(job, result)

        for job in ordered:
            if job.num_elements <= runner.block_elements(job):
                pending.append(pool.submit(finish, job, map))
            else:
                finish(job, on_all_threads)
                _raise_failures(pending)
        for future in pending:
            future.result()


@contextmanager
def worker_pool(threads: int) -> Iterator[tuple[ThreadPoolExecutor, Map]]:
    """Give a pool whose threads compute for themselves alone, and a `map` over it.

    The map keeps few results waiting, so that memory stays bounded. torch's number of threads,
    which is the process's for threads that start later, is put back at the end.
    """
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def run(function: Callable[[Span], Any], items: Iterable[Span]) -> Iterator[Any]:
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    try:
        yield pool, run
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _raise_failures(pending: list[Future[None]]) -> None:
    running = [future for future in pending if not future.done()]
    for future in pending:
        if future.done():
            future.result()
    pending[:] = running


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel at every operation.

    A block's intermediate results are then made in the pages of the last ones: measured 0.15
    against 1.3 billion elements a second for float64 sums of 256 Ki elements. No effect on other
    C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 1 << 28)
    mallopt(m_trim_threshold, 1 << 29)
