"""What merges have scored, in files: a merge that was scored is not made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.formats import load, sealed
from outliermerge.storage.failures import naming
from outliermerge.storage.files import write_whole

Questions = Mapping[str, Sequence[str]]
Record = Mapping[str, Any]
"""What is known of a merge: `spec`, `checksum`, `answers`, and `is_whole` if it was asked all."""


class Ledger:
    """Keeps the records of merges under a hash of the spec.

    Args:
        folder: for the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with naming(folder, "made"):
            folder.mkdir(parents=True, exist_ok=True)

    def record(self, document: Mapping[str, Any]) -> Record:
        """Return what is known of a spec's merge; empty if nothing is."""
        try:
            found = load(self._path(document))
        except OutlierMergeError:  # there is none, or it is damaged: it is asked again
            return {}
        record: Any = found.get("record") if isinstance(found, dict) else None
        if not isinstance(record, dict) or found != sealed({"record": record}):
            return {}
        return record

    def put(self, document: Mapping[str, Any], record: Record) -> None:
        """Keep a record.

        Raises:
            OutlierMergeError: it cannot be written.
        """
        path = self._path(document)
        text = json.dumps(sealed({"record": record}), ensure_ascii=False, allow_nan=False)
        with naming(path, "written"):
            write_whole(path, text.encode("utf-8", "backslashreplace"))

    def _path(self, document: Mapping[str, Any]) -> Path:
        return self._folder / f"{key_of(document)}.json"


def key_of(document: Mapping[str, Any]) -> str:
    """Return a hash of a spec."""
    text = json.dumps(document, sort_keys=True, default=str)
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "backslashreplace"))
