"""What others send: read or refused, in bounded time and memory, by a message that can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile.cases import CASES
from hostile.texts import needs_torch
from kinds import IMPORTED

MAX_CPU_SECONDS, MAX_KILOBYTES, MAX_CHARACTERS = 10, 500_000, 2000
EVERY = 60  # of the cases, one is run in every run of the tests; all of them by `make faults`
CHOSEN = list(CASES)[::EVERY]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    yield from _driver(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The driver for what needs torch, or transformers; the memory of these is not counted."""
    yield from _driver(tmp_path_factory.mktemp("cache"), *IMPORTED)


def _driver(cache: Path, *modules: str) -> Iterator[subprocess.Popen[str]]:
    path = Path(__file__).parent / "hostile/driver.py"
    environment = os.environ | {"COLUMNS": "100", "OUTLIERMERGE_LOAD_CHECK": "0"}
    environment["XDG_CACHE_HOME"] = str(cache)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(path), *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _files(folder: Path) -> set[str]:
    names = {"said.out", "said.err", "peak.kb"}
    return {path.name for path in folder.iterdir()} - names


def _check(name: str, request: pytest.FixtureRequest, folder: Path) -> None:
    beside = folder / "case"
    beside.mkdir()
    arguments = CASES[name](beside)
    driver = request.getfixturevalue("with_torch" if needs_torch(arguments) else "driver")
    before = _files(beside)
    task = {"arguments": arguments, "folder": str(beside), "cpu_seconds": 60}
    assert driver.stdin is not None and driver.stdout is not None
    driver.stdin.write(json.dumps(task) + "\n")
    driver.stdin.flush()
    answer = json.loads(driver.stdout.readline())
    out = (beside / "said.out").read_text("utf-8")
    err = (beside / "said.err").read_text("utf-8")

    assert "Traceback" not in out + err, err[-3000:]
    assert answer["code"] in (0, 1, 2), (answer, err[-1000:])
    for text in (out, err):
        assert all(c.isprintable() or c == "\n" for c in text), repr(text[:1000])
    assert len(err) <= MAX_CHARACTERS, err
    if answer["code"]:
        assert len(out) <= MAX_CHARACTERS or out.startswith("{"), out
    assert answer["seconds"] <= MAX_CPU_SECONDS, answer
    assert answer["kilobytes"] <= MAX_KILOBYTES, answer
    new = _files(beside) - before
    assert all(n.startswith(("out", "scores")) for n in new), new
    if answer["code"]:
        assert not [n for n in new if n in ("out", "out.html")], new
    assert os.listdir(folder) == ["case"]  # noqa: PTH208


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.sampled(2)
def test_a_hostile_input_is_read_or_refused_in_bounds(name, request, tmp_path):
    _check(name, request, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in CASES if name not in CHOSEN])
def test_every_hostile_input_is_read_or_refused_in_bounds(name, request, tmp_path):
    _check(name, request, tmp_path)


def test_there_are_at_least_400_hostile_inputs():
    assert len(CASES) >= 400
