"""What is wrong with a YAML text, in plain words: where, and what to do."""

from __future__ import annotations

import re
from typing import Any

import yaml

from outliermerge.errors import quoted

_QUOTES = "Put a text that has it in quotes."
_LINE_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")


def in_words(error: yaml.MarkedYAMLError, text: str) -> tuple[tuple[int, int], str]:
    r"""Return the place of an error of the parser, line and column, and what it means.

    >>> try:
    ...     yaml.safe_load("a: 1\n\tb: 2")
    ... except yaml.MarkedYAMLError as error:
    ...     print(in_words(error, "a: 1\n\tb: 2"))
    ((2, 1), 'found a tab. Indent with spaces.')
    """
    problem, context = error.problem or "", error.context or ""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return (0, 0), problem or context or "it cannot be read"
    place = (mark.line + 1, mark.column + 1)
    began = error.context_mark
    lines = [*_LINE_BREAK.split(text), ""]
    if problem == "mapping values are not allowed here":
        return _second_colon(lines, mark.line, mark.column)
    if problem == "could not find expected ':'" and began is not None:
        return _place_in(lines, began.line), _no_colon(lines[began.line])
    if began is not None and context.startswith("while parsing a flow"):
        return _unclosed(problem, context, place, began)
    if began is not None and context.startswith("while parsing a block") and "block end" in problem:
        return place, _indentation(problem, began.line + 1)
    if problem == "found unexpected end of stream" and began is not None:
        return (began.line + 1, began.column + 1), "the quote that opens here is never closed"
    first = next((n for n, line in enumerate(lines) if _has_content(line)), 0)
    if "'<document start>'" in problem and not re.search(r":(\s|$)", lines[first]):
        return _place_in(lines, first), _no_colon(lines[first])
    for pattern, words in _WORDS:
        if found := re.search(pattern, f"{context} {problem}"):
            return place, words.format(*map(quoted, found.groups()))
    return place, f"{context} {problem}".strip() if problem.startswith("but ") else problem


_WORDS = (
    (r"found character '\\t'", "found a tab. Indent with spaces."),
    (r"found character '(.)' that cannot", "a text cannot begin with {0}. Put it in quotes."),
    (r"scanning an alias", "a text cannot begin with *. Put it in quotes: '*'."),
    (r"scanning an anchor", "a text cannot begin with &. Put it in quotes: '&'."),
    (r"scanning a directive", "a line cannot begin with %. Put the text in quotes."),
    (
        r"undefined alias '(.*)'",
        "nothing is named {0} with & before this. A text that begins with * must be in quotes.",
    ),
    (
        r"unknown escape character '(.)'",
        "in double quotes, a backslash before {0} means nothing. Put the text in single quotes.",
    ),
    (
        r"constructor for the tag '(?:tag:yaml\.org,2002:)?(.*)'|undefined tag handle '(.*)'",
        "tags are not read here. Leave it out, or put a text that begins with ! in quotes.",
    ),
    (r"duplicate anchor '(.*?)'", "the name {0} is given twice with &. Take another one here."),
    (r"scanning a block scalar", f"found a text that begins with | or >. {_QUOTES}"),
    (
        r"found another document",
        "a second document begins here. A file holds one: remove the line ---.",
    ),
    (
        r"'<document start>'",
        "this line begins in another column than the first. Let keys of one level begin in one "
        "column.",
    ),
    (r"sequence entries are not allowed", "a list begins in the line of its key. "
     "Write the dash in the next line."),
    (r"found unhashable key", "found {{ in another {{. Put a text that has it in quotes."),
    (r"expected the node content, but found '?(.*?)'?$", f"found {{0}} in place of a value. "
     f"{_QUOTES}"),
)  # fmt: skip


def _second_colon(lines: list[str], line: int, column: int) -> tuple[tuple[int, int], str]:
    """Tell why a key stands where there can be none."""
    before = lines[line][:column]
    if re.search(r":\s", before):
        said = "a second colon in one line. Put a text that has a colon and a space in quotes."
        return (line + 1, column + 1), said
    above = next((n for n in range(line - 1, -1, -1) if _has_content(lines[n])), None)
    if above is None:
        return (line + 1, column + 1), f"found a colon without a key before it. {_QUOTES}"
    if not re.search(r":(\s|$)", lines[above]):
        return _place_in(lines, above), _no_colon(lines[above])
    return _place_in(lines, line), (
        f"this line is indented further than line {above + 1}, which has a value already. "
        "Let keys of one level begin in one column."
    )


def _no_colon(line: str) -> str:
    if re.match(r"\s*(- *)?[\w-]+:\S", line):
        return "there is no space after the colon. Write `key: value`."
    return "there is no colon after the key. Write `key: value`."


def _unclosed(
    problem: str, context: str, place: tuple[int, int], began: Any
) -> tuple[tuple[int, int], str]:
    opening, closing = ("[", "]") if "sequence" in context else ("{", "}")
    found = re.search(r"(?:got|found) '(.*)'", problem)
    sign = found[1] if found else ""
    if "flow node" in context:
        return place, f"found {quoted(sign)} in place of a value. {_QUOTES}"
    where = f"the {opening} of line {began.line + 1}"
    at_opening = (began.line + 1, began.column + 1)
    if sign in ("<stream end>", ":" if opening == "[" else "-"):
        return at_opening, f"{where} is not closed. Write {closing} where it ends."
    if place[0] > began.line + 1:
        return at_opening, f"{where} is not closed, or line {place[0]} lacks a comma before it"
    return place, f"after {where}, a comma or {closing} is missing before this"


def _indentation(problem: str, first: int) -> str:
    if "<scalar>" in problem:
        return "something stands after a quoted text. Put all of it inside the quotes."
    if "'-'" in problem:
        return (
            f"found a dash among the keys of the mapping that begins in line {first}. Give the "
            "list a key, or indent it under one."
        )
    return (
        f"this line begins in another column than the entries that begin in line {first}. Let "
        "entries of one level begin in one column."
    )


def _has_content(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _place_in(lines: list[str], line: int) -> tuple[int, int]:
    return line + 1, len(lines[line]) - len(lines[line].lstrip()) + 1
