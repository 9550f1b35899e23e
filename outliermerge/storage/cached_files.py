"""What is read of files that stand for objects elsewhere, through one bounded cache."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from outliermerge.storage.machine import cache_folder
from outliermerge.storage.objects import Objects
from outliermerge.storage.range_cache import (
    CHUNK_BYTES,
    REQUEST_CHUNKS,
    CachedObject,
    Chunked,
    RangeCache,
    requests_of,
)
from outliermerge.storage.ranges import State
from outliermerge.storage.stand_ins import stand_in
from outliermerge.storage.system import read_at

DEFAULT_CACHE_BYTES = 8 << 30
_SMALL_BYTES = 4096

FileRange = tuple[Path, int, int]
"""A file, the position of some of its bytes, and how many they are."""
_AnyObject = TypeVar("_AnyObject", bound=Chunked)


class CachedFiles:
    """Opens files that stand for objects, and reads their bytes; other files are none of its own.

    Args:
        cache_bytes: the most bytes that are kept of all objects, but at most half of the disk's
            free space.
        scattered: what is read are small pieces far apart: no more is fetched than they need.
    """

    def __init__(self, cache_bytes: int, *, scattered: bool) -> None:
        self._cache_bytes = cache_bytes
        self._scattered = scattered
        self._cache: RangeCache | None = None
        self._objects: Objects | None = None
        self._known: dict[Path, CachedObject | None] = {}
        self._lock = threading.Lock()

    def has(self, path: Path) -> bool:
        """Tell whether a file stands for an object."""
        return self._opened(path) is not None

    def hold(self, wanted: Sequence[FileRange]) -> dict[Path, int]:
        """Wait for ranges; return the descriptors to read them from, for the files of objects.

        They stay there until this thread holds others.

        Raises:
            OutlierMergeError: they cannot be read, or an object has changed.
        """
        opened = {path: self._opened(path) for path, _, _ in wanted}
        there = {path: found for path, found in opened.items() if found is not None}
        if not there or self._cache is None:
            return {}
        self._cache.hold(
            (there[path], start, start + num_bytes)
            for path, start, num_bytes in wanted
            if path in there
        )
        return {path: found.descriptor for path, found in there.items()}

    def read(self, path: Path, position: int, out: memoryview) -> None:
        """Fill `out` from an object.

        Raises:
            OutlierMergeError: it cannot be read, or has changed.
        """
        found = self._opened(path)
        assert found is not None and self._cache is not None
        release = self._cache.take([(found, position, position + len(out))])
        try:
            done = 0
            while done < len(out):
                done += read_at(found.descriptor, position + done, out[done:])
        finally:
            release()

    def read_ahead(self, tensors: Iterable[Sequence[FileRange]]) -> None:
        """Fetch ranges in the order of the groups that are read together, as there is room."""
        wanted = _in_order(tensors, self._opened)
        if wanted and self._cache is not None:
            self._cache.read_ahead(wanted)

    def drop(self, ranges: Sequence[FileRange]) -> None:
        """Give back ranges that are not read again soon."""
        if self._cache is None:
            return
        opened = ((self._opened(path), start, num_bytes) for path, start, num_bytes in ranges)
        self._cache.drop((f, start, start + count) for f, start, count in opened if f is not None)

    def stop(self) -> None:
        """Let no thread go on waiting for a range; it gets an error."""
        if (cache := self._cache) is not None:
            cache.stop()

    def close(self) -> None:
        """Stop fetching, and give all back."""
        if self._cache is not None:
            self._cache.close()
        if self._objects is not None:
            self._objects.close()
        self._cache = None
        self._known.clear()

    def _opened(self, path: Path) -> CachedObject | None:
        if path in self._known:
            return self._known[path]
        with self._lock:
            if path not in self._known:
                self._known[path] = self._open(path)
            return self._known[path]

    def _open(self, path: Path) -> CachedObject | None:
        found = stand_in(path)
        if found is None:
            return None
        if self._cache is None or self._objects is None:
            folder = cache_folder("ranges")
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            room = shutil.disk_usage(folder).free // 2
            self._cache = RangeCache(folder, min(self._cache_bytes, room))
            self._objects = Objects()
        remote = self._objects.open(found.address)
        is_large = found.num_bytes > CHUNK_BYTES * REQUEST_CHUNKS
        chunk_bytes = _SMALL_BYTES if self._scattered and is_large else CHUNK_BYTES
        return self._cache.add(remote, State(found.num_bytes, found.version), chunk_bytes)


def num_fetched(tensors: Iterable[Sequence[FileRange]]) -> tuple[int, int]:
    """Return how many requests fetch ranges ahead, and of how many bytes; nothing is asked for.

    Args:
        tensors: as for `CachedFiles.read_ahead`.
    """

    @cache
    def opened(path: Path) -> Chunked | None:
        found = stand_in(path)
        return None if found is None else Chunked(found.num_bytes, CHUNK_BYTES)

    num_requests = num_bytes = 0
    for found, numbers in requests_of(_in_order(tensors, opened)):
        num_requests += 1
        num_bytes += sum(map(found.size_of, numbers))
    return num_requests, num_bytes


def _in_order(
    tensors: Iterable[Sequence[FileRange]], opened: Callable[[Path], _AnyObject | None]
) -> list[tuple[_AnyObject, int, int]]:
    """Return ranges of objects, with their ends, in the order in which they are read."""
    wanted, most_bytes = [], CHUNK_BYTES * REQUEST_CHUNKS
    for group in tensors:
        own = [(opened(path), start, num_bytes) for path, start, num_bytes in group]
        there = [(found, start, count) for found, start, count in own if found is not None]
        most = max((num_bytes for _, _, num_bytes in there), default=0)
        for step in range(0, most, most_bytes):
            for found, start, num_bytes in there:
                if step < num_bytes:
                    end = start + min(step + most_bytes, num_bytes)
                    wanted.append((found, start + step, end))
    return wanted
