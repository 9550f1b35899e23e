"""Standard streams that may be closed, full, without a reader, or limited to ASCII.

A merge must go on, with the same exit code, even if nobody reads its output.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any, TextIO

from outliermerge.errors import OutlierMergeError


class _Output(io.FileIO):
    """Standard output or standard error; after a failed write, later writes are dropped.

    Args:
        must_arrive: a failed write is an error, unless the reader, such as `head`, has ended.
    """

    def __init__(self, number: int, *, must_arrive: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._must_arrive, self._is_lost = must_arrive, False

    def write(self, data: Any) -> int:
        try:
            while not self._is_lost:
                if (num_bytes := super().write(data)) is not None:
                    return num_bytes
                select.select([], [self], [])  # a non-blocking stream that is full now
        except OSError as error:
            self._is_lost = True
            if self._must_arrive and not isinstance(error, BrokenPipeError):
                raise OutlierMergeError(
                    f"standard output cannot be written: {error.strerror}. Let it go elsewhere."
                ) from error
        return memoryview(data).nbytes


def guard_streams() -> None:
    """Make prints to broken standard streams either do nothing or fail with a message."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # else an output's file would get it
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(sys.stdout, must_arrive=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(sys.stderr, must_arrive=False)


def _guarded(stream: TextIO | None, *, must_arrive: bool) -> TextIO:
    if stream is None:  # the stream was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), must_arrive=must_arrive)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=not must_arrive or stream.isatty(),
    )
