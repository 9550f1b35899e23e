"""Opens what an adapter is made of: the tensors of a base, and of a model that was made of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import (
    ArgumentError,
    OutlierMergeError,
    argument,
    direct_reference,
    quoted,
    shown,
)
from outliermerge.extraction.layout import in_memory
from outliermerge.planning.architectures import compare_architectures
from outliermerge.planning.buffers import is_computed
from outliermerge.planning.inputs import open_model
from outliermerge.planning.plan import Input
from outliermerge.planning.tied import tied_heads, with_embeddings
from outliermerge.planning.tied_names import is_head
from outliermerge.spec.rename import Rename, best_rename, parse_rename
from outliermerge.spec.settings import SettingError
from outliermerge.spec.similar import part_meant
from outliermerge.spec.text import plain_yaml
from outliermerge.storage.addresses import without_secrets

Pair = tuple[Source, Source]
_PARTED = (
    "{}: stores {} and the embeddings that it is tied to with other values. Which of them it has "
    "depends on what loads it"
)


@dataclass(frozen=True)
class Pairs:
    """A base and a model, tensor by tensor.

    Attributes:
        base, model: the two, with packed experts as their class has them in memory.
        stored: the base as its files are.
        tensors: (base, model) by the base's name, where both have the tensor.
        apart: tensors that only one of them has, and why no adapter can hold them.
        heads: by name of a head the embeddings that both tie it to; it is not among the tensors.
        twins: what must be equal: the message if it is not, the name, the two tensors.
        notes: notes for the user.
        excluded: the tensors that stay the base's, as they were not chosen.
        recipe: of a merge its spec, as YAML.
    """

    base: Input
    model: Input
    stored: Input
    tensors: Mapping[str, Pair]
    apart: Mapping[str, str]
    heads: Mapping[str, str]
    twins: tuple[tuple[str, str, Pair], ...]
    notes: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    recipe: str = ""

    def with_twins(self, twins: Iterable[tuple[str, str, Pair]], notes: Iterable[str]) -> Pairs:
        """Return the same with more that must be equal, and notes."""
        return replace(self, twins=(*self.twins, *twins), notes=(*self.notes, *notes))

    def chosen(self, include: Sequence[str], exclude: Sequence[str]) -> Pairs:
        """Return the same with only the tensors that were chosen; the others are the base's.

        Args:
            include: parts of names; only tensors with one of them are chosen. All, if empty.
            exclude: parts of names; tensors with one of them are not chosen.

        Raises:
            ArgumentError: a part is in no name, or nothing is left.
        """
        names = dict.fromkeys([*self.tensors, *self.apart, *self.heads])
        for key, parts in (("include", include), ("exclude", exclude)):
            for part in parts:
                if not any(part in name for name in names):
                    raise ArgumentError(
                        f"{argument(key)}: {quoted(part)} is in no tensor's name. "
                        f"{part_meant(part, names)}"
                    )

        def is_chosen(name: str) -> bool:
            is_in = not include or any(part in name for part in include)
            return is_in and not any(part in name for part in exclude)

        if not any(map(is_chosen, names)):
            raise ArgumentError(
                f"{argument('include')} and {argument('exclude')} leave no tensor: name others"
            )
        return replace(
            self,
            tensors={
                name: pair if is_chosen(name) else (pair[0], pair[0])
                for name, pair in self.tensors.items()
            },
            apart={name: why for name, why in self.apart.items() if is_chosen(name)},
            twins=tuple(twin for twin in self.twins if is_chosen(twin[1])),
            excluded=tuple(name for name in self.tensors if not is_chosen(name)),
        )

    @property
    def architectures(self) -> list[str]:
        """The classes that the base's config names."""
        found = read_json(self.base.home / "config.json").get("architectures")
        return list(map(str, found)) if isinstance(found, list) else []


def open_pairs(model: str | Path, base: str | Path, *, rename: str | None = None) -> Pairs:
    """Open a model and its base, each named as in a spec.

    Raises:
        ArgumentError: the rename is unknown or does not fit the names.
        OutlierMergeError: one is absent or broken, or they have no tensor in common.
    """
    named = direct_reference(without_secrets(str(model)))
    try:
        rules = parse_rename(None if rename is None else plain_yaml(rename), ("rename",))
        of_base = direct_reference(without_secrets(str(base)))
        under = with_embeddings(open_model(of_base, Rename(), "base", None))
        over = with_embeddings(open_model(named, rules, "model", under))
    except SettingError as error:
        raise ArgumentError(f"{argument('rename')}: {error}") from error
    except OutlierMergeError:
        raise
    except ValueError as error:
        raise ArgumentError(
            f"{argument('rename')}: {quoted(rename)} is not YAML: {error}"
        ) from error
    return paired(under, over)


def paired(base: Input, model: Input) -> Pairs:
    """Return the tensors of a base and of a model, with those that are tied settled.

    Raises:
        OutlierMergeError: they have no tensor in common, or the base is a pipeline.
    """
    if components := [name for name in base.checkpoint.components if name]:
        raise OutlierMergeError(
            f"{shown(base.reference)}: has several models ({', '.join(components)}), and an "
            f"adapter is of one: name its folder, as {shown(base.reference)}/{components[0]}"
        )
    stored = base
    base, model = in_memory(base, model)
    theirs, ours = dict(base.checkpoint.tensors), dict(model.checkpoint.tensors)
    before, after = _ties(base), _ties(model)
    heads, twins = {}, list[tuple[str, str, Pair]]()
    for entry, tensors, ties in ((base, theirs, before), (model, ours, after)):
        twins += (
            (
                _PARTED.format(shown(entry.reference), shown(head)),
                head,
                (tensors[head], tensors[original]),
            )
            for head, original in ties.items()
            if head in tensors and tensors[head] is not tensors[original]
        )
    for head in {**before, **after}:
        if head in before and head in after and before[head] == after[head]:
            heads[head] = before[head]
            theirs.pop(head, None)
            ours.pop(head, None)
            continue
        for tensors, ties in ((theirs, before), (ours, after)):
            if head in ties:
                tensors.setdefault(head, tensors[ties[head]])
    common = {name: (source, ours[name]) for name, source in theirs.items() if name in ours}
    if not common:
        raise _nothing_in_common(base, model)
    apart = {
        name: f"only {shown(entry.reference)} has it"
        for entry, own, others in ((model, ours, theirs), (base, theirs, ours))
        for name, source in own.items()
        if name not in others and not is_computed(name, source)
    }
    for entry, own, others in ((base, ours, theirs), (model, theirs, ours)):
        for name in [name for name in apart if name in own]:
            if why := lacks_parts(entry, own[name], others):
                parts = {meta.name for meta in own[name].stored}
                apart = {n: w for n, w in apart.items() if n not in parts} | {name: why}
    notes = dict.fromkeys((*base.checkpoint.notes, *model.checkpoint.notes))
    return Pairs(base, model, stored, common, apart, heads, tuple(twins), tuple(notes))


def lacks_parts(entry: Input, packed: Source, others: Collection[str]) -> str:
    """Return what a model lacks of a tensor's parts, such as experts; "" where it has none or all.

    Args:
        packed: the tensor, which another model has.
        others: the names of the parts that this one has.
    """
    parts = list(dict.fromkeys(meta.name for meta in packed.stored))
    missing = [part for part in parts if part not in others]
    if not missing or len(missing) == len(parts):
        return ""
    return (
        f"{shown(entry.reference)} lacks {len(missing)} of the {len(parts)} tensors that it is "
        f"made of, such as {shown(missing[0])}"
    )


def _ties(entry: Input) -> dict[str, str]:
    """Return the heads that a model ties to its embeddings, of which it need not store both."""
    found = tied_heads(entry, filter(is_head, entry.checkpoint.tensors))
    return {head: original for head, original in found.items() if head not in entry.parted}


def _nothing_in_common(base: Input, model: Input) -> OutlierMergeError:
    ours, theirs = list(model.checkpoint.tensors), base.checkpoint.tensors
    best = best_rename(ours, theirs)
    advice = f" `{argument('rename', best[0])}` pairs {best[1]} of {len(ours)}." if best else ""
    kinds = "".join(f"\n{line}" for line in compare_architectures((base, model), [1]))
    return OutlierMergeError(
        f"{shown(model.reference)}: no tensor has the name of one of {shown(base.reference)}: "
        f"found for example {next(iter(ours), 'none')!r}, expected {next(iter(theirs), 'none')!r}."
        f"{advice}{kinds}"
    )
