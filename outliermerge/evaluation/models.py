"""The models to evaluate: where they are, what they are called, and what merged them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.folder import MANIFEST_NAME
from outliermerge.checkpoint.hub import resolve
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.evaluation.fingerprint import Fingerprints
from outliermerge.evaluation.scores import check_names
from outliermerge.methods import find_method

_NAMED = re.compile(r"(?P<name>[^/]+)=(?P<path>.+)")  # "t=3=merged/t3" is called "t=3"


@dataclass(frozen=True)
class Model:
    """A model to evaluate: its name in tables, as it was given, and where it is."""

    name: str
    reference: str
    path: Path
    fingerprint: str
    merge: Mapping[str, Any] | None


def find_models(models: Sequence[str], fingerprints: Fingerprints) -> list[Model]:
    """Return models given as "PATH" or "NAME=PATH"; all are looked for before any is read.

    Raises:
        OutlierMergeError: two have one name, or one is neither here nor to be had from the hub.
    """
    pairs = [_split_name(model) for model in models]
    check_names([name for name, _ in pairs])
    paths = [_find(reference) for _, reference in pairs]
    merges = [_merge(path) for path in paths]
    return [
        Model(name, reference, path, fingerprints.of_model(path), merge)
        for (name, reference), path, merge in zip(pairs, paths, merges, strict=True)
    ]


def _split_name(model: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(model)
    if match and not Path(model).exists():
        return match["name"], match["path"]
    name = Path(model.partition("@")[0]).expanduser().resolve().name
    return name, model


def _find(reference: str) -> Path:
    path = resolve(reference)
    if not path.is_dir():
        raise OutlierMergeError(f"model {reference!r}: a file, expected a model folder")
    return path


def _merge(path: Path) -> dict[str, Any] | None:
    """Return what merged a model, from its manifest; None for one that was only converted."""
    try:
        spec = json.loads((path / MANIFEST_NAME).read_text("utf-8"))["spec"]
        method, models = spec["merge_method"], spec["models"]
        given = dict(spec.get("parameters") or {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutlierMergeError(f"{path / MANIFEST_NAME}: is not a manifest: {error}") from error
    if method == "passthrough" or len(models) == 1:
        return None
    try:
        defaults = {p.name: p.default for p in find_method(method).parameters.values()}
    except SpecError:  # a method of the user's own, not importable here
        defaults = {}
    return {"method": method, "parameters": {**defaults, **given}}
