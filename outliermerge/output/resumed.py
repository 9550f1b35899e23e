"""Which tensors a run may take over from an earlier run whose inputs may have changed since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.checksum import source_checksum
from outliermerge.checkpoint.reader import Reader
from outliermerge.execution.jobs import JobResult
from outliermerge.execution.passes import needs_of
from outliermerge.planning.plan import Job, Plan
from outliermerge.storage.machine import cache_folder
from outliermerge.storage.stamps import FileStamp
from outliermerge.storage.stand_ins import elsewhere, stand_in

_NAMED_BY_CONTENTS = ("stages", "gguf")  # folders of the cache


def marks_of(plan: Plan) -> dict[str, list[int]]:
    """Return the marks of the files that a plan reads."""
    return marks_of_files(plan.files)


def marks_of_files(files: Iterable[tuple[Path, FileStamp | None]]) -> dict[str, list[int]]:
    """Return for each file the numbers that show whether it is unchanged, as JSON values.

    A model that was copied or fetched again has other numbers, even with the same bytes and times.
    The device is not among them: machines that share a disk number it differently. Nor are files
    in our cache, which may be made anew and are other ones on other machines: their paths tell
    their contents, and the versions of the objects that they stand for.
    """
    return {
        str(path): [stamp.inode, stamp.ctime_ns]
        for path, stamp in files
        if stamp is not None and not _is_told_by_path(path)
    }


def _is_told_by_path(path: Path) -> bool:
    if elsewhere(path) is None:
        return any(path.is_relative_to(cache_folder(name)) for name in _NAMED_BY_CONTENTS)
    found = stand_in(path)
    return found is None or bool(found.version)


def compared_in(lines: Iterable[Mapping[str, Any]], marks: Mapping[str, list[int]]) -> set[int]:
    """Return the numbers of the plan's checks that the lines of a journal say were passed.

    Args:
        marks: of the inputs' files; what was compared when these had others does not count.
    """
    found, is_same = set[int](), False
    for line in lines:
        if "marks" in line:  # of the process that wrote the next lines
            is_same = line["marks"] == marks
        if is_same:
            found.update(line.get("equal", ()))
    return found


def made_of_others(jobs: Mapping[str, Job], done: Mapping[str, JobResult]) -> list[str]:
    """Return the tensors that were made from other bytes than the inputs hold now.

    Raises:
        OutlierMergeError: an input cannot be read.
    """
    found = []
    with Reader() as reader:
        for name, result in done.items():
            if not _is_of(jobs[name], result, reader):
                found.append(name)
            reader.release(jobs[name].sources)
    return found


def _is_of(job: Job, result: JobResult, reader: Reader) -> bool:
    """Tell whether sources have the checksums in a result; unread sources were equal.

    Nothing tells it where other tensors take part, as no checksums of these are recorded.
    """
    of_others = job.auxiliary or (job.action == "merge" and needs_of(job.task, "model"))
    if of_others or not result.read:
        return False
    first = next(iter(result.read.values()))
    return all(
        source_checksum(source, reader) == result.read.get(number, first)
        for number, source in job.sources
    )
