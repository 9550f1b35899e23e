"""What the machine offers: processors, memory, and where files are."""

from __future__ import annotations

import math
import os
from pathlib import Path

_MAX_PROCESSORS = 16
_NUM_WAITING = 2
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


def num_threads(wanted: int) -> int:
    """Return the number of worker threads for an option; 0 leaves it to the machine.

    Some threads wait for a disk while the others compute. Two more than processors were the
    fastest, or as fast as more, whether what is read was in the page cache or not.
    """
    return wanted or min(num_processors(), _MAX_PROCESSORS) + _NUM_WAITING


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
