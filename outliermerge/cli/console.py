"""rich's console and tables, safe for texts that others wrote."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from outliermerge.errors import printable, shown

_MAX_CELL = 600  # characters of one cell of a table


class ReadableConsole(Console):
    """Prints foreign names without characters that control the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(_readable, objects), **options)

    def on_broken_pipe(self) -> None:
        """Let the caller handle a broken pipe; rich would end the program with exit code 1."""
        raise BrokenPipeError


class ReadableTable(Table):
    """A table whose cells may contain foreign names."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_readable_cell, cells), **options)


def _readable(value: Any) -> Any:
    """Return a text without characters that control the terminal."""
    if isinstance(value, Text) and not _is_readable(value.plain):
        return Text(printable(value.plain), style=value.style)
    return printable(value) if isinstance(value, str) else value


def _readable_cell(value: Any) -> Any:
    if isinstance(value, Text):
        short = shown(value.plain, _MAX_CELL)
        return value if short == value.plain else Text(short, style=value.style)
    return shown(value, _MAX_CELL) if isinstance(value, str) else value


def _is_readable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))
