"""mergekit's merge files in our form, and what will behave differently.

The facts about mergekit are those of version 0.1.5.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from outliermerge.errors import SpecError
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import find_method
from outliermerge.spec.document import ModelEntry, SliceEntry, SourceEntry, SpecDocument
from outliermerge.spec.inert import INERT_PARAMETERS
from outliermerge.spec.modules import KEEP, MODULES
from outliermerge.spec.slices import with_base_of_slices
from outliermerge.spec.stages import NAME, STAGES
from outliermerge.spec.text import SpecText
from outliermerge.spec.tokenizer import TokenEntry, TokenizerEntry

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
_TOP_KEYS = ("name", *SpecDocument.model_fields)


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


def _of_stage(raw: Any, found: Converted) -> Any:
    """Return a stage in our form, and note of it what is noted of whole files."""
    if not isinstance(raw, dict):
        return raw
    label = {NAME: raw[NAME]} if NAME in raw else {}
    stage = convert({key: value for key, value in raw.items() if key != NAME})
    said = f"stage {raw.get(NAME, '?')}: "
    found.left_out += [said + line for line in stage.left_out]
    found.differences += [said + line for line in stage.differences]
    found.obstacles += [said + line for line in stage.obstacles]
    return label | stage.document


def _with_modules(raw: Mapping[str, Any]) -> Converted:
    """Return a file with modules in our form: each module with what it takes from the top."""
    modules = raw[MODULES] if isinstance(raw[MODULES], dict) else {}
    found = Converted({k: v for k, v in raw.items() if k not in ("merge_method", "parameters")})
    if raw.get("base_model") is None:
        found.obstacles.append("modules: `base_model` is missing; here it gives all other tensors")
    taken = {key: raw[key] for key in ("merge_method", "base_model", "dtype") if key in raw}
    shared = raw.get("parameters") or {}
    written = {}
    for part, entry in modules.items():
        own = dict(entry) if isinstance(entry, dict) else {}
        keep = {KEEP: own.pop(KEEP)} if KEEP in own else {}
        parameters = shared if "merge_method" not in own else {}
        given = {"parameters": {**parameters, **(own.get("parameters") or {})}}
        one = convert(taken | own | given)
        theirs = {"base_model", "dtype"} - own.keys()
        kept = {k: v for k, v in one.document.items() if k not in theirs and v != {}}
        written[part] = kept | keep
        said = f"module {part}: "
        found.left_out += [said + line for line in one.left_out]
        found.differences += [said + line for line in one.differences]
        found.obstacles += [said + line for line in one.obstacles]
    found.document[MODULES] = written
    _convert_keys(found)
    _convert_tokenizer(found)
    return found


def convert(raw: Mapping[str, Any]) -> Converted:
    """Return a merge file of mergekit's in our form; one in our form stays as it is."""
    if MODULES in raw:
        return _with_modules(copy.deepcopy(dict(raw)))
    found = Converted(copy.deepcopy(dict(raw)))
    if "experts" in raw and raw.get("merge_method", "moe") == "moe":
        found.obstacles.append(
            "experts: a file for mergekit-moe: give it as it is to `outliermerge moe`"
        )
        return found
    if isinstance(raw.get(STAGES), list):
        found.document = {STAGES: [_of_stage(e, found) for e in raw[STAGES]]} | found.document
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
        if method.name.startswith("dare_") and _rescales(found.document):
            found.differences.append(
                "rescale: mergekit brings what is kept back to the L1 norm; here it is divided by "
                "`density`, as published. `rescale_by: l1` under `parameters` is mergekit's way"
            )
        if method.name in _RANDOM:
            found.differences.append("random numbers are drawn otherwise, with the spec's `seed`")
    return found


def _rescales(document: Mapping[str, Any]) -> bool:
    """Tell whether what is kept is made larger by division: the default."""
    given = document.get("parameters", {})
    return given.get("rescale") is not False and given.get("rescale_by") != "l1"


def _near(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.75)
    return f"; {close[0]} may be meant" if close else ""


def _convert_slices(found: Converted) -> None:
    """Write the base model of slices at the top."""
    try:
        found.document = with_base_of_slices(found.document, SpecText("file"))
    except SpecError as error:
        found.obstacles.append(str(error).removeprefix("file: "))


def _entries(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], type[BaseModel]]]:
    """Yield what has parameters below the top: its place, itself, and what it is."""
    for place, each in _mappings(document, "models"):
        yield place, each, ModelEntry
    for place, each in _mappings(document, "slices"):
        yield place, each, SliceEntry
        for inner, source in _mappings(each, "sources"):
            yield f"{place}.{inner}", source, SourceEntry


def _mappings(holder: Mapping[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = holder.get(key)
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        if isinstance(entry, dict):
            yield f"{key}[{index}]", entry


def _convert_keys(found: Converted) -> None:
    """Leave out keys that mergekit does not know."""
    document = found.document
    for key in [key for key in document if key not in _TOP_KEYS]:
        del document[key]
        found.left_out.append(f"{key}: mergekit passes over it{_near(key, _TOP_KEYS)}")
    if document.pop("name", None) is not None:
        found.left_out.append("name: a label")
    for key in [key for key, value in document.items() if value is None]:
        del document[key]


def _convert_tokenizer(found: Converted) -> None:
    """Write models as we name them; leave out the keys that mergekit passes over."""
    document = found.document
    source = document.get("tokenizer_source")
    if isinstance(source, dict):
        document["tokenizer_source"] = _reference(source)
    mapping = document.get("tokenizer")
    if not isinstance(mapping, dict):
        return
    if source is not None:
        found.obstacles.append("tokenizer: mergekit refuses it beside `tokenizer_source`")
    _leave_unknown(found, mapping, TokenizerEntry.model_fields, "tokenizer")
    if isinstance(mapping.get("source"), dict):
        mapping["source"] = _reference(mapping["source"])
    tokens = mapping.get("tokens")
    for token, entry in tokens.items() if isinstance(tokens, dict) else ():
        if not isinstance(entry, dict):
            continue
        _leave_unknown(found, entry, TokenEntry.model_fields, f"tokenizer.tokens.{token}")
        row = entry.get("source")
        if isinstance(row, dict) and "kind" not in row:
            entry["source"] = _reference(row)
        elif isinstance(row, dict) and isinstance(row.get("model"), dict):
            row["model"] = _reference(row["model"])


def _leave_unknown(
    found: Converted, mapping: dict[str, Any], valid: Iterable[str], where: str
) -> None:
    for key in [key for key in mapping if key not in valid]:
        del mapping[key]
        found.left_out.append(f"{where}.{key}: mergekit passes over it{_near(key, valid)}")


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
    for place, entry, kind in _entries(document):
        if isinstance(entry.get("model"), dict):
            entry["model"] = _reference(entry["model"])
        for key in [key for key in entry if key not in kind.model_fields]:
            del entry[key]
            found.left_out.append(
                f"{place}.{key}: mergekit passes over it{_near(key, ['parameters'])}"
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
    of_all: list[tuple[str, dict[str, Any], type[BaseModel]]] = [("", document, SpecDocument)]
    for place, entry, kind in [*of_all, *_entries(document)]:
        if "parameters" not in entry:
            continue
        where, raw = f"{place}.parameters".lstrip("."), entry["parameters"]
        of_model = kind in (ModelEntry, SourceEntry)
        if isinstance(raw, dict) and not (
            method.needs_base and of_model and entry.get("model") == base
        ):
            entry["parameters"] = _kept(raw, method, where, found, of_model=of_model)
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
    given = [document, *(entry for _, entry, _ in _entries(document))]
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
