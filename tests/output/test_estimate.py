"""The trial behind a plan's time and memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import save_tensors

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.cli.plan_facts import Took, time_in_words
from outliermerge.output import estimate as estimating
from outliermerge.output.estimate import estimate_run

BASE = ("base", "a", "b")


@pytest.fixture
def spec(tmp_path: Path) -> dict:
    for number, name in enumerate(BASE):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            "layers.0.w.weight": torch.randn(500, 400, generator=generator),
            "layers.1.w.weight": torch.randn(500, 400, generator=generator),
            "norm.weight": torch.randn(7, generator=generator),
        }
        save_tensors(tmp_path / name, tensors)
    return {
        "merge_method": "min_sigma",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "a")}, {"model": str(tmp_path / "b")}],
    }


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


METHODS = ("min_sigma", "ties", "linear", "task_arithmetic")


@pytest.mark.parametrize("method", METHODS)
def test_the_trial_leaves_nothing_behind(spec, tmp_path, method):
    planned = outliermerge.plan(spec | {"merge_method": method})
    before = _files(tmp_path)
    found = outliermerge.estimate(planned, output=tmp_path / "deep" / "out", threads=2)
    assert _files(tmp_path) == before
    assert found.seconds > 0 and found.bytes_per_second > 0
    assert str(tmp_path) in found.basis
    assert found.process_bytes == found.program_bytes + found.block_bytes


def test_a_copied_model_is_tried_too(spec, tmp_path):
    planned = outliermerge.plan(
        spec | {"merge_method": "passthrough", "models": spec["models"][:1]}
    )
    assert outliermerge.estimate(planned, output=tmp_path / "out").seconds > 0


def test_the_time_grows_with_the_work(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(estimating, "_tried", lambda *given: (1e6, "a megabyte a second"))
    planned = outliermerge.plan(spec)
    options = outliermerge.RunOptions().on_this_machine()
    found = estimate_run(planned, options, tmp_path / "out")
    assert found.seconds == pytest.approx(planned.work_bytes / 1e6, abs=0.2)


def test_infinite_values_do_not_end_the_trial(spec, tmp_path):
    tensors = {"w": torch.full((300, 300), float("inf"))}
    for name in BASE:
        save_tensors(tmp_path / name, tensors)
    assert outliermerge.estimate(outliermerge.plan(spec), output=tmp_path / "out").seconds > 0


def test_a_trial_that_fails_is_told_and_ends_no_plan(spec, tmp_path):
    planned = outliermerge.plan(spec)
    (tmp_path / "b" / "model.safetensors").unlink()
    found = outliermerge.estimate(planned, output=tmp_path / "out")
    assert found.seconds is None
    assert found.basis.startswith("the trial failed: ")


def test_a_folder_that_cannot_be_written_is_told(spec, tmp_path, monkeypatch):
    def refused(**given):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(estimating.tempfile, "TemporaryFile", refused)
    found = outliermerge.estimate(outliermerge.plan(spec), output=tmp_path / "out")
    assert found.seconds is None and "Permission denied" in found.basis


def test_without_the_systems_figures_the_blocks_are_told(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(estimating, "resident_bytes", lambda: None)
    found = outliermerge.estimate(outliermerge.plan(spec), output=tmp_path / "out")
    assert found.process_bytes is None and found.block_bytes > 0


def _in_new_process(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outliermerge", *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OUTLIERMERGE_LOAD_CHECK": "0"},
    )


def test_what_torch_computes_is_not_tried_without_torch(spec, tmp_path):
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    words = ["plan", str(tmp_path / "spec.yaml"), str(tmp_path / "out"), "--json"]
    by_kernels, by_torch = (
        json.loads(_in_new_process(*words, *more).stdout) for more in ([], ["--no-kernels"])
    )
    assert by_torch["estimate"]["seconds"] is None
    assert "torch" in by_torch["estimate"]["basis"]
    program = [found["estimate"]["program_memory_bytes"] for found in (by_kernels, by_torch)]
    assert program[1] - program[0] > 100e6  # what importing it takes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.parametrize("method", ["min_sigma", "linear"])
def test_the_memory_is_near_what_a_run_takes(spec, tmp_path, method):
    """Twice is near: the interpreter takes most of it, and the figure is for planning."""
    (tmp_path / "spec.yaml").write_text(json.dumps(spec | {"merge_method": method}))
    words = [str(tmp_path / "spec.yaml"), str(tmp_path / "out"), "--threads", "2"]
    planned = json.loads(_in_new_process("plan", *words, "--json").stdout)
    code = (
        "import sys; from outliermerge.cli.main import main; code = main(sys.argv[1:]);"
        "print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", *words, "--no-load-check"],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    peak = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
    estimated = planned["estimate"]["process_memory_bytes"]
    assert peak / 1.5 < estimated < peak * 1.5


def test_a_plan_as_json_begins_with_what_a_person_asks(spec, tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    words = ["plan", str(tmp_path / "spec.yaml"), str(tmp_path / "out"), "--json"]
    assert cli.main([*words, "--no-load-check"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert next(iter(found)) == "summary"
    summary = found["summary"]
    assert summary["method"] == "min_sigma" and summary["num_tensors"] == 3
    assert summary["models"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert summary["process_memory_bytes"] == found["estimate"]["process_memory_bytes"]
    assert "tensors" not in found
    assert cli.main([*words, "--no-load-check", "--tensors"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 3


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "less than a second"),
        (1.26, "about 1.3 s"),
        (59, "about 59 s"),
        (119.7, "about 2 min 0 s"),
        (700, "about 11 min"),
        (7300, "about 2 h 1 min"),
    ],
)
def test_a_time_is_told_as_precisely_as_it_is_known(seconds, words):
    estimate = estimating.Estimate(seconds, 1.0, "a trial", 1, 1)
    assert time_in_words(estimate, Took(0.1)) == f"{words} (a trial)"


@pytest.mark.parametrize(
    ("merging", "took", "words"),
    [
        (0.2, Took(0.1, 5.0),
         "about 5.1 s: less than a second to merge and meanwhile 5 s to check that it loads (a)"),
        (30.0, Took(4.0, 5.0),
         "about 34 s: 4 s to plan, 30 s to merge and meanwhile 5 s to check that it loads (a)"),
        (None, Took(0.1, 5.0), "not known, at least 5.1 s (a)"),
    ],
)  # fmt: skip
def test_the_time_of_a_run_includes_planning_and_the_load_check(merging, took, words):
    assert time_in_words(estimating.Estimate(merging, 1.0, "a", 1, 1), took) == words


def test_the_memory_that_a_refusal_names_is_enough_and_the_least(spec, tmp_path, capsys):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    words = ["plan", str(path), "--no-load-check", "--threads", "2", "--memory"]
    assert cli.main([*words, "1"]) == 2
    number = int(re.search(r"Give --memory (\d+)KiB or more", capsys.readouterr().err)[1])
    assert cli.main([*words, f"{number}KiB"]) == 0
    assert cli.main([*words, f"{number - 1}KiB"]) == 2
