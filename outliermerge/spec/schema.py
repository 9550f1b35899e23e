"""The JSON schema of a spec, for editors."""

from __future__ import annotations

from typing import Any

from outliermerge.checkpoint.sources import FLOAT_DTYPES
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.parameter import Parameter
from outliermerge.methods.table import EVERY
from outliermerge.spec.document import DTYPE_ABBREVIATIONS, SpecDocument, by_filters
from outliermerge.spec.inert import INERT_PARAMETERS, LABEL
from outliermerge.spec.modules import KEEP, MODULES, OF_MODULE

_BASE_IS_NAMED = [
    {"required": ["base_model"]},
    {"required": ["slices"], "properties": {"slices": {"items": {"required": ["base_model"]}}}},
]
_TEXT = {"type": "string", "minLength": 1}
_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a spec, for editors.

    For a method of the table only its own parameters are valid.
    """
    schema = SpecDocument.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "outliermerge spec"
    schema["properties"]["merge_method"] = {
        "description": SpecDocument.model_fields["merge_method"].description,
        "anyOf": [
            {"enum": list(EVERY)},
            {"type": "string", "pattern": r"^[\w.]+:\w+$"},
        ],
    }
    schema["properties"][LABEL] = {"type": "string", "description": "A label, without effect."}
    # A stage is written as a whole spec is, with its name.
    stage = {"allOf": [{"$ref": "#"}, {"required": [LABEL]}], "not": {"required": ["output"]}}
    schema["properties"]["stages"]["items"] = stage
    defined = schema["$defs"]
    for entry in (schema, *(defined[name] for name in ("ModelEntry", "SliceEntry", "SourceEntry"))):
        field = entry["properties"]["parameters"]
        field["anyOf"] = [{"type": field.pop("type")}, {"type": "null"}]
    names = [*FLOAT_DTYPES, *DTYPE_ABBREVIATIONS]
    dtypes = {"enum": [*names, *(f"torch.{name}" for name in names)]}
    for name in ("dtype", "out_dtype"):
        schema["properties"][name] |= {"anyOf": [dtypes, {"type": "null"}]}
    schema["required"].remove("models")
    schema["required"].remove("merge_method")  # each module may have its own
    schema["oneOf"] = [
        {"required": ["merge_method", "models"]},
        {"required": ["merge_method", "slices"]},
        {"required": [MODULES, "base_model"]},
    ]
    schema["properties"]["slices"]["minItems"] = 1
    defined["SliceEntry"]["properties"]["base_model"] = {
        "anyOf": schema["properties"]["base_model"]["anyOf"],
        "description": "As at the top, if all slices have the same.",
    }
    schema["dependentRequired"] = {"stack": ["slices"]}
    schema["allOf"] = [_by_method(method, base_is_named=True) for method in EVERY.values()]
    schema["properties"][MODULES] |= {
        "minProperties": 1,
        "additionalProperties": _module_schema(schema["properties"]),
    }
    return schema


def _module_schema(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a module, from that of the keys of a whole merge."""
    keep = {
        "description": "Parts of the names of tensors that stay the base model's.",
        "anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}],
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {key: properties[key] for key in OF_MODULE} | {KEEP: keep},
        "oneOf": [{"required": ["models"]}, {"required": ["slices"]}],
        "allOf": [_by_method(method, base_is_named=False) for method in EVERY.values()],
    }


def _by_method(method: MergeMethod, *, base_is_named: bool) -> dict[str, Any]:
    """Return what a method asks of a merge that names it.

    Args:
        base_is_named: the merge itself names a base model where the method needs one.
    """
    needs_base = base_is_named and method.needs_base
    own = {"parameters": _parameters_schema(method, of_model=False)}
    slices = own | {"sources": _models_schema(method)}
    return {
        "if": {
            "required": ["merge_method"],
            "properties": {"merge_method": {"const": method.name}},
        },
        "then": {
            "anyOf": _BASE_IS_NAMED if needs_base else [{}],
            "properties": ({"base_model": {"not": {"type": "null"}}} if needs_base else {})
            | own
            | {"models": _models_schema(method), "slices": {"items": {"properties": slices}}},
        },
    }


def _models_schema(method: MergeMethod) -> dict[str, Any]:
    return {"items": {"properties": {"parameters": _parameters_schema(method, of_model=True)}}}


def _parameters_schema(method: MergeMethod, *, of_model: bool) -> dict[str, Any]:
    properties = {
        parameter.name: _setting_schema(parameter)
        for parameter in method.parameters.values()
        if parameter.per_model or not of_model
    }
    inert = {
        name: {"description": f"Without effect: {reason}."}
        for name, reason in INERT_PARAMETERS.items()
    }
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": inert | properties,
    }


def _setting_schema(parameter: Parameter) -> dict[str, Any]:
    kinds = {float: "number", int: "integer", bool: "boolean", str: "string"}
    scalar: dict[str, Any] = {"type": kinds[parameter.type]}
    limits = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    for bound, keyword in limits.items():
        if (limit := getattr(parameter.bounds, bound)) is not None:
            scalar[keyword] = limit
    if parameter.type is bool:
        scalar = {"anyOf": [scalar, {"enum": [0, 1]}]}
    if parameter.choices:
        scalar["enum"] = list(parameter.choices)
    if parameter.type in (float, int):
        scalar = {"anyOf": [scalar, {"type": "string", "pattern": _NUMBER}]}
    value = {"anyOf": [scalar, {"type": "array", "items": scalar, "minItems": 1}]}
    return {"default": parameter.default, "anyOf": by_filters(value)}
