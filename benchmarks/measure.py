"""Whole processes measured from outside: wall and CPU time, memory, what came from the disk."""

from __future__ import annotations

import datetime
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

Figures: TypeAlias = dict[str, float]

# What a process may say of itself, as JSON on its standard output.
SAID = ("work_seconds", "work_cpu_seconds", "seconds", "sync_seconds")
SAMPLE_MILLISECONDS = 10


class FailedCommand(Exception):
    """A measured command came to an end with another status than 0."""


def script(name: str) -> str:
    """Return the command of that name that belongs to the running interpreter."""
    return str(Path(sys.executable).with_name(name))


# As users have it: without compiled modules kept, importing torch takes two seconds more each time.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def measure(command: Sequence[str]) -> Figures:
    """Run a command to its end; return what it took, and what it said of its own times.

    Memory is the peak of the process's anonymous memory, sampled: what it maps from files or holds
    in the page cache is not its own.

    Raises:
        FailedCommand: with the last lines of what it wrote to standard error.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=_ENVIRONMENT
        )
        peak_bytes = _peak_anonymous_bytes(process.pid)
        wall = time.perf_counter() - started
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        said, messages = (_content(file) for file in (out, err))
    if process.returncode:
        last = "\n".join(messages.splitlines()[-8:])
        raise FailedCommand(f"{' '.join(command)}: exit status {process.returncode}\n{last}")
    figures = {
        "wall_seconds": wall,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_anonymous_megabytes": peak_bytes / 1e6,
        "disk_read_megabytes": usage.ru_inblock * 512 / 1e6,
    }
    if said.startswith("{"):
        told = json.loads(said)
        figures |= {key: told[key] for key in SAID if key in told}
    return {key: round(value, 4) for key, value in figures.items()}


def _peak_anonymous_bytes(pid: int) -> int:
    """Sample a child until it ends."""
    peak_kib = 0
    ended = os.pidfd_open(pid)
    try:
        wait = select.poll()
        wait.register(ended, select.POLLIN)
        while not wait.poll(SAMPLE_MILLISECONDS):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak_kib = max(peak_kib, int(line.split()[1]))
    finally:
        os.close(ended)
    return peak_kib * 1024


def _content(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def alternate(
    commands: Mapping[str, Sequence[str]],
    num_runs: int,
    *,
    before: Callable[[], None] = lambda: None,
    label: str = "",
) -> tuple[dict[str, list[Figures]], dict[str, str]]:
    """Run commands in turn, num_runs rounds of all, so that a slow minute hits all alike.

    Args:
        before: called before each run, outside the measurement.
        label: begins the lines of progress on standard error.

    Returns:
        The runs of each, a run of one and that of another with the same index being of one round;
        and what each said that failed, which is not run again and has no runs.
    """
    runs: dict[str, list[Figures]] = {name: [] for name in commands}
    failed: dict[str, str] = {}
    for number in range(num_runs):
        for name in [name for name in commands if name not in failed]:
            before()
            try:
                figures = measure(commands[name])
            except FailedCommand as error:
                failed[name] = str(error)
                progress(f"{label}: {name} failed: {error}")
                del runs[name]
                continue
            runs[name].append(figures)
            progress(f"{label}, {number + 1}/{num_runs}: {name} {figures['wall_seconds']:.2f} s")
    return runs, failed


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def medians(runs: Sequence[Figures]) -> Figures:
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


def surroundings(num_runs: int, *, also: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a reader has to know of the machine, and the versions of packages."""
    models = [
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {(models or ['?'])[0]}, {gib:.0f} GiB",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("outliermerge", "torch", *also)},
        },
        "load_before": round(os.getloadavg()[0], 2),
        "runs": num_runs,
    }
