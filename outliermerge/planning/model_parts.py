"""The parts of a model, such as its language model and vision tower, by the names of tensors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from outliermerge.errors import OutlierMergeError, nearest, quoted, shown
from outliermerge.planning.layers import stacks_of
from outliermerge.planning.tied_names import is_head

_OTHER_NAMES = {
    "text": ("language_model", "text_model", "text_decoder", "language", "llm"),
    "vision": ("vision_tower", "vision_model", "vision_encoder", "visual"),
    "audio": ("audio_tower", "audio_model", "audio_encoder"),
    "projector": ("multi_modal_projector", "mm_projector", "connector"),
}
"""By kind of part what it is called besides, in mergekit and in models' classes."""
# What lies between two stacks; before a layer's number, so that layers' own modules are not meant.
_PROJECTOR = re.compile(
    r"(^|\.)(\w*projector\w*|\w*connector\w*|\w*merger\w*|mm_projector|aligner|mlp1"
    r"|embed_vision|embed_audio|image_newline|language_projection)(\.|$)"
)
_NUMBER = re.compile(r"\.\d+\.")


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """Return for each tensor the kind of the part that it is of; none for what is in no part.

    Heads are of the part that writes text. Of an encoder and a decoder they are `shared`, as is all
    that lies outside of both.

    >>> kinds_of(["model.layers.0.mlp.up.weight", "visual.blocks.0.mlp.up.weight",
    ...           "visual.merger.mlp.0.weight", "lm_head.weight"]).values()
    dict_values(['text', 'vision', 'projector', 'text'])
    """
    names = list(names)
    stacks = [stack for stack in stacks_of(names) if not _is_projector(stack.prefix)]
    if len(stacks) == 1:
        return dict.fromkeys(names, stacks[0].kind)
    stacks.sort(key=lambda stack: len(stack.region), reverse=True)
    of_pair = {"encoder", "decoder"} <= {stack.kind for stack in stacks}
    main = next((stack.kind for stack in stacks if stack.kind == "text"), None)
    found = {}
    for name in names:
        kind = next((s.kind for s in stacks if s.region and name.startswith(s.region)), None)
        if _is_projector(name):
            kind = "projector"
        elif is_head(name) and main is not None:
            kind = main
        elif of_pair and (kind is None or is_head(name)):
            kind = "shared"
        if kind is not None:
            found[name] = kind
    return found


def _is_projector(name: str) -> bool:
    return _PROJECTOR.search(_NUMBER.split(name)[0]) is not None


def kind_meant(part: str) -> str:
    """Return the kind of part that is meant by a name."""
    return next((kind for kind, others in _OTHER_NAMES.items() if part in others), part)


def part_of(names: Collection[str], part: str, reference: str) -> list[str]:
    """Return the names of the tensors of a model's part.

    Args:
        part: its kind or the start of its names; `default` is a model that has one stack of layers.
        reference: the model, for messages.

    Raises:
        OutlierMergeError: the model has no such part.
    """
    kinds = kinds_of(names)
    if part == "default" and len(set(kinds.values())) == 1:
        return list(names)
    meant = kind_meant(part)
    found = [name for name, kind in kinds.items() if kind == meant]
    start = part.rstrip(".")
    found = found or [n for n in names if n == part or n.startswith((f"{start}.", f"{start}/"))]
    if found:
        return found
    known = Counter(kinds.values())
    parts = ", ".join(f"{kind} ({number} tensors)" for kind, number in known.items())
    words = [*known, *(other for kind in known for other in _OTHER_NAMES.get(kind, ()))]
    starts = dict.fromkeys(name.partition(".")[0] for name in names if "." in name)
    near = nearest(part, [*words, *starts])
    said = f" Did you mean {quoted(near)}?" if near is not None else ""
    raise OutlierMergeError(
        f"{shown(reference)} has no such part.{said} It has {parts or 'no stacks of layers'}; any "
        f"start of names is a part, too, such as {quoted(next(iter(starts), ''))}"
    )


def paired_names(names: Iterable[str], wanted: Collection[str]) -> tuple[
    dict[str, str], list[tuple[str, str]]
]:  # fmt: skip
    """Return by name the wanted name that it is, and the starts of names that were changed for it.

    A name is itself, or it is changed by putting another start in the place of its own: the change
    that makes the most pairs.

    >>> paired_names(["model.layers.0.up", "lm_head.w"], ["lm.model.layers.0.up", "lm.lm_head.w"])
    ({'model.layers.0.up': 'lm.model.layers.0.up', 'lm_head.w': 'lm.lm_head.w'}, [('', 'lm.')])
    """
    wanted = dict.fromkeys(wanted)
    rest = dict.fromkeys(names)
    paired = {name: name for name in rest if name in wanted}
    changes: list[tuple[str, str]] = []
    while True:
        taken = set(paired.values())
        left = [name for name in wanted if name not in taken]
        rest = dict.fromkeys(name for name in rest if name not in paired)
        counts = _changes(rest, left)
        if not counts:
            return paired, changes
        (old, new), _ = counts.most_common(1)[0]
        changes.append((old, new))
        open_ = set(left)
        for name in rest:
            changed = new + name[len(old) :]
            if name.startswith(old) and changed in open_:
                paired[name] = changed
                open_.discard(changed)


def _changes(names: Iterable[str], wanted: Iterable[str]) -> Counter[tuple[str, str]]:
    """Count by change of the start of names how many wanted names it gives."""
    starts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for start, rest in _cuts(name):
            starts[rest].append(start)
    counts: Counter[tuple[str, str]] = Counter()
    for name in wanted:
        for start, rest in _cuts(name):
            # A change of a layer's number would pair other layers.
            fitting = [s for s in starts.get(rest, ()) if _numbers(s) == _numbers(start)]
            if fitting and ("." in rest or not start):
                counts.update((old, start) for old in fitting)
                break
    return counts


def _cuts(name: str) -> Iterable[tuple[str, str]]:
    """Yield a name's starts and what follows them, the shortest start first."""
    yield "", name
    for place, sign in enumerate(name):
        if sign in "./":
            yield name[: place + 1], name[place + 1 :]


def _numbers(start: str) -> list[str]:
    return re.findall(r"(?<![^.])\d+(?=\.)", start)


def changed_start(name: str, changes: Iterable[tuple[str, str]]) -> str:
    """Return a name with its start changed by the first change that fits."""
    return next((new + name[len(old) :] for old, new in changes if name.startswith(old)), name)


def own_part(names: Collection[str], wanted: Mapping[str, str | None]) -> list[str]:
    """Return the names of a model's part of the kind that the wanted names are of.

    It is all of a model without such a part, as a tower by itself may be.

    Args:
        wanted: the wanted names with their kinds.
    """
    kinds = kinds_of(names)
    found = [name for name in names if kinds.get(name) in set(wanted.values())]
    return found or list(names)
