"""The yardstick of a merge: read every input once and write one output, computing nothing.

Threads read blocks of all inputs into buffers of their own, which they reuse, and write the last
input's at its place in a file whose space is allocated before. Prints JSON.

    python benchmarks/copy_files.py [--direct] OUTPUT INPUT...

With --direct the output is written past the page cache, but for the last part of a page.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

BLOCK_BYTES = {False: 1 << 20, True: 1 << 21}  # the faster of some, each
PAGE_BYTES = 4096


def copy(inputs: Sequence[Path], output: Path, *, direct: bool = False) -> dict[str, float]:
    """Read the inputs, write a copy of the last one, by a thread a processor.

    Returns:
        work_seconds: from the first open to the last close.
        sync_seconds: of the fsync after it.
        read_bytes, written_bytes: of all threads.
    """
    started = time.perf_counter()
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    whole = os.open(output, os.O_WRONLY | os.O_DIRECT) if direct else target
    num_bytes = [os.fstat(source).st_size for source in sources]
    os.posix_fallocate(target, 0, num_bytes[-1])
    step = BLOCK_BYTES[direct]
    offsets = iter(range(0, max(num_bytes), step))
    totals: list[tuple[int, int]] = []

    def work() -> None:
        totals.append(_copy_blocks(sources, target, whole, offsets, step))

    threads = [threading.Thread(target=work) for _ in os.sched_getaffinity(0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor in {*sources, target, whole}:
        os.close(descriptor)
    work_seconds = time.perf_counter() - started
    read_bytes, written_bytes = (sum(column) for column in zip(*totals, strict=True))
    if (read_bytes, written_bytes) != (sum(num_bytes), num_bytes[-1]):
        raise SystemExit(f"{output}: read {read_bytes} and wrote {written_bytes} bytes of inputs")
    started = time.perf_counter()
    target = os.open(output, os.O_RDONLY)
    os.fsync(target)
    os.close(target)
    return {
        "work_seconds": round(work_seconds, 4),
        "sync_seconds": round(time.perf_counter() - started, 4),
        "read_bytes": read_bytes,
        "written_bytes": written_bytes,
    }


def _copy_blocks(
    sources: Sequence[int], target: int, whole: int, offsets: Iterator[int], step: int
) -> tuple[int, int]:
    """Copy blocks until none is left, whole ones to `whole`; return the bytes read and written."""
    read_bytes = written_bytes = 0
    with mmap.mmap(-1, step) as buffer, memoryview(buffer) as view:
        buffer.madvise(mmap.MADV_HUGEPAGE)
        for offset in offsets:
            num_bytes = 0
            for source in sources:
                num_bytes = os.preadv(source, [view], offset)
                read_bytes += num_bytes
            with view[:num_bytes] as part:
                into = target if num_bytes % PAGE_BYTES else whole
                written_bytes += os.pwrite(into, part, offset)
    return read_bytes, written_bytes


if __name__ == "__main__":
    is_direct = sys.argv[1] == "--direct"
    out, *files = map(Path, sys.argv[1 + is_direct :])
    print(json.dumps(copy(files, out, direct=is_direct)))
