"""Parts of an output in a store, each of whole weight files, and what of them is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.errors import OutlierMergeError, argument
from outliermerge.execution.threads import Target
from outliermerge.output.bucket_folder import BucketFolder, begun_in_store_by_another
from outliermerge.output.bucket_records import Records, has_work
from outliermerge.output.division import part_work_bytes
from outliermerge.output.folder import differing
from outliermerge.output.journal import told
from outliermerge.output.manifest import identity
from outliermerge.output.opened import open_output
from outliermerge.output.options import RunOptions
from outliermerge.output.resumed import compared_in, marks_of
from outliermerge.output.run import if_unchanged
from outliermerge.planning.plan import Job, Plan
from outliermerge.storage.bucket import Bucket
from outliermerge.storage.stamps import OtherBytesError, Watched, watching


def run_part_in_store(
    plan: Plan,
    final: str,
    jobs: Sequence[Job],
    checks: Mapping[int, Job],
    num_parts: int,
    name: str,
    chosen: RunOptions,
) -> int:
    """Write the jobs of a part, or the rest of them; return how many tensors were written.

    Args:
        checks: by number those of the plan's checks that the part does.
    """
    options, on_progress = chosen.on_this_machine(plan), chosen.on_progress
    with ExitStack() as stack:
        watched = stack.enter_context(watching(Watched(dict.fromkeys(plan.files))))
        watched.check()
        facts = identity(plan, options)
        folder = open_output(plan, final, identity=facts, overwrite=chosen.overwrite, part=name)
        assert isinstance(folder, BucketFolder)
        stack.callback(folder.close)
        if folder.is_finished:
            folder.forget()
            return 0
        folder.share(num_parts)
        folder.forget_unfit(allow_non_finite=options.allow_non_finite)
        left = [job for job in jobs if job.name not in folder.done]
        known = folder.compared
        to_compare = tuple(check for number, check in checks.items() if number not in known)
        on_progress(part_work_bytes(plan, jobs) - part_work_bytes(plan, left))
        record = if_unchanged(watched, folder.record)
        own = replace(plan, checks=to_compare)
        target = Target(own, folder.ordered(left), folder.writer, record)
        try:
            chosen.executor([target], options, on_progress=on_progress, folder=None)
        except OutlierMergeError as error:
            if isinstance(error, OtherBytesError):
                folder.forget_all()
            watched.check()  # a change explains what went wrong
            raise
        watched.check()
        if to_compare:
            folder.add_compared(checks)
        folder.writer.wait()
    return len(left)


def seen_in_store(final: str) -> tuple[bool, bool]:
    """Return whether parts of an output have begun or finished it, and whether it has a manifest.

    A record of a run that was killed before it noted its parts counts for nothing.
    """
    bucket = Bucket(final)
    there, begun = bucket.states(), Records(bucket, {}).begun()
    is_there = MANIFEST_NAME in there
    if begun is None:
        return False, is_there
    return begun.is_finished(there, MANIFEST_NAME) or has_work(there), is_there


def written_in_store(
    plan: Plan, final: str, facts: Mapping[str, Any]
) -> tuple[int, set[str], dict[str, set[int]]] | None:
    """Return how many parts an output has, and which tensors are written; None if all is done.

    The numbers of the plan's checks that are done come third, by part.

    Raises:
        OutlierMergeError: nothing of it is written, it was begun by another merge, or not in parts.
    """
    bucket = Bucket(final)
    records, there = Records(bucket, facts), bucket.states()
    begun = records.begun()
    if begun is None:
        raise OutlierMergeError(
            f"{final}: exists already, and no part of it is being written. It was joined before, "
            "or is another output; `outliermerge verify` checks it."
            if there
            else f"{final}: no part of it is being written. Run its parts first, each with "
            f"{argument('part', '1/N')} to {argument('part', 'N/N')}."
        )
    if changed := differing(begun.identity, facts):
        raise begun_in_store_by_another(final, changed, told(begun.process), in_parts=True)
    if begun.is_finished(there, MANIFEST_NAME):
        return None
    num_parts = records.num_parts()
    if num_parts is None:
        raise OutlierMergeError(
            f"{final}: was begun by a run that was not divided into parts. The same run goes on "
            "with it."
        )
    lines = [line for lines in records.shards(there).values() for line in lines]
    done = {line["tensor"] for line in lines if "tensor" in line}
    compared = records.compared(there).items()
    marks = marks_of(plan)
    return num_parts, done, {part: compared_in(own, marks) for part, own in compared}
