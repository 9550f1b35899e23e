"""The yardstick of looking at weights: read every file once, into buffers that are reused.

A thread a processor reads a block at a time and computes nothing. Prints JSON.

    python benchmarks/read_files.py FILE...
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

BLOCK_BYTES = 1 << 20


def read(files: Sequence[Path]) -> dict[str, float]:
    """Read files by a thread a processor.

    Returns:
        seconds: from the first open to the last close.
        read_bytes: of all threads.
    """
    started = time.perf_counter()
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    num_bytes = [os.fstat(descriptor).st_size for descriptor in descriptors]
    places = iter(
        [
            (descriptor, offset)
            for descriptor, size in zip(descriptors, num_bytes, strict=True)
            for offset in range(0, size, BLOCK_BYTES)
        ]
    )
    totals: list[int] = []
    threads = [
        threading.Thread(target=lambda: totals.append(_read_blocks(places)))
        for _ in os.sched_getaffinity(0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor in descriptors:
        os.close(descriptor)
    if sum(totals) != sum(num_bytes):
        raise SystemExit(f"read {sum(totals)} of {sum(num_bytes)} bytes")
    return {"seconds": round(time.perf_counter() - started, 4), "read_bytes": sum(totals)}


def _read_blocks(places: Iterator[tuple[int, int]]) -> int:
    num_bytes = 0
    with mmap.mmap(-1, BLOCK_BYTES) as buffer, memoryview(buffer) as view:
        for descriptor, offset in places:
            num_bytes += os.preadv(descriptor, [view], offset)
    return num_bytes


if __name__ == "__main__":
    print(json.dumps(read([Path(name) for name in sys.argv[1:]])))
