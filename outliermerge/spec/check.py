"""Checks the YAML spec strictly; its vocabulary is mergekit's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from outliermerge.arguments import checked, wrong
from outliermerge.display import short_repr
from outliermerge.errors import SpecError, as_path, shown
from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import meant_method, method_named
from outliermerge.spec.agreement import (
    check_base,
    check_command,
    method_of,
    modifiers_of,
    names_of,
    wrong_sources,
)
from outliermerge.spec.chat_templates import check_template_name
from outliermerge.spec.convert import Conversion, parse_conversions
from outliermerge.spec.document import (
    EXTRA,
    MISSING,
    OTHER_FILES,
    UNEQUAL,
    SlicedDocument,
    SpecDocument,
)
from outliermerge.spec.explained import explained
from outliermerge.spec.inert import without_inert
from outliermerge.spec.models import STAND_IN, ModelSpec, base_of, check_required, models_of
from outliermerge.spec.modules import KEEP, MODULES, OF_WHOLE, keep_of, split
from outliermerge.spec.parameters import parameter_settings
from outliermerge.spec.quantize import check_quantize
from outliermerge.spec.rename import Rename, parse_rename
from outliermerge.spec.repeated import Repeated, read_repeated
from outliermerge.spec.settings import Setting, parse_policy
from outliermerge.spec.slices import SliceSpec, models_of_slices, slices_of, with_base_of_slices
from outliermerge.spec.stages import NAME, STAGES, in_order, models_named, one_document, stage_of
from outliermerge.spec.text import (
    Mistakes,
    SpecText,
    as_mapping,
    as_yaml,
    parse_documents,
    read_text,
)
from outliermerge.spec.tokenizer import TokenizerRequest, plain_reference, tokenizer_request
from outliermerge.spec.validation import validated
from outliermerge.storage.addresses import shown_in

_POLICIES = {"missing": MISSING, "extra": EXTRA, "unequal": UNEQUAL, "other_files": OTHER_FILES}
# What stands for a required value that is wrong, so that the rest of the file can be checked.
_STAND_INS = {"merge_method": "", "model": STAND_IN, "models": [{"model": STAND_IN}],
              "modifier": STAND_IN, "layer_range": [0, 1],
              "sources": [{"model": STAND_IN, "layer_range": [0, 1]}]}  # fmt: skip


@dataclass(frozen=True)
class ModuleSpec:
    """A part of the base model that is merged by itself.

    Attributes:
        keep: filters for tensors that stay the base model's.
        merge: the merge.
        has_own_base: its base model is not that of the whole spec.
    """

    keep: tuple[str, ...]
    merge: MergeSpec
    has_own_base: bool


@dataclass(frozen=True)
class MergeSpec:
    """A spec that has been checked.

    Attributes:
        document: the spec as it was written.
        method: the merge method; the one that takes its place if there is a base model.
        base: the base model, or None.
        models: the merged models, in order; without the base for methods on task vectors.
            Of slices each model once.
        slices: the slices, if layers are merged instead of whole models.
        settings: global parameter settings.
        modifiers: the modifiers of the merged task vector: names and resolved parameters.
        rename: the rename for the output's tensors.
        conversions: rules for tensors that one model has apart and another together.
        missing, extra, unequal: policies for all models.
        other_files: the policy for files of tensors that are not read.
        tokenizer: the tokenizer whose tokens decide which rows the output has, or None.
        source: the file and text of the spec, for messages.
        notes: what in the spec has no effect.
        warnings: what has no effect, as mergekit passes over it: where, and what was meant.
        repeated: the merge that this one repeats, if the spec is a manifest.
        stages: by name the merges of this file that models of this one name.
        modules: by name of a part of the base model its merge; the rest of the base is copied.
    """

    document: SpecDocument
    method: MergeMethod
    base: ModelSpec | None
    models: tuple[ModelSpec, ...]
    source: SpecText
    settings: Mapping[str, Setting] = field(default_factory=dict)
    modifiers: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    rename: Rename = field(default_factory=Rename)
    conversions: tuple[Conversion, ...] = ()
    missing: Setting = field(default_factory=Setting)
    extra: Setting = field(default_factory=Setting)
    unequal: Setting = field(default_factory=Setting)
    other_files: Setting = field(default_factory=Setting)
    tokenizer: TokenizerRequest | None = None
    slices: tuple[SliceSpec, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    repeated: Repeated | None = None
    stages: Mapping[str, MergeSpec] = field(default_factory=dict)
    modules: Mapping[str, ModuleSpec] = field(default_factory=dict)

    def __repr__(self) -> str:
        return short_repr(self, self.in_a_line)

    @property
    def command(self) -> str:
        """The command that runs it."""
        return "run"

    @property
    def summary(self) -> str:
        """What its method does, in a line."""
        return "Each part has a merge of its own." if self.modules else self.method.summary

    @property
    def title(self) -> str:
        """Its method, or what it is instead."""
        return MODULES if self.modules else self.method.name

    @property
    def in_a_line(self) -> str:
        """The method and the models, for a person."""
        if self.modules and self.base:
            parts = "; ".join(f"{n}: {m.merge.in_a_line}" for n, m in self.modules.items())
            return f"{self.base.reference} with {parts}"
        models = ", ".join(model.reference for model in self.models)
        onto = f" onto {self.base.reference}" if self.base else ""
        return f"{self.method.name} of {models}{onto}"

    @property
    def tokenizer_owner(self) -> str | None:
        """The model whose tokenizer files the output has; None for the base."""
        if self.tokenizer is None:
            return plain_reference(self.document.tokenizer_source)
        return None if self.tokenizer.is_union else self.tokenizer.source

    def method_for(self, parameters: Mapping[str, Any], context: Context) -> str:
        """Return what `find_method` finds a tensor's method by; a copy has no parameters."""
        method = self.method.of(parameters, context) if parameters else self.method
        named = self.document.merge_method
        return named if method is method_named(named) else method.path

    @property
    def all_stages(self) -> dict[str, MergeSpec]:
        """The stages that this merge is made of, each after those that it uses."""
        found: dict[str, MergeSpec] = {}

        def visit(spec: MergeSpec) -> None:
            for module in spec.modules.values():
                visit(module.merge)
            for name, stage in spec.stages.items():
                if name not in found:
                    visit(stage)
                    found[name] = stage

        visit(self)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values, without keys that have their default."""
        stages = [{NAME: name} | stage._own() for name, stage in self.all_stages.items()]
        return ({STAGES: stages} if stages else {}) | self._own()

    def _own(self) -> dict[str, Any]:
        own = self.document.model_dump(mode="json", exclude_defaults=True)
        if self.document.tokenizer is not None:  # said also where it is the default
            own["tokenizer"] = {"source": self.document.tokenizer.source} | own["tokenizer"]
        if not self.modules:
            return own
        found = {}
        for name, module in self.modules.items():
            entry = {k: v for k, v in module.merge._own().items() if k not in OF_WHOLE}
            base = entry.pop("base_model", None)
            own_base = {"base_model": base} if module.has_own_base else {}
            found[name] = own_base | entry | ({KEEP: list(module.keep)} if module.keep else {})
        return {k: v for k, v in own.items() if k not in ("merge_method", "models")} | {
            MODULES: found
        }

    def with_seed(self, seed: int) -> MergeSpec:
        """Return the merge with another seed, in its stages and modules, too."""
        return replace(
            self,
            document=self.document.model_copy(update={"seed": seed}),
            stages={name: stage.with_seed(seed) for name, stage in self.stages.items()},
            modules={
                name: replace(module, merge=module.merge.with_seed(seed))
                for name, module in self.modules.items()
            },
        )

    def as_yaml(self) -> str:
        """Return the spec as YAML."""
        return as_yaml(self.as_dict())


@checked
def load_spec(spec: str | Path | Mapping[str, Any], *, lenient: bool = False) -> MergeSpec:
    """Read and check a spec from a YAML file, from a dict, or from an output's manifest.

    Args:
        lenient: go on without what mergekit passes over in silence, such as unknown keys, and warn
            of it.

    Raises:
        SpecError: the spec cannot be read, or something in it is unknown, has a wrong type or is
            out of range. The message starts with file, line and column.
    """
    if isinstance(spec, Mapping):
        whole = SpecText("spec", lenient=lenient, is_python=True)
        return _check(*one_document([(shown_in(dict(spec)), whole)]))
    if not isinstance(spec, (str, Path)):
        raise wrong("spec", spec, "a YAML file or a dict")
    if isinstance(spec, str) and "\n" in spec:
        raise SpecError("found YAML text, expected a path or a dict: give yaml.safe_load(text)")
    path = as_path(spec)
    if repeated := read_repeated(path):
        return replace(_check(dict(repeated.recipe), SpecText(str(path))), repeated=repeated)
    text = read_text(path, absent="no such spec file")
    return parse_spec(text, file=str(path), lenient=lenient)


def parse_spec(text: str, *, file: str = "spec", lenient: bool = False) -> MergeSpec:
    """Read and check a spec from YAML text.

    Raises:
        SpecError: as for load_spec.
    """
    duplicates: list[SpecError] = []
    documents = parse_documents(text, file=file, mistakes=duplicates)
    for each in documents or [(None, SpecText(file))]:
        as_mapping(*each, "merge_method")
    raw, source = one_document(documents)
    return _check(raw, replace(source, lenient=lenient), duplicates)


def _check(
    raw: dict[str, Any], source: SpecText, duplicates: Sequence[SpecError] = ()
) -> MergeSpec:
    """Check a merge and its stages."""
    check_command(raw, source)
    mistakes = Mistakes(source)
    for duplicate in duplicates:
        mistakes.add(duplicate)
    stages: dict[str, MergeSpec] = {}
    for name, index in in_order(raw, mistakes):
        entry, path = dict(raw[STAGES][index]), (STAGES, index)
        del entry[NAME]
        for key in ("output", "format", "quantize", "rounding", STAGES):
            if entry.pop(key, None) is not None:
                said = f"a stage has no `{key}`: it belongs to the merge of the output"
                mistakes.add(source.error((*path, key), said, at_key=True))
        try:
            of_stage = source.part(path, said=f"stage {shown(name)}: ")
            stages[name] = _check_merge(entry, Mistakes(of_stage), stages)
        except SpecError as error:
            mistakes.found += error.all or [error]
    own = {key: value for key, value in raw.items() if key != STAGES}
    return _check_merge(own, mistakes, stages)


def _check_merge(
    raw: dict[str, Any], mistakes: Mistakes, stages: Mapping[str, MergeSpec]
) -> MergeSpec:
    if MODULES in raw:
        return _check_modules(raw, mistakes, stages)
    source = mistakes.source
    used = {stage_of(reference, stages) for _, reference in models_named(raw)}
    stages = {name: stage for name, stage in stages.items() if name in used}
    method = mistakes.attempt(partial(method_of, raw, source), None)
    if method is None and isinstance(name := raw.get("merge_method"), str):
        method = meant_method(name)  # so that the rest of the file is checked, too
    raw = mistakes.attempt(partial(with_base_of_slices, raw, source), raw)
    raw, notes = without_inert(raw, method, averages_base=source.lenient)
    known = dict(raw)
    is_sliced = "slices" in known
    if is_sliced and known.pop("models", None) is not None:
        said = "`slices` and `models` stand beside each other, expected one of the two"
        mistakes.found.append(source.error(("slices",), said, at_key=True))
    kind = SlicedDocument if is_sliced else SpecDocument
    document, problems = validated(kind, known, _STAND_INS)
    num_others = len(mistakes.found)
    for problem in explained(problems, raw, source, method):
        mistakes.add(problem)
    is_whole = len(mistakes.found) == num_others
    if document is None:
        mistakes.refuse()
        raise AssertionError("a document that is not valid has problems")
    rename = mistakes.attempt(partial(parse_rename, document.rename, ("rename",)), Rename())
    conversions = mistakes.attempt(
        partial(parse_conversions, document.convert, ("convert",)), tuple[Conversion, ...]()
    )
    policies = {}
    for key, words in _POLICIES.items():
        policy = partial(parse_policy, getattr(document, key), words, (key,))
        policies[key] = mistakes.attempt(policy, Setting())
    base = mistakes.attempt(partial(base_of, document, source), None)
    if method is not None and document.base_model is not None:
        method = method.with_base or method
    models: tuple[ModelSpec, ...] = ()
    slices: tuple[SliceSpec, ...] = ()
    tokenizer: TokenizerRequest | None = None
    settings: Mapping[str, Setting] = {}
    modifiers: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    if method is not None:
        if is_sliced:
            slices = slices_of(document, method, base, mistakes, are_all=is_whole)
            models = models_of_slices(slices)
        else:
            models = models_of(document.models, method, base, mistakes, are_all=is_whole)
        of_all = document.parameters
        settings = parameter_settings(of_all, method, ("parameters",), mistakes, of_model=False)
        for one in slices:
            notes += check_required(method, {**settings, **one.settings}, one.models, mistakes)
        if not is_sliced:
            notes += check_required(method, settings, models, mistakes)
    if method is not None and is_whole:
        mistakes.attempt(partial(check_base, document, method, source), None)
        mistakes.found += wrong_sources(document, source)
        modifiers = mistakes.attempt(partial(modifiers_of, document, method, source), modifiers)
    if is_whole:
        request = partial(
            tokenizer_request, document.tokenizer, document.tokenizer_source, document.vocabulary,
            names_of(document), mistakes.add,
        )  # fmt: skip
        tokenizer = mistakes.attempt(request, None)
        mistakes.attempt(partial(check_template_name, document.chat_template), None)
        mistakes.attempt(partial(check_quantize, document.quantize, document.format), None)
    mistakes.refuse()
    assert method is not None
    return MergeSpec(
        document=document.without(mistakes.passed_over()),
        method=method,
        base=base,
        models=models,
        settings=settings,
        modifiers=modifiers,
        rename=rename,
        conversions=conversions,
        tokenizer=tokenizer,
        source=source,
        slices=slices,
        notes=tuple(dict.fromkeys(notes)),
        warnings=mistakes.warned(),
        missing=policies["missing"],
        extra=policies["extra"],
        unequal=policies["unequal"],
        other_files=policies["other_files"],
        stages=stages,
    )


def _check_modules(
    raw: dict[str, Any], mistakes: Mistakes, stages: Mapping[str, MergeSpec]
) -> MergeSpec:
    """Check a spec with modules: a copy of its base model, in which parts are merges."""
    outer, entries = split(raw, mistakes)
    modules: dict[str, ModuleSpec] = {}
    for name, (entry, text) in entries.items():
        written = raw[MODULES][name]
        keep = mistakes.attempt(partial(keep_of, written, (MODULES, name, KEEP)), tuple[str, ...]())
        try:
            merge = _check_merge(entry, Mistakes(text), stages)
        except SpecError as error:
            mistakes.found += error.all or [error]
            continue
        own_base = written.get("base_model", raw.get("base_model")) != raw.get("base_model")
        if own_base and merge.slices:
            said = "slices of a module are of the base model of the whole merge: leave this out"
            mistakes.found.append(text.error(("base_model",), said, at_key=True))
        modules[name] = ModuleSpec(keep, merge, own_base)
    if not isinstance(outer["models"][0]["model"], str):
        mistakes.refuse()
    return replace(_check_merge(outer, mistakes, stages), modules=modules)
