"""Finds the tensors that have a row for every token, and rearranges their rows.

In a few tensors, such as a bias of shape (1, V), tokens are along the last axis: for them, "rows"
means columns.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.computed import ComputedTensor, read_rows
from outliermerge.checkpoint.sources import DTYPES, Checkpoint, DType, Reading, Source, TensorMeta
from outliermerge.planning.vocabulary_config import vocabulary_sizes

if TYPE_CHECKING:
    from torch import Tensor

_KNOWN_NAME = re.compile(
    r"(^|[./])("
    r"(embed_tokens|tok_embeddings|embed_in|wte|word_embeddings|shared)\.weight"
    r"|(lm_head|embed_out|output|output_layer|(predictions|lm_head)\.decoder)\.(weight|bias)"
    r"|predictions\.bias)$"
)
_KNOWN_LAST = re.compile(r"(^|[./])final_logits_bias$")  # (1, V), of BART and its relatives
_NUMBERED = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True)
class VocabularyTensors:
    """The tensors whose rows are the vocabulary's.

    Attributes:
        axes: for each tensor's name, the axis along which it has a row for every token: 0 or -1.
        num_rows: the number of rows of each model's vocabulary tensors, by the model's number.
        unclear: tensors for which neither the name nor the number of rows decides it.
    """

    axes: Mapping[str, int]
    num_rows: Mapping[int, int]
    unclear: tuple[str, ...]


def find_vocabulary_tensors(
    checkpoints: Sequence[Checkpoint], configs: Sequence[Mapping[str, Any]]
) -> VocabularyTensors:
    """Find the tensors with a row for every token, by the models' configs and names.

    These are tensors whose number of rows differs between models as vocab_size does, and tensors
    named as embeddings or heads. Any other tensor with as many rows as tokens, the same in all
    models, may have that number by chance: it is unclear.
    """
    sizes = [vocabulary_sizes(config) for config in configs]
    sure: dict[str, dict[int, int]] = {}
    axes: dict[str, int] = {}
    unclear: list[str] = []
    for name in dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors):
        held = {
            number: checkpoint.tensors[name]
            for number, checkpoint in enumerate(checkpoints)
            if name in checkpoint.tensors
        }
        axis = axes[name] = _axis(name, held, sizes)
        rows = {number: source.shape[axis] for number, source in held.items() if source.shape}
        if (
            len(rows) < len(held)
            or len({_without(axis, source.shape) for source in held.values()}) > 1
            or not all(source.dtype.is_float for source in held.values())
            or any(rows[number] in sizes[number][1] for number in held)
        ):
            continue
        sized = all(rows[number] == sizes[number][0] for number in held)
        pattern = _KNOWN_NAME if axis == 0 else _KNOWN_LAST
        known = pattern.search(name) and not _NUMBERED.search(name)
        if known or (sized and len(set(rows.values())) > 1):
            sure[name] = rows
        elif sized:
            unclear.append(name)
    num_rows: dict[int, int] = {}
    for number, (size, _) in enumerate(sizes):
        found = [rows[number] for rows in sure.values() if number in rows]
        if found:
            num_rows[number] = size if size in found else found[0]
    if not sure and unclear:  # only the config says so
        num_rows = {
            number: size
            for number, (size, _) in enumerate(sizes)
            if size is not None and any(name in checkpoints[number].tensors for name in unclear)
        }
    names = [
        name
        for name, rows in sure.items()
        if all(num_rows[number] == count for number, count in rows.items())
    ]
    unclear += [name for name in sure if name not in names]
    return VocabularyTensors({name: axes[name] for name in names}, num_rows, tuple(unclear))


def _axis(
    name: str, held: Mapping[int, Source], sizes: Sequence[tuple[int | None, set[int]]]
) -> int:
    """Return the axis along which a tensor may have its tokens: the first, or else the last."""
    if any(len(source.shape) < 2 for source in held.values()):
        return 0
    if _KNOWN_LAST.search(name):
        return -1
    sized = [all(s.shape[axis] == sizes[n][0] for n, s in held.items()) for axis in (0, -1)]
    return -1 if sized[1] and not sized[0] and not _KNOWN_NAME.search(name) else 0


def _without(axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if axis == 0 else shape[:-1]


@dataclass(frozen=True, slots=True)
class Run:
    """Rows `start` to `stop` of a tensor, each the mean of rows of one or several sources.

    Attributes:
        parts: the numbers of the sources, each with the source's row that goes to `start`.
    """

    start: int
    stop: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class RearrangedRows(ComputedTensor):
    """Rows copied from sources or averaged over them, in runs that cover the tensor in order."""

    sources: tuple[Source, ...]
    runs: tuple[Run, ...]

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return tuple(dict.fromkeys(meta for source in self.sources for meta in source.stored))

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of `dtype`."""
        import torch

        result = torch.empty(last - first, self.num_columns, dtype=getattr(torch, self.dtype.name))
        index = bisect_right(self.runs, first, key=lambda run: run.start) - 1
        position = first
        while position < last:
            run = self.runs[index]
            stop = min(last, run.stop)
            result[position - first : stop - first] = self._part(
                reader, run.parts, position - run.start, stop - run.start
            )
            position, index = stop, index + 1
        return result

    def _part(
        self, reader: Reading, parts: tuple[tuple[int, int], ...], first: int, last: int
    ) -> Tensor:
        number, row = parts[0]
        values = read_rows(reader, self.sources[number], row + first, row + last)
        if len(parts) == 1:
            return values
        total = values.double()
        for number, row in parts[1:]:
            total += read_rows(reader, self.sources[number], row + first, row + last)
        return total / len(parts)


@dataclass(frozen=True, kw_only=True)
class RearrangedColumns(RearrangedRows):
    """Like RearrangedRows, for a tensor (…, V): runs are along its last axis."""

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def num_columns(self) -> int:
        return self.shape[-1]

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, V) of `dtype`."""
        import torch

        read = [
            reader.values(source, first * width, last * width).view(last - first, width)
            for source in self.sources
            for width in (source.shape[-1],)
        ]
        result = torch.empty(last - first, self.num_columns, dtype=getattr(torch, self.dtype.name))
        for run in self.runs:
            width = run.stop - run.start
            parts = [read[number][:, start : start + width] for number, start in run.parts]
            if len(parts) > 1:
                parts = [torch.stack([part.double() for part in parts]).mean(0)]
            result[:, run.start : run.stop] = parts[0]
        return result


def rearrange(
    own: int,
    sources: Mapping[int, Source],
    cells: Sequence[tuple[tuple[int, int], ...]],
    axis: int = 0,
) -> Source:
    """Return a model's tensor with given rows; its own source if these are its own rows in order.

    Args:
        own: the model's number.
        sources: the tensor of each model that has it, by the model's number.
        cells: for every row, the models and their rows whose mean it is.
        axis: the axis of the rows, 0 or -1.
    """
    source = sources[own]
    spans = list(_spans(cells))
    if spans == [(0, source.shape[axis], ((own, 0),))]:
        return source
    used = dict.fromkeys(number for _, _, parts in spans for number, _ in parts)
    places = {number: place for place, number in enumerate(used)}
    means = any(len(parts) > 1 for _, _, parts in spans)
    others = _without(axis, source.shape)
    rearranged = RearrangedRows if axis == 0 else RearrangedColumns
    return rearranged(
        name=source.name,
        shape=(len(cells), *others) if axis == 0 else (*others, len(cells)),
        out_dtype=source.out_dtype,
        dtype=_common_dtype([sources[number].dtype for number in used], means),
        sources=tuple(sources[number] for number in used),
        runs=tuple(
            Run(start, stop, tuple((places[number], row) for number, row in parts))
            for start, stop, parts in spans
        ),
    )


def _spans(
    cells: Sequence[tuple[tuple[int, int], ...]],
) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
    start = 0
    for stop in range(1, len(cells) + 1):
        follows = stop < len(cells) and cells[stop] == tuple(
            (number, row + 1) for number, row in cells[stop - 1]
        )
        if not follows:
            yield start, stop, cells[start]
            start = stop


def _common_dtype(dtypes: Sequence[DType], means: bool) -> DType:
    if len(set(dtypes)) == 1 and not means:
        return dtypes[0]
    return DTYPES["float64" if DTYPES["float64"] in dtypes else "float32"]
