"""Where trials are merged: one folder, in memory where it fits, that each trial changes.

A trial's tensors are what `run` writes, byte for byte: the same jobs, engines and writer make them.
Only tensors whose job differs from that of the trial before are made again.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import xxhash

from outliermerge.checkpoint.layout import make_indexes
from outliermerge.execution.computing import require_engines
from outliermerge.execution.jobs import JobResult
from outliermerge.execution.passes import needs_of
from outliermerge.execution.threads import Target, execute
from outliermerge.output.options import RunOptions
from outliermerge.output.run import if_unchanged
from outliermerge.output.writer import OutputWriter
from outliermerge.planning.plan import Job, Plan
from outliermerge.planning.sidecars import sidecar_contents
from outliermerge.storage.failures import naming
from outliermerge.storage.machine import free_memory_bytes
from outliermerge.storage.stamps import Watched, watching
from outliermerge.storage.system import lock

_MEMORY_DISK = Path("/dev/shm")
_PREFIX = "outliermerge-search-"
_LOCK_NAME = ".lock"
_SHARE = 0.5  # of the free memory that a model may take: the loaded model needs as much again


@dataclasses.dataclass(frozen=True)
class Merged:
    """A model that a trial is scored on.

    Attributes:
        path: the folder, or the file where models are single files.
        checksum: of the names and bytes of its tensors.
        num_made: how many tensors were made; the others were there from the trial before.
    """

    path: Path
    checksum: str
    num_made: int


class Workplace:
    """A folder that holds one merged model at a time; it is removed in the end.

    Args:
        disk: the folder to work in where memory does not do.
        options: how merges are carried out.
    """

    def __init__(self, disk: Path, options: RunOptions) -> None:
        self._disk, self._chosen = disk, options
        self._folder: Path | None = None
        self._lock: IO[str] | None = None
        self._plan: Plan | None = None
        self._writer: OutputWriter | None = None
        self._made: dict[str, tuple[Job, JobResult]] = {}
        self._checked: list[Job] = []

    def __enter__(self) -> Workplace:
        _remove_forgotten()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def is_in_memory(self, plan: Plan) -> bool:
        """Tell whether a plan's merge is held in memory, and nothing of it written to a disk."""
        return self._parent(plan) == _MEMORY_DISK

    def merge(self, plan: Plan) -> Merged:
        """Make the model of a plan in place of the one before.

        Raises:
            OutlierMergeError: it cannot be merged.
        """
        options = self._chosen.on_this_machine(plan)
        require_engines(plan, options)
        if self._plan is None or not _is_alike(plan, self._plan):
            self._leave()
            self._enter(plan)
        self._plan = plan
        assert self._folder is not None and self._writer is not None
        jobs = [job for job in plan.jobs if not self._is_made(job)]
        if any(needs_of(job.task, "model") for job in plan.jobs if job.action == "merge") and jobs:
            jobs = list(plan.jobs)  # a statistic of the whole model may have changed
        for job in jobs:
            self._made.pop(job.name, None)

        def record(job: Job, result: JobResult) -> None:
            self._made[job.name] = job, result

        checks = tuple(job for job in plan.checks if job not in self._checked)
        with watching(Watched(plan.files)) as watched:
            target = Target(
                dataclasses.replace(plan, checks=checks), jobs, self._writer,
                if_unchanged(watched, record),
            )  # fmt: skip
            execute([target], options, folder=self._folder)
            self._checked += checks
            self._write_others(plan)
            watched.check()
        lines = (f"{job.name} {self._made[job.name][1].checksum}\n" for job in plan.jobs)
        checksum = xxhash.xxh3_128_hexdigest("".join(sorted(lines)).encode())
        path = self._folder / plan.shards[0].file if plan.is_one_file else self._folder
        return Merged(path, checksum, len(jobs))

    def _is_made(self, job: Job) -> bool:
        made = self._made.get(job.name)
        return made is not None and made[0] == job

    def _write_others(self, plan: Plan) -> None:
        """Write the files beside the weights; those of the trial before are removed."""
        assert self._folder is not None
        contents = {} if plan.is_one_file else sidecar_contents(plan)
        indexes = make_indexes((job.output for job in plan.jobs), plan.components)
        contents |= {name: text.encode() for name, text in indexes.items()}
        weights = {shard.file for shard in plan.shards}
        for path in self._folder.rglob("*"):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and name not in weights | contents.keys() | {_LOCK_NAME}:
                path.unlink()
        for name, content in contents.items():
            path = self._folder / name
            with naming(path, "written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    shutil.copyfile(content, path)

    def _parent(self, plan: Plan) -> Path:
        if self._folder is not None:
            return self._folder.parent
        free = free_memory_bytes()
        if free is not None and _MEMORY_DISK.is_dir():
            with suppress(OSError):
                free = min(free, shutil.disk_usage(_MEMORY_DISK).free)
                if plan.num_written_bytes <= _SHARE * free:
                    return _MEMORY_DISK
        return self._disk

    def _enter(self, plan: Plan) -> None:
        parent = self._parent(plan)
        with naming(parent, "written"):
            parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
            self._lock = file = (made / _LOCK_NAME).open("w")
            lock(file.fileno())
            # Only now another process sees it as one that may be forgotten.
            self._folder = made.rename(parent / made.name.removeprefix("."))
        self._writer = OutputWriter(self._folder)
        self._writer.open(plan, make=True)

    def _leave(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = self._plan = self._writer = self._lock = None
        self._made = {}


def _is_alike(plan: Plan, before: Plan) -> bool:
    """Tell whether two plans write the same tensors to the same places of the same files."""
    return plan.shards == before.shards and [job.output for job in plan.jobs] == [
        job.output for job in before.jobs
    ]


def _remove_forgotten() -> None:
    """Remove from memory the folders of searches that were killed."""
    if not _MEMORY_DISK.is_dir():
        return
    for folder in _MEMORY_DISK.glob(f"{_PREFIX}*"):
        with suppress(OSError), (folder / _LOCK_NAME).open("r+") as file:
            if lock(file.fileno()):
                shutil.rmtree(folder, ignore_errors=True)
