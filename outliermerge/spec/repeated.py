"""Reads the manifest of an output as the spec of the same merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.folders.beside import MANIFEST_NAME
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.storage.files import MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES, read_bytes
from outliermerge.storage.json_text import parse_json


@dataclass(frozen=True)
class Repeated:
    """A merge that was carried out before, as its manifest tells it.

    Attributes:
        file: the manifest.
        recipe: the spec; models are named so that they are found from any folder.
        inputs: the sizes of each model's weight files, and the checksum of what was read of it.
        shard_bytes: most bytes of a weight file, if it is not the default.
    """

    file: Path
    recipe: dict[str, Any]
    inputs: tuple[Mapping[str, Any], ...]
    shard_bytes: int | None


def read_repeated(path: Path) -> Repeated | None:
    """Return the merge that a manifest tells of; None if the file is not named as one.

    Raises:
        SpecError: there is no such file, or outliermerge did not write it.
    """
    if not path.name.endswith(MANIFEST_NAME):
        return None
    try:
        data = read_bytes(path, max_bytes=MAX_MANIFEST_BYTES)
        if data is None:
            raise SpecError(f"{path}: no such file")
        found = parse_json(data, max_values=MAX_MANIFEST_VALUES, unique=False)
    except ValueError as error:
        if isinstance(error, SpecError):
            raise
        text = str(error) if isinstance(error, OutlierMergeError) else f"{path}: {error}"
        raise SpecError(text) from error
    recipe = (found.get("recipe") or found.get("spec")) if isinstance(found, dict) else None
    inputs = found.get("inputs") if isinstance(found, dict) else None
    shard_bytes = found.get("shard_bytes") if isinstance(found, dict) else None
    if (
        not isinstance(recipe, dict)
        or not isinstance(inputs, list)
        or not all(isinstance(e, dict) and isinstance(e.get("files"), dict) for e in inputs)
        or not (shard_bytes is None or (type(shard_bytes) is int and shard_bytes > 0))
    ):
        raise SpecError(f"{path}: has the name of a manifest, but outliermerge did not write it")
    return Repeated(path, recipe, tuple(inputs), shard_bytes)
