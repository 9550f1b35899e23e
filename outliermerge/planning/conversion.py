"""Tensors as their model's class has them in memory, and back: packed, fused, split, turned.

Tensors are described, not read: a converted tensor is a source made of the stored ones.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outliermerge.checkpoint.rearranged import (
    Cut,
    Joined,
    Swapped,
    columns,
    cut,
    join,
    pieces,
    reshaped,
    stack,
    swap,
)
from outliermerge.checkpoint.sources import DType, Reading, Sized, Source, TensorMeta
from outliermerge.planning.known_conversions import Known, Rule, Step

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Leaf(Sized):
    """A stored tensor in the description of a converted one."""

    name: str
    source: Source

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def out_dtype(self) -> DType:
        return self.source.out_dtype

    @property
    def shape(self) -> Shape:
        return self.source.shape

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded)."""
        self.source.read(reader, start, stop, out)


class CannotConvertError(Exception):
    """A group of tensors that a rule does not convert; its text says why."""


@dataclass
class Converted:
    """Tensors by their names in memory.

    Attributes:
        tensors: what they are made of.
        rules: by name the rule that makes a tensor, where there is one.
        failed: by name of a tensor that could not be made, its rule and why.
    """

    tensors: dict[str, Source] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    failed: dict[str, tuple[Rule, str]] = field(default_factory=dict)


def converted(
    sources: Mapping[str, Source],
    known: Known,
    config: Mapping[str, Any],
    wanted: Mapping[str, Shape],
) -> Converted:
    """Describe tensors as a model's class has them in memory.

    Args:
        config: of the model.
        wanted: by name the shape that a tensor in memory has, as far as it is known.
    """
    names = {name: name for name in sources}
    for renaming in known.renamings:
        if renaming.guarded and not any(
            renaming.pairs[0][0].search(name) for name in names.values()
        ):
            continue
        names = {old: renaming(new) for old, new in names.items()}
    result, taken = Converted(), set[str]()
    groups: dict[tuple[str, int], list[tuple[int, tuple[int, ...], Leaf]]] = defaultdict(list)
    for old, new in names.items():
        leaf = Leaf(old, sources[old])
        for place, rule in enumerate(known.rules):
            if found := rule.match(new):
                number, whole, numbers = found
                groups[whole, place].append((number, numbers, leaf))
                break
        else:
            # Where two get one name, each keeps its own.
            result.tensors[old if new in taken else new] = leaf
            taken.add(new)
    for (whole, place), leaves in groups.items():
        rule = known.rules[place]
        try:
            made = _made(rule, whole, leaves, config, wanted)
        except CannotConvertError as error:
            result.failed[whole] = rule, str(error)
            result.tensors |= {leaf.name: leaf for _, _, leaf in leaves}
            continue
        for name, source in made.items():
            result.tensors[name], result.rules[name] = source, rule
    return result


def _made(
    rule: Rule,
    whole: str,
    leaves: list[tuple[int, tuple[int, ...], Leaf]],
    config: Mapping[str, Any],
    wanted: Mapping[str, Shape],
) -> dict[str, Source]:
    """Return what a rule makes of the tensors of one place, by name."""
    current: dict[str, list[Source]] = {}
    indices: dict[str, list[int]] = {}
    for number, text in enumerate(rule.sources):
        own = sorted(
            ((n, leaf) for place, n, leaf in leaves if place == number), key=lambda each: each[0]
        )
        if not own:
            raise CannotConvertError(f"no tensor is {text!r}")
        if "*" in text:
            indices[text] = [n[0] for n, _ in own]
        elif len(own) > 1:
            raise CannotConvertError(f"{len(own)} tensors are {text!r}")
        current[text] = [leaf for _, leaf in own]
    for text, found in indices.items():
        if found != [*range(max(map(len, indices.values())))]:
            raise CannotConvertError(f"the numbers of {text!r} are {_ranges(found)}")
    if len({(s.dtype, s.out_dtype) for own in current.values() for s in own}) > 1:
        kinds = sorted({s.out_dtype.name for own in current.values() for s in own})
        raise CannotConvertError(f"they have several dtypes: {', '.join(kinds)}")
    for step in rule.steps:
        current = _apply(step, rule, current, whole, config, wanted)
    start = whole.find(rule.targets[0])
    return {
        whole[:start] + text + whole[start + len(rule.targets[0]) :]: source
        for text, (source,) in current.items()
    }


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text.

    >>> _ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _apply(
    step: Step,
    rule: Rule,
    current: dict[str, list[Source]],
    whole: str,
    config: Mapping[str, Any],
    wanted: Mapping[str, Shape],
) -> dict[str, list[Source]]:
    """Return tensors after one operation, with the meaning that it has in transformers."""
    given = step.given
    axis = given.get("dim", 0)
    single = len(current) == 1
    text, sources = next(iter(current.items()))
    first = sources[0]
    renamed = rule.targets[0] if single and len(rule.targets) == 1 else text
    match step.name:
        case "MergeModulelist" if axis == 0:
            for own in current.values():
                if len({source.shape for source in own}) > 1:
                    raise CannotConvertError("they have several shapes")
            return {renamed if single else t: [stack(own)] for t, own in current.items()}
        case "Concatenate":
            parts = [source for t in rule.sources for source in current[t]]
            shapes = {(*s.shape[:axis], *s.shape[axis + 1 :]) for s in parts}
            if len(shapes) > 1 or axis >= len(first.shape):
                raise CannotConvertError("their shapes do not fit together")
            return {rule.targets[0]: [join(parts, axis)]}
        case "Chunk" if given.get("num_shards_attribute") is None and axis < len(first.shape):
            size, number = first.shape[axis], len(rule.targets)
            step_size = math.ceil(size / number)
            ends = [min(size, (n + 1) * step_size) for n in range(number)]
            return _parts(rule, first, axis, ends)
        case "Split" if axis < len(first.shape):
            names = [whole.replace(rule.targets[0], target, 1) for target in rule.targets]
            if not all(name in wanted for name in names):
                raise CannotConvertError("how large its parts are is not known")
            ends, total = [], 0
            for name in names:
                total += wanted[name][axis]
                ends.append(total)
            if total != first.shape[axis]:
                raise CannotConvertError("its parts have other sizes in the other model")
            return _parts(rule, first, axis, ends)
        case "Transpose":
            return {renamed: [_transposed(first, given, wanted.get(whole))]}
        case "Interleave" if axis < len(first.shape) and first.shape[axis] % 2 == 0:
            outer, half = math.prod(first.shape[:axis]), first.shape[axis] // 2
            a, b = (2, half) if given.get("inverse") else (half, 2)
            key = renamed if len(rule.targets) == 1 else rule.targets[0]
            return {key: [swap(first, outer, a, b, first.shape)]}
        case "PermuteForRope":
            return {
                renamed if single else t: [_rotated(own[0], given, config)]
                if given.get("permute_layer_names") is None
                or any(name in t for name in given["permute_layer_names"])
                else own
                for t, own in current.items()
            }
    raise CannotConvertError(f"{step.name} of transformers is not known here")


def _parts(rule: Rule, source: Source, axis: int, ends: Sequence[int]) -> dict[str, list[Source]]:
    begins = [0, *ends]
    return {
        target: [cut(source, axis, start, stop)]
        for target, start, stop in zip(rule.targets, begins, ends, strict=False)
    }


def _transposed(source: Source, given: Mapping[str, Any], wanted: Shape | None) -> Source:
    shape = source.shape
    a, b = sorted(given.get(key, n) % max(1, len(shape)) for n, key in enumerate(("dim0", "dim1")))
    if b >= len(shape) or b != a + 1:
        raise CannotConvertError("these axes cannot be swapped")
    if given.get("check_dims"):
        if wanted is None:
            raise CannotConvertError("which of its axes comes first is not known")
        if shape == wanted:
            return source
    turned = (*shape[:a], shape[b], shape[a], *shape[b + 1 :])
    return swap(source, math.prod(shape[:a]), shape[a], shape[b], turned)


def _rotated(source: Source, given: Mapping[str, Any], config: Mapping[str, Any]) -> Source:
    """Return queries or keys in the order of rows of another form of rotary embeddings."""
    part = config.get(given["subconfig_key"]) if given.get("subconfig_key") else config
    heads = (part if isinstance(part, Mapping) else config).get("num_attention_heads")
    rows = source.shape[0] if source.shape else 0
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise CannotConvertError("how many attention heads there are is not known")
    half = rows // heads // 2
    a, b = (2, half) if given.get("inverse") else (half, 2)
    return swap(source, heads, a, b, source.shape)


def solved(described: Mapping[str, Source], values: Mapping[str, Source]) -> dict[str, Source]:
    """Return what stored tensors would be for tensors in memory to have given values.

    Args:
        described: of what stored tensors the tensors in memory are made, with leaves.
        values: the tensors in memory. Only what they give wholly is returned.
    """
    found: dict[str, Source] = {}
    parts: dict[int, list[tuple[int, int, Source]]] = defaultdict(list)

    def settle(node: Source, value: Source) -> None:
        if isinstance(node, Leaf):
            found[node.name] = reshaped(value, node.shape)
        elif isinstance(node, Joined):
            for part, start, stop in pieces(node):
                settle(part, columns(value, node.outer, start, stop, part.shape))
        elif isinstance(node, Swapped):
            settle(node.source, swap(value, node.outer, node.b, node.a, node.source.shape))
        else:
            assert isinstance(node, Cut)
            own = parts[id(node.source)]
            own.append((node.start, node.stop, value))
            own.sort(key=lambda each: each[0])
            bounds = [0, *(stop for _, stop, _ in own)]
            if bounds[-1] == node.row and all(
                start == end for (start, _, _), end in zip(own, bounds, strict=False)
            ):
                whole = _side_by_side([each for _, _, each in own], node.outer, node.source.shape)
                settle(node.source, whole)

    for name, value in values.items():
        settle(described[name], value)
    return found


def _side_by_side(sources: Sequence[Source], outer: int, shape: Shape) -> Source:
    """Return tensors (outer, …) beside one another, in the simplest form."""
    if len(sources) == 1:
        return reshaped(sources[0], shape)
    first = sources[0]
    if all(isinstance(s, Cut) and s.outer == outer for s in sources) and isinstance(first, Cut):
        cuts = [s for s in sources if isinstance(s, Cut)]
        chained = all(a.stop == b.start for a, b in itertools.pairwise(cuts))
        same = len({id(s.source) for s in cuts}) == 1
        if same and chained and cuts[0].start == 0 and cuts[-1].stop == cuts[0].row:
            return reshaped(first.source, shape)
    return Joined(tuple(sources), outer, shape)


def leaves_of(source: Source) -> Iterable[Leaf]:
    """Return the stored tensors in a description."""
    if isinstance(source, Leaf):
        return (source,)
    if isinstance(source, Joined):
        return (leaf for part in source.sources for leaf in leaves_of(part))
    assert isinstance(source, Cut | Swapped)
    return leaves_of(source.source)


def grounded(source: Source) -> Source:
    """Return a described tensor as a source that reads the stored ones."""
    if isinstance(source, Leaf):
        return source.source
    if isinstance(source, Joined):
        return Joined(tuple(map(grounded, source.sources)), source.outer, source.shape)
    if isinstance(source, Cut):
        inside = grounded(source.source)
        return columns(inside, source.outer, source.start, source.stop, source.shape)
    if isinstance(source, Swapped):
        inside = grounded(source.source)
        return swap(inside, source.outer, source.a, source.b, source.shape)
    return source


def text_at(text: str) -> re.Pattern[str]:
    """Return the expression of a text of whole parts of names, in which `*` is a number.

    >>> bool(text_at("experts.*.up").search("mlp.experts.12.up.weight"))
    True
    >>> bool(text_at("up.weight").search("mlp.gate_up.weight"))
    False
    """
    inside = re.escape(text).replace(r"\*", r"(\d+)")
    return re.compile(rf"(?<![^./]){inside}(?![^.])")
