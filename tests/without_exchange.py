"""The command line on a system that cannot exchange two names, nor keep a name that is there."""

from __future__ import annotations

from collections.abc import Sequence

from outliermerge.cli import main as cli
from outliermerge.storage import system


def main(arguments: Sequence[str]) -> int:
    """Run a command; `injection.Driver` calls this in a fork."""
    system._renameat2 = lambda source, target, flags: False
    return cli.main(list(arguments))
