"""A compiler for tests that compile the whole package."""

from __future__ import annotations

import shlex
import sysconfig
from pathlib import Path


def quick_compiler(folder: Path) -> str:
    """Write a compiler that optimises little, for CC; return its path.

    Most of the time of compiling goes into optimising what all other tests use as it is shipped.
    """
    program = folder / "quick-cc"
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    program.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" -O1\n')
    program.chmod(0o755)
    return str(program)
