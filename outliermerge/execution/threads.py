"""Runs a plan: chooses the engine of each job and the number of threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from outliermerge.arguments import named, nothing
from outliermerge.checkpoint.layout import parse_bytes
from outliermerge.checkpoint.quantized.encoded import scales_in
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import inner
from outliermerge.engines.base import Engine
from outliermerge.engines.cpu import KernelEngine
from outliermerge.engines.kernels import find_kernels, names, statistics
from outliermerge.engines.torch import TorchEngine
from outliermerge.errors import ArgumentError, argument
from outliermerge.execution.computing import reads_by_torch
from outliermerge.execution.cuts import Sink
from outliermerge.execution.jobs import JobResult, JobRunner
from outliermerge.execution.merged import Merges
from outliermerge.execution.passes import Measured, needs_of
from outliermerge.execution.rounds import Steps, run_all
from outliermerge.methods.task import Task
from outliermerge.optional import is_installed, require_torch
from outliermerge.planning.merged import MergedSource, read_again
from outliermerge.planning.plan import Job, Options, Plan
from outliermerge.storage.cached_files import DEFAULT_CACHE_BYTES
from outliermerge.storage.machine import (
    free_memory_bytes,
    keep_freed_memory,
    most_memory_bytes,
    num_threads,
)
from outliermerge.storage.stand_ins import all_elsewhere

DEFAULT_MEMORY_BYTES = 2**30
_CACHED_SHARE = 0.9  # of free memory; outputs on local disks are written past the page cache


def choose_device(name: str) -> str:
    """Return the device that an option names; `auto` becomes a device of this machine.

    Raises:
        ArgumentError: it is unknown or not on this machine.
        OutlierMergeError: it needs torch, which is not installed.
    """
    if name == "cpu" or (name == "auto" and not is_installed("torch")):
        return "cpu"
    require_torch(f"{argument('device', name)}")
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise ArgumentError(
            f"{argument('device')}: found {name!r}, expected cpu, cuda, cuda:N or auto"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise ArgumentError(
            f"device {name} is not on this machine: it has {count} CUDA device(s). Leave it "
            "out, and the CPU computes."
        )
    return name


def choose_options(
    *,
    device: str,
    memory: int | str | None,
    threads: int,
    kernels: bool,
    free_bytes: int | None = None,
    allow_non_finite: bool = False,
    cache_size: int | str = DEFAULT_CACHE_BYTES,
) -> Options:
    """Return the options with which a plan is run on this machine.

    Args:
        device: as `choose_device` returns it.
        memory: None for 1 GiB, or what all threads need for the largest tensor, up to three
            quarters of what is free.
        free_bytes: the memory that is free where it is run.

    Raises:
        ArgumentError: an option is wrong.
    """
    return Options(
        device=device,
        threads=num_threads(threads),
        memory_bytes=DEFAULT_MEMORY_BYTES if memory is None else parse_bytes(str(memory), "memory"),
        most_memory_bytes=most_memory_bytes(free_bytes) if memory is None else 0,
        kernels=names() if kernels else frozenset(),
        statistics=statistics() if kernels else frozenset(),
        allow_non_finite=allow_non_finite,
        cache_bytes=parse_bytes(str(cache_size), "cache_size"),
    )


def free_bytes(device: str) -> int | None:
    """Return the memory that is free here and on each GPU; None if the system does not tell."""
    free = free_memory_bytes()
    gpus = [name for name in devices(device) if name != "cpu"]
    if free is None or not gpus:
        return free
    import torch

    return min([free, *(torch.cuda.mem_get_info(name)[0] for name in gpus)])


@dataclass(frozen=True)
class Target:
    """A plan whose jobs are to be run, and the sink of their outputs.

    Attributes:
        jobs: the plan's jobs that are still to be done.
        on_result: called with each job's result when its bytes are written; by one thread at a
            time, in any order of jobs.
    """

    plan: Plan
    jobs: Sequence[Job]
    sink: Sink
    on_result: Callable[[Job, JobResult], None]


class Executor(Protocol):
    """What runs the jobs of plans: `execute` on threads, or a function that is called like it."""

    def __call__(
        self,
        targets: Sequence[Target],
        options: Options,
        *,
        on_progress: Callable[[int], None],
        folder: Path | None,
    ) -> None: ...


@named
def execute(
    targets: Sequence[Target],
    options: Options,
    *,
    on_progress: Callable[[int], None] = nothing,
    folder: Path | None = None,
) -> None:
    """Run the jobs of plans, together where they merge the same tensors.

    The bytes are the same for any number of threads and any memory budget on a device.

    Args:
        targets: the plans; all of them read the same models.
        on_progress: called with the bytes just worked on, by any thread.
        folder: for temporary files of tensors that are computed as a whole and do not fit in
            memory.

    Raises:
        OutlierMergeError: a source cannot be read, tensors that must be equal differ, or a value
            is not finite. Jobs already reported stay valid.
    """
    checks = [(target.plan, job) for target in targets for job in target.plan.checks]
    groups = groups_of(targets, options)
    upcoming = {id(group): after for group, after in pairwise(groups)}
    forgets = exceeds_memory(targets[0].plan.num_read_bytes)
    all_jobs = [job for target in targets for job in (*target.jobs, *target.plan.checks)]
    keep_freed_memory()
    kernels: KernelEngine | None = None
    torch: TorchEngine | None = None

    def engine_of_stage(task: Task) -> Engine:
        engine = kernels if options.kernels_do(task) else torch
        assert engine is not None
        return engine

    merges = Merges(
        engine_of_stage,
        kept=frozenset[MergedSource]().union(*map(_read_again, groups)),
        allow_non_finite=options.allow_non_finite,
    )
    own = find_kernels() if options.kernels else None
    made = Reader(options.memory_bytes, folder, merges, options.cache_bytes, kernels=own)
    with made as reader, ExitStack() as stack:
        prepare = _nothing
        if options.kernels and options.device == "cpu":
            kernels = KernelEngine(find_kernels())
        if any(
            options.uses_torch(job)
            or reads_by_torch((source for _, source in job.sources), options)
            for job in all_jobs
        ):
            prepare = stack.enter_context(torch_threads())
            torch = TorchEngine(devices(options.device))

        def engine_for(job: Job) -> Engine:
            engine = kernels if options.uses_kernels(job) else torch
            assert engine is not None
            return engine

        def runner(plan: Plan) -> JobRunner:
            return JobRunner(plan, reader, options, engine_for, on_progress)

        def run_group(group: Sequence[tuple[Target, Job]]) -> Steps[None]:
            reader.will_need(upcoming.get(id(group), group)[0][1].sources)
            outputs = [(job, target.sink) for target, job in group]
            own = [known[id(target)] for target, _ in group]
            results = yield from runner(group[0][0].plan).run(outputs, own)
            with lock:
                for (target, job), result in zip(group, results, strict=True):
                    target.on_result(job, result)
            if not waits(group[0][1]):
                reader.release(group[0][1].sources)
            if forgets:
                reader.forget(group[0][1].sources)

        def waits(job: Job) -> bool:
            """Tell whether the codes, or the scales, of the same weight are still to be made."""
            with lock:
                pairs[scales_of(job)] -= 1
                return scales_of(job) is not None and pairs[scales_of(job)] > 0

        def measure_model(target: Target) -> Steps[None]:
            merges = [job for job in target.plan.jobs if job.action == "merge"]
            unlike = {(job.method, id(job.parameters)): job for job in merges}.values()
            if target.jobs and any(needs_of(job.task, "model") for job in unlike):
                reader.read_ahead(job.sources for job in merges)
                known[id(target)] = yield from runner(target.plan).measure_model(merges)

        def stop() -> None:
            reader.stop()
            for target in targets:
                target.sink.stop()

        calls = {"prepare": prepare, "on_stop": stop}
        lock = threading.Lock()
        pairs = Counter(scales_of(group[0][1]) for group in groups)
        known: dict[int, Measured] = {id(target): {} for target in targets}
        # Buffers that must be equal are compared first, in order, because a difference refuses the
        # merge.
        run_all((runner(plan).check_equal(job) for plan, job in checks), threads=1, **calls)
        run_all(map(measure_model, targets), threads=options.threads, **calls)
        must_be_equal = [group for group in groups if group[0][1].action == "equal"]
        others = [group for group in groups if group[0][1].action != "equal"]
        run_all(map(run_group, must_be_equal), threads=1, **calls)
        if all_elsewhere(path for target in targets for path, _ in target.plan.files):
            reader.read_ahead(group[0][1].sources for group in others)
        run_all(map(run_group, others), threads=options.threads, **calls)


def scales_of(job: Job) -> int | None:
    """Return what tells the scales that a job writes, or needs for codes; None for other jobs."""
    scales = scales_in(job.sources[0][1])
    return None if scales is None else id(scales)


def groups_of(targets: Sequence[Target], options: Options) -> list[list[tuple[Target, Job]]]:
    """Group the jobs that read the same sources in the same way."""
    if len(targets) == 1:
        return [[(targets[0], job)] for job in targets[0].jobs]
    groups: dict[object, list[tuple[Target, Job]]] = {}
    for target in targets:
        for job in target.jobs:
            method = job.task.method
            by = options.uses_kernels(job), options.uses_torch(job)
            how = (job.action, job.compute_dtype, method.uses_base, job.task.cut, by)
            key = (job.sources, job.auxiliary, how)
            groups.setdefault(key, []).append((target, job))
    return list(groups.values())


def _read_again(group: Sequence[tuple[Target, Job]]) -> frozenset[MergedSource]:
    """Return the merges that are read more than once for jobs that read the same sources."""
    jobs = [job for _, job in group]
    sources = (*(source for _, source in jobs[0].sources), *jobs[0].auxiliary)
    if not any(map(inner, sources)):
        return frozenset()
    return read_again(max(job.num_passes for job in jobs), sources)


def exceeds_memory(num_bytes: int) -> bool:
    """Tell whether the inputs do not fit in the page cache; if so, they are dropped after use."""
    free = free_memory_bytes()
    return free is not None and num_bytes > _CACHED_SHARE * free


def _nothing() -> None:
    return None


def devices(name: str) -> list[str]:
    """Return the devices that a resolved option names: `cuda` means all GPUs.

    >>> devices("cpu")
    ['cpu']
    """
    if name != "cuda":
        return [name]
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


@contextmanager
def torch_threads() -> Iterator[Callable[[], None]]:
    """Keep torch from starting threads of its own; each worker calls the yielded function first.

    At the end torch's number of threads is restored, because threads that start later inherit it.
    """
    import torch

    before = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)
