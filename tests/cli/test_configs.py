"""Specs and suites that ship are found by name, from any folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from waiting import LIMIT_SECONDS

from outliermerge.cli import main as cli
from outliermerge.cli.shipped import find_file, shipped
from outliermerge.evaluation.suite import load_suite
from outliermerge.spec.check import load_spec

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel has it, without kernels."""
    folder = tmp_path_factory.mktemp("built")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder),
         "build_py", "--build-lib", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def call(built: Path, tmp_path: Path):
    """Runs the built package in an empty folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [str(built), *(path for path in others if path and Path(path) != ROOT)]
        return subprocess.run(
            [sys.executable, "-m", "outliermerge", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_CACHE": "hub"},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )

    return run


def test_a_wheel_has_the_paper_s_specs_and_suites(built, call):
    listed = json.loads(call("configs", "--json").stdout)
    assert {entry["name"] for entry in listed if entry["kind"] == "suite"} == {
        "mllm", "paper", "paper-judge", "text",
    }  # fmt: skip
    names = [entry["name"] for entry in listed if entry["kind"] == "spec"]
    assert "llava_math" in names
    for entry in listed:
        assert Path(entry["file"]).is_relative_to(built)
        assert entry["summary"]
        local = [model for model in entry.get("models", []) if model.startswith(("models", "ev"))]
        assert local == [], "a clone's own models"
    for entry in listed:
        if entry["kind"] == "suite":
            load_suite(entry["file"])
        else:
            load_spec(entry["file"])


def test_a_name_is_found_from_an_empty_folder(call):
    done = call("plan", "llava_math")
    assert done.returncode == 1
    assert "llava-hf/llava-1.5-13b-hf" in done.stderr, "the hub is not asked in tests"
    done = call("eval", "absent", "--suite", "paper", "--output", "scores")
    assert done.returncode == 1
    assert "model 'absent'" in done.stderr


def test_one_is_printed_as_it_is(capsys):
    assert cli.main(["configs", "llava_math"]) == 0
    assert capsys.readouterr().out == (ROOT / "merge_configs/llava_math.yaml").read_text()


def test_the_list_has_all_of_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["configs"]) == 0
    printed = capsys.readouterr().out
    for kind in ("spec", "suite"):
        for name in shipped(kind):
            assert re.search(rf"^{name} +\w", printed, re.MULTILINE)
    assert "tiny_ties merge models of a clone" in printed
    assert "llava_math, " not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["configs", "lava_math"], "Did you mean 'llava_math'?"),
        (["run", "lava_math", "out"], "Did you mean 'llava_math'?"),
        (["eval", "m", "--suite", "papr", "--output", "o"], "Did you mean 'paper'?"),
        (["run", "llava_math.yaml", "out"], "llava_math.yaml: no such spec file"),
    ],
)
def test_an_unknown_name_is_2(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_file("llava_math", "spec")).is_absolute()
    (tmp_path / "llava_math").write_text(yaml.safe_dump({}))
    assert find_file("llava_math", "spec") == "llava_math"
    assert find_file("some/llava_math", "spec") == "some/llava_math"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_examples_name_what_ships_or_the_reader_s_own(command, capsys):
    assert cli.main([command, "--help"]) == 0
    examples = "\n".join(re.findall(r"^  outliermerge .*$", capsys.readouterr().out, re.MULTILINE))
    assert "merge_configs/" not in examples
    assert "evals/" not in examples
    for name in re.findall(r" (?:run|plan|sweep|configs) (\w+) ", examples):
        assert name in shipped("spec")
    for name in re.findall(r"--suite (\S+)", examples):
        # A search takes a function of the reader's, or several suites.
        assert ":" in name or name.endswith(".yaml") or name in shipped("suite")
