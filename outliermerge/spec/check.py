"""Checks the YAML spec strictly; its vocabulary is mergekit's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from outliermerge.display import short_repr
from outliermerge.errors import OutlierMergeError, SpecError, as_path, quoted, suggest
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import find_method
from outliermerge.spec.document import (
    EXTRA,
    MISSING,
    OTHER_FILES,
    UNEQUAL,
    ModelEntry,
    SpecDocument,
)
from outliermerge.spec.explained import explained
from outliermerge.spec.inert import without_inert
from outliermerge.spec.parameters import parameter_settings
from outliermerge.spec.rename import Rename, parse_rename
from outliermerge.spec.repeated import Repeated, read_repeated
from outliermerge.spec.settings import Setting, SpecPath, parse_policy
from outliermerge.spec.text import Mistakes, SpecText, as_yaml, parse_yaml, read_text
from outliermerge.spec.validation import describe, validated

_POLICIES = {"missing": MISSING, "extra": EXTRA, "unequal": UNEQUAL, "other_files": OTHER_FILES}
# What stands for a required value that is wrong, so that the rest of the file can be checked.
_STAND_IN = "?"
_STAND_INS = {"merge_method": "", "model": _STAND_IN, "models": [{"model": _STAND_IN}],
              "modifier": _STAND_IN}  # fmt: skip
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
        method: the merge method.
        base: the base model, or None.
        models: the merged models, in order; without the base for methods on task vectors.
        settings: global parameter settings.
        modifiers: the modifiers of the merged task vector: names and resolved parameters.
        rename: the rename for the output's tensors.
        missing, extra, unequal: policies for all models.
        other_files: the policy for files of tensors that are not read.
        source: the file and text of the spec, for messages.
        notes: what in the spec has no effect.
        repeated: the merge that this one repeats, if the spec is a manifest.
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
    repeated: Repeated | None = None

    def __repr__(self) -> str:
        return short_repr(self, self.in_a_line)

    @property
    def in_a_line(self) -> str:
        """The method and the models, for a person."""
        models = ", ".join(model.reference for model in self.models)
        return f"{self.method.name} of {models}" + (
            f" onto {self.base.reference}" if self.base else ""
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values, without keys that have their default."""
        return self.document.model_dump(mode="json", exclude_defaults=True)

    def as_yaml(self) -> str:
        """Return the spec as YAML."""
        return as_yaml(self.as_dict())


def load_spec(spec: str | Path | Mapping[str, Any]) -> MergeSpec:
    """Read and check a spec from a YAML file, from a dict, or from an output's manifest.

    Raises:
        SpecError: the spec cannot be read, or something in it is unknown, has a wrong type or is
            out of range. The message starts with file, line and column.
    """
    if isinstance(spec, Mapping):
        return _check(dict(spec), SpecText("spec"))
    path = Path(spec)
    if repeated := read_repeated(path):
        return replace(_check(repeated.recipe, SpecText(str(path))), repeated=repeated)
    return parse_spec(read_text(path, absent="no such spec file"), file=str(path))


def parse_spec(text: str, *, file: str = "spec") -> MergeSpec:
    """Read and check a spec from YAML text.

    Raises:
        SpecError: as for load_spec.
    """
    duplicates: list[SpecError] = []
    raw, source = parse_yaml(text, file=file, mistakes=duplicates)
    if not isinstance(raw, dict):
        raise source.error((), f"found {describe(raw)}, expected a mapping with `merge_method`")
    return _check(raw, source, duplicates)


def _check(
    raw: dict[str, Any], source: SpecText, duplicates: Sequence[SpecError] = ()
) -> MergeSpec:
    mistakes = Mistakes(source)
    mistakes.found += duplicates
    for key in [key for key in raw if key in _NOT_YET]:
        said = f"a mergekit key that is not supported: {_NOT_YET[key]}"
        mistakes.found.append(source.error((key,), said, at_key=True))
    method = mistakes.attempt(partial(_method, raw, source), None)
    raw, notes = without_inert(raw, uses_base=method is not None and method.uses_base)
    known = {key: value for key, value in raw.items() if key not in _NOT_YET}
    if "slices" in raw:
        known.setdefault("models", _STAND_INS["models"])
    document, problems = validated(SpecDocument, known, _STAND_INS)
    mistakes.found += explained(problems, raw, source, method)
    if document is None:
        mistakes.refuse()
        raise AssertionError("a document that is not valid has problems")
    rename = mistakes.attempt(partial(parse_rename, document.rename, ("rename",)), Rename())
    policies = {
        key: mistakes.attempt(
            partial(parse_policy, getattr(document, key), words, (key,)), Setting()
        )
        for key, words in _POLICIES.items()
    }
    base = mistakes.attempt(partial(_base, document, source), None)
    models: tuple[ModelSpec, ...] = ()
    settings: Mapping[str, Setting] = {}
    modifiers: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    if method is not None:
        models = _models(document, method, mistakes, are_all=not problems)
        read = partial(
            parameter_settings, document.parameters, method, ("parameters",), of_model=False
        )
        settings = mistakes.attempt(read, settings)
    if method is not None and not problems:
        mistakes.attempt(partial(_check_base, document, method, source), None)
        mistakes.found += _wrong_sources(document, source)
        modifiers = mistakes.attempt(partial(_modifiers, document, method, source), modifiers)
    mistakes.refuse()
    assert method is not None
    return MergeSpec(
        document=document,
        method=method,
        base=base,
        models=models,
        settings=settings,
        modifiers=modifiers,
        rename=rename,
        source=source,
        notes=tuple(notes),
        missing=policies["missing"],
        extra=policies["extra"],
        unequal=policies["unequal"],
        other_files=policies["other_files"],
    )


def _method(raw: Mapping[str, Any], source: SpecText) -> MergeMethod | None:
    """Return the method; None where there is no name, which is told with the keys."""
    name = raw.get("merge_method")
    if not isinstance(name, str):
        return None
    try:
        method = find_method(name)
    except SpecError as error:
        raise source.error(("merge_method",), str(error)) from error
    if method.space == "merged":
        raise source.error(
            ("merge_method",), f"{method.name} changes what a method has merged: see `modifiers`"
        )
    return method


def _check_base(document: SpecDocument, method: MergeMethod, source: SpecText) -> None:
    if method.uses_base and document.base_model is None:
        raise source.error(
            (), f"`base_model` is missing: {method.name} works on differences from a base model"
        )


def _wrong_sources(document: SpecDocument, source: SpecText) -> Iterator[SpecError]:
    entries = [document.base_model] if document.base_model else []
    known = ["base", *(entry.model for entry in (*entries, *document.models))]
    for key in ("config_source", "tokenizer_source", "processor_source"):
        wanted = getattr(document, key)
        if wanted is not None and wanted not in known:
            is_union = (key, wanted) == ("tokenizer_source", "union")
            advice = (
                ": here it is `vocabulary: union`" if is_union else f". {suggest(wanted, known)}"
            )
            yield source.error((key,), f"{quoted(wanted)} is none of the models{advice}")


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
    document: SpecDocument, method: MergeMethod, mistakes: Mistakes, *, are_all: bool
) -> tuple[ModelSpec, ...]:
    """Return the merged models.

    Args:
        are_all: no entry of the spec is wrong, so that their number can be.
    """
    source = mistakes.source
    models: list[ModelSpec] = []
    places: dict[str, int] = {}
    base = _identity(document.base_model.model) if document.base_model else None
    for index, entry in enumerate(document.models):
        path: SpecPath = ("models", index)
        is_base = False
        if entry.model != _STAND_IN:
            one = partial(_is_base, entry, base, places, path, source)
            is_base = mistakes.attempt(one, False)
        if is_base:
            mistakes.attempt(partial(_refuse_on_base, entry, method, path, source), None)
            if method.uses_base:
                continue
        read = partial(
            parameter_settings, entry.parameters, method, (*path, "parameters"), of_model=True
        )
        models.append(
            ModelSpec(
                reference=entry.model,
                path=path,
                rename=mistakes.attempt(
                    partial(parse_rename, entry.rename, (*path, "rename")), Rename()
                ),
                settings=mistakes.attempt(read, {}),
                missing=mistakes.attempt(
                    partial(parse_policy, entry.missing, MISSING, (*path, "missing")), Setting()
                ),
                extra=mistakes.attempt(
                    partial(parse_policy, entry.extra, EXTRA, (*path, "extra")), Setting()
                ),
                auxiliary=mistakes.attempt(partial(_auxiliary, entry, method, path, source), {}),
            )
        )
    if are_all:
        mistakes.attempt(partial(_check_number, len(models), method, source), None)
    return tuple(models)


def _is_base(
    entry: ModelEntry,
    base: str | None,
    places: dict[str, int],
    path: SpecPath,
    source: SpecText,
) -> bool:
    """Tell whether an entry is the base model; note it among those that there are."""
    try:
        identity = _identity(entry.model)
    except OutlierMergeError as error:
        raise source.error((*path, "model"), str(error)) from error
    index = int(path[-1])
    if (first := places.setdefault(identity, index)) != index:
        raise source.error(
            (*path, "model"), f"{quoted(entry.model)} stands twice, first as models[{first}]"
        )
    return identity == base


def _check_number(number: int, method: MergeMethod, source: SpecText) -> None:
    least, most = method.min_models, method.max_models
    if number >= least and (most is None or number <= most):
        return
    wanted = f"at least {least}" if most is None else f"{least} to {most}"
    wanted = str(least) if most == least else wanted
    besides = " besides the base model" if method.uses_base else ""
    raise source.error(
        ("models",), f"{method.name} takes {wanted} model(s){besides}, found {number}"
    )


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
    if entry.parameters and method.uses_base:
        raise source.error(
            (*path, "parameters"),
            f"{quoted(entry.model)} is the base model: it has no task vector, "
            "so its parameters have no effect. Remove them.",
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
