"""How one tensor is cut into spans and blocks, which threads work on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from outliermerge.checkpoint.by_kernels import is_by_kernels
from outliermerge.checkpoint.checksum import DIGEST_BYTES, PIECE_ELEMENTS, piece_digests
from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Region, TensorMeta
from outliermerge.engines.base import Engine
from outliermerge.engines.cpu import KernelEngine
from outliermerge.execution.passes import Span, spans
from outliermerge.methods.kernel_call import Place
from outliermerge.planning.blocks import block_elements
from outliermerge.planning.plan import Job, Options, Plan, row_elements
from outliermerge.storage.stamps import other_bytes

_SHORT_BYTES = 240  # kernels compute no digest of a piece this short
_ROW_ELEMENTS = 1 << 18  # of a longer row a kernel would read too much twice


class Sink(Protocol):
    """Where merged bytes go."""

    def place(self, tensor: OutputTensor, start: int) -> tuple[int, int, int]:
        """Return a file, an element's position in it, and the file for direct writes, or -1."""

    def wrote(self, tensor: OutputTensor, span: Span) -> None:
        """Note that kernels have written a span to its place."""

    def write(self, tensor: OutputTensor, start: int, data: memoryview) -> None:
        """Write elements from `start` on."""

    def digests(self, tensor: OutputTensor, start: int, out: memoryview) -> bytes:
        """Return the digests of written pieces from `start` on; `out` has the size of them all."""

    def stop(self) -> None:
        """Let no thread go on waiting in one of the calls; it gets an error."""


class Work:
    """Jobs with the same sources, and their engine: how their tensor is cut, what was read so far.

    A thread works on one span at a time. Kernels work through it piece by piece, from file to
    file; other engines block by block.

    Attributes:
        in_pieces: whether spans begin where pieces begin, and not where rows do.
        completes_rows: whether kernels read what is lacking of the rows that spans cut.
    """

    def __init__(self, jobs: Sequence[Job], engine: Engine, plan: Plan, options: Options) -> None:
        job = jobs[0]
        self.job, self.engine, self.read_bytes = job, engine, 0
        self._seen: list[dict[int, bytes]] = [{} for _ in job.sources]
        self.block_elements = min(block_elements(each, options) for each in jobs)
        self._threads = options.threads
        metas = [meta for _, meta in job.sources]
        self.element_bytes = sum(meta.dtype.num_bytes for meta in metas)
        stored = [*(meta.dtype for meta in metas), *(job.output.dtype for job in jobs)]
        self._smallest = min(dtype.num_bytes for dtype in stored)
        self.moved_bytes = self.element_bytes + sum(job.output.dtype.num_bytes for job in jobs)
        by_element = job.action != "merge" or job.task.cut == "element"
        self.completes_rows = not by_element and _completes_rows(jobs, options)
        self._fuses = (
            (by_element or self.completes_rows)
            and isinstance(engine, KernelEngine)
            and all(
                is_by_kernels(meta)
                or (
                    isinstance(meta, TensorMeta) and meta.offset is not None and meta.dtype.is_float
                )
                for meta in metas
            )
        )
        self.completes_rows &= self._fuses
        self.in_pieces = by_element or self.completes_rows

    def count(self, num_elements: int, *, sources: int | None = None) -> None:
        """Count the bytes that a round reads of all sources, or of the first ones only."""
        for _, meta in self.job.sources[:sources]:
            stored = sum(tensor.num_bytes for tensor in meta.stored)
            self.read_bytes += stored * num_elements // max(1, meta.num_elements)

    def fuses(self, span: Span) -> bool:
        """Tell whether kernels can read a span from files and compute the digests of its pieces."""
        last = (span[1] - span[0] - 1) % PIECE_ELEMENTS + 1
        return self._fuses and last * self._smallest > _SHORT_BYTES

    def places(self, reader: Reader, span: Span, *, sources: int | None = None) -> list[Place]:
        """Return for each source where kernels read a span.

        Raises:
            OSError: a file cannot be opened.
        """
        start, stop = span
        if self.completes_rows:  # kernels read the whole rows
            row = row_elements(self.job.output.shape)
            start, stop = start // row * row, min(-(-stop // row) * row, self.job.num_elements)
        wanted: list[Any] = []
        for _, meta in self.job.sources[:sources]:
            if is_by_kernels(meta):
                wanted.append(meta.place(reader, (start, stop), span[0]))
                continue
            assert isinstance(meta, TensorMeta) and meta.offset is not None
            ends = [meta.offset + at * meta.dtype.num_bytes for at in (span[0], start, stop)]
            wanted.append(Region(meta.path, *ends))
        return reader.opened(wanted)

    def note(self, row: int, start: int, digests: bytes) -> None:
        """Record the digests of a source's pieces that were just read, from an element on.

        Raises:
            ChangedInputError: an earlier reading gave other bytes.
        """
        seen = self._seen[row]
        for number in range(len(digests) // DIGEST_BYTES):
            one = digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            self._note(seen, row, start + number * PIECE_ELEMENTS, one)

    def note_raw(self, row: int, span: Span, raw: memoryview) -> None:
        """Record the digests of a source's elements that were just read.

        Blocks of whole rows do not end where pieces end, and a later round may read pieces. So
        digests are computed of the ranges between all these ends.
        """
        size, step = self.job.sources[row][1].dtype.num_bytes, self.block_elements
        start, stop = span
        while start < stop:
            end = min(stop, start // PIECE_ELEMENTS * PIECE_ELEMENTS + PIECE_ELEMENTS)
            if not self.in_pieces:
                end = min(end, start // step * step + step)
            part = raw[(start - span[0]) * size : (end - span[0]) * size]
            self._note(self._seen[row], row, start, piece_digests(part, size))
            start = end

    def _note(self, seen: dict[int, bytes], row: int, start: int, digest: bytes) -> None:
        if seen.setdefault(start, digest) != digest:
            source = self.job.sources[row][1]
            raise other_bytes({meta.path: None for meta in source.stored}, source.name)

    def not_finite(self, raws: Sequence[memoryview]) -> set[int]:
        """Return the indices of the sources that hold an infinite value or NaN."""
        return {
            row
            for row, (raw, (_, meta)) in enumerate(zip(raws, self.job.sources, strict=True))
            if not self.engine.is_finite(meta.dtype, raw)
        }

    def out(self, job: Job, block: Span) -> memoryview:
        """Return this thread's buffer for a block of output."""
        return self.engine.buffer("out", (block[1] - block[0]) * job.output.dtype.num_bytes)

    @property
    def measured_elements(self) -> int:
        """How many elements a statistic measures at a time."""
        return self._fused_elements() if self._fuses else self.block_elements

    def spans(self) -> list[Span]:
        """Return the spans of the last round, which merges."""
        if not self.in_pieces:
            return spans(self.job.num_elements, self.block_elements)
        elements = self._fused_elements() if self._fuses else self._aligned()
        return spans(self.job.num_elements, elements)

    def split(self, span: Span) -> Iterator[Span]:
        """Cut a span into blocks."""
        step = self._aligned() if self.in_pieces else self.block_elements
        for start in range(*span, step):
            yield start, min(start + step, span[1])

    def blocks(self) -> list[Span]:
        """Return blocks that begin where pieces begin."""
        return spans(self.job.num_elements, self._aligned())

    def first_piece_and_blocks(self) -> list[Span]:
        """Return the range of the first piece, and blocks of the rest."""
        first = min(PIECE_ELEMENTS, self.job.num_elements)
        return [(0, first), *spans(self.job.num_elements, self._aligned(), start=first)]

    def _fused_elements(self) -> int:
        num_pieces = -(-self.job.num_elements // PIECE_ELEMENTS)
        share = num_pieces // self._threads * PIECE_ELEMENTS
        return min(self._aligned(), max(PIECE_ELEMENTS, share))

    def _aligned(self) -> int:
        return max(PIECE_ELEMENTS, self.block_elements // PIECE_ELEMENTS * PIECE_ELEMENTS)


def _completes_rows(jobs: Sequence[Job], options: Options) -> bool:
    """Tell whether kernels merge by rows, and read what is lacking of the rows that a span cuts."""
    return all(
        job.task.cut == "row"
        and options.uses_kernels(job)
        and not options.uses_torch(job)
        and row_elements(job.output.shape) <= _ROW_ELEMENTS
        for job in jobs
    )
