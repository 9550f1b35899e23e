"""A table of scores: its cells, its rows, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from outliermerge.errors import shown

AVG = "avg"
GAIN = "gain"


@dataclass(frozen=True)
class Cell:
    """A number of a table; without value and failure, the task was not evaluated.

    Attributes:
        value: 0–100, or points gained.
        stderr: the standard error of `value`; None if it is not known.
        failure: why there is no value.
    """

    value: float | None = None
    stderr: float | None = None
    failure: str | None = None

    def text(self, *, signed: bool = False, bold: bool = False, digits: int = 1) -> str:
        """Return the text of the cell, with so many digits behind the point.

        >>> Cell(44.54, 1.21).text(bold=True), Cell(1.2).text(signed=True), Cell().text()
        ('**44.5** ± 1.2', '+1.2', '–')
        """
        if self.value is None:
            return "–" if self.failure is None else "failed"
        shown = _shown(self.value, digits)
        score = f"{shown:+.{digits}f}" if signed and shown else f"{shown:.{digits}f}"
        score = f"**{score}**" if bold else score
        return score if self.stderr is None else f"{score} ± {self.stderr:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """A model of a table; a line separates rows of different groups."""

    name: str
    group: Literal["parent", "merged", "paper"]
    cells: Mapping[str, Cell]

    def cell(self, column: str) -> Cell:
        """Return the cell of a column, an empty one if there is none."""
        return self.cells.get(column, Cell())


@dataclass(frozen=True)
class Table:
    """Scores of models, in the order in which they are shown.

    Attributes:
        suite: the suite's name.
        titles: the tasks' titles.
        averaged: the titles whose mean is `avg`: the tasks on which all models have a score, and of
            which higher scores are better, if there are such.
        rows: a row for each model.
        baseline: the row that `gain` compares with; None if there is no column `gain`.
        notes: facts that a reader needs to compare the numbers.
        facts: the suite, the settings, the versions and the date.
        losses: the columns in which lower is better, such as bits per byte.
    """

    suite: str
    titles: tuple[str, ...]
    averaged: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: str | None = None
    notes: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    losses: frozenset[str] = frozenset()

    @property
    def columns(self) -> tuple[str, ...]:
        """The titles, `avg`, and `gain` if there is a baseline."""
        return (*self.titles, AVG, *([GAIN] if self.baseline is not None else []))

    def best(self, column: str) -> frozenset[str]:
        """Return the names of the rows with the best value, rounded as shown.

        Fewer than two rows have no best one; the paper's rows do not count.
        """
        cells = ((row.name, row.cell(column).value) for row in self.rows if row.group != "paper")
        digits = self.digits(column)
        shown = {name: _shown(value, digits) for name, value in cells if value is not None}
        if len(shown) < 2:
            return frozenset()
        best = min(shown.values()) if column in self.losses else max(shown.values())
        return frozenset(name for name, value in shown.items() if value == best)

    def digits(self, column: str) -> int:
        """Return how many digits behind the point a column has."""
        return 3 if column in self.losses else 1

    def heading(self, column: str) -> str:
        """Return what stands above a column."""
        return f"{column} ↓" if column in self.losses else column

    def as_markdown(self) -> str:
        """Return the table, then the facts, then the notes."""
        columns = {column: self.best(column) for column in self.columns}
        lines = [["model", *map(self.heading, columns)]]
        for index, row in enumerate(self.rows):
            if index and row.group != self.rows[index - 1].group:
                lines.append([""] * len(lines[0]))
            cells = (
                row.cell(column).text(
                    signed=column == GAIN, bold=row.name in best, digits=self.digits(column)
                )
                for column, best in columns.items()
            )
            lines.append([row.name, *cells])
        lines = [[shown(text).replace("|", "\\|") for text in line] for line in lines]
        widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
        lines.insert(1, [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])])
        table = []
        for first, *rest in lines:
            texts = [first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
            table.append(f"| {' | '.join(texts)} |")
        legend = "Best of each column in bold; ± one standard error"
        if self.baseline is not None:
            legend += f"; gain: avg minus that of {self.baseline}, ± of paired differences"
        if self.losses:
            legend += "; ↓: lower is better"
        notes = ["", *(f"- {shown(note, 1000)}" for note in self.notes)] if self.notes else []
        facts = shown(f"{', '.join(self.facts)}.", 1000)
        return "\n".join([*table, "", facts, shown(f"{legend}.", 1000), *notes]) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Return the table for JSON, its numbers unrounded."""
        best = {column: self.best(column) for column in self.columns}
        return {
            "suite": self.suite,
            "titles": list(self.titles),
            "averaged": list(self.averaged),
            "lower_is_better": [column for column in self.columns if column in self.losses],
            "baseline": self.baseline,
            "rows": [
                {
                    "name": row.name,
                    "group": row.group,
                    "tasks": {t: _task(row.cells[t]) for t in self.titles if t in row.cells},
                    "avg": row.cell(AVG).value,
                    "avg_stderr": row.cell(AVG).stderr,
                    "gain": row.cell(GAIN).value,
                    "gain_stderr": row.cell(GAIN).stderr,
                    "best": [column for column in self.columns if row.name in best[column]],
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
            "facts": list(self.facts),
        }


def _shown(value: float, digits: int) -> float:
    return round(value, digits) + 0.0  # -0.0 is shown as 0.0


def _task(cell: Cell) -> dict[str, Any]:
    if cell.failure is not None:
        return {"failed": cell.failure}
    return {"score": cell.value, "stderr": cell.stderr}
