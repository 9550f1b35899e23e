"""How the parts of pipelines and SentenceTransformers differ: module lists and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outliermerge.checkpoint.folders.folder import MODULES_NAME
from outliermerge.checkpoint.tokens import same_token_files
from outliermerge.errors import shown
from outliermerge.planning.plan import Input
from outliermerge.storage.files import load_json


def differing_parts(inputs: Sequence[Input]) -> list[str]:
    """Return which parts' tokenizers, and lists of modules, differ from the first model's."""
    first = inputs[0]
    sidecars = first.checkpoint.sidecars
    if set(first.checkpoint.components) == {""} and MODULES_NAME not in sidecars:
        return []
    folders = list(dict.fromkeys(n.rpartition("/")[0] for n in sidecars if "/" in n))
    found = []
    for entry in inputs[1:]:
        said = f"of {shown(entry.reference)} is not that of {shown(first.reference)}"
        ours, theirs = (load_json(each.home / MODULES_NAME) for each in (first, entry))
        if _meaning(ours) != _meaning(theirs):
            found.append(f"{MODULES_NAME} {said}")
        for folder in folders:
            if not same_token_files(first.home / folder, entry.home / folder):
                found.append(f"the tokenizer in {folder}/ {said}")
    return found


def _meaning(content: Any) -> Any:
    """Return a modules.json without the values that depend on the version of the library."""
    if not isinstance(content, list):
        return content
    entries = [entry for entry in content if isinstance(entry, dict)]
    return [(entry.get("path"), str(entry.get("type")).rpartition(".")[2]) for entry in entries]
