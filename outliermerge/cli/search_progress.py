"""Shows the progress of a search: a bar at a terminal, or a line for each trial in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.markup import escape

from outliermerge.cli.terminal import counting_bars
from outliermerge.errors import readable
from outliermerge.search.phases import Listener
from outliermerge.search.questions import Sample
from outliermerge.search.result import settings_text
from outliermerge.search.trials import Trial


class SearchProgress(Listener):
    """A bar of trials with the best so far; without a terminal, a line for each trial.

    Args:
        on_begun: called when the questions are chosen.
    """

    def __init__(self, *, quiet: bool = False, on_begun: Callable[[], None] = lambda: None) -> None:
        self._on_begun = on_begun
        self._quiet, self._console = quiet, Console(stderr=True)
        self._bar = counting_bars(self._console, quiet=quiet)
        self._task = self._bar.add_task("search", total=None)
        self._best: tuple[float, int] | None = None

    def __enter__(self) -> SearchProgress:
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def asking(self, name: str) -> None:
        """Say who is asked."""
        self._line(f"asking {name} all questions")

    def begun(self, questions: Sample, *, where: str) -> None:
        """Say how many questions a trial is asked."""
        searched = sum(map(len, questions.searched.values()))
        held_out = sum(map(len, questions.held_out.values()))
        self._line(
            f"each trial is merged {where} and asked {questions.num_asked} of {searched} "
            f"questions; {held_out} are held out"
        )
        self._on_begun()

    def trial(self, trial: Trial, most: int) -> None:
        """Show a trial's score, and the best so far."""
        name = f"trial {trial.number}/{most}"
        if trial.state == "failed":
            said = f"failed: {trial.reason}"
        elif trial.state == "stopped":
            said = f"stopped at {trial.steps[-1]:.4g}"
        else:
            value = sum(trial.values) / len(trial.values)
            self._best = max(self._best or (value, trial.number), (value, trial.number))
            said = f"{value:.4g}"
        best = f"; best {self._best[0]:.4g} (trial {self._best[1]})" if self._best else ""
        self._line(f"{name}: {said}{best}; {settings_text(trial.point)}")
        text = f"search{best.replace(';', ',')}"
        self._bar.update(self._task, total=most, completed=trial.number, description=text)

    def confirming(self, name: str) -> None:
        """Say who is asked the held-out questions."""
        self._line(f"asking {name} the held-out questions")

    def _line(self, text: str) -> None:
        text = readable(text)
        if self._quiet:
            return
        if self._console.is_terminal:
            self._bar.console.print(escape(text), soft_wrap=True, highlight=False)
        else:
            sys.stderr.write(text + "\n")
