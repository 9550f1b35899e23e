"""Progress without a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile.cases import pair
from rich.console import Console
from waiting import LIMIT_SECONDS

from outliermerge.cli import terminal
from outliermerge.cli.lines import INTERVAL_VARIABLE, ProgressLines
from outliermerge.cli.terminal import MergeBar


def test_a_line_tells_percent_bytes_speed_and_time_left():
    lines = ProgressLines(counted="bytes of all passes")
    task = lines.add_task("merging", total=100e9)
    lines.advance(task, 10e9)  # done by an earlier run
    now = time.monotonic()
    lines._samples[0] = (now, 10e9)
    lines.advance(task, 20e9)

    assert lines.line(now + 10) == (
        "merging: 30%, 30 GB of 100 GB (bytes of all passes), 2 GB/s, 0:00:35 left"
    )
    lines.advance(task, 40e9)
    assert lines.line(now + 20) == "merging: 70%, 70 GB of 100 GB, 3 GB/s, 0:00:10 left"
    lines.update(task, description="checking", completed=100e9)
    assert lines.line(now + 30) == "checking"


def test_a_line_before_any_byte_has_no_speed():
    lines = ProgressLines()
    lines.add_task("reading", total=2e9)
    assert lines.line(time.monotonic()) == "reading: 0%, 0 B of 2 GB"
    ProgressLines().line(0.0)


def test_lines_are_printed_while_it_goes_on_and_not_after(capsys):
    with ProgressLines(interval_seconds=0.001) as lines:
        lines.add_task("merging", total=2e9)
        limit = time.monotonic() + LIMIT_SECONDS
        printed = ""
        while printed.count("\n") < 3 and time.monotonic() < limit:
            printed += capsys.readouterr().err
    assert set(printed.splitlines()) == {"merging: 0%, 0 B of 2 GB"}
    capsys.readouterr()
    assert not lines._thread.is_alive()


def test_what_is_waited_for_is_said_once(monkeypatch):
    said = io.StringIO()  # capsys could lose what is printed while it is read
    monkeypatch.setattr(sys, "stderr", said)
    with ProgressLines(interval_seconds=0.001) as lines:
        task = lines.add_task("merging", total=2e9)
        lines.update(task, description="checking", completed=2e9)
        limit = time.monotonic() + LIMIT_SECONDS
        while "checking" not in said.getvalue() and time.monotonic() < limit:
            pass
        lines.update(task, total=4e9)
        while "50%" not in said.getvalue() and time.monotonic() < limit:
            pass
    assert re.fullmatch(r"(merging: .*\n)*checking\n(checking: 50%.*\n)+", said.getvalue())


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_the_environment_turns_them_off(value, monkeypatch):
    monkeypatch.setenv(INTERVAL_VARIABLE, value)
    with ProgressLines() as lines:
        assert not lines._thread.is_alive()


def test_a_wrong_interval_is_the_usual_one(monkeypatch):
    monkeypatch.setenv(INTERVAL_VARIABLE, "often")
    assert ProgressLines()._interval_seconds == 5


@pytest.mark.parametrize(("flags", "may_speak"), [([], True), (["-q"], False)])
def test_a_run_prints_them_on_stderr_alone(tmp_path: Path, flags, may_speak):
    pair(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "outliermerge", "run", "spec.yaml", "out", "--json", *flags],
        cwd=tmp_path,
        env=os.environ | {INTERVAL_VARIABLE: "0.000001"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
    assert "merging" not in done.stdout
    assert bool(re.search(r"^merging", done.stderr, re.MULTILINE)) == may_speak


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_after_the_merge_the_check_that_is_waited_for_takes_the_place_of_100_percent(
    monkeypatch, num, is_terminal
):
    monkeypatch.setattr("rich.console.Console.is_terminal", is_terminal)
    monkeypatch.setenv(INTERVAL_VARIABLE, "0")
    wanted = "merged; checking that transformers loads it"
    if num == 3:
        wanted = "all 3 outputs merged; checking that transformers loads each of them"

    def shown(bar):
        if not is_terminal:
            return bar._bar.line(time.monotonic())
        console = Console(width=300, file=io.StringIO())
        console.print(bar._bar.get_renderable())
        return console.file.getvalue()

    with MergeBar(1000, num, quiet=False) as bar:
        bar.advance(500)
        assert "0.5" in shown(bar) or "50%" in shown(bar)
        bar.advance(500)
        bar.wait()
        waiting = shown(bar)
        assert wanted in waiting and "left" not in waiting and "━" not in waiting
        bar.done()
        assert not is_terminal or ("merged" in shown(bar) and "checking" not in shown(bar))


def test_until_the_first_bytes_ray_is_waited_for(monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", False)
    monkeypatch.setenv(INTERVAL_VARIABLE, "0")
    with MergeBar(1000, 1, quiet=False, on_ray=True) as bar:
        bar.advance(0)
        assert bar._bar.line(time.monotonic()).startswith("waiting for Ray")
        bar.advance(500)
        assert bar._bar.line(time.monotonic()).startswith("merging")


def test_a_long_wait_without_a_terminal_is_told_in_a_line(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(terminal, "_SHORT_SECONDS", 0.01)
    with terminal.status("checking"):
        limit = time.monotonic() + LIMIT_SECONDS
        while not said.getvalue() and time.monotonic() < limit:
            time.sleep(0.001)
    assert said.getvalue() == "checking\n"


@pytest.mark.parametrize("quiet", [True, False])
def test_a_short_wait_is_not_told(capsys, quiet):
    with terminal.status("checking", quiet=quiet):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_plan_says_that_it_waits_for_a_library_that_knows_defaults(tmp_path, warm_torch, quiet):
    pair(tmp_path)
    for name, more in (("good", {"attention_bias": False}), ("bad", {})):
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"} | more))
    done = subprocess.run(
        [warm_torch, "-m", "outliermerge", "plan", "spec.yaml", "--no-load-check", "--json"]
        + ["--quiet"] * quiet,
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0
    waits = "a config leaves out values that another has: importing transformers"
    assert (waits in done.stderr) == (not quiet)
