"""Runs one job: its blocks are read, merged, checked, checksummed and written.

Shape suffixes: S sources (the base, where there is one, then the models), E elements.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from outliermerge.blocks import Map, Span, fold_reports, measure_needs, merge_block, spans
from outliermerge.checkpoint.checksum import PIECE_ELEMENTS, piece_digests, tensor_checksum
from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.checkpoint.meta import Source
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.jobs import Job, Plan
from outliermerge.methods import find_method

if TYPE_CHECKING:
    from torch import Tensor


class Sink(Protocol):
    """Where merged bytes go."""

    def write(self, tensor: OutputTensor, start: int, data: memoryview) -> None:
        """Write elements from `start` on."""

    def read(self, tensor: OutputTensor, start: int, out: memoryview) -> None:
        """Read back elements from `start` on."""


@dataclass(frozen=True)
class Options:
    """How a plan is run.

    Attributes:
        device: `cpu`, `cuda`, `cuda:N`, or `auto` (a GPU where there is one).
        threads: worker threads; 0 means as many as there are processors, at most 8.
        memory_bytes: budget for blocks and intermediate results.
        allow_non_finite: go on where values are infinite or NaN, and list them.
    """

    device: str
    threads: int
    memory_bytes: int
    allow_non_finite: bool = False


@dataclass
class JobResult:
    """What is known of an output tensor once it is written.

    Attributes:
        action: `merge`, or `copy` where the bytes are those of a source.
        checksum: of the output tensor.
        read: checksum of each source tensor by the input's number.
        statistics: the method's needs and report, by name.
        non_finite: where infinite or NaN values are.
    """

    action: str
    checksum: str
    read: dict[int, str]
    statistics: dict[str, Any] = field(default_factory=dict)
    non_finite: list[str] = field(default_factory=list)


class _Workspace(threading.local):
    """A thread's reused buffers."""

    def __init__(self) -> None:
        self.raw: dict[object, Tensor] = {}
        self.block: dict[object, Tensor] = {}


class JobRunner:
    """Makes the bytes of one output tensor after another, in any thread."""

    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        sink: Sink,
        options: Options,
        on_progress: Callable[[int], None],
    ) -> None:
        import torch

        self._plan, self._reader, self._sink = plan, reader, sink
        self._options, self._on_progress = options, on_progress
        self._device = torch.device(options.device)
        self._workspace = _Workspace()

    def block_elements(self, job: Job) -> int:
        """Return how many elements of a job's tensor are worked on at a time."""
        return self._plan.block_elements(
            job,
            threads=self._options.threads,
            memory_bytes=self._options.memory_bytes,
            device=self._options.device,
        )

    def run_job(self, job: Job, run: Map) -> JobResult:
        """Read, merge, check and write one tensor; `run` maps over its blocks."""
        task = _Task(job, self.block_elements(job))
        if job.action == "copy":
            return self._copy(task, run)
        if job.action == "equal":
            self.check_equal(job, run)
            return self._copy(task, run)
        method = find_method(job.method)
        unchanged = method.space == "delta" or method.idempotent(job.parameters)
        if unchanged and self._identical(task, run):
            return self._copy(task, run)
        return self._merge(task, run)

    def _raw(self, slot: object, num_bytes: int) -> Tensor:
        """Return a reused buffer of bytes; pinned where a GPU reads it."""
        import torch

        buffer = self._workspace.raw.get(slot)
        if buffer is None or len(buffer) < num_bytes:
            pinned = self._device.type == "cuda"
            buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._workspace.raw[slot] = buffer
        return buffer[:num_bytes]

    def _read(self, meta: Source, span: Span, slot: object) -> Tensor:
        num_bytes = (span[1] - span[0]) * meta.dtype.num_bytes
        raw = self._raw(slot, num_bytes)
        meta.read(self._reader, *span, _bytes_of(raw))
        self._on_progress(num_bytes)
        return raw

    def _load(self, task: _Task, span: Span, digests: list[bytes] | None = None) -> Tensor:
        """Return a span's sources (S, E) in the compute dtype, in this thread's buffer."""
        import torch

        job, num_elements = task.job, span[1] - span[0]
        dtype = getattr(torch, job.compute_dtype)
        size = len(job.sources) * num_elements
        flat = self._workspace.block.get(dtype)
        if flat is None or len(flat) < size:
            room = len(job.sources) * min(task.block_elements, job.num_elements)
            flat = torch.empty(max(size, room), dtype=dtype, device=self._device)
            self._workspace.block[dtype] = flat
        block_SE = flat[:size].view(len(job.sources), num_elements)
        for row, (_, meta) in enumerate(job.sources):
            raw = self._read(meta, span, 0)
            if digests is not None:
                digests.append(piece_digests(_bytes_of(raw), meta.dtype.num_bytes))
            source = raw.view(getattr(torch, meta.dtype.name))
            block_SE[row].copy_(source)
        return block_SE

    def _identical(self, task: _Task, run: Map) -> bool:
        """Tell whether all sources hold the same bytes, reading as little as shows it."""
        import torch

        job = task.job
        if len(job.sources) < 2 or len({meta.dtype for _, meta in job.sources}) > 1:
            return len(job.sources) < 2

        def same(span: Span) -> bool:
            first = self._read(job.sources[0][1], span, 0)
            return all(torch.equal(first, self._read(meta, span, 1)) for _, meta in job.sources[1:])

        start = min(PIECE_ELEMENTS, job.num_elements)
        if start and not same((0, start)):
            return False
        return all(run(same, task.spans_after_first_piece))

    def check_equal(self, job: Job, run: Map) -> None:
        """Raise OutlierMergeError unless all sources of a job hold the same values."""
        if self._identical(_Task(job, self.block_elements(job)), run):
            return
        models = [self._plan.inputs[number].reference for number, _ in job.sources]
        if job in self._plan.checks:
            raise OutlierMergeError(
                f"{job.reason}. They are not. `extra: drop` leaves it out all the same."
            )
        kind = job.sources[0][1].dtype.name
        advice = "Make it equal."
        if job.reason.startswith("extra"):
            advice = "Give `extra: copy` to one of them and `extra: drop` to the others."
        elif self._plan.inputs[0].role == "base":
            advice = "`unequal: base` takes the base model's, or make it equal."
        raise OutlierMergeError(
            f"tensor {job.name!r} ({kind}, {job.reason}) cannot be merged, only copied, "
            f"but it differs between:\n{listing(models)}\n{advice}"
        )

    def _copy(self, task: _Task, run: Map) -> JobResult:
        import torch

        job = task.job
        number, meta = job.sources[0]
        target = getattr(torch, job.output.dtype.name)

        def copy(span: Span) -> tuple[bytes, bytes, bool, bool]:
            raw = self._read(meta, span, 0)
            values = raw.view(getattr(torch, meta.dtype.name))
            read = piece_digests(_bytes_of(raw), meta.dtype.num_bytes)
            out, written = raw, read
            finite = not meta.dtype.is_float or _is_finite(values)
            fits = True
            if meta.dtype != job.output.dtype:
                stored = values.to(target)
                fits = not finite or _fits(values, stored)
                out = stored.view(torch.uint8)
                written = piece_digests(_bytes_of(out), job.output.dtype.num_bytes)
            self._write(job.output, span, out)
            return read, written, finite, fits

        results = list(run(copy, task.element_spans))
        result = JobResult(
            action="copy",
            checksum=tensor_checksum(written for _, written, _, _ in results),
            read={number: tensor_checksum(read for read, _, _, _ in results)},
        )
        if not all(finite for _, _, finite, _ in results):
            self._non_finite(result, job, f"in {self._plan.inputs[number].reference}")
        if not all(fits for _, _, _, fits in results):
            self._non_finite(result, job, f"in the output ({job.output.dtype.name})")
        return result

    def _merge(self, task: _Task, run: Map) -> JobResult:
        import torch

        job, method = task.job, find_method(task.job.method)
        compute_dtype = getattr(torch, job.compute_dtype)
        is_delta = method.space == "delta"
        needs = measure_needs(
            method,
            job.parameters,
            lambda span: self._load(task, span),
            num_models=len(job.sources) - is_delta,
            num_elements=job.num_elements,
            block_elements=task.block_elements,
            run=run,
        )
        like = torch.empty(0, dtype=compute_dtype, device=self._device)
        keywords = method.arguments(job.parameters, like=like) | {
            name: like.new_tensor(value, dtype=torch.float64) for name, value in needs.items()
        }
        target = getattr(torch, job.output.dtype.name)
        in_pieces = method.cut == "element"

        def merge(span: Span) -> tuple[list[bytes], bytes, set[int], bool, dict[str, Any]]:
            digests: list[bytes] = []
            block_SE = self._load(task, span, digests if in_pieces else None)
            bad = set()
            if not _is_finite(block_SE):
                bad = {r for r, row in enumerate(block_SE) if not _is_finite(row)}
                if bad and not self._options.allow_non_finite:
                    self._raise_non_finite(job, [self._where(job, row) for row in sorted(bad)])
            merged_E, report = merge_block(method, block_SE, keywords, job.output.shape)
            out = self._raw("out", (span[1] - span[0]) * job.output.dtype.num_bytes)
            stored_E = out.view(target)
            stored_E.copy_(merged_E)
            finite = _fits(merged_E, stored_E)
            if not finite and not self._options.allow_non_finite:
                self._raise_non_finite(job, [f"in the output ({job.output.dtype.name})"])
            written = piece_digests(_bytes_of(out), job.output.dtype.num_bytes)
            self._write(job.output, span, out)
            plain = {name: value.tolist() for name, value in report.items()}
            return digests, written, bad, finite, plain

        digests: list[list[bytes]] = []
        written, bad, finite, reports = [], set(), True, []
        for block_digests, piece, rows, is_finite, report in run(merge, task.cut_spans(method.cut)):
            digests.append(block_digests)
            written.append(piece)
            bad |= rows
            finite = finite and is_finite
            reports.append(report)
        statistics = {name: value for name, value in needs.items()} | fold_reports(reports)
        result = JobResult(action="merge", checksum="", read={}, statistics=statistics)
        if in_pieces:
            result.checksum = tensor_checksum(written)
            by_row = list(zip(*digests, strict=True)) or [()] * len(job.sources)
            result.read = {
                number: tensor_checksum(pieces)
                for (number, _), pieces in zip(job.sources, by_row, strict=True)
            }
        else:
            self._checksum_again(task, result, run)
        if bad or not finite:
            places = [self._where(job, row) for row in sorted(bad)]
            self._non_finite(
                result,
                job,
                *places,
                *([] if finite else [f"in the output ({job.output.dtype.name})"]),
            )
        return result

    def _checksum_again(self, task: _Task, result: JobResult, run: Map) -> None:
        """Checksum a tensor whose blocks are rows, which do not end where pieces do."""
        job = task.job

        def written(span: Span) -> bytes:
            raw = self._raw("out", (span[1] - span[0]) * job.output.dtype.num_bytes)
            self._sink.read(job.output, span[0], _bytes_of(raw))
            return piece_digests(_bytes_of(raw), job.output.dtype.num_bytes)

        result.checksum = tensor_checksum(run(written, task.element_spans))
        for number, meta in job.sources:

            def read(span: Span, meta: Source = meta) -> bytes:
                raw = self._read(meta, span, 0)
                return piece_digests(_bytes_of(raw), meta.dtype.num_bytes)

            result.read[number] = tensor_checksum(run(read, task.element_spans))

    def _write(self, tensor: OutputTensor, span: Span, out: Tensor) -> None:
        self._sink.write(tensor, span[0], _bytes_of(out))
        self._on_progress(len(out))

    def _where(self, job: Job, row: int) -> str:
        return f"in {self._plan.inputs[job.sources[row][0]].reference}"

    def _non_finite(self, result: JobResult, job: Job, *places: str) -> None:
        if not self._options.allow_non_finite:
            self._raise_non_finite(job, list(places))
        result.non_finite += places

    def _raise_non_finite(self, job: Job, places: list[str]) -> None:
        raise OutlierMergeError(
            f"tensor {job.name!r} has values that are infinite or NaN {' and '.join(places)}. "
            "Check that model; --allow-non-finite goes on and lists such tensors."
        )


class _Task:
    """A job and how its tensor is cut."""

    def __init__(self, job: Job, block_elements: int) -> None:
        self.job, self.block_elements = job, block_elements

    @property
    def spans_after_first_piece(self) -> list[Span]:
        rest = max(0, self.job.num_elements - PIECE_ELEMENTS)
        return [
            (start + PIECE_ELEMENTS, stop + PIECE_ELEMENTS)
            for start, stop in spans(rest, self.block_elements)
        ]

    @property
    def element_spans(self) -> list[Span]:
        """Blocks that start at multiples of a piece."""
        aligned = max(PIECE_ELEMENTS, self.block_elements // PIECE_ELEMENTS * PIECE_ELEMENTS)
        return spans(self.job.num_elements, aligned)

    def cut_spans(self, cut: str) -> list[Span]:
        if cut == "element":
            return self.element_spans
        if self.job.num_elements == 0:
            return []
        return spans(self.job.num_elements, self.block_elements)


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array)


def _fits(values: Tensor, stored: Tensor) -> bool:
    """Tell whether finite values are still so in the dtype that they are stored in.

    torch stores what is too large for float8_e4m3fn as its largest value, 448; what is nearer to
    the next one, which would be 480, is taken as too large.
    """
    import torch

    kept = torch.finfo(stored.dtype).max
    low, high = _extremes(values)
    if stored.dtype == torch.float8_e4m3fn:
        return -464 <= low and high <= 464
    return (-kept <= low and high <= kept) or _is_finite(stored)


def _is_finite(values: Tensor) -> bool:
    """Tell whether no value is infinite or NaN, by the extremes, which NaN takes over."""
    return all(math.isfinite(extreme) for extreme in _extremes(values))


def _extremes(values: Tensor) -> tuple[float, float]:
    wide = values if values.element_size() >= 4 else values.float()
    low, high = wide.aminmax()
    return float(low), float(high)
