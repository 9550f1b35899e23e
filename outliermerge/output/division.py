"""How a plan is divided into parts, and what each of them takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from outliermerge.errors import ArgumentError
from outliermerge.execution.passes import needs_of
from outliermerge.output.estimate import FIXED_SECONDS, Estimate
from outliermerge.planning.plan import Job, Options, Plan


def part_of(plan: Plan, part: int, num_parts: int, *, whole_files: bool = False) -> list[Job]:
    """Return the jobs of a part: consecutive jobs of the plan, with about equal bytes per part.

    Args:
        part: its number, counted from 1.
        whole_files: all jobs of a weight file are of one part, as a store needs it.

    Raises:
        ArgumentError: there is no part of that number.
    """
    if not 1 <= part <= num_parts:
        raise ArgumentError(
            f"part: found {part} of {num_parts}, expected one from 1 to {num_parts}"
        )
    return divided(plan, num_parts, whole_files=whole_files)[part - 1]


def divided(plan: Plan, num_parts: int, *, whole_files: bool = False) -> list[list[Job]]:
    """Return the jobs of all parts."""
    found: list[list[Job]] = [[] for _ in range(num_parts)]
    groups: dict[str, list[Job]] = {}
    for job in plan.jobs:
        groups.setdefault(job.output.file if whole_files else job.name, []).append(job)
    sizes = [sum(map(plan.num_work_bytes, jobs)) for jobs in groups.values()]
    total = max(1, sum(sizes))
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
    for jobs, middle in zip(groups.values(), middles, strict=True):
        found[min(num_parts - 1, int(middle * num_parts / total))] += jobs
    return found


def checks_of(plan: Plan, part: int, num_parts: int) -> dict[int, Job]:
    """Return by number those of the plan's checks that a part does."""
    return dict([*enumerate(plan.checks)][part - 1 :: num_parts])


def part_work_bytes(plan: Plan, jobs: Iterable[Job]) -> int:
    """Return the bytes that pass through a part, every pass counted.

    Where the method measures the whole model first, each part does that, over all tensors.
    """
    own = {job.name for job in jobs}
    if not own:
        return 0
    measured = measures_model(plan)
    return sum(
        plan.num_work_bytes(job)
        if job.name in own
        else (job.num_passes - 1) * sum(source.num_bytes for _, source in job.sources)
        for job in (plan.jobs if measured else filter(lambda job: job.name in own, plan.jobs))
    )


def measures_model(plan: Plan) -> bool:
    """Tell whether the method measures the whole model before it merges a tensor of it."""
    return any(needs_of(job.task, "model") for job in plan.jobs if job.action == "merge")


@dataclass(frozen=True)
class PartCost:
    """What a part takes.

    Attributes:
        read_bytes: of the stored tensors that it reads, each counted once.
        work_bytes: that pass through it, every pass counted.
        memory_bytes: of the whole process; None if the system does not tell.
        seconds: wall time; None if it is not known.
    """

    number: int
    num_tensors: int
    read_bytes: int
    written_bytes: int
    work_bytes: int
    memory_bytes: int | None
    seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the cost as JSON values."""
        return {
            "part": self.number,
            "num_tensors": self.num_tensors,
            "read_bytes": self.read_bytes,
            "write_bytes": self.written_bytes,
            "work_bytes": self.work_bytes,
            "memory_bytes": self.memory_bytes,
            "seconds": None if self.seconds is None else round(self.seconds, 2),
        }


def part_costs(
    plan: Plan,
    num_parts: int,
    options: Options,
    estimate: Estimate,
    *,
    whole_files: bool = False,
) -> list[PartCost]:
    """Return what each part of a plan takes on a machine like this one.

    Args:
        whole_files: as for `part_of`.
        estimate: of the whole plan on this machine; its speed is taken for that of each part.
    """
    fixed = estimate.block_bytes - plan.block_memory_bytes(options)
    found = []
    for number, jobs in enumerate(divided(plan, num_parts, whole_files=whole_files), 1):
        work_bytes = part_work_bytes(plan, jobs)
        checks = checks_of(plan, number, num_parts).values()
        stored = {meta for job in (*jobs, *checks) for meta in job.stored}
        memory_bytes, seconds = estimate.program_bytes, None
        if memory_bytes is not None:
            own = replace(plan, jobs=tuple(jobs))
            memory_bytes += fixed + own.block_memory_bytes(options)
        if estimate.bytes_per_second is not None:
            seconds = FIXED_SECONDS + work_bytes / estimate.bytes_per_second
        found.append(
            PartCost(
                number,
                len(jobs),
                sum(meta.num_bytes for meta in stored),
                sum(job.num_written_bytes for job in jobs),
                work_bytes,
                memory_bytes,
                seconds,
            )
        )
    return found
