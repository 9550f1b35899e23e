"""Tables in which a name is never broken: one that does not fit gets a line of its own."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from outliermerge.cli.terminal import text
from outliermerge.errors import shown

if TYPE_CHECKING:
    from rich.console import Console

_GAP, _LEAST_NAME, _MAX_CELL = 2, 12, 600
Justify = Literal["left", "right"]


class NamedTable:
    """A table whose first column has names, such as those of tensors or models.

    Where the table is wider than the terminal, long names stand on lines of their own, each before
    its row. So every name can be copied whole.

    Args:
        columns: the titles, the names' first.
        justify: of all columns but the first.
    """

    def __init__(self, *columns: str, justify: Justify = "right") -> None:
        self._columns, self._justify = columns, [justify] * len(columns)
        self._justify[0] = "left"
        self._rows: list[tuple[str, ...]] = []

    def left(self, *titles: str) -> NamedTable:
        """Justify columns to the left."""
        for title in titles:
            self._justify[self._columns.index(title)] = "left"
        return self

    def add_row(self, *cells: str) -> None:
        """Add a row; cells may hold foreign names."""
        self._rows.append(tuple(shown(cell, _MAX_CELL) for cell in cells))

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def print(self, console: Console) -> None:
        """Print the table."""
        from rich.cells import cell_len

        rows = [self._columns, *self._rows]
        widths = [max(cell_len(row[at]) for row in rows) for at in range(len(self._columns))]
        room = console.width - sum(widths[1:]) - _GAP * (len(widths) - 1)
        if widths[0] > room:
            least = max(_LEAST_NAME, cell_len(self._columns[0]))
            fitting = [n for row in rows if (n := cell_len(row[0])) <= max(room, least)]
            widths[0] = max(fitting)
        for number, (name, *cells) in enumerate(rows):
            style = "" if number else "bold"
            if cell_len(name) > widths[0]:
                console.print(text(name, style), soft_wrap=True)
                name = ""
            padded = [
                " " * (width - cell_len(cell)) + cell if justify == "right" else
                cell + " " * (width - cell_len(cell))
                for cell, width, justify in zip((name, *cells), widths, self._justify, strict=True)
            ]  # fmt: skip
            console.print(text((" " * _GAP).join(padded).rstrip(), style), soft_wrap=True)


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print facts, each a label and words; long ones go on below, and no word is broken."""
    labels = max((len(label) for label, _ in facts), default=0) + _GAP
    for label, words in facts:
        lines = textwrap.wrap(
            shown(words, _MAX_CELL * 4),
            max(20, console.width - labels),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
        for number, line in enumerate(lines):
            start = label if number == 0 else ""
            console.print(text(f"{start:<{labels}}{line}"), soft_wrap=True)


def print_words(console: Console, words: str, style: str = "") -> None:
    """Print sentences and listings; lines end between words only, so that names stay whole."""
    for line in words.split("\n"):
        wrapped = textwrap.wrap(
            line,
            console.width,
            break_long_words=False,
            break_on_hyphens=False,
            subsequent_indent=" " * (len(line) - len(line.lstrip())),
        )
        for part in wrapped or [""]:
            console.print(text(part, style), soft_wrap=True)


def short_references(references: Sequence[str]) -> dict[str, str]:
    """Return for each model the last parts of its name, as many as tell all of them apart.

    >>> short_references(["models/a", "models/b"]), short_references(["x/a", "y/a"])
    ({'models/a': 'a', 'models/b': 'b'}, {'x/a': 'x/a', 'y/a': 'y/a'})
    """
    distinct = list(dict.fromkeys(references))
    parts = {reference: reference.rstrip("/").split("/") for reference in distinct}
    most = max((len(each) for each in parts.values()), default=1)
    for number in range(1, most + 1):
        short = {name: "/".join(each[-number:]) for name, each in parts.items()}
        if len(set(short.values())) == len(distinct):
            return short
    return {name: name for name in distinct}


def letters_of(num: int) -> list[str]:
    """Return short names for models: letters, or numbers where there are not enough."""
    return [chr(ord("A") + number) if num <= 26 else str(number + 1) for number in range(num)]
