"""How many elements of a tensor are worked on at a time, and the memory that takes."""

from __future__ import annotations

import math

from outliermerge.checkpoint.by_kernels import is_by_kernels
from outliermerge.checkpoint.sources import DTYPES
from outliermerge.errors import ArgumentError, argument
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.methods.statistics.trim import bytes_of_counters
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task
from outliermerge.planning.job import Job, Options, row_elements
from outliermerge.planning.merged import bytes_of_merges, merges_in

_MAX_CHUNKS = {"kernels": 16, "cpu": 4, "cuda": 64}


def block_elements(job: Job, options: Options) -> int:
    """Return how many elements of the job's tensor are worked on at a time.

    Raises:
        ArgumentError: not even the smallest block fits a thread's share of the memory.
    """
    unit = _unit(job)
    own_bytes = options.memory_bytes // options.threads
    if least_bytes(job, options) > own_bytes:
        raise too_little(job, own_bytes, options)
    fits = (own_bytes - bytes_beside(job)) // bytes_per_element(job, options)
    where = options.device.partition(":")[0] if options.uses_torch(job) else "kernels"
    most = _MAX_CHUNKS[where] * CHUNK_ELEMENTS
    return max(unit, min(fits, most) // unit * unit)


def least_bytes(job: Job, options: Options) -> int:
    """Return the memory that a thread needs for the smallest block of a tensor."""
    num_elements = min(_unit(job), job.num_elements)
    return bytes_per_element(job, options) * num_elements + bytes_beside(job)


def too_little(job: Job, num_bytes: int, options: Options) -> ArgumentError:
    """Return the refusal of a memory in which no block of a tensor fits."""
    needed = least_bytes(job, options)
    computed = bytes_of_merges(source for _, source in job.sources)
    return ArgumentError(
        f"{argument('memory')}: {num_bytes:,} B is too little for tensor {job.name!r}: "
        f"{job.method} needs {needed:,} B to hold one block of it"
        + (", and what it is computed of. " if computed else ". ")
        + f"Give {argument('memory', f'{-(-needed // 1024)}KiB')} or more"
        + (", or merge on a machine with more memory free" if options.most_memory_bytes else "")
    )


def bytes_per_element(job: Job, options: Options) -> int:
    """Return the memory that an element of a block takes, with what is computed of it."""
    num_sources = len(job.sources)
    raw = sum(meta.dtype.num_bytes for _, meta in job.sources) + job.output.dtype.num_bytes
    raw += sum(source.dtype.num_bytes for source in job.in_blocks)
    # What torch computes of sources is there in float32 several times while it is made.
    raw += 16 * num_by_torch(job, options)
    if job.action == "equal" and len({source.dtype for _, source in job.sources}) > 1:
        raw += 48  # their values in 64 bits, which are compared
    if job.action == "merge" and job.task.cut == "row" and options.uses_kernels(job):
        raw += 4 * num_sources + 26  # a row of each source in float32, and its ranks
    if job.action != "merge" or not options.uses_torch(job):
        return raw
    compute = DTYPES[job.compute_dtype].num_bytes
    rows = num_sources + len(job.in_blocks)
    workspaces = [find_method(job.method).workspace(num_sources)]
    workspaces += [find_method(name).workspace(1) for name, _ in job.modifiers]
    return raw + compute * (rows + max(workspaces))


def num_by_torch(job: Job, options: Options) -> int:
    """Return how many sources are computed when they are read, and not by kernels."""
    return sum(
        source.stored != (source,) and not (options.kernels and is_by_kernels(source))
        for _, source in job.sources
    )


def bytes_beside(job: Job) -> int:
    """Return the memory that a thread needs beside a block.

    It is for what is made of whole auxiliary tensors, and for the merges that a tensor is made of.
    """
    prepared = job.task.prepared_bytes if job.prepared else 0
    return prepared + bytes_of_merges(source for _, source in job.sources)


def counter_bytes(job: Job, options: Options) -> int:
    """Return the memory of all threads for the bins in which statistics count, to find ranks.

    A tensor of one block is measured by one thread, while others measure others; so is what a
    tensor is computed of. Of a larger one the last blocks may be merged while the next is measured.
    """
    peak = 0
    if job.action == "merge" and any(job.task.num_ranks.values()):
        is_small = job.num_elements <= block_elements(job, options)
        num = options.threads if is_small else min(2, options.threads)
        peak = _counter_bytes(job.task, num, options, by_torch=options.uses_torch(job))
    for merge in merges_in(source for _, source in job.sources):
        by_torch = not options.kernels_do(merge.task)
        own = _counter_bytes(merge.task, options.threads, options, by_torch=by_torch)
        peak = max(peak, own)
    return peak


def _counter_bytes(task: Task, num_tensors: int, options: Options, *, by_torch: bool) -> int:
    peak, size = 0, math.prod(task.shape)
    for of_model, num_ranks in task.num_ranks.items():
        samples = task.method.cut == "element" and not of_model
        shared, kernels_own, torch_own = bytes_of_counters(size, samples=samples)
        own = torch_own if by_torch else kernels_own * num_ranks
        if num_ranks:
            total = shared * num_ranks * (1 if of_model else num_tensors) + own * options.threads
            peak = max(peak, total)
    return peak


def _unit(job: Job) -> int:
    """Return how many elements a block of a tensor has at least."""
    match job.task.cut if job.action == "merge" else "element":
        case "element":
            return CHUNK_ELEMENTS
        case "row":
            return row_elements(job.output.shape) * job.task.rows_at_once
        case _:
            return max(1, job.num_elements)
