"""Waiting for events in tests: a limit that only a hang reaches, however busy the machine is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIMIT_SECONDS = 600


def heed_interrupts() -> None:
    """For `preexec_fn`: shells start what is in their background so that it ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(found: Callable[[], object]) -> bool:
    """Wait until something is so; tell whether it is."""
    end = time.monotonic() + LIMIT_SECONDS
    while not found() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(found())


def held(number: int, when: str, *arguments: object) -> list[str]:
    """Return a command that runs outliermerge and stops itself, by tests/held_run.py.

    Args:
        number: of the tensor at whose line in the journal it stops; of those of this run.
        when: "before" the line is written, "after", or "interrupt": after, and waits for one.
        arguments: of outliermerge.
    """
    program = Path(__file__).with_name("held_run.py")
    return [sys.executable, str(program), str(number), when, *map(str, arguments)]


def stopped(process: subprocess.Popen) -> bool:
    """Wait until a process has stopped itself; False if it has ended instead."""
    states = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
    told: list[os.waitid_result] = []

    def found() -> bool:
        result = os.waitid(os.P_PID, process.pid, states)
        told.extend([result] if result is not None else [])
        return bool(told)

    assert wait_for(found), "the process neither stops nor ends"
    return told[0].si_code == os.CLD_STOPPED
