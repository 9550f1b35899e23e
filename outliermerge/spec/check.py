"""Checks the YAML spec strictly; its vocabulary is mergekit's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from outliermerge.errors import OutlierMergeError, SpecError, as_path, quoted, suggest
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import find_method
from outliermerge.spec.document import (
    EXTRA,
    MISSING,
    OTHER_FILES,
    UNEQUAL,
    BaseEntry,
    ModelEntry,
    SpecDocument,
)
from outliermerge.spec.inert import without_inert
from outliermerge.spec.rename import Rename, parse_rename
from outliermerge.spec.settings import Setting, SettingError, SpecPath, parse_policy, parse_setting
from outliermerge.spec.text import SpecText, parse_yaml, read_text

_MAX_PROBLEMS = 10
_NOT_YET = {
    "slices": "give whole `models`",
    "modules": "give whole `models`",
    "tokenizer": "`tokenizer_source` names the model whose tokenizer is taken, `vocabulary` says "
    "what becomes of rows that differ",
    "chat_template": "it is taken with the tokenizer, from `tokenizer_source`",
}


@dataclass(frozen=True)
class ModelSpec:
    """A model of a spec.

    Attributes:
        settings: the settings of the method's parameters for this model.
        missing, extra: the model's own policies, which take precedence over the spec's.
        auxiliary: the folder or file of each auxiliary input, by its name in the method.
    """

    reference: str
    path: SpecPath
    rename: Rename = field(default_factory=Rename)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    missing: Setting = field(default_factory=Setting)
    extra: Setting = field(default_factory=Setting)
    auxiliary: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeSpec:
    """A spec that has been checked.

    Attributes:
        document: the spec as it was written.
        method: the merge method; the one that takes its place if there is a base model.
        base: the base model, or None.
        models: the merged models, in order; without the base for methods on task vectors.
        settings: global parameter settings.
        modifiers: the modifiers of the merged task vector: names and resolved parameters.
        rename: the rename for the output's tensors.
        missing, extra, unequal: policies for all models.
        other_files: the policy for files of tensors that are not read.
        source: the file and text of the spec, for messages.
        notes: what in the spec has no effect.
    """

    document: SpecDocument
    method: MergeMethod
    base: ModelSpec | None
    models: tuple[ModelSpec, ...]
    settings: Mapping[str, Setting]
    modifiers: tuple[tuple[str, Mapping[str, Any]], ...]
    rename: Rename
    missing: Setting
    extra: Setting
    unequal: Setting
    other_files: Setting
    source: SpecText
    notes: tuple[str, ...] = ()

    def method_for(self, parameters: Mapping[str, Any]) -> str:
        """Return what `find_method` finds a tensor's method by; a copy has no parameters."""
        method = self.method.of(parameters) if parameters else self.method
        written = self.document.merge_method
        return written if method is find_method(written) else method.path

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values, without keys that have their default."""
        return self.document.model_dump(mode="json", exclude_defaults=True)

    def as_yaml(self) -> str:
        """Return the spec as YAML."""
        document = self.as_dict()
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        if yaml.safe_load(text) == document:
            return text
        return yaml.safe_dump(document, sort_keys=False)  # some line breaks need escapes


def load_spec(spec: str | Path | Mapping[str, Any]) -> MergeSpec:
    """Read and check a spec from a YAML file or from a dict.

    Raises:
        SpecError: the spec cannot be read, or something in it is unknown, has a wrong type or is
            out of range. The message starts with file, line and column.
    """
    if isinstance(spec, Mapping):
        return _check(dict(spec), SpecText("spec"))
    path = Path(spec)
    return parse_spec(read_text(path, absent="no such spec file"), file=str(path))


def parse_spec(text: str, *, file: str = "spec") -> MergeSpec:
    """Read and check a spec from YAML text.

    Raises:
        SpecError: as for load_spec.
    """
    raw, source = parse_yaml(text, file=file)
    if not isinstance(raw, dict):
        raise source.error((), f"found {_describe(raw)}, expected a mapping with `merge_method`")
    return _check(raw, source)


def _check(raw: dict[str, Any], source: SpecText) -> MergeSpec:
    for key in raw:
        if key in _NOT_YET:
            raise source.error(
                (key,), f"a mergekit key that is not supported: {_NOT_YET[key]}", at_key=True
            )
    raw, notes = without_inert(raw, needs_base=_needs_base(raw))
    try:
        document = SpecDocument.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        messages = [str(_explain(problem, raw, source)) for problem in problems[:_MAX_PROBLEMS]]
        if (more := len(problems) - len(messages)) > 0:
            messages.append(f"… and {more} more")
        raise SpecError("\n".join(messages)) from error
    try:
        method = find_method(document.merge_method)
    except SpecError as error:
        raise source.error(("merge_method",), str(error)) from error
    if method.space == "merged":
        raise source.error(
            ("merge_method",), f"{method.name} changes what a method has merged: see `modifiers`"
        )
    if document.base_model is None and method.needs_base:
        why = "works on differences from a base model" if method.uses_base else (
            "merges a model with a base model"
        )  # fmt: skip
        raise source.error((), f"`base_model` is missing: {method.name} {why}")
    if document.base_model is not None and method.with_base is not None:
        method = method.with_base
    _check_sources(document, source)
    try:
        base = _base(document, source)
        return MergeSpec(
            document=document,
            method=method,
            base=base,
            models=_models(document, method, base, source),
            settings=_settings(document.parameters, method, ("parameters",), of_model=False),
            modifiers=_modifiers(document, method, source),
            rename=parse_rename(document.rename, ("rename",)),
            missing=parse_policy(document.missing, MISSING, ("missing",)),
            extra=parse_policy(document.extra, EXTRA, ("extra",)),
            unequal=parse_policy(document.unequal, UNEQUAL, ("unequal",)),
            other_files=parse_policy(document.other_files, OTHER_FILES, ("other_files",)),
            source=source,
            notes=tuple(notes),
        )
    except SettingError as error:
        raise source.error(error.path, str(error), at_key=error.at_key) from error


def _needs_base(raw: Mapping[str, Any]) -> bool:
    try:
        return find_method(str(raw.get("merge_method"))).needs_base
    except SpecError:  # it is reported when all keys have been checked
        return False


def _check_sources(document: SpecDocument, source: SpecText) -> None:
    entries = [document.base_model] if document.base_model else []
    known = ["base", *(entry.model for entry in (*entries, *document.models))]
    for key in ("config_source", "tokenizer_source", "processor_source"):
        wanted = getattr(document, key)
        if wanted is not None and wanted not in known:
            is_union = (key, wanted) == ("tokenizer_source", "union")
            advice = (
                ": here it is `vocabulary: union`" if is_union else f". {suggest(wanted, known)}"
            )
            raise source.error((key,), f"{quoted(wanted)} is none of the models{advice}")


def _base(document: SpecDocument, source: SpecText) -> ModelSpec | None:
    entry = document.base_model
    if entry is None:
        return None
    path: SpecPath = ("base_model",)
    try:
        _identity(entry.model)
    except OutlierMergeError as error:
        raise source.error(path, str(error)) from error
    return ModelSpec(entry.model, path, parse_rename(entry.rename, (*path, "rename")))


def _models(
    document: SpecDocument, method: MergeMethod, base: ModelSpec | None, source: SpecText
) -> tuple[ModelSpec, ...]:
    models: list[ModelSpec] = []
    first_place: dict[str, int] = {}
    base_identity = _identity(base.reference) if base else None
    for index, entry in enumerate(document.models):
        path: SpecPath = ("models", index)
        try:
            identity = _identity(entry.model)
        except OutlierMergeError as error:
            raise source.error((*path, "model"), str(error)) from error
        if identity in first_place:
            raise source.error(
                (*path, "model"),
                f"{quoted(entry.model)} stands twice, first as models[{first_place[identity]}]",
            )
        first_place[identity] = index
        if identity == base_identity:
            _refuse_on_base(entry, method, path, source)
            if method.uses_base or method.base_as == "first":
                continue
        models.append(
            ModelSpec(
                reference=entry.model,
                path=path,
                rename=parse_rename(entry.rename, (*path, "rename")),
                settings=_settings(entry.parameters, method, (*path, "parameters"), of_model=True),
                missing=parse_policy(entry.missing, MISSING, (*path, "missing")),
                extra=parse_policy(entry.extra, EXTRA, (*path, "extra")),
                auxiliary=_auxiliary(entry, method, path, source),
            )
        )
    if base is not None and method.base_as == "first":
        models.insert(0, base)
    elif base is not None and method.base_as == "model" and base_identity not in first_place:
        models.append(base)
    most = method.max_models
    if len(models) < method.min_models or (most is not None and len(models) > most):
        wanted = str(method.min_models) if most == method.min_models else (
            f"{method.min_models} to {most}" if most is not None else
            f"at least {method.min_models}"
        )  # fmt: skip
        besides = " besides the base model" if method.uses_base else (
            ", the base model among them" if method.base_as == "first" else ""
        )  # fmt: skip
        raise source.error(
            ("models",), f"{method.name} takes {wanted} model(s){besides}, found {len(models)}"
        )
    return tuple(models)


def _modifiers(
    document: SpecDocument, method: MergeMethod, source: SpecText
) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    found = []
    for index, entry in enumerate(document.modifiers):
        path: SpecPath = ("modifiers", index)
        if not method.uses_base:
            raise source.error(path, f"{method.name} merges weights: it has no task vector")
        try:
            modifier = find_method(entry.modifier)
            if modifier.space != "merged":
                raise SpecError(f"{modifier.name} is a merge method, not a modifier")
            found.append((entry.modifier, modifier.resolve(1, entry.parameters)))
        except SpecError as error:
            raise source.error(path, str(error)) from error
    return tuple(found)


def _auxiliary(
    entry: ModelEntry, method: MergeMethod, path: SpecPath, source: SpecText
) -> Mapping[str, str]:
    for name in entry.auxiliary:
        if name not in method.auxiliary:
            raise source.error(
                (*path, "auxiliary", name),
                f"{method.name} takes no {quoted(name)}. {suggest(name, method.auxiliary)}",
                at_key=True,
            )
    for name in method.auxiliary:
        if name not in entry.auxiliary:
            raise source.error(
                path, f"{method.name} needs {name!r} of each model: `auxiliary: {{{name}: FILE}}`"
            )
    return entry.auxiliary


def _refuse_on_base(
    entry: ModelEntry, method: MergeMethod, path: SpecPath, source: SpecText
) -> None:
    if entry.parameters and (method.uses_base or method.base_as == "first"):
        raise source.error(
            (*path, "parameters"),
            f"{quoted(entry.model)} is the base model: "
            + ("it has no task vector, so its" if method.uses_base else f"for {method.name} its")
            + " parameters have no effect. Remove them.",
            at_key=True,
        )
    for key in ("rename", "missing", "extra", "auxiliary"):
        if getattr(entry, key) not in (None, {}):
            where = " Write it under `base_model`." if key == "rename" else " Remove it."
            raise source.error(
                (*path, key), f"{quoted(entry.model)} is the base model.{where}", at_key=True
            )


def _identity(reference: str) -> str:
    path = as_path(reference)
    try:
        return str(path.resolve()) if path.exists() else reference
    except (OSError, RuntimeError):  # opening the model later reports what is wrong
        return reference


def _settings(
    raw: Mapping[str, Any], method: MergeMethod, path: SpecPath, *, of_model: bool
) -> dict[str, Setting]:
    settings = {}
    for name, value in raw.items():
        parameter = method.parameters.get(name)
        if parameter is None:
            known = [p.name for p in method.parameters.values() if p.per_model or not of_model]
            raise SettingError(
                (*path, name),
                f"{method.name} has no parameter {quoted(name)}. {suggest(name, known)}",
                at_key=True,
            )
        if of_model and not parameter.per_model:
            raise SettingError(
                (*path, name),
                f"{name!r} is of the whole merge, not of one model: "
                "move it to the top-level `parameters`",
                at_key=True,
            )
        settings[name] = parse_setting(value, parameter, (*path, name))
    return settings


def _describe(value: object) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), quoted(value))


def _explain(problem: Any, raw: dict[str, Any], source: SpecText) -> SpecError:
    path: SpecPath = tuple(problem["loc"])
    if path[0] == "base_model" and not isinstance(raw.get("base_model"), dict):
        path = path[:1]
    found = _describe(problem["input"])
    match problem["type"]:
        case "extra_forbidden":
            fields = {"models": ModelEntry, "base_model": BaseEntry}.get(
                str(path[0]) if len(path) > 1 else "", SpecDocument
            ).model_fields
            name = str(path[-1])
            advice = suggest(name, fields)
            try:
                method = find_method(str(raw.get("merge_method")))
            except SpecError:
                method = None
            if method is not None and name in method.parameters:
                advice = f"It is a parameter of {method.name}: put it under `parameters`."
            return source.error(path, f"unknown key {quoted(name)}. {advice}", at_key=True)
        case "missing":
            return source.error(path[:-1], f"`{path[-1]}` is missing")
        case "literal_error":
            return source.error(path, f"found {found}, expected {problem['ctx']['expected']}")
        case "too_short" | "string_too_short":
            return source.error(path, "must not be empty")
        case "string_type":
            return source.error(path, f"found {found}, expected a text")
        case "list_type":
            return source.error(path, f"found {found}, expected a list")
        case "model_type" if path == ("base_model",):
            return source.error(path, f"found {found}, expected a text or a mapping")
        case "dict_type" | "model_type" | "model_attributes_type":
            return source.error(path, f"found {found}, expected a mapping")
        case _:
            return source.error(path, f"found {found}: {problem['msg']}")
