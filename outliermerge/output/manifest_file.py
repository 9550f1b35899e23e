"""Reading the manifest of an output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from outliermerge.arguments import checked
from outliermerge.checkpoint.folders.absent import meant_inside, path_meant
from outliermerge.checkpoint.folders.folder import refuse_unfinished
from outliermerge.display import short_repr
from outliermerge.errors import OutlierMergeError, as_path, quoted
from outliermerge.output.names import journal_path, manifest_path, partial_folder
from outliermerge.spec.document import references
from outliermerge.storage.files import MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES, read_bytes
from outliermerge.storage.json_text import parse_json

MANIFEST_FORMAT = 1


class Manifest(dict[str, Any]):
    """The contents of a manifest: a dict whose repr does not list every tensor."""

    def __repr__(self) -> str:
        spec = self.get("spec") or {}
        return short_repr(
            self,
            f"{spec.get('merge_method')} of {len(references(spec))} models, "
            f"{len(self.get('tensors', {}))} tensors in {len(self.get('shards', {}))} file(s)",
            f"keys: {', '.join(map(str, self))}",
        )


@checked
def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of an output, a folder or a file.

    Raises:
        OutlierMergeError: there is no manifest, or outliermerge did not write it.
    """
    folder = as_path(folder)
    path = manifest_path(folder)
    data = read_bytes(path, max_bytes=MAX_MANIFEST_BYTES)
    if data is None:
        refuse_unfinished(folder)
        what = "not an output of outliermerge"
        if folder.is_dir() and (inside := sorted(folder.glob(f"*/{path.name}"))):
            what += f", {meant_inside([each.parent for each in inside], 'output')}"
        if os.path.lexists(journal_path(folder)):
            what = f"not finished: it is written in {partial_folder(folder)}. To go on, start the "
            what += "same command again, which says so if it cannot be finished."
        elif not folder.exists():
            near = path_meant(folder)
            meant = f". Did you mean {quoted(str(near))}?" if near else ""
            raise OutlierMergeError(f"{folder}: no such file or folder{meant}")
        raise OutlierMergeError(f"{folder}: no {path.name}: {what}")
    return parsed_manifest(data, path)


def parsed_manifest(data: bytes, path: Path | str) -> Manifest:
    """Return the manifest that a file holds.

    Raises:
        OutlierMergeError: outliermerge did not write it.
    """
    try:
        manifest = parse_json(data, max_values=MAX_MANIFEST_VALUES, unique=False)
    except ValueError as error:
        raise OutlierMergeError(f"{path}: cannot be read: {error}") from error
    entries = {
        "tensors": {"file", "dtype", "shape", "checksum"},
        "shards": {"num_bytes", "header"},
        "files": {"num_bytes", "sha256"},
    }
    valid = isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT
    for key, needed in entries.items():
        valid = valid and isinstance(manifest.get(key), dict)
        valid = valid and all(
            isinstance(entry, dict) and needed <= entry.keys() for entry in manifest[key].values()
        )
    if not valid:
        raise OutlierMergeError(f"{path}: not a manifest of format {MANIFEST_FORMAT}")
    return Manifest(manifest)
