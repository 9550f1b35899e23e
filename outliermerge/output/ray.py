"""Places the parts of merges as tasks on a Ray cluster.

A task plans the merge again on its machine and writes one part. What has been written is on the
output's disk, which all machines share: a part whose worker, machine or driver is lost goes on from
there. Further tasks read the parts back, each on another machine than the one that wrote it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.errors import ArgumentError, OutlierMergeError, argument, shown
from outliermerge.optional import require_ray
from outliermerge.output.bucket_folder import to_start_over_in_store
from outliermerge.output.cluster import (
    Tasks,
    connected,
    fitting_options,
    has_gpus,
    machines,
    num_at_once,
    this_machine,
    usual_cpus,
)
from outliermerge.output.division import part_of
from outliermerge.output.folder import to_start_over
from outliermerge.output.followed import Followed
from outliermerge.output.names import Final, partial_folder, real_final, real_output
from outliermerge.output.options import RunOptions
from outliermerge.output.part_states import NotWholeError, PartState, states_of_all
from outliermerge.output.parts import checksums_of, join_all, run_part
from outliermerge.output.run import RunResult, refuse_taken
from outliermerge.output.writer import OutputWriter
from outliermerge.planning.moe import held_values, plan_with_values
from outliermerge.planning.plan import Plan
from outliermerge.planning.planner import make_plan
from outliermerge.spec.moe import MoeSpec
from outliermerge.storage.bucket import UPLOAD_BYTES

_PROGRAM_BYTES = 300_000_000  # of the interpreter, the plan and what is imported

_Part = tuple[int, int]
"""The number of an output, from 0, and of a part of it, from 1."""


@dataclass(frozen=True)
class _Work:
    """What a task needs to write parts; the attributes have an entry for each output.

    Attributes:
        plans: what plans it again.
        outputs: the final paths or addresses.
        num_parts: how many parts each has.
        chosen: how each part is written.
    """

    plans: tuple[Callable[[], Plan], ...]
    outputs: tuple[Final, ...]
    num_parts: tuple[int, ...]
    chosen: RunOptions


@dataclass(frozen=True)
class _Written:
    """What became of a part.

    Attributes:
        checksums: of its tensors, as they were written.
        machine: that wrote it.
    """

    checksums: Mapping[str, str]
    machine: str


@dataclass(frozen=True)
class _Reading:
    """What a task needs to read parts back.

    Attributes:
        folders: in which the outputs are being written.
        tensors: of each part.
        threads: read so many tensors at the same time.
    """

    folders: tuple[Path, ...]
    tensors: Mapping[_Part, tuple[OutputTensor, ...]]
    threads: int


def run_on_ray(
    plans: Sequence[tuple[Plan, Final]],
    chosen: RunOptions,
    *,
    address: str | None = None,
    num_parts: int | None = None,
) -> list[RunResult]:
    """Carry out plans in parts, each a task on a Ray cluster; the outputs are those of `run_plans`.

    Args:
        plans: each with the final path or the address of its output. All machines share the
            models' disks and the outputs' disk or store.
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
        _, output = plans[0]
        over = (
            to_start_over_in_store(output)
            if isinstance(output, str)
            else to_start_over(real_output(output))
        )
        raise ArgumentError(f"{argument('fresh', True)}: parts do not start over. {over}")
    refuse_taken(*plans[0], overwrite=chosen.overwrite)
    with connected(address):
        if chosen.device == "auto":
            chosen = replace(chosen, device="cuda" if has_gpus() else "cpu")
        chosen = replace(chosen, threads=chosen.threads or usual_cpus())
        of_all = {"num_cpus": chosen.threads, "num_gpus": 0 if chosen.device == "cpu" else 1}
        options = fitting_options(chosen, [plan for plan, _ in plans], of_all)
        needs = of_all | {
            "num_cpus": options.threads,
            "memory": max(plan.peak_memory_bytes(options) for plan, _ in plans)
            + _PROGRAM_BYTES
            + UPLOAD_BYTES * isinstance(plans[0][1], str),
        }
        states = states_of_all(plans, options, pass_over_empty=True)
        for (plan, output), found in zip(plans, states, strict=True):
            if found is None:
                refuse_taken(plan, output, overwrite=chosen.overwrite)
        numbers = _numbers(plans, states, num_parts, lambda: num_at_once(needs))
        began = time.monotonic()
        driver = _Driver(plans, numbers, needs, replace(chosen, threads=options.threads))
        driver.write(
            (index, number)
            for index, found in enumerate(states)
            for number in (
                range(1, numbers[index] + 1)
                if found is None
                else [state.number for state in found if not state.is_whole]
            )
        )
        driver.read_back(
            (index, state.number)
            for index, found in enumerate(states)
            for state in found or ()
            if state.is_whole
        )
        outputs = [real_final(output) for _, output in plans]
        while True:
            worked = time.monotonic() - began
            try:
                quietly = replace(chosen, on_progress=lambda num_bytes: None)
                done = join_all(plans, quietly, driver.checksums)
                break
            except NotWholeError as error:
                index = outputs.index(error.final)
                driver.write((index, state.number) for state in error.unfinished)
        return [
            _told(plan, found, result, worked)
            for (plan, _), found, result in zip(plans, states, done, strict=True)
        ]


def _numbers(
    plans: Sequence[tuple[Plan, Final]],
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
                f"{argument('parts', num_parts)}: {real_final(output)} was begun in {len(found)} "
                "parts. Leave it out, to go on with these"
            )
    if num_parts is None and None in states:
        num_parts = -(-at_once() // len(plans))
        most = [
            min(num_parts, len(plan.shards if isinstance(output, str) else plan.jobs))
            for plan, output in plans
        ]
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
    """Keeps the parts of outputs as tasks on the cluster until all are written and proven.

    Attributes:
        checksums: for each output by tensor that of the bytes that were read back.
    """

    def __init__(
        self,
        plans: Sequence[tuple[Plan, Final]],
        numbers: Sequence[int],
        needs: Mapping[str, float],
        chosen: RunOptions,
    ) -> None:
        self._plans, self._chosen = plans, chosen
        self.checksums: list[dict[str, str]] = [{} for _ in plans]
        self._parts: dict[_Part, _Written] = {}
        self._followed = [
            Followed(plan, real_final(output), number)
            for (plan, output), number in zip(plans, numbers, strict=True)
        ]
        work = _Work(
            tuple(_again(plan) for plan, _ in plans),
            tuple(o if isinstance(o, str) else o.absolute() for _, o in plans),
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
        self._writing = Tasks[_Part](
            _write_part,
            work,
            needs,
            name=self._name,
            has_progressed=lambda part: self._followed[part[0]].has_grown(part[1]),
            on_wait=self._advance,
        )
        self._reading_needs = {"num_cpus": needs["num_cpus"], "memory": _PROGRAM_BYTES}
        self._reading = Tasks[_Part](
            _read_part,
            _Reading(
                tuple(
                    Path() if isinstance(output, str) else partial_folder(real_output(output))
                    for _, output in plans
                ),
                {
                    (index, number): tuple(job.output for job in part_of(plan, number, num_parts))
                    for index, ((plan, _), num_parts) in enumerate(zip(plans, numbers, strict=True))
                    for number in range(1, num_parts + 1)
                },
                chosen.threads,
            ),
            self._reading_needs,
            name=lambda part: f"reading back {self._name(part)}",
            has_progressed=lambda part: False,
            on_wait=lambda: None,
            place=self._other_machine,
        )

    def write(self, parts: Iterable[_Part]) -> None:
        """Write parts, and read them back; those that arrived with other bytes are written again.

        Raises:
            OutlierMergeError: one fails, or is lost too often.
        """
        left = list(parts)
        while left:
            self._writing.run(left, self._take_written)
            self.read_back(left)
            left = [part for part in left if self._is_damaged(part)]

    def read_back(self, parts: Iterable[_Part]) -> None:
        """Read parts back, on other machines than those that wrote them where there are others.

        Those in a store are not: `join_all` compares the sizes and ETags of their files.

        Raises:
            OutlierMergeError: a task is lost too often.
        """
        on_disks = (part for part in parts if isinstance(self._plans[part[0]][1], Path))
        self._reading.run(on_disks, self._take_read)

    def _name(self, part: _Part) -> str:
        index, number = part
        of = f" of {shown(self._plans[index][1])}" if len(self._plans) > 1 else ""
        return f"part {number}/{self._followed[index].num_parts}{of}"

    def _advance(self) -> None:
        self._chosen.on_progress(sum(followed.advance() for followed in self._followed))

    def _take_written(self, part: _Part, written: _Written) -> str:
        self._parts[part] = written
        for name in written.checksums:
            self.checksums[part[0]].pop(name, None)
        return ""

    def _take_read(self, part: _Part, checksums: Mapping[str, str]) -> str:
        self.checksums[part[0]] |= checksums
        return ""

    def _other_machine(self, part: _Part) -> str:
        """Return the machine that reads a part back; "" if all the same."""
        written, found = self._parts.get(part), machines(self._reading_needs)
        if written is None or written.machine not in found:
            return ""
        return found[(found.index(written.machine) + 1) % len(found)]

    def _is_damaged(self, part: _Part) -> bool:
        """Tell whether a part was read back with other bytes than were written."""
        read = self.checksums[part[0]]
        found = self._parts[part].checksums.items()
        damaged = [name for name, checksum in found if read.get(name) != checksum]
        if damaged:
            self._writing.count_loss(
                part,
                f"{self._name(part)}: {len(damaged)} tensor(s), such as {shown(damaged[0])}, "
                "arrived with other bytes than were written",
            )
        return bool(damaged)


def _again(plan: Plan) -> Callable[[], Plan]:
    """Return what makes a plan again on another machine, where its files have other stamps."""
    if isinstance(plan.spec, MoeSpec):
        return partial(plan_with_values, plan.spec, plan.shard_bytes, held_values(plan))
    return partial(make_plan, plan.spec, shard_bytes=plan.shard_bytes)


def _write_part(work: _Work, part: _Part) -> _Written:
    """Write a part on a machine of the cluster."""
    index, number = part
    plan, output, num_parts = work.plans[index](), work.outputs[index], work.num_parts[index]
    run_part(plan, output, number, num_parts, work.chosen)
    of_disk = {} if isinstance(output, str) else checksums_of(plan, output, number, num_parts)
    return _Written(of_disk, this_machine())


def _read_part(work: _Reading, part: _Part) -> dict[str, str]:
    """Read a part back on a machine of the cluster; return the checksums of its tensors.

    What cannot be read is left out. The driver's machine then tries it, and says what is wrong.
    """
    writer = OutputWriter(work.folders[part[0]])
    tensors = work.tensors[part]

    def checksum(tensor: OutputTensor) -> str:
        try:
            return writer.checksum(tensor)
        except OutlierMergeError:
            return ""

    try:
        writer.open_again({tensor.file for tensor in tensors})
        with ThreadPoolExecutor(work.threads) as pool:
            found = zip(tensors, pool.map(checksum, tensors), strict=True)
            return {tensor.name: checksum for tensor, checksum in found if checksum}
    except OutlierMergeError:
        return {}
    finally:
        writer.close()
