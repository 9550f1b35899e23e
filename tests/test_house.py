"""What `make check` checks, so that one command passes or fails the project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    ["ruff check .", "ruff format --check .", "mypy", "lint-imports"],
)
def test_check_passes(command):
    program, *arguments = command.split()
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_of_the_package_passes_400_lines():
    lengths = {
        path.name: len(path.read_text().splitlines())
        for path in (ROOT / "outliermerge").rglob("*")
        if path.suffix in (".py", ".h", ".c")
    }
    assert [name for name, length in lengths.items() if length > 400] == []


def test_make_knows_each_of_its_targets_once():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""  # make warns of a second recipe
    shown = [line.split()[0] for line in done.stdout.splitlines()]
    phony = (ROOT / "Makefile").read_text().partition(".PHONY:")[2].partition("\n\n")[0]
    assert sorted(shown) == sorted(phony.replace("\\", "").split())
