"""Reads element ranges of tensors into buffers that the caller owns."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.sources import Source, TensorMeta, inner
from outliermerge.storage.failures import failure, naming
from outliermerge.storage.stamps import current_watch, open_input
from outliermerge.storage.system import forget, read_at, reserve, will_need, write_at

if TYPE_CHECKING:
    from torch import Tensor

    from outliermerge.checkpoint.formats.pytorch_file import Strided


_WHOLE_BYTES = 1 << 26
_AHEAD_BYTES = 1 << 26


@dataclass
class _Once:
    """A result that is kept for a source, and the bytes that it takes of the memory budget."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    is_made: bool = False
    value: Any = None
    held_bytes: int = 0


class Reader:
    """Reads spans of tensors; files are opened once and shared by all threads.

    Files that any thread opens are noted in the watch of the thread that makes the reader.

    Args:
        held_bytes: the memory for tensors that are computed as a whole.
        folder: the folder for unnamed temporary files, which keep tensors that do not fit into that
            memory; None is the system's folder for temporary files.
        merges: computes sources that are merges of others, where there are some.
    """

    def __init__(
        self,
        held_bytes: int = 0,
        folder: Path | None = None,
        merges: Callable[[Reader, Any, int, int, memoryview], None] | None = None,
    ) -> None:
        self._free_bytes, self._folder, self._merges = held_bytes, folder, merges
        self._once: dict[object, _Once] = {}
        self._watched = current_watch()
        self._files: dict[Path, int] = {}
        self._pickles: dict[Path, dict[str, Strided]] = {}
        self._strided: tuple[TensorMeta, Tensor] | None = None
        self._whole: OrderedDict[Source, Tensor] = OrderedDict()
        self._num_whole_bytes = 0
        self._lock = threading.Lock()

    def values(self, source: Source, start: int, stop: int) -> Tensor:
        """Return elements start to stop as a new tensor (E,) of the source's dtype."""
        import torch

        values = torch.empty(stop - start, dtype=getattr(torch, source.dtype.name))
        array: Any = values.view(torch.uint8).numpy()
        source.read(self, start, stop, memoryview(array))
        return values

    def whole(self, source: Source) -> Tensor:
        """Return a small tensor (scales, a low-rank factor) in its shape; the latest are cached."""
        with self._lock:
            if source in self._whole:
                self._whole.move_to_end(source)
                return self._whole[source]
        values = self.values(source, 0, source.num_elements).view(source.shape)
        with self._lock:
            if self._whole.setdefault(source, values) is values:
                self._num_whole_bytes += source.num_bytes
            while len(self._whole) > 1 and self._num_whole_bytes > _WHOLE_BYTES:
                self._num_whole_bytes -= self._whole.popitem(last=False)[0].num_bytes
        return values

    def once(self, source: object, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for a source; other threads that ask wait for the first."""
        return self._made(source, lambda entry: make())

    def _made(self, source: object, make: Callable[[_Once], Any]) -> Any:
        with self._lock:
            entry = self._once.setdefault(source, _Once())
        with entry.lock:
            if not entry.is_made:
                entry.value, entry.is_made = make(entry), True
        return entry.value

    def merge(self, source: Any, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop of a source that is a merge of others."""
        assert self._merges is not None, "this reader computes no merges"
        self._merges(self, source, start, stop, out)

    def held(self, source: Source, num_bytes: int, make: Callable[[memoryview], Any]) -> Any:
        """Return what `make` returned for a source at the first call, of room that it can fill.

        Raises:
            OutlierMergeError: there is not enough room on the disk.
        """

        def made(entry: _Once) -> Any:
            with self._lock:
                in_memory = num_bytes <= self._free_bytes
                entry.held_bytes = num_bytes if in_memory else 0
                self._free_bytes -= entry.held_bytes
            pages = mmap.mmap(-1, num_bytes) if in_memory else self._file_pages(num_bytes)
            return make(memoryview(pages))

        return self._made(source, made)

    def _file_pages(self, num_bytes: int) -> mmap.mmap:
        with naming(self._folder or Path(tempfile.gettempdir()), "written", needed_bytes=num_bytes):
            with tempfile.TemporaryFile(dir=self._folder) as file:
                reserve(file.fileno(), num_bytes)  # fails now if the disk is full
                return mmap.mmap(file.fileno(), num_bytes)

    def release(self, sources: Iterable[tuple[int, Source]]) -> None:
        """Free the results kept for sources that are not read again, and for what they read."""
        pending, seen = [source for _, source in sources], set[int]()
        while pending:
            source = pending.pop()
            if id(source) in seen:
                continue
            seen.add(id(source))
            with self._lock:
                entry = self._once.pop(source, None)
                self._free_bytes += entry.held_bytes if entry is not None else 0
            pending += inner(source)

    def will_need(self, sources: Iterable[tuple[int, Source]]) -> None:
        """Ask the system to read the beginnings of tensors while others are processed."""
        self._advise(sources, will_need, most=_AHEAD_BYTES)

    def forget(self, sources: Iterable[tuple[int, Source]]) -> None:
        """Drop tensors from the page cache."""
        self._advise(sources, forget, most=sys.maxsize)

    def _advise(
        self,
        sources: Iterable[tuple[int, Source]],
        advise: Callable[[int, int, int], None],
        *,
        most: int,
    ) -> None:
        for _, source in sources:
            for meta in source.stored:
                if meta.offset is not None:
                    num_bytes = min(meta.num_bytes, most)
                    with suppress(OSError):  # a later read reports what is wrong
                        advise(self.descriptor(meta.path), meta.offset, num_bytes)

    def read_stored(self, meta: TensorMeta, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with the stored bytes of elements start to stop.

        Raises:
            OutlierMergeError: the file cannot be read or has become shorter.
        """
        try:
            if meta.offset is None:
                self._read_pickled(meta, start, stop, out)
            else:
                position = meta.offset + start * meta.dtype.num_bytes
                read_exactly(self.descriptor(meta.path), position, out)
        except (OSError, EOFError) as error:
            raise failure(meta.path, "read", error, tensor=meta.name) from error

    def descriptor(self, path: Path) -> int:
        """Return the descriptor of a file, opened for reading."""
        descriptor = self._files.get(path)
        if descriptor is None:
            with self._lock:
                descriptor = self._files.get(path)
                if descriptor is None:
                    descriptor = open_input(path, self._watched)
                    self._files[path] = descriptor
        return descriptor

    def _read_pickled(self, meta: TensorMeta, start: int, stop: int, out: memoryview) -> None:
        import torch

        from outliermerge.checkpoint.formats.pytorch_file import read_span

        if stop > start:
            target = torch.frombuffer(out, dtype=getattr(torch, meta.dtype.name))
            target.copy_(read_span(self._strided_values(meta), start, stop))

    def _strided_values(self, meta: TensorMeta) -> Tensor:
        """Return a pickled tensor whose elements are not contiguous; the latest is cached."""
        import torch

        from outliermerge.checkpoint.formats.pytorch_file import load_strided

        descriptor = self.descriptor(meta.path)
        with self._lock:
            if self._strided is not None and self._strided[0] == meta:
                return self._strided[1]
            if meta.path not in self._pickles:
                self._pickles[meta.path] = load_strided(meta.path, descriptor)
            place = self._pickles[meta.path].get(meta.name)
            if place is None or len(place.strides) != len(meta.shape):
                raise EOFError("it is not there any more")
            raw = bytearray(place.num_bytes)
            read_exactly(descriptor, place.offset, memoryview(raw))
            flat = torch.frombuffer(raw, dtype=getattr(torch, meta.dtype.name))
            self._strided = (meta, place.values(flat, meta.shape))
            return self._strided[1]

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._pickles.clear()
        self._whole.clear()
        self._strided = None
        self._once.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_exactly(descriptor: int, position: int, out: memoryview) -> None:
    """Fill `out` from a file at a position, or raise EOFError if the file ends early."""
    done = 0
    while done < len(out):
        count = read_at(descriptor, position + done, out[done:])
        if count == 0:
            raise EOFError(f"the file ends at byte {position + done}")
        done += count


def write_exactly(descriptor: int, position: int, data: memoryview) -> None:
    """Write all of `data` into a file at a position."""
    done = 0
    while done < len(data):
        done += write_at(descriptor, position + done, data[done:])
