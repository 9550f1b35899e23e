"""A merge as a source: it is computed from other sources when it is read, and is not stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import xxhash

from outliermerge.checkpoint.quantized.fitted import Scales
from outliermerge.checkpoint.rearranged import Swapped
from outliermerge.checkpoint.sources import (
    DTYPES,
    DType,
    Reading,
    Sized,
    Source,
    TensorMeta,
    inner,
)
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.methods.task import Task
from outliermerge.planning.job import row_elements

_BLOCK_ELEMENTS = 4 * CHUNK_ELEMENTS


@dataclass(eq=False)
class WholeMerge:
    """All merged tensors of a model, over which some statistics are measured together."""

    tensors: tuple[MergedSource, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class MergedSource(Sized):
    """The merge of other sources. A Source; its values are rounded once, to the task's dtype.

    Attributes:
        name: for messages.
        task: how they are merged.
        sources: the base, where the method uses one, then the models; then the method's auxiliary
            tensors, those that are taken whole last.
        stored_dtype: the dtype of an output if the spec does not set one; None is the task's.
        whole: the merge that it is a tensor of, where the method measures whole models.
    """

    name: str
    task: Task
    sources: tuple[Source, ...]
    stored_dtype: DType | None = None
    whole: WholeMerge | None = None

    def __repr__(self) -> str:
        return f"MergedSource({self.name!r}, {self._digest})"

    @cached_property
    def _digest(self) -> str:
        """Stand for what it is computed of: stages that use others twice would be long to spell."""
        task = self.task
        modifiers = [(modifier.name, dict(own)) for modifier, own in task.modifiers]
        spelt = (
            f"{task.method.path}, {dict(task.parameters)}, {task.context}, {modifiers}, "
            f"{task.compute_dtype}, {self.sources}, {self.out_dtype}"
        )
        return xxhash.xxh3_128_hexdigest(spelt.encode("utf-8", "surrogatepass"))

    @property
    def dtype(self) -> DType:
        return self.task.out_dtype

    @property
    def out_dtype(self) -> DType:
        return self.stored_dtype or self.task.out_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.task.shape

    @cached_property
    def stored(self) -> tuple[TensorMeta, ...]:
        """The stored tensors that it is computed from, each once."""
        return tuple(dict.fromkeys(meta for source in self.sources for meta in source.stored))

    @property
    def block_elements(self) -> int:
        """How many elements are merged at a time; whole rows for methods on rows."""
        is_by_row = self.task.cut == "row"
        rows = row_elements(self.shape) * self.task.rows_at_once if is_by_row else 1
        return max(rows, _BLOCK_ELEMENTS // rows * rows)

    @cached_property
    def work_bytes(self) -> int:
        """The memory that a thread needs to merge a block, with those of merges in its sources.

        A method on whole tensors needs it for the whole tensor.
        """
        task, in_blocks = self.task, self.sources[: self.task.num_sources]
        sizes = [source.dtype.num_bytes for source in in_blocks]
        compute = DTYPES[task.compute_dtype].num_bytes
        workspace = [
            task.method.workspace(len(sizes)),
            *(m.workspace(1) for m, _ in task.modifiers),
        ]
        elements = self.num_elements if task.cut == "tensor" else self.block_elements
        per_element = sum(sizes) + self.dtype.num_bytes + compute * (len(sizes) + max(workspace))
        block = min(elements, self.num_elements) * per_element
        return block + task.prepared_bytes + bytes_of_merges(self.sources)

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop, in `dtype`.

        Raises:
            OutlierMergeError: a source cannot be read, or has infinite or NaN values.
        """
        if stop > start:
            reader.merge(self, start, stop, out)


@dataclass(frozen=True)
class Restored(Sized):
    """A source whose values an output stores in another dtype by default. A Source."""

    source: Source
    out_dtype: DType

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop, in `dtype`."""
        self.source.read(reader, start, stop, out)


def merge_of(source: Source) -> MergedSource | None:
    """Return the merge that a tensor is a copy of; None for other tensors."""
    source = source.source if isinstance(source, Restored) else source
    return source if isinstance(source, MergedSource) else None


def merges_in(sources: Iterable[Source]) -> list[MergedSource]:
    """Return the merges among sources, and in them, each once."""
    found, seen, pending = list[MergedSource](), set[int](), list(sources)
    while pending:
        source = pending.pop()
        if id(source) not in seen:
            seen.add(id(source))
            found += [source] if isinstance(source, MergedSource) else []
            pending += inner(source)
    return found


def bytes_of_merges(sources: Iterable[Source]) -> int:
    """Return the memory that a thread needs for sources that are computed of others.

    They are read one after the other, but buffers are kept.
    """
    return max(
        (
            source.work_bytes
            if isinstance(source, MergedSource)
            else (source.work_bytes if isinstance(source, Swapped | Scales) else 0)
            + bytes_of_merges(inner(source))
            for source in sources
        ),
        default=0,
    )


def read_again(num_passes: int, sources: Iterable[Source]) -> frozenset[MergedSource]:
    """Return the merges among sources, and in them, that are read more than once.

    Args:
        num_passes: how often the sources are read.
    """
    counts: dict[MergedSource, int] = {}
    pending = [(num_passes, source) for source in sources]
    while pending:
        passes, source = pending.pop()
        if isinstance(source, MergedSource):
            counts[source] = counts.get(source, 0) + passes
            if counts[source] > passes:  # what it reads has been counted
                continue
            passes = source.task.method.num_passes(source.task.parameters)
        pending += [(passes, each) for each in inner(source)]
    return frozenset(source for source, count in counts.items() if count > 1)
