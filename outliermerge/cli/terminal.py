"""Tables and progress for people at a terminal; rich is imported when it is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING, Any

from outliermerge.cli.lines import ProgressLines, human_bytes
from outliermerge.errors import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn
    from rich.table import Table
    from rich.text import Text

    from outliermerge.output.load_check import Verdict
    from outliermerge.output.run import RunResult
    from outliermerge.planning.plan import Plan


BYTES_OF_ALL_PASSES = "bytes of all passes"
WAITING = "checking that transformers loads it"
_SHORT_SECONDS = 1.0  # a wait that needs no words


def progress_bar(
    description: str, *, quiet: bool = False, counted: str = ""
) -> Progress | ProgressLines:
    """Return a bar with bytes per second and the time left; without a terminal it prints lines.

    Args:
        counted: what its total is, in words; shown once.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal and not quiet:
        return ProgressLines(counted=counted)
    return progress.Progress(*_columns(counted), console=console, disable=quiet)


def counting_bars(console: Console, *, quiet: bool) -> Progress:
    """Return bars with the number done and the time left, shown at a terminal only."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )


@contextmanager
def counting(first: str, then: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show one such bar on the standard error; yield what sets the number done and of all.

    Args:
        first: what it says before the numbers are known.
        then: what it says after.
    """
    from rich.console import Console

    with counting_bars(Console(stderr=True), quiet=quiet) as bars:
        task = bars.add_task(first, total=None)
        yield lambda done, total: bars.update(task, description=then, completed=done, total=total)


def _columns(counted: str) -> list[ProgressColumn]:
    from rich import progress

    return [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        *([progress.TextColumn(counted)] if counted else []),
        progress.TransferSpeedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    ]


class MergeBar:
    """The progress of merges: bytes, then what is waited for, in place of a bar at 100%.

    Args:
        total_bytes: of all passes.
        num_outputs: that are made together.
        on_ray: say until the first bytes that Ray starts, which can take a minute.
        is_converted: llama.cpp's converter is waited for at the end.
    """

    def __init__(
        self,
        total_bytes: int,
        num_outputs: int,
        *,
        quiet: bool,
        on_ray: bool = False,
        is_converted: bool = False,
    ) -> None:
        self._total, self._num, self._is_starting = total_bytes, num_outputs, on_ray
        self._is_converted = is_converted
        self._bar: Any = progress_bar("merging", quiet=quiet, counted=BYTES_OF_ALL_PASSES)
        doing = "waiting for Ray" if on_ray else "merging"
        self._task: Any = self._bar.add_task(doing, total=total_bytes)

    def __enter__(self) -> MergeBar:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def advance(self, num_bytes: int) -> None:
        """Count bytes; called by any thread."""
        if self._is_starting and num_bytes:
            self._is_starting = False
            self._bar.update(self._task, description="merging")
        self._bar.advance(self._task, num_bytes)

    def wait(self) -> None:
        """Say what is waited for; one process checks all outputs and answers once."""
        from rich import progress

        words = f"merged; {WAITING}"
        if self._num > 1:
            words = f"all {self._num} outputs merged; checking that transformers loads each of them"
        if self._is_converted:
            words = "merged; waiting for llama.cpp's converter"
        if isinstance(self._bar, progress.Progress):
            words_alone = progress.TextColumn("{task.description}")
            self._bar.columns = (progress.SpinnerColumn(), words_alone)
        self._bar.update(self._task, description=words, completed=self._total)

    def done(self) -> None:
        """Show the whole bar again."""
        from rich import progress

        if isinstance(self._bar, progress.Progress):
            self._bar.columns = tuple(_columns(BYTES_OF_ALL_PASSES))
            self._bar.update(self._task, description="merged", completed=self._total)


@contextmanager
def reading_bar(description: str = "reading", *, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Show a bar while weights are read; yield the callbacks that update it.

    Yields:
        The arguments `on_total` and `on_progress` of functions that analyse weights.
    """
    with progress_bar(description, quiet=quiet) as bar:
        task: Any = bar.add_task(description, total=None)
        total = 0

        def add(num_bytes: int) -> None:
            nonlocal total
            total += num_bytes
            bar.update(task, total=total)

        yield {"on_total": add, "on_progress": lambda num_bytes: bar.advance(task, num_bytes)}


@contextmanager
def status(words: str, *, quiet: bool = False) -> Iterator[None]:
    """Show what the program is waiting for; without a terminal in a line, if it takes a while."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal and not quiet:
        with console.status(words):
            yield
        return
    line = Timer(_SHORT_SECONDS, lambda: print(words, file=sys.stderr, flush=True))
    line.daemon = True
    if not quiet:
        line.start()
    try:
        yield
    finally:
        line.cancel()


def check_loading(planned: Plan, *, quiet: bool) -> Verdict:
    """Return the result of transformers' check of a plan's output.

    Raises:
        OutlierMergeError: the output would not load.
    """
    from outliermerge.output.load_check import LoadCheck

    with LoadCheck.of_plans([planned]) as check, status(WAITING, quiet=quiet):
        (verdict,) = check.verdicts()
    verdict.raise_if_bad()
    return verdict


def open_console(*, soft_wrap: bool = False) -> Console:
    """Return a console for tables; with soft_wrap, long lines are not broken."""
    from outliermerge.cli.console import ReadableConsole

    return ReadableConsole(highlight=False, soft_wrap=soft_wrap)


def plain_table(*columns: str, title: str | None = None) -> Table:
    """Return a table without lines."""
    from outliermerge.cli.console import ReadableTable

    table = ReadableTable(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for column in columns:
        table.add_column(column, justify="left", overflow="fold")
    return table


def text(words: str, style: str = "") -> Text:
    """Return text in a style; brackets in it are not read as markup."""
    from rich.text import Text

    return Text(words, style)


def value_text(value: Any) -> str:
    """Return the value of a parameter as it is written in a spec."""
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(value_text(item) for item in value) + ")"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_result(result: RunResult) -> None:
    """Print what a merge did, in a few lines."""
    worked = result.input_bytes + result.written_bytes
    open_console(soft_wrap=True).print(
        f"wrote {result.output}: {work_in_words(result, worked)}", markup=False
    )
    print_loading(result)
    print_remarks(result)


def work_in_words(result: RunResult, worked_bytes: int) -> str:
    """Return the size of an output, and how fast so many bytes were worked on."""
    speed = human_bytes(worked_bytes / result.work_seconds) if result.work_seconds else "–"
    from_disk = "" if not result.disk_bytes else f", {human_bytes(result.disk_bytes)} from disk"
    return (
        f"{len(result.manifest['tensors'])} tensors, "
        f"{result.manifest['num_parameters']:,} parameters, "
        f"{result.work_seconds + result.sync_seconds:.1f} s, {speed}/s{from_disk}"
    )


def print_loading(result: RunResult) -> None:
    """Print what loads an output, where that was asked."""
    console = open_console(soft_wrap=True)
    if verdict := result.load_check:
        how = "checked before" if verdict.was_known else "checked meanwhile"
        for by in verdict.by:
            console.print(f"loads in {by}: {how}, {result.seconds:.1f} s in all", markup=False)


def print_remarks(result: RunResult) -> None:
    """Print what is unusual about an output."""
    console = open_console(soft_wrap=True)
    if result.num_resumed:
        console.print(f"{result.num_resumed} tensors were there from an earlier run")
    if result.left_behind:
        console.print(
            f"files that were put into the old output meanwhile are in {result.left_behind}",
            markup=False,
        )
    for name, places in result.non_finite.items():
        where = ", ".join(map(shown, places))
        console.print(f"infinite or NaN values in {shown(name)}: {where}", markup=False)
