"""The files of an output, and the record of which tensors are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from outliermerge.checkpoint.checksum import checksum_in_file, piece_digests
from outliermerge.checkpoint.layout import OutputTensor, Shard
from outliermerge.checkpoint.reader import read_exactly, write_exactly
from outliermerge.errors import OutlierMergeError
from outliermerge.execution.jobs import JobResult
from outliermerge.output.resumed import made_of_others
from outliermerge.planning.plan import Job, Plan
from outliermerge.storage.failures import failure, naming
from outliermerge.storage.stamps import open_file
from outliermerge.storage.system import (
    check_own,
    make_inside,
    open_direct,
    open_inside,
    reserve,
)

WrittenSpan: TypeAlias = tuple[OutputTensor, tuple[int, int]]
"""A tensor of an output, and the first element and the end of a span of it."""


class OutputWriter:
    """The planned files of an output, open for writing; merges write into it (a `Sink`).

    Several processes may have the same files open, each to write other tensors. The plan says where
    every tensor's bytes go.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder; `open` opens the files.

        Args:
            folder: OUT.partial, where the output is before it has its final name.
        """
        self._folder = folder
        self._files: dict[str, int] = {}
        self._direct: dict[str, int] = {}

    def open(self, plan: Plan, *, make: bool = False) -> None:
        """Open all files.

        Args:
            make: make missing files and reserve their disk space; otherwise all files must exist.

        Raises:
            OutlierMergeError: a file is missing, differs from the plan, or may not be ours.
        """
        inputs = _inodes(plan)
        try:
            for shard in plan.shards:
                self._files[shard.file] = self._open(shard, inputs, make=make)
                self._direct[shard.file] = self._open_direct(shard.file)
        except BaseException:
            self.close()
            raise

    def open_again(self, files: Iterable[str]) -> None:
        """Open files that are made, to read them back.

        Raises:
            OutlierMergeError: one cannot be opened.
        """
        for file in files:
            with naming(self._folder / file, "read back"):
                self._files[file] = open_inside(self._folder, file)

    def _open(self, shard: Shard, inputs: set[tuple[int, int]], *, make: bool) -> int:
        path = self._folder / shard.file
        try:
            try:
                descriptor = open_inside(self._folder, shard.file)
            except FileNotFoundError:
                if not make:
                    raise
                descriptor = make_inside(self._folder, shard.file)
        except OSError as error:
            what = f"cannot be opened: {error.strerror}"
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                what = "is a link, or in one: what is written through it may not be ours. Remove it"
            raise OutlierMergeError(f"{path}: {what}") from error
        try:
            status = check_own(descriptor, path)
            if (status.st_dev, status.st_ino) in inputs:
                raise OutlierMergeError(f"{path}: is a file of a model that is merged. Remove it.")
            if not _is_made(descriptor, shard):  # else other parts may be writing into it
                if not make:
                    self._refuse(descriptor, shard)
                reserve(descriptor, shard.num_bytes)
                write_exactly(descriptor, 0, memoryview(shard.header))
        except (OSError, EOFError) as error:
            os.close(descriptor)
            raise failure(path, "made", error, needed_bytes=shard.num_bytes) from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _refuse(self, descriptor: int, shard: Shard) -> None:
        raise OutlierMergeError(
            f"{self._folder / shard.file}: is not as planned: it has "
            f"{os.fstat(descriptor).st_size:,} bytes, expected {shard.num_bytes:,}, with the "
            "header of this merge"
        )

    def _open_direct(self, file: str) -> int:
        """Open a shard a second time for direct writes; -1 if they would not be faster."""
        direct = open_direct(self._folder / file)
        if direct >= 0 and not os.path.samestat(os.fstat(direct), os.fstat(self._files[file])):
            os.close(direct)
            direct = -1
        return direct

    def place(self, tensor: OutputTensor, start: int) -> tuple[int, int, int]:
        """Return a tensor's file, an element's position in it, and the file for direct writes."""
        position = tensor.offset + start * tensor.dtype.num_bytes
        return self._files[tensor.file], position, self._direct[tensor.file]

    def write(self, tensor: OutputTensor, start: int, data: memoryview) -> None:
        """Write elements from `start` on."""
        with naming(self._folder / tensor.file, "written", tensor=tensor.name):
            write_exactly(*self.place(tensor, start)[:2], data)

    def wrote(self, tensor: OutputTensor, span: tuple[int, int]) -> None:
        """Note nothing: what is written is there."""

    def stop(self) -> None:
        """Do nothing: no thread waits here."""

    def digests(self, tensor: OutputTensor, start: int, out: memoryview) -> bytes:
        """Return the digests of written pieces from `start` on; `out` has the size of them all."""
        self._read(tensor, start, out)
        return piece_digests(out, tensor.dtype.num_bytes)

    def read_back(self, spans: Sequence[WrittenSpan]) -> list[bytes]:
        """Return the bytes of spans of written tensors."""
        found = []
        for tensor, (start, stop) in spans:
            out = bytearray((stop - start) * tensor.dtype.num_bytes)
            self._read(tensor, start, memoryview(out))
            found.append(bytes(out))
        return found

    def _read(self, tensor: OutputTensor, start: int, out: memoryview) -> None:
        with naming(self._folder / tensor.file, "read back", tensor=tensor.name):
            read_exactly(*self.place(tensor, start)[:2], out)

    def checksum(self, tensor: OutputTensor) -> str:
        """Return the checksum of a tensor's written bytes."""
        with naming(self._folder / tensor.file, "read back", tensor=tensor.name):
            return checksum_in_file(partial(read_exactly, self._files[tensor.file]), tensor)

    def sync(self) -> None:
        """Sync everything that is written to disk."""
        with naming(self._folder, "brought to the disk"):
            for descriptor in self._files.values():
                os.fsync(descriptor)

    def close(self) -> None:
        """Close every file."""
        for files in (self._files, self._direct):
            while files:
                _, descriptor = files.popitem()
                if descriptor >= 0:
                    os.close(descriptor)


class Progress:
    """The record of which tensors of an output are written, from its journals.

    Attributes:
        done: results by tensor.
    """

    def __init__(self, plan: Plan, marks: Mapping[str, list[int]]) -> None:
        self.done: dict[str, JobResult] = {}
        self._of_others: set[str] = set()
        self._jobs = {job.name: job for job in plan.jobs}
        self._of_merges = {  # of stages, or quantised
            job.name
            for job in plan.jobs
            if job.of is not None or any(plan.inputs[n].made_of for n, _ in job.sources)
        }
        self._marks = dict(marks)

    def take_over(self, lines: Iterable[Mapping[str, Any]]) -> bool:
        """Take over the tensors that a journal's lines list as done; tell whether any do."""
        found, marks = False, None
        for line in lines:
            marks = line.get("marks", marks)  # of the process that wrote the next lines
            if "tensor" not in line:
                continue
            found = True
            result = {key: value for key, value in line.items() if key != "tensor"}
            result["read"] = {int(number): sum_ for number, sum_ in line["read"].items()}
            self.done[line["tensor"]] = JobResult(**result)
            is_same = marks == self._marks
            (self._of_others.discard if is_same else self._of_others.add)(line["tensor"])
        return found

    def forget_unfit(
        self,
        checksum: Callable[[OutputTensor], str] | None,
        *,
        allow_non_finite: bool,
        threads: int = 1,
    ) -> None:
        """Forget the tensors of an earlier run that this run may not take over.

        Their bytes differ from the journal's checksum, or were made from other bytes than the
        inputs have now, or contain infinite or NaN values that only that run allowed.

        Args:
            checksum: reads a tensor back; None where it is known that the bytes are as written.
            threads: read so many tensors at the same time.
        """

        def is_fit(name: str) -> bool:
            job, result = self._jobs.get(name), self.done[name]
            return (
                job is not None
                and not (result.non_finite and not allow_non_finite)
                and (checksum is None or checksum(job.output) == result.checksum)
            )

        names = list(self.done)
        with ThreadPoolExecutor(threads) as pool:
            for name, is_kept in zip(names, pool.map(is_fit, names), strict=True):
                if not is_kept:
                    del self.done[name]
        seen = {name: self.done[name] for name in self._of_others if name in self.done}
        # What merges would give now is not computed only to compare it.
        of_merges = self._of_merges & seen.keys()
        known = {name: result for name, result in seen.items() if name not in of_merges}
        for name in (*of_merges, *made_of_others(self._jobs, known)):
            del self.done[name]


def line_of(job: Job, result: JobResult) -> dict[str, object]:
    """Return the journal entry of a tensor that is written."""
    return {"tensor": job.name} | asdict(result)


def _is_made(descriptor: int, shard: Shard) -> bool:
    """Tell whether a file has the planned size and header."""
    if os.fstat(descriptor).st_size != shard.num_bytes:
        return False
    header = bytearray(len(shard.header))
    read_exactly(descriptor, 0, memoryview(header))
    return header == shard.header


def _inodes(plan: Plan) -> set[tuple[int, int]]:
    """Return the devices and inode numbers of the files that the models are read from."""
    paths = [s.path for entry in plan.inputs for s in entry.checkpoint.weight_files]
    found = set()
    for path in (*paths, *plan.auxiliary_files):
        with suppress(OSError):  # a later read reports what is wrong
            status = path.stat()
            found.add((status.st_dev, status.st_ino))
    return found


def write_beside(folder: Path, contents: Mapping[str, bytes | Path]) -> None:
    """Write or copy files into a folder, and sync them to disk."""
    for name, data in contents.items():
        with naming(folder / name, "written"):
            descriptor = make_inside(folder, name)
            try:
                position = 0
                for part in _parts(data):
                    write_exactly(descriptor, position, memoryview(part))
                    position += len(part)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _parts(data: bytes | Path) -> Iterator[bytes]:
    """Yield the bytes of a file to be copied, block by block, or the given bytes."""
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
