"""The progress of parts that other processes write, by their journals or records."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from outliermerge.errors import OutlierMergeError
from outliermerge.output.bucket_records import noted_files
from outliermerge.output.division import divided
from outliermerge.output.journal import entry_of
from outliermerge.output.names import Final, journal_path
from outliermerge.planning.plan import Plan
from outliermerge.storage.bucket import Bucket

_LOOK_SECONDS = 5.0  # between two listings of a folder in a store


class Followed:
    """Follows what the parts' processes note as written.

    Args:
        final: the path that `real_output` returned, or an address.
    """

    def __init__(self, plan: Plan, final: Final, num_parts: int) -> None:
        self.num_parts, self._final = num_parts, final
        self._sizes = {job.name: plan.num_work_bytes(job) for job in plan.jobs}
        self._seen: set[str] = set()
        self._grown: set[int] = set()
        self._bucket = Bucket(final) if isinstance(final, str) else None
        self._jobs = divided(plan, num_parts, whole_files=self._bucket is not None)
        self._read = dict.fromkeys(range(num_parts + 1), 0)
        self._next_look = 0.0

    def advance(self) -> int:
        """Return the bytes of work that were done since the last call."""
        done = 0
        for number, name in self._in_journals() if self._bucket is None else self._in_records():
            if name in self._sizes and name not in self._seen:
                self._seen.add(name)
                self._grown.add(number)
                done += self._sizes[name]
        return done

    def has_grown(self, number: int) -> bool:
        """Tell whether a part has written a tensor since this was asked last."""
        is_grown = number in self._grown
        self._grown.discard(number)
        return is_grown

    def _in_records(self) -> Iterator[tuple[int, str]]:
        """Yield the tensors of the weight files that are there, each with the number of its part.

        A store is asked now and then; if it does not answer, it is asked again later.
        """
        if self._bucket is None or time.monotonic() < self._next_look:
            return
        files = set[str]()
        with suppress(OutlierMergeError):
            files = noted_files(self._bucket.states())
        self._next_look = time.monotonic() + _LOOK_SECONDS
        for number, jobs in enumerate(self._jobs, 1):
            yield from ((number, job.name) for job in jobs if job.output.file in files)

    def _in_journals(self) -> Iterator[tuple[int, str]]:
        """Yield the tensors in lines of journals that are new, each with the number of its part."""
        assert isinstance(self._final, Path)
        for number in self._read:
            name = f"{number}-of-{self.num_parts}" if number else ""
            for line in self._lines(number, journal_path(self._final, name)):
                if (tensor := (entry_of(line) or {}).get("tensor")) is not None:
                    yield number, tensor

    def _lines(self, number: int, path: Path) -> list[bytes]:
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._read[number]:  # it was begun anew
                    self._read[number] = 0
                file.seek(self._read[number])
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # it is not there yet, or not any more
            return []
        self._read[number] += len(whole) + len(newline)
        return whole.split(b"\n")
