"""An output while it is being written: OUT.partial, its files, and what is done of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.reader import write_exactly
from outliermerge.errors import OutlierMergeError, argument, listing
from outliermerge.execution.jobs import JobResult
from outliermerge.output.journal import Journal, parts, process, remove_parts
from outliermerge.output.names import free_disk_bytes, journal_path, partial_folder
from outliermerge.output.naming import begin_naming, finish_naming, is_named, old_inodes
from outliermerge.output.ownership import check_apart, check_free
from outliermerge.output.writer import OutputWriter, Progress, line_of
from outliermerge.planning.plan import Job, Plan
from outliermerge.storage.failures import failure, naming
from outliermerge.storage.stamps import open_file
from outliermerge.storage.system import (
    files_in,
    inode,
    make_inside,
    remove_files,
    reserved_bytes,
    sync_folder,
)


class OutputFolder:
    """OUT.partial and its journal, held by the one process that makes and names the output.

    A journal line follows each finished tensor, so that a killed run can go on. On opening, the
    tensors in the journal are read back and those whose checksum differs (lost by a power cut)
    are done again. What parts have written (`parts.py`) is taken over in the same way.

    Attributes:
        final: the name that the output gets.
        path: where it is written.
        writer: its weight files.
        is_finished: an earlier run had done all but the last step, which is done now.
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
            final: as `real_output` gives it.
            identity: what must be the same for a killed run to be continued.
            marks: what tells the inputs' files, though a resume may find others.
            fresh: start over.
            overwrite: replace an output that is there, at the end.
            all_named: all outputs of this command got their names in an earlier run.
            part: of the plan that is to be written into the output, which others may be doing
                at the same time: then nothing is taken away from them.

        Raises:
            BusyError: another process holds it.
            OutlierMergeError: something else is there, or what was begun is another merge.
        """
        check_apart(plan.inputs, final)
        self.final, self.path = final, partial_folder(final)
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
        """Finish what a kill left between two names; tell whether it was this very merge."""
        if not is_named(self._journal):
            return False
        finish_naming(self._journal)
        if fresh or _differing(self._journal.identity, identity):
            self._journal.clear()
            return False
        return True

    def _begin(self, identity: Mapping[str, Any], *, fresh: bool) -> None:
        """Check and take over what is there of an earlier run, or make the folder."""
        ours = {*(self._journal.last("shards") or ()), *self._shard_names, *self._beside}
        number = inode(self.path)
        if number is not None:
            is_folder = self.path.is_dir() and not self.path.is_symlink()
            found = set(files_in(self.path)) if is_folder else {"what is no folder"}
            foreign = found - ours if number in self._journal.all("folder") else found
            self._refuse_foreign(foreign)
        self._check_room()
        differing = _differing(self._journal.identity, identity)
        if self._part and not differing:  # other parts may be at work, and have their own
            self._progress.take_over(self._journal)
        elif fresh or not self._take_over():
            if number is not None:
                remove_files(self.path, ours)
            remove_parts(self.final)
            self._journal.begin(identity, shards=self._shard_names, marks=self._marks)
        elif differing:
            raise OutlierMergeError(
                f"{self.path}: was begun by another merge: {', '.join(differing)} changed since. "
                f"Use {argument('fresh', True)} to start over."
            )
        self._journal.add({"process": process(self._part)})
        self._make()

    def _take_over(self) -> bool:
        """Go on with what journals say is done; tell whether they say anything.

        Raises:
            BusyError: another process is writing a part of it.
        """
        found = self._progress.take_over(self._journal)
        for part in parts(self.final):
            journal = Journal(self.final, part)
            try:
                if journal.identity == self._journal.identity:
                    found |= self._progress.take_over(journal)
            finally:
                journal.close()
        return found

    @property
    def _beside(self) -> set[str]:
        """Names of the files beside the weights that this run or an earlier one wrote."""
        return {name for names in self._journal.all("files") for name in names}

    def _refuse_foreign(self, names: Iterable[str]) -> None:
        if names:
            raise OutlierMergeError(
                f"{self.path}: the merge is written there, but it holds something else:\n"
                f"{listing(sorted(names))}\nMove it away or choose another output."
            )

    def _make(self) -> None:
        with naming(self.path, "made"):
            self.path.mkdir(exist_ok=True)
        self._journal.add({"folder": inode(self.path)})
        self._journal.sync()  # what is in the folder is known as ours after a power cut too
        self._is_begun = True

    def _check_room(self) -> None:
        """Refuse a disk that is too small, before a file is made."""
        needed = sum(shard.num_bytes for shard in self._plan.shards)
        written = sum(
            reserved_bytes(status)
            for shard in self._plan.shards
            if (file := self.path / shard.file).exists() and (status := file.stat())
        )
        free = free_disk_bytes(self.path) + written
        if needed > free:
            raise OutlierMergeError(
                f"{self.final}: the disk has {free:,} bytes free, the output needs {needed:,}"
            )

    def forget_all(self) -> None:
        """Take no tensor over into a later run, as it may be made of two states of an input."""
        self.done.clear()

    def forget_unfit(self, *, allow_non_finite: bool) -> None:
        """Forget the tensors of an earlier run that this one may not take over."""
        if not self.is_finished:
            self._progress.forget_unfit(self.writer, allow_non_finite=allow_non_finite)

    @property
    def done(self) -> dict[str, JobResult]:
        """Results by tensor."""
        return self._progress.done

    def record(self, job: Job, result: JobResult) -> None:
        """Note in the journal that a tensor is written; for one thread at a time."""
        self.done[job.name] = result
        self._journal.add(line_of(job, result))

    def write_files(self, contents: Mapping[str, bytes | Path]) -> None:
        """Write files beside the weights, or copy them; those of an earlier run are replaced."""
        self._journal.add({"files": sorted(contents)})
        for name, data in contents.items():
            with naming(self.path / name, "written"):
                descriptor = make_inside(self.path, name)
                try:
                    position = 0
                    for part in _parts(data):
                        write_exactly(descriptor, position, memoryview(part))
                        position += len(part)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def finish(self, files: Iterable[str]) -> None:
        """Have everything reach the disk, and say in the journal that names change now.

        Args:
            files: what the folder holds besides the shards; what else an earlier run wrote is
                removed.

        Raises:
            OutlierMergeError: somebody has put something into the folder, or a call failed.
        """
        wanted = {*files, *self._shard_names}
        remove_files(self.path, self._beside - wanted)
        self._refuse_foreign(set(files_in(self.path)) - wanted)
        self.writer.sync()
        with naming(self.path, "brought to the disk"):
            for root, _, _ in os.walk(self.path):
                sync_folder(Path(root))
            self.writer.close()  # some systems rename no folder with an open file
        shard = self._plan.shards[0].file if self._plan.is_one_file else None
        begin_naming(self._journal, shard=shard, old=self._old)

    @property
    def all_named(self) -> bool:
        """Tell whether an earlier run gave all outputs of this command their names."""
        return self.is_finished and bool(self._journal.last("all named"))

    def say_all_named(self) -> None:
        """Say in the journal that no output of this command is left without its name."""
        self._journal.add({"all named": True})
        self._journal.sync()

    def name(self) -> Path | None:
        """Give the output its name; return where foreign files of the old one are left, if any."""
        return finish_naming(self._journal)

    def forget(self) -> None:
        """Remove the journals of an output that has its name, and give up the lock."""
        remove_parts(self.final)
        self._journal.remove()
        self._is_begun = False
        self.close()

    def close(self) -> None:
        """Close every file and give up the lock; an output with no finished tensor is removed."""
        self.writer.close()
        if self._is_begun and not self.done and not self._part:
            with suppress(OSError, OutlierMergeError):  # what stays is taken up by the next run
                remove_files(self.path, {*self._shard_names, *self._beside})
                remove_parts(self.final)
                self._journal.clear()
        self._is_begun = False
        self._journal.close()


def finish_interrupted(final: Path) -> None:
    """Finish what a kill left between two names of an output, where no run is about it."""
    if not os.path.lexists(journal_path(final)):
        return
    with suppress(OutlierMergeError):  # a run has it, or it is none of ours
        journal = Journal(final)
        try:
            if is_named(journal):
                finish_naming(journal)
                remove_parts(final)
                journal.remove()
        finally:
            journal.close()


def _parts(data: bytes | Path) -> Iterator[bytes]:
    """Yield the bytes of a file to be copied, some at a time, or of what is in memory."""
    if isinstance(data, bytes):
        yield data
        return
    try:
        with open_file(data) as file:
            left = os.fstat(file.fileno()).st_size
            while part := file.read(1 << 20):
                left -= len(part)
                yield part
        if left > 0:
            raise EOFError("the file ends early")
    except (OSError, EOFError) as error:
        raise failure(data, "read", error) from error


def _differing(found: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Return what two runs differ in, by what a user calls it."""
    now = json.loads(json.dumps(now))
    return [key for key in now if (found or {}).get(key) != now[key]]
