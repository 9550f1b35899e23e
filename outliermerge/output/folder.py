"""An output while it is being written: OUT.partial, its files, and what is done of it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.checksum import checksum_in_file
from outliermerge.checkpoint.layout import OutputTensor, Shard
from outliermerge.checkpoint.reader import read_exactly, write_exactly
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.execution.jobs import JobResult
from outliermerge.output.journal import Journal, process
from outliermerge.output.names import free_disk_bytes, journal_path, partial_folder
from outliermerge.output.naming import begin_naming, finish_naming, is_named, old_inodes
from outliermerge.output.ownership import check_apart, check_free
from outliermerge.planning.plan import Job, Plan
from outliermerge.storage.failures import failure, naming
from outliermerge.storage.stamps import open_file
from outliermerge.storage.system import (
    check_own,
    files_in,
    inode,
    make_inside,
    open_direct,
    open_inside,
    remove_files,
    reserve,
    reserved_bytes,
    sync_folder,
)


class OutputFolder:
    """OUT.partial with its planned files, open for writing by one process.

    A journal line follows each finished tensor, so that a killed run can go on. On opening, the
    tensors in the journal are read back and those whose checksum differs (lost by a power cut)
    are done again.

    Attributes:
        final: the name that the output gets.
        path: where it is written.
        is_finished: an earlier run had done all but the last step, which is done now.
        done: results by tensor.
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
    ):
        """Lock the output and open its files.

        Args:
            final: as `real_output` gives it.
            identity: what must be the same for a killed run to be continued.
            marks: what tells the inputs' files, though a resume may find others.
            fresh: start over.
            overwrite: replace an output that is there, at the end.
            all_named: all outputs of this command got their names in an earlier run.

        Raises:
            OutlierMergeError: something else is there, another run writes it, or what was begun
                is another merge.
        """
        check_apart(plan.inputs, final)
        self.final, self.path = final, partial_folder(final)
        self._plan = plan
        self._shard_names = [shard.file for shard in plan.shards]
        self._tensors = {job.name: job.output for job in plan.jobs}
        self._is_begun = False
        self._marks = dict(marks)
        self._files: dict[str, int] = {}
        self._direct: dict[str, int] = {}
        self.done: dict[str, JobResult] = {}
        self._journal = Journal(final)
        try:
            self.is_finished = self._finish_earlier(identity, fresh=fresh)
            if self.is_finished:
                self._take_over()
                return
            if all_named and final.exists() and self._journal.identity is None:
                self.is_finished = True
                return
            check_free(plan, final, overwrite=overwrite)
            self._old = old_inodes(final, is_one_file=plan.is_one_file)
            self._begin(identity, fresh=fresh)
            inputs = _inodes(plan)
            for shard in plan.shards:
                self._files[shard.file] = self._allocate(shard, inputs)
                self._direct[shard.file] = self._open_direct(shard.file)
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
        if fresh or not self._journal.all("tensor"):
            if number is not None:
                remove_files(self.path, ours)
            self._journal.begin(identity, shards=self._shard_names, marks=self._marks)
        elif differing := _differing(self._journal.identity, identity):
            raise OutlierMergeError(
                f"{self.path}: was begun by another merge: {', '.join(differing)} changed since. "
                "Use --fresh to start over."
            )
        self._take_over()
        self._make()

    def _take_over(self) -> None:
        """Go on with what the journal says is done."""
        for line in self._journal.lines:
            if "tensor" in line:
                result = {key: value for key, value in line.items() if key != "tensor"}
                result["read"] = {int(number): sum_ for number, sum_ in line["read"].items()}
                self.done[line["tensor"]] = JobResult(**result)
        self._journal.add({"process": process()})

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

    def _allocate(self, shard: Shard, inputs: set[tuple[int, int]]) -> int:
        path = self.path / shard.file
        try:
            try:
                descriptor = open_inside(self.path, shard.file)
            except FileNotFoundError:
                descriptor = make_inside(self.path, shard.file)
        except OSError as error:
            what = f"cannot be opened: {error.strerror}"
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                what = "is a link, or in one: what is written through it may not be ours. Remove it"
            raise OutlierMergeError(f"{path}: {what}") from error
        try:
            status = check_own(descriptor, path)
            if (status.st_dev, status.st_ino) in inputs:
                raise OutlierMergeError(f"{path}: is a file of a model that is merged. Remove it.")
            reserve(descriptor, shard.num_bytes)
            write_exactly(descriptor, 0, memoryview(shard.header))
        except OSError as error:
            os.close(descriptor)
            raise failure(path, "made", error, needed_bytes=shard.num_bytes) from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open_direct(self, file: str) -> int:
        """Open a shard once more for direct writes; -1 where that does not pay."""
        direct = open_direct(self.path / file)
        if direct >= 0 and not os.path.samestat(os.fstat(direct), os.fstat(self._files[file])):
            os.close(direct)
            direct = -1
        return direct

    @property
    def has_other_marks(self) -> bool:
        """Tell whether an earlier run read files of other marks than this one."""
        return not self.is_finished and self._journal.last("marks") != self._marks

    def forget_all(self) -> None:
        """Take no tensor over into a later run, as it may be made of two states of an input."""
        self.done.clear()

    def forget_unfit(self, *, allow_non_finite: bool) -> None:
        """Forget the tensors of an earlier run that this one may not take over.

        Their bytes are not what the journal says, or have values that only that run allowed.
        """
        for name, result in [] if self.is_finished else list(self.done.items()):
            tensor = self._tensors.get(name)
            if tensor is None or (result.non_finite and not allow_non_finite):
                del self.done[name]
                continue
            with naming(self.path / tensor.file, "read back", tensor=name):
                found = checksum_in_file(self._files[tensor.file], tensor)
            if found != result.checksum:
                del self.done[name]

    def place(self, tensor: OutputTensor, start: int) -> tuple[int, int, int]:
        """Return a tensor's file, an element's position in it, and the file for direct writes."""
        position = tensor.offset + start * tensor.dtype.num_bytes
        return self._files[tensor.file], position, self._direct[tensor.file]

    def write(self, tensor: OutputTensor, start: int, data: memoryview) -> None:
        """Write elements from `start` on."""
        with naming(self.path / tensor.file, "written", tensor=tensor.name):
            write_exactly(*self.place(tensor, start)[:2], data)

    def read(self, tensor: OutputTensor, start: int, out: memoryview) -> None:
        """Read back elements from `start` on."""
        with naming(self.path / tensor.file, "read back", tensor=tensor.name):
            read_exactly(*self.place(tensor, start)[:2], out)

    def record(self, job: Job, result: JobResult) -> None:
        """Note in the journal that a tensor is written; for one thread at a time."""
        self.done[job.name] = result
        self._journal.add({"tensor": job.name} | asdict(result))

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
        with naming(self.path, "brought to the disk"):
            for descriptor in self._files.values():
                os.fsync(descriptor)
            for root, _, _ in os.walk(self.path):
                sync_folder(Path(root))
            self._close_files()  # some systems rename no folder with an open file
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
        """Remove the journal of an output that has its name, and give up the lock."""
        self._journal.remove()
        self._is_begun = False
        self.close()

    def close(self) -> None:
        """Close every file and give up the lock; an output with no finished tensor is removed."""
        self._close_files()
        if self._is_begun and not self.done:
            with suppress(OSError):  # what stays is taken up by the next run
                remove_files(self.path, {*self._shard_names, *self._beside})
                self._journal.clear()
        self._is_begun = False
        self._journal.close()

    def _close_files(self) -> None:
        for files in (self._files, self._direct):
            while files:
                _, descriptor = files.popitem()
                if descriptor >= 0:
                    os.close(descriptor)


def finish_interrupted(final: Path) -> None:
    """Finish what a kill left between two names of an output, where no run is about it."""
    if not os.path.lexists(journal_path(final)):
        return
    with suppress(OutlierMergeError):  # a run has it, or it is none of ours
        journal = Journal(final)
        try:
            if is_named(journal):
                finish_naming(journal)
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


def _inodes(plan: Plan) -> set[tuple[int, int]]:
    """Return the devices and inode numbers of the files that the models are read from."""
    found = set()
    for entry in plan.inputs:
        for stamp in entry.checkpoint.weight_files:
            with suppress(OSError):  # reading it says what is wrong
                status = stamp.path.stat()
                found.add((status.st_dev, status.st_ino))
    return found
