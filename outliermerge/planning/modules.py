"""The modules of SentenceTransformers: how their configs differ between models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.files import load_json
from outliermerge.checkpoint.folder import MODULES_NAME
from outliermerge.jobs import Input


def differing_modules(inputs: Sequence[Input]) -> list[str]:
    """Return how the modules of models, such as their pooling, differ from the first's."""
    first = inputs[0]
    sidecars = first.checkpoint.sidecars
    if MODULES_NAME not in sidecars:
        return []
    files = [
        name
        for name in sidecars
        if name.endswith("/config.json") and "model_type" not in read_json(first.home / name)
    ]
    found = []
    for entry in inputs[1:]:
        for name in (MODULES_NAME, *files):
            ours, theirs = (load_json(each.home / name) for each in (first, entry))
            if _meaning(ours) != _meaning(theirs):
                found.append(f"{name} of {entry.reference} is not that of {first.reference}")
    return found


def _meaning(content: Any) -> Any:
    """Return a modules.json without what differs between versions of the library."""
    if not isinstance(content, list):
        return content
    entries = [entry for entry in content if isinstance(entry, dict)]
    return [(entry.get("path"), str(entry.get("type")).rpartition(".")[2]) for entry in entries]
