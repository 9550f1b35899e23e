"""Progress as lines of text, for logs and pipes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from types import TracebackType

from outliermerge.display import human_bytes as human_bytes

INTERVAL_VARIABLE = "OUTLIERMERGE_PROGRESS_SECONDS"
_INTERVAL_SECONDS, _MAX_INTERVAL_SECONDS = 5.0, 1e6
_NUM_SAMPLES = 6  # the speed is that of the last half minute


class ProgressLines:
    """Prints a line of progress every few seconds on the standard error.

    It has the methods of rich's Progress that the commands use. The first line explains what is
    counted. A merge that takes less than the interval prints nothing.

    Args:
        counted: what the total is, in words.
        interval_seconds: time from line to line; 0 for none.
    """

    def __init__(self, *, counted: str = "", interval_seconds: float | None = None) -> None:
        self._counted = counted
        self._interval_seconds = _interval() if interval_seconds is None else interval_seconds
        self._description, self._total, self._done = "", 0.0, 0.0
        self._samples: deque[tuple[float, float]] = deque(maxlen=_NUM_SAMPLES)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> ProgressLines:
        if self._interval_seconds:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._interval_seconds:
            self._thread.join()

    def add_task(self, description: str, total: float | None) -> int:
        """Begin; there is one task."""
        self._description, self._total = description, total or 0
        return 0

    def advance(self, task: int, num_bytes: float) -> None:
        """Count bytes; called by any thread."""
        with self._lock:
            self._done += num_bytes
            if not self._samples:  # what an earlier run had done counts nothing for the speed
                self._samples.append((time.monotonic(), self._done))

    def update(
        self,
        task: int,
        *,
        total: float | None = None,
        completed: float | None = None,
        description: str | None = None,
    ) -> None:
        """Change the total, what is done, or what is being done."""
        with self._lock:
            self._total = self._total if total is None else total
            self._done = self._done if completed is None else completed
            self._description = description or self._description

    def line(self, now: float) -> str:
        """Return the line for a time of the monotonic clock, and remember it for the speed."""
        with self._lock:
            done, total = self._done, self._total
            if not total or done >= total:
                return self._description
            text = f"{self._description}: {100 * done / total:.0f}%, {human_bytes(done)} of "
            text += human_bytes(total) + (f" ({self._counted})" if self._counted else "")
            self._counted = ""
            before, done_before = self._samples[0] if self._samples else (now, done)
            self._samples.append((now, done))
        if done > done_before and now > before:
            speed = (done - done_before) / (now - before)
            minutes, seconds = divmod(round((total - done) / speed), 60)
            hours, minutes = divmod(minutes, 60)
            text += f", {human_bytes(speed)}/s, {hours}:{minutes:02}:{seconds:02} left"
        return text

    def _print_lines(self) -> None:
        before = ""
        while not self._ended.wait(self._interval_seconds):
            line = self.line(time.monotonic())
            is_new = line != before or line != self._description  # without figures: said once
            if line and is_new:
                print(line, file=sys.stderr, flush=True)
            before = line


def _interval() -> float:
    """Return the interval that the environment sets, or the usual one."""
    try:
        return min(max(0.0, float(os.environ[INTERVAL_VARIABLE])), _MAX_INTERVAL_SECONDS)
    except (KeyError, ValueError):
        return _INTERVAL_SECONDS
