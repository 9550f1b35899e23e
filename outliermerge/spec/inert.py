"""Keys of mergekit's files that change nothing here: they are left out, with a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outliermerge.errors import quoted
from outliermerge.methods.contract import MergeMethod

INERT_PARAMETERS = {"int8_mask": "it sets how mergekit stores masks in memory"}
LABEL = "name"


def without_inert(
    raw: Mapping[str, Any], method: MergeMethod | None, *, averages_base: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return a spec without keys that have no effect, and notes on those that were there.

    Args:
        method: the spec's method. Most have no parameters for a base model that is among the
            models, too.
        averages_base: whether `linear` averages a base model that is not among the models, as in
            mergekit.

    >>> without_inert({"name": "mine", "parameters": {"int8_mask": True}}, None, averages_base=True)
    ({'parameters': {}}, ['without effect: name (a label); int8_mask (it sets how mergekit \
stores masks in memory)'])
    """
    left_out: dict[str, str] = {}
    document = dict(raw)
    if LABEL in document:
        del document[LABEL]
        left_out[LABEL] = "a label"
    document = _pruned(document, left_out)
    notes: list[str] = []
    if isinstance(document.get("slices"), list):
        document["slices"] = [
            _pruned_slice(entry, left_out) if isinstance(entry, dict) else entry
            for entry in document["slices"]
        ]
        if method is not None and document.get("base_model") is not None:
            _without_parameters_of_base(document, method, left_out)
    if isinstance(document.get("models"), list):
        document["models"] = [
            _pruned(entry, left_out) if isinstance(entry, dict) else entry
            for entry in document["models"]
        ]
        if method is not None and document.get("base_model") is not None:
            _without_parameters_of_base(document, method, left_out)
            notes += _base_of_linear(document, method, averaged=averages_base)
    said = "; ".join(f"{key} ({reason})" for key, reason in left_out.items())
    return document, [*([f"without effect: {said}"] if said else []), *notes]


def _pruned(entry: dict[str, Any], left_out: dict[str, str]) -> dict[str, Any]:
    """Return an entry whose `parameters` has none that are inert; it may be empty."""
    parameters = entry.get("parameters", {})
    if parameters is None:
        return {key: value for key, value in entry.items() if key != "parameters"}
    if not isinstance(parameters, dict) or not set(INERT_PARAMETERS) & set(parameters):
        return dict(entry)
    left_out |= {name: why for name, why in INERT_PARAMETERS.items() if name in parameters}
    kept = {name: value for name, value in parameters.items() if name not in INERT_PARAMETERS}
    return entry | {"parameters": kept}


def _pruned_slice(entry: dict[str, Any], left_out: dict[str, str]) -> dict[str, Any]:
    found = _pruned(entry, left_out)
    if isinstance(sources := found.get("sources"), list):
        found["sources"] = [
            _pruned(source, left_out) if isinstance(source, dict) else source for source in sources
        ]
    return found


def _without_parameters_of_base(
    document: dict[str, Any], method: MergeMethod, left_out: dict[str, str]
) -> None:
    if not (method.with_base or method).needs_base:
        return
    for entry in _entries_of_base(document):
        if entry.pop("parameters", None):
            left_out["parameters of the base model"] = "the method has none for it"


def _base_of_linear(document: dict[str, Any], method: MergeMethod, *, averaged: bool) -> list[str]:
    """Return a note on a base model that mergekit averages in; list it if that is done here."""
    shared = document.get("parameters")
    if (
        method.name != "linear"
        or not isinstance(shared, dict)
        or "weight" not in shared
        or _entries_of_base(document)
    ):
        return []
    name = _name_of_base(document)
    if averaged:
        document["models"] = [*document["models"], {"model": name}]
        return [f"linear averages the base model {quoted(name)} in, as mergekit does"]
    return [
        f"linear averages the `models`; the base model {quoted(name)} is none of them, and gives "
        "only names and shapes. mergekit would average it in"
    ]


def _name_of_base(document: Mapping[str, Any]) -> Any:
    base = document["base_model"]
    return base.get("model") if isinstance(base, dict) else base


def _entries_of_base(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = _name_of_base(document)
    slices = [e for e in document.get("slices", ()) if isinstance(e, dict)]
    lists = [document.get("models"), *(entry.get("sources") for entry in slices)]
    entries = (entry for found in lists if isinstance(found, list) for entry in found)
    return [e for e in entries if isinstance(e, dict) and e.get("model") == name]
