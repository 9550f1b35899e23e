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
