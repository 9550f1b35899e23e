"""Reads a tensor's blocks from files, checks them, and writes the merged blocks to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from outliermerge.checkpoint.checksum import piece_digests
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.engines.base import Engine
from outliermerge.engines.cpu import KernelEngine
from outliermerge.errors import OutlierMergeError, argument
from outliermerge.execution.auxiliary import wholes
from outliermerge.execution.cuts import Sink, Work
from outliermerge.execution.passes import NeedKey, Span
from outliermerge.methods.kernel_call import Place
from outliermerge.methods.statistics.base import Pass
from outliermerge.methods.task import Task
from outliermerge.planning.plan import Job, Options, Plan
from outliermerge.storage.failures import failure


@dataclass
class WrittenSpan:
    """The digests and checks of one span, as it was read and as it was written to one output.

    Attributes:
        digests: the digests of each source's pieces.
        written: the digests of the output's pieces.
        bad: indices of the sources with infinite or NaN values.
        fits: whether all merged values are in the range of the output's dtype.
        reports: the method's reports for the blocks of the span.
    """

    digests: list[list[bytes]]
    written: list[bytes] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)
    fits: bool = True
    reports: list[dict[str, Any]] = field(default_factory=list)


class FileFeed:
    """The sources of some jobs, in files, and the sinks of their outputs.

    Args:
        jobs: jobs with the same sources.
        sinks: where the output of each job goes; empty for jobs that only compare.
        on_progress: called with the bytes just worked on, by any thread.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        sinks: Sequence[Sink],
        *,
        plan: Plan,
        reader: Reader,
        engine: Engine,
        options: Options,
        on_progress: Callable[[int], None],
    ) -> None:
        self.work = Work(jobs, engine, plan, options)
        self.engine, self.on_progress, self.num_elements = engine, on_progress, jobs[0].num_elements
        self.outputs = list(zip(jobs, sinks, strict=False))
        self.tasks = [job.task for job in jobs if job.action == "merge"]
        self._plan, self._reader, self._options = plan, reader, options

    def only(self, number: int) -> FileFeed:
        """Return a feed for one of the outputs alone, which shares the digests of earlier reads."""
        alone = copy(self)
        alone.outputs, alone.tasks = [self.outputs[number]], [self.tasks[number]]
        return alone

    @property
    def measured_elements(self) -> int:
        return self.work.measured_elements

    def wholes(self, task: Task) -> Mapping[str, Any]:
        """Return what a method takes whole, by its keywords."""
        return wholes(task, self.work.job.prepared, self._reader)

    def spans(self) -> list[Span]:
        return self.work.spans()

    def count(self, num_elements: int) -> None:
        self.work.count(num_elements)

    def places(self, span: Span, *, sources: int | None = None) -> list[Place]:
        """Return for each source where kernels read a span."""
        return self.work.places(self._reader, span, sources=sources)

    def read(self, source: Source, span: Span, slot: object) -> memoryview:
        """Return a span of a source, in this thread's buffer for a slot."""
        raw = self.engine.buffer(slot, (span[1] - span[0]) * source.dtype.num_bytes)
        source.read(self._reader, *span, raw)
        return raw

    def read_all(self, span: Span) -> list[memoryview]:
        """Return a span of each source."""
        sources = self.work.job.sources
        return [self.read(source, span, slot) for slot, (_, source) in enumerate(sources)]

    def measure(self, span: Span, passes: Mapping[NeedKey, Pass]) -> dict[NeedKey, Any]:
        """Return what a span contributes to each of some passes."""
        work, kernels, num_elements = self.work, self.engine, span[1] - span[0]
        self.on_progress(num_elements * work.element_bytes)
        is_fused = work.fuses(span)
        if not is_fused:
            raws = self.read_all(span)
            for row, raw in enumerate(raws):
                work.note_raw(row, span, raw)
        if not (is_fused or work.completes_rows) or not isinstance(kernels, KernelEngine):
            return self.engine.measure(self.tasks[0], passes, raws, num_elements, span[0])

        def note(digests: Sequence[bytes]) -> None:
            if is_fused:  # those of short pieces are undefined
                self._note_all(span, digests)

        try:
            return kernels.measure_places(
                self.tasks[0], passes, self.places(span), num_elements, note, span[0]
            )
        except (OSError, EOFError) as error:
            self.read_all(span)  # if it fails again, the error names the file and the tensor
            # The passes may have counted a part of the span: it must not be measured twice.
            raise self._unread(error) from error

    def merge(self, span: Span, prepared: Sequence[Any]) -> list[WrittenSpan]:
        """Merge a span for each task: from file to file where kernels can, else block by block."""
        work, kernels = self.work, self.engine
        if not work.fuses(span) or not isinstance(kernels, KernelEngine):
            return self._merge_blocks(span, prepared)
        try:
            variants = [
                (task, made, sink.place(job.output, span[0]))
                for task, made, (job, sink) in zip(self.tasks, prepared, self.outputs, strict=True)
            ]
            read, results = kernels.merge_places(
                variants, self.places(span), span[1] - span[0], span[0]
            )
        except (OSError, EOFError):
            return self._merge_blocks(span, prepared)  # its error names the file and the tensor
        self._note_all(span, read)
        if not all(finite for finite, _, _ in results):
            return self._merge_blocks(span, prepared)
        for job, sink in self.outputs:
            sink.wrote(job.output, span)
        self.on_progress((span[1] - span[0]) * work.moved_bytes)
        digests = [[pieces] for pieces in read]
        return [
            WrittenSpan(digests=digests, written=[pieces], reports=[report])
            for _, report, pieces in results
        ]

    def _merge_blocks(self, span: Span, prepared: Sequence[Any]) -> list[WrittenSpan]:
        work = self.work
        done = [WrittenSpan(digests=[[] for _ in work.job.sources]) for _ in self.outputs]
        for block in work.split(span):
            raws = self.read_all(block)
            self.on_progress(sum(map(len, raws)))
            pieces = [
                piece_digests(raw, source.dtype.num_bytes)
                for raw, (_, source) in zip(raws, work.job.sources, strict=True)
                if work.in_pieces
            ]
            self._note_all(block, pieces)
            for row, raw in enumerate(() if work.in_pieces else raws):
                work.note_raw(row, block, raw)
            others = [
                self.read(source, block, ("auxiliary", number))
                for number, source in enumerate(work.job.in_blocks)
            ]
            for each, task, made, (job, sink) in zip(
                done, self.tasks, prepared, self.outputs, strict=True
            ):
                for digests, piece in zip(each.digests, pieces, strict=False):
                    digests.append(piece)
                out = work.out(job, block)
                finite, fits, report = self._computed(block, task, made, [*raws, *others], out)
                if not finite:
                    each.bad |= work.not_finite(raws)
                each.fits = each.fits and fits
                each.reports.append(report)
                self.refuse_non_finite(job, [each])
                self.write(job, sink, block, out, each)
        return done

    def _computed(
        self, block: Span, task: Task, made: Any, raws: list[memoryview], out: memoryview
    ) -> tuple[bool, bool, dict[str, Any]]:
        """Merge a block that has been read; what lacks of rows that it cuts, kernels read."""
        num_elements, kernels = block[1] - block[0], self.engine
        if not self.work.completes_rows or not isinstance(kernels, KernelEngine):
            return kernels.merge(task, made, raws, num_elements, out, block[0])
        try:
            return kernels.merge(task, made, self.places(block), num_elements, out, block[0])
        except (OSError, EOFError) as error:
            raise self._unread(error) from error

    def _unread(self, error: OSError | EOFError) -> Exception:
        """Return the error of a source that kernels could not read."""
        number = error.filename if isinstance(error, OSError) else error.args[1]
        source = self.work.job.sources[number if isinstance(number, int) else 0][1]
        return failure(source.stored[0].path, "read", error, tensor=self.work.job.name)

    def write(self, job: Job, sink: Sink, block: Span, out: memoryview, done: WrittenSpan) -> None:
        """Write a block of an output, and record its digests."""
        done.written.append(piece_digests(out, job.output.dtype.num_bytes))
        sink.write(job.output, block[0], out)
        self.on_progress(len(out))

    def refuse_non_finite(self, job: Job, items: list[WrittenSpan]) -> None:
        """Raise OutlierMergeError for infinite and NaN values, unless they are allowed."""
        places = self.non_finite(job, items)
        if places and not self._options.allow_non_finite:
            raise OutlierMergeError(
                f"tensor {job.name!r} has values that are infinite or NaN "
                f"{' and '.join(places)}. Check that model; "
                f"{argument('allow_non_finite', True)} goes on and lists such tensors."
            )

    def non_finite(self, job: Job, items: list[WrittenSpan]) -> list[str]:
        """Return where values are infinite or NaN: in which sources, and in the output.

        The output is named if no source has such values, or if they are allowed.
        """
        rows = sorted({row for item in items for row in item.bad})
        places = [f"in {self._plan.inputs[job.sources[row][0]].reference}" for row in rows]
        fits = all(item.fits for item in items)
        if not fits and (not places or self._options.allow_non_finite):
            places.append(f"in the output ({job.output.dtype.name})")
        return places

    def _note_all(self, span: Span, digests: Sequence[bytes]) -> None:
        for row, own in enumerate(digests):
            self.work.note(row, span[0], own)
