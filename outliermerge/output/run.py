"""Plans carried out: outputs opened, tensors made, files beside them written, folders named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.display import short_repr
from outliermerge.errors import ArgumentError, OutlierMergeError, SpecError, argument
from outliermerge.execution.computing import require_engines
from outliermerge.execution.jobs import JobResult
from outliermerge.execution.threads import Target, groups_of
from outliermerge.notebook import NotebookBar, in_notebook
from outliermerge.output.division import part_work_bytes
from outliermerge.output.manifest import identity, write_sidecars
from outliermerge.output.manifest_file import Manifest, read_manifest
from outliermerge.output.names import (
    Final,
    as_final,
    journal_path,
    output_here,
    real_output,
)
from outliermerge.output.opened import Output, open_output
from outliermerge.output.options import RunOptions
from outliermerge.output.ownership import check_apart, check_begun_or_free, check_free
from outliermerge.planning.plan import Job, Options, Plan
from outliermerge.storage.machine import disk_bytes_read
from outliermerge.storage.stamps import OtherBytesError, Watched, watching

if TYPE_CHECKING:
    from outliermerge.output.load_check import Verdict


@dataclass(frozen=True)
class RunResult:
    """What a finished merge did.

    Attributes:
        output: the folder, or its address.
        manifest: the contents of its outliermerge.json.
        num_resumed: tensors that an earlier, killed run had already written.
        input_bytes, written_bytes: of the tensors worked on now.
        disk_bytes: what the process had to read from disks, the rest being in the page cache;
            None where the system does not tell.
        work_seconds: wall time of reading, computing and writing the tensors.
        sync_seconds: wall time until all is on the disk and has its name.
        seconds: wall time of all but planning; of all outputs where several were made together.
        load_check: what is known of its loading; None where that was not asked.
        left_behind: where files are that somebody put into the old output during the merge.
    """

    output: Final
    manifest: Mapping[str, Any]
    num_resumed: int
    input_bytes: int
    written_bytes: int
    disk_bytes: int | None
    work_seconds: float
    sync_seconds: float
    seconds: float
    load_check: Verdict | None = None
    left_behind: Path | None = None

    def __repr__(self) -> str:
        drift = self.manifest.get("drift", {}).get("relative_size")
        loads = "; ".join(self.load_check.by) if self.load_check else ""
        return short_repr(
            self,
            str(self.output),
            f"{len(self.manifest['tensors'])} tensors, {self.manifest['num_parameters']:,} "
            f"parameters, {self.seconds:.1f} s"
            + (f", {self.num_resumed} tensors of an earlier run" if self.num_resumed else ""),
            f"the change is {100 * drift:.2g}% of the base, in L2 norm" if drift else "",
            f"loads in {loads}" if loads else "",
            f"infinite or NaN values in {len(self.non_finite)} tensors" if self.non_finite else "",
        )

    @property
    def non_finite(self) -> dict[str, list[str]]:
        """Where infinite or NaN values are, by tensor."""
        tensors = self.manifest["tensors"].items()
        return {name: entry["non_finite"] for name, entry in tensors if "non_finite" in entry}

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, without the manifest's tensors."""
        return {
            "output": str(self.output),
            "num_tensors": len(self.manifest["tensors"]),
            "num_parameters": self.manifest["num_parameters"],
            "num_resumed": self.num_resumed,
            "input_bytes": self.input_bytes,
            "read_bytes": self.manifest["read_bytes"],
            "written_bytes": self.written_bytes,
            "disk_bytes": self.disk_bytes,
            "work_seconds": round(self.work_seconds, 3),
            "sync_seconds": round(self.sync_seconds, 3),
            "seconds": round(self.seconds, 3),
            "non_finite": self.non_finite,
            **({"left_behind": str(self.left_behind)} if self.left_behind else {}),
            **({"load_check": self.load_check.as_dict()} if self.load_check else {}),
        }


def run_plans(
    plans: Sequence[tuple[Plan, Final]],
    chosen: RunOptions,
    *,
    options: Options | None = None,
    read_back: Sequence[Mapping[str, str]] | None = None,
) -> list[RunResult]:
    """Carry out plans, each into its own output; what they read of the same tensors is read once.

    Outputs in a store are made one after the other, so that the models are read again for each.
    With `load_check`, an output that would not load keeps the name of an unfinished one, and a
    run with a corrected config goes on from there.

    Args:
        options: those of the plans, if they are not `chosen.on_this_machine()`.
        read_back: for each output by tensor the checksums of what other machines have read back of
            an earlier run's bytes; other tensors are read back here.

    Raises:
        ArgumentError: an option is wrong, or the memory budget is too small.
        OutlierMergeError: a model or an output folder is not fit for it, or an output would not
            load.
    """
    options = options or chosen.on_this_machine(*(plan for plan, _ in plans))
    on_progress = chosen.on_progress
    for plan, _ in plans:
        require_engines(plan, options)
    started, disk_before = time.monotonic(), disk_bytes_read()
    with ExitStack() as stack:
        if on_progress is RunOptions.on_progress and in_notebook():
            first, *others = (plan for plan, _ in plans)
            total = first.work_bytes + sum(
                plan.num_written_bytes
                if plan.inputs == first.inputs and isinstance(plans[0][1], Path)
                else plan.work_bytes
                for plan in others
            )
            on_progress = stack.enter_context(NotebookBar("the merge", total)).advance
        stamps = dict.fromkeys(stamp for plan, _ in plans for stamp in plan.files)
        watched = stack.enter_context(watching(Watched(stamps)))
        watched.check()
        folders: list[Output] = []
        for plan, final in plans:
            folder = open_output(
                plan,
                final,
                identity=identity(plan, options),
                fresh=chosen.fresh,
                overwrite=chosen.overwrite,
                all_named=bool(folders) and folders[0].all_named,
            )
            stack.callback(folder.close)
            folders.append(folder)
        unfinished = [folder.unfinished for folder in folders]
        check = None
        if chosen.load_check:
            from outliermerge.output.load_check import LoadCheck

            check = stack.enter_context(LoadCheck.of_plans([plan for plan, _ in plans]))
        for folder, checksums in zip(folders, read_back or [{}] * len(folders), strict=True):
            folder.forget_unfit(
                allow_non_finite=options.allow_non_finite,
                threads=options.threads,
                read_back=checksums,
            )
        _forget_incomplete(plans, folders, options)
        targets = []
        for (plan, _), folder in zip(plans, folders, strict=True):
            left = [job for job in plan.jobs if job.name not in folder.done]
            left = [] if folder.is_finished else left
            targets.append(
                Target(
                    plan, folder.ordered(left), folder.writer, if_unchanged(watched, folder.record)
                )
            )
            on_progress(plan.work_bytes - part_work_bytes(plan, left))
        working = time.monotonic()

        def on_block(num_bytes: int) -> None:
            on_progress(num_bytes)
            if check is not None:
                check.raise_if_bad(unfinished)

        try:
            one = folders[0].final
            if isinstance(one, Path):
                chosen.executor(targets, options, on_progress=on_block, folder=one.parent)
            else:  # an output at a time goes up, so that memory and disk are bounded
                for target, folder in zip(targets, folders, strict=True):
                    chosen.executor([target], options, on_progress=on_block, folder=None)
                    folder.wait()
        except OutlierMergeError as error:
            for folder in folders if isinstance(error, OtherBytesError) else ():
                folder.forget_all()
            watched.check()  # a change explains what went wrong
            raise
        work_seconds, disk_after = time.monotonic() - working, disk_bytes_read()
        verdicts: list[Verdict | None] = [None] * len(plans)
        if check is not None:
            chosen.on_waiting()
            verdicts = [*check.verdicts()]
            check.raise_if_bad(unfinished)
        if any(plan.conversion for plan, _ in plans):
            chosen.on_waiting()
        manifests = [
            read_manifest(output_here(folder.final, MANIFEST_NAME))
            if folder.is_finished
            else write_sidecars(plan, folder, options, load_check=verdict)
            for (plan, _), folder, verdict in zip(plans, folders, verdicts, strict=True)
        ]
        watched.check()
        syncing = time.monotonic()
        left_behind = name_all(folders, manifests)
        sync_seconds = time.monotonic() - syncing
    known = None not in (disk_before, disk_after)
    return [
        RunResult(
            output=final,
            manifest=Manifest(manifest),
            num_resumed=len(plan.jobs) - len(target.jobs),
            input_bytes=sum(job.num_read_bytes for job in target.jobs),
            written_bytes=sum(job.num_written_bytes for job in target.jobs),
            disk_bytes=(disk_after or 0) - (disk_before or 0) if known else None,
            work_seconds=work_seconds,
            sync_seconds=sync_seconds,
            seconds=time.monotonic() - started,
            load_check=verdict,
            left_behind=foreign,
        )
        for (plan, final), target, manifest, verdict, foreign in zip(
            plans, targets, manifests, verdicts, left_behind, strict=True
        )
    ]


def if_unchanged(
    watched: Watched, record: Callable[[Job, JobResult], None]
) -> Callable[[Job, JobResult], None]:
    """Return what records a tensor if it was made of what was planned with."""

    def record_checked(job: Job, result: JobResult) -> None:
        watched.check({meta.path for meta in job.stored})
        record(job, result)

    return record_checked


def _forget_incomplete(
    plans: Sequence[tuple[Plan, Final]], folders: Sequence[Output], options: Options
) -> None:
    """Do tensors again that were made in one reading for several outputs, and reached only some.

    So the manifests say the same of what was read, wherever a sweep was killed. To a store each
    is made for itself.
    """
    if len(plans) == 1 or isinstance(plans[0][1], str):
        return
    pairs = zip(plans, folders, strict=True)
    targets = [Target(plan, plan.jobs, folder.writer, folder.record) for (plan, _), folder in pairs]
    held = {id(target): folder for target, folder in zip(targets, folders, strict=True)}
    for group in groups_of(targets, options):
        members = [(held[id(target)], job.name) for target, job in group]
        if any(name not in folder.done for folder, name in members):
            for folder, name in members:
                if not folder.is_finished:
                    folder.done.pop(name, None)


def name_all(
    folders: Sequence[Output], manifests: Sequence[Mapping[str, Any]]
) -> list[Path | None]:
    """Give outputs their names, when all of them are on the disk; no journal goes before that.

    So the same command goes on after a kill between two names.

    Returns:
        Where files are left that somebody else put into an old output; None as a rule.
    """
    left = [(f, m) for f, m in zip(folders, manifests, strict=True) if not f.is_finished]
    for folder, manifest in left:
        folder.finish([*manifest["files"], MANIFEST_NAME])
    foreign = [None if folder.is_finished else folder.name() for folder in folders]
    if len(folders) > 1:  # the first one's journal is the last that goes
        folders[0].say_all_named()
    for folder in reversed(folders):
        folder.forget()
    return foreign


def refuse_taken(planned: Plan, output: Final, *, overwrite: bool) -> None:
    """Refuse an output that is taken, before work that goes before the run.

    Raises:
        OutlierMergeError: something is there, and no killed run can go on to it.
    """
    if isinstance(output, str):
        check_begun_or_free(planned, output, overwrite=overwrite)
        return
    final = real_output(output)
    if not os.path.lexists(journal_path(final)):
        check_apart(planned, final)
        check_free(planned, final, overwrite=overwrite)


def output_path(planned: Plan, output: Final | None) -> Final:
    """Return the folder or file that an argument or else the spec names, or a folder's address.

    Raises:
        SpecError: neither names one.
        ArgumentError: a file is named where a folder is written, or the reverse, or nothing can be
            written there.
    """
    named = output or planned.spec.document.output
    if named is None:
        file = planned.spec.source.file
        raise SpecError(f"{file}: no output: give {argument('output')} or `output:` in the spec")
    try:
        path = as_final(named)
    except ArgumentError:
        raise
    except OutlierMergeError as error:
        raise ArgumentError(f"output: {error}") from error
    if isinstance(path, str):
        if planned.is_one_file:
            raise ArgumentError(
                f"output {path}: {planned.inputs[0].reference} is a single file and so is the "
                "output: only folders are written to a store. Write a file, and copy it there"
            )
        if path.endswith(".safetensors"):
            raise ArgumentError(f"output {path}: a folder is written: leave out .safetensors")
        return path
    if planned.is_one_file and path.suffix != ".safetensors":
        raise ArgumentError(
            f"output {path}: {planned.inputs[0].reference} is a single file and so is the output: "
            f"name it {path.name}.safetensors"
        )
    if not planned.is_one_file and path.suffix == ".safetensors":
        raise ArgumentError(f"output {path}: a folder is written: leave out .safetensors")
    if planned.is_one_file and len(planned.shards) > 1:
        raise ArgumentError(f"{argument('shard_size')}: the output is a single file: leave it out")
    return path
