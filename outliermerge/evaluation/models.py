"""The models to evaluate: their folders, their names, and how they were merged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.folders.absent import is_model, meant_inside, models_in
from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.checkpoint.folders.hub import resolve
from outliermerge.errors import OutlierMergeError, quoted
from outliermerge.evaluation.formats import read_merged
from outliermerge.evaluation.scores import check_names
from outliermerge.methods.table import METHODS
from outliermerge.storage.stamps import is_there, refuse_text

_NAMED = re.compile(r"(?P<name>[^/]+)=(?P<path>.+)")  # "t=3=merged/t3" is called "t=3"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate: its name in tables, the given path or hub id, and its folder."""

    name: str
    reference: str
    path: Path
    fingerprint: str
    merge: Mapping[str, Any] | None


def find_models(models: Sequence[str]) -> list[tuple[str, str, Path]]:
    """Return name, reference and folder of models given as "PATH" or "NAME=PATH".

    Raises:
        OutlierMergeError: two models have the same name, or one is neither local nor available from
            the hub.
    """
    pairs = [split_name(model) for model in models]
    check_names([name for name, _ in pairs])
    return [(name, reference, _find(reference)) for name, reference in pairs]


def split_name(model: str) -> tuple[str, str]:
    """Return a model's name in tables, and its path or hub id.

    >>> split_name("t=3=merged/t3"), split_name("org/name@main")
    (('t=3', 'merged/t3'), ('name', 'org/name@main'))
    """
    match = _NAMED.fullmatch(model)
    if match and not Path(model).exists():
        return match["name"], match["path"]
    place = model if Path(model).exists() else model.partition("@")[0]
    return Path(place).expanduser().resolve().name, model


def _find(reference: str) -> Path:
    path = resolve(reference)
    if not path.is_dir():
        raise OutlierMergeError(
            f"model {quoted(reference)}: a file, expected a model folder, such as {path.parent}"
        )
    if not is_model(path) and (inside := models_in(path)):
        raise OutlierMergeError(
            f"model {quoted(reference)}: is no model, {meant_inside(inside, 'model')}"
        )
    refuse_text(path)
    return path


def merge_of(path: Path) -> dict[str, Any] | None:
    """Return how a model was merged, from its manifest; None if it was only converted.

    Raises:
        OutlierMergeError: the manifest is not valid.
    """
    if not is_there(path / MANIFEST_NAME):
        return None
    spec = read_merged(path / MANIFEST_NAME)
    if spec.merge_method == "passthrough" or len(spec.models) == 1:
        return None
    # Do not import a method from the user's code here: the manifest may come from somebody else.
    method = METHODS.get(spec.merge_method)
    defaults = {p.name: p.default for p in method.parameters.values()} if method else {}
    return {"method": spec.merge_method, "parameters": {**defaults, **(spec.parameters or {})}}
