"""Computes merges that are sources of other merges, when they are read.

A merge's statistics are measured at the first read. Of a merge that is read several times each
block is computed once, and of a method on whole tensors the whole. Both are kept while the output's
tensor is made: in memory where the budget allows, else in an unnamed temporary file beside the
output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from outliermerge.checkpoint.checksum import source_checksum
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.engines.base import Engine
from outliermerge.errors import OutlierMergeError, argument, shown
from outliermerge.execution.auxiliary import refuse_other_models, wholes
from outliermerge.execution.passes import Measured, NeedKey, Span, measure, needs_of, spans
from outliermerge.execution.rounds import run_here
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass
from outliermerge.methods.task import Task
from outliermerge.planning.job import row_elements
from outliermerge.planning.merged import MergedSource, WholeMerge


class Merges:
    """Computes `MergedSource`s for a reader.

    Args:
        choose_engine: returns the engine that computes a task.
        kept: the merges that are read several times.
        allow_non_finite: go on where values are infinite or NaN.
    """

    def __init__(
        self,
        choose_engine: Callable[[Task], Engine],
        *,
        kept: Container[MergedSource] = (),
        allow_non_finite: bool = False,
    ) -> None:
        self._choose_engine, self._allow_non_finite = choose_engine, allow_non_finite
        self._kept = kept
        self._depths = _Depths()

    def __call__(
        self, reader: Reader, merged: MergedSource, start: int, stop: int, out: memoryview
    ) -> None:
        """Fill `out` with elements of a merge, in its dtype."""
        size = merged.dtype.num_bytes
        if merged.task.cut == "tensor":
            whole = reader.held(merged, merged.num_bytes, partial(self._whole, reader, merged))
            out[:] = whole[start * size : stop * size]
            return
        with self._feed(reader, merged) as feed:
            if merged in self._kept:
                blocks = reader.held(merged, merged.num_bytes, partial(_Blocks, feed.prepared))
                blocks.read(feed, start, stop, out)
                return
            prepared = reader.once(merged, feed.prepared)
            for span in _spans(merged, start, stop):
                low, high = max(start, span[0]), min(stop, span[1])
                part = out[(low - start) * size : (high - start) * size]
                if (low, high) == span:
                    feed.merge(span, prepared, part)
                    continue
                block = feed.buffer("whole", (span[1] - span[0]) * size)
                feed.merge(span, prepared, block)
                part[:] = block[(low - span[0]) * size : (high - span[0]) * size]

    def _whole(self, reader: Reader, merged: MergedSource, out: memoryview) -> memoryview:
        with self._feed(reader, merged) as feed:
            feed.merge((0, merged.num_elements), feed.prepared(), out)
        return out

    @contextmanager
    def _feed(self, reader: Reader, merged: MergedSource) -> Iterator[_Feed]:
        with self._feeds(reader, [merged]) as (feed,):
            yield feed

    @contextmanager
    def _feeds(self, reader: Reader, tensors: Sequence[MergedSource]) -> Iterator[list[_Feed]]:
        depth = self._depths.current
        self._depths.current = depth + 1
        try:
            yield [
                _Feed(
                    merged,
                    reader,
                    self._choose_engine(merged.task),
                    depth,
                    self._allow_non_finite,
                    partial(self._of_model, reader, merged.whole),
                )
                for merged in tensors
            ]
        finally:
            self._depths.current = depth

    def _of_model(self, reader: Reader, whole: WholeMerge | None) -> Measured:
        """Return what methods need of all tensors of a model, measured once, in one thread."""
        assert whole is not None, "a method that measures whole models merges one of its tensors"

        def measured() -> Measured:
            with self._feeds(reader, whole.tensors) as feeds:
                tasks = [tensor.task for tensor in whole.tensors]
                return run_here(measure(tasks, [_Passing(feed) for feed in feeds], "model"))

        return cast(Measured, reader.once(whole, measured))


class _Depths(threading.local):
    """How many merges a thread is reading, one inside the other: each has buffers of its own."""

    current = 0


@dataclass
class _Feed:
    """The sources of a merge."""

    merged: MergedSource
    reader: Reader
    engine: Engine
    depth: int
    allow_non_finite: bool
    of_model: Callable[[], Measured]

    @property
    def num_elements(self) -> int:
        return self.merged.num_elements

    @property
    def measured_elements(self) -> int:
        return self.merged.block_elements

    def buffer(self, slot: object, num_bytes: int) -> memoryview:
        """Return this thread's buffer for a slot."""
        return self.engine.buffer(("stage", self.depth, slot), num_bytes)

    def prepared(self) -> Any:
        """Measure what the method needs, in this thread; None where all models are equal.

        As in a run of its own, the merge of equal models is the same model.
        """
        task = self.merged.task
        keeps = task.method.uses_base or task.method.idempotent(task.parameters)
        if keeps and not task.modifiers and self._is_identical():
            return None
        measured = run_here(measure([task], [self], "tensor"))
        needs = {name: measured[key] for name, key in needs_of(task, "tensor").items()}
        if of_model := needs_of(task, "model"):
            together = self.of_model()
            needs |= {name: together[key] for name, key in of_model.items()}
        others = self.merged.sources[len(task.dtypes) :]
        refuse_other_models(
            task, others, lambda row: source_checksum(self.merged.sources[row], self.reader)
        )
        whole = others[len(task.auxiliary) :]
        return self.engine.prepare(task, needs, wholes(task, whole, self.reader))

    def count(self, num_elements: int) -> None:
        """Count nothing: reads are counted by the reader of this merge."""

    def measure(self, span: Span, passes: Mapping[NeedKey, Pass]) -> dict[NeedKey, Any]:
        """Return what a span contributes to each of some passes."""
        raws = self._read(span, self.merged.sources[: len(self.merged.task.dtypes)])
        return self.engine.measure(self.merged.task, passes, raws, span[1] - span[0], span[0])

    def merge(self, span: Span, prepared: Any, out: memoryview) -> None:
        """Fill `out` with a merged span.

        Raises:
            OutlierMergeError: values are infinite or NaN.
        """
        task, num_elements = self.merged.task, span[1] - span[0]
        if prepared is None:
            first = self.merged.sources[0]
            (raw,) = self._read(span, (first,))
            finite = self.engine.is_finite(first.dtype, raw)
            self.engine.convert(first.dtype, raw, task.out_dtype, out)
        else:
            raws = self._read(span, self.merged.sources[: task.num_sources])
            finite, fits, _ = self.engine.merge(task, prepared, raws, num_elements, out, span[0])
            finite = finite and fits
        if not finite and not self.allow_non_finite:
            raise OutlierMergeError(
                f"tensor {shown(self.merged.name)} of a stage has values that are infinite or NaN. "
                f"Check its models; {argument('allow_non_finite', True)} goes on."
            )

    def _read(self, span: Span, sources: tuple[Source, ...]) -> list[memoryview]:
        raws = []
        for slot, source in enumerate(sources):
            raw = self.buffer(slot, (span[1] - span[0]) * source.dtype.num_bytes)
            source.read(self.reader, *span, raw)
            raws.append(raw)
        return raws

    def _is_identical(self) -> bool:
        """Tell whether all sources hold the same bytes; mostly their first elements decide."""
        sources = self.merged.sources[: len(self.merged.task.dtypes)]
        if len({source.dtype for source in sources}) > 1:
            return False
        for span in spans(self.num_elements, CHUNK_ELEMENTS):
            first, *others = self._read(span, sources)
            if not all(self.engine.equal(first, other) for other in others):
                return False
        return True


@dataclass
class _Passing:
    """The sources of a merge for a pass over all tensors of a model: nothing of them is kept."""

    feed: _Feed

    @property
    def num_elements(self) -> int:
        return self.feed.num_elements

    @property
    def measured_elements(self) -> int:
        return self.feed.measured_elements

    def count(self, num_elements: int) -> None:
        """Count nothing."""

    def measure(self, span: Span, passes: Mapping[NeedKey, Pass]) -> dict[NeedKey, Any]:
        """Return what a span contributes to each of some passes."""
        found = self.feed.measure(span, passes)
        if span[1] == self.num_elements:
            self.feed.reader.release((0, source) for source in self.feed.merged.sources)
        return found


class _Blocks:
    """The blocks of a merge that is read several times; each is computed when it is first read."""

    def __init__(self, prepare: Callable[[], Any], room: memoryview) -> None:
        self._prepared, self._room = prepare(), room
        self._lock = threading.Lock()
        self._computing: dict[Span, threading.Lock] = {}
        self._done: set[Span] = set()

    def read(self, feed: _Feed, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop."""
        step, size = feed.merged.block_elements, feed.merged.dtype.num_bytes
        last = min(feed.num_elements, -(-stop // step) * step)
        for span in spans(last, step, start=start // step * step):
            with self._lock:
                computing = self._computing.setdefault(span, threading.Lock())
            with computing:
                if span not in self._done:
                    feed.merge(span, self._prepared, self._room[span[0] * size : span[1] * size])
                    self._done.add(span)
        out[:] = self._room[start * size : stop * size]


def _spans(merged: MergedSource, start: int, stop: int) -> list[Span]:
    """Return blocks that cover a range of elements; methods on rows get whole rows."""
    step = merged.block_elements
    if merged.task.cut == "element":
        return spans(stop, step, start=start)
    row = row_elements(merged.shape)
    return spans(min(merged.num_elements, -(-stop // row) * row), step, start=start // row * row)
