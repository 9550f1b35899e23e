"""Places the parts of merges as tasks on a Ray cluster.

A task plans the merge again on its machine and writes one part. What has been written is on the
output's disk, which all machines share: a part whose worker, machine or driver is lost goes on from
there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from outliermerge.errors import ArgumentError, argument, shown
from outliermerge.optional import require_ray
from outliermerge.output.cluster import Tasks, connected, has_gpus, num_at_once, usual_cpus
from outliermerge.output.journal import entry_of
from outliermerge.output.names import Final, journal_path, partial_folder, real_output
from outliermerge.output.options import RunOptions
from outliermerge.output.part_states import NotWholeError, PartState, states_of_all
from outliermerge.output.parts import checksums_of, join_all, run_part
from outliermerge.output.run import RunResult, refuse_taken
from outliermerge.output.writer import OutputWriter
from outliermerge.planning.moe import held_values, plan_with_values
from outliermerge.planning.plan import Plan
from outliermerge.planning.planner import make_plan
from outliermerge.spec.moe import MoeSpec
from outliermerge.storage.machine import num_threads

_PROGRAM_BYTES = 300_000_000  # of the interpreter, the plan and what is imported

_Part = tuple[int, int]
"""The number of an output, from 0, and of a part of it, from 1."""


@dataclass(frozen=True)
class _Work:
    """What a task needs to write parts; the attributes have an entry for each output.

    Attributes:
        plans: what plans it again.
        outputs: the final paths.
        num_parts: how many parts each has.
        chosen: how each part is written.
    """

    plans: tuple[Callable[[], Plan], ...]
    outputs: tuple[Path, ...]
    num_parts: tuple[int, ...]
    chosen: RunOptions


def run_on_ray(
    plans: Sequence[tuple[Plan, Path]],
    chosen: RunOptions,
    *,
    address: str | None = None,
    num_parts: int | None = None,
) -> list[RunResult]:
    """Carry out plans in parts, each a task on a Ray cluster; the outputs are those of `run_plans`.

    Args:
        plans: each with the final path of its output; the outputs' disk, and those of the models,
            are shared by all machines.
        chosen: as for `run`. `threads` are those of a part, and the CPUs that it asks Ray for;
            `memory` is that of a part. The `device` need not be on this machine.
        address: of the cluster; without one Ray looks for a running one, or starts one here.
        num_parts: of each output; as many as can run at the same time, or those that were begun,
            by default.

    Raises:
        ArgumentError: an option is wrong.
        OutlierMergeError: Ray is not installed or cannot be reached, a part fails or is lost again
            and again, or what `run` raises.
    """
    require_ray("executor ray")
    if chosen.fresh:
        raise ArgumentError(
            f"{argument('fresh', True)}: parts do not start over. Remove OUT.partial and "
            "OUT.partial.journal* first."
        )
    refuse_taken(*plans[0], overwrite=chosen.overwrite)
    with connected(address):
        if chosen.device == "auto":
            chosen = replace(chosen, device="cuda" if has_gpus() else "cpu")
        num_cpus = chosen.threads or usual_cpus()
        options = replace(chosen.in_parts(), threads=num_cpus)
        needs = {
            "num_cpus": num_cpus,
            "num_gpus": 0 if chosen.device == "cpu" else 1,
            "memory": max(plan.peak_memory_bytes(options) for plan, _ in plans) + _PROGRAM_BYTES,
        }
        states = states_of_all(plans, chosen.in_parts())
        for (plan, output), found in zip(plans, states, strict=True):
            if found is None:
                refuse_taken(plan, output, overwrite=chosen.overwrite)
        numbers = _numbers(plans, states, num_parts, lambda: num_at_once(needs))
        began = time.monotonic()
        driver = _Driver(plans, numbers, needs, replace(chosen, threads=num_cpus))
        driver.write(
            (index, number)
            for index, found in enumerate(states)
            for number in (
                range(1, numbers[index] + 1)
                if found is None
                else [state.number for state in found if not state.is_whole]
            )
        )
        outputs: list[Final] = [real_output(output) for _, output in plans]
        while True:
            worked = time.monotonic() - began
            try:
                done = join_all(plans, replace(chosen, on_progress=lambda num_bytes: None))
                break
            except NotWholeError as error:
                index = outputs.index(error.final)
                driver.write((index, state.number) for state in error.unfinished)
        return [
            _told(plan, found, result, worked)
            for (plan, _), found, result in zip(plans, states, done, strict=True)
        ]


def _numbers(
    plans: Sequence[tuple[Plan, Path]],
    states: Sequence[Sequence[PartState] | None],
    num_parts: int | None,
    at_once: Callable[[], int],
) -> list[int]:
    """Return how many parts each output has.

    Raises:
        ArgumentError: one was begun in another number.
    """
    for (_, output), found in zip(plans, states, strict=True):
        if found and num_parts not in (None, len(found)):
            raise ArgumentError(
                f"{argument('parts', num_parts)}: {real_output(output)} was begun in {len(found)} "
                "parts. Leave it out, to go on with these"
            )
    if num_parts is None and None in states:
        num_parts = -(-at_once() // len(plans))
        most = [min(num_parts, len(plan.jobs)) for plan, _ in plans]
    else:
        most = [num_parts or 1] * len(plans)
    return [len(found) if found else max(1, n) for found, n in zip(states, most, strict=True)]


def _told(
    plan: Plan, before: Sequence[PartState] | None, joined: RunResult, worked: float
) -> RunResult:
    """Return the result of joining an output, with what was done before that.

    Args:
        before: how far its parts were when the command began.
    """
    jobs = list(plan.jobs)
    if before is not None:
        made = {name for state in before for name in state.lacking}
        jobs = [job for job in jobs if job.name in made]
    return replace(
        joined,
        num_resumed=len(plan.jobs) - len(jobs),
        input_bytes=sum(job.num_read_bytes for job in jobs),
        written_bytes=sum(job.num_written_bytes for job in jobs),
        disk_bytes=None,  # the cluster's are not known
        work_seconds=worked,
        seconds=worked + joined.seconds,
    )


class _Driver:
    """Keeps the parts of outputs as tasks on the cluster until all are written and proven."""

    def __init__(
        self,
        plans: Sequence[tuple[Plan, Path]],
        numbers: Sequence[int],
        needs: Mapping[str, float],
        chosen: RunOptions,
    ) -> None:
        self._plans, self._chosen = plans, chosen
        self._threads = num_threads(0)
        self._written = [
            _Written(plan, real_output(output), number)
            for (plan, output), number in zip(plans, numbers, strict=True)
        ]
        work = _Work(
            tuple(_again(plan) for plan, _ in plans),
            tuple(output.absolute() for _, output in plans),
            tuple(numbers),
            RunOptions(
                device=chosen.device,
                memory=chosen.memory,
                threads=chosen.threads,
                kernels=chosen.kernels,
                overwrite=chosen.overwrite,
                allow_non_finite=chosen.allow_non_finite,
                cache_size=chosen.cache_size,
            ),
        )
        self._tasks = Tasks[_Part](
            _write_part,
            work,
            needs,
            name=self._name,
            has_progressed=lambda part: self._written[part[0]].has_grown(part[1]),
            on_wait=self._advance,
        )

    def write(self, parts: Iterable[_Part]) -> None:
        """Write parts.

        Raises:
            OutlierMergeError: one fails, or is lost too often.
        """
        self._tasks.run(parts, self._take)

    def _name(self, part: _Part) -> str:
        index, number = part
        of = f" of {shown(self._plans[index][1])}" if len(self._plans) > 1 else ""
        return f"part {number}/{self._written[index].num_parts}{of}"

    def _advance(self) -> None:
        self._chosen.on_progress(sum(written.advance() for written in self._written))

    def _take(self, part: _Part, checksums: Mapping[str, str]) -> str:
        """Return why a part that is written must be written again; "" if it arrived well."""
        damaged = self._damaged(part[0], checksums)
        if not damaged:
            return ""
        return (
            f"{self._name(part)}: {len(damaged)} tensors, such as {shown(damaged[0])}, arrived "
            "with other bytes than were written"
        )

    def _damaged(self, index: int, checksums: Mapping[str, str]) -> list[str]:
        """Return the tensors whose bytes, read here, are not those that were written."""
        plan, output = self._plans[index]
        jobs = [job for job in plan.jobs if job.name in checksums]
        writer = OutputWriter(partial_folder(real_output(output)))
        try:
            writer.open(plan)  # for each part anew: then the disk's server tells the newest
            with ThreadPoolExecutor(self._threads) as pool:
                found = pool.map(lambda job: writer.checksum(job.output), jobs)
                return [
                    job.name
                    for job, checksum in zip(jobs, found, strict=True)
                    if checksum != checksums[job.name]
                ]
        finally:
            writer.close()


class _Written:
    """Follows what the journals say is written, as the parts' processes add lines to them."""

    def __init__(self, plan: Plan, final: Path, num_parts: int) -> None:
        self.num_parts = num_parts
        self._sizes = {job.name: plan.num_work_bytes(job) for job in plan.jobs}
        names = {0: "", **{n: f"{n}-of-{num_parts}" for n in range(1, num_parts + 1)}}
        self._paths = {number: journal_path(final, name) for number, name in names.items()}
        self._read = dict.fromkeys(names, 0)
        self._seen: set[str] = set()
        self._grown: set[int] = set()

    def advance(self) -> int:
        """Return the bytes of work that were done since the last call."""
        done = 0
        for number, path in self._paths.items():
            for line in self._lines(number, path):
                name = (entry_of(line) or {}).get("tensor")
                if name in self._sizes and name not in self._seen:
                    self._seen.add(name)
                    self._grown.add(number)
                    done += self._sizes[name]
        return done

    def has_grown(self, number: int) -> bool:
        """Tell whether a part has written a tensor since this was asked last."""
        is_grown = number in self._grown
        self._grown.discard(number)
        return is_grown

    def _lines(self, number: int, path: Path) -> list[bytes]:
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._read[number]:  # it was begun anew
                    self._read[number] = 0
                file.seek(self._read[number])
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # it is not there yet, or not any more
            return []
        self._read[number] += len(whole) + len(newline)
        return whole.split(b"\n")


def _again(plan: Plan) -> Callable[[], Plan]:
    """Return what makes a plan again on another machine, where its files have other stamps."""
    if isinstance(plan.spec, MoeSpec):
        return partial(plan_with_values, plan.spec, plan.shard_bytes, held_values(plan))
    return partial(make_plan, plan.spec, shard_bytes=plan.shard_bytes)


def _write_part(work: _Work, part: _Part) -> dict[str, str]:
    """Write a part on a machine of the cluster; return the checksums of its tensors."""
    index, number = part
    plan, output, num_parts = work.plans[index](), work.outputs[index], work.num_parts[index]
    run_part(plan, output, number, num_parts, work.chosen)
    return checksums_of(plan, output, number, num_parts)
