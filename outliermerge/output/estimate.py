"""How long a plan will take and how much memory the process will need, from a short trial."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from outliermerge.checkpoint.checksum import PIECE_ELEMENTS, piece_digests
from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.checkpoint.reader import read_exactly, write_exactly
from outliermerge.checkpoint.sources import Source, TensorMeta
from outliermerge.display import human_bytes, short_repr
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.execution.computing import reads_by_torch
from outliermerge.execution.threads import Target, execute
from outliermerge.output.names import Final
from outliermerge.planning.plan import Job, Options, Plan
from outliermerge.storage.bucket import NUM_AT_ONCE, PART_BYTES
from outliermerge.storage.machine import path_of, resident_bytes
from outliermerge.storage.stand_ins import stand_in
from outliermerge.storage.system import open_direct, reserve

# The trial merges spans of some tensors, from the inputs into an unnamed file on the output's disk.
_SPAN_ELEMENTS, _NUM_JOBS, _MAX_ROUNDS = 1 << 20, 8, 4
_TRIAL_SECONDS, _SLOW_SECONDS = 0.15, 0.4
_LEAST_SHARE = 0.5  # of the work, below which the trial tells nothing of the rest
_ALIGNMENT = 4096
# Measured on Linux: what importing torch takes, and what a thread takes besides its blocks.
_TORCH_BYTES, _THREAD_BYTES = 218 * 10**6, 800_000
_NUMPY_BYTES = 12_500_000  # of importing it, to count values in bins; torch imports it, too
_RUN_BYTES = 2_000_000  # what a run takes besides what its plan has taken
# Measured: the files beside the weights, checksums of them, the names.
FIXED_SECONDS = 0.1


@dataclass(frozen=True)
class Estimate:
    """What a run of a plan will take.

    Attributes:
        seconds: wall time of the run without planning and without the proof of loading; None if it
            is not known.
        bytes_per_second: how fast bytes of all passes were worked through in the trial.
        basis: in words, what the time rests on, or why it is not known.
        program_bytes: memory of the interpreter and of what it has imported and planned; None if
            the system does not tell.
        block_bytes: memory of all threads and of the blocks that they work on.
        then: what a run does after that, in a time that is not known.
    """

    seconds: float | None
    bytes_per_second: float | None
    basis: str
    program_bytes: int | None
    block_bytes: int
    then: str = ""

    def __repr__(self) -> str:
        speed = self.bytes_per_second
        memory = self.process_bytes
        return short_repr(
            self,
            f"about {self.seconds:.3g} s" if self.seconds is not None else "time not known",
            f"then {self.then}" if self.then else "",
            f"{human_bytes(speed)}/s, {self.basis}" if speed is not None else self.basis,
            "memory of the process not known"
            if memory is None
            else f"{human_bytes(memory)} of memory",
        )

    @property
    def process_bytes(self) -> int | None:
        """The most memory that the whole process takes."""
        return None if self.program_bytes is None else self.program_bytes + self.block_bytes

    def as_dict(self) -> dict[str, object]:
        """Return the estimate as JSON values."""
        return {
            "seconds": None if self.seconds is None else round(self.seconds, 2),
            "bytes_per_second": self.bytes_per_second and round(self.bytes_per_second),
            "basis": self.basis,
            **({"then": self.then} if self.then else {}),
            "process_memory_bytes": self.process_bytes,
            "program_memory_bytes": self.program_bytes,
            "block_memory_bytes": self.block_bytes,
        }


def estimate_run(plan: Plan, options: Options, output: Final | None) -> Estimate:
    """Estimate what a run takes, by merging a few megabytes of the models.

    The trial takes a fraction of a second and leaves nothing behind. A plan that torch computes is
    not tried, unless torch is imported already.

    Args:
        output: what would be written; the present folder's disk is tried if it is not known.

    Raises:
        ArgumentError: the memory budget is too small.
    """
    needs_torch = any(
        options.uses_torch(job) or reads_by_torch((source for _, source in job.sources), options)
        for job in (*plan.jobs, *plan.checks)
    )
    has_torch = "torch" in sys.modules
    program = resident_bytes()
    if program is not None and needs_torch and not has_torch:
        program += _TORCH_BYTES
    elif program is not None and "numpy" not in sys.modules and plan.counter_bytes(options):
        program += _NUMPY_BYTES
    blocks = plan.block_memory_bytes(options) + options.threads * _THREAD_BYTES + _RUN_BYTES
    if isinstance(output, str):
        blocks += min(plan.num_written_bytes, (NUM_AT_ONCE + 1) * PART_BYTES)
    speed, basis = None, ""
    if needs_torch and not has_torch:
        basis = "not tried, since torch computes a part of it"
    elif any(stand_in(stamp.path) for e in plan.all_inputs for stamp in e.checkpoint.weight_files):
        basis = "not tried, since models are read from elsewhere"
    elif isinstance(output, str):
        basis = "not tried, since the output is written elsewhere"
    elif options.device != "cpu":
        basis = f"not tried on {options.device}"
    else:
        try:
            speed, basis = _tried(plan, options, _existing(output))
        except (OSError, OutlierMergeError) as error:
            basis = f"the trial failed: {shown(str(error).partition(chr(10))[0])}"
    seconds = None if speed is None else FIXED_SECONDS + plan.work_bytes / speed
    then = "llama.cpp's converter" if plan.conversion is not None else ""
    return Estimate(seconds, speed, basis, program, blocks, then)


def _tried(plan: Plan, options: Options, folder: Path) -> tuple[float | None, str]:
    """Return how many bytes of work are done in a second, and what that rests on."""
    fitting = [job for job in plan.jobs if _can_be_tried(job)]
    share = sum(map(plan.num_work_bytes, fitting)) / max(1, plan.work_bytes)
    if share < _LEAST_SHARE:
        return None, "the merge was not tried, since most tensors are computed when they are read"
    options = replace(options, allow_non_finite=True)
    chosen = _spread(fitting, plan, _NUM_JOBS)
    seconds, num_bytes = 0.0, 0
    with tempfile.TemporaryFile(dir=folder) as file:
        for number in range(_MAX_ROUNDS):
            jobs = [_part(job, number, _MAX_ROUNDS) for job in chosen]
            sink = _TrialSink(file.fileno(), jobs)
            trial = replace(plan, jobs=tuple(sink.jobs), checks=())
            started = time.perf_counter()
            execute([Target(trial, trial.jobs, sink, _ignored)], options)
            sink.close()
            took = time.perf_counter() - started
            if number == 0 and took < _SLOW_SECONDS:
                continue  # the first round warms threads and buffers up
            seconds, num_bytes = seconds + took, num_bytes + trial.work_bytes
            if seconds > _TRIAL_SECONDS:
                break
    said = f"a trial of {human_bytes(num_bytes)} in {seconds:.2f} s"
    return num_bytes / seconds, f"{said}, on the disk of {shown(folder)}"


def _can_be_tried(job: Job) -> bool:
    """Tell whether a part of a tensor can be merged as if it were a tensor."""
    is_cut_freely = job.action == "copy" or (job.action == "merge" and job.task.cut == "element")
    return (
        is_cut_freely
        and not job.auxiliary
        and job.num_elements > 0
        and all(isinstance(s, TensorMeta) and s.offset is not None for _, s in job.sources)
    )


def _spread(jobs: Sequence[Job], plan: Plan, number: int) -> list[Job]:
    """Return some jobs, evenly placed in the work, so that large tensors are among them."""
    total, done, found = sum(map(plan.num_work_bytes, jobs)), 0, dict[str, Job]()
    for job in jobs:
        done += plan.num_work_bytes(job)
        if done * number >= total * (len(found) + 0.5):
            found[job.name] = job
    return list(found.values())


def _part(job: Job, number: int, num_parts: int) -> Job:
    """Return a job for one span of a tensor, a span of its own for each number."""
    size = min(job.num_elements, _SPAN_ELEMENTS)
    room = (job.num_elements - size) // PIECE_ELEMENTS
    start = room * number // num_parts * PIECE_ELEMENTS
    sources: list[tuple[int, Source]] = []
    for index, source in job.sources:
        assert isinstance(source, TensorMeta) and source.offset is not None
        offset = source.offset + start * source.dtype.num_bytes
        sources.append((index, replace(source, shape=(size,), offset=offset)))
    return replace(job, sources=tuple(sources), output=replace(job.output, shape=(size,)))


class _TrialSink:
    """Writes the outputs of a trial one after the other into one file."""

    def __init__(self, descriptor: int, jobs: Sequence[Job]) -> None:
        self._file, self.jobs, position = descriptor, list[Job](), 0
        for job in jobs:
            self.jobs.append(replace(job, output=replace(job.output, offset=position)))
            position += -(-job.num_written_bytes // _ALIGNMENT) * _ALIGNMENT
        reserve(descriptor, position)
        try:
            self._direct = open_direct(Path(path_of(descriptor, Path())))
        except OSError:
            self._direct = -1

    def place(self, tensor: OutputTensor, start: int) -> tuple[int, int, int]:
        return self._file, tensor.offset + start * tensor.dtype.num_bytes, self._direct

    def write(self, tensor: OutputTensor, start: int, data: memoryview) -> None:
        write_exactly(*self.place(tensor, start)[:2], data)

    def wrote(self, tensor: OutputTensor, span: tuple[int, int]) -> None:
        pass

    def digests(self, tensor: OutputTensor, start: int, out: memoryview) -> bytes:
        read_exactly(*self.place(tensor, start)[:2], out)
        return piece_digests(out, tensor.dtype.num_bytes)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        """Bring what was written to the disk, as a run does."""
        os.fsync(self._file)
        if self._direct >= 0:
            os.close(self._direct)


def _existing(output: Path | None) -> Path:
    """Return the folder on whose disk the output will be."""
    place = (output or Path.cwd() / "-").absolute().parent
    while not place.exists():
        place = place.parent
    return place


def _ignored(job: Job, result: object) -> None:
    """Do nothing with a result of the trial."""
