"""Tests run on the CPU, without a network, with warnings as errors."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from warm import LMMS_EVAL, TORCH, warm_python

if TYPE_CHECKING:
    from range_server import RangeServer

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Asking transformers takes seconds of a processor in each process: tests that mean it ask for it.
os.environ["OUTLIERMERGE_LOAD_CHECK"] = "0"
# A line of progress every few seconds would make what tests read depend on how fast they run.
os.environ["OUTLIERMERGE_PROGRESS_SECONDS"] = "0"
# Threads of torch that wait in a loop take the processors from other tests and their processes.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

collect_ignore = ["contributed"]  # files for copies of the package

# The files that take longest, each half a minute or more, begin first: else one worker of
# `make test` would be left with one of them when the others have nothing more to do.
LONGEST = ("test_documents.py", "test_report_page.py", "test_evaluation.py", "test_text.py",
           "test_benchmarks.py", "test_demo.py", "test_report.py", "test_package.py",
           "test_contributing.py", "test_ray.py", "test_family.py", "test_kill.py",
           "test_house.py", "test_shipped.py", "test_speed.py")  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m` is obeyed
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None and random.Random(item.nodeid).randrange(sampled.args[0]):
            item.add_marker(pytest.mark.faults)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch compute by one thread: blocks are small, and another test may run beside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def warm() -> Iterator[Path]:
    """A program that stands for `python`, and has imported lmms-eval already (`warm.py`)."""
    with warm_python(LMMS_EVAL) as program:
        yield program


@pytest.fixture(scope="session")
def warm_torch() -> Iterator[Path]:
    """As `warm`, of a process that has imported torch and nothing of the package."""
    with warm_python(TORCH) as program:
        yield program


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the proof that an output loads ask transformers in this process, which has it already."""
    from outliermerge.output import load_worker
    from outliermerge.output.load_check import LoadCheck

    def answers(self: LoadCheck) -> list[Any]:
        requests = [json.loads(request) for request in self._requests]
        return [load_worker.check_pair(*request) for request in requests]

    monkeypatch.setattr(LoadCheck, "_start", lambda self: None)
    monkeypatch.setattr(LoadCheck, "_answers", answers)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a folder of its own for what the program keeps from run to run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "outliermerge"


@pytest.fixture
def served(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RangeServer]:
    """Serve three models by HTTP and S3, with a cache of the test's own."""
    from models_elsewhere import models_served

    monkeypatch.chdir(tmp_path)
    with models_served(tmp_path / "served", monkeypatch) as server:
        yield server


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print what `make faults` has tried: the points and seconds of each test, slowest last.

    A test that tries many points tells their number by `record_property("points", …)`.
    """
    if config.option.markexpr != "faults":
        return
    tried: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for report in terminalreporter.stats.get("passed", []):
        row = tried[report.nodeid.partition("[")[0]]
        row[0] += dict(report.user_properties).get("points", 1)
        row[1] += report.duration
    terminalreporter.write_line(f"{'points':>8} {'seconds':>8}")
    for name, (points, seconds) in sorted(tried.items(), key=lambda item: item[1][1]):
        terminalreporter.write_line(f"{points:8,} {seconds:8.0f} {name}")
