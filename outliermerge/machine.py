"""What the machine offers: processors, memory, and where files are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

_MAX_THREADS = 16
_MIN_THREADS_OF_DISKS = 4
_NUM_LOOKS = 16
_CGROUP = Path("/sys/fs/cgroup")


def num_processors() -> int:
    """Return how many processors this process may use: its affinity, and its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        available = len(os.sched_getaffinity(0))
    else:
        available = os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        available = min(available, math.ceil(int(quota) / int(period)))
    return max(1, available)


def num_threads(wanted: int, paths: Iterable[Path] = ()) -> int:
    """Return the number of worker threads for an option; 0 leaves it to machine and storage.

    Args:
        paths: what will be read. Where most of it is still on the disk, threads wait for it, and
            more of them keep the disk busy.
    """
    if wanted:
        return wanted
    processors = min(num_processors(), _MAX_THREADS)
    return processors if _is_cached(paths) else max(processors, _MIN_THREADS_OF_DISKS)


def _is_cached(paths: Iterable[Path]) -> bool:
    """Tell whether files are in the page cache, by looking at some places of each."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    found: list[bool] = []
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            size = os.fstat(descriptor).st_size
            for place in range(_NUM_LOOKS):
                position = size * place // _NUM_LOOKS
                try:
                    found.append(os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT) > 0)
                except OSError:
                    found.append(False)
        finally:
            os.close(descriptor)
    return 2 * sum(found) >= len(found)


def free_memory_bytes() -> int | None:
    """Return the memory that files can be cached in; None where the system does not tell."""
    lines = _read(Path("/proc/meminfo")).splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limit = _read(_CGROUP / "memory.max").strip()
    if limit.isdecimal():
        found.append(int(limit))
    return min(found, default=None)


def open_direct(path: Path) -> int:
    """Open a file on a local disk for writing past the page cache; -1 where that does not pay.

    What is synced at the end has to reach the disk anyway: writing it there at once takes no
    memory from the inputs, no copy, and no lock that the other threads wait for.
    """
    device = path.stat().st_dev
    on_disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").exists()
    if not (on_disk and hasattr(os, "O_DIRECT")):
        return -1
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return -1


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
