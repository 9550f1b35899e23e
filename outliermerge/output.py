"""The output folder while it is being written: OUT.partial, its journal, and its last step."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.checksum import PIECE_ELEMENTS, piece_digests, tensor_checksum
from outliermerge.checkpoint.folder import MANIFEST_NAME
from outliermerge.checkpoint.layout import OutputTensor, Shard
from outliermerge.checkpoint.reader import read_exactly, write_exactly
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.job_runner import JobResult
from outliermerge.jobs import Job, Plan
from outliermerge.machine import open_direct

_JOURNAL_NAME = "journal.jsonl"


def partial_folder(final: Path) -> Path:
    """Return where an output is written before it has its name."""
    return final.with_name(final.name + ".partial")


def manifest_path(final: Path) -> Path:
    """Return where the manifest of an output is: in its folder, or beside its file."""
    if final.suffix == ".safetensors" and not final.is_dir():
        return final.with_name(f"{final.name}.{MANIFEST_NAME}")
    return final / MANIFEST_NAME


def shard_path(final: Path, file: str) -> Path:
    """Return where a shard of an output is: in its folder, or the output itself."""
    return final / file if final.is_dir() else final


def check_target(plan: Plan, final: Path, *, overwrite: bool) -> None:
    """Refuse a target that would lose or damage something.

    Raises:
        OutlierMergeError: it exists and may not be overwritten, or a model is in it.
    """
    partial, replaced = partial_folder(final), _replaced_folder(final)
    for entry in plan.inputs:
        files = {stamp.path.resolve() for stamp in entry.checkpoint.weight_files}
        roots = {entry.checkpoint.root.resolve(), entry.home.resolve()}
        if entry.home != entry.checkpoint.root:  # an adapter, over the files of other folders
            roots |= {path.parent for path in files}
        for folder in (final, partial, replaced):
            resolved = folder.resolve()
            for root in roots:
                if root == resolved or resolved in root.parents or root in resolved.parents:
                    raise OutlierMergeError(
                        f"{folder}: is, holds or is inside the model {shown(entry.reference)}: "
                        "choose another output"
                    )
    if partial.is_dir() and any(partial.iterdir()) and not _is_ours(partial):
        raise OutlierMergeError(
            f"{partial}: the merge would be written there, but it holds something else. "
            "Move it away or choose another output."
        )
    if overwrite and replaced.exists() and not _is_ours(replaced):
        raise OutlierMergeError(
            f"{replaced}: the old output would be kept there for a moment, but it holds "
            "something else. Move it away or choose another output."
        )
    if not final.exists():
        return
    if plan.is_one_file and final.is_dir():
        raise OutlierMergeError(f"{final}: is a folder, and a file is to be written")
    if not overwrite:
        raise OutlierMergeError(
            f"{final}: exists already. Use --overwrite to replace it when the merge is done, "
            "or choose another --output."
        )
    if not manifest_path(final).is_file():
        raise OutlierMergeError(
            f"{final}: --overwrite replaces only outputs of outliermerge, and this has no "
            f"{manifest_path(final).name}. Move it away."
        )


def _replaced_folder(final: Path) -> Path:
    return final.with_name(final.name + ".replaced")


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_JOURNAL_NAME, MANIFEST_NAME))


class OutputFolder:
    """OUT.partial with its planned files, open for writing by one process.

    A journal line follows each finished tensor, so that a killed run can go on. On opening, the
    tensors in the journal are read back and those whose checksum differs (lost by a power cut)
    are done again.
    """

    def __init__(self, plan: Plan, final: Path, *, identity: Mapping[str, Any], fresh: bool):
        self.final, self.path = final, partial_folder(final)
        self._plan = plan
        self._tensors = {job.name: job.output for job in plan.jobs}
        self._files: dict[str, int] = {}
        self._direct: dict[str, int] = {}
        self.done: dict[str, JobResult] = {}
        self._make()
        self._journal = self._open_journal(fresh, dict(identity))
        try:
            for shard in plan.shards:
                self._files[shard.file] = self._allocate(shard)
                self._direct[shard.file] = open_direct(self.path / shard.file)
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutlierMergeError(f"{self.path}: cannot be made: {error.strerror}") from error
        needed = sum(shard.num_bytes for shard in self._plan.shards)
        written = sum(
            status.st_blocks * 512
            for shard in self._plan.shards
            if (file := self.path / shard.file).exists() and (status := file.stat())
        )
        free = free_disk_bytes(self.path) + written
        if needed > free:
            if not any(self.path.iterdir()):
                self.path.rmdir()
            raise OutlierMergeError(
                f"{self.final}: the disk has {free:,} bytes free, the output needs {needed:,}"
            )

    def _open_journal(self, fresh: bool, identity: dict[str, Any]) -> int:
        journal = os.open(self.path / _JOURNAL_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(journal)
            raise OutlierMergeError(f"{self.path}: another run is writing it") from error
        try:
            lines, num_whole_bytes = self._read_journal(journal)
            if fresh or len(lines) < 2:  # nothing is done yet: nothing is lost by starting over
                self._remove_all_but({_JOURNAL_NAME})
                os.ftruncate(journal, 0)
                _append(journal, identity)
            else:
                _check_identity(self.path, lines[0], identity)
                os.ftruncate(journal, num_whole_bytes)
                for line in lines[1:]:
                    name = line.pop("tensor")
                    line["read"] = {int(number): sum_ for number, sum_ in line["read"].items()}
                    self.done[name] = JobResult(**line)
        except BaseException:
            os.close(journal)
            raise
        return journal

    @staticmethod
    def _read_journal(journal: int) -> tuple[list[dict[str, Any]], int]:
        """Return the whole lines and their bytes; a kill can cut the last line short."""
        lines: list[dict[str, Any]] = []
        num_whole_bytes = 0
        with os.fdopen(os.dup(journal), "rb") as file:
            for raw in file:
                try:
                    line = json.loads(raw) if raw.endswith(b"\n") else None
                except ValueError:
                    line = None
                if not isinstance(line, dict):
                    break
                lines.append(line)
                num_whole_bytes += len(raw)
        return lines, num_whole_bytes

    def _remove_all_but(self, names: set[str]) -> None:
        for path in sorted(self.path.rglob("*"), reverse=True):
            name = path.relative_to(self.path).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in names:
                path.unlink()

    def _allocate(self, shard: Shard) -> int:
        path = self.path / shard.file
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, shard.num_bytes)
            os.ftruncate(descriptor, shard.num_bytes)
            write_exactly(descriptor, 0, memoryview(shard.header))
        except OSError as error:
            os.close(descriptor)
            raise OutlierMergeError(
                f"{path}: no room for {shard.num_bytes:,} bytes: {error.strerror}"
            ) from error
        return descriptor

    def forget_unfit(self, *, allow_non_finite: bool) -> None:
        """Forget the tensors of an earlier run that this one may not take over.

        Their bytes are not what the journal says, or have values that only that run allowed.
        """
        for name, result in list(self.done.items()):
            tensor = self._tensors.get(name)
            if (
                tensor is None
                or (result.non_finite and not allow_non_finite)
                or checksum_in_file(self._files[tensor.file], tensor) != result.checksum
            ):
                del self.done[name]

    def place(self, tensor: OutputTensor, start: int) -> tuple[int, int, int]:
        """Return a tensor's file, an element's position in it, and the file for direct writes."""
        position = tensor.offset + start * tensor.dtype.num_bytes
        return self._files[tensor.file], position, self._direct[tensor.file]

    def write(self, tensor: OutputTensor, start: int, data: memoryview) -> None:
        """Write elements from `start` on."""
        try:
            write_exactly(*self.place(tensor, start)[:2], data)
        except OSError as error:
            raise OutlierMergeError(
                f"{self.path / tensor.file}: cannot be written: {error.strerror}"
            ) from error

    def read(self, tensor: OutputTensor, start: int, out: memoryview) -> None:
        """Read back elements from `start` on."""
        read_exactly(*self.place(tensor, start)[:2], out)

    def record(self, job: Job, result: JobResult) -> None:
        """Note in the journal that a tensor is written; for one thread at a time."""
        self.done[job.name] = result
        _append(self._journal, {"tensor": job.name} | asdict(result))

    def finish(self, files: Iterable[str], *, overwrite: bool) -> None:
        """Sync everything and give the folder its name.

        Args:
            files: what the folder holds besides the shards; anything else is of an earlier run
                and is removed.
            overwrite: replace an output that is there.
        """
        self._remove_all_but({_JOURNAL_NAME, *files, *self._files})
        for descriptor in self._files.values():
            os.fsync(descriptor)
        for path in self.path.rglob("*"):
            if path.is_file() and path.relative_to(self.path).as_posix() not in self._files:
                _sync(path)
        if self._plan.is_one_file:
            self._finish_file()
            return
        replaced = _replaced_folder(self.final)
        if overwrite and self.final.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            self.final.rename(replaced)
        (self.path / _JOURNAL_NAME).unlink()
        self.path.rename(self.final)
        _sync(self.final)
        _sync(self.final.absolute().parent)
        if overwrite and replaced.exists():
            shutil.rmtree(replaced)

    def _finish_file(self) -> None:
        """Give the one shard its name, and the manifest one beside it."""
        (shard,) = self._plan.shards
        (self.path / MANIFEST_NAME).replace(manifest_path(self.final))
        (self.path / shard.file).replace(self.final)
        shutil.rmtree(self.path)
        _sync(self.final.absolute().parent)

    def close(self) -> None:
        """Close every file and give up the lock."""
        for descriptor in (*self._files.values(), *self._direct.values()):
            if descriptor >= 0:
                os.close(descriptor)
        self._files.clear()
        self._direct.clear()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


def checksum_in_file(descriptor: int, tensor: OutputTensor) -> str:
    """Return the checksum of a tensor's bytes in an open file.

    Raises:
        EOFError: the file ends before the tensor does.
    """
    elements = 16 * PIECE_ELEMENTS
    buffer = memoryview(bytearray(elements * tensor.dtype.num_bytes))
    num_bytes = tensor.num_bytes
    digests = []
    for start in range(0, num_bytes, len(buffer)):
        part = buffer[: min(len(buffer), num_bytes - start)]
        read_exactly(descriptor, tensor.offset + start, part)
        digests.append(piece_digests(part, tensor.dtype.num_bytes))
    return tensor_checksum(digests)


def _append(journal: int, entry: Mapping[str, Any]) -> None:
    line = json.dumps(entry, allow_nan=True).encode() + b"\n"
    os.write(journal, line)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_identity(path: Path, found: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    differing = [key for key in now if found.get(key) != now[key]]
    if differing:
        raise OutlierMergeError(
            f"{path}: was begun by another merge: {', '.join(differing)} changed since. "
            "Use --fresh to start over."
        )


def free_disk_bytes(folder: Path) -> int:
    """Return the free space of the disk that a folder, perhaps not yet made, is on."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
