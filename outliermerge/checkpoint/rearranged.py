"""Tensors put together of others, cut out of one, or with two axes swapped: the same values.

Each is seen as a matrix: `outer` rows, which are contiguous in a source. So joining and cutting
along any axis is joining and cutting of columns, and nothing is held but what is read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.sources import DType, OfSource, Reading, Sized, Source, TensorMeta

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Elements = NDArray[Any]

_RUN_BYTES = 4096  # shorter runs are read together with what lies between them
_UNIT_BYTES = 1 << 25  # the most that is read, and kept a while, of what has its axes swapped


@dataclass(frozen=True)
class Joined(Sized):
    """Tensors (outer, …) side by side. A Source.

    Attributes:
        sources: of one dtype.
        outer: how many rows each of them has.
        shape: of the whole.
    """

    sources: tuple[Source, ...]
    outer: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.sources[0].name

    @property
    def dtype(self) -> DType:
        return self.sources[0].dtype

    @property
    def out_dtype(self) -> DType:
        return self.sources[0].out_dtype

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return tuple(dict.fromkeys(meta for source in self.sources for meta in source.stored))

    @cached_property
    def ends(self) -> list[int]:
        """Where each source ends in a row of the whole."""
        return [*accumulate(source.num_elements // self.outer for source in self.sources)]

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded)."""
        size, ends = self.dtype.num_bytes, self.ends
        if self.outer > 1 and ends[-1] * size < _RUN_BYTES * len(self.sources):
            self._read_rows(reader, start, stop, out)
            return
        position = start
        while position < stop:
            row, column = divmod(position, ends[-1])
            number = bisect_right(ends, column)
            begin = ends[number - 1] if number else 0
            width = ends[number] - begin
            last = min(stop, position + ends[number] - column)
            place = row * width + column - begin
            part = out[(position - start) * size : (last - start) * size]
            self.sources[number].read(reader, place, place + last - position, part)
            position = last

    def _read_rows(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Read whole rows of every source."""
        import numpy

        width = self.ends[-1]
        first, last = start // width, -(-stop // width)
        parts = [
            _rows(reader, source, first, last, source.num_elements // self.outer)
            for source in self.sources
        ]
        flat = numpy.concatenate(parts, 1).reshape(-1)
        _fill(out, flat[start - first * width : stop - first * width])


@dataclass(frozen=True)
class Cut(OfSource):
    """Columns of a tensor (outer, …). A Source.

    Attributes:
        start, stop: the columns, as elements of a row.
    """

    source: Source
    outer: int
    start: int
    stop: int
    shape: tuple[int, ...]

    @property
    def row(self) -> int:
        """How many elements a row of the source has."""
        return self.source.num_elements // self.outer

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded)."""
        size, width = self.dtype.num_bytes, self.stop - self.start
        if self.outer > 1 and width * size < _RUN_BYTES:
            first, last = start // width, -(-stop // width)
            rows = _rows(reader, self.source, first, last, self.row)[:, self.start : self.stop]
            _fill(out, rows.reshape(-1)[start - first * width : stop - first * width])
            return
        position = start
        while position < stop:
            row, column = divmod(position, width)
            last = min(stop, position + width - column)
            place = row * self.row + self.start + column
            part = out[(position - start) * size : (last - start) * size]
            self.source.read(reader, place, place + last - position, part)
            position = last


@dataclass(frozen=True)
class Swapped(OfSource):
    """A tensor (outer, a, b, inner) as (outer, b, a, inner). A Source."""

    source: Source
    outer: int
    a: int
    b: int
    shape: tuple[int, ...]

    @property
    def inner(self) -> int:
        return self.num_elements // max(1, self.outer * self.a * self.b)

    @property
    def work_bytes(self) -> int:
        """The memory that a thread needs besides its block."""
        return min(2 * _UNIT_BYTES, 2 * self.num_bytes // self.outer)

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded)."""
        line = self.a * self.inner
        unit, size = self.b * line, self.dtype.num_bytes
        for number in range(start // unit, -(-stop // unit)):
            low, high = max(start, number * unit), min(stop, (number + 1) * unit)
            first, last = (low - number * unit) // line, -(-(high - number * unit) // line)
            lines = self._lines(reader, number, first, last)
            at = number * unit + first * line
            part = out[(low - start) * size : (high - start) * size]
            _fill(part, lines.reshape(-1)[low - at : high - at])

    def _lines(self, reader: Reading, number: int, first: int, last: int) -> Elements:
        """Return (last - first, a, inner): the indices first to last of b, of one of `outer`."""
        inner, unit, size = self.inner, self.a * self.b * self.inner, self.dtype.num_bytes
        if (last - first) * inner * size < _RUN_BYTES and unit * size <= _UNIT_BYTES:
            rows = _rows(reader, self.source, number, number + 1, unit)
            lines: Elements = rows.reshape(self.a, self.b, inner)[:, first:last]
        else:
            starts = (number * unit + (row * self.b + first) * inner for row in range(self.a))
            num = last - first
            runs = [_read(reader, self.source, at, at + num * inner) for at in starts]
            lines = _joined(runs).reshape(self.a, num, inner)
        return lines.swapaxes(0, 1)


def _read(reader: Reading, source: Source, start: int, stop: int) -> Elements:
    """Return elements start to stop of a source, as whole numbers of their size."""
    import numpy

    raw = bytearray((stop - start) * source.dtype.num_bytes)
    source.read(reader, start, stop, memoryview(raw))
    return numpy.frombuffer(raw, dtype=f"u{source.dtype.num_bytes}")


def _joined(parts: Sequence[Elements]) -> Elements:
    import numpy

    return numpy.concatenate(parts)


def _rows(reader: Reading, source: Source, first: int, last: int, width: int) -> Elements:
    return _read(reader, source, first * width, last * width).reshape(last - first, width)


def _fill(out: memoryview, values: Elements) -> None:
    import numpy

    numpy.frombuffer(out, dtype=values.dtype)[:] = values


def join(sources: Sequence[Source], axis: int, shape: tuple[int, ...] | None = None) -> Source:
    """Return tensors side by side along an axis.

    Args:
        shape: of the whole, where it has another axis than the sources.

    >>> from outliermerge.checkpoint.made import HeldTensor
    >>> join([HeldTensor("a", (2, 3), ""), HeldTensor("b", (2, 4), "")], 1).shape
    (2, 7)
    """
    first = sources[0].shape
    outer = math.prod(first[:axis])
    size = sum(source.shape[axis] for source in sources) if shape is None else 0
    whole = (*first[:axis], size, *first[axis + 1 :]) if shape is None else shape
    if len(sources) == 1:
        return reshaped(sources[0], whole)
    if all(isinstance(source, Cut) for source in sources):
        cuts = [source for source in sources if isinstance(source, Cut)]
        if _is_whole(cuts) and cuts[0].outer == outer:
            return reshaped(cuts[0].source, whole)
    return Joined(tuple(sources), outer, whole)


def _is_whole(cuts: Sequence[Cut]) -> bool:
    """Tell whether cuts are all of a tensor, in order."""
    bounds = [(cut.start, cut.stop) for cut in cuts]
    return (
        len({(id(cut.source), cut.outer) for cut in cuts}) == 1
        and bounds[0][0] == 0
        and bounds[-1][1] == cuts[0].row
        and all(one[1] == other[0] for one, other in pairwise(bounds))
    )


def stack(sources: Sequence[Source]) -> Source:
    """Return tensors of one shape along a new first axis."""
    return join(sources, 0, (len(sources), *sources[0].shape))


def cut(source: Source, axis: int, start: int, stop: int) -> Source:
    """Return the indices start to stop (excluded) of an axis."""
    shape = source.shape
    inner = math.prod(shape[axis + 1 :])
    new = (*shape[:axis], stop - start, *shape[axis + 1 :])
    return columns(source, math.prod(shape[:axis]), start * inner, stop * inner, new)


def one_of(source: Source, index: int) -> Source:
    """Return one index of the first axis, without that axis."""
    inner = math.prod(source.shape[1:])
    return columns(source, 1, index * inner, (index + 1) * inner, source.shape[1:])


def columns(source: Source, outer: int, start: int, stop: int, shape: tuple[int, ...]) -> Source:
    """Return the columns start to stop of a tensor (outer, …), in the simplest form."""
    if start == 0 and stop * outer == source.num_elements:
        return reshaped(source, shape)
    if isinstance(source, Joined) and source.outer == outer:
        begins = [0, *source.ends]
        number = bisect_right(source.ends, start)
        low, high = begins[number], begins[number + 1]
        if stop <= high:
            return columns(source.sources[number], outer, start - low, stop - low, shape)
    if isinstance(source, Joined) and outer == 1:  # within one source's part of one row
        row, column = divmod(start, source.ends[-1])
        number = bisect_right(source.ends, column)
        begin = source.ends[number - 1] if number else 0
        if column + stop - start <= source.ends[number]:
            place = row * (source.ends[number] - begin) + column - begin
            return columns(source.sources[number], 1, place, place + stop - start, shape)
    if isinstance(source, Cut) and source.outer == outer:
        moved = source.start
        return columns(source.source, outer, start + moved, stop + moved, shape)
    if isinstance(source, Cut) and outer == 1:
        row, column = divmod(start, source.stop - source.start)
        if column + stop - start <= source.stop - source.start:
            place = row * source.row + source.start + column
            return columns(source.source, 1, place, place + stop - start, shape)
    if isinstance(source, TensorMeta) and outer == 1 and source.offset is not None:
        offset = source.offset + start * source.dtype.num_bytes
        return replace(source, shape=shape, offset=offset)
    return Cut(source, outer, start, stop, shape)


def reshaped(source: Source, shape: tuple[int, ...]) -> Source:
    """Return a tensor in another shape."""
    if source.shape == shape:
        return source
    if isinstance(source, Joined | Cut | Swapped):
        return replace(source, shape=shape)
    if isinstance(source, TensorMeta) and source.offset is not None:
        return replace(source, shape=shape)
    return Cut(source, 1, 0, source.num_elements, shape)


def swap(source: Source, outer: int, a: int, b: int, shape: tuple[int, ...]) -> Source:
    """Return a tensor (outer, a, b, …) as (outer, b, a, …)."""
    if a == 1 or b == 1:
        return reshaped(source, shape)
    if isinstance(source, Swapped) and (source.outer, source.a, source.b) == (outer, b, a):
        return reshaped(source.source, shape)
    return Swapped(source, outer, a, b, shape)


def pieces(source: Joined) -> Iterator[tuple[Source, int, int]]:
    """Yield each of the sources of a joined tensor, and where it is in a row."""
    start = 0
    for part, stop in zip(source.sources, source.ends, strict=True):
        yield part, start, stop
        start = stop
