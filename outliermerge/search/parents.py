"""The models that a search knows before it begins, each as a spec that copies it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from outliermerge.spec.check import MergeSpec

_KEPT = ("dtype", "out_dtype", "other_files")  # of the spec, for its copies


def parents_of(spec: MergeSpec) -> dict[str, dict[str, Any]]:
    """Return the base and the models of a spec, each by its name with a spec that copies it.

    Models of stages and modules are not among them: they may be parts, or of another architecture.
    """
    document = spec.as_dict()
    if spec.modules:
        return {}
    stages = set(spec.all_stages)
    sources = (source for one in document.get("slices", ()) for source in one["sources"])
    entries = [document.get("base_model"), *document.get("models", ()), *sources]
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        model = {"model": entry} if isinstance(entry, str) else dict(entry or {})
        model = {key: value for key, value in model.items() if key in ("model", "rename")}
        if not model or model["model"] in stages:
            continue
        copy = {"merge_method": "passthrough", "models": [model]}
        copy |= {key: document[key] for key in _KEPT if key in document}
        if copy not in found.values():
            found[_name(str(model["model"]), found)] = copy
    return found


def _name(reference: str, taken: Mapping[str, object]) -> str:
    """Return the last part of a path, or all of it where another model is called so."""
    name = PurePath(reference).name or reference
    return name if name not in taken else reference
