"""Keys of mergekit's files that change nothing: they are left out, with a note."""

from __future__ import annotations

from typing import Any

INERT_PARAMETERS = {"int8_mask": "it sets how mergekit stores masks in memory"}
LABEL = "name"


def without_inert(raw: dict[str, Any], *, needs_base: bool) -> tuple[dict[str, Any], list[str]]:
    """Return a spec without keys that have no effect, and a note on those that were there.

    Args:
        needs_base: whether the method needs a base model. If that is among the models, too, its
            parameters there have no effect.

    >>> without_inert({"name": "mine", "parameters": {"int8_mask": True}}, needs_base=True)
    ({'parameters': {}}, ['without effect: name (a label); int8_mask (it sets how mergekit \
stores masks in memory)'])
    """
    left_out: dict[str, str] = {}
    document = dict(raw)
    if isinstance(document.get(LABEL), str):
        del document[LABEL]
        left_out[LABEL] = "a label"
    document = _pruned(document, left_out)
    if isinstance(document.get("models"), list):
        document["models"] = [
            _pruned(entry, left_out) if isinstance(entry, dict) else entry
            for entry in document["models"]
        ]
        base = document.get("base_model")
        for entry in document["models"] if needs_base and isinstance(base, str) else ():
            if isinstance(entry, dict) and entry.get("model") == base and entry.get("parameters"):
                del entry["parameters"]
                left_out["parameters of the base model"] = "the method has none for it"
    said = "; ".join(f"{key} ({reason})" for key, reason in left_out.items())
    return document, [f"without effect: {said}"] if said else []


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
