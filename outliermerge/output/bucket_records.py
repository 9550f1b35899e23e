"""The records of an unfinished output in a store: small objects in its folder `.outliermerge`.

`run.jsonl` says which merge has begun it, and is made only where there is none. For each shard that
is there, `shards/FILE.jsonl` has its state and the results of its tensors; `equal/PART.jsonl` says
which of the plan's checks a part has done. The lines are those of journals. All of them are removed
when the output is finished.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from outliermerge.checkpoint.folders.remote import RECORDS
from outliermerge.errors import OutlierMergeError
from outliermerge.output.journal import entry_line, entry_of
from outliermerge.storage.bucket import Bucket
from outliermerge.storage.machine import has_ended
from outliermerge.storage.ranges import State

_RUN, _PARTS, _FILES = (f"{RECORDS}{name}.jsonl" for name in ("run", "parts", "files"))
_SHARDS, _EQUAL, _END = f"{RECORDS}shards/", f"{RECORDS}equal/", ".jsonl"
_NUM_READS = 8

States = Mapping[str, State]
"""The objects of an output's folder, by name."""


@dataclass(frozen=True)
class Begun:
    """What the record of a run says.

    Attributes:
        identity: of the merge.
        shards: the names of its weight files.
        old: the names of what was there before, and is removed at the end.
        old_manifest: the state of the manifest that was there before.
        process: what is known of the process that began it; nothing if that has given it up.
        all_named: all outputs of its command are complete.
    """

    identity: Mapping[str, Any]
    shards: tuple[str, ...]
    old: tuple[str, ...]
    old_manifest: State | None
    process: Mapping[str, Any]
    all_named: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether the process that began it has surely ended."""
        is_here = self.process.get("host") == socket.gethostname()
        pid = self.process.get("pid")
        return not self.process or (is_here and isinstance(pid, int) and has_ended(pid))

    def is_finished(self, there: States, manifest: str) -> bool:
        """Tell whether its manifest is there, so that only the records are left to be removed."""
        return manifest in there and there[manifest] != self.old_manifest


class Records:
    """The records of an output, for one merge."""

    def __init__(self, bucket: Bucket, identity: Mapping[str, Any]) -> None:
        self._bucket, self._identity = bucket, json.loads(json.dumps(identity))
        facts = json.dumps(self._identity, sort_keys=True)
        self._begun = xxhash.xxh3_128_hexdigest(facts.encode())  # marks the records of shards

    def begun(self) -> Begun | None:
        """Return what has begun the output; None if nothing has.

        Raises:
            OutlierMergeError: the record is of another version.
        """
        content = self._bucket.get(_RUN)
        if content is None:
            return None
        lines = [entry for entry in map(entry_of, content.split(b"\n")) if entry is not None]
        try:
            first, rest = lines[0], lines[1]
            old = rest["old_manifest"]
            return Begun(
                first["identity"],
                tuple(rest["shards"]),
                tuple(rest["old"]),
                old and State(**old),
                dict(rest["process"]),
                bool(rest.get("all named")),
            )
        except (LookupError, TypeError, ValueError, AttributeError):
            raise OutlierMergeError(
                f"{self._bucket.address}/{_RUN}: is damaged, or of another version of "
                f"outliermerge. To start over, remove all that is in {self._bucket.address}/."
            ) from None

    def write(self, begun: Begun, *, new: bool = False) -> bool:
        """Note what has begun the output; False if it had to be new, and is not.

        Args:
            new: make no record where there is one.
        """
        rest = {
            "shards": begun.shards,
            "old": begun.old,
            "old_manifest": begun.old_manifest and asdict(begun.old_manifest),
            "process": begun.process,
            **({"all named": True} if begun.all_named else {}),
        }
        first = {"outliermerge journal": 2, "identity": begun.identity}
        return self._bucket.put(_RUN, entry_line(first) + entry_line(rest), new=new)

    def add_shard(
        self, file: str, state: State, marks: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]
    ) -> None:
        """Note that a shard is there.

        Args:
            marks: identify the inputs' files.
            lines: of its tensors.
        """
        first = {"begun": self._begun, "file": file, "state": asdict(state), "marks": dict(marks)}
        content = b"".join(map(entry_line, (first, *lines)))
        self._bucket.put(f"{_SHARDS}{file}{_END}", content)

    def shards(self, there: States) -> dict[str, list[dict[str, Any]]]:
        """Return by file the lines of the shards that are there as the merge has written them."""
        return {
            file: lines
            for file, lines in self._lines(there, _SHARDS).items()
            if file in there and lines[0].get("state") == asdict(there[file])
        }

    def _lines(self, there: States, start: str) -> dict[str, list[dict[str, Any]]]:
        """Return by name, without start and end, the lines of the records of this merge."""
        names = [n for n in there if n.startswith(start) and n.endswith(_END)]
        with ThreadPoolExecutor(_NUM_READS) as pool:
            contents = list(pool.map(self._bucket.get, names))
        found = {}
        for name, content in zip(names, contents, strict=True):
            lines = [entry for entry in map(entry_of, (content or b"").split(b"\n")) if entry]
            if lines and lines[0].get("begun") == self._begun:
                found[name.removeprefix(start).removesuffix(_END)] = lines
        return found

    def add_compared(self, part: str, marks: Mapping[str, Any], numbers: Iterable[int]) -> None:
        """Note which of the plan's checks a part has done.

        Args:
            marks: identify the inputs' files.
        """
        entry = {"begun": self._begun, "marks": dict(marks), "equal": [*numbers]}
        self._bucket.put(f"{_EQUAL}{part}{_END}", entry_line(entry))

    def compared(self, there: States) -> dict[str, list[dict[str, Any]]]:
        """Return by part the lines that say which checks it has done."""
        return self._lines(there, _EQUAL)

    def share(self, num_parts: int) -> int:
        """Note into how many parts the output is divided, and return what was noted first."""
        self._bucket.put(_PARTS, entry_line({"num_parts": num_parts}), new=True)
        return self.num_parts() or num_parts

    def num_parts(self) -> int | None:
        """Return into how many parts the output is divided; None if it is not."""
        entry = entry_of((self._bucket.get(_PARTS) or b"").rstrip(b"\n"))
        return None if entry is None else entry.get("num_parts")

    def add_files(self, names: Iterable[str]) -> None:
        """Note the files that will be written beside the weights."""
        self._bucket.put(_FILES, entry_line({"files": sorted(names)}))

    def files(self) -> set[str]:
        """Return the files beside the weights that a killed run may have written."""
        entry = entry_of((self._bucket.get(_FILES) or b"").rstrip(b"\n"))
        return set() if entry is None else set(entry.get("files", ()))

    def remove(self, there: States) -> None:
        """Remove all records, that of the run last."""
        own = [name for name in there if name.startswith(RECORDS) and name != _RUN]
        self._bucket.remove([*own, _RUN])

    def remove_shards(self, there: States) -> None:
        """Remove the records of shards, which are not to be taken over."""
        self._bucket.remove(name for name in there if name.startswith(_SHARDS))


def has_work(there: States) -> bool:
    """Tell whether a run has finished something, or parts may be doing so."""
    return any(name.startswith((_SHARDS, _EQUAL, _PARTS)) for name in there)


def noted_files(there: States) -> set[str]:
    """Return the names of the shards that have a record."""
    records = (name for name in there if name.startswith(_SHARDS) and name.endswith(_END))
    return {name.removeprefix(_SHARDS).removesuffix(_END) for name in records}
