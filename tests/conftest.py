"""Tests run on the CPU, without a network, with warnings as errors."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Asking transformers takes seconds of a processor in each process: tests that mean it ask for it.
os.environ["OUTLIERMERGE_LOAD_CHECK"] = "0"
# A line of progress every few seconds would make what tests read depend on how fast they run.
os.environ["OUTLIERMERGE_PROGRESS_SECONDS"] = "0"

collect_ignore = ["contributed"]  # files for copies of the package


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch compute by one thread: blocks are small, and another test may run beside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
