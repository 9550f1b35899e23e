"""Writes the shards of an output into a store while they are made; no whole shard is held here.

Threads write blocks to their places in unnamed sparse files, one for a shard. What is there without
a gap goes up in order, in parts, and is given back to the disk. Jobs come in the order of their
places, and one that is too far ahead waits. So the files' disk space is bounded, and the block that
all others wait for never waits itself.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import xxhash

from outliermerge.checkpoint.checksum import DIGEST_BYTES, PIECE_ELEMENTS, tensor_checksum
from outliermerge.checkpoint.layout import OutputTensor, Shard
from outliermerge.checkpoint.reader import read_exactly, write_exactly
from outliermerge.errors import OutlierMergeError
from outliermerge.execution.jobs import JobResult
from outliermerge.output.writer import WrittenSpan
from outliermerge.planning.plan import Job, Plan
from outliermerge.storage.bucket import Bucket
from outliermerge.storage.failures import naming
from outliermerge.storage.machine import cache_folder
from outliermerge.storage.ranges import State
from outliermerge.storage.system import punch

WINDOW_BYTES = 256 << 20  # how far a block may be ahead of what has gone up
_CHUNK_BYTES = 4 << 20  # is read from the file at a time
_NUM_READS = 16
_WAIT_SECONDS, _PATIENCE_SECONDS = 1.0, 5.0


class BucketWriter:
    """The planned files of an output in a store; merges write into it (a `Sink`).

    Args:
        on_begin: called before the first shard goes up.
        on_end: called before the last bytes of a shard go up; what it raises, aborts that.
        on_shard: called when a shard is there, with its state and the results of its tensors.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        on_begin: Callable[[], None],
        on_end: Callable[[], None],
        on_shard: Callable[[Shard, State, list[tuple[Job, JobResult]]], None],
    ) -> None:
        self._bucket = bucket
        self._on_begin, self._on_end, self._on_shard = on_begin, on_end, on_shard
        self._changed = threading.Condition()
        self._folder, self._files = cache_folder("uploads"), dict[str, int]()
        self._shards: list[Shard] = []
        self._starts: dict[str, int] = {}  # of the shards, as if they lay one after the other
        self._jobs: dict[str, list[Job]] = {}  # of a shard, in the order of their places
        self._free: set[str] = set()  # tensors that are made before their turn
        self._ready: dict[int, int] = {}  # beyond the frontier, the ends of ranges by their starts
        self._frontier = self._passed = 0
        self._digests: dict[str, bytearray] = {}
        self._results: dict[str, JobResult] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_stopped = False

    def plan_jobs(self, plan: Plan, names: set[str]) -> list[Job]:
        """Take the tensors that will be written, those of whole shards; return them in order."""
        by_shard: dict[str, list[Job]] = {}
        for job in plan.jobs:
            if job.name in names:
                by_shard.setdefault(job.output.file, []).append(job)
        for jobs in by_shard.values():
            jobs.sort(key=lambda job: job.output.offset)
        self._shards = [shard for shard in plan.shards if shard.file in by_shard]
        self._jobs = {shard.file: by_shard[shard.file] for shard in self._shards}
        end = 0
        for shard in self._shards:
            self._starts[shard.file] = end
            self._ready[end] = end + len(shard.header)
            for start, stop in _gaps(shard, self._jobs[shard.file]):
                self._ready[end + start] = end + stop
            end += shard.num_bytes
        with self._changed:
            self._advance()
        ordered = [job for jobs in self._jobs.values() for job in jobs]
        self._digests = {job.name: bytearray() for job in ordered}
        self._free = {job.name for job in ordered if job.action == "equal"}
        return ordered

    def _start(self) -> None:
        """Start to upload, once."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._upload_all, daemon=True)
                self._thread.start()

    def _opened(self, file: str) -> int:
        """Return the unnamed file of a shard."""
        with self._changed:
            if file not in self._files:
                with naming(self._folder, "written"):
                    self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                    with tempfile.TemporaryFile(dir=self._folder) as unnamed:
                        self._files[file] = os.dup(unnamed.fileno())
            return self._files[file]

    def place(self, tensor: OutputTensor, start: int) -> tuple[int, int, int]:
        """Return a file, an element's position in it, and -1; waits while it is far ahead."""
        self._start()
        position = self._position(tensor, start)
        if tensor.name not in self._free:
            self._wait(lambda: position - self._passed < WINDOW_BYTES)
        return self._opened(tensor.file), position - self._starts[tensor.file], -1

    def _position(self, tensor: OutputTensor, start: int) -> int:
        return self._starts[tensor.file] + tensor.offset + start * tensor.dtype.num_bytes

    def wrote(self, tensor: OutputTensor, span: tuple[int, int]) -> None:
        """Note that a span is at its place."""
        start, stop = (self._position(tensor, element) for element in span)
        with self._changed:
            if start < stop:
                self._ready[start] = stop
                self._advance()

    def _advance(self) -> None:
        while (end := self._ready.pop(self._frontier, None)) is not None:
            self._frontier = end
        self._changed.notify_all()

    def write(self, tensor: OutputTensor, start: int, data: memoryview) -> None:
        """Write elements from `start` on."""
        descriptor, position, _ = self.place(tensor, start)
        with naming(self._folder, "written", tensor=tensor.name):
            write_exactly(descriptor, position, data)
        self.wrote(tensor, (start, start + len(data) // tensor.dtype.num_bytes))

    def digests(self, tensor: OutputTensor, start: int, out: memoryview) -> bytes:
        """Return the digests of pieces from `start` on, when these have gone up."""
        end = self._position(tensor, start) + len(out)
        self._wait(lambda: self._passed >= end)
        first = start // PIECE_ELEMENTS
        number = -(-len(out) // (PIECE_ELEMENTS * tensor.dtype.num_bytes))
        found = self._digests[tensor.name]
        return bytes(found[first * DIGEST_BYTES : (first + number) * DIGEST_BYTES])

    def note(self, job: Job, result: JobResult) -> None:
        """Take the result of a tensor that is written."""
        with self._changed:
            self._results[job.name] = result
            self._changed.notify_all()

    def read_back(self, spans: Sequence[WrittenSpan]) -> list[bytes]:
        """Return the bytes of spans of written tensors, of an earlier run, too."""
        self.wait()

        def read(wanted: WrittenSpan) -> bytes:
            tensor, (start, stop) = wanted
            size = tensor.dtype.num_bytes
            out = bytearray((stop - start) * size)
            self._bucket.read(tensor.file, tensor.offset + start * size, memoryview(out))
            return bytes(out)

        with ThreadPoolExecutor(_NUM_READS) as pool:
            return list(pool.map(read, spans))

    def wait(self) -> None:
        """Return when all shards are in the store.

        Raises:
            OutlierMergeError: one cannot be written.
        """
        if self._shards:
            self._start()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_WAIT_SECONDS)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Let no thread go on waiting; what goes up is aborted."""
        self._is_stopped = True
        if self._changed.acquire(blocking=False):  # else they look again soon
            self._changed.notify_all()
            self._changed.release()

    def close(self) -> None:
        """Stop uploading, and give the files back."""
        self.stop()
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
            if self._thread.is_alive():  # it waits for the store, and may read once more
                return
        while self._files:
            os.close(self._files.popitem()[1])

    @property
    def has_begun(self) -> bool:
        """Whether something has gone up."""
        return self._thread is not None

    def _wait(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so.

        Raises:
            OutlierMergeError: it will not come to be.
        """
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self._is_stopped:
                    raise OutlierMergeError("interrupted")
                if is_so():
                    return
                self._changed.wait(_WAIT_SECONDS)

    def _upload_all(self) -> None:
        try:
            self._on_begin()
            for shard in self._shards:
                self._upload(shard)
        except BaseException as error:
            self._error = error
        with self._changed:
            self._changed.notify_all()

    def _upload(self, shard: Shard) -> None:
        state = self._bucket.put_stream(shard.file, self._chunks(shard), shard.num_bytes)
        jobs = self._jobs[shard.file]
        self._wait(lambda: all(job.name in self._results for job in jobs))
        results = [(job, self._results[job.name]) for job in jobs]
        for job, result in results:
            if tensor_checksum([bytes(self._digests.pop(job.name))]) != result.checksum:
                raise OutlierMergeError(
                    f"{self._folder}: tensor {job.name!r}: other bytes were read than were "
                    "written: the disk, or what connects it, fails"
                )
        self._on_shard(shard, state, results)
        with self._changed:
            if shard.file in self._files:
                os.close(self._files.pop(shard.file))

    def _chunks(self, shard: Shard) -> Iterator[bytearray]:
        """Yield the bytes of a shard in order, when they are there."""
        start = position = self._starts[shard.file]
        end = start + shard.num_bytes
        pieces = _Pieces(shard, self._jobs[shard.file], self._digests)
        while position < end:
            self._wait(partial(self._is_ready, position))
            stop = min(self._frontier, end, position + _CHUNK_BYTES)
            content = self._taken(shard, position - start, stop - start)
            pieces.take(memoryview(content))
            if stop == end:
                with ThreadPoolExecutor(1) as other:  # no call of obstore may be inside of another
                    other.submit(self._on_end).result()
            with self._changed:
                self._passed = position = stop
                self._changed.notify_all()
            yield content

    def _taken(self, shard: Shard, start: int, stop: int) -> bytearray:
        """Return bytes of a shard, which are given back to the disk."""
        header = bytearray(shard.header[start:stop])
        start += len(header)
        if start == stop:
            return header
        content, descriptor = bytearray(stop - start), self._opened(shard.file)
        with naming(self._folder, "read back"):
            read_exactly(descriptor, start, memoryview(content))
        punch(descriptor, start, len(content))
        return header + content

    def _is_ready(self, position: int) -> bool:
        return self._frontier > position


def _gaps(shard: Shard, jobs: Sequence[Job]) -> Iterator[tuple[int, int]]:
    """Yield where zeros are behind the tensors of a shard, as in a GGUF file."""
    starts = [*(job.output.offset for job in jobs[1:]), shard.num_bytes]
    for job, start in zip(jobs, starts, strict=True):
        end = job.output.offset + job.output.num_bytes
        if end < start:
            yield end, start


class _Pieces:
    """Adds the digests of a shard's pieces to those of its tensors, while its bytes pass."""

    def __init__(self, shard: Shard, jobs: Sequence[Job], digests: dict[str, bytearray]) -> None:
        self._pieces, self._digests = self._planned(shard, jobs), digests
        self._hash, self._at = xxhash.xxh3_128(), 0
        self._end, self._name = next(self._pieces)

    @staticmethod
    def _planned(shard: Shard, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        """Yield the end of each piece, and its tensor; first those of the header."""
        yield len(shard.header), ""
        gaps = dict(_gaps(shard, jobs))
        for output in (job.output for job in jobs):
            size = PIECE_ELEMENTS * output.dtype.num_bytes
            for start in range(0, output.num_bytes, size):
                yield output.offset + min(start + size, output.num_bytes), output.name
            if stop := gaps.get(output.offset + output.num_bytes):
                yield stop, ""

    def take(self, content: memoryview) -> None:
        """Take the next bytes of the shard."""
        while content:
            length = min(len(content), self._end - self._at)
            self._hash.update(content[:length])
            self._at += length
            content = content[length:]
            if self._at == self._end:
                if self._name:
                    self._digests[self._name] += self._hash.digest()
                self._hash.reset()
                self._end, self._name = next(self._pieces, (self._end, ""))
