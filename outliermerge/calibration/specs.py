"""What is common to merges that are made in memory while they run over data: their specs."""

from __future__ import annotations

from typing import Any

from outliermerge.errors import SpecError
from outliermerge.spec.check import MergeSpec


def refuse_all_but_models(spec: MergeSpec, what: str) -> None:
    """Refuse a spec of more than whole models.

    Raises:
        SpecError: it has slices, modules, stages, other vocabularies or other names.
    """
    document = spec.document
    if spec.slices or spec.modules or spec.stages or document.tokenizer or document.vocabulary:
        raise SpecError(
            f"{spec.source.file}: {what} is for plain `models`, without slices, modules, stages "
            "and other vocabularies"
        )
    every = (*spec.models, *([spec.base] if spec.base else []))
    if any(model.rename.rules for model in every):
        raise SpecError(f"{spec.source.file}: {what} takes models without `rename`")


def plain_values(spec: MergeSpec, name: str) -> list[Any]:
    """Return a parameter's value for each model.

    Raises:
        SpecError: it is given by filters, or by layer.
    """
    found = []
    for model in spec.models:
        levels = (model.settings, spec.settings)
        setting = next((level[name] for level in levels if name in level), None)
        if setting is None or not setting.entries:
            found.append(spec.method.parameters[name].default)
            continue
        entry = setting.entries[0]
        if entry.filter is not None or entry.at(0.0) != entry.at(1.0):
            raise SpecError(
                f"{spec.source.file}: {name}: found filters or several values, expected one number "
                "here"
            )
        found.append(entry.at(0.0))
    return found
