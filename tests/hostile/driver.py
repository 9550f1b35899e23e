"""Runs commands, each in a fork of a process that has imported the package, and measures them.

Reads a line of JSON for each: arguments, the folder to work in, and limits. Writes one for each.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

# What the commands import when they are called, so that it is not paid for each.
import numpy  # noqa: F401
import rich.progress  # noqa: F401
import xxhash  # noqa: F401
import yaml  # noqa: F401

import outliermerge.api
import outliermerge.cli.console
import outliermerge.cli.logs
import outliermerge.cli.main
import outliermerge.output.manifest
import outliermerge.output.run
import outliermerge.search.sweeps

MAX_WAIT_SECONDS = 300  # after which a command that waits for ever is ended


def run(arguments: list[str], folder: str, cpu_seconds: int) -> int:
    """Run a command as a process of its own would; return its exit code."""
    os.chdir(folder)
    for name, number in (("said.out", 1), ("said.err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(MAX_WAIT_SECONDS)
    try:
        return outliermerge.cli.main.main(arguments)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        Path("peak.kb").write_text(str(max(kilobytes("VmHWM"), children)))


def kilobytes(key: str) -> int:
    """Return the memory that this process takes (VmRSS), or the most that it has taken (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def main(*modules: str) -> None:
    """Answer each line with exit code, seconds of a processor, and peak memory.

    Args:
        *modules: what commands import as well; the memory that they take is not counted.
    """
    outliermerge.cli.main.load()
    before = kilobytes("VmRSS")
    for name in modules:
        importlib.import_module(name)
    loaded = kilobytes("VmRSS") - before
    for line in sys.stdin:
        case = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 71
            try:
                code = run(case["arguments"], case["folder"], case["cpu_seconds"])
            finally:
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        peak = Path(case["folder"], "peak.kb")
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": usage.ru_utime + usage.ru_stime,
            "kilobytes": (int(peak.read_text()) if peak.exists() else usage.ru_maxrss) - loaded,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
