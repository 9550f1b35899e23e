"""Further processes that take trials of the same search."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from outliermerge.errors import ArgumentError, argument, as_path
from outliermerge.storage.machine import kill_all

_PASSED_ON = ("space", "trials", "sampler", "strategy", "questions", "limit", "seed", "threads",
              "device", "trial_seconds")  # fmt: skip
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus_of(jobs: int, devices: Iterable[str]) -> list[str]:
    """Return the GPU of each job, as CUDA_VISIBLE_DEVICES names it; empty if each may use all.

    A job sees only its own, so that whatever it starts takes that one.

    Args:
        jobs: how many there are.
        devices: what merges and what scores; a GPU that is named by its number is for all jobs.

    Raises:
        ArgumentError: there are fewer GPUs than jobs.
    """
    if jobs == 1:
        return []
    from outliermerge.execution.threads import choose_device

    if not any(choose_device(name) == "cuda" for name in devices):
        return []
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get(_VISIBLE)
    if jobs > count:
        raise ArgumentError(
            f"{argument('jobs', jobs)}: each takes a GPU of its own, and this machine has {count}. "
            f"Give {argument('jobs', count)}, or name the GPU that all are to share: "
            f"{argument('device', 'cuda:0')}"
        )
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return [name.strip() for name in names[:jobs]]


class Helpers:
    """The processes, which run the same command with one job; they end with the search.

    Args:
        options: of the command.
        jobs: how many processes take trials, this one included.
        gpus: of each job, from `gpus_of`.
        say: told where a process says why it failed.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        jobs: int,
        gpus: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self._options, self._jobs, self._gpus, self._say = options, jobs, gpus, say
        self._processes: list[tuple[subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> Helpers:
        return self

    def start(self) -> None:
        """Start them."""
        folder = as_path(self._options.output) / "work"
        for number in range(2, self._jobs + 1):
            log = folder / f"process-{number}.log"
            own = {_VISIBLE: self._gpus[number - 1]} if self._gpus else {}
            with log.open("wb") as file:
                process = subprocess.Popen(
                    self._command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=file, start_new_session=True, env={**os.environ, **own},
                )  # fmt: skip
            self._processes.append((process, log))

    def _command(self) -> list[str]:
        given = {name: getattr(self._options, name) for name in _PASSED_ON}
        flags = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in given.items()
            if value is not None
        ]
        flags += [f"--suite={name}" for name in self._options.suite]
        words = [self._options.spec, f"--output={self._options.output}"]
        return [sys.executable, "-m", "outliermerge", "search", *words, *flags, "--quiet"]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process, log in self._processes:
            if error is not None:
                kill_all(process)
            if process.wait() and error is None:
                self._say(f"a process of the search failed: {log}")
