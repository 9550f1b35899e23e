"""The CPU engine: fused C kernels, and torch for statistics that kernels cannot measure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from outliermerge.checkpoint.checksum import DIGEST_BYTES, PIECE_ELEMENTS
from outliermerge.checkpoint.sources import DType
from outliermerge.engines.torch import TorchEngine
from outliermerge.methods.kernel_call import CODES, KernelCall, Place, kept_in, packed_keys
from outliermerge.methods.statistics.base import Pass, raw_pass
from outliermerge.methods.task import Task
from outliermerge.storage.machine import PAGE_BYTES, whole_pages

T = TypeVar("T")


class KernelEngine:
    """Calls the kernels on page-aligned buffers, which each thread reuses.

    torch measures the statistics that have no kernel.
    """

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._own = _Buffers()

    @cached_property
    def _torch(self) -> TorchEngine:
        return TorchEngine(["cpu"])

    def buffer(self, slot: object, num_bytes: int) -> memoryview:
        """Return this thread's buffer for a slot; every call for the slot gives the same memory."""
        found = self._own.by_slot.get(slot)
        if found is None or len(found) < num_bytes:
            found = self._own.by_slot[slot] = whole_pages(num_bytes)
        return found[:num_bytes]

    def prepare(self, task: Task, needs: Mapping[str, list[Any]], wholes: Mapping[str, Any]) -> Any:
        """Return the kernel's call, its arguments and its keys."""
        assert task.method.kernel is not None
        call = task.method.kernel(task.parameters, needs, task.context)
        return call, call.arguments(), packed_keys(call.keys)

    def measure(
        self,
        task: Task,
        passes: Mapping[T, Pass],
        sources: Sequence[Any],
        num_elements: int,
        start: int = 0,
    ) -> dict[T, Any]:
        """Return a block's share in each statistic's pass."""
        block = _block(task, sources, num_elements)
        raw = {name: raw_pass(state, self._kernels) for name, state in passes.items()}
        shares = {
            name: state.measure_raw(self._kernels, block, **_where(state, start))
            for name, state in raw.items()
            if state is not None
        }
        others = {name: state for name, state in passes.items() if raw[name] is None}
        if others:
            shares |= self._torch.measure(task, others, sources, num_elements, start)
        return shares

    def measure_places(
        self,
        task: Task,
        passes: Mapping[T, Pass],
        places: Sequence[Place],
        num_elements: int,
        on_digests: Callable[[list[bytes]], None],
        start: int = 0,
    ) -> dict[T, Any]:
        """Return what a block contributes to each statistic's pass; each pass reads the block.

        Where torch measures one of them, the block is read to memory once, for all passes.

        Args:
            on_digests: called after each reading with the digests of each source's pieces.

        Raises:
            OSError, EOFError: a file cannot be read.
        """
        raw = {name: raw_pass(state, self._kernels) for name, state in passes.items()}
        if None in raw.values():
            raws, read = self._read(task, places, num_elements)
            on_digests(read)
            return self.measure(task, passes, raws, num_elements, start)
        shares = {}
        length = -(-num_elements // PIECE_ELEMENTS) * DIGEST_BYTES
        for name, state in raw.items():
            assert state is not None
            digests = bytearray(len(places) * length)
            block = (*_block(task, places, num_elements), digests)
            shares[name] = state.measure_raw(self._kernels, block, **_where(state, start))
            on_digests([bytes(digests[at : at + length]) for at in range(0, len(digests), length)])
        return shares

    def _read(
        self, task: Task, places: Sequence[Place], num_elements: int
    ) -> tuple[list[memoryview], list[bytes]]:
        """Read the sources to memory; return them, and the digests of each source's pieces."""
        raws, read = [], []
        for row, (dtype, place) in enumerate(zip(task.dtypes, places, strict=True)):
            raw = self.buffer(row, dtype.num_bytes * num_elements)
            try:
                _, digests = self._kernels.copy(CODES[dtype.name], place, num_elements, raw)
            except OSError as error:
                raise OSError(error.errno, error.strerror, row) from error
            except EOFError as error:
                raise EOFError(error.args[0], row) from error
            raws.append(raw)
            read.append(digests)
        return raws, read

    def merge(
        self,
        task: Task,
        prepared: Any,
        raws: Sequence[Place],
        num_elements: int,
        out: memoryview,
        start: int = 0,
    ) -> tuple[bool, bool, dict[str, Any]]:
        """Write a block's merged weights to `out`. Kernels pass infinities and NaN through."""
        _, ((is_finite, report, _),) = self.merge_places(
            [(task, prepared, out)], raws, num_elements, start
        )
        return is_finite, is_finite, report

    def merge_places(
        self,
        variants: Sequence[tuple[Task, Any, Place]],
        sources: Sequence[Place],
        num_elements: int,
        start: int = 0,
    ) -> tuple[list[bytes], list[tuple[bool, dict[str, Any], bytes]]]:
        """Merge the same sources in several ways, reading and digesting them once.

        Args:
            variants: for each way, the task, what `prepare` returned for it, and where its output
                goes.
            start: the block's first element in the tensor.

        Returns:
            The digests of each source's pieces, and for each variant whether its output is
            finite, its report, and the digests of its pieces.

        Raises:
            OSError, EOFError: a file cannot be read or written.
        """
        first = variants[0][0]
        digests, results = self._kernels.merge(
            _block(first, sources, num_elements),
            tuple(
                (
                    *(*arguments, CODES[task.out_dtype.name], place, keys, start, *call.rows),
                    *(kept_in(call.kept, task.num_models, start, num_elements) or (None,)),
                    *_packed(task.rounding_keys),
                )
                for task, (call, arguments, keys), place in variants
            ),
            self._scratch([task.out_dtype for task, _, _ in variants], num_elements),
        )
        done = []
        for (_, (call, *_), _), (is_finite, counts, pieces) in zip(variants, results, strict=True):
            report = dict(call.report) | ({call.counts: list(counts)} if call.counts else {})
            done.append((is_finite, report, pieces))
        return list(digests), done

    def copy(
        self, dtype: DType, source: Place, num_elements: int, out: Place
    ) -> tuple[bool, bytes]:
        """Copy elements; return whether all are finite, and the digests of their pieces.

        Raises:
            OSError, EOFError: a file cannot be read or written.
        """
        scratch = self._scratch([dtype], num_elements)
        finite, digests = self._kernels.copy(CODES[dtype.name], source, num_elements, out, scratch)
        return finite, digests

    def _scratch(self, dtypes: Sequence[DType], num_elements: int) -> memoryview:
        """Return memory for outputs on their way to files."""
        num_bytes = sum(dtype.num_bytes * num_elements + 2 * PAGE_BYTES for dtype in dtypes)
        return self.buffer("scratch", num_bytes)

    def is_finite(self, dtype: DType, raw: memoryview) -> bool:
        """Tell whether all values are finite."""
        finite: bool = self._kernels.all_finite(CODES[dtype.name], raw, len(raw) // dtype.num_bytes)
        return finite

    def convert(
        self,
        dtype: DType,
        raw: memoryview,
        out_dtype: DType,
        out: memoryview,
        keys: tuple[int, int] | None = None,
        start: int = 0,
    ) -> bool:
        """Write the values to `out` in another dtype; tell whether all fit in its range."""
        block = (CODES[dtype.name].encode(), (raw,), len(raw) // dtype.num_bytes, False)
        call = KernelCall("weighted_sum", vectors=([1.0],))
        drawn = (b"", start, 0, 0, None, *_packed(keys)) if keys else ()
        variant = (*call.arguments(), CODES[out_dtype.name], out, *drawn)
        _, ((fits, _, _),) = self._kernels.merge(block, (variant,))
        return bool(fits)

    def equal(self, a: memoryview, b: memoryview) -> bool:
        """Tell whether two buffers hold the same bytes."""
        same: bool = self._kernels.equal(a, b)
        return same


def _block(
    task: Task, sources: Sequence[Place], num_elements: int
) -> tuple[bytes, tuple[Place, ...], int, bool]:
    codes = "".join(CODES[dtype.name] for dtype in task.dtypes).encode()
    return codes, tuple(sources), num_elements, task.is_delta


def _packed(keys: tuple[int, int] | None) -> tuple[bytes, ...]:
    return () if keys is None else (packed_keys([keys]),)


def _where(state: Pass, start: int) -> dict[str, int]:
    return {"start": start} if getattr(state, "with_start", False) else {}


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_slot: dict[object, memoryview] = {}
