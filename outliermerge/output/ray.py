"""Places the parts of a merge as tasks on a Ray cluster.

A task plans the merge again on its machine and writes one part. What has been written is on the
output's disk, which all machines share: a part whose worker, machine or driver is lost goes on from
there. Ray itself retries nothing, so that each try is counted here.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outliermerge.errors import ArgumentError, OutlierMergeError, argument, shown
from outliermerge.optional import require_ray
from outliermerge.output.journal import BusyError, entry_of
from outliermerge.output.names import journal_path, partial_folder, real_output
from outliermerge.output.options import RunOptions
from outliermerge.output.parts import NotWholeError, checksums_of, join, run_part, states_of
from outliermerge.output.run import RunResult, refuse_taken
from outliermerge.output.writer import OutputWriter
from outliermerge.planning.plan import Plan
from outliermerge.planning.planner import make_plan
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.machine import num_threads

_POLL_SECONDS, _BUSY_SECONDS = 0.5, 5
_NUM_CPUS = 4  # of a part, where the threads are not given
_PROGRAM_BYTES = 300_000_000  # of the interpreter, the plan and what is imported
_MOST_LOSSES = 10  # of one part, without a tensor written in between
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """What a task needs to write parts.

    Attributes:
        here: the driver's folder, which the paths of a spec are relative to.
    """

    spec: MergeSpec
    shard_bytes: int | None
    output: Path
    num_parts: int
    here: Path
    chosen: RunOptions


@dataclass(frozen=True)
class _Outcome:
    """What became of a task.

    Attributes:
        checksums: by tensor, of the part that it has written.
        busy: why the part is being written by another process.
        error: the kind and the text of an error that would come again.
    """

    checksums: Mapping[str, str] = field(default_factory=dict)
    busy: str = ""
    error: tuple[str, str] | None = None


def run_on_ray(
    planned: Plan,
    output: Path,
    chosen: RunOptions,
    *,
    address: str | None = None,
    num_parts: int | None = None,
) -> RunResult:
    """Carry out a plan in parts, each a task on a Ray cluster; the output is that of `run`.

    Args:
        output: the final path; its disk, and those of the models, are shared by all machines.
        chosen: as for `run`. `threads` are those of a part, and the CPUs that it asks Ray for;
            `memory` is that of a part.
        address: of the cluster; without one Ray looks for a running one, or starts one here.
        num_parts: as many as can run at the same time, or those that were begun, by default.

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
    refuse_taken(planned, output, overwrite=chosen.overwrite)
    options = replace(chosen, device="cpu").on_this_machine()  # a driver may have no GPU
    with _connected(address):
        num_cpus = chosen.threads or _num_cpus()
        options = replace(options, threads=num_cpus)
        needs = {
            "num_cpus": num_cpus,
            "num_gpus": 0 if chosen.device == "cpu" else 1,
            "memory": planned.peak_memory_bytes(options) + _PROGRAM_BYTES,
        }
        final = real_output(output)
        begun = os.path.lexists(journal_path(final))
        states = states_of(planned, final, chosen.on_this_machine()) if begun else []
        if states and num_parts not in (None, len(states)):
            raise ArgumentError(
                f"{argument('parts', num_parts)}: {final} was begun in {len(states)} parts. Leave "
                "it out, to go on with these"
            )
        number = num_parts or len(states) or _num_at_once(needs, planned)
        work = _Work(
            planned.spec,
            planned.shard_bytes,
            output.absolute(),
            number,
            Path.cwd(),
            RunOptions(
                device=chosen.device,
                memory=chosen.memory,
                threads=num_cpus,
                kernels=chosen.kernels,
                overwrite=chosen.overwrite,
                allow_non_finite=chosen.allow_non_finite,
            ),
        )
        began = time.monotonic()
        driver = _Driver(planned, final, work, needs, chosen)
        left = [s.number for s in states if not s.is_whole] if states else range(1, number + 1)
        if not begun or states:  # else it has its name already
            driver.write(left)
        while True:
            worked = time.monotonic() - began
            try:
                done = join(planned, output, replace(chosen, on_progress=lambda num_bytes: None))
            except NotWholeError as error:
                driver.write(state.number for state in error.unfinished)
                continue
            made = {name for state in states for name in state.lacking}
            jobs = [job for job in planned.jobs if not begun or job.name in made]
            return replace(
                done,
                num_resumed=len(planned.jobs) - len(jobs),
                input_bytes=sum(job.num_read_bytes for job in jobs),
                written_bytes=sum(job.num_written_bytes for job in jobs),
                disk_bytes=None,  # the cluster's are not known
                work_seconds=worked,
                seconds=worked + done.seconds,
            )


class _Driver:
    """Keeps the parts of an output as tasks on the cluster until all are written and proven."""

    def __init__(
        self, plan: Plan, final: Path, work: _Work, needs: dict[str, Any], chosen: RunOptions
    ) -> None:
        import ray

        self._plan, self._final, self._chosen = plan, final, chosen
        self._num_parts = work.num_parts
        self._task = ray.remote(max_retries=0, **needs)(_write_part)
        self._work = ray.put(work)
        self._written = _Written(plan, final, work.num_parts)
        self._losses = Counter[int]()
        self._threads = num_threads(0)

    def write(self, numbers: Any) -> None:
        """Write parts.

        Raises:
            OutlierMergeError: one fails, or is lost too often.
        """
        import ray

        pending = {self._start(number): number for number in numbers}
        try:
            while pending:
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_SECONDS)
                self._chosen.on_progress(self._written.advance())
                for reference in ready:
                    number = pending.pop(reference)
                    if self._is_left(number, reference):
                        pending[self._start(number)] = number
            self._chosen.on_progress(self._written.advance())
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)

    def _start(self, number: int) -> Any:
        return self._task.remote(self._work, number)

    def _is_left(self, number: int, reference: Any) -> bool:
        """Tell whether a part whose task has ended is to be written again."""
        import ray

        what = f"part {number}/{self._num_parts}"
        try:
            outcome: _Outcome = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            reason = shown(str(error.cause).partition("\n")[0], 500)
            raise OutlierMergeError(f"{what} failed on the cluster: {reason}") from error
        except ray.exceptions.RayError as error:  # of the worker, its machine or the cluster
            return self._lost(number, f"{what} was lost: {type(error).__name__}")
        if outcome.error is not None:
            kind, text = outcome.error
            raise (ArgumentError if kind == "ArgumentError" else OutlierMergeError)(text)
        if outcome.busy:
            return self._lost(number, outcome.busy)
        damaged = self._damaged(outcome.checksums)
        if damaged:
            return self._lost(
                number,
                f"{what}: {len(damaged)} tensors, such as {shown(damaged[0])}, arrived with other "
                "bytes than were written",
            )
        return False

    def _lost(self, number: int, why: str) -> bool:
        """Count a loss of a part; it is written again."""
        if self._written.has_grown(number):
            self._losses[number] = 0
        self._losses[number] += 1
        if self._losses[number] > _MOST_LOSSES:
            raise OutlierMergeError(
                f"{why}, {_MOST_LOSSES} times without a tensor written in between. The same "
                "command goes on from here."
            )
        _logger.warning("%s; it goes on", why)
        return True

    def _damaged(self, checksums: Mapping[str, str]) -> list[str]:
        """Return the tensors whose bytes, read here, are not those that were written."""
        jobs = [job for job in self._plan.jobs if job.name in checksums]
        writer = OutputWriter(partial_folder(self._final))
        try:
            writer.open(self._plan)  # for each part anew: then the disk's server tells the newest
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


def _write_part(work: _Work, number: int) -> _Outcome:
    """Write a part; this is what a worker of the cluster runs."""
    try:
        os.chdir(work.here)
    except OSError as error:
        text = f"{work.here}: is not on machine {os.uname().nodename}: {error.strerror}. All "
        return _Outcome(error=("", text + "machines of the cluster must share it."))
    try:
        plan = make_plan(work.spec, shard_bytes=work.shard_bytes)
        run_part(plan, work.output, number, work.num_parts, work.chosen)
        return _Outcome(checksums_of(plan, work.output, number, work.num_parts))
    except BusyError as error:  # by a task that was taken for lost; it may be about to end
        time.sleep(_BUSY_SECONDS)
        return _Outcome(busy=error.marked)
    except OutlierMergeError as error:  # its class may not survive pickling
        return _Outcome(error=(type(error).__name__, error.marked))


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, unless this process is connected already.

    Raises:
        OutlierMergeError: there is none at the address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = str(error).partition("\n")[0]
        raise OutlierMergeError(
            f"{argument('address', address)}: no Ray cluster can be reached: {shown(reason, 300)}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _alive() -> list[dict[str, float]]:
    """Return the resources of each machine of the cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _num_cpus() -> int:
    """Return the CPUs of a part: a few, or all of the smallest machine."""
    sizes = [int(node.get("CPU", 0)) for node in _alive()]
    return max(1, min([_NUM_CPUS, *filter(None, sizes)]))


def _num_at_once(needs: Mapping[str, float], plan: Plan) -> int:
    """Return how many parts can run at the same time, at least 1 and at most one a tensor."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    wanted = {names[key]: value for key, value in needs.items() if value}
    fitting = sum(
        int(min(node.get(name, 0) // value for name, value in wanted.items())) for node in _alive()
    )
    if not fitting:
        said = ", ".join(f"{name} {value:,}" for name, value in wanted.items())
        _logger.warning("no machine of the cluster has what a part asks for now (%s)", said)
    return max(1, min(fitting, len(plan.jobs)))
