"""Further processes that take trials of the same search."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from outliermerge.errors import as_path
from outliermerge.storage.machine import kill_all

_PASSED_ON = ("space", "suite", "trials", "sampler", "strategy", "questions", "limit", "seed",
              "threads")  # fmt: skip


class Helpers:
    """The processes, which run the same command with one job; they end with the search.

    Args:
        options: of the command.
        say: told where a process says why it failed.
    """

    def __init__(self, options: argparse.Namespace, say: Callable[[str], None]) -> None:
        self._options, self._say = options, say
        self._processes: list[tuple[subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> Helpers:
        return self

    def start(self) -> None:
        """Start them."""
        folder = as_path(self._options.output) / "work"
        for number in range(2, self._options.jobs + 1):
            log = folder / f"process-{number}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    self._command(number), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=file, start_new_session=True,
                )  # fmt: skip
            self._processes.append((process, log))

    def _command(self, number: int) -> list[str]:
        given = {name: getattr(self._options, name) for name in _PASSED_ON}
        flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
        device = self._options.device
        if device == "cuda":
            import torch

            device = f"cuda:{(number - 1) % torch.cuda.device_count()}"
        words = [self._options.spec, f"--output={self._options.output}", f"--device={device}"]
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
