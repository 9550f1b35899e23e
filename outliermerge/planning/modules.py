"""Merges of parts of a model: each is planned as a stage, whose tensors take the base's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError, SpecError, listing, shown
from outliermerge.planning.layers import stacks_of
from outliermerge.planning.merged import Restored
from outliermerge.planning.model_parts import (
    changed_start,
    kind_meant,
    kinds_of,
    own_part,
    paired_names,
    part_of,
)
from outliermerge.planning.plan import Input, Job, Module, Plan
from outliermerge.planning.stages import as_input, of_whole
from outliermerge.spec.check import MergeSpec, ModuleSpec
from outliermerge.spec.modules import KEEP, MODULES
from outliermerge.spec.rename import best_rename
from outliermerge.spec.settings import SpecPath
from outliermerge.spec.similar import part_meant

_WRITE = ("text", "decoder", "shared")  # kinds of parts that decide how texts end


@dataclass(frozen=True)
class PartOfBase:
    """The part of a base model that a module merges.

    Attributes:
        base: the base model, with what other modules have merged.
        start: what names of the part begin with, if the spec names it by that; else empty.
        names: of its tensors.
        kept: those of them that are not merged.
    """

    base: Input
    start: str
    names: tuple[str, ...]
    kept: frozenset[str]

    @property
    def merged(self) -> list[str]:
        """The names of the tensors that are merged."""
        return [name for name in self.names if name not in self.kept]

    @property
    def stack(self) -> str | None:
        """The start of the names of its layers, if it has one stack of layers."""
        stacks = stacks_of(self.base.checkpoint.tensors)
        found = [s.prefix for s in stacks if any(n.startswith(s.prefix) for n in self.names)]
        return found[0] if len(found) == 1 else None


def views(
    spec: MergeSpec, part: PartOfBase, inputs: tuple[Input, ...], numbers: list[int]
) -> tuple[Input, ...]:
    """Return the models of a module's merge with only the part, in the names of the base.

    Args:
        numbers: the numbers of the inputs of `spec.models`.

    Raises:
        OutlierMergeError: no tensor of a model is of the part.
    """
    paths: dict[int, SpecPath] = {0: spec.base.path} if spec.base is not None else {}
    for model, number in zip(spec.models, numbers, strict=True):
        paths.setdefault(number, (*model.path, "model"))
    found = []
    for number, entry in enumerate(inputs):
        try:
            found.append(_view(entry, part))
        except OutlierMergeError as error:
            raise spec.source.error(paths[number], str(error)) from error
    return tuple(found)


def _view(entry: Input, part: PartOfBase) -> Input:
    base, tensors = part.base, entry.checkpoint.tensors
    kinds = kinds_of(base.checkpoint.tensors)
    own = own_part(tensors, {name: kinds.get(name) for name in part.names})
    paired, changes = paired_names(own, part.names)
    if not paired:
        best = best_rename(own, dict.fromkeys(part.names))
        advice = f"`rename: {best[0]}` on it pairs {best[1]}" if best else "there is no such rename"
        raise OutlierMergeError(
            f"no tensor of {shown(entry.reference)} is one of {shown(base.reference)} in this "
            f"module under another start of its name: found {shown(own[0])}, expected names such "
            f"as {shown(part.names[0])}; {advice}"
        )
    view: dict[str, Source] = {}
    for name in own:
        new = paired.get(name) or changed_start(name, changes)
        if new not in part.kept and new.startswith(part.start) and new not in view:
            view[new] = tensors[name]
    renamed = dict(entry.renamed)
    for old, new in changes:
        those = [(a, b) for a, b in paired.items() if (a, b) == (a, new + a[len(old) :])]
        if those:
            renamed[f"{old or '(nothing)'} → {new or '(nothing)'}"] = (len(those), *those[0])
    checkpoint = replace(entry.checkpoint, tensors=view)
    home = entry.home
    if entry.reference == base.reference:  # other modules may have changed its config
        home, root = base.home, base.checkpoint.root
        checkpoint = replace(checkpoint, root=root, sidecars=base.checkpoint.sidecars)
    return replace(
        entry,
        checkpoint=checkpoint,
        home=home,
        renamed=renamed,
        parted=tuple(name for name in entry.parted if name in view),
        alike=tuple(each for each in entry.alike if {each[0], each[1]} <= view.keys()),
    )


def with_modules(
    spec: MergeSpec, base: Input, plan_of: Callable[[MergeSpec, PartOfBase], Plan]
) -> tuple[Input, tuple[Module, ...], list[str], dict[str, ModuleSpec]]:
    """Return a base model with merged parts, what became of each, notes, and the merges as planned.

    Args:
        plan_of: plans the merge of a part.

    Raises:
        OutlierMergeError: the base has no such part, or the merge of a part cannot be planned.
    """
    found: list[Module] = []
    notes: list[str] = []
    merges: dict[str, ModuleSpec] = {}
    composed, owners = base, dict[str, str]()
    made_of = {base.reference: base}
    # Slices change the config, which must still be like that of the models of other modules.
    by_slices = sorted(spec.modules.items(), key=lambda each: bool(each[1].merge.slices))
    for name, module in by_slices:
        path: SpecPath = (MODULES, name)
        try:
            part = _part(spec, base, composed, name, module)
            for each in part.names:
                if (other := owners.setdefault(each, name)) != name:
                    raise OutlierMergeError(f"{shown(each)} is in module {shown(other)}, too")
            plan = plan_of(module.merge, part)
            merged = as_input(name, plan, kind="module")
            composed = _composed(composed, part, merged, plan)
        except SpecError:
            raise
        except OutlierMergeError as error:
            raise OutlierMergeError(
                str(spec.source.error(path, str(error), at_key=True))
            ) from error
        merges[name] = replace(module, merge=plan.spec)
        notes += [of_whole(note, of=f"module {shown(name)}") for note in plan.notes]
        for entry in plan.inputs:
            if entry.reference != base.reference:
                made_of[entry.reference] = _both(made_of.get(entry.reference, entry), entry)
        is_changed = {job.name for job in plan.jobs if job.action == "merge"}
        models = tuple(plan.inputs[n].reference for n in _numbers(plan.jobs))
        found.append(
            Module(
                name,
                module.merge.method.name,
                models,
                tuple(merged.checkpoint.tensors),
                len(is_changed),
                tuple(sorted(part.kept)),
                merged.layers,
            )
        )
    places = [*spec.modules]
    found.sort(key=lambda module: places.index(module.name))
    merges = {name: merges[name] for name in places}
    return replace(composed, made_of=tuple(made_of.values())), tuple(found), notes, merges


def models_of_text(base: Input, modules: Sequence[Module]) -> list[Input]:
    """Return the models of the modules that write texts, unlike the tower and the projector.

    Args:
        base: the base model with its merged parts.
    """
    kinds = kinds_of(base.checkpoint.tensors)
    writing = [m for m in modules if any(kinds.get(name) in _WRITE for name in m.names)]
    models = {reference for module in writing for reference in module.models}
    return [entry for entry in base.made_of if entry.reference in models]


def _both(one: Input, other: Input) -> Input:
    """Return two parts of a model as one."""
    tensors = {**one.checkpoint.tensors, **other.checkpoint.tensors}
    checkpoint = replace(one.checkpoint, tensors=tensors)
    return replace(one, checkpoint=checkpoint, renamed={**one.renamed, **other.renamed})


def _numbers(jobs: tuple[Job, ...]) -> list[int]:
    return sorted({number for job in jobs for number, _ in job.sources})


def _part(
    spec: MergeSpec, base: Input, composed: Input, name: str, module: ModuleSpec
) -> PartOfBase:
    names = part_of(base.checkpoint.tensors, name, base.reference)
    is_kind = name == "default" or kind_meant(name) in kinds_of(base.checkpoint.tensors).values()
    start = "" if is_kind else name
    kept = set()
    for index, word in enumerate(module.keep):
        matching = {each for each in names if word in each}
        if not matching:
            said = f"matches no tensor of the module. {part_meant(word, names)}"
            raise spec.source.error((MODULES, name, KEEP, index), said)
        kept |= matching
    if len(kept) == len(names):
        raise spec.source.error((MODULES, name, KEEP), "leaves nothing of the module to merge")
    part = PartOfBase(composed, start, tuple(names), frozenset(kept))
    if module.merge.slices:
        if part.stack is None:
            said = "has no layers, or several stacks of layers: name the part of one of them"
            raise spec.source.error((MODULES, name, "slices"), said, at_key=True)
        if inside := [each for each in kept if each.startswith(part.stack)]:
            said = f"keeps tensors of layers, such as {shown(min(inside))}, whose numbers change"
            raise spec.source.error((MODULES, name, KEEP), said)
    return part


def _composed(base: Input, part: PartOfBase, merged: Input, plan: Plan) -> Input:
    """Return a base model with the tensors of a merge in the place of its own."""
    own, new = base.checkpoint.tensors, merged.checkpoint.tensors
    is_sliced = plan.stacked is not None
    wanted = dict.fromkeys(part.merged)
    if not is_sliced:
        _check_whole(base, wanted, new)
    tensors = {
        name: _as_in(own.get(name), new[name]) if name in new else source
        for name, source in own.items()
        if name in new or name not in wanted
    }
    tensors |= {name: source for name, source in new.items() if name not in tensors}
    checkpoint = replace(
        base.checkpoint,
        tensors=tensors,
        weight_files=tuple(dict.fromkeys((*base.checkpoint.weight_files,
                                          *merged.checkpoint.weight_files))),
    )  # fmt: skip
    if is_sliced:  # the config says how many layers there are
        checkpoint = replace(
            checkpoint, root=merged.checkpoint.root, sidecars=merged.checkpoint.sidecars
        )
    return replace(
        base,
        checkpoint=checkpoint,
        home=merged.home if is_sliced else base.home,
        checks=(*base.checks, *merged.checks),
    )


def _check_whole(base: Input, wanted: Mapping[str, object], new: Mapping[str, Source]) -> None:
    own = base.checkpoint.tensors
    wrong = [f"{name}: not in the merge" for name in wanted if name not in new]
    wrong += [f"{name}: only in the merge" for name in new if name not in wanted]
    wrong += [
        f"{name}: {list(new[name].shape)} in the merge, {list(own[name].shape)} in the base"
        for name in wanted
        if name in new and new[name].shape != own[name].shape
    ]
    if wrong:
        raise OutlierMergeError(
            f"the merge does not give the tensors of {shown(base.reference)} in this part. Name "
            f"those that stay the base's under `{KEEP}`:\n{listing(wrong, limit=5)}"
        )


def _as_in(own: Source | None, new: Source) -> Source:
    """Return a source that an output stores by default as the base stores the tensor."""
    if own is None or not own.dtype.is_float or own.out_dtype == new.out_dtype:
        return new
    return Restored(new, own.out_dtype)
