"""Runs foreign regular expressions on foreign names, in bounded time.

peft matches layers with Python's `re`, so `re` has to be used here as well. But it backtracks:
`(a+)+$` takes years on forty letters. For most expressions an upper bound shows beforehand that
they are fast. The others run in a separate process with a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from outliermerge.storage.machine import limited_code

if sys.version_info >= (3, 11):
    from re import _constants, _parser  # type: ignore[attr-defined]
else:
    import sre_constants as _constants
    import sre_parse as _parser

MAX_PATTERN = 5000  # characters; peft's own for a model of many parts have a few hundred
MAX_SECONDS = 4  # processor time for all expressions of one model
_MAX_STEPS = 300_000_000  # about two seconds
_MAX_ASKED = 200_000
_MAX_BYTES = 1 << 30
_WORKER = f"""
import json, re, sys
{limited_code(MAX_SECONDS, _MAX_BYTES)}
for line in sys.stdin:
    pattern, name, replacement = json.loads(line)
    with limited():
        pattern = re.compile(pattern)
        if replacement is None:
            answer = pattern.search(name) is not None
        else:
            answer = pattern.sub(replacement, name)
    print(json.dumps(answer), flush=True)
"""


class TooSlowError(ValueError):
    """A regular expression takes too long, or too much memory, on a name."""


class PatternError(ValueError):
    """A text is not a regular expression that can be used."""


@dataclass
class Budget:
    """The time that all expressions of one model may take together."""

    steps: float = _MAX_STEPS
    asked: int = _MAX_ASKED
    process: subprocess.Popen[str] | None = None

    def ask(self, pattern: str, name: str, replacement: str | None) -> Any:
        """Return the result of Python's `re`, from a process with a time limit."""
        self.asked -= 1
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            weakref.finalize(self, _end, self.process)
        assert self.process.stdin is not None and self.process.stdout is not None
        answer = ""
        if self.asked >= 0:
            try:
                self.process.stdin.write(json.dumps([pattern, name, replacement]) + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                pass
        if not answer.endswith("\n"):
            raise TooSlowError
        return json.loads(answer)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                pass
    process.wait()


class Pattern:
    """A foreign regular expression.

    Raises:
        PatternError: the text is not a valid regular expression.
    """

    def __init__(self, text: str, budget: Budget) -> None:
        if len(text) > MAX_PATTERN:
            raise PatternError(f"it has {len(text):,} characters, the limit is {MAX_PATTERN:,}")
        try:
            self._compiled = re.compile(text)
            self._cost = _cost(_parser.parse(text))
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise PatternError(str(error) or type(error).__name__) from error
        self.text, self._budget = text, budget
        self._known: dict[tuple[str, str | None], Any] = {}

    def search(self, name: str) -> bool:
        """Tell whether the expression matches somewhere in a name.

        Raises:
            TooSlowError: that takes too long.
        """
        found: bool = self._asked(name, None)
        return found

    def sub(self, replacement: str, name: str) -> str:
        """Return a name with all matches replaced.

        Raises:
            TooSlowError: that takes too long.
        """
        changed: str = self._asked(name, replacement)
        return changed

    def _asked(self, name: str, replacement: str | None) -> Any:
        key = (name, replacement)
        if key not in self._known:
            self._known[key] = self._answer(name, replacement)
        return self._known[key]

    def _answer(self, name: str, replacement: str | None) -> Any:
        if self._cost is not None:
            factor, degree = self._cost
            steps = float(factor) * (len(name) + 1) ** degree
            if steps <= self._budget.steps:
                self._budget.steps -= steps
                if replacement is None:
                    return self._compiled.search(name) is not None
                return self._compiled.sub(replacement, name)
        return self._budget.ask(self.text, name, replacement)


def _cost(parsed: Any) -> tuple[int, int] | None:
    """Return an upper bound of a search's steps as (factor, power of the name's length).

    None if no useful bound exists, as for nested repeats.
    """
    ways = _ways(parsed)
    items = list(parsed)
    at_start = bool(items) and items[0][0] is _constants.AT and items[0][1] in _STARTS
    at_start = at_start and not parsed.state.flags & re.MULTILINE
    if ways is None:
        return None
    return ways[0] * max(1, _length(parsed)), min(ways[1] + (not at_start), 100)


_STARTS = (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING)
_REPEATS = {
    getattr(_constants, name)
    for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
    if hasattr(_constants, name)
}
_MAX_WAYS = 10_000


def _ways(items: Iterable[Any]) -> tuple[int, int] | None:
    """Return in how many ways an expression can match: (factor, power of the name's length)."""
    factor, degree = 1, 0
    for kind, value in items:
        found: tuple[int, int] | None = (1, 0)
        if kind in _REPEATS:
            found = _ways_of_repeat(*value)
        elif kind is _constants.BRANCH:
            each = [_ways(branch) for branch in value[1]]
            some = [ways for ways in each if ways is not None]
            whole = len(some) == len(each)
            found = (sum(w[0] for w in some), max(w[1] for w in some)) if whole else None
        elif kind is _constants.SUBPATTERN:
            found = _ways(value[-1])
        elif kind in (_constants.ASSERT, _constants.ASSERT_NOT):
            found = _ways(value[1])
        elif kind not in _PLAIN:  # back references, conditions, atomic groups
            found = None
        if found is None or factor * found[0] > _MAX_WAYS:
            return None
        factor, degree = factor * found[0], degree + found[1]
    return factor, degree


def _ways_of_repeat(least: int, most: int, inner: Any) -> tuple[int, int] | None:
    ways = _ways(inner)
    if ways is None or most == 0:
        return (1, 0) if most == 0 else None
    if most == 1:
        return (ways[0] + 1 - least, ways[1])
    if ways != (1, 0):  # the repeated part can itself match in several ways
        return (ways[0] ** most, ways[1] * most) if least == most <= 4 else None
    if least == most:
        return (1, 0)
    return (most - least + 1, 0) if most <= 16 else (1, 1)


_PLAIN = {
    _constants.LITERAL,
    _constants.NOT_LITERAL,
    _constants.ANY,
    _constants.IN,
    _constants.AT,
}


def _length(items: Iterable[Any]) -> int:
    """Return the most characters that an expression compares in one way through it."""
    total = 0
    for kind, value in items:
        if kind in _REPEATS:
            least, most, inner = value
            total += _length(inner) * max(1, least, most if most <= 16 else 1)
        elif kind is _constants.BRANCH:
            total += sum(map(_length, value[1]))
        elif kind is _constants.SUBPATTERN:
            total += _length(value[-1])
        elif kind in (_constants.ASSERT, _constants.ASSERT_NOT):
            total += _length(value[1])
        else:
            total += 1
    return total
