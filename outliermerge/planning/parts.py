"""The parts of pipelines and of SentenceTransformers: how what lies beside them differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.files import load_json
from outliermerge.checkpoint.folder import MODULES_NAME
from outliermerge.checkpoint.tokens import same_token_files
from outliermerge.jobs import Input


def differing_parts(inputs: Sequence[Input]) -> list[str]:
    """Return which tokenizers and configs of modules, such as pooling, are not the first's."""
    first = inputs[0]
    sidecars = first.checkpoint.sidecars
    if set(first.checkpoint.components) == {""} and MODULES_NAME not in sidecars:
        return []
    folders = list(dict.fromkeys(n.rpartition("/")[0] for n in sidecars if "/" in n))
    files = [f"{folder}/config.json" for folder in folders]
    files = [n for n in files if n in sidecars and "model_type" not in read_json(first.home / n)]
    files = [MODULES_NAME, *files] if MODULES_NAME in sidecars else []
    found = []
    for entry in inputs[1:]:
        said = f"of {entry.reference} is not that of {first.reference}"
        for name in files:
            ours, theirs = (load_json(each.home / name) for each in (first, entry))
            if _meaning(ours) != _meaning(theirs):
                found.append(f"{name} {said}")
        for folder in folders:
            if not same_token_files(first.home / folder, entry.home / folder):
                found.append(f"the tokenizer in {folder}/ {said}")
    return found


def _meaning(content: Any) -> Any:
    """Return a modules.json without what differs between versions of the library."""
    if not isinstance(content, list):
        return content
    entries = [entry for entry in content if isinstance(entry, dict)]
    return [(entry.get("path"), str(entry.get("type")).rpartition(".")[2]) for entry in entries]
