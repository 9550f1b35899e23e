"""Advice for models with different tensors, so that no trained weights are lost."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from outliermerge.checkpoint.sources import Source
from outliermerge.errors import WARNING, OutlierMergeError, listing, shown
from outliermerge.planning.architectures import (
    CANNOT,
    compare_architectures,
    differ_in_kind,
    differ_in_size,
)
from outliermerge.planning.buffers import is_computed
from outliermerge.planning.layouts import how_to_convert
from outliermerge.planning.plan import Input
from outliermerge.planning.tied_names import head_beside, head_rename, is_head
from outliermerge.spec.rename import find_rename
from outliermerge.spec.rename_search import FoundRename

# If more tensors than this are unpaired on both sides, the layouts differ: it is not only a head or
# a buffer.
_MANY = 8
_MAX_SHOWN = 20  # the most pairs, and filters, that are listed
_MISSING = (
    "`missing: base` in the spec takes a model as unchanged where it lacks a tensor (it needs a "
    "base_model)."
)
_EXTRA = "`extra: copy` in the spec copies such tensors, `extra: drop` leaves them out."
_LOST = " What is left out is lost: these weights will not be in the output."


# Words in names that tell the kind of a module, and the use of a vector in it.
_NAMED = (
    ("norm", re.compile(r"norm|(^|_)ln(_|\d|$)|^bn\d*$")),
    ("embedding", re.compile(r"embed|^w[tp]e$")),
    (
        "linear",
        re.compile(r"dense|proj|linear|query|key|value|qkv|(^|_)fc\d*|^[qkvow][_\d]?$|classif"),
    ),
)
_ROLES = {"weight": "weight", "gamma": "weight", "scale": "weight", "bias": "bias", "beta": "bias"}


@dataclass
class Unpaired:
    """Unpaired names of one model that no policy covers: those only in the base, and only in it."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Sorted:
    """The advice on one model's unpaired tensors.

    Attributes:
        convert: how to convert the layout, in words; if set, nothing else is offered.
        rename: the rename that pairs some of them, in words.
        doubtful: tensors that are probably the same under another name or in another form, a line
            each.
        missing, extra: tensors without a counterpart; `extra` by their names after the rename.
        floats: those in `extra` that have a floating-point dtype, so may be trained.
    """

    convert: str
    rename: str
    doubtful: list[str]
    missing: list[str]
    extra: list[str]
    floats: list[str]


def advise(inputs: Sequence[Input], unpaired: Mapping[int, Unpaired]) -> list[str]:
    """Return the advice, a paragraph for each way out.

    Policies are offered only for tensors without a counterpart: for a tensor that only has another
    name, `extra: drop` and `missing: base` would lose its trained weights.
    """
    reference = inputs[0]
    sorted_ = {n: _sort(inputs[n], reference, found) for n, found in unpaired.items()}
    sorted_ = {n: one for n, one in sorted_.items() if not _is_other(inputs[n], reference, one)}
    paragraphs = [] if len(sorted_) == len(unpaired) else [CANNOT]
    safe = not any(one.convert or one.rename or one.doubtful for one in sorted_.values())
    if safe and any(one.missing for one in sorted_.values()):
        paragraphs.append(_MISSING)
    if safe and any(one.extra for one in sorted_.values()):
        lost = _LOST if any(one.floats for one in sorted_.values()) else ""
        paragraphs.append(_EXTRA + lost)
    for number, one in sorted_.items():
        where = inputs[number].reference
        if one.convert:
            paragraphs.append(one.convert)
            continue
        if one.rename:
            paragraphs.append(one.rename)
        if one.doubtful:
            paragraphs.append(
                f"Of {where}, these may be the same weights under another name or in another "
                f"form:\n{listing(one.doubtful)}\n"
                "`rename` on the model pairs those that are only named otherwise, `convert` in the "
                "spec those that are fused, split or transposed. Convert the model first where "
                "that does not say it. Only where they are others, `extra` "
                "and `missing` with filters of their names decide of them: a policy for all loses "
                "what was trained."
            )
        if not safe and (one.missing or one.extra):
            paragraphs.append(_rest(where, one, inputs))
    return paragraphs


def _is_other(entry: Input, reference: Input, one: _Sorted) -> bool:
    """Tell whether a model is of another architecture or size, for which there is no advice."""
    if differ_in_size(entry, reference):
        return True
    if one.convert or one.rename or not differ_in_kind(entry, reference):
        return False
    ours, theirs = entry.checkpoint.tensors, reference.checkpoint.tensors
    return bool(
        one.doubtful or _of_layers(one.extra, ours, theirs) or _of_layers(one.missing, theirs, ours)
    )


def _of_layers(names: Iterable[str], own: Mapping[str, Source], others: Iterable[str]) -> list[str]:
    """Return those of a model's tensors that are in a layer which another model has as well."""
    layers = {_layer(name) for name in others} - {""}
    return [n for n in names if _layer(n) in layers and not (n in own and is_computed(n, own[n]))]


def _layer(name: str) -> str:
    """Return a tensor's name up to the number of its layer; "" outside layers."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""


def refuse_unused(inputs: Sequence[Input], numbers: Sequence[int], used: Collection[int]) -> None:
    """Raise OutlierMergeError if the output would contain nothing of a model."""
    reference = inputs[0]
    for number in numbers:
        entry = inputs[number]
        if number in used or any(
            n in reference.checkpoint.tensors for n in entry.checkpoint.tensors
        ):
            continue
        one = _sort(entry, reference, Unpaired())
        raise OutlierMergeError(
            f"{shown(entry.reference)}: none of its {len(entry.checkpoint.tensors)} tensors has a "
            "name of "
            f"{shown(reference.reference)}'s, so that the output would have nothing of it. "
            + (
                one.convert
                or one.rename
                or f"It has for example {next(iter(entry.checkpoint.tensors), '')!r}."
            )
        )


def overlooked(inputs: Sequence[Input], dropped: Collection[str]) -> Iterator[str]:
    """Yield notes on what policies leave out: parts of layers, and what a rename would pair."""
    left_out, first = set(dropped), inputs[0]
    for entry in inputs[1:]:
        tensors = entry.checkpoint.tensors
        if left_out.isdisjoint(tensors):
            continue
        lost = _of_layers(left_out & tensors.keys(), tensors, first.checkpoint.tensors)
        if lost and differ_in_kind(entry, first):
            said = f"{len(lost)} tensor(s) of the layers of {shown(entry.reference)} are left out, "
            said += "with which the others were trained: the output may be of no use."
            facts = compare_architectures(inputs, [inputs.index(entry)])
            yield WARNING + " ".join([*facts, said])
        one = _sort(entry, first, Unpaired())
        if one.convert or one.rename:
            yield f"some of what is left out may be needed: {one.convert or one.rename}"


def _sort(entry: Input, reference: Input, unpaired: Unpaired) -> _Sorted:
    ours, theirs = entry.checkpoint.tensors, reference.checkpoint.tensors
    places = (entry.reference, reference.reference)
    if convert := how_to_convert(ours.keys(), theirs.keys(), places):
        return _Sorted(convert, "", [], [], [], [])
    found = find_rename(ours, theirs, lambda old, new: _alike(new, ours[old], theirs[new]))
    if found and not _worth(found, ours, theirs):
        found = None
    names = found.names if found else {name: name for name in ours}
    rename = ""
    if found:
        own = "Added to its own, " if entry.renamed else ""
        rename = (
            f"{own}`rename: {found.text}` on {shown(entry.reference)} pairs {found.num_paired} of "
            "its "
            f"{len(ours)} tensors with those of {shown(reference.reference)}."
        )
    have = set(names.values())
    lacking = [name for name in theirs if name not in have]
    over = {new: ours[old] for old, new in names.items() if new not in theirs}
    misfits = {
        new
        for old, new in names.items()
        if new in theirs and theirs[new].dtype.is_float and not _alike(new, ours[old], theirs[new])
    }
    pairs = _pairs(
        over,
        {name: theirs[name] for name in lacking},
        misfits,
        any_paired=any(n in theirs for n in have),
    )
    doubtful_names = {name for pair in pairs for name in pair}
    extra = [n for old in unpaired.extra if (n := names[old]) in over and n not in doubtful_names]
    for name in extra if not rename else ():
        if other := is_head(name) and head_beside(name, theirs):
            rename = (
                f"`rename: {head_rename(name, other)}` on {shown(entry.reference)} pairs "
                f"{shown(name)} with the head of {shown(reference.reference)}."
            )
            extra = [n for n in extra if n != name]
            break
    return _Sorted(
        convert="",
        rename=rename,
        doubtful=[f"{a or '?'} (has) ~ {b or '?'} (lacks)" for a, b in pairs],
        missing=[n for n in unpaired.missing if n not in have and n not in doubtful_names],
        extra=extra,
        floats=[name for name in extra if over[name].dtype.is_float and over[name].shape],
    )


def _worth(found: FoundRename, ours: Collection[str], theirs: Collection[str]) -> bool:
    """Tell whether a rename pairs at least half of the names; fewer pairs may be chance."""
    num_paired = sum(name in theirs for name in ours)
    could = min(len(ours), len(theirs)) - num_paired
    return 2 * (found.num_paired - num_paired) >= could


def _alike(name: str, one: Source, other: Source) -> bool:
    """Tell whether two tensors can be the same by shape; vocabulary rows may have been added."""
    if one.dtype.is_float != other.dtype.is_float or len(one.shape) != len(other.shape):
        return False
    if one.shape == other.shape:
        return True
    if len(one.shape) != 2 or one.shape[1] != other.shape[1] or _numbers(name):
        return False
    return max(one.shape[0], other.shape[0]) < 2 * min(one.shape[0], other.shape[0])


def _pairs(
    over: Mapping[str, Source],
    lacking: Mapping[str, Source],
    misfits: Collection[str],
    *,
    any_paired: bool,
) -> list[tuple[str, str]]:
    """Return pairs that may be the same tensor: of one size and one layer, or of two layouts.

    A name of a pair is empty if several could stand there.

    Args:
        misfits: names that both models have, with different shapes; one of the two may be fused.
    """
    ours = {name: source for name, source in over.items() if source.dtype.is_float}
    theirs = {name: source for name, source in lacking.items() if source.dtype.is_float}
    twins: dict[Any, list[str]] = defaultdict(list)
    for name, source in theirs.items():
        # By size, not shape: a tensor may be transposed, or have dimensions of 1.
        twins[source.num_elements].append(name)
        twins[source.num_elements, _numbers(name)].append(name)
    pairs: list[tuple[str, str]] = []
    taken: set[str] = set()
    for name, source in ours.items():
        for key in ((source.num_elements, _numbers(name)), source.num_elements):
            near = twins[key]
            while near and near[-1] in taken:
                near.pop()
            if near:
                few = [*near[-1:], *near[:16]] if len(pairs) < _MAX_SHOWN else near[-1:]
                open_ = [o for o in few if o not in taken and _are_of_a_kind(name, o, source)]
                if not open_:
                    continue
                best = max(open_, key=lambda other: SequenceMatcher(None, name, other).ratio())
                pairs.append((name, best))
                taken.add(best)
                break
    paired = {name for pair in pairs for name in pair}
    all_ = bool(ours and theirs) and (not any_paired or min(len(ours), len(theirs)) > _MANY)
    mine, its = set(map(_place, ours)), set(map(_place, theirs))
    places = ((mine & its) | ((mine | its) & set(map(_place, misfits)))) - {""}
    pairs += [(n, "") for n in ours if n not in paired and (all_ or _place(n) in places)]
    pairs += [("", n) for n in theirs if n not in paired and (all_ or _place(n) in places)]
    return pairs


def _are_of_a_kind(one: str, other: str, source: Source) -> bool:
    """Tell whether two tensors of one size can be the same, judged by the words in their names."""
    kinds = [_kind(name) for name in (one, other)]
    if None not in kinds and kinds[0] != kinds[1]:
        return False
    if len(source.shape) != 1:
        return True
    roles = [_ROLES.get(name.rpartition(".")[2]) for name in (one, other)]
    return None in roles or roles[0] == roles[1]


def _kind(name: str) -> str | None:
    """Return the kind of a tensor's module by its name; None if the name does not tell."""
    module = name.rpartition(".")[0].rpartition(".")[2].lower()
    found = (kind for kind, pattern in _NAMED if pattern.search(module))
    return next(found, None)


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdigit())


def _place(name: str) -> str:
    """Return the number of a tensor's layer; outside layers the part of the model, or ""."""
    return next(iter(_numbers(name)), ".".join(name.split(".")[:-2]))


def _rest(where: str, one: _Sorted, inputs: Sequence[Input]) -> str:
    every = {n for entry in inputs for n in entry.checkpoint.tensors} - {*one.missing, *one.extra}
    lines = []
    if one.missing:
        lines.append(
            f"Without a counterpart in {where} are {len(one.missing)}, which "
            f"`missing: {_filters(one.missing, every, 'base')}` takes as unchanged (it needs a "
            "base_model)."
        )
    if one.extra:
        lost = " These weights will then not be in the output." if one.floats else ""
        lines.append(
            f"Only in {where} are {len(one.extra)}, which `extra: "
            f"{_filters(one.extra, every, 'copy')}` copies, and `drop` in place of `copy` leaves "
            f"out.{lost}"
        )
    return "\n".join(lines)


def _filters(names: Sequence[str], others: Collection[str], word: str) -> str:
    """Return policy entries with filters that match these names and no others."""
    all_others = "\n".join(others)
    filters: dict[str, None] = {}
    for name in names:
        if name.startswith(tuple(filters)):
            continue
        if len(filters) == _MAX_SHOWN:
            break
        parts = name.split(".")
        starts = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
        filters[next((start for start in starts if start not in all_others), name)] = None
    entries = (f"{{filter: {json.dumps(text)}, value: {word}}}" for text in filters)
    return f"[{', '.join(entries)}]"
