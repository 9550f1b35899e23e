"""Shows the progress of an evaluation, as bars at a terminal or as lines in a log."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID

from outliermerge.cli.terminal import counting_bars
from outliermerge.errors import readable, shown
from outliermerge.evaluation.evaluate import Listener
from outliermerge.evaluation.scores import Failure, Score


class EvaluationProgress(Listener):
    """A bar for each running model and one for all; without a terminal, a line per result."""

    def __init__(
        self,
        tasks: Sequence[object],
        models: Sequence[object],
        *,
        harness: str = "lmms-eval",
        quiet: bool = False,
    ) -> None:
        self._harness, self._quiet = harness, quiet
        self._console = Console(stderr=True)
        self._bars = counting_bars(self._console, quiet=quiet)
        self._all = self._bars.add_task("models × tasks", total=len(tasks) * len(models))
        self._hashed = self._bars.add_task("MB of models hashed", total=None, visible=False)
        self._rows: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> EvaluationProgress:
        self._bars.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.__exit__(kind, error, trace)

    def hashing(self, num_bytes: int) -> None:
        """Show that large models are being read."""
        self._bars.update(self._hashed, advance=num_bytes / 1e6, visible=True)

    def kept(self, model: str, title: str, score: Score) -> None:
        """Count it."""
        self._line(f"{model}: {title} {_shown(score)}, scored before{_warning(score)}")
        self._bars.advance(self._all)

    def damaged(self, model: str, title: str, reason: str) -> None:
        """Say that a damaged score is computed again."""
        self._line(f"{model}: {title} is scored again: {reason}")

    def loading(self, model: str, titles: Sequence[str]) -> None:
        """Show the model."""
        self._line(f"{model}: starting {self._harness} for {', '.join(titles)}")
        self._show(model, "loading", 0, None)

    def progress(self, model: str, title: str, done: int, total: int) -> None:
        """Move the model's bar."""
        self._show(model, title, done, total)

    def finished(self, model: str, title: str, result: Score | Failure) -> None:
        """Print the result."""
        if isinstance(result, Failure):
            self._line(f"{model}: {title} failed: {result.reason}")
        else:
            self._line(
                f"{model}: {title} {_shown(result)} ({result.num_samples} questions, "
                f"{result.seconds:.0f} s){_warning(result)}"
            )
        self._bars.advance(self._all)

    def _show(self, model: str, step: str, done: int, total: int | None) -> None:
        with self._lock:
            if model not in self._rows:
                self._rows[model] = self._bars.add_task(model)
            text = escape(shown(f"{model}: {step}"))
            self._bars.update(self._rows[model], description=text, completed=done, total=total)

    def _line(self, text: str) -> None:
        text = readable(text)
        if self._quiet:
            return
        if self._console.is_terminal:
            self._bars.console.print(escape(text), soft_wrap=True, highlight=False)
        else:
            sys.stderr.write(text + "\n")  # at once: lines of several models would mix


def _warning(score: Score) -> str:
    return "; warning: every answer is empty" if score.num_samples == score.num_empty else ""


def _shown(score: Score) -> str:
    digits = 3 if score.lower_is_better else 1
    stderr = "" if score.stderr is None else f" ± {score.stderr:.{digits}f}"
    return f"{score.score:.{digits}f}{stderr}"
