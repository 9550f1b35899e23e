"""The slices of a spec: which layers of which models make the next layers of the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from outliermerge.errors import SpecError, quoted
from outliermerge.methods.contract import MergeMethod
from outliermerge.spec.document import ModelEntry, SliceEntry, SourceEntry, SpecDocument
from outliermerge.spec.models import STAND_IN, ModelSpec, identity, models_of
from outliermerge.spec.parameters import parameter_settings
from outliermerge.spec.settings import Setting, SpecPath
from outliermerge.spec.text import Mistakes, SpecText


@dataclass(frozen=True)
class SliceSpec:
    """A slice: layers of some models, which are merged into as many layers of the output.

    Attributes:
        models: the merged models, in order, with their settings in this slice.
        ranges: by model the first of its layers, and the one after the last; the base's too.
        first: the model that gives names and shapes.
        settings: the settings of the slice, which go before those of the whole merge.
        path: the slice's place in the spec.
    """

    models: tuple[ModelSpec, ...]
    ranges: Mapping[str, tuple[int, int]]
    first: str
    settings: Mapping[str, Setting]
    path: SpecPath

    @property
    def num_layers(self) -> int:
        start, stop = self.ranges[self.first]
        return stop - start


def with_base_of_slices(raw: dict[str, Any], source: SpecText) -> dict[str, Any]:
    """Return a spec whose `base_model` is at the top, where slices name it, as mergekit's may.

    Raises:
        SpecError: slices have different base models.
    """
    slices = raw.get("slices")
    entries = slices if isinstance(slices, list) else []
    named = [
        (("slices", index, "base_model"), entry["base_model"])
        for index, entry in enumerate(entries)
        if isinstance(entry, dict) and entry.get("base_model") is not None
    ]
    if not named:
        return raw
    top = raw.get("base_model")
    wanted = named[0][1] if top is None else top
    for path, name in named:
        if name != wanted:
            raise source.error(
                path, f"found {quoted(name)}, but another base model is {quoted(wanted)}: all "
                "slices have the same one here"
            )  # fmt: skip
    if top is None and len(named) < len(entries):
        lacking = next(i for i, e in enumerate(entries) if not isinstance(e, dict) or
                       e.get("base_model") is None)  # fmt: skip
        raise source.error(
            ("slices", lacking),
            "has no `base_model`, as other slices have: write it at the top, for all slices",
        )
    kept = [
        {key: value for key, value in entry.items() if key != "base_model"}
        if isinstance(entry, dict)
        else entry
        for entry in entries
    ]
    return raw | {"slices": kept, "base_model": wanted}


def slices_of(
    document: SpecDocument,
    method: MergeMethod,
    base: ModelSpec | None,
    mistakes: Mistakes,
    *,
    are_all: bool,
) -> tuple[SliceSpec, ...]:
    """Return the slices of a spec.

    Args:
        are_all: no entry of the spec is wrong, so that the number of models can be.
    """
    source = mistakes.source
    if method.auxiliary and document.slices:
        mistakes.found.append(
            source.error(
                ("slices",),
                f"{method.name} needs auxiliary tensors ({', '.join(method.auxiliary)}), which "
                "slices cannot name: give whole `models`",
                at_key=True,
            )
        )
        method = replace(method, auxiliary=())
    found = []
    for index, entry in enumerate(document.slices):
        one = _slice(entry, ("slices", index), method, base, mistakes, are_all=are_all)
        if one is not None:
            found.append(one)
    return tuple(found)


def models_of_slices(slices: tuple[SliceSpec, ...]) -> tuple[ModelSpec, ...]:
    """Return every merged model of some slices once; what slices say of it is left to them."""
    found: dict[str, ModelSpec] = {}
    for model in (model for one in slices for model in one.models):
        found.setdefault(model.reference, model if not model.settings else replace(
            model, settings={}
        ))  # fmt: skip
    return tuple(found.values())


def _slice(
    entry: SliceEntry,
    path: SpecPath,
    method: MergeMethod,
    base: ModelSpec | None,
    mistakes: Mistakes,
    *,
    are_all: bool,
) -> SliceSpec | None:
    source, where = mistakes.source, (*path, "sources")
    entries = [ModelEntry(model=e.model, parameters=e.parameters) for e in entry.sources]
    models = models_of(entries, method, base, mistakes, at=where, are_all=are_all)
    settings = parameter_settings(
        entry.parameters, method, (*path, "parameters"), mistakes, of_model=False
    )
    wrong = list(_wrong_ranges(entry.sources, where, source))
    mistakes.found += wrong
    if wrong or not entry.sources or any(e.model == STAND_IN for e in entry.sources):
        return None
    is_base = [base and identity(e.model) == identity(base.reference) for e in entry.sources]
    named = [base.reference if base and same else e.model
             for same, e in zip(is_base, entry.sources, strict=True)]  # fmt: skip
    ranges = {
        name: (e.layer_range[0], e.layer_range[1])
        for name, e in zip(named, entry.sources, strict=True)
    }
    first = named[0]
    if base is not None:
        matters = method.needs_base or method.base_as in ("first", "model")
        in_it = base.reference in named
        if not in_it and matters and len(set(ranges.values())) > 1:
            mistakes.found.append(
                source.error(
                    where,
                    f"the base model {quoted(base.reference)} is not among the sources, whose "
                    "ranges differ: list it with its own `layer_range`",
                )
            )
            return None
        if not in_it and matters:
            ranges[base.reference] = ranges[first]
        if in_it or matters:
            first = base.reference
    return SliceSpec(models, ranges, first, settings, path)


def _wrong_ranges(
    sources: list[SourceEntry], path: SpecPath, source: SpecText
) -> Iterator[SpecError]:
    for index, entry in enumerate(sources):
        where = (*path, index, "layer_range")
        start, stop = entry.layer_range
        if start < 0 or stop < 0:
            yield source.error(where, f"found {entry.layer_range}: layers are counted from 0")
        elif start >= stop:
            what = "an empty range" if start == stop else "a reversed range"
            yield source.error(
                where,
                f"found {entry.layer_range}, {what}: [a, b] takes the layers a to b - 1",
            )
    lengths = [stop - start for start, stop in (entry.layer_range for entry in sources)]
    if len(set(lengths)) > 1 and min(lengths) > 0:
        said = ", ".join(map(str, lengths))
        yield source.error(
            path, f"found ranges of {said} layers, expected the same number of all sources"
        )
