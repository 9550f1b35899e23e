"""What the files of commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TypeAlias

AddCommand: TypeAlias = Callable[..., argparse.ArgumentParser]
"""Adds a command's parser: its name, what it does, examples."""


def print_json(value: object) -> None:
    """Print a value for scripts."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def add_machine(command: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Add the options of what computes."""
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N, or auto")
    command.add_argument(
        "--threads", type=count, default=0, metavar="N", help="default: processors + 2"
    )
