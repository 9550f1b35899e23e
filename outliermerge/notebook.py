"""Progress in a notebook: one line that changes, at most twice a second."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from outliermerge.display import html_words, human_bytes

_INTERVAL_SECONDS = 0.5
_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_notebook() -> bool:
    """Tell whether this process computes the cells of a notebook; nothing is imported for it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


class NotebookBar:
    """Shows a bar while something is done, without widgets.

    Args:
        what: is being done.
        total_bytes: the bytes of all passes.
    """

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what, self._total, self._done = what, total_bytes, 0
        self._started = self._last = time.monotonic()
        self._lock = threading.Lock()
        self._handle: Any = None

    def __enter__(self) -> NotebookBar:
        display: Any = sys.modules["IPython"].display
        self._handle = display.display(self._shown(), display_id=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._what += " stopped" if kind else " is done"
        self._update()

    def add_total(self, num_bytes: int) -> None:
        """Count bytes that are still to be worked on."""
        with self._lock:
            self._total += num_bytes
        self._update()

    def advance(self, num_bytes: int) -> None:
        """Count bytes; called by any thread."""
        now = time.monotonic()
        with self._lock:
            self._done += num_bytes
            if now - self._last < _INTERVAL_SECONDS:
                return
            self._last = now
        self._update()

    def _update(self) -> None:
        if self._handle is not None:
            self._handle.update(self._shown())

    def _shown(self) -> Any:
        done, seconds = min(self._done, self._total), time.monotonic() - self._started
        words = f"{self._what}: {human_bytes(done)} of {human_bytes(self._total)}, {seconds:.0f} s"
        bar = f'<progress value="{done}" max="{max(1, self._total)}"></progress>'
        return _Html(bar + html_words(words), words)


def with_bar(what: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function with `on_total` and `on_progress` show a bar in a notebook.

    A caller who gives one of the two shows progress in another way, and gets no bar.

    Args:
        what: the function does.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*positional: _P.args, **keywords: _P.kwargs) -> _R:
            if not in_notebook() or keywords.keys() & {"on_total", "on_progress"}:
                return function(*positional, **keywords)
            with NotebookBar(what, 0) as bar:
                keywords["on_total"], keywords["on_progress"] = bar.add_total, bar.advance
                return function(*positional, **keywords)

        return call

    return decorate


class _Html:
    """HTML with a text for what shows none."""

    def __init__(self, html: str, text: str) -> None:
        self._html, self._text = html, text

    def _repr_html_(self) -> str:
        return self._html

    def __repr__(self) -> str:
        return self._text
