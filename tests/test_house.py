"""What `make check` checks, so that one command passes or fails the project."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
HELPERS = {"contributed", "hostile", "parity"}  # folders of tests/ that no room of the package has


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
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / "outliermerge").rglob("*")
        if path.suffix in (".py", ".h", ".c")
    }
    assert "outliermerge/engines/native/merge.h" in lengths
    assert [path for path, length in lengths.items() if length > 400] == []


def imported(path: Path) -> set[str]:
    """Return the last part of each module's name that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(alias.name for alias in node.names)}
    return {name.rpartition(".")[2] for name in names}


def test_no_test_module_is_imported():
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    found = {str(path.relative_to(TESTS)): imported(path) & tests for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


def test_names_of_test_modules_and_their_helpers_are_unique():
    # Their folders are all on the path of imports.
    names = [path.stem for path in TESTS.rglob("*.py") if path.parent != TESTS / "hostile"]
    assert sorted(names) == sorted(set(names))


def test_the_folders_of_tests_are_the_rooms_of_the_package():
    rooms = {path.parent.name for path in (ROOT / "outliermerge").glob("*/__init__.py")}
    tested = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    assert tested == rooms
    folders = {path.parent.name for path in TESTS.glob("*/*.py")}
    assert folders - rooms == HELPERS
    assert not list(TESTS.glob("*/*/**/test_*.py"))


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
