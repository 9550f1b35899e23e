"""What a merge's manifest recorded: its recipe, and numbers of each tensor that a page can draw."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from outliermerge.analysis.report.data import find_spots, short_titles
from outliermerge.analysis.report.origins import map_payload, modules_text, stages_of
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import METHODS

Lines = dict[str, float | None]
"""A tensor's numbers by the name of their line, such as a model's title; "" for a number alone."""


def merge_payload(manifest: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """Return a manifest's recipe, and what it recorded of each tensor.

    Args:
        manifest: the manifest.
        titles: the title of each input on the page, by its name in the manifest.
    """
    spec, tensors = manifest["spec"], manifest["tensors"]
    method = None if "modules" in spec else METHODS.get(spec.get("merge_method", ""))
    stages = stages_of(spec)
    made_of = [model for each in manifest["inputs"] for model in each.get("made_of", ())]
    parts = dict(zip(made_of, short_titles(made_of), strict=True)) if made_of else {}
    base = next((each["model"] for each in manifest["inputs"] if each["role"] == "base"), None)
    numbers: dict[str, dict[str, Lines]] = {}
    given: dict[str, dict[str, Lines]] = {}
    for name, entry in tensors.items():
        sources = list(entry.get("sources", ()))
        # A method on weights gets the base like another model; others get differences from it.
        if sources[:1] == [base] and not (method and method.space == "weight"):
            del sources[0]
        models = [titles.get(source, source) for source in sources]
        numbers[name] = _measured(entry, method, models)
        given[name] = _series(entry.get("parameters", {}), method, models)
    series = _varying(numbers.values()) + _varying(given.values())
    spots = find_spots(list(tensors))
    # With modules the plan's jobs copy tensors that were merged when they were read.
    actions = [entry.get("action", "") for entry in tensors.values() if "modules" not in spec]
    return {
        "method": method.name if method else spec.get("merge_method", "modules"),
        "modules": modules_text(spec, {**titles, **parts}),
        "layer_map": map_payload(manifest.get("layer_map", ())),
        "paper": method.paper if method else "",
        "recipe": yaml.safe_dump(spec, sort_keys=False, allow_unicode=True),
        "version": manifest.get("versions", {}).get("outliermerge", ""),
        "inputs": [
            {
                "title": titles[each["model"]],
                "role": each["role"],
                "made_of": [parts[model] for model in each["made_of"]]
                if each["model"] in stages
                else [],
            }
            for each in manifest["inputs"]
        ],
        "actions": {action: actions.count(action) for action in dict.fromkeys(actions)},
        "series": {name: _caption(name, method) for name in series},
        "by_model": _kept_whole(tensors, numbers) | _by_model(given.values()),
        "tensors": [
            {
                "name": name,
                **spots[name].as_dict(),
                "action": entry.get("action", ""),
                "num_elements": math.prod(entry["shape"]),
                "numbers": {
                    key: lines
                    for key, lines in (numbers[name] | given[name]).items()
                    if key in series
                },
            }
            for name, entry in tensors.items()
        ],
    }


def _measured(
    entry: Mapping[str, Any], method: MergeMethod | None, models: Sequence[str]
) -> dict[str, Lines]:
    """Return the statistics of a merged tensor; counts of outliers also as shares."""
    found = _series(entry.get("statistics", {}), method, models)
    num_elements = math.prod(entry["shape"])
    if "outliers" in found and num_elements:
        found["kept whole, %"] = {
            line: None if count is None else 100 * count / num_elements
            for line, count in found["outliers"].items()
        }
    return found


def _series(
    values: Mapping[str, Any], method: MergeMethod | None, models: Sequence[str]
) -> dict[str, Lines]:
    """Return numbers by their name, and by line; of a matrix each row has a name."""
    found: dict[str, Lines] = {}
    for name, value in values.items():
        if not isinstance(value, list):
            found[name] = {"": _number(value)}
        elif not any(isinstance(each, list) for each in value):
            found[name] = _lines(value, models)
        elif all(isinstance(each, list) for each in value):
            for row, label in zip(value, _row_names(name, value, method, models), strict=True):
                found[label] = _lines(row, models)
    return {
        name: lines
        for name, lines in found.items()
        if any(value is not None for value in lines.values())
    }


def _lines(values: Sequence[Any], models: Sequence[str]) -> Lines:
    """Name numbers after the models, if there are as many, else by their place."""
    names = models
    if len(set(models)) != len(models) or len(models) != len(values):
        names = [str(place) for place in range(1, len(values) + 1)]
    return dict(zip(names, map(_number, values), strict=True))


def _row_names(
    name: str, rows: Sequence[Any], method: MergeMethod | None, models: Sequence[str]
) -> list[str]:
    """Name rows as their statistic does; of a symmetric matrix, such as products, as models."""
    known = _known_rows(name, method)
    if len(known) != len(rows):
        is_symmetric = list(map(list, rows)) == [list(column) for column in zip(*rows, strict=True)]
        known = list(_lines([0] * len(rows), models if is_symmetric else ()))
    return [f"{name}: {row}" for row in known]


def _known_rows(name: str, method: MergeMethod | None) -> Sequence[str]:
    need = method.needs.get(name) if method else None
    rows: Sequence[str] = getattr(need, "rows", ())
    return rows


def _number(value: Any) -> float | None:
    """Return a number; None for a text, which infinite and NaN numbers are in a manifest."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _varying(tensors: Iterable[dict[str, Lines]]) -> list[str]:
    """Return the names of numbers that are not the same for all tensors."""
    seen: dict[str, dict[str, set[float | None]]] = {}
    for series in tensors:
        for name, lines in series.items():
            for line, value in lines.items():
                seen.setdefault(name, {}).setdefault(line, set()).add(value)
    return [name for name, lines in seen.items() if any(len(each) > 1 for each in lines.values())]


def _kept_whole(
    tensors: Mapping[str, Any], numbers: Mapping[str, dict[str, Lines]]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the share of all elements of each model that were kept whole."""
    counts: dict[str, float] = {}
    elements: dict[str, int] = {}
    for name, series in numbers.items():
        for line, count in series.get("outliers", {}).items():
            if line and count is not None:
                counts[line] = counts.get(line, 0) + count
                elements[line] = elements.get(line, 0) + math.prod(tensors[name]["shape"])
    shares = {line: 100 * count / elements[line] for line, count in counts.items()}
    return {"kept whole, %": {line: (share, share) for line, share in shares.items()}}


def _by_model(tensors: Iterable[dict[str, Lines]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the least and the greatest value of each parameter that models have of their own."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for series in tensors:
        for name, lines in series.items():
            for line, value in lines.items():
                if line and value is not None:
                    low, high = found.setdefault(name, {}).get(line, (value, value))
                    found[name][line] = (min(low, value), max(high, value))
    return found


def _caption(name: str, method: MergeMethod | None) -> str:
    """Return what a method's documentation says of an argument, without its shape."""
    name, _, row = name.partition(": ")
    if row in _known_rows(name, method):
        return ""  # the name says it
    documented = method.documentation if method else ""
    match = re.search(rf"^ +{re.escape(name)}_?: (.+(?:\n {{8}}.+)*)", documented, re.MULTILINE)
    text = re.sub(r"\s+", " ", match[1]) if match else ""
    return re.sub(r",? \([^()]*\)\.$", ".", text)
