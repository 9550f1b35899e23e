"""What a user is told when something of theirs is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class OutlierMergeError(ValueError):
    """A mistake in a model, a folder or an option, told in one message (exit code 1)."""


class SpecError(OutlierMergeError):
    """A mistake in a spec or on the command line (exit code 2)."""


def as_path(text: str | Path) -> Path:
    """Return a path with `~` resolved.

    Raises:
        OutlierMergeError: no file can have that name.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
        if "\0" in str(text):
            raise ValueError("it has a null character")
        return path
    except OSError as error:
        reason = error.strerror
    except (RuntimeError, ValueError) as error:
        reason = str(error)
    shown = str(text) if len(str(text)) < 80 else f"{str(text)[:80]}…"
    raise OutlierMergeError(f"{shown!r} cannot be a path: {reason}")


def printable(text: str) -> str:
    r"""Return a text that a terminal shows as it is: what would control it, escaped.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return a sentence that names the nearest valid name, or all valid names.

    >>> suggest("wieght", ["weight", "density"])
    "Did you mean 'weight'?"
    >>> suggest("zzz", ["weight", "density"])
    'Valid: density, weight.'
    """
    choices = sorted(valid)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Valid: {', '.join(choices)}." if choices else "None is valid here."


def listing(items: Iterable[str], *, limit: int = 20) -> str:
    """Return items one per line, indented, the rest counted.

    >>> print(listing(["a", "b", "c"], limit=2))
      a
      b
      … and 1 more
    """
    rows = list(items)
    shown = [f"  {row}" for row in rows[:limit]]
    if len(rows) > limit:
        shown.append(f"  … and {len(rows) - limit} more")
    return "\n".join(shown)
