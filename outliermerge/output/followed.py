"""The progress of parts that other processes write, by their journals."""

from __future__ import annotations

import os
from pathlib import Path

from outliermerge.output.journal import entry_of
from outliermerge.output.names import journal_path
from outliermerge.planning.plan import Plan


class Followed:
    """Follows what the journals say is written, as the parts' processes add lines to them."""

    def __init__(self, plan: Plan, final: Path, num_parts: int) -> None:
        self.num_parts = num_parts
        self._sizes = {job.name: plan.num_work_bytes(job) for job in plan.jobs}
        names = {0: "", **{n: f"{n}-of-{num_parts}" for n in range(1, num_parts + 1)}}
        self._paths = {number: journal_path(final, name) for number, name in names.items()}
        self._read = dict.fromkeys(names, 0)
        self._seen: set[str] = set()
        self._grown: set[int] = set()

    def advance(self) -> int:
        """Return the bytes of work that were done since the last call."""
        done = 0
        for number, path in self._paths.items():
            for line in self._lines(number, path):
                name = (entry_of(line) or {}).get("tensor")
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
