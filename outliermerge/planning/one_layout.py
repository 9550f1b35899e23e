"""Brings models into one layout: the same weights packed or apart, fused or split, turned."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.planning.conversion import (
    Converted,
    Leaf,
    converted,
    grounded,
    leaves_of,
    solved,
    text_at,
)
from outliermerge.planning.known_conversions import Known, Rule, Step, known_of
from outliermerge.planning.plan import Input
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.convert import IN_MEMORY, Conversion
from outliermerge.spec.settings import SettingError

_CONFIG = "config.json"


@dataclass(frozen=True)
class _Model:
    """A model, its config, and what is known of how its tensors are converted."""

    entry: Input
    config: Mapping[str, Any]
    known: Known

    @property
    def tensors(self) -> Mapping[str, Source]:
        return self.entry.checkpoint.tensors


def in_one_layout(spec: MergeSpec, inputs: Sequence[Input]) -> list[Input]:
    """Return the models in the layout of the first one, or in the one that the spec names.

    Raises:
        SettingError: a rule of `convert` matches no tensor.
        OutlierMergeError: tensors are to be converted, and cannot be.
    """
    rules = tuple(map(_rule, spec.conversions))
    for rule, written in zip(rules, () if spec.modules else spec.conversions, strict=False):
        _check_used(rule, written, inputs)
    first, *others = inputs
    layout = spec.document.layout
    if layout == IN_MEMORY:
        first = _as_in_memory(_model(first, rules))
    elif layout is not None:
        wanted = next(entry for entry in inputs if entry.reference == layout)
        first = _like(_model(wanted, rules), first, rules)
    reference: _Model | None = None
    found = [first]
    for entry in others:
        if _differ(first, entry):
            reference = reference or _model(first, rules)
            entry = _like(reference, entry, rules)
            if spec.slices:
                _refuse_mixture(reference, entry)
        found.append(entry)
    return found


def _differ(one: Input, other: Input) -> bool:
    """Tell whether each of two models has tensors that the other lacks."""
    ours, theirs = one.checkpoint.tensors, other.checkpoint.tensors
    if ours is theirs or ours.keys() == theirs.keys():
        return any(source.shape != theirs[name].shape for name, source in ours.items())
    return bool(ours.keys() - theirs.keys() and theirs.keys() - ours.keys()) or any(
        source.shape != theirs[name].shape for name, source in ours.items() if name in theirs
    )


def _model(entry: Input, rules: tuple[Rule, ...], other: _Model | None = None) -> _Model:
    """Return a model with what is known of it; one without a model type is taken as another."""
    config: Mapping[str, Any] = read_json(entry.home / _CONFIG) if entry.home.is_dir() else {}
    if other is not None and not config.get("model_type"):
        config = other.config
    known = known_of(config)
    return _Model(entry, config, replace(known, rules=(*rules, *known.rules)))


def _like(reference: _Model, entry: Input, rules: tuple[Rule, ...]) -> Input:
    """Return a model with the names and shapes of the reference, as far as they are the same."""
    model = _model(entry, rules, reference)
    if not (model.known.rules or model.known.renamings):
        return entry
    ours, theirs = model.tensors, reference.tensors
    shapes = {name: source.shape for name, source in ours.items()}
    own_shapes = {name: source.shape for name, source in theirs.items()}
    lacking = {n: s for n, s in theirs.items() if shapes.get(n) != s.shape}
    others = {n: s for n, s in ours.items() if own_shapes.get(n) != s.shape}
    there = converted(lacking, reference.known, reference.config, shapes | own_shapes)
    in_theirs = {name: source.shape for name, source in there.tensors.items()}
    here = converted(others, model.known, model.config, shapes | own_shapes | in_theirs)
    _refuse_failed(model, here, there)
    _refuse_failed(reference, there, here)
    _refuse_misfits(model, reference, here, there)
    paired = _wholly_paired(here, there)
    if not paired:
        return entry
    names = [name for name in there.tensors if name in paired]
    _refuse_unclear(model, here, names, own_shapes)
    described = {name: there.tensors[name] for name in names}
    found = solved(described, {name: here.tensors[name] for name in names})
    used = {leaf.name for name in names for leaf in leaves_of(here.tensors[name])}
    return _changed(entry, found, used, _labels(here, there, names), order=theirs)


def _labels(here: Converted, there: Converted, names: Collection[str]) -> list[str]:
    rules = (side.rules[name] for side in (here, there) for name in names if name in side.rules)
    return list(dict.fromkeys(rule.label for rule in rules))


def _wholly_paired(here: Converted, there: Converted) -> set[str]:
    """Return the tensors in memory that both models give, and that leave nothing of a tensor."""
    sides = (here.tensors, there.tensors)
    names = {
        name
        for name, source in here.tensors.items()
        if name in there.tensors and source.shape == there.tensors[name].shape
    }
    of = [
        {name: [leaf.name for leaf in leaves_of(s)] for name, s in side.items()} for side in sides
    ]
    while True:
        left = [{leaf for name, own in side.items() if name not in names for leaf in own}
                for side in of]  # fmt: skip
        unfit = {
            name
            for name in names
            if any(not lost.isdisjoint(side[name]) for side, lost in zip(of, left, strict=True))
        }
        if not unfit:
            return names
        names -= unfit


def _refuse_failed(model: _Model, own: Converted, other: Converted) -> None:
    """Refuse what a rule should make of a model's tensors, because the other has it so."""
    for name, (rule, why) in own.failed.items():
        if name in other.tensors:
            raise OutlierMergeError(
                f"{shown(model.entry.reference)}: {shown(name)} cannot be made of its tensors "
                f"{' and '.join(map(shown, rule.sources))} (conversion {shown(rule.label)}): {why}"
            )


def _refuse_misfits(model: _Model, reference: _Model, here: Converted, there: Converted) -> None:
    for name, source in here.tensors.items():
        other = there.tensors.get(name)
        is_made = name in here.rules or name in there.rules
        if other is not None and is_made and other.shape != source.shape:
            raise OutlierMergeError(
                f"{shown(name)}: {list(other.shape)} in {shown(reference.entry.reference)}, "
                f"{list(source.shape)} in {shown(model.entry.reference)}, where it is made of "
                f"{shown(next(iter(leaves_of(source))).name)} and others or of a part of it. Such "
                "models cannot be merged as they are."
            )


def _refuse_unclear(
    model: _Model, here: Converted, names: Collection[str], own_shapes: Mapping[str, Any]
) -> None:
    """Refuse a square tensor where others like it are transposed: its shape does not tell."""
    turned = {
        here.rules[name].label
        for name in names
        if name in here.rules
        and _is_turned_by_shape(here.rules[name])
        and not isinstance(here.tensors[name], Leaf)
    }
    if not turned:
        return
    rules = [r for r in model.known.rules if r.label in turned and _is_turned_by_shape(r)]
    for name, source in model.tensors.items():
        is_same = own_shapes.get(name) == source.shape
        if is_same and any(rule.match(name) for rule in rules):
            raise OutlierMergeError(
                f"{shown(model.entry.reference)}: {shown(name)} {list(source.shape)} has the same "
                "shape in both layouts, while others like it are transposed: which layout it is "
                "in cannot be told. Load and save the model with transformers' "
                "save_pretrained(FOLDER, save_original_format=False)."
            )


def _is_turned_by_shape(rule: Rule) -> bool:
    return any(step.given.get("check_dims") for step in rule.steps)


def _refuse_mixture(reference: _Model, entry: Input) -> None:
    """Refuse slices of layers that the reference lacks, and that would stay in another layout."""
    own = {name for name in entry.checkpoint.tensors if name not in reference.tensors}
    for name in own:
        if any(rule.match(name) for rule in reference.known.rules):
            raise OutlierMergeError(
                f"{shown(entry.reference)}: {shown(name)} is in another layout than "
                f"{shown(reference.entry.reference)}, which has no such layer: convert the model "
                "first (a merge of it alone, with `layout:`)"
            )


def _changed(
    entry: Input,
    found: Mapping[str, Source],
    used: Collection[str],
    labels: Sequence[str],
    order: Iterable[str],
) -> Input:
    """Return a model with other tensors in the place of those that were used.

    Args:
        order: of the names.
    """
    tensors = {n: s for n, s in entry.checkpoint.tensors.items() if n not in used}
    if twice := tensors.keys() & found.keys():
        raise OutlierMergeError(
            f"{shown(entry.reference)}: has {shown(min(twice))}, and other tensors of which the "
            "same one would be made"
        )
    moved = {
        source.name: name for name, source in found.items() if isinstance(source, Leaf)
    }  # fmt: skip
    tensors |= {name: grounded(source) for name, source in found.items()}
    first = next(iter(found))
    before = next(iter(leaves_of(found[first]))).name
    label = f"conversion {', '.join(labels)}" if labels else "conversion of names"
    ordered = {name: tensors[name] for name in order if name in tensors} | tensors
    checkpoint = replace(entry.checkpoint, tensors=ordered)
    return replace(
        entry,
        checkpoint=checkpoint,
        renamed={**entry.renamed, label: (len(used), before, first)},
        parted=tuple(moved.get(name, name) for name in entry.parted),
        alike=tuple((moved.get(a, a), moved.get(b, b), pair) for a, b, pair in entry.alike),
    )


def _as_in_memory(model: _Model) -> Input:
    """Return a model with its tensors as its class has them in memory."""
    if not (model.known.rules or model.known.renamings):
        raise OutlierMergeError(
            f"`layout: transformers`: no conversion is known of {shown(model.entry.reference)}, "
            f"whose model type is {shown(model.config.get('model_type'))}"
        )
    made = converted(model.tensors, model.known, model.config, {})
    for name in made.failed:
        _refuse_failed(model, made, Converted({name: next(iter(made.tensors.values()))}))
    leaves = {name: Leaf(name, source) for name, source in made.tensors.items()}
    again = converted(leaves, model.known, model.config, {})
    if other := again.tensors.keys() - made.tensors.keys():
        raise OutlierMergeError(
            f"`layout: transformers`: {shown(min(other))} of {shown(model.entry.reference)} could "
            "be in either layout: give a model that has the layout instead"
        )
    found = made.tensors
    if all(isinstance(s, Leaf) and s.name == name for name, s in found.items()):
        return model.entry
    places = {name: place for place, name in enumerate(model.tensors)}
    firsts = {n: min(places[leaf.name] for leaf in leaves_of(s)) for n, s in found.items()}
    labels = list(dict.fromkeys(rule.label for rule in made.rules.values()))
    order = sorted(firsts, key=firsts.__getitem__)
    return _changed(model.entry, found, set(model.tensors), labels, order)


def _check_used(rule: Rule, written: Conversion, inputs: Sequence[Input]) -> None:
    if not any(rule.match(name) for entry in inputs for name in entry.checkpoint.tensors):
        example = next(iter(inputs[0].checkpoint.tensors), "")
        raise SettingError(
            (*written.path, "from"),
            f"matches no tensor of any model; there is for example {shown(example)}",
        )


def _rule(written: Conversion) -> Rule:
    """Return a rule of a spec as transformers writes its own."""
    is_numbered = any("*" in text for text in written.parts)
    steps = [Step("MergeModulelist", {"dim": 0})] if is_numbered else []
    if len(written.parts) > 1:
        steps.append(Step("Concatenate", {"dim": written.axis}))
    if written.transposes:
        is_one = written.parts == (written.whole,)
        steps.append(Step("Transpose", {"dim0": -2, "dim1": -1, "check_dims": is_one}))
    return Rule(
        label="convert",
        sources=written.parts,
        targets=(written.whole,),
        steps=tuple(steps),
        patterns=tuple(map(text_at, written.parts)),
    )
