"""Layers that an output of slices has under other numbers than the models that they are from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError, shown
from outliermerge.output.recipe import RECIPE_NAME
from outliermerge.spec.text import plain_yaml
from outliermerge.storage.files import read_bytes

_MAX_SLICES = 12


def has_moved_layers(spec: Mapping[str, Any]) -> bool:
    """Tell whether slices give layers of the output other numbers than in their models.

    >>> slices = [{"sources": [{"model": "a", "layer_range": [0, 2]}]},
    ...           {"sources": [{"model": "b", "layer_range": [2, 4]}]}]
    >>> has_moved_layers({"slices": slices}), has_moved_layers({"slices": slices[1:]})
    (False, True)
    """
    at_layer = 0
    for one in spec.get("slices", ()):
        ranges = [source["layer_range"] for source in one["sources"]]
        if any(start != at_layer for start, _ in ranges):
            return True
        at_layer = ranges[0][1]
    return any(has_moved_layers(module) for module in spec.get("modules", {}).values())


def layers_text(spec: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Return which layers of which models the output's layers are from; empty without slices.

    >>> layers_text({"slices": [{"sources": [{"model": "a", "layer_range": [2, 4]}]}]}, {})
    'Its layers by slice: 0–1 from a (2–3).'
    """
    rows, at_layer = [], 0
    for one in spec.get("slices", ()):
        sources = [(titles.get(s["model"], s["model"]), *s["layer_range"]) for s in one["sources"]]
        stop = at_layer + sources[0][2] - sources[0][1]
        models = " and ".join(f"{title} ({_span(a, b)})" for title, a, b in sources)
        rows.append(f"{_span(at_layer, stop)} from {models}")
        at_layer = stop
    if len(rows) > _MAX_SLICES:
        rows[_MAX_SLICES:] = [f"{len(rows) - _MAX_SLICES} more in the recipe"]
    return f"Its layers by slice: {'; '.join(rows)}." if rows else ""


def _span(start: int, stop: int) -> str:
    return str(start) if stop - start == 1 else f"{start}\N{EN DASH}{stop - 1}"


def moved_layers_note(model: str, root: Path) -> str:
    """Return a note if a folder is an output whose layers moved; empty for others.

    Args:
        model: its name for the note.
        root: the folder, whose recipe is read.
    """
    recipe: Any = None
    with suppress(OutlierMergeError, ValueError):
        data = read_bytes(root / RECIPE_NAME) if root.is_dir() else None
        recipe = plain_yaml(data.decode()) if data else None
    try:
        if not isinstance(recipe, dict) or not has_moved_layers(recipe):
            return ""
        layers = layers_text(recipe, {})
    except (AttributeError, KeyError, TypeError, ValueError):  # not as outliermerge wrote it
        return ""
    return (
        f"{shown(model)} is a merge of slices, whose layers have other numbers than in their "
        "models. Tensors are paired by name: the same number in two models need not be the same "
        f"layer. {shown(layers, 600)}".rstrip()
    )
