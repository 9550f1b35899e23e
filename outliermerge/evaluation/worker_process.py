"""Starts the subprocess that runs a harness on one model, and listens to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from outliermerge.storage.machine import kill_all, was_killed

# "" is the working directory; a data set's file there must not be imported as a module.
_START = "import sys; sys.path[:] = filter(None, sys.path); from {} import main; main()"
_WORKER = "outliermerge.evaluation.worker"
# The form of tqdm's progress bars; the number before belongs to the same bar.
_BAR = re.compile(rb"(\d+)/(\d+) \[")


@contextmanager
def worker(
    request: Mapping[str, Any],
    *,
    folder: Path,
    log: Path,
    environment: Mapping[str, str],
    on_progress: Callable[[int, int], None],
    program: str = _WORKER,
) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[dict[str, Any]]]]:
    """Start a worker; yield it and its events, and end it when the block is left.

    Args:
        request: the request that outliermerge.evaluation.worker reads.
        folder: the working directory.
        log: the file for everything that the harness prints.
        environment: variables that are added to this process's.
        on_progress: called with the number of questions done and of all questions in a step.
        program: the module that it runs; another than `worker` reads lines after the request.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _START.format(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, **environment},
        start_new_session=True,  # so that its child processes can be killed with it
    )
    assert process.stdin and process.stdout and process.stderr
    listener = threading.Thread(target=_tee, args=(process.stderr.fileno(), log, on_progress))
    listener.start()
    try:
        try:
            request = {**request, "parent": os.getpid()}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            if program == _WORKER:
                process.stdin.close()
        except BrokenPipeError:
            pass  # the worker ended at once: its exit code and log say why
        yield process, _events(process.stdout)
    finally:
        end(process)
        process.wait()
        listener.join()
        with suppress(OSError):  # what it has not read
            process.stdin.close()
        process.stdout.close()
        process.stderr.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and its child processes, which may keep its standard error open."""
    kill_all(process)


def _events(lines: IO[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # the worker was killed while it wrote
            return


def _tee(descriptor: int, log: Path, on_progress: Callable[[int, int], None]) -> None:
    while block := os.read(descriptor, 1 << 16):
        # Read on even if the log fails: a worker whose output nobody reads would wait forever.
        with suppress(OSError), log.open("ab") as file:
            file.write(block)
        if bars := _BAR.findall(block):
            on_progress(int(bars[-1][0]), int(bars[-1][1]))


def why_it_ended(harness: str, returncode: int, log: Path, start: int) -> str:
    """Return in words how a worker ended before it was done; its log begins at `start`."""
    if was_killed(returncode):
        how = "was killed (signal 9), as the system does when memory runs out"
    elif returncode < 0:
        how = f"was ended by signal {-returncode} ({signal.strsignal(-returncode)})"
    else:
        how = f"ended with exit code {returncode}"
    text = log.read_bytes()[start:].decode("utf-8", "replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines()]
    said = [line for line in lines if line and "it/s]" not in line and "s/it]" not in line]
    return f"{harness}'s process {how}" + (f". Its last words: {said[-1][:500]}" if said else "")
