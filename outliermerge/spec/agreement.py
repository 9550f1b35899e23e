"""What the keys of a spec must have in common: its method, its models and its modifiers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from outliermerge.errors import SpecError, quoted, suggest
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import METHODS, MODIFIERS, find_method
from outliermerge.spec.convert import IN_MEMORY
from outliermerge.spec.document import SlicedDocument, SpecDocument, references
from outliermerge.spec.settings import SpecPath
from outliermerge.spec.text import SpecText

_OTHER_COMMANDS = {
    "donor": "the recipe of a transplant: run the command `outliermerge tokenizer transplant …` "
    "that recipe.yaml begins with",
    "experts": "a file for mergekit-moe: run it with `outliermerge moe FILE DIR`",
    "model_type": "a model's config.json, not a spec: write one with `merge_method` and `models`",
    "genome": "a file for mergekit-evolve: `outliermerge search` searches a spec's parameters, "
    "models and layers; write the genome as a spec and a space",
}
"""By a key that no merge has: what a file with it is, and what to do with it."""


def check_base(document: SpecDocument, method: MergeMethod, source: SpecText) -> None:
    """Raise SpecError if a method's base model is missing."""
    if method.needs_base and document.base_model is None:
        why = "works on differences from" if method.uses_base else "merges a model with"
        raise source.error((), f"`base_model` is missing: {method.name} {why} a base model")


def names_of(document: SpecDocument) -> list[str]:
    """Return the models of a spec, the base model first."""
    base = [document.base_model.model] if document.base_model else []
    return [*base, *references(document.model_dump())]


def wrong_sources(document: SpecDocument, source: SpecText) -> Iterator[SpecError]:
    """Yield an error for each file's owner that is none of the models, and for a stack of none."""
    if document.stack is not None and not isinstance(document, SlicedDocument):
        said = "`stack` names the layers that `slices` are of; without them it has no effect"
        yield source.error(("stack",), said, at_key=True)
    known = ["base", *names_of(document)]
    for key in ("config_source", "processor_source"):
        wanted = getattr(document, key)
        if wanted is not None and wanted not in known:
            said = f"{quoted(wanted)} is none of the models. {suggest(wanted, known)}"
            yield source.error((key,), said)
    layouts = [IN_MEMORY, *names_of(document)]
    if document.layout is not None and document.layout not in layouts:
        said = f"{quoted(document.layout)} is neither {IN_MEMORY!r} nor one of the models."
        yield source.error(("layout",), f"{said} {suggest(document.layout, layouts)}")


def modifiers_of(
    document: SpecDocument, method: MergeMethod, source: SpecText
) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Return the modifiers with their resolved parameters; raise SpecError for one that is none."""
    found = []
    for index, entry in enumerate(document.modifiers):
        path: SpecPath = ("modifiers", index)
        if not method.uses_base:
            raise source.error(
                path,
                f"{method.name} merges weights, and modifiers change task vectors: take a method "
                "that has them, such as task_arithmetic",
            )
        try:
            if not (":" in entry.modifier or entry.modifier in METHODS.keys() | MODIFIERS):
                said = f"unknown modifier {quoted(entry.modifier)}."
                raise SpecError(f"{said} {suggest(entry.modifier, MODIFIERS)}")
            modifier = find_method(entry.modifier)
            if modifier.space != "merged":
                raise SpecError(f"{modifier.name} is a merge method, not a modifier")
        except SpecError as error:
            raise source.error(path, str(error)) from error
        try:
            found.append((entry.modifier, modifier.resolve(1, entry.parameters)))
        except SpecError as error:
            place = (*path, *_wrong(modifier, entry.parameters))
            raise source.error(place, str(error)) from error
    return tuple(found)


def _wrong(modifier: MergeMethod, given: Mapping[str, Any]) -> SpecPath:
    """Return where in a modifier's entry a parameter is wrong by itself; nothing if none is."""
    for name, value in given.items():
        try:
            modifier.resolve(1, {name: value})
        except SpecError:
            return ("parameters", name)
    return ()


def method_of(raw: Mapping[str, Any], source: SpecText) -> MergeMethod | None:
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


def check_command(raw: Mapping[str, Any], source: SpecText) -> None:
    """Refuse a file that another command runs."""
    for key, said in _OTHER_COMMANDS.items():
        if key in raw and raw.get("merge_method", "moe") in ("moe", "transplant"):
            raise source.error((key,), said, at_key=True)
