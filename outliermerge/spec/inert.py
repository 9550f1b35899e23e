"""Keys of mergekit's files that change nothing: they are left out, with a note."""

from __future__ import annotations

from typing import Any

INERT_PARAMETERS = {"int8_mask": "it sets how mergekit stores masks in memory"}
LABEL = "name"


def without_inert(raw: dict[str, Any], *, uses_base: bool) -> tuple[dict[str, Any], list[str]]:
    """Return a spec without keys that have no effect, and a note on those that were there.

    Args:
        uses_base: whether the method works on differences from the base model, which has none of
            its own: its parameters, where it is among the models, have no effect.

    >>> without_inert({"name": "mine", "parameters": {"int8_mask": True}}, uses_base=True)
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
        for entry in document["models"] if uses_base and isinstance(base, str) else ():
            if isinstance(entry, dict) and entry.get("model") == base and entry.get("parameters"):
                del entry["parameters"]
                left_out["parameters of the base model"] = "it has no task vector"
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
