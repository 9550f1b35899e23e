"""mergekit's merge files in our form, and what will behave differently.

The facts about mergekit are those of version 0.1.5.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.errors import SpecError, as_path
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import find_method
from outliermerge.spec.document import ModelEntry, SpecDocument
from outliermerge.spec.inert import INERT_PARAMETERS

_REQUIRED = object()
_SPARSE = {"weight": _REQUIRED, "density": 1.0, "lambda": 1.0, "normalize": False,
           "rescale": False}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"weight": _REQUIRED, "normalize": True},
    "task_arithmetic": _SPARSE,
    "ties": _SPARSE | {"normalize": True},
    "dare_linear": _SPARSE | {"rescale": True},
    "dare_ties": _SPARSE | {"rescale": True},
    "breadcrumbs": _SPARSE | {"gamma": 0.01},
    "breadcrumbs_ties": _SPARSE | {"gamma": 0.01},
    "della": _SPARSE | {"normalize": True, "rescale": True, "epsilon": 0.15},
    "della_linear": _SPARSE | {"rescale": True, "epsilon": 0.15},
    "slerp": {"t": _REQUIRED},
    "nuslerp": {"weight": _REQUIRED, "nuslerp_row_wise": False, "nuslerp_flatten": True},
    "multislerp": {"weight": _REQUIRED, "normalize_weights": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "nearswap": {"t": _REQUIRED},
    "model_stock": {"filter_wise": False},
    "sce": {"select_topk": 1.0},
    "arcee_fusion": {},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
    "passthrough": {"scale": None},
}
"""mergekit's methods and their parameters, with their defaults."""

_RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
_TOP_KEYS = ("slices", "modules", "tokenizer", "chat_template", "name", *SpecDocument.model_fields)


@dataclass
class Converted:
    """A merge file in our form.

    Attributes:
        document: the file in our form, as far as there is one.
        left_out: what mergekit passes over too, or has no effect.
        differences: what will behave differently.
        obstacles: why it cannot be run.
    """

    document: dict[str, Any]
    left_out: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)


def convert(raw: Mapping[str, Any]) -> Converted:
    """Return a merge file of mergekit's in our form; one in our form stays as it is."""
    found = Converted(copy.deepcopy(dict(raw)))
    if "experts" in raw and "merge_method" not in raw:
        found.obstacles.append("experts: a file for mergekit-moe; no mixtures are made here")
        return found
    _convert_slices(found)
    _convert_keys(found)
    _convert_tokenizer(found)
    _convert_models(found)
    method = _method(found)
    if method is not None:
        _convert_parameters(found, method)
        _add_base(found, method)
        _add_defaults(found, method)
    if method is not None and method.name in _DEFAULTS:
        if found.document.get("dtype") not in ("float32", "float64"):
            found.differences.append(
                "arithmetic: mergekit computes in `dtype`, or else in the models' own; here it "
                "is float32, rounded once when a tensor is stored"
            )
        if method.name in _RANDOM:
            found.differences.append("random numbers are drawn otherwise, with the spec's `seed`")
    return found


def _near(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.75)
    return f"; {close[0]} may be meant" if close else ""


def _convert_slices(found: Converted) -> None:
    """Write one slice over all layers as whole models."""
    document = found.document
    if "modules" in document:
        found.obstacles.append("modules: merges of single modules are not here")
    slices = document.get("slices")
    if slices is None or "slices" in SpecDocument.model_fields:
        return
    first = slices[0] if isinstance(slices, list) and len(slices) == 1 else {}
    sources = first.get("sources") if isinstance(first, dict) else None
    if not isinstance(sources, list) or not all(isinstance(entry, dict) for entry in sources):
        found.obstacles.append("slices: models of stacked layers are not here")
        return
    ranges = [entry.get("layer_range") for entry in sources]
    if not ranges or any(r != ranges[0] or not isinstance(r, list) or r[0] != 0 for r in ranges):
        found.obstacles.append("slices: ranges of layers are not here, whole models are merged")
        return
    kept = [{k: v for k, v in entry.items() if k != "layer_range"} for entry in sources]
    del document["slices"]
    document["models"] = kept
    document.setdefault("base_model", first.get("base_model"))
    if isinstance(first.get("parameters"), dict):
        shared = document.get("parameters")
        document["parameters"] = (shared if isinstance(shared, dict) else {}) | first["parameters"]
    end = ranges[0][-1]
    depths = {name: _depth(name) for name in (_reference(entry.get("model")) for entry in kept)}
    for name, depth in depths.items():
        if depth not in (None, end):
            found.obstacles.append(f"slices: up to layer {end}, where {name} has {depth} layers")
    unknown = [name for name, depth in depths.items() if depth is None]
    found.differences.append(
        "slices: the one slice is written as whole `models`"
        + (f": right if {', '.join(unknown)} have {end} layers" if unknown else "")
    )


def _depth(reference: str) -> int | None:
    """Return the layers of a model by its config; None if it is in no folder."""
    depth = text_config(read_json(as_path(reference) / "config.json")).get("num_hidden_layers")
    return depth if isinstance(depth, int) else None


def _convert_keys(found: Converted) -> None:
    """Leave out keys that mergekit does not know."""
    document = found.document
    for key in [key for key in document if key not in _TOP_KEYS]:
        del document[key]
        found.left_out.append(f"{key}: mergekit passes over it{_near(key, _TOP_KEYS)}")
    if document.pop("name", None) is not None:
        found.left_out.append("name: a label")
    if document.pop("chat_template", None) is not None:
        found.differences.append("chat_template: it comes with the tokenizer, none is set")
    for key in [key for key, value in document.items() if value is None]:
        del document[key]


def _convert_tokenizer(found: Converted) -> None:
    """Write mergekit's tokenizer keys as `tokenizer_source` and `vocabulary`."""
    document = found.document
    mapping = document.pop("tokenizer", None)
    source = document.pop("tokenizer_source", None)
    if isinstance(mapping, dict):
        source = mapping.get("source", source)
        if mapping.get("tokens"):
            found.obstacles.append("tokenizer.tokens: rows of single tokens cannot be chosen here")
        if mapping.get("pad_to_multiple_of"):
            found.differences.append("tokenizer.pad_to_multiple_of: rows are not padded")
    if source is None:
        return
    name = _reference(source).removeprefix("model:")
    if name == "union":
        document.setdefault("vocabulary", "union")
        return
    document["tokenizer_source"] = name
    if document.get("base_model") and name in ("base", _reference(document["base_model"])):
        document.setdefault("vocabulary", "base")
    elif "vocabulary" not in document:
        found.differences.append(
            "tokenizer: mergekit brings rows into the order of this tokenizer; here a run stops "
            "if rows differ, until `vocabulary` says what becomes of them"
        )


def _reference(value: object) -> str:
    """Return a reference to a model as we write it: path@revision+adapter."""
    if not isinstance(value, dict):
        return str(value)
    model = value.get("model", value)
    path = model.get("path", "") if isinstance(model, dict) else str(model)
    revision = model.get("revision") if isinstance(model, dict) else None
    adapter = value.get("lora")
    return (
        str(path)
        + (f"@{revision}" if revision else "")
        + (f"+{_reference(adapter)}" if adapter else "")
    )


def _convert_models(found: Converted) -> None:
    document = found.document
    if isinstance(document.get("base_model"), dict) and "rename" not in document["base_model"]:
        document["base_model"] = _reference(document["base_model"])
    models = document.get("models")
    if not isinstance(models, list):
        return
    for index, entry in enumerate(models):
        if not isinstance(entry, dict):
            continue
        if isinstance(entry.get("model"), dict):
            entry["model"] = _reference(entry["model"])
        for key in [key for key in entry if key not in ModelEntry.model_fields]:
            del entry[key]
            found.left_out.append(
                f"models[{index}].{key}: mergekit passes over it{_near(key, ['parameters'])}"
            )


def _method(found: Converted) -> MergeMethod | None:
    name = found.document.get("merge_method")
    if name is None:
        found.obstacles.append("merge_method is missing")
        return None
    try:
        return find_method(str(name))
    except SpecError as error:
        found.obstacles.append(f"merge_method: {error}")
        return None


def _convert_parameters(found: Converted, method: MergeMethod) -> None:
    """Keep the parameters that the method has; say what becomes of the others."""
    document = found.document
    base = document.get("base_model")
    models = document.get("models")
    entries = models if isinstance(models, list) else []
    for place, entry in [("", document), *((f"models[{i}].", e) for i, e in enumerate(entries))]:
        if not isinstance(entry, dict) or "parameters" not in entry:
            continue
        where, raw = f"{place}parameters", entry["parameters"]
        if isinstance(raw, dict) and not (
            method.needs_base and entry is not document and entry.get("model") == base
        ):
            entry["parameters"] = _kept(raw, method, where, found, of_model=entry is not document)
        elif raw:
            entry["parameters"] = {}
            found.left_out.append(f"{where}: no effect, " + (
                "it is the base model" if isinstance(raw, dict) else "no mapping"
            ))  # fmt: skip
        if not entry["parameters"]:
            del entry["parameters"]


def _kept(
    raw: Mapping[str, Any], method: MergeMethod, where: str, found: Converted, *, of_model: bool
) -> dict[str, Any]:
    """Return the parameters of a mapping that the method has."""
    kept, theirs = {}, _DEFAULTS.get(method.name, {})
    for name, value in raw.items():
        parameter = method.parameters.get(name)
        if name in INERT_PARAMETERS:
            found.left_out.append(f"{where}.{name}: no effect, {INERT_PARAMETERS[name]}")
        elif parameter is not None and (parameter.per_model or not of_model):
            kept[name] = bool(value) if parameter.type is bool and value in (0, 1) else value
        elif parameter is not None:
            found.left_out.append(f"{where}.{name}: it is of the whole merge, not of one model")
        elif name not in theirs:
            found.left_out.append(
                f"{where}.{name}: mergekit passes over it{_near(name, method.parameters)}"
            )
        elif value != theirs[name]:
            found.obstacles.append(f"{where}.{name}: {method.name} has no such parameter here")
    return kept


def _add_base(found: Converted, method: MergeMethod) -> None:
    """Bring the base model into an average, as mergekit does."""
    document = found.document
    base, models = document.get("base_model"), document.get("models")
    if method.name != "linear" or base is None or not isinstance(models, list):
        return
    if base in [entry.get("model") for entry in models if isinstance(entry, dict)]:
        return
    if "weight" in document.get("parameters", {}):
        models.append({"model": base})
        found.differences.append("models: mergekit averages the base model in; it is listed now")
    else:
        found.differences.append(
            "base_model: mergekit wants a weight for it; here it only gives the layout"
        )


def _add_defaults(found: Converted, method: MergeMethod) -> None:
    """Write mergekit's defaults out where ours are others."""
    document = found.document
    models = document.get("models")
    entries = [entry for entry in models if isinstance(entry, dict)] if models else []
    given = [document, *entries]
    for name, theirs in _DEFAULTS.get(method.name, {}).items():
        if any(name in entry.get("parameters", {}) for entry in given):
            continue
        ours = method.parameters[name].default if name in method.parameters else None
        if theirs is _REQUIRED:
            found.differences.append(f"{name}: none is given, which mergekit refuses; here {ours}")
        elif name in method.parameters and theirs is not None and ours != theirs:
            document.setdefault("parameters", {})[name] = theirs
            said = str(theirs).lower() if isinstance(theirs, bool) else theirs
            found.differences.append(f"{name}: mergekit's default, {said}, is written out")
        elif name not in method.parameters and theirs is True:
            found.differences.append(
                f"{name}: true by default in mergekit's {method.name}, which has none here"
            )
