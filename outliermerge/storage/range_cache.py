"""A bounded cache of ranges of objects: fetched before they are needed, on several connections.

An object's bytes are put into an unnamed sparse file, at the positions that they have in the
object. So what reads files, the kernels too, reads them from there. Whoever reads holds the bytes
that it reads; others are given back to the disk, the longest unused first.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from outliermerge.errors import OutlierMergeError
from outliermerge.storage.failures import naming
from outliermerge.storage.ranges import RemoteObject, State, TransientError, persistently
from outliermerge.storage.system import punch, write_at

CHUNK_BYTES = 1 << 21
REQUEST_CHUNKS = 4  # at most
NUM_CONNECTIONS = 16
_AHEAD_BYTES = 1 << 29
_WAIT_SECONDS = 1.0  # then a waiting thread looks again, so a lost wake-up costs no more than that


@dataclass(eq=False)
class Chunked:
    """An object that is fetched in whole chunks.

    Attributes:
        num_bytes: its size.
        chunk_bytes: it is cut into chunks of so many bytes.
    """

    num_bytes: int
    chunk_bytes: int

    def size_of(self, number: int) -> int:
        """Return the number of bytes of a chunk; the last may be shorter."""
        return min(self.chunk_bytes, self.num_bytes - number * self.chunk_bytes)

    def numbers(self, start: int, stop: int) -> range:
        """Return the chunks in which a range of bytes is."""
        return range(start // self.chunk_bytes, -(-stop // self.chunk_bytes))


@dataclass(eq=False)
class CachedObject(Chunked):
    """An object, and the sparse file with what has been read of it.

    Attributes:
        given_back: the chunks of which all was given back, which are not fetched ahead again.
    """

    remote: RemoteObject
    state: State
    descriptor: int
    chunks: dict[int, _Chunk] = field(default_factory=dict)
    given_back: set[int] = field(default_factory=set)


Range = tuple[CachedObject, int, int]
"""An object, and the start and the end (excluded) of some of its bytes."""


@dataclass(eq=False)
class _Chunk:
    is_there: bool = False
    is_read: bool = False
    num_held: int = 0
    given_back: set[tuple[int, int]] = field(default_factory=set)  # its parts; none overlap
    error: BaseException | None = None


_Request = tuple[CachedObject, list[int]]
_AnyObject = TypeVar("_AnyObject", bound=Chunked)


class RangeCache:
    """What is read of objects, by any thread.

    Args:
        folder: for the unnamed files.
        limit_bytes: the most bytes that are kept; what is being read is kept in any case.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._changed = threading.Condition()
        self._urgent: deque[_Request] = deque()
        self._ahead: Iterator[_Request] = iter(())
        self._next_ahead: _Request | None = None
        self._kept: OrderedDict[tuple[CachedObject, int], _Chunk] = OrderedDict()
        self.kept_bytes = self._unread_bytes = 0
        self._objects: list[CachedObject] = []
        self._threads: list[threading.Thread] = []
        self._holding = _Holding()
        self._is_closed = False
        self.num_requests = self.num_fetched_bytes = 0

    def add(
        self, remote: RemoteObject, state: State, chunk_bytes: int = CHUNK_BYTES
    ) -> CachedObject:
        """Return an object, of which nothing is there yet.

        Args:
            chunk_bytes: it is cut into chunks of so many bytes, which are fetched as a whole.
        """
        with naming(self._folder, "written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                descriptor = os.dup(file.fileno())
            os.ftruncate(descriptor, state.num_bytes)
        found = CachedObject(state.num_bytes, chunk_bytes, remote, state, descriptor)
        self._objects.append(found)
        return found

    def hold(self, wanted: Iterable[Range]) -> None:
        """Wait until ranges are there, and keep them until this thread holds others.

        Raises:
            OutlierMergeError: they cannot be read, or an object has changed.
        """
        self._holding.release()
        self._holding.release = self.take(wanted)

    def take(self, wanted: Iterable[Range]) -> Callable[[], None]:
        """Wait until ranges are there, and keep them until the returned function is called.

        Raises:
            OutlierMergeError: they cannot be read, or an object has changed.
        """
        parts = [(found, found.numbers(start, stop)) for found, start, stop in wanted]
        held: list[tuple[CachedObject, int, _Chunk]] = []
        with self._changed:
            for found, numbers in parts:
                missing = []
                for number in numbers:
                    chunk = found.chunks.get(number)
                    if chunk is None:
                        chunk = self._begin(found, number)
                        missing.append(number)
                    chunk.num_held += 1
                    held.append((found, number, chunk))
                self._urgent.extend((found, numbers) for numbers in _in_requests(missing))
            self._start_threads()
            self._changed.notify_all()
            while not all(chunk.is_there or chunk.error for *_, chunk in held):
                if self._is_closed:
                    raise OutlierMergeError("interrupted")
                self._changed.wait(_WAIT_SECONDS)
            for found, number, chunk in held:
                if chunk.is_there:
                    self._note_read(found, number, chunk)
            error = next((chunk.error for *_, chunk in held if chunk.error), None)

        def release() -> None:
            with self._changed:
                for found, number, chunk in held:
                    chunk.num_held -= 1
                    self._remove_if_done(found, number, chunk)
                held.clear()
                self._changed.notify_all()

        if error is not None:
            release()
            raise error
        return release

    def read_ahead(self, ranges: Iterable[Range]) -> None:
        """Fetch ranges in this order as there is room; instead of those that were named before."""
        with self._changed:
            for found in self._objects:
                found.given_back.clear()
            self._ahead, self._next_ahead = requests_of(list(ranges)), None
            self._start_threads()
            self._changed.notify_all()

    def drop(self, dropped: Iterable[Range]) -> None:
        """Give back ranges that are not read again soon.

        A chunk goes when all of its bytes were given back, such as those of several tensors.
        """
        with self._changed:
            for found, start, stop in dropped:
                for number in found.numbers(start, stop):
                    chunk = found.chunks.get(number)
                    if chunk is None or not chunk.is_there:
                        continue
                    self._note_read(found, number, chunk)
                    first = number * found.chunk_bytes
                    end = first + found.size_of(number)
                    chunk.given_back.add((max(start, first), min(stop, end)))
                    self._remove_if_done(found, number, chunk)
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop fetching; who waits for a range gets an error."""
        self._is_closed = True  # without the lock, which an interrupted thread may have

    def close(self) -> None:
        """Stop fetching, and give all back."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        until = time.monotonic() + _WAIT_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        # Where a server has stalled, its thread still has the file, whose number must not be
        # given to another.
        if not any(thread.is_alive() for thread in self._threads):
            for found in self._objects:
                os.close(found.descriptor)
        self._objects.clear()

    def _begin(self, found: CachedObject, number: int) -> _Chunk:
        chunk = found.chunks[number] = _Chunk()
        self.kept_bytes += found.size_of(number)
        self._unread_bytes += found.size_of(number)
        return chunk

    def _note_read(self, found: CachedObject, number: int, chunk: _Chunk) -> None:
        self._kept.move_to_end((found, number))
        if not chunk.is_read:
            chunk.is_read = True
            self._unread_bytes -= found.size_of(number)

    def _remove_if_done(self, found: CachedObject, number: int, chunk: _Chunk) -> None:
        """Forget a chunk that nobody holds, if all of it was given back."""
        num_bytes = sum(stop - start for start, stop in chunk.given_back)
        if not chunk.num_held and num_bytes >= found.size_of(number):
            if found.chunks.get(number) is chunk:
                self._remove(found, number)
            found.given_back.add(number)

    def _remove(self, found: CachedObject, number: int) -> None:
        """Forget a chunk that nobody holds."""
        chunk = found.chunks.pop(number)
        self._kept.pop((found, number), None)
        self.kept_bytes -= found.size_of(number)
        if not chunk.is_read:
            self._unread_bytes -= found.size_of(number)
        if chunk.is_there:
            punch(found.descriptor, number * found.chunk_bytes, found.size_of(number))

    def _make_room(self, num_bytes: int) -> bool:
        """Give back chunks until so many bytes fit; tell whether they do."""
        old = iter(list(self._kept.items()))
        while self.kept_bytes + num_bytes > self._limit_bytes:
            for (found, number), chunk in old:
                if chunk.is_read and not chunk.num_held:
                    self._remove(found, number)
                    break
            else:
                return False
        return True

    def _start_threads(self) -> None:
        while len(self._threads) < NUM_CONNECTIONS:
            thread = threading.Thread(target=self._work, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _take_request(self) -> _Request | None:
        """Return what is to be fetched next: what threads wait for, then what they will read."""
        if self._urgent:
            found, numbers = self._urgent.popleft()
            self._make_room(0)
            return found, numbers
        if self._next_ahead is None:
            self._next_ahead = next(self._ahead, None)
        while self._next_ahead is not None:
            found, left = self._next_ahead
            groups = _in_requests(
                [n for n in left if n not in found.chunks and n not in found.given_back]
            )
            if groups:
                numbers = groups[0]  # others may have come in between meanwhile
                num_bytes = sum(map(found.size_of, numbers))
                most = min(_AHEAD_BYTES, self._limit_bytes // 2)
                if self._unread_bytes + num_bytes > most or not self._make_room(num_bytes):
                    return None
                for number in numbers:
                    self._begin(found, number)
                self._next_ahead = (found, [number for each in groups[1:] for number in each])
                return found, numbers
            self._next_ahead = next(self._ahead, None)
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                while (request := self._take_request()) is None:
                    if self._is_closed:
                        return
                    self._changed.wait(_WAIT_SECONDS)
                if self._is_closed:
                    return
            error: BaseException | None = None
            try:
                self._fetch(*request)
            except BaseException as problem:
                error = problem
            found, numbers = request
            with self._changed:
                for number in numbers:
                    chunk = found.chunks[number]
                    if error is None:
                        chunk.is_there = True
                        self._kept[found, number] = chunk
                    else:  # those that wait for it are told; a later reader asks again
                        chunk.error = error
                        self._remove(found, number)
                self._changed.notify_all()

    def _fetch(self, found: CachedObject, numbers: list[int]) -> None:
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        start = numbers[0] * found.chunk_bytes
        stop = start + sum(map(found.size_of, numbers))

        def ask() -> None:
            position = start

            def write(data: memoryview) -> None:
                nonlocal position
                done = 0
                if self._is_closed:
                    raise TransientError("nobody waits for it any more")
                with naming(self._folder, "written"):
                    while done < len(data):
                        done += write_at(found.descriptor, position + done, data[done:])
                position += done

            with self._changed:
                self.num_requests += 1
            found.remote.read(start, stop, found.state, write)

        persistently(found.remote.address, ask, is_stopped=lambda: self._is_closed)
        with self._changed:
            self.num_fetched_bytes += stop - start


def requests_of(
    ranges: Sequence[tuple[_AnyObject, int, int]],
) -> Iterator[tuple[_AnyObject, list[int]]]:
    """Yield what fetches ranges in their order; neighbours that come later are fetched at once."""
    wanted: dict[_AnyObject, set[int]] = {}
    for found, start, stop in ranges:
        wanted.setdefault(found, set()).update(found.numbers(start, stop))
    for found, start, stop in ranges:
        left = wanted[found]
        for number in found.numbers(start, stop):
            if number in left:
                end = number + 1
                while end in left and end < number + REQUEST_CHUNKS:
                    end += 1
                left.difference_update(range(number, end))
                yield found, list(range(number, end))


def _in_requests(numbers: list[int]) -> list[list[int]]:
    """Group the numbers of chunks by what one request fetches: neighbours, not too many."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and groups[-1][-1] + 1 == number and len(groups[-1]) < REQUEST_CHUNKS:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _nothing() -> None:
    return None


class _Holding(threading.local):
    def __init__(self) -> None:
        self.release: Callable[[], None] = _nothing
