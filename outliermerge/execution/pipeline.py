"""Makes the bytes of one output tensor: read, merged, checked, checksummed and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from outliermerge.checkpoint.checksum import piece_digests, tensor_checksum
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.engines.base import Engine
from outliermerge.engines.cpu import KernelEngine
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.execution.cuts import Sink, Work
from outliermerge.execution.exact import are_whole, same_values
from outliermerge.execution.passes import NeedKey, Span, fold_reports, measure_needs
from outliermerge.execution.rounds import Round, Steps
from outliermerge.methods.statistics.base import Pass
from outliermerge.planning.buffers import maps_rows
from outliermerge.planning.plan import Job, Options, Plan
from outliermerge.planning.tied import WAYS_OUT
from outliermerge.planning.tied_names import is_head
from outliermerge.storage.failures import failure


@dataclass
class JobResult:
    """What is known of an output tensor once it is written.

    Attributes:
        action: `merge`, or `copy` where the bytes are those of a source.
        checksum: of the output tensor.
        read: checksum of each source tensor by the input's number.
        read_bytes: of its sources, all passes counted; of several outputs together.
        statistics: the method's needs and report, by name.
        non_finite: where infinite or NaN values are.
    """

    action: str
    checksum: str
    read: dict[int, str]
    read_bytes: int = 0
    statistics: dict[str, Any] = field(default_factory=dict)
    non_finite: list[str] = field(default_factory=list)


@dataclass
class _Written:
    """What one item of the last round read and wrote for one output, in pieces' digests."""

    digests: list[list[bytes]]
    written: list[bytes] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)
    fits: bool = True
    reports: list[dict[str, Any]] = field(default_factory=list)


class JobRunner:
    """Makes output tensors, each by steps that threads share.

    Args:
        choose_engine: returns what computes a job.
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

    def run(self, outputs: Sequence[tuple[Job, Sink]]) -> Steps[list[JobResult]]:
        """Read, merge, check and write one tensor in one or several ways.

        Args:
            outputs: jobs with the same sources and arithmetic, and where their bytes go.
        """
        work = self._work(*(job for job, _ in outputs))
        if work.job.action == "equal":
            yield from self.check_equal(work.job, work)
        if work.job.action == "merge":
            unchanged = [_keeps_equal_models(job) for job, _ in outputs]
            if not any(unchanged) or not (yield from self._identical(work)):
                return (yield from self._merge(work, outputs))
        else:
            unchanged = [True] * len(outputs)
        results = []
        for (job, sink), is_copy in zip(outputs, unchanged, strict=True):
            if is_copy:
                results.append((yield from self._copy(work, job, sink)))
            else:
                results += yield from self._merge(work, [(job, sink)])
        return results

    def _work(self, *jobs: Job) -> Work:
        return Work(jobs, self._choose_engine(jobs[0]), self._plan, self._options)

    def _read(self, work: Work, meta: Source, span: Span, slot: object) -> memoryview:
        raw = work.engine.buffer(slot, (span[1] - span[0]) * meta.dtype.num_bytes)
        meta.read(self._reader, *span, raw)
        return raw

    def _read_all(self, work: Work, span: Span) -> list[memoryview]:
        sources = work.job.sources
        return [self._read(work, meta, span, slot) for slot, (_, meta) in enumerate(sources)]

    def _identical(self, work: Work) -> Steps[bool]:
        """Tell whether all sources hold the same bytes, by their first pieces as a rule.

        Of a tensor that is only copied the values count, of whatever dtype.
        """
        job = work.job
        if len(job.sources) < 2:
            return True
        dtypes = [meta.dtype for _, meta in job.sources]
        if len(set(dtypes)) > 1 and job.action == "merge":
            return False

        def same(span: Span) -> bool:
            raws = self._read_all(work, span)
            first, *others = raws
            is_same = all(
                work.engine.equal(first, other)
                if dtype == dtypes[0]
                else same_values(dtypes[0], first, dtype, other)
                for dtype, other in zip(dtypes[1:], others, strict=True)
            )
            for row, raw in enumerate(raws[:1] if is_same else raws):  # else equal to the first
                work.note_raw(row, span, raw)
            return is_same

        first, *rest = work.first_piece_and_blocks()
        for blocks in ([first], rest):
            work.count(sum(stop - start for start, stop in blocks))
            results = yield Round(same, blocks)
            if not all(results):
                return False
        return True

    def _all_whole(self, work: Work) -> Steps[bool]:
        """Tell whether all sources hold whole numbers."""
        dtypes = [meta.dtype for _, meta in work.job.sources]

        def whole(span: Span) -> bool:
            return all(map(are_whole, dtypes, self._read_all(work, span)))

        return all((yield Round(whole, work.blocks())))

    def check_equal(self, job: Job, work: Work | None = None) -> Steps[None]:
        """Raise OutlierMergeError unless all sources of a job hold the same values."""
        if (yield from self._identical(work or self._work(job))):
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
        if is_mixed and not (yield from self._all_whole(self._work(job))):
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

    def _copy(self, work: Work, job: Job, sink: Sink) -> Steps[JobResult]:
        number, meta = job.sources[0]
        converts = meta.dtype != job.output.dtype

        def copy_blocks(span: Span) -> _Written:
            done = _Written(digests=[[]])
            for block in work.split(span):
                raw = out = self._read(work, meta, block, 0)
                done.digests[0].append(piece_digests(raw, meta.dtype.num_bytes))
                work.note(0, block[0], done.digests[0][-1])
                if meta.dtype.is_float and not work.engine.is_finite(meta.dtype, raw):
                    done.bad.add(0)
                if converts:
                    out = work.out(job, block)
                    fits = work.engine.convert(meta.dtype, raw, job.output.dtype, out)
                    done.fits = done.fits and (fits or bool(done.bad))
                self._refuse_non_finite(job, [done])
                self._write(job, sink, block, out, done)
            return done

        def copy(span: Span) -> _Written:
            kernels = work.engine
            if not work.fuses(span) or not isinstance(kernels, KernelEngine) or converts:
                return copy_blocks(span)
            try:
                (source,) = work.places(self._reader, span, sources=1)
                target = sink.place(job.output, span[0])
                finite, digests = kernels.copy(meta.dtype, source, span[1] - span[0], target)
            except (OSError, EOFError):
                return copy_blocks(span)  # says where
            work.note(0, span[0], digests)
            if not finite:
                return copy_blocks(span)
            self._on_progress(2 * meta.dtype.num_bytes * (span[1] - span[0]))
            return _Written(digests=[[digests]], written=[digests])

        work.count(job.num_elements, sources=1)
        items: list[_Written] = yield Round(copy, work.spans())
        return JobResult(
            action="copy",
            checksum=tensor_checksum(piece for item in items for piece in item.written),
            read={number: tensor_checksum(piece for item in items for piece in item.digests[0])},
            read_bytes=work.read_bytes,
            non_finite=self._places(job, items),
        )

    def _merge(self, work: Work, outputs: Sequence[tuple[Job, Sink]]) -> Steps[list[JobResult]]:
        tasks = [job.task for job, _ in outputs]

        def note_all(span: Span, digests: Sequence[bytes]) -> None:
            for row, own in enumerate(digests):
                work.note(row, span[0], own)

        def measure(span: Span, passes: dict[NeedKey, Pass]) -> dict[NeedKey, Any]:
            num_elements = span[1] - span[0]
            self._on_progress(num_elements * work.element_bytes)
            kernels = work.engine
            if not work.fuses(span) or not isinstance(kernels, KernelEngine):
                raws = self._read_all(work, span)
                for row, raw in enumerate(raws):
                    work.note_raw(row, span, raw)
                return work.engine.measure(tasks[0], passes, raws, num_elements)
            try:
                places = work.places(self._reader, span)
                return kernels.measure_places(
                    tasks[0], passes, places, num_elements, partial(note_all, span)
                )
            except (OSError, EOFError) as error:
                self._read_all(work, span)  # says where, if it fails again
                # Some of it may have been counted: it must not be measured twice.
                number = error.filename if isinstance(error, OSError) else error.args[1]
                source = work.job.sources[number if isinstance(number, int) else 0][1]
                raise failure(source.stored[0].path, "read", error, tensor=work.job.name) from error

        needs = yield from measure_needs(
            tasks,
            measure,
            num_elements=work.job.num_elements,
            block_elements=work.measured_elements,
            on_pass=work.count,
        )
        prepared = [work.engine.prepare(task, own) for task, own in zip(tasks, needs, strict=True)]

        def merge_blocks(span: Span) -> list[_Written]:
            done = [_Written(digests=[[] for _ in work.job.sources]) for _ in outputs]
            for block in work.split(span):
                raws = self._read_all(work, block)
                self._on_progress(sum(map(len, raws)))
                pieces = [
                    piece_digests(raw, dtype.num_bytes)
                    for raw, dtype in zip(raws, tasks[0].dtypes, strict=True)
                    if work.in_pieces
                ]
                note_all(block, pieces)
                for row, raw in enumerate(() if work.in_pieces else raws):
                    work.note_raw(row, block, raw)
                for each, task, made, (job, sink) in zip(
                    done, tasks, prepared, outputs, strict=True
                ):
                    for digests, piece in zip(each.digests, pieces, strict=False):
                        digests.append(piece)
                    out = work.out(job, block)
                    finite, fits, report = work.engine.merge(
                        task, made, raws, block[1] - block[0], out
                    )
                    if not finite:
                        each.bad |= work.not_finite(raws)
                    each.fits = each.fits and fits
                    each.reports.append(report)
                    self._refuse_non_finite(job, [each])
                    self._write(job, sink, block, out, each)
            return done

        def merge(span: Span) -> list[_Written]:
            kernels = work.engine
            if not work.fuses(span) or not isinstance(kernels, KernelEngine):
                return merge_blocks(span)
            try:
                places = work.places(self._reader, span)
                variants = [
                    (task, made, sink.place(job.output, span[0]))
                    for task, made, (job, sink) in zip(tasks, prepared, outputs, strict=True)
                ]
                read, results = kernels.merge_places(variants, places, span[1] - span[0])
            except (OSError, EOFError):
                return merge_blocks(span)  # says where
            note_all(span, read)
            if not all(finite for finite, _, _ in results):
                return merge_blocks(span)
            self._on_progress((span[1] - span[0]) * work.moved_bytes)
            digests = [[pieces] for pieces in read]
            return [
                _Written(digests=digests, written=[pieces], reports=[report])
                for _, report, pieces in results
            ]

        work.count(work.job.num_elements)
        items: list[list[_Written]] = yield Round(merge, work.spans())
        results = []
        for i, (job, sink) in enumerate(outputs):
            own = [item[i] for item in items]
            reports = [report for item in own for report in item.reports]
            result = JobResult(
                action="merge",
                checksum=tensor_checksum(piece for item in own for piece in item.written),
                read={},
                statistics=dict(needs[i]) | fold_reports(reports),
                non_finite=self._places(job, own),
            )
            for row, (number, _) in enumerate(job.sources):
                pieces = (piece for item in own for piece in item.digests[row])
                result.read[number] = tensor_checksum(pieces)
            if not work.in_pieces:
                yield from self._checksum_again(work, job, sink, result)
            result.read_bytes = work.read_bytes
            results.append(result)
        return results

    def _checksum_again(self, work: Work, job: Job, sink: Sink, result: JobResult) -> Steps[None]:
        """Checksum a tensor whose blocks are rows, which do not end where pieces do."""

        def written(span: Span) -> bytes:
            out = work.out(job, span)
            sink.read(job.output, span[0], out)
            return piece_digests(out, job.output.dtype.num_bytes)

        def read(span: Span, row: int, meta: Source) -> bytes:
            raw = self._read(work, meta, span, 0)
            work.note_raw(row, span, raw)
            return piece_digests(raw, meta.dtype.num_bytes)

        pieces = work.blocks()
        result.checksum = tensor_checksum((yield Round(written, pieces)))
        work.count(job.num_elements)
        for row, (number, meta) in enumerate(job.sources):
            digests = yield Round(partial(read, row=row, meta=meta), pieces)
            result.read[number] = tensor_checksum(digests)

    def _write(self, job: Job, sink: Sink, block: Span, out: memoryview, done: _Written) -> None:
        done.written.append(piece_digests(out, job.output.dtype.num_bytes))
        sink.write(job.output, block[0], out)
        self._on_progress(len(out))

    def _refuse_non_finite(self, job: Job, items: list[_Written]) -> None:
        places = self._places(job, items)
        if places and not self._options.allow_non_finite:
            raise OutlierMergeError(
                f"tensor {job.name!r} has values that are infinite or NaN "
                f"{' and '.join(places)}. "
                "Check that model; --allow-non-finite goes on and lists such tensors."
            )

    def _places(self, job: Job, items: list[_Written]) -> list[str]:
        """Say where values are infinite or NaN; the output only adds to that what is allowed."""
        rows = sorted({row for item in items for row in item.bad})
        places = [f"in {self._plan.inputs[job.sources[row][0]].reference}" for row in rows]
        fits = all(item.fits for item in items)
        if not fits and (not places or self._options.allow_non_finite):
            places.append(f"in the output ({job.output.dtype.name})")
        return places


def _keeps_equal_models(job: Job) -> bool:
    """Tell whether models that are all equal come back as they are."""
    method = job.task.method
    return method.uses_base or method.idempotent(job.parameters)
