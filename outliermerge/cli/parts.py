"""What the files of commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TextIO, TypeAlias

from outliermerge.errors import readable

AddCommand: TypeAlias = Callable[..., argparse.ArgumentParser]
"""Adds a command's parser: its name, what it does, examples."""


def print_json(value: object) -> None:
    """Print a value for scripts."""
    print(plain_json(json.dumps(value, indent=2, ensure_ascii=False)))


def plain_json(text: str) -> str:
    r"""Return JSON with what could control a terminal escaped; only texts in it can hold such.

    >>> plain_json('["\x7f\u202e é"]')
    '["\\u007f\\u202e é"]'
    """
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a message, which may quote what others wrote, as a person can read it."""
    print(readable(text), file=file)


def add_machine(command: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Add the options of what computes."""
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N, or auto")
    command.add_argument(
        "--threads", type=count, default=0, metavar="N", help="default: processors + 2"
    )
