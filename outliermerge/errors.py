"""What a user is told when something of theirs is wrong."""

from __future__ import annotations

import difflib
import errno
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# What a person reads of one name, and of one message; callers of the library get twice that.
# Names and values come from files that others wrote, where one can have megabytes.
MAX_NAME, MAX_MESSAGE = 120, 1900
WARNING = "warning: "  # so begins a note on what was probably not meant
MAX_NOTE = 6000  # of a plan: it lists what differs between models
_MAX_ROW = 900  # of a listing
_MORE = re.compile(r"  … and (\d{1,9}) more")
# Of more choices, or for a longer name, nobody looks for the nearest.
_MAX_CHOICES, _MAX_WORD = 2000, 200
_TYPO = 0.8  # names so alike are one name with a slip of the pen


# What stands around the arguments that a message names: no file's name can have it.
_MARK = "\0"
_ARGUMENT = re.compile(r"\0([a-z]\w*)(?:=([^\0]*))?\0")


class OutlierMergeError(ValueError):
    """A mistake in a model, a folder or an argument, told in one message (exit code 1).

    Whatever the message quotes, it is cut to what a person reads and controls no terminal.

    Attributes:
        marked: the message with its arguments marked, for the message of another error.
    """

    def __init__(self, message: object = "") -> None:
        self.marked = _cut(str(message), 40 * MAX_MESSAGE)
        super().__init__(readable(_ARGUMENT.sub(_in_python, self.marked), 2 * MAX_MESSAGE))

    def text(self, flag: Callable[[str, str | None], str]) -> str:
        """Return the message with its arguments named by a function of name and value."""
        named = _ARGUMENT.sub(lambda found: flag(found[1], found[2]), self.marked)
        return readable(named, 2 * MAX_MESSAGE)


class SpecError(OutlierMergeError):
    """A mistake in a spec (exit code 2).

    Attributes:
        place: its line and column, where they are known.
        passed_over: the keys that lead to what mergekit goes on without, in silence; else None.
        meant: the parameter that was meant by a key which is passed over.
        all: the mistakes that it tells together; empty if it tells one.
    """

    all: tuple[SpecError, ...] = ()
    place: tuple[int, int] = (0, 0)
    passed_over: tuple[str | int, ...] | None = None
    meant: str | None = None


class ArgumentError(OutlierMergeError):
    """A wrong argument of the library, or flag of the command line (exit code 2)."""


def argument(name: str, value: object = None) -> str:
    """Return an argument of the library, for an error's message, marked.

    An error shows it as Python writes it; the command line shows the flag in its place.

    >>> print(OutlierMergeError(f"give {argument('memory')} or {argument('fresh', True)}"))
    give memory or fresh=True
    """
    text = "" if value is None else f"={str(value).replace(_MARK, '')}"
    return f"{_MARK}{name}{text}{_MARK}"


def _in_python(found: re.Match[str]) -> str:
    """Return a marked argument as Python writes it."""
    value = found[2]
    if value is None:
        return found[1]
    is_text = value not in ("True", "False") and not value.isdigit()
    return f"{found[1]}={repr(value) if is_text else value}"


def direct(path: Path) -> Path:
    """Return a path without `a/..` where `a` is a folder; behind a link that leads elsewhere."""
    found = Path()
    for part in path.parts:
        is_detour = part == ".." and found.name not in ("", "..")
        # These never fail, whatever a name is.
        is_detour = is_detour and os.path.isdir(found) and not os.path.islink(found)  # noqa: PTH112, PTH114
        found = found.parent if is_detour else found / part
    return found


def direct_reference(reference: str) -> str:
    """Return a model's name with direct paths, as messages show it and outputs store it."""
    is_one = "+" not in reference or os.path.exists(reference)  # noqa: PTH110
    parts = [reference] if is_one else reference.split("+")
    return "+".join(
        str(direct(Path(part))) if "/../" in part and "://" not in part else part for part in parts
    )


def as_path(text: str | Path) -> Path:
    """Return a path with `~` resolved, and as direct as it can be.

    Raises:
        OutlierMergeError: no file can have that name.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
        if "\0" in str(text):
            raise ValueError("it has a null character")
        return direct(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # of the disk: who opens it says what is wrong
            return path
        reason = error.strerror
    except (RuntimeError, ValueError) as error:
        reason = str(error)
    raise OutlierMergeError(f"{quoted(str(text))} cannot be a path: {reason}")


def printable(text: str) -> str:
    r"""Return a text that a terminal shows as it is: what would control it, escaped.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    lines = text.split("\n")
    return "\n".join(line if line.isprintable() else _escaped(line) for line in lines)


def readable(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return a message as a person can read it: printable, and short.

    Of a long one the rows of listings are left out first, then what stands in the middle.
    """
    text = printable(_cut(text, 20 * limit))
    for most in (10, 5, 3, 1):
        if len(text) > limit:
            text = _folded(text, most)
    return _cut(text, limit)


def noted(note: str) -> str:
    """Return a note with what it is before it."""
    return note if note.startswith(WARNING) else f"note: {note}"


def shown(value: object, limit: int = MAX_NAME) -> str:
    r"""Return a name from outside on one line: printable, and cut in the middle if it is long.

    >>> shown("a\nb\x1b[2J")
    'a\\nb\\x1b[2J'
    """
    return _cut(_escaped(_cut(str(value), limit)), limit)


def quoted(value: object, limit: int = MAX_NAME) -> str:
    r"""Return a value from outside in the way of Python's repr, cut to what a person reads.

    >>> quoted("a\nb"), quoted([1] * 1000)
    ("'a\\nb'", '[1, 1, 1, 1, 1, 1, …]')
    """
    if isinstance(value, str):
        return _cut(repr(_cut(value, limit)), limit + 2)
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    return shown(short.repr(value).replace("...", "…"), limit)


def _cut(text: str, limit: int) -> str:
    """Return a text of at most so many characters, where it is longer with its start and end."""
    if len(text) <= limit:
        return text
    start = (limit - 40) * 2 // 3
    end = limit - 40 - start
    return f"{text[:start]}… ({len(text) - start - end:,} characters left out) …{text[-end:]}"


def _folded(text: str, most: int) -> str:
    """Return a message with so many rows of each of its listings, the rest counted."""
    lines: list[str] = []
    num_rows = num_left_out = 0
    for line in [*text.split("\n"), ""]:
        if not line.startswith("  "):
            if num_left_out:
                lines.append(f"  … and {num_left_out} more")
            num_rows = num_left_out = 0
            lines.append(line)
        elif counted := _MORE.fullmatch(line):
            num_left_out += int(counted[1])
        elif num_rows < most:
            num_rows += 1
            lines.append(line)
        else:
            num_left_out += 1
    return "\n".join(lines[:-1])


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(
    name: str, valid: Iterable[str], *, cutoff: float = 0.6, by_word: bool = False
) -> str | None:
    """Return the valid name that is most like another one; None if none is like it.

    Args:
        cutoff: how alike they must be, 0 to 1.
        by_word: prefer names that have it as one of their words to those that are only alike.

    >>> nearest("Base-Model", ["base_model", "models"])
    'base_model'
    >>> nearest("modles", ["models", "modules"])
    'models'
    >>> nearest("stats", ["WeightStats", "weight_stats"], by_word=True)
    'weight_stats'
    """
    choices = {_plain(choice): choice for choice in valid}
    if len(choices) > _MAX_CHOICES or len(str(name)) > _MAX_WORD:
        return None
    wanted = _plain(str(name))
    close = difflib.get_close_matches(wanted, choices, n=3, cutoff=cutoff)
    close.sort(key=lambda choice: sorted(choice) != sorted(wanted))  # letters in another order
    if by_word and not difflib.get_close_matches(wanted, close, cutoff=max(cutoff, _TYPO)):
        having = [choice for choice in choices if wanted in choice.split("_")]
        close = difflib.get_close_matches(wanted, having, n=1, cutoff=0) or close
    return choices[close[0]] if close else None


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return a sentence that names the nearest valid name, or all valid names.

    >>> suggest("wieght", ["weight", "density"])
    "Did you mean 'weight'?"
    >>> suggest("zzz", ["weight", "density"])
    'Valid: density, weight.'
    """
    choices = sorted(valid)
    if close := nearest(name, choices, by_word=True):
        return f"Did you mean {quoted(close)}?"
    if not choices:
        return "None is valid here."
    more = ", …" if len(choices) > 40 else ""
    return f"Valid: {', '.join(map(shown, choices[:40]))}{more}."


def listing_once(messages: Iterable[str]) -> Iterator[str]:
    """Yield messages; one that lists the same valid names as an earlier one does without.

    >>> list(listing_once(["a: unknown. Valid: x, y.", "b: unknown. Valid: x, y."]))
    ['a: unknown. Valid: x, y.', 'b: unknown.']
    """
    listed = set[str]()
    for message in messages:
        said, valid, names = message.rpartition(" Valid: ")
        yield said if valid and names in listed else message
        listed.add(names)


def listing(items: Iterable[str], *, limit: int = 20) -> str:
    """Return items one per line, indented and readable, the rest counted.

    >>> print(listing(["a", "b", "c"], limit=2))
      a
      b
      … and 1 more
    """
    rows = list(items)
    lines = [f"  {shown(row, _MAX_ROW)}" for row in rows[:limit]]
    if len(rows) > limit:
        lines.append(f"  … and {len(rows) - limit} more")
    return "\n".join(lines)
