"""Slices of models: each model gets a view with renumbered layers, and each slice is a merge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError, SpecError, listing, quoted, shown
from outliermerge.planning.buffers import is_computed
from outliermerge.planning.layers import Stack, choose_stack
from outliermerge.planning.plan import Input, Job, LayersFrom, Stacked
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.models import ModelSpec
from outliermerge.spec.settings import Setting, SpecPath, find_layers
from outliermerge.spec.slices import SliceSpec
from outliermerge.spec.text import Mistakes

MAX_LAYERS = 2000  # ten times as many as any published model has
# T5 has one table of relative positions for all layers of a stack, in the first of them.
_OF_ALL_LAYERS = re.compile(r"relative_attention_bias\.")


@dataclass(frozen=True)
class Part:
    """A merge of models into tensors of the output: into all of them, or into those of a slice.

    Attributes:
        models: the merged models, with their settings.
        numbers: the numbers of these inputs.
        first: the number of the input that gives names and shapes.
        inputs: all inputs; the part's have the output's names.
        names: the names of the tensors.
        levels: settings for all models of the part, from the highest precedence to the lowest.
        positions: by name of a tensor in a layer, the layer's place from 0 to 1.
        own_names: by number of an input and name of the output, the input's name, if it differs.
    """

    models: tuple[ModelSpec, ...]
    numbers: tuple[int, ...]
    first: int
    inputs: tuple[Input, ...]
    names: tuple[str, ...]
    levels: tuple[Mapping[str, Setting], ...]
    positions: Mapping[str, float]
    own_names: Mapping[tuple[int, str], str]

    def own_name(self, number: int, name: str) -> str:
        """Return the name in an input of a tensor of the output."""
        return self.own_names.get((number, name), name)


def whole(spec: MergeSpec, inputs: tuple[Input, ...], numbers: Sequence[int]) -> Part:
    """Return the merge of whole models."""
    names = tuple(dict.fromkeys(n for entry in inputs for n in entry.checkpoint.tensors))
    positions = {name: layer.position for name, layer in find_layers(names).items()}
    levels = (spec.settings,)
    return Part(spec.models, tuple(numbers), 0, inputs, names, levels, positions, {})


def stack_slices(
    spec: MergeSpec,
    inputs: Sequence[Input],
    numbers: Sequence[int],
    whole: Input,
    wanted: str | None,
) -> Stacked | None:
    """Return which layers of which inputs the output's layers are from; None without slices.

    Args:
        numbers: the numbers of the inputs of `spec.models`.
        whole: the model whose stacks of layers are looked at.
        wanted: the stack that is sliced.

    Raises:
        SpecError: a range is beyond a model, or it is not clear which stack is meant.
    """
    if not spec.slices:
        return None
    source = spec.source
    at: SpecPath = ("stack",) if spec.document.stack is not None else ("slices",)
    if set(inputs[0].checkpoint.components) != {""}:
        said = f"{shown(inputs[0].reference)} has several parts, whose layers cannot be sliced"
        raise source.error(at, said, at_key=True)
    try:
        stack = choose_stack(whole.checkpoint.tensors, wanted, whole.reference)
    except OutlierMergeError as error:
        raise source.error(at, str(error), at_key=at == ("slices",)) from error
    if (total := sum(one.num_layers for one in spec.slices)) > MAX_LAYERS:
        said = f"found {quoted(total)} layers in all, expected at most {MAX_LAYERS:,}"
        raise source.error(("slices",), said, at_key=True)
    number_of = {m.reference: n for m, n in zip(spec.models, numbers, strict=True)}
    if spec.base is not None:
        number_of[spec.base.reference] = 0
    depths = [_depth(entry, stack) for entry in inputs]
    mistakes = Mistakes(source)
    slices, at_layer = [], 0
    for one in spec.slices:
        mistakes.found += _beyond(spec, one, stack, {r: depths[n] for r, n in number_of.items()})
        mistakes.found += _twice(spec, one, number_of)
        slices.append(_from(one, number_of, at_layer))
        at_layer += one.num_layers
    mistakes.refuse()
    return Stacked(stack.name, stack.kind, stack.prefix, tuple(slices), tuple(depths))


def _beyond(
    spec: MergeSpec, one: SliceSpec, stack: Stack, depths: Mapping[str, int]
) -> Iterator[SpecError]:
    """Yield an error for each model that has fewer layers than a slice takes of it."""
    listed = [entry.model for entry in spec.document.slices[int(one.path[1])].sources]
    for reference, (start, stop) in one.ranges.items():
        if stop <= depths[reference]:
            continue
        has = f"{shown(reference)} has {depths[reference]} layers ({shown(stack.prefix)}*)"
        if reference in listed:
            end = f": end at {depths[reference]}" if start < depths[reference] else ""
            where = (*one.path, "sources", listed.index(reference), "layer_range")
            yield spec.source.error(where, f"found [{start}, {stop}], but {has}{end}")
        else:
            said = f"takes the same layers of the base model, but {has}: list it with its own range"
            yield spec.source.error(one.path, said)


def _twice(spec: MergeSpec, one: SliceSpec, number_of: Mapping[str, int]) -> Iterator[SpecError]:
    """Yield an error for each model of a slice that is in it under another name, too."""
    seen = {0} if spec.method.uses_base else set()
    for model in one.models:
        if number_of[model.reference] in seen:
            said = f"{model.reference!r} is the same model as another one of the slice"
            yield spec.source.error((*model.path, "model"), said)
        seen.add(number_of[model.reference])


def at_ends(stacked: Stacked, inputs: tuple[Input, ...]) -> tuple[Input, ...]:
    """Return the inputs; those that give no embeddings and no head have only layers.

    So their vocabulary and what they tie do not matter.
    """
    ends = {0, *stacked.slices[0].ranges, *stacked.slices[-1].ranges}
    return tuple(
        entry
        if number in ends
        else _with(
            entry,
            {
                name: source
                for name, source in entry.checkpoint.tensors.items()
                if name.startswith(stacked.prefix)
            },
        )
        for number, entry in enumerate(inputs)
    )


def parts_of(
    spec: MergeSpec, stacked: Stacked, inputs: tuple[Input, ...], whole: Input
) -> list[Part]:
    """Return a merge for each slice; what is outside the layers is in the first and the last.

    Args:
        whole: the model whose stacks of layers are looked at.
    """
    stack = choose_stack(whole.checkpoint.tensors, stacked.prefix, whole.reference)
    ends = {*stacked.slices[0].ranges, *stacked.slices[-1].ranges}
    indices = [_Index(entry, stack, number in ends) for number, entry in enumerate(inputs)]
    parts = []
    last = len(spec.slices) - 1
    for place, (one, layers) in enumerate(zip(spec.slices, stacked.slices, strict=True)):
        views: dict[int, dict[str, Source]] = {}
        own_names: dict[tuple[int, str], str] = {}
        positions: dict[str, float] = {}
        for number, (start, stop) in layers.ranges.items():
            views[number] = {}
            for own, name, source, position in indices[number].take(
                start, stop, layers.start, before=place == 0, after=place == last
            ):
                views[number][name] = source
                if own != name:
                    own_names[number, name] = own
                if position is not None:
                    positions[name] = position
        names = tuple(dict.fromkeys(n for view in views.values() for n in view))
        parts.append(
            Part(
                models=one.models,
                numbers=tuple(layers.numbers),
                first=layers.first,
                inputs=tuple(
                    _with(entry, views[number]) if number in views else entry
                    for number, entry in enumerate(inputs)
                ),
                names=names,
                levels=(one.settings, spec.settings),
                positions=positions,
                own_names=own_names,
            )
        )
    return parts


def stacked_reference(parts: Sequence[Part], reference: Mapping[str, Source]) -> dict[str, Source]:
    """Return the tensors that give the output of slices its names and shapes.

    Args:
        reference: the tensors of the first input. What is outside the layers and is not there is
            left out, so that the config has to know it: another model's head, for example.
    """
    return {
        name: source
        for part in parts
        for name, source in part.inputs[part.first].checkpoint.tensors.items()
        if name in part.positions or name in reference
    }


def unlike_layers(stacked: Stacked, inputs: Sequence[Input], owner: int) -> list[str]:
    """Return a note if layers lack tensors, or have others, than the output's config asks for.

    A layer that is copied from one model is compared with no other when it is planned.

    Args:
        inputs: with their own names.
        owner: the number of the input whose config the output has.
    """
    layers = [_layers_of(entry, stacked.prefix) for entry in inputs]
    known = list(layers[owner].values())
    unlike = []
    for one in stacked.slices:
        start, stop = one.ranges[one.first]
        for index in range(start, stop):
            ours = layers[one.first].get(index, {})
            if ours in known:
                continue
            wanted = layers[owner].get(index, known[0])
            differing = [
                f"{shown(rest)}: {_shape(ours.get(rest))}, there {_shape(wanted.get(rest))}"
                for rest in dict.fromkeys((*wanted, *ours))
                if ours.get(rest) != wanted.get(rest)
            ]
            unlike.append(
                f"layer {one.start + index - start}, from layer {index} of "
                f"{shown(inputs[one.first].reference)}: {'; '.join(differing[:3])}"
                + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
            )
    if not unlike:
        return []
    return [
        f"{len(unlike)} layer(s) of the output are like none of {shown(inputs[owner].reference)}, "
        f"whose config it has, and may not load:\n{listing(unlike, limit=5)}"
    ]


def _layers_of(entry: Input, prefix: str) -> dict[int, dict[str, tuple[int, ...]]]:
    """Return by layer of a stack the shapes of its tensors, without those that classes compute."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    tensors = entry.checkpoint.tensors
    for name, layer in find_layers(tensors).items():
        if layer.stack == prefix and not (
            is_computed(name, tensors[name])
            or _is_of_all_layers(name, prefix, layer.index, tensors)
        ):
            rest = name[len(prefix) + len(str(layer.index)) + 1 :]
            found.setdefault(layer.index, {})[rest] = tensors[name].shape
    return found


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


class _Index:
    """The tensors of a model by layer, to renumber some of them."""

    def __init__(self, entry: Input, stack: Stack, has_ends: bool) -> None:
        self._prefix = stack.prefix
        self._layers: dict[int, list[tuple[int, str, str, Source]]] = {}
        self._ends: dict[bool, list[tuple[int, str, Source, float | None]]] = {
            False: [], True: []
        }  # fmt: skip
        tensors = entry.checkpoint.tensors
        found = find_layers(tensors)
        for place, (name, source) in enumerate(tensors.items()):
            layer = found.get(name)
            if layer is not None and layer.stack == stack.prefix:
                rest = name[len(stack.prefix) + len(str(layer.index)) :]
                if not _is_of_all_layers(name, stack.prefix, layer.index, tensors):
                    self._layers.setdefault(layer.index, []).append((place, name, rest, source))
                    continue
                self._ends[False].append((place, name, source, None))
            elif has_ends:
                position = layer.position if layer else None
                self._ends[stack.is_after(name)].append((place, name, source, position))

    def take(
        self, start: int, stop: int, at: int, *, before: bool, after: bool
    ) -> list[tuple[str, str, Source, float | None]]:
        """Return own name, name in the output, source and position of some layers' tensors.

        Args:
            start, stop: the layers.
            at: the number of the first one in the output.
            before, after: also what is outside the layers.
        """
        taken: list[tuple[int, str, str, Source, float | None]] = []
        for index in range(start, stop):
            position = (index - start) / (stop - start - 1) if stop - start > 1 else 1.0
            for place, own, rest, source in self._layers.get(index, ()):
                name = f"{self._prefix}{at + index - start}{rest}"
                taken.append((place, own, name, source, position))
        for is_wanted, is_after in ((before, False), (after, True)):
            for place, name, source, other in self._ends[is_after] if is_wanted else ():
                taken.append((place, name, name, source, other))
        taken.sort(key=lambda entry: entry[0])
        return [entry[1:] for entry in taken]


def _is_of_all_layers(name: str, prefix: str, index: int, tensors: Mapping[str, Source]) -> bool:
    if index != 0 or not _OF_ALL_LAYERS.search(name):
        return False
    return f"{prefix}1{name[len(prefix) + 1 :]}" not in tensors


def several_dtypes(stacked: Stacked, jobs: Sequence[Job]) -> Iterator[str]:
    """Yield a note where a tensor has not the same dtype in all layers of the output."""
    dtypes: dict[str, set[str]] = {}
    for job in jobs:
        if job.output.dtype.is_float and job.name.startswith(stacked.prefix):
            rest = job.name.removeprefix(stacked.prefix).partition(".")[2]
            dtypes.setdefault(rest, set()).add(job.output.dtype.name)
    if any(len(each) > 1 for each in dtypes.values()):
        counts = Counter(job.output.dtype.name for job in jobs).most_common()
        yield (
            "layers have several dtypes, each that of its model: "
            f"{', '.join(f'{count} tensors in {name}' for name, count in counts)}. Loaders take "
            "the one that the config names for all; `out_dtype` stores all in one"
        )


def left_out(stacked: Stacked, inputs: Sequence[Input]) -> Iterator[str]:
    """Yield a note on each model whose layers that predict further tokens are left out."""
    for entry, depth in zip(inputs, stacked.depths, strict=True):
        if (more := _num_layers(entry, stacked.prefix) - depth) > 0:
            yield (
                f"{more} layer(s) of {shown(entry.reference)} that predict further tokens are left "
                "out of slices"
            )


def _num_layers(entry: Input, prefix: str) -> int:
    layers = find_layers(entry.checkpoint.tensors).values()
    return next((layer.num_layers for layer in layers if layer.stack == prefix), 0)


def _depth(entry: Input, stack: Stack) -> int:
    """Return how many layers a model has; without those that predict further tokens."""
    found = _num_layers(entry, stack.prefix)
    of_text = text_config(read_json(entry.home / "config.json"))
    said = of_text.get("num_hidden_layers")
    if stack.is_main and of_text.get("num_nextn_predict_layers") and isinstance(said, int):
        return min(found, said)
    return found


def _from(one: SliceSpec, number_of: Mapping[str, int], at: int) -> LayersFrom:
    return LayersFrom(
        start=at,
        stop=at + one.num_layers,
        first=number_of[one.first],
        numbers=tuple(number_of[model.reference] for model in one.models),
        ranges={number_of[reference]: layers for reference, layers in one.ranges.items()},
    )


def _with(entry: Input, tensors: Mapping[str, Source]) -> Input:
    return replace(entry, checkpoint=replace(entry.checkpoint, tensors=tensors))
