"""What it takes to merge models that are elsewhere: bytes, requests, and seconds on machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from outliermerge.display import human_bytes
from outliermerge.output.division import checks_of, divided, measures_model, part_work_bytes
from outliermerge.planning.plan import Job, Plan
from outliermerge.storage.cached_files import DEFAULT_CACHE_BYTES, num_fetched
from outliermerge.storage.range_cache import NUM_CONNECTIONS
from outliermerge.storage.stand_ins import stand_in

# Measured: until a process works, and until a part works and its output is joined, besides reading.
_START_SECONDS, _PARTS_SECONDS = 1.0, 4.0


@dataclass(frozen=True)
class Machine:
    """A machine, as far as it decides how long a merge takes.

    Attributes:
        line_bytes: that it receives in a second.
        disk_bytes: of the output that it writes in a second, and reads back.
        latency_seconds: until a request is answered.
        work_bytes: of all passes that it computes in a second; one core did 0.66 GB of FP8 weights.
        cache_bytes: the most that it keeps of what it reads again.
    """

    line_bytes: float = 1e9
    disk_bytes: float = 1e9
    latency_seconds: float = 0.03
    work_bytes: float = 10e9
    cache_bytes: int = DEFAULT_CACHE_BYTES


@dataclass(frozen=True)
class Cost:
    """What a merge of models elsewhere takes.

    Attributes:
        num_machines: each of them writes a part.
        machine: one of them.
        fetched_bytes, num_requests: of all machines, for the tensors.
        first_requests: for the headers of files, which every machine reads.
        seconds: wall time.
    """

    num_machines: int
    machine: Machine
    fetched_bytes: int
    num_requests: int
    first_requests: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the cost as JSON values."""
        return {
            "machines": self.num_machines,
            "fetched_bytes": self.fetched_bytes,
            "requests": self.num_requests,
            "header_requests": self.first_requests,
            "seconds": round(self.seconds, 1),
        }


def is_elsewhere(plan: Plan) -> bool:
    """Tell whether a plan's models, or some of them, are read by ranges."""
    return any(stand_in(stamp.path) for e in plan.models for stamp in e.checkpoint.weight_files)


def cost_of(plan: Plan, num_machines: int, machine: Machine) -> Cost:
    """Return what a plan takes on machines that each write a part.

    A part takes as long as the slowest of its fetching, waiting for answers, computing and writing,
    as these go on at the same time. Where there are several, each reads a part of the output back
    in the end, as on Ray; `join` without Ray reads all of it on one machine. The sample for the
    card's drift is not counted. Where the method measures the whole model first, every part fetches
    all tensors.
    """
    files = [stamp.path for e in plan.models for stamp in e.checkpoint.weight_files]
    first = len(set(filter(stand_in, files)))
    measured = [job for job in plan.jobs if job.action == "merge"] if measures_model(plan) else []
    num_requests = fetched_bytes = 0
    longest, most_written = 0.0, 0
    for number, jobs in enumerate(divided(plan, num_machines), 1):
        checks = [*checks_of(plan, number, num_machines).values()]
        if not (jobs or checks):
            continue
        phases = [checks, measured if jobs else [], jobs]
        requests, num_bytes = _fetched(phases, machine.cache_bytes)
        num_requests, fetched_bytes = num_requests + requests, fetched_bytes + num_bytes
        written = sum(job.num_written_bytes for job in jobs)
        most_written = max(most_written, written)
        seconds = max(
            num_bytes / machine.line_bytes,
            written / machine.disk_bytes,
            requests * machine.latency_seconds / NUM_CONNECTIONS,
            part_work_bytes(plan, jobs) / machine.work_bytes,
        )
        longest = max(longest, seconds)
    planning = first * machine.latency_seconds / NUM_CONNECTIONS
    seconds = _START_SECONDS + planning + longest
    if num_machines > 1:
        seconds += _PARTS_SECONDS + most_written / machine.disk_bytes
    return Cost(num_machines, machine, fetched_bytes, num_requests, first, seconds)


def _fetched(phases: Sequence[Sequence[Job]], cache_bytes: int) -> tuple[int, int]:
    """Return the requests and bytes for tensors that are read in several phases.

    What is read again is fetched again where it is too much to be kept.
    """
    ranges = [
        [
            [
                (meta.path, meta.offset, meta.num_bytes)
                for _, source in job.sources
                for meta in source.stored
                if meta.offset is not None
            ]
            for job in jobs
        ]
        for jobs in phases
    ]
    num_requests, num_bytes = num_fetched(chain.from_iterable(ranges))
    if num_bytes <= cache_bytes:
        return num_requests, num_bytes
    apart = [num_fetched(phase) for phase in ranges]
    return sum(requests for requests, _ in apart), sum(num_bytes for _, num_bytes in apart)


def in_words(costs: Sequence[Cost]) -> str:
    """Return costs on several numbers of machines as a line that a person reads."""
    first, *more = costs
    costs = [first, *(cost for cost in more if cost.seconds < first.seconds)]
    times = ", ".join(f"{cost.seconds:,.0f} s on {cost.num_machines}" for cost in costs)
    return (
        f"fetches {human_bytes(first.fetched_bytes)} in {first.num_requests:,} requests; if each "
        f"machine gets {human_bytes(first.machine.line_bytes)} a second, about {times}"
    )
