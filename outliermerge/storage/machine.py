"""The machine and this process: processors, memory, disk counters, limits, and ending processes.

Functions that not every system has are here (those on files in `system`), each with a plain
fallback. The code asks whether a function exists, never which system this is.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

PAGE_BYTES = mmap.PAGESIZE
_MAX_PROCESSORS = 16
_NUM_WAITING = 2
_SHARE_OF_FREE = 0.75
_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
# By version of control groups: the limit, what is taken, and how lines on the page cache begin.
_OF_MEMORY = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
_UNLIMITED = 1 << 60
_KILLED = getattr(signal, "SIGKILL", 9)
# If the system cannot limit a process, the process ends itself after too long: faulthandler's
# thread does that even while `re` is running. Then memory has no limit.
_LIMITED = """
import contextlib, time
try:
    import resource
except ImportError:
    import faulthandler
    resource = None
left = {seconds}
for name, most in ("RLIMIT_CPU", {seconds}), ("RLIMIT_AS", {num_bytes}), ("RLIMIT_CORE", 0):
    if hasattr(resource, name):
        with contextlib.suppress(ValueError, OSError):  # that a system does not limit, or not so
            resource.setrlimit(getattr(resource, name), (most, most))
@contextlib.contextmanager
def limited():
    global left
    if resource is None:
        faulthandler.dump_traceback_later(max(left, 0.001), exit=True)
    began = time.perf_counter()
    yield
    if resource is None:
        faulthandler.cancel_dump_traceback_later()
        left -= time.perf_counter() - began
"""


def num_processors() -> int:
    """Return how many processors this process may use, by its affinity and container quota."""
    if hasattr(os, "sched_getaffinity"):
        available = len(os.sched_getaffinity(0))
    else:
        available = os.cpu_count() or 1
    for group in _control_groups("cpu"):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = (_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.strip().isdecimal() and period.strip().isdecimal():
            available = min(available, math.ceil(int(quota) / int(period)))
    return max(1, available)


def num_threads(wanted: int) -> int:
    """Return the number of worker threads for an option; 0 chooses by the machine.

    Some threads wait for a disk while others compute. Two threads more than processors were
    fastest, or as fast as more threads, with and without the inputs in the page cache.
    """
    return wanted or min(num_processors(), _MAX_PROCESSORS) + _NUM_WAITING


def free_memory_bytes() -> int | None:
    """Return the free memory in bytes, page cache included; None if the system does not tell.

    In a container, or another control group, it is no more than what is left of that one's limit.
    """
    lines = _read(_PROC / "meminfo").splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for group in _control_groups("memory"):
        for most, now, start in _OF_MEMORY:
            limit = _read(group / most).strip()
            if limit.isdecimal() and int(limit) < _UNLIMITED:
                taken = int(_read(group / now).strip() or 0)
                cached = (f"{start}active_file ", f"{start}inactive_file ")
                for line in _read(group / "memory.stat").splitlines():
                    if line.startswith(cached):
                        taken -= int(line.split()[1])
                found.append(max(0, int(limit) - max(0, taken)))
    return min(found, default=None)


def _control_groups(controller: str) -> list[Path]:
    """Return the folders of the control groups that this process is in, by both versions of them.

    A container may see its own group as the root, or only by the names that the host gives it.
    """
    found = list[Path]()
    for line in ("0::/", f"1:{controller}:/", *_read(_PROC / "self/cgroup").splitlines()):
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = _CGROUP / controller if controllers else _CGROUP
        parts = [part for part in path.split("/") if part not in ("", "..")]
        found += (top.joinpath(*parts[:number]) for number in range(len(parts) + 1))
    return list(dict.fromkeys(found))


def most_memory_bytes(free_bytes: int | None) -> int:
    """Return what a default may grow to, of what is free; 0 if the system does not tell that."""
    return int(_SHARE_OF_FREE * (free_bytes or 0))


def resident_bytes() -> int | None:
    """Return the memory that this process takes now; None if the system does not tell."""
    lines = _read(_PROC / "self/status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


def disk_bytes_read() -> int | None:
    """Return the bytes that this process has read from disks; None if the system does not tell."""
    lines = _read(_PROC / "self/io").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def mapped_files() -> list[tuple[int, int, int]]:
    """Return where files are mapped into this process's memory, as proc(5) lists it.

    Returns:
        Addresses (start, end), and the number that added to an address gives the position in the
        file. Empty if the system does not tell.
    """
    found = []
    for line in _read(_PROC / "self/maps").splitlines():
        addresses, _, offset, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((start, end, int(offset, 16) - start))
    return found


def path_of(descriptor: int, path: Path) -> str:
    """Return a path to an open file that stays right even if its name is given to another file."""
    own = _PROC / f"self/fd/{descriptor}"
    return str(own if own.exists() else path)


def whole_pages(num_bytes: int) -> memoryview:
    """Return page-aligned memory, with huge pages if the system has them."""
    pages = mmap.mmap(-1, max(num_bytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a direct write then has few parts
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel at every operation.

    Then the intermediate results of a block reuse the pages of the block before. Measured for
    torch's float64 sums of 256 Ki elements: 1.3 billion elements per second, instead of 0.15. No
    effect on other C libraries.
    """
    mallopt = getattr(c_library(), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 1 << 28)
        mallopt(m_trim_threshold, 1 << 29)


def c_library() -> Any | None:
    """Return the functions of this process's C library; None if they cannot be called."""
    try:
        import ctypes

        return ctypes.CDLL(None, use_errno=True)
    except (ImportError, OSError, TypeError):
        return None


def limited_code(seconds: int, num_bytes: int) -> str:
    """Return Python code for the start of a process, which limits that process if the system can.

    Work that may take long goes into `with limited():`. If that work takes more than the allowed
    seconds in total, the process ends. If it takes too much memory, the process ends or gets a
    MemoryError.
    """
    return _LIMITED.format(seconds=seconds, num_bytes=num_bytes)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a session leader and, if the system can, all processes of the session."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, _KILLED)


def has_ended(pid: int) -> bool:
    """Tell whether no process of this machine has a number; False if the system cannot tell."""
    if not hasattr(os, "killpg"):  # there `os.kill` would end it
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # of another user
        return False
    return False


def was_killed(returncode: int) -> bool:
    """Tell whether a process was ended by a signal that it cannot catch."""
    return returncode == -_KILLED


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def cache_folder(name: str) -> Path:
    """Return a folder for files that can be made again; it need not exist yet.

    Raises:
        RuntimeError: the user has no home folder.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "outliermerge" / name
