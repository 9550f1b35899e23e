"""A search over four trained models: which take part, and the weight and density of each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from four_kinds import FORMS, save_models

from outliermerge.cli.main import main as cli


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, a spec and a space."""
    folder = tmp_path_factory.mktemp("four")
    save_models(folder)
    models = [{"model": kind} for kind in FORMS]
    spec = {"merge_method": "ties", "base_model": "base", "models": models}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    space: dict[str, Any] = {"models": {"least": 2}, "lambda": {"low": 0.3, "high": 1.5}}
    for number in range(1, 5):
        space[f"models.{number}.weight"] = {"low": 0.2, "high": 1.5}
        space[f"models.{number}.density"] = {"low": 0.2, "high": 1}
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return folder


def words(suite: str, output: str, trials: int = 6) -> list[str]:
    given = ["search", "spec.yaml", "--space", "space.yaml", "--suite", f"four_kinds:{suite}"]
    return [*given, "-o", output, "--trials", str(trials), "--questions", "4", "-q"]


def result(output: str) -> Any:
    return json.loads(Path(output, "result.json").read_text())


@pytest.mark.usefixtures("one_thread")
def test_a_killed_search_of_four_models_finds_what_one_that_was_not_killed_finds(
    place, warm_torch, monkeypatch
):
    monkeypatch.chdir(place)
    assert cli(words("likelihood", "whole")) == 0
    whole = result("whole")
    assert [row["name"] for row in whole["rows"]][:6] == ["base", *FORMS, "the defaults"]
    # Each trial has the values of those that take part, and of no others.
    members = []
    for trial in whole["trials"]:
        point = trial["point"]
        away = {name.removeprefix("models.") for name, value in point.items() if value == "out"}
        members.append(4 - len(away))
        for key in ("weight", "density"):
            there = {number for number in "1234" if f"models.{number}.{key}" in point}
            assert there == set("1234") - away
    assert min(members) >= 2 and len(set(members)) > 1

    path = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    killed = subprocess.run(
        [warm_torch, "-m", "outliermerge", *words("deadly", "killed")],
        env={**os.environ, "PYTHONPATH": path},
    )
    assert killed.returncode == -signal.SIGKILL and not Path("killed/result.json").exists()
    assert cli(words("deadly", "killed")) == 0
    again = result("killed")
    assert again["trials"] == whole["trials"] and again["rows"] == whole["rows"]
    assert Path("killed/best.yaml").read_bytes() == Path("whole/best.yaml").read_bytes()
