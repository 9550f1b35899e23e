"""A process that stays, scores model after model, and can be stopped while it does."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.worker_process import end, why_it_ended
from outliermerge.search.questions import Answers
from outliermerge.search.workplace import Merged


class LateError(OutlierMergeError):
    """A process was ended, since it took too long."""


Begin = Callable[
    [Path], AbstractContextManager[tuple["subprocess.Popen[bytes]", Iterator[dict[str, Any]]]]
]
"""Starts a process that writes to a log; returns what `worker` returns."""


class Process:
    """A process that is started when it is needed, and again where it has ended.

    Its first event says that it is ready. Then it answers each line, with a model and the questions
    that it is asked, by an event.

    Args:
        title: what runs in it, for messages.
        folder: for a folder of its own.
        kind: of the process, for the names of that folder and of the log.
        begin: starts it.
        name: stands before what it tells of failures.
    """

    def __init__(
        self, title: str, folder: Path, kind: str, begin: Begin, *, name: str = ""
    ) -> None:
        self._title, self._folder, self._kind = title, folder.absolute(), kind
        self._begin, self._name = begin, name
        self._log_start, self._has_failed = 0, False
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._events: Iterator[dict[str, Any]] = iter(())

    @property
    def folder(self) -> Path:
        """Its own folder; it is removed in the end, but for a log that says why it failed."""
        return self._folder / f"{self._kind}-{platform.node()}-{os.getpid()}"

    @property
    def _log(self) -> Path:
        return self.folder / f"{self._kind}.log"

    def start(self) -> subprocess.Popen[bytes]:
        """Start it if it does not run, and wait until it is ready.

        Raises:
            OutlierMergeError: it does not become ready.
        """
        if self._process is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log_start = self._log.stat().st_size if self._log.exists() else 0
            self._process, self._events = self._stack.enter_context(self._begin(self._log))
            self._taken(self._process, next(self._events, None))
        return self._process

    def score(
        self,
        model: Merged,
        questions: Mapping[str, Sequence[str]] | None,
        seconds: float | None = None,
    ) -> Answers:
        """Return the scores of a model.

        Args:
            seconds: the process is ended if it takes longer; its start is not counted.

        Raises:
            LateError: it was ended.
            OutlierMergeError: it fails, or has ended by itself.
        """
        process = self.start()
        assert process.stdin
        line = {"model": model.checksum, "path": str(model.path), "questions": questions}
        with _ended_after(process, seconds) as late:
            try:
                process.stdin.write(json.dumps(line).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended: its last event says why, or its code and its log
            event = next(self._events, None)
        if late.is_set():
            self.end()
            raise LateError(f"took longer than {seconds:g} seconds")
        answers: Answers = self._taken(process, event)["answers"]
        return answers

    def end(self) -> None:
        """End it."""
        self._stack.close()
        self._process = None

    def close(self) -> None:
        """End it, and remove what it wrote."""
        self.end()
        if not self._has_failed:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _taken(
        self, process: subprocess.Popen[bytes], event: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return an event; raise an error if it tells one, or the process has ended."""
        if event is None:
            self._has_failed = True
            said = why_it_ended(self._title, process.wait(), self._log, self._log_start)
            self.end()  # the next line gets a new process
            raise OutlierMergeError(f"{said} (log: {self._log})")
        if event["event"] == "failed":
            self._has_failed = True
            if event.get("is_over"):
                self.end()
            raise OutlierMergeError(f"{self._name}{event['reason']}")
        return event


@contextmanager
def _ended_after(
    process: subprocess.Popen[bytes], seconds: float | None
) -> Iterator[threading.Event]:
    """End a process if a block takes too long; yield what is set then."""
    late = threading.Event()
    if seconds is None:
        yield late
        return

    def stop() -> None:
        late.set()
        end(process)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()
