"""An output in a store while it is being written, and what makes it complete.

A store has no names that can be exchanged, and no locks. So weights are written where they stay,
each file when it is whole, and the manifest, which makes a folder an output, comes last. Two
processes that make the same output write the same bytes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.checkpoint.folders.remote import RECORDS
from outliermerge.checkpoint.layout import Shard
from outliermerge.errors import ArgumentError, OutlierMergeError, argument, listing
from outliermerge.execution.jobs import JobResult
from outliermerge.output.bucket_records import Begun, Records, States, has_work
from outliermerge.output.bucket_writer import BucketWriter
from outliermerge.output.folder import differing
from outliermerge.output.journal import process, told
from outliermerge.output.ownership import check_apart_in_store, check_free_in_store
from outliermerge.output.resumed import compared_in
from outliermerge.output.writer import Progress, line_of, write_beside
from outliermerge.planning.plan import Job, Plan
from outliermerge.storage.bucket import Bucket
from outliermerge.storage.ranges import State

_NUM_LOOKS, _PAUSE_SECONDS = 5, 0.5  # at what another process is just writing


class BucketFolder:
    """An output in a store, as `OutputFolder` is one on a disk.

    What is written is taken over by whole weight files: an unfinished file is nowhere to be seen.

    Attributes:
        final: its address.
        path: a folder of this machine with its small files, and its weight files' headers.
        writer: writes its weight files.
        is_finished: an earlier run had written everything.
    """

    def __init__(
        self,
        plan: Plan,
        final: str,
        *,
        identity: Mapping[str, Any],
        marks: Mapping[str, list[int]],
        fresh: bool = False,
        overwrite: bool = False,
        all_named: bool = False,
        part: str = "",
    ) -> None:
        """Begin the output, or take over what an earlier run has written of it.

        Args:
            identity: the facts of a merge that must be equal for a killed run to be continued.
            marks: identify the inputs' files.
            fresh: start over, without the tensors of an earlier run.
            overwrite: replace an existing output. It is one no more when the first file is written.
            all_named: an earlier run has completed all outputs of this command.
            part: the part of the plan for which it is opened.

        Raises:
            OutlierMergeError: something else is there, or an unfinished output of another merge.
        """
        self.final, self.unfinished, self._plan = final, final, plan
        self._bucket = Bucket(final)
        check_apart_in_store(plan, final, self._bucket)
        self._identity, self._marks, self._part = identity, dict(marks), part
        self._records = Records(self._bucket, identity)
        self._progress = Progress(plan, marks)
        self._shards = {shard.file: shard for shard in plan.shards}
        self._states: dict[str, State] = {}  # of the weight files that are there
        self._is_ours = False  # the record of the run was made here
        self.writer = BucketWriter(
            self._bucket, on_begin=self._begin, on_end=self._check_ours, on_shard=self._add
        )
        self._temporary = tempfile.TemporaryDirectory(prefix="outliermerge-")
        self.path = Path(self._temporary.name)
        try:
            self._begun, self.is_finished = self._open(
                fresh=fresh, overwrite=overwrite, all_named=all_named
            )
            for shard in plan.shards:
                place = self.path / shard.file
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(shard.header)
        except BaseException:
            self.close()
            raise

    def _open(self, *, fresh: bool, overwrite: bool, all_named: bool) -> tuple[Begun, bool]:
        """Return what has begun the output, this run as a rule, and whether it is finished."""
        own = Begun(self._identity, tuple(self._shards), (), None, process(self._part))
        for _ in range(_NUM_LOOKS):
            there = self._bucket.states()
            begun = self._records.begun()
            if begun is None and all_named and MANIFEST_NAME in there:
                return own, True
            if begun is not None and begun.is_finished(there, MANIFEST_NAME):
                if not fresh and not differing(begun.identity, self._identity):
                    self._take_over(there)
                    return begun, True
                self._records.remove(there)
                begun = None
            is_left = begun is not None and not self._part and begun.has_ended
            is_left = is_left and not has_work(there)  # so that nothing is lost
            if begun is not None and not fresh and not is_left:
                if changed := differing(begun.identity, self._identity):
                    raise begun_in_store_by_another(
                        self.final, changed, told(begun.process), in_parts=bool(self._part)
                    )
                if MANIFEST_NAME in there:  # of an old output, which is still whole
                    check_free_in_store(self._bucket, there, overwrite=overwrite)
                self._take_over(there)
                return begun, False
            old = self._replaceable(there, begun, overwrite=overwrite)
            self._records.remove_shards(there)
            before = begun.old_manifest if begun is not None else there.get(MANIFEST_NAME)
            own = replace(own, old=tuple(sorted(old)), old_manifest=before)
            if self._records.write(own, new=begun is None):
                self._is_ours = True
                return own, False
        raise OutlierMergeError(f"{self.final}: other runs begin it again and again. Stop them.")

    def _replaceable(self, there: States, begun: Begun | None, *, overwrite: bool) -> set[str]:
        """Return what is there and will be replaced or removed."""
        if begun is not None and MANIFEST_NAME not in there:
            self._refuse_foreign(there, begun)
            return {*begun.shards, *begun.old, *self._records.files()} & there.keys()
        return check_free_in_store(self._bucket, there, overwrite=overwrite)

    def _refuse_foreign(self, there: States, begun: Begun) -> None:
        ours = {*begun.shards, *begun.old, *self._shards, *self._records.files(), MANIFEST_NAME}
        foreign = {name for name in there if not name.startswith(RECORDS)} - ours
        if foreign:
            raise OutlierMergeError(
                f"{self.final}: the merge is written there, but it holds something else:\n"
                f"{listing(sorted(foreign))}\nMove it away or choose another output."
            )

    def _take_over(self, there: States) -> None:
        """Take over the weight files that are there as their records say."""
        for file, lines in self._records.shards(there).items():
            names = {job.name for job in self._plan.jobs if job.output.file == file}
            if file in self._shards and names <= {line.get("tensor") for line in lines}:
                self._progress.take_over(lines)
                self._states[file] = there[file]

    @property
    def done(self) -> dict[str, JobResult]:
        """Results by tensor."""
        return self._progress.done

    def forget_all(self) -> None:
        """Forget all tensors: they may have been made from two states of an input."""
        self.done.clear()
        self._records.remove_shards(self._bucket.states())

    def forget_unfit(
        self,
        *,
        allow_non_finite: bool,
        threads: int = 1,
        read_back: Mapping[str, str] | None = None,
    ) -> None:
        """Forget the weight files of an earlier run that this run may not take over.

        Args:
            read_back: is for outputs on disks; here the states of the files tell their bytes.
        """
        if self.is_finished:
            return
        self._progress.forget_unfit(None, allow_non_finite=allow_non_finite, threads=threads)
        lost = {job.output.file for job in self._plan.jobs if job.name not in self.done}
        for job in self._plan.jobs:
            if job.output.file in lost:
                self.done.pop(job.name, None)

    def ordered(self, jobs: Sequence[Job]) -> list[Job]:
        """Return jobs that are to be done in the order in which they go up."""
        return self.writer.plan_jobs(self._plan, {job.name for job in jobs})

    def share(self, num_parts: int) -> None:
        """Note into how many parts the output is divided.

        Raises:
            ArgumentError: it was begun in another number of parts.
        """
        known = self._records.share(num_parts)
        if known != num_parts:
            raise ArgumentError(
                f"{argument('part')}: {self.final} was begun in {known} parts, not in {num_parts}. "
                f"Go on with parts of {known}. {to_start_over_in_store(self.final)}"
            )

    @property
    def compared(self) -> set[int]:
        """The numbers of the plan's checks that this part has done with the inputs as they are."""
        lines = self._records.compared(self._bucket.states()).get(self._part, ())
        return compared_in(lines, self._marks)

    def add_compared(self, numbers: Iterable[int]) -> None:
        """Note which of the plan's checks this part has done."""
        self._records.add_compared(self._part, self._marks, numbers)

    def record(self, job: Job, result: JobResult) -> None:
        """Note that a tensor is written; one thread at a time may call this."""
        self.done[job.name] = result
        self.writer.note(job, result)

    def wait(self) -> None:
        """Return when all that was written is in the store.

        Raises:
            OutlierMergeError: it cannot be written.
        """
        self.writer.wait()

    def _begin(self) -> None:
        """Take away the manifest of an old output, before anything of it is replaced."""
        if self._begun.old_manifest is not None:
            there = self._bucket.states()
            if there.get(MANIFEST_NAME) == self._begun.old_manifest:
                self._bucket.remove([MANIFEST_NAME])

    def _check_ours(self) -> None:
        """Raise OutlierMergeError if another process has started over or finished meanwhile."""
        begun = self._records.begun()
        if begun is None:  # what was noted since is no part of what is finished
            self._records.remove_late(self._bucket.states())
        if begun is None or differing(begun.identity, self._identity):
            raise OutlierMergeError(
                f"{self.final}: another process has finished it or started it over meanwhile, or "
                f"somebody has removed {RECORDS} from it. `outliermerge verify` tells if it is "
                "whole."
            )

    def _add(self, shard: Shard, state: State, results: list[tuple[Job, JobResult]]) -> None:
        """Note that a weight file is there."""
        self._check_ours()
        lines = [line_of(job, result) for job, result in results]
        self._records.add_shard(shard.file, state, self._marks, lines)
        self._states[shard.file] = state

    def write_files(self, contents: Mapping[str, bytes | Path]) -> None:
        """Write or copy files beside the weights; `finish` brings them to the store."""
        write_beside(self.path, contents)

    def finish(self, files: Iterable[str]) -> None:
        """Write the files beside the weights, the manifest last, and remove what is left of old.

        Args:
            files: the names of the files besides the shards, with the manifest.

        Raises:
            OutlierMergeError: somebody has changed the folder, or the store does not take it.
        """
        self.writer.wait()
        self._check_ours()
        there = self._bucket.states()
        self._refuse_foreign(there, self._begun)
        self._check_shards()
        others = sorted({*files} - {MANIFEST_NAME})
        ours = {*self._begun.old, *self._records.files()}
        self._records.add_files(sorted({*others, *self._records.files()}))
        for name in others:
            self._bucket.put(name, self.path / name)
        ours -= {*others, *self._shards, MANIFEST_NAME}
        self._bucket.remove(sorted(ours & there.keys()))
        self._check_ours()
        self._bucket.put(MANIFEST_NAME, self.path / MANIFEST_NAME)

    def _check_shards(self) -> None:
        """Raise OutlierMergeError unless all weight files are as this merge has written them."""
        for look in range(_NUM_LOOKS):
            there = self._bucket.states()
            found = {file: there.get(file) for file in self._shards}
            changed = [file for file in found if found[file] != self._states.get(file)]
            if not changed:
                return
            # Another process with the same merge writes the same bytes, and then its record.
            self._states |= {f: there[f] for f in self._records.shards(there) if f in changed}
            if look:
                time.sleep(_PAUSE_SECONDS)
        raise OutlierMergeError(
            f"{self.final}: weight files are not as they were written, somebody has replaced or "
            f"removed them:\n{listing(changed)}\nThe same command writes them again."
        )

    def name(self) -> None:
        """Do nothing: with its manifest an output is complete."""

    @property
    def all_named(self) -> bool:
        """Tell whether an earlier run has completed all outputs of this command."""
        return self.is_finished and self._begun.all_named

    def say_all_named(self) -> None:
        """Note that all outputs of this command are complete."""
        self._records.write(replace(self._begun, all_named=True))

    def forget(self) -> None:
        """Remove the records of an output that is complete."""
        self._records.remove(self._bucket.states())
        self._is_ours = False
        self.close()

    def close(self) -> None:
        """Stop writing; give up an output of which nothing is finished."""
        self.writer.close()
        if self._is_ours and not self._part and not self._states:
            with suppress(OutlierMergeError):
                self._give_up()
        self._is_ours = False
        self._temporary.cleanup()

    def _give_up(self) -> None:
        """Remove the record of the run, or let it say that nobody goes on with the run.

        It stays where only the record tells that files there are ours.
        """
        there, begun = self._bucket.states(), self._begun
        if has_work(there):  # of another process with the same merge
            return
        ours = {*begun.shards, *begun.old, *self._records.files()} & there.keys()
        if ours and MANIFEST_NAME not in there:
            self._records.write(replace(begun, process={}))
        else:
            self._records.remove(there)


def begun_in_store_by_another(
    final: str, changed: list[str], holder: str, *, in_parts: bool
) -> OutlierMergeError:
    """Return the error for an unfinished output of another merge.

    Args:
        holder: a phrase on the process that has begun it.
    """
    over = f"Use {argument('fresh', True)} to start over, when nothing else writes there."
    return OutlierMergeError(
        f"{final}: was begun by another merge{holder}: {', '.join(changed)} changed since. To go "
        "on, use the spec and flags that it was begun with. "
        + (to_start_over_in_store(final) if in_parts else over)
    )


def to_start_over_in_store(final: str) -> str:
    """Return a sentence on how an output that parts have begun is started over."""
    return f"To start over, stop all parts and remove all that is in {final}/."
