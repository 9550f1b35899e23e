"""Several processes carry out one plan and write into one output folder.

Each writes a part of the tensors into the same files. Parts may be started on any machine, in any
order, at the same time, or again. `run` then takes over their tensors and finishes the output.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

from outliermerge.arguments import checked
from outliermerge.errors import ArgumentError, OutlierMergeError
from outliermerge.execution.computing import require_engines
from outliermerge.execution.jobs import JobResult
from outliermerge.execution.threads import Target
from outliermerge.output.folder import OutputFolder
from outliermerge.output.journal import BusyError, Journal, process
from outliermerge.output.manifest import identity
from outliermerge.output.names import real_output
from outliermerge.output.options import RunOptions
from outliermerge.output.resumed import marks_of
from outliermerge.output.run import if_unchanged
from outliermerge.output.writer import OutputWriter, Progress, line_of
from outliermerge.planning.plan import Job, Options, Plan
from outliermerge.storage.stamps import OtherBytesError, Watched, watching

_PATIENCE_SECONDS, _POLL_SECONDS = 30, 0.05


def part_of(plan: Plan, part: int, num_parts: int) -> list[Job]:
    """Return the jobs of a part: consecutive jobs of the plan, with about equal bytes per part.

    Args:
        part: its number, counted from 1.

    Raises:
        ArgumentError: there is no part of that number.
    """
    if not 1 <= part <= num_parts:
        raise ArgumentError(
            f"part: found {part} of {num_parts}, expected one from 1 to {num_parts}"
        )
    sizes = [plan.num_work_bytes(job) for job in plan.jobs]
    total = max(1, sum(sizes))
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
    numbers = [min(num_parts, 1 + int(middle * num_parts / total)) for middle in middles]
    return [job for job, number in zip(plan.jobs, numbers, strict=True) if number == part]


@checked
def run_part(
    plan: Plan,
    output: Path,
    part: int,
    num_parts: int,
    chosen: RunOptions,
) -> int:
    """Write one part of an output, or the rest of it; return how many tensors were written.

    Args:
        output: the final path of the whole output, a folder or a file.
        part: its number, counted from 1.
        chosen: how it is carried out, as for `run`; `fresh` and `load_check` are for the `run` that
            finishes the output.

    Raises:
        BusyError: another process writes this part, or the whole output.
        ArgumentError: there is no such part, or the memory budget is too small.
        OutlierMergeError: a model or the output folder cannot be used.
    """
    jobs, name = part_of(plan, part, num_parts), f"{part}-of-{num_parts}"
    options, on_progress = chosen.on_this_machine(), chosen.on_progress
    require_engines(plan, options)
    plan.peak_memory_bytes(options)
    with ExitStack() as stack:
        stamps = dict.fromkeys(plan.files)
        watched = stack.enter_context(watching(Watched(stamps)))
        watched.check()
        folder = _held(plan, real_output(output), options, name, overwrite=chosen.overwrite)
        try:
            if folder.is_finished:
                folder.forget()
                return 0
            journal = Journal(folder.final, name)
            stack.callback(journal.close)
            writer = OutputWriter(folder.path)
            stack.callback(writer.close)
            writer.open(plan)
            by_run = set(folder.done)
        finally:
            folder.close()
        progress = Progress(plan, marks_of(plan))
        facts = json.loads(json.dumps(identity(plan, options)))
        if journal.identity == facts:
            progress.take_over(journal)
            progress.forget_unfit(writer, allow_non_finite=options.allow_non_finite)
        else:  # none, or of another merge
            journal.begin(facts)
        journal.add({"process": process(name), "marks": marks_of(plan)})

        def record(job: Job, result: JobResult) -> None:
            journal.add(line_of(job, result))

        left = [job for job in jobs if job.name not in by_run | progress.done.keys()]
        on_progress(sum(map(plan.num_work_bytes, jobs)) - sum(map(plan.num_work_bytes, left)))
        try:
            chosen.executor(
                [Target(plan, left, writer, if_unchanged(watched, record))],
                options,
                on_progress=on_progress,
                folder=folder.final.parent,
            )
        except OutlierMergeError as error:
            if isinstance(error, OtherBytesError):
                journal.clear()
            watched.check()  # a change explains what went wrong
            raise
        watched.check()
        writer.sync()
        journal.sync()
    return len(left)


def _held(plan: Plan, final: Path, options: Options, name: str, *, overwrite: bool) -> OutputFolder:
    """Lock an output while it is begun and a part of it is opened.

    If another part is doing the same, this waits for it.
    """
    began = time.monotonic()
    while True:
        try:
            with watching(Watched()):  # files of an old output are not inputs: do not note them
                return OutputFolder(
                    plan,
                    final,
                    identity=identity(plan, options),
                    marks=marks_of(plan),
                    overwrite=overwrite,
                    part=name,
                )
        except BusyError as error:
            waited = time.monotonic() - began
            if error.is_part or (not error.is_beginning and waited > _PATIENCE_SECONDS):
                raise
        time.sleep(_POLL_SECONDS)
