"""Several processes carry out one plan and write into one output folder.

Each writes a part of the tensors into the same files. Parts may be started on any machine that
shares the output's disk, in any order, at the same time, or again. `join` then proves that all
tensors are there and finishes the output; `run` would also merge those that are not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from outliermerge.arguments import checked
from outliermerge.errors import OutlierMergeError
from outliermerge.execution.computing import require_engines
from outliermerge.execution.jobs import JobResult
from outliermerge.execution.threads import Target, execute
from outliermerge.output.bucket_parts import run_part_in_store
from outliermerge.output.division import checks_of, part_of, part_work_bytes
from outliermerge.output.folder import OutputFolder
from outliermerge.output.journal import BusyError, Journal, process
from outliermerge.output.manifest import identity
from outliermerge.output.names import (
    Final,
    as_final,
    real_final,
    real_output,
)
from outliermerge.output.options import RunOptions
from outliermerge.output.part_states import (
    NotWholeError,
    PartState,
    states_of,
    states_of_all,
    without,
)
from outliermerge.output.resumed import compared_in, marks_of
from outliermerge.output.run import RunResult, if_unchanged, run_plans
from outliermerge.output.writer import OutputWriter, Progress, line_of
from outliermerge.planning.plan import Job, Options, Plan
from outliermerge.storage.stamps import OtherBytesError, Watched, watching

_PATIENCE_SECONDS, _POLL_SECONDS = 30, 0.05


@checked
def run_part(
    plan: Plan,
    output: str | Path,
    part: int,
    num_parts: int,
    chosen: RunOptions | None = None,
) -> int:
    """Write one part of an output, or the rest of it; return how many tensors were written.

    Args:
        output: the final path of the whole output, a folder or a file, or a folder's address.
        part: its number, counted from 1.
        chosen: how it is carried out, as for `run`; `fresh` and `load_check` are for the `run` that
            finishes the output.

    Raises:
        BusyError: another process writes this part, or the whole output.
        ArgumentError: there is no such part, the output was begun in another number of parts, or
            the memory budget is too small.
        OutlierMergeError: a model or the output folder cannot be used.
    """
    final, name = as_final(output), f"{part}-of-{num_parts}"
    jobs = part_of(plan, part, num_parts, whole_files=isinstance(final, str))
    checks = checks_of(plan, part, num_parts)
    chosen = chosen or RunOptions()
    options, on_progress = chosen.on_this_machine(plan), chosen.on_progress
    require_engines(plan, options)
    if isinstance(final, str):
        return run_part_in_store(plan, final, jobs, checks, num_parts, name, chosen)
    with ExitStack() as stack:
        stamps = dict.fromkeys(plan.files)
        watched = stack.enter_context(watching(Watched(stamps)))
        watched.check()
        folder = _held(plan, real_output(final), options, name, overwrite=chosen.overwrite)
        try:
            if folder.is_finished:
                folder.forget()
                return 0
            folder.share(num_parts)
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
            progress.take_over(journal.lines)
            progress.forget_unfit(writer.checksum, allow_non_finite=options.allow_non_finite)
        else:  # none, or of another merge
            journal.begin(facts)
        journal.add({"process": process(name), "marks": marks_of(plan)})

        def record(job: Job, result: JobResult) -> None:
            journal.add(line_of(job, result))

        left = [job for job in jobs if job.name not in by_run | progress.done.keys()]
        known = compared_in(journal.lines, marks_of(plan))
        to_compare = tuple(check for number, check in checks.items() if number not in known)
        own = replace(plan, checks=to_compare)
        on_progress(part_work_bytes(plan, jobs) - part_work_bytes(plan, left))
        try:
            chosen.executor(
                [Target(own, left, writer, if_unchanged(watched, record))],
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
        if to_compare:
            journal.add({"equal": [*checks]})
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


@checked
def join(plan: Plan, output: str | Path, chosen: RunOptions | None = None) -> RunResult:
    """Finish an output whose parts are written: prove every tensor, add the other files, name it.

    Nothing is merged: a tensor that is not there, or whose bytes have another checksum than its
    part has noted, is told with its part. What must be equal is compared here only where no part
    has noted that it did so, with the inputs as they are now.

    Args:
        output: the final path of the whole output, a folder or a file.
        chosen: how it is carried out, as for `run`; `fresh` has no effect.

    Raises:
        NotWholeError: parts are not done.
        BusyError: another process finishes it, or begins it.
        OutlierMergeError: nothing of it is written, it was begun by another merge, or it would not
            load.
    """
    (result,) = join_all([(plan, as_final(output))], chosen or RunOptions())
    return result


def join_all(
    plans: Sequence[tuple[Plan, Final]],
    chosen: RunOptions,
    read_back: Sequence[Mapping[str, str]] | None = None,
) -> list[RunResult]:
    """Finish outputs whose parts are written, all or none of them; see `join`.

    The parts' device need not be on this machine.

    Args:
        read_back: for each output by tensor the checksums of what other machines have read back.
            These are compared with those that the parts have noted; other tensors are read here.
    """
    options = chosen.in_parts()
    outputs = [real_final(output) for _, output in plans]
    found = states_of_all(plans, options)
    if None in found:
        index = found.index(None)
        states_of(plans[index][0], outputs[index], options)  # says why there are none
    states = [each or [] for each in found]
    for final, each in zip(outputs, states, strict=True):
        if not all(state.is_whole for state in each):
            raise NotWholeError(final, each)

    found_of = {
        id(plan): (final, each)
        for (plan, _), final, each in zip(plans, outputs, states, strict=True)
    }

    def refuse(
        targets: Sequence[Target],
        options: Options,
        *,
        on_progress: Callable[[int], None],
        folder: Path | None,
    ) -> None:
        for target in targets:
            final, each = found_of[id(target.plan)]
            lost = {job.name for job in target.jobs}
            if lost:
                raise NotWholeError(
                    final, [without(target.plan, state, lost, final) for state in each]
                )
        here = replace(options, device="cpu")  # for what must be equal
        left = [_without_compared(target, found_of[id(target.plan)][1]) for target in targets]
        execute(left, here, on_progress=on_progress, folder=folder)

    chosen = replace(chosen, executor=refuse, fresh=False)
    return run_plans(plans, chosen, options=options, read_back=read_back)


def _without_compared(target: Target, states: Iterable[PartState]) -> Target:
    """Return a target with those of its plan's checks that no part has done."""
    done = {number for state in states for number in state.compared}
    left = tuple(c for number, c in enumerate(target.plan.checks) if number not in done)
    return replace(target, plan=replace(target.plan, checks=left))


def checksums_of(plan: Plan, output: Path, part: int, num_parts: int) -> dict[str, str]:
    """Return by tensor the checksums that a part has noted of what it wrote."""
    journal = Journal(real_output(output), f"{part}-of-{num_parts}")
    try:
        progress = Progress(plan, marks_of(plan))
        progress.take_over(journal.lines)
    finally:
        journal.close()
    own = {job.name for job in part_of(plan, part, num_parts)}
    return {name: result.checksum for name, result in progress.done.items() if name in own}
