"""What a person sees of an object: sizes, short reprs, tables of a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from outliermerge.errors import shown

_MAX_LINE, _MAX_ROWS = 160, 200


def human_bytes(num_bytes: float) -> str:
    """Return a size in decimal units, as the hub and --shard-size use them.

    >>> human_bytes(1_020_000_000)
    '1.02 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def short_repr(value: object, *lines: str) -> str:
    """Return a repr of a few lines for an object with too many parts to print.

    >>> print(short_repr([], "no elements", "", "and a second line"))
    <list: no elements
     and a second line>
    """
    said = [shown(line, _MAX_LINE) for line in lines if line]
    return f"<{type(value).__name__}: " + "\n ".join(said) + ">"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """Return a table for a notebook; all texts are escaped. Long tables are cut."""
    rows = list(rows)
    caption = f"<caption>{_escaped(title)}</caption>" if title else ""
    head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>"
        for row in rows[:_MAX_ROWS]
    )
    more = f"<p>… and {len(rows) - _MAX_ROWS} more</p>" if len(rows) > _MAX_ROWS else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def html_words(words: str) -> str:
    """Return a sentence for a notebook, escaped."""
    return f"<p>{html.escape(words)}</p>"


def _escaped(value: object) -> str:
    return html.escape(shown(value, 600))
