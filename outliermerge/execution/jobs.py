"""Makes one output tensor: its sources are compared, copied or merged, and the result recorded."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from outliermerge.arguments import nothing
from outliermerge.checkpoint.checksum import piece_digests, tensor_checksum
from outliermerge.checkpoint.quantized.encoded import codes_in
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.engines.base import Engine
from outliermerge.engines.cpu import KernelEngine
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.execution.auxiliary import refuse_other_models
from outliermerge.execution.cuts import Sink
from outliermerge.execution.exact import are_whole, same_values
from outliermerge.execution.files import FileFeed, WrittenSpan
from outliermerge.execution.passes import Measured, Span, fold_reports, measure, needs_of
from outliermerge.execution.pipeline import merge_tensor
from outliermerge.execution.rounds import Round, Steps
from outliermerge.planning.buffers import maps_rows
from outliermerge.planning.plan import Job, Options, Plan
from outliermerge.planning.tied import WAYS_OUT
from outliermerge.planning.tied_names import is_head


@dataclass
class JobResult:
    """The record of an output tensor that is written.

    Attributes:
        action: `merge`, or `copy` if the bytes are those of a source.
        checksum: the checksum of the output tensor.
        read: the checksum of each source tensor, by the number of its input.
        read_bytes: bytes read from its sources in all passes. Several outputs that were made in one
            reading share one figure.
        statistics: the values of the method's needs and report, by name.
        non_finite: the sources, or the output, that have infinite or NaN values.
    """

    action: str
    checksum: str
    read: dict[int, str]
    read_bytes: int = 0
    statistics: dict[str, Any] = field(default_factory=dict)
    non_finite: list[str] = field(default_factory=list)


class _Share:
    """The progress of a job, which ends at what was planned.

    A tensor may be read more often than planned, where a window of magnitudes misses the rank or
    values have 64 bits, or less often, where it is only copied.
    """

    def __init__(self, on_progress: Callable[[int], None], num_bytes: int) -> None:
        self._on_progress, self._left, self._lock = on_progress, num_bytes, threading.Lock()

    def advance(self, num_bytes: int) -> None:
        """Count bytes, as far as they were planned; called by any thread."""
        with self._lock:
            counted = min(num_bytes, self._left)
            self._left -= counted
        if counted:
            self._on_progress(counted)

    def finish(self) -> None:
        self.advance(self._left)


class JobRunner:
    """Makes output tensors, each in rounds that threads share.

    Args:
        choose_engine: returns the engine that computes a job.
        on_progress: called with the bytes just worked on, by any thread.
    """

    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        options: Options,
        choose_engine: Callable[[Job], Engine],
        on_progress: Callable[[int], None],
    ) -> None:
        self._plan, self._reader, self._options = plan, reader, options
        self._choose_engine, self._on_progress = choose_engine, on_progress

    def run(
        self, outputs: Sequence[tuple[Job, Sink]], known: Sequence[Measured]
    ) -> Steps[list[JobResult]]:
        """Read, merge, check and write one tensor in one or several ways.

        Args:
            outputs: jobs with the same sources and compute dtype, and the sinks of their bytes.
            known: for each job the statistics that were measured over the whole model.
        """
        first, *others = (job for job, _ in outputs)
        num_bytes = self._plan.num_work_bytes(first) - _bytes_of_model_passes(first)
        share = _Share(self._on_progress, num_bytes + sum(job.num_written_bytes for job in others))
        feed = self._feed([first, *others], [sink for _, sink in outputs], share.advance)
        results = yield from self._made(feed, outputs, known)
        share.finish()
        return results

    def _made(
        self, feed: FileFeed, outputs: Sequence[tuple[Job, Sink]], known: Sequence[Measured]
    ) -> Steps[list[JobResult]]:
        job = outputs[0][0]
        if job.action == "equal":
            yield from self._check_equal(job, feed)
        if job.action == "merge":
            unchanged = [_keeps_equal_models(each) for each, _ in outputs]
            if not any(unchanged) or not (yield from self._identical(feed)):
                return (yield from self._merge(feed, known))
        else:
            unchanged = [True] * len(outputs)
        results = []
        for number, ((job, sink), is_copy) in enumerate(zip(outputs, unchanged, strict=True)):
            if is_copy:
                results.append((yield from self._copy(feed, job, sink)))
            else:
                alone = feed.only(number)
                results += yield from self._merge(alone, known[number : number + 1])
        return results

    def check_equal(self, job: Job) -> Steps[None]:
        """Raise OutlierMergeError unless all sources of a job hold the same values."""
        yield from self._check_equal(job, self._feed([job]))

    def measure_model(self, jobs: Sequence[Job]) -> Steps[Measured]:
        """Measure the statistics that methods need of all tensors of a model together.

        Args:
            jobs: all merges of a plan; each of them has all models.
        """
        shares = [_Share(self._on_progress, _bytes_of_model_passes(job)) for job in jobs]
        feeds = [
            self._feed([job], on_progress=share.advance)
            for job, share in zip(jobs, shares, strict=True)
        ]
        measured = yield from measure([job.task for job in jobs], feeds, "model")
        for share in shares:
            share.finish()
        return measured

    def _feed(
        self,
        jobs: Sequence[Job],
        sinks: Sequence[Sink] = (),
        on_progress: Callable[[int], None] = nothing,
    ) -> FileFeed:
        return FileFeed(
            jobs,
            sinks,
            plan=self._plan,
            reader=self._reader,
            engine=self._choose_engine(jobs[0]),
            options=self._options,
            on_progress=on_progress,
        )

    def _identical(self, feed: FileFeed) -> Steps[bool]:
        """Tell whether all sources hold the same bytes; mostly their first pieces decide.

        If the tensor is only copied, values are compared, and sources may have different dtypes.
        """
        job = feed.work.job
        if len(job.sources) < 2:
            return True
        dtypes = [meta.dtype for _, meta in job.sources]
        if len(set(dtypes)) > 1 and job.action == "merge":
            return False

        def same(span: Span) -> bool:
            raws = feed.read_all(span)
            first, *others = raws
            is_same = all(
                feed.engine.equal(first, other)
                if dtype == dtypes[0]
                else same_values(dtypes[0], first, dtype, other)
                for dtype, other in zip(dtypes[1:], others, strict=True)
            )
            for row, raw in enumerate(raws[:1] if is_same else raws):  # else equal to the first
                feed.work.note_raw(row, span, raw)
            return is_same

        first, *rest = feed.work.first_piece_and_blocks()
        for blocks in ([first], rest):
            feed.work.count(sum(stop - start for start, stop in blocks))
            results = yield Round(same, blocks)
            if not all(results):
                return False
        return True

    def _all_whole(self, feed: FileFeed) -> Steps[bool]:
        """Tell whether all sources hold whole numbers."""
        dtypes = [meta.dtype for _, meta in feed.work.job.sources]

        def whole(span: Span) -> bool:
            return all(map(are_whole, dtypes, feed.read_all(span)))

        return all((yield Round(whole, feed.work.blocks())))

    def _check_equal(self, job: Job, feed: FileFeed) -> Steps[None]:
        if (yield from self._identical(feed)):
            return
        models = [self._plan.inputs[number].reference for number, _ in job.sources]
        if job in self._plan.checks:
            way_out = WAYS_OUT if is_head(job.name) else "Such models cannot be merged as they are."
            raise OutlierMergeError(f"{job.reason}. They are not. {way_out}")
        number, meta = job.sources[0]
        if maps_rows(job.name, meta, self._plan.inputs[number].checkpoint.tensors):
            raise OutlierMergeError(
                f"tensor {job.name!r} ({meta.dtype.name} {list(meta.shape)}) says what rows of the "
                f"weights stand for, and differs between:\n{listing(models)}\nA row of one model "
                "is for another token or entry in the next (draft models: their draft vocabularies "
                "differ), so that a merge would mix them, and no `unequal` helps. Merge models "
                "that have the same map."
            )
        dtypes = [meta.dtype.name for _, meta in job.sources]
        is_mixed = len(set(dtypes)) > 1
        kind, what = dtypes[0], "it differs"
        if is_mixed:
            models = [f"{model} ({name})" for model, name in zip(models, dtypes, strict=True)]
            what = "its dtype and its values differ"
        advice = "Make it equal."
        if is_mixed and not (yield from self._all_whole(self._feed([job]))):
            raise OutlierMergeError(
                f"tensor {job.name!r} is a weight with fractions in one model and integers in "
                f"another:\n{listing(models)}\nConvert the model that has integers: these are "
                "rounded, or codes of a quantised weight."
            )
        if job.reason.startswith("extra"):
            advice = "Give `extra: copy` to one of them and `extra: drop` to the others."
        elif self._plan.inputs[0].role == "base":
            advice = "`unequal: base` takes the base model's, or make it equal."
        raise OutlierMergeError(
            f"tensor {job.name!r} ({kind}, {job.reason}) cannot be merged, only copied, "
            f"but {what} between:\n{listing(models)}\n{advice}"
        )

    def _copy(self, feed: FileFeed, job: Job, sink: Sink) -> Steps[JobResult]:
        number, meta = job.sources[0]
        converts, keys = meta.dtype != job.output.dtype, job.task.rounding_keys

        def copy_blocks(span: Span) -> WrittenSpan:
            done = WrittenSpan(digests=[[]])
            for block in feed.work.split(span):
                raw = out = feed.read(meta, block, 0)
                done.digests[0].append(piece_digests(raw, meta.dtype.num_bytes))
                feed.work.note(0, block[0], done.digests[0][-1])
                if meta.dtype.is_float and not feed.engine.is_finite(meta.dtype, raw):
                    done.bad.add(0)
                if converts:
                    out = feed.work.out(job, block)
                    fits = feed.engine.convert(
                        meta.dtype, raw, job.output.dtype, out, keys, block[0]
                    )
                    done.fits = done.fits and (fits or bool(done.bad))
                feed.refuse_non_finite(job, [done])
                feed.write(job, sink, block, out, done)
            return done

        def copy(span: Span) -> WrittenSpan:
            kernels = feed.engine
            if not feed.work.fuses(span) or not isinstance(kernels, KernelEngine) or converts:
                return copy_blocks(span)
            try:
                (source,) = feed.places(span, sources=1)
                target = sink.place(job.output, span[0])
                finite, digests = kernels.copy(meta.dtype, source, span[1] - span[0], target)
            except (OSError, EOFError):
                return copy_blocks(span)  # its error names the file and the tensor
            feed.work.note(0, span[0], digests)
            if not finite:
                return copy_blocks(span)
            sink.wrote(job.output, span)
            feed.on_progress(2 * meta.dtype.num_bytes * (span[1] - span[0]))
            return WrittenSpan(digests=[[digests]], written=[digests])

        feed.work.count(job.num_elements, sources=1)
        items: list[WrittenSpan] = yield Round(copy, feed.work.spans())
        return JobResult(
            action="copy",
            checksum=tensor_checksum(piece for item in items for piece in item.written),
            read={number: tensor_checksum(piece for item in items for piece in item.digests[0])},
            read_bytes=feed.work.read_bytes,
            statistics=_coding_error(self._reader.noted(codes_in(meta))),
            non_finite=feed.non_finite(job, items),
        )

    def _merge(self, feed: FileFeed, known: Sequence[Measured]) -> Steps[list[JobResult]]:
        needs, items = yield from merge_tensor(feed.tasks, feed, feed.engine, known=known)
        results = []
        for i, (job, sink) in enumerate(feed.outputs):
            own = [item[i] for item in items]
            reports = [report for item in own for report in item.reports]
            result = JobResult(
                action="merge",
                checksum=tensor_checksum(piece for item in own for piece in item.written),
                read={},
                statistics=dict(needs[i]) | fold_reports(reports),
                non_finite=feed.non_finite(job, own),
            )
            for row, (number, _) in enumerate(job.sources):
                pieces = (piece for item in own for piece in item.digests[row])
                result.read[number] = tensor_checksum(pieces)
            if not feed.work.in_pieces:
                yield from self._checksum_again(feed, job, sink, result)
            checksums = [result.read[number] for number, _ in job.sources]
            refuse_other_models(job.task, job.auxiliary, checksums.__getitem__)
            result.read_bytes = feed.work.read_bytes
            results.append(result)
        return results

    def _checksum_again(
        self, feed: FileFeed, job: Job, sink: Sink, result: JobResult
    ) -> Steps[None]:
        """Checksum a written tensor whose blocks of rows do not end where pieces end."""

        def written(span: Span) -> bytes:
            return sink.digests(job.output, span[0], feed.work.out(job, span))

        def read(span: Span, row: int, meta: Source) -> bytes:
            raw = feed.read(meta, span, 0)
            feed.work.note_raw(row, span, raw)
            return piece_digests(raw, meta.dtype.num_bytes)

        pieces = feed.work.blocks()
        result.checksum = tensor_checksum((yield Round(written, pieces)))
        feed.work.count(job.num_elements)
        for row, (number, meta) in enumerate(job.sources):
            digests = yield Round(partial(read, row=row, meta=meta), pieces)
            result.read[number] = tensor_checksum(digests)


def _coding_error(squares: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return how far codes are from what they stand for: the root of the mean of squares.

    Args:
        squares: for each piece the sums of squares, of what is off and of the values.
    """
    if not squares:
        return {}
    off, whole = (math.fsum(each) for each in zip(*squares, strict=True))
    return {"quantization_error": float(f"{math.sqrt(off / whole) if whole else 0.0:.4g}")}


def _keeps_equal_models(job: Job) -> bool:
    """Tell whether the merge of equal models is the same model."""
    method = job.task.method
    if job.modifiers:
        return False
    return method.uses_base or method.idempotent(job.parameters)


def _bytes_of_model_passes(job: Job) -> int:
    """Return the bytes of the readings for what the method needs to know of the whole model."""
    if job.action != "merge" or not needs_of(job.task, "model"):
        return 0
    return (job.num_passes - 1) * sum(source.num_bytes for _, source in job.sources)
