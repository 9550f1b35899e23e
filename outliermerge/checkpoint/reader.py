"""Reads element ranges of tensors into buffers that the caller owns."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.by_kernels import floats
from outliermerge.checkpoint.sources import Region, Source, TensorMeta, inner
from outliermerge.storage.cached_files import DEFAULT_CACHE_BYTES, CachedFiles, FileRange
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
        cache_bytes: the most bytes that are kept of models which are elsewhere.
        scattered: what is read are small pieces, far apart.
        kernels: the module of the compiled kernels, which read what they can compute; None where
            torch is to compute all.
    """

    def __init__(
        self,
        held_bytes: int = 0,
        folder: Path | None = None,
        merges: Callable[[Reader, Any, int, int, memoryview], None] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        *,
        scattered: bool = False,
        kernels: Any = None,
    ) -> None:
        self.kernels = kernels
        self._free_bytes, self._folder, self._merges = held_bytes, folder, merges
        self._once: dict[object, _Once] = {}
        self._noted: dict[object, dict[int, Any]] = {}
        self._watched = current_watch()
        self._files: dict[Path, int] = {}
        self._elsewhere = CachedFiles(cache_bytes, scattered=scattered)
        self._pickles: dict[Path, dict[str, Strided]] = {}
        self._strided: tuple[TensorMeta, Tensor] | None = None
        self._whole: OrderedDict[object, tuple[int, Any]] = OrderedDict()
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

        def make() -> Tensor:
            return self.values(source, 0, source.num_elements).view(source.shape)

        values: Tensor = self._latest(source, source.num_bytes, make)
        return values

    def whole_floats(self, source: Source) -> bytearray:
        """Return a small tensor as float32, read by kernels; the latest are cached."""
        found: bytearray = self._latest(
            (source, "floats"),
            4 * source.num_elements,
            lambda: floats(self, source, 0, source.num_elements),
        )
        return found

    def _latest(self, key: object, num_bytes: int, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for a key, if it is among the latest, or now."""
        with self._lock:
            if key in self._whole:
                self._whole.move_to_end(key)
                return self._whole[key][1]
        value = make()
        with self._lock:
            self._forget_whole(key)  # another thread may have made it, too
            self._whole[key] = num_bytes, value
            self._num_whole_bytes += num_bytes
            while len(self._whole) > 1 and self._num_whole_bytes > _WHOLE_BYTES:
                self._forget_whole(next(iter(self._whole)))
        return value

    def _forget_whole(self, key: object) -> None:
        self._num_whole_bytes -= self._whole.pop(key, (0, None))[0]

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

    def note(self, source: object, start: int, found: Any) -> None:
        """Keep what was found when elements of a source were read, from an element on."""
        with self._lock:
            self._noted.setdefault(source, {})[start] = found

    def noted(self, source: object) -> list[Any]:
        """Return what was kept for a source, in the order of its elements, and forget it."""
        with self._lock:
            return [found for _, found in sorted(self._noted.pop(source, {}).items())]

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
        sources = list(sources)
        self._elsewhere.drop(_stored(sources))
        pending, seen = [source for _, source in sources], set[int]()
        while pending:
            source = pending.pop()
            if id(source) in seen:
                continue
            seen.add(id(source))
            with self._lock:
                entry = self._once.pop(source, None)
                self._free_bytes += entry.held_bytes if entry is not None else 0
                for stored in source.stored:
                    self._forget_whole(stored)
                    self._forget_whole((stored, "floats"))
            pending += inner(source)

    def will_need(self, sources: Iterable[tuple[int, Source]]) -> None:
        """Ask the system to read the beginnings of tensors while others are processed."""
        self._advise(sources, will_need, most=_AHEAD_BYTES)

    def read_ahead(self, sources: Iterable[Iterable[tuple[int, Source]]]) -> None:
        """Fetch what is elsewhere in the order in which tensors will be read, as there is room."""
        self._elsewhere.read_ahead(_stored(one) for one in sources)

    def read_ahead_of(self, ranges: Iterable[FileRange]) -> None:
        """Fetch ranges of files that are elsewhere in this order, as there is room."""
        self._elsewhere.read_ahead([one] for one in ranges)

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
                if meta.offset is not None and not self._elsewhere.has(meta.path):
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
                self.read(meta.path, position, out)
        except (OSError, EOFError) as error:
            raise failure(meta.path, "read", error, tensor=meta.name) from error

    def read(self, path: Path, position: int, out: memoryview) -> None:
        """Fill `out` from a file at a position.

        Raises:
            OSError, EOFError: it cannot be read, or has become shorter.
            OutlierMergeError: it is elsewhere, and cannot be read or has changed.
        """
        if self._elsewhere.has(path):
            self._elsewhere.read(path, position, out)
        else:
            read_exactly(self.descriptor(path), position, out)

    def places(self, wanted: Sequence[FileRange]) -> list[tuple[int, int]]:
        """Return a descriptor and a position for ranges of files.

        What is there of a file that is elsewhere stays so until this thread asks for other places.

        Raises:
            OSError: a file cannot be opened.
            OutlierMergeError: it is elsewhere, and cannot be read or has changed.
        """
        return self.opened([Region(path, at, at, at + count) for path, at, count in wanted])

    def opened(self, places: Sequence[Any]) -> list[Any]:
        """Return places for kernels, with descriptors where regions have paths, as in `places`.

        Args:
            places: regions, and tuples of numbers, buffers and such places.
        """
        regions = [*_regions(places)]
        there = self._elsewhere.hold([(one.path, one.low, one.high - one.low) for one in regions])

        def opened(part: Any) -> Any:
            if isinstance(part, Region):
                path = part.path
                return there[path] if path in there else self.descriptor(path), part.position
            return tuple(map(opened, part)) if isinstance(part, tuple) else part

        return [opened(place) for place in places]

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

    def stop(self) -> None:
        """Let no thread go on waiting for what comes from elsewhere; it gets an error."""
        self._elsewhere.stop()

    def close(self) -> None:
        """Close every file."""
        self._elsewhere.close()
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


def _stored(sources: Iterable[tuple[int, Source]]) -> list[FileRange]:
    """Return where the stored tensors are that sources are read from."""
    return [
        (meta.path, meta.offset, meta.num_bytes)
        for _, source in sources
        for meta in source.stored
        if meta.offset is not None
    ]


def _regions(places: Iterable[Any]) -> Iterator[Region]:
    for place in places:
        if isinstance(place, Region):
            yield place
        elif isinstance(place, tuple):
            yield from _regions(place)


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
