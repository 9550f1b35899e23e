"""An output while it is being written: OUT.partial, its files, and its finished tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.errors import ArgumentError, OutlierMergeError, argument, listing
from outliermerge.execution.jobs import JobResult
from outliermerge.output.journal import BusyError, Journal, parts, process, remove_parts
from outliermerge.output.names import free_disk_bytes, journal_path, partial_folder
from outliermerge.output.naming import begin_naming, finish_naming, is_named, old_inodes
from outliermerge.output.ownership import check_apart, check_free
from outliermerge.output.writer import OutputWriter, Progress, line_of, write_beside
from outliermerge.planning.plan import Job, Plan
from outliermerge.storage.failures import naming
from outliermerge.storage.system import (
    files_in,
    folders_in,
    inode,
    remove_files,
    reserved_bytes,
    sync_folder,
)


class OutputFolder:
    """OUT.partial and its journal, locked by the one process that makes the output.

    After each finished tensor a line is written to the journal, so that a killed run can be
    resumed. On opening, the tensors in the journal are read back. Those with another checksum
    (their bytes were lost in a power cut) are done again. Tensors that parts have written
    (`parts.py`) are taken over in the same way.

    Attributes:
        final: the path that the output gets at the end.
        path: the folder in which it is written, OUT.partial.
        unfinished: the same, for messages.
        writer: writes its weight files.
        is_finished: an earlier run had written everything, and the renaming is complete now.
    """

    def __init__(
        self,
        plan: Plan,
        final: Path,
        *,
        identity: Mapping[str, Any],
        marks: Mapping[str, list[int]],
        fresh: bool = False,
        overwrite: bool = False,
        all_named: bool = False,
        part: str = "",
    ):
        """Lock the output and open its files.

        Args:
            final: the path that `real_output` returned.
            identity: the facts of a merge that must be equal for a killed run to be continued.
            marks: identify the inputs' files; a resume compares them, and rereads inputs that
                differ.
            fresh: start over, without the tensors of an earlier run.
            overwrite: replace an existing output, at the end.
            all_named: an earlier run gave all outputs of this command their final names.
            part: the part of the plan for which the output is opened. Other processes may be
                writing other parts, so their tensors and files are left alone.

        Raises:
            BusyError: another process holds it.
            OutlierMergeError: something else has that name, or an unfinished output of another
                merge is there.
        """
        check_apart(plan, final)
        self.final, self.path = final, partial_folder(final)
        self.unfinished = self.path
        self.writer = OutputWriter(self.path)
        self._plan, self._part = plan, part
        self._shard_names = [shard.file for shard in plan.shards]
        self._is_begun = False
        self._marks = dict(marks)
        self._progress = Progress(plan, marks)
        self._journal = Journal(final)
        try:
            self.is_finished = self._finish_earlier(identity, fresh=fresh)
            if self.is_finished:
                self._take_over()
                self._journal.add({"process": process(part)})
                return
            if all_named and final.exists() and self._journal.identity is None:
                self.is_finished = True
                return
            check_free(plan, final, overwrite=overwrite)
            self._old = old_inodes(final, is_one_file=plan.is_one_file)
            self._begin(identity, fresh=fresh)
            self.writer.open(plan, make=True)
        except BaseException:
            self.close()
            raise

    def _finish_earlier(self, identity: Mapping[str, Any], *, fresh: bool) -> bool:
        """Finish a renaming that a kill interrupted; tell whether it was this same merge."""
        if not is_named(self._journal):
            return False
        finish_naming(self._journal)
        if fresh or differing(self._journal.identity, identity):
            self._journal.clear()
            return False
        return True

    def _begin(self, identity: Mapping[str, Any], *, fresh: bool) -> None:
        """Check and take over the folder of an earlier run, or make it."""
        ours = {*(self._journal.last("shards") or ()), *self._shard_names, *self._beside}
        number = inode(self.path)
        if number is not None:
            is_folder = self.path.is_dir() and not self.path.is_symlink()
            found = set(files_in(self.path)) if is_folder else {"what is no folder"}
            if number in self._journal.all("folder"):
                self._refuse_foreign(found - ours)
            else:
                known = f" A broken merge goes on only with its {journal_path(self.final).name}."
                self._refuse_foreign(found, known)
        self._check_room()
        changed = differing(self._journal.identity, identity)
        if self._part and not changed:  # other parts may be at work, with their own lines
            self._progress.take_over(self._journal.lines)
        elif fresh or not self._take_over():
            if number is not None:
                remove_files(self.path, ours)
            remove_parts(self.final)
            self._journal.begin(identity, shards=self._shard_names)
        elif changed:
            raise begun_by_another(self.final, changed, in_parts=bool(self._part))
        self._journal.add({"process": process(self._part), "marks": self._marks})
        self._make()

    def _take_over(self) -> bool:
        """Take over the finished tensors in the journals; tell whether there are any.

        Raises:
            BusyError: another process is writing a part of it.
        """
        found = self._progress.take_over(self._journal.lines)
        for part in parts(self.final):
            journal = Journal(self.final, part)
            try:
                if journal.identity == self._journal.identity:
                    found |= self._progress.take_over(journal.lines)
            finally:
                journal.close()
        return found

    @property
    def _beside(self) -> set[str]:
        """The names of the files beside the weights that this run or an earlier run wrote."""
        return {name for names in self._journal.all("files") for name in names}

    def _refuse_foreign(self, names: Iterable[str], more: str = "") -> None:
        if names:
            raise OutlierMergeError(
                f"{self.path}: the merge is written there, but it holds something else:\n"
                f"{listing(sorted(names))}\nMove it away or choose another output.{more}"
            )

    def _make(self) -> None:
        with naming(self.path, "made"):
            self.path.mkdir(exist_ok=True)
        self._journal.add({"folder": inode(self.path)})
        self._journal.sync()  # then even after a power cut the files are known as ours
        self._is_begun = True

    def _check_room(self) -> None:
        """Raise an error if the disk is too small, before any file is made."""
        needed, more = sum(shard.num_bytes for shard in self._plan.shards), ""
        there = {*self._shard_names}
        if (conversion := self._plan.conversion) is not None:
            more = f" ({needed:,} for safetensors and {conversion.num_bytes:,} for GGUF of them)"
            needed += conversion.num_bytes
            there |= self._beside  # a killed conversion's file is removed
        written = sum(
            reserved_bytes(status)
            for name in there
            if (file := self.path / name).exists() and (status := file.stat())
        )
        free = free_disk_bytes(self.path) + written
        if needed > free:
            raise OutlierMergeError(
                f"{self.final}: the disk has {free:,} bytes free, the output needs {needed:,}"
                + more
            )

    def forget_all(self) -> None:
        """Forget all tensors: they may have been made from two states of an input."""
        self.done.clear()

    def forget_unfit(
        self,
        *,
        allow_non_finite: bool,
        threads: int = 1,
        read_back: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Forget the tensors of an earlier run that this run may not take over.

        Args:
            read_back: by tensor the checksums of the bytes that other machines have read back.
        """

        def checksum(tensor: OutputTensor) -> str:
            return read_back.get(tensor.name) or self.writer.checksum(tensor)

        if not self.is_finished:
            self._progress.forget_unfit(
                checksum, allow_non_finite=allow_non_finite, threads=threads
            )

    def share(self, num_parts: int) -> None:
        """Note into how many parts the output is divided.

        Raises:
            ArgumentError: it was begun in another number of parts.
        """
        known = self._journal.last("num_parts")
        if known is None or (known != num_parts and has_no_tensor(self.final, self._journal)):
            self._journal.add({"num_parts": num_parts})
        elif known != num_parts:
            raise ArgumentError(
                f"{argument('part')}: {self.final} was begun in {known} parts, not in {num_parts}. "
                f"Go on with parts of {known}. {to_start_over(self.final)}"
            )

    @property
    def done(self) -> dict[str, JobResult]:
        """Results by tensor."""
        return self._progress.done

    def ordered(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """Return jobs that are to be done in the order in which they are to be done."""
        return jobs

    def record(self, job: Job, result: JobResult) -> None:
        """Note in the journal that a tensor is written; one thread at a time may call this."""
        self.done[job.name] = result
        self._journal.add(line_of(job, result))

    def wait(self) -> None:
        """Do nothing: what is written is there."""

    def write_files(self, contents: Mapping[str, bytes | Path]) -> None:
        """Write or copy files beside the weights, replacing those of an earlier run."""
        self._journal.add({"files": sorted(contents)})
        write_beside(self.path, contents)

    def expect(self, names: Iterable[str], kept: Iterable[str]) -> None:
        """Note files that another program makes, and remove those of earlier runs but `kept`."""
        remove_files(self.path, self._beside - {*kept})
        self._journal.add({"files": sorted(names)})

    def finish(self, files: Iterable[str]) -> None:
        """Sync everything to disk, and note in the journal that renaming begins.

        Args:
            files: the names of the files besides the shards. Other files that an earlier run wrote
                are removed.

        Raises:
            OutlierMergeError: somebody has put something into the folder, or a call failed.
        """
        wanted = {*files, *self._shard_names}
        remove_files(self.path, self._beside - wanted)
        self._refuse_foreign(set(files_in(self.path)) - wanted)
        self.writer.sync()
        with naming(self.path, "brought to the disk"):
            for each in folders_in(self.path):
                sync_folder(each)
            self.writer.close()  # some systems cannot rename a folder with an open file
        shard = self._plan.shards[0].file if self._plan.is_one_file else None
        if self._plan.conversion is not None:
            self._journal.add({"not kept": self._shard_names})
        begin_naming(self._journal, shard=shard, old=self._old)

    @property
    def all_named(self) -> bool:
        """Tell whether an earlier run gave all outputs of this command their final names."""
        return self.is_finished and bool(self._journal.last("all named"))

    def say_all_named(self) -> None:
        """Note in the journal that all outputs of this command have their final names."""
        self._journal.add({"all named": True})
        self._journal.sync()

    def name(self) -> Path | None:
        """Rename the output to its final name; return where foreign files are kept, if any."""
        return finish_naming(self._journal)

    def forget(self) -> None:
        """Remove the journals of an output that has its final name, and release the lock."""
        remove_parts(self.final)
        self._journal.remove()
        self._is_begun = False
        self.close()

    def close(self) -> None:
        """Close all files and release the lock; remove an output without a finished tensor."""
        self.writer.close()
        if self._is_begun and not self.done and not self._part:
            with suppress(OSError, OutlierMergeError):  # the next run takes up the files that stay
                remove_files(self.path, {*self._shard_names, *self._beside})
                remove_parts(self.final)
                self._journal.clear()
        self._is_begun = False
        self._journal.close()


def finish_interrupted(final: Path) -> None:
    """Finish an output's renaming that a kill interrupted, if no run is working on it."""
    if not os.path.lexists(journal_path(final)):
        return
    with suppress(OutlierMergeError):  # a run holds it, or it is not ours
        journal = Journal(final)
        try:
            if is_named(journal):
                finish_naming(journal)
                remove_parts(final)
                journal.remove()
        finally:
            journal.close()


def has_no_tensor(final: Path, journal: Journal) -> bool:
    """Tell whether an output has no finished tensor, and none of its parts is being written.

    Args:
        journal: that of the whole output.
    """
    if journal.all("tensor"):
        return False
    for part in parts(final):
        try:
            own = Journal(final, part)
        except BusyError:
            return False
        try:
            if own.all("tensor"):
                return False
        finally:
            own.close()
    return True


def differing(found: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two runs, in the user's words."""
    now = json.loads(json.dumps(now))
    return [key for key in now if (found or {}).get(key) != now[key]]


def begun_by_another(final: Path, changed: list[str], *, in_parts: bool) -> OutlierMergeError:
    """Return the error for an unfinished output of another merge."""
    over = f"Use {argument('fresh', True)} to start over."
    return OutlierMergeError(
        f"{partial_folder(final)}: was begun by another merge: {', '.join(changed)} changed since. "
        + (to_start_over(final) if in_parts else over)
    )


def to_start_over(final: Path) -> str:
    """Return a sentence on how an output that parts have begun is started over."""
    return (
        f"To start over, stop all parts and remove {partial_folder(final)} and "
        f"{journal_path(final)}*."
    )
