"""Tables and figures as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, or nothing where no row has a figure."""
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    if not rows:
        return ""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None) -> str:
    """Write a figure with two digits or more.

    >>> number(0.123), number(1.26), number(21.4), number(1234.6), number(None)
    ('0.12', '1.3', '21', '1235', '–')
    """
    if value is None:
        return "–"
    return f"{value:.{2 if value < 0.995 else 1 if value < 9.95 else 0}f}"
