"""Several processes carry out one plan and write into one output folder.

Each writes a part of the tensors into the same files. Parts may be started on any machine that
shares the output's disk, in any order, at the same time, or again. `join` then proves that all
tensors are there and finishes the output; `run` would also merge those that are not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outliermerge.arguments import checked
from outliermerge.errors import OutlierMergeError, argument, listing
from outliermerge.execution.computing import require_engines
from outliermerge.execution.jobs import JobResult
from outliermerge.execution.threads import Target, execute
from outliermerge.output.bucket_parts import run_part_in_store, written_in_store
from outliermerge.output.division import divided, part_of, part_work_bytes
from outliermerge.output.folder import OutputFolder, begun_by_another, differing
from outliermerge.output.journal import BusyError, Journal, parts, process, told
from outliermerge.output.manifest import identity
from outliermerge.output.names import (
    Final,
    as_final,
    journal_path,
    partial_folder,
    real_final,
    real_output,
)
from outliermerge.output.naming import is_named
from outliermerge.output.options import RunOptions
from outliermerge.output.resumed import marks_of
from outliermerge.output.run import RunResult, if_unchanged, run_plans
from outliermerge.output.writer import OutputWriter, Progress, line_of
from outliermerge.planning.plan import Job, Options, Plan
from outliermerge.storage.stamps import OtherBytesError, Watched, watching

_PATIENCE_SECONDS, _POLL_SECONDS = 30, 0.05


@dataclass(frozen=True)
class PartState:
    """How far a part of an output is.

    Attributes:
        number: of the part, counted from 1.
        num_parts: how many there are.
        num_tensors: that it has to write.
        lacking: the names of those that are not written, or whose bytes are not as written.
        holder: in words, the process that is writing it now; empty if none is.
    """

    number: int
    num_parts: int
    num_tensors: int
    lacking: tuple[str, ...]
    holder: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to be done for it."""
        return not self.lacking and not self.holder

    @property
    def in_words(self) -> str:
        """What a person should know of it."""
        said = f"part {self.number}/{self.num_parts}"
        if self.holder:
            return f"{said} is being written{self.holder}"
        return f"{said} lacks {len(self.lacking)} of {self.num_tensors} tensors"

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "part": self.number,
            "num_parts": self.num_parts,
            "num_tensors": self.num_tensors,
            "is_being_written": bool(self.holder),
            "lacking": list(self.lacking),
        }


class NotWholeError(OutlierMergeError):
    """An output cannot be joined, since parts of it lack tensors or are being written.

    Attributes:
        states: of all parts.
    """

    def __init__(self, final: Final, states: Sequence[PartState]) -> None:
        self.final, self.states = final, tuple(states)
        left = self.unfinished
        super().__init__(
            f"{final}: is not whole, {len(left)} of {len(self.states)} parts are not done:\n"
            f"{listing(state.in_words for state in left)}\nRun these parts, then join again."
        )

    @property
    def unfinished(self) -> list[PartState]:
        """The parts that are not done."""
        return [state for state in self.states if not state.is_whole]


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
    chosen = chosen or RunOptions()
    options, on_progress = chosen.on_this_machine(), chosen.on_progress
    require_engines(plan, options)
    plan.peak_memory_bytes(options)
    if isinstance(final, str):
        return run_part_in_store(plan, final, jobs, num_parts, name, chosen)
    with ExitStack() as stack:
        stamps = dict.fromkeys(plan.files)
        watched = stack.enter_context(watching(Watched(stamps)))
        watched.check()
        folder = _held(plan, real_output(final), options, name, overwrite=chosen.overwrite)
        try:
            if folder.is_finished:
                folder.forget()
                return 0
            journal = Journal(folder.final, name)
            stack.callback(journal.close)
            writer = OutputWriter(folder.path)
            stack.callback(writer.close)
            writer.open(plan)
            folder.share(num_parts)
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
        on_progress(part_work_bytes(plan, jobs) - part_work_bytes(plan, left))
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


@checked
def join(plan: Plan, output: str | Path, chosen: RunOptions | None = None) -> RunResult:
    """Finish an output whose parts are written: prove every tensor, add the other files, name it.

    Nothing is merged: a tensor that is not there, or whose bytes have another checksum than its
    part has noted, is told with its part.

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


def join_all(plans: Sequence[tuple[Plan, Final]], chosen: RunOptions) -> list[RunResult]:
    """Finish outputs whose parts are written, all or none of them; see `join`.

    The parts' device need not be on this machine.
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

    def refuse(
        targets: Sequence[Target],
        options: Options,
        *,
        on_progress: Callable[[int], None],
        folder: Path | None,
    ) -> None:
        for target, final, each in zip(targets, outputs, states, strict=True):
            lost = {job.name for job in target.jobs}
            if lost:
                raise NotWholeError(
                    final, [_without(target.plan, state, lost, final) for state in each]
                )
        here = replace(options, device="cpu")  # for what must be equal
        execute(targets, here, on_progress=on_progress, folder=folder)

    return run_plans(plans, replace(chosen, executor=refuse, fresh=False), options=options)


def states_of_all(
    plans: Sequence[tuple[Plan, Final]], options: Options
) -> list[list[PartState] | None]:
    """Return for each output how far its parts are; None where nothing of it is written.

    They are as `states_of` returns them. Of outputs that get their names together, the first may
    be the last that has a journal.
    """
    found: list[list[PartState] | None] = []
    for plan, output in plans:
        final = real_final(output)
        if isinstance(final, str) or os.path.lexists(journal_path(final)):
            found.append(states_of(plan, final, options))
        else:
            all_named = found[:1] == [[]] and final.exists()
            found.append([] if all_named else None)
    return found


def states_of(plan: Plan, final: Final, options: Options) -> list[PartState]:
    """Return how far the parts of an output are, by their journals; empty if all is named already.

    Args:
        final: the path that `real_output` returned, or an address.

    Raises:
        BusyError: another process holds the whole output.
        OutlierMergeError: nothing of it is written, or it was begun by another merge.
    """
    facts = json.loads(json.dumps(identity(plan, options)))
    if isinstance(final, str):
        found = written_in_store(plan, final, facts)
        if found is None:
            return []
        done, num_parts = found
        return _states(plan, num_parts, done, {}, whole_files=True)
    if not os.path.lexists(journal_path(final)):
        if final.exists():
            raise OutlierMergeError(
                f"{final}: exists already, and no part of it is being written. It was joined "
                "before, or is another output; `outliermerge verify` checks it."
            )
        if parts(final):
            raise OutlierMergeError(
                f"{journal_path(final)}: is missing, and without it nobody can tell what was "
                f"begun in {partial_folder(final)}. Put it back, or remove that folder and the "
                "journals beside it, and run the parts again."
            )
        raise OutlierMergeError(
            f"{final}: no part of it is being written. Run its parts first, each with "
            f"{argument('part', '1/N')} to {argument('part', 'N/N')}."
        )
    whole = Journal(final)
    try:
        if is_named(whole):
            return []
        if changed := differing(whole.identity, facts):
            raise begun_by_another(final, changed, in_parts=True)
        num_parts = whole.last("num_parts")
        if num_parts is None:
            raise OutlierMergeError(
                f"{final}: was begun by a run that was not divided into parts. The same run goes "
                "on with it."
            )
        done = _written(whole, facts)
    finally:
        whole.close()
    holders = dict[str, str]()
    for name in parts(final):
        try:
            journal = Journal(final, name)
        except BusyError as error:
            said = {key: value for key, value in error.holder.items() if key != "part"}
            holders[name] = told(said) or " by another process"
            continue
        try:
            done |= _written(journal, facts)
        finally:
            journal.close()
    return _states(plan, num_parts, done, holders)


def _states(
    plan: Plan,
    num_parts: int,
    done: set[str],
    holders: Mapping[str, str],
    *,
    whole_files: bool = False,
) -> list[PartState]:
    """Return the states of all parts, from what is done and who is writing which part."""
    return [
        PartState(
            number,
            num_parts,
            len(jobs),
            tuple(job.name for job in jobs if job.name not in done),
            holders.get(f"{number}-of-{num_parts}", ""),
        )
        for number, jobs in enumerate(divided(plan, num_parts, whole_files=whole_files), 1)
    ]


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


def _written(journal: Journal, facts: dict[str, Any]) -> set[str]:
    return set(journal.all("tensor")) if journal.identity == facts else set()


def _without(plan: Plan, state: PartState, lost: set[str], final: Final) -> PartState:
    """Return the state of a part after tensors of it were found to be damaged."""
    jobs = part_of(plan, state.number, state.num_parts, whole_files=isinstance(final, str))
    return replace(state, lacking=tuple(job.name for job in jobs if job.name in lost))
