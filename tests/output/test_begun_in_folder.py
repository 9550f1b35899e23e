"""A folder in which no tensor is finished is begun anew by any merge, without a flag."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import load_folder, save_tensors

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import ArgumentError, OutlierMergeError

NUM_TENSORS = 6
KILLED = """
import os, sys
from outliermerge.cli.main import main
from outliermerge.output import journal

def kill(self, entry, add=journal.Journal.add):
    if "tensor" in entry:
        os._exit(9)
    add(self, entry)

journal.Journal.add = kill
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        tensors = {f"w{n}": torch.randn(8, 9, generator=generator) for n in range(NUM_TENSORS)}
        save_tensors(tmp_path / "models" / name, tensors)
    (tmp_path / "outputs").mkdir()
    return tmp_path


def _spec(place: Path, weight: float = 0.5) -> dict[str, Any]:
    models = [{"model": f"{place}/models/{name}"} for name in "ab"]
    parameters = {"weight": weight, "normalize": False}
    return {"merge_method": "linear", "models": models, "parameters": parameters}


def _assert_merged(place: Path) -> None:
    a, b = (load_folder(place / "models" / name) for name in "ab")
    merged = load_folder(place / "outputs" / "out")
    assert all(tensor.equal(0.5 * a[name] + 0.5 * b[name]) for name, tensor in merged.items())
    assert len(merged) == NUM_TENSORS
    assert [path.name for path in (place / "outputs").iterdir()] == ["out"]


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_by_a_run(place: Path, how: str) -> None:
    output = place / "outputs" / "out"
    if how == "fails":
        with pytest.raises(OutlierMergeError, match="infinite"):
            outliermerge.run(_spec(place, 1e38), output=output)
        assert [*output.parent.iterdir()] == []
    else:
        (place / "spec.yaml").write_text(yaml.safe_dump(_spec(place, 0.3)))
        words = ["run", str(place / "spec.yaml"), "-o", str(output), "-q"]
        assert subprocess.run([sys.executable, "-c", KILLED, *words]).returncode == 9
        assert output.with_name("out.partial.journal").exists()
    outliermerge.run(_spec(place), output=output)
    _assert_merged(place)


@pytest.mark.parametrize("weight", [0.5, 1e38])
@pytest.mark.parametrize("after", ["run", "parts"])
def test_by_parts_of_another_number(place: Path, weight: float, after: str) -> None:
    output = place / "outputs" / "out"

    def part(number: int, num: int, weight: float = 0.5, **more: Any) -> int:
        plan, options = outliermerge.plan(_spec(place, weight)), outliermerge.RunOptions(**more)
        return outliermerge.run_part(plan, output, number, num, options)

    def fail(*_: object, **__: object) -> None:
        raise OutlierMergeError("before the first tensor")

    with pytest.raises(OutlierMergeError, match="before the first tensor"):
        part(1, 2, weight, executor=fail)
    if after == "run":
        outliermerge.run(_spec(place), output=output)
    else:
        assert part(1, 3) > 0
        with pytest.raises(ArgumentError, match="was begun in 3 parts, not in 2"):
            part(1, 2)
        assert part(2, 3) + part(3, 3) > 0
        outliermerge.join(outliermerge.plan(_spec(place)), output)
    _assert_merged(place)


def test_not_while_a_part_is_being_written(place: Path) -> None:
    output, said = place / "outputs" / "out", list[str]()

    def execute(*_: object, **__: object) -> None:
        with pytest.raises(ArgumentError, match="was begun in 2 parts, not in 3") as caught:
            outliermerge.run_part(outliermerge.plan(_spec(place)), output, 1, 3)
        said.append(str(caught.value))

    options = outliermerge.RunOptions(executor=execute)
    outliermerge.run_part(outliermerge.plan(_spec(place)), output, 1, 2, options)
    assert said


def test_parts_without_work_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "spec.yaml").write_text(yaml.safe_dump(_spec(place)))
    spec, output = str(place / "spec.yaml"), str(place / "outputs" / "out")
    why = "there are fewer tensors than parts or, in a store, fewer weight files. A smaller"
    plan = ["plan", spec, "-o", output, "--no-load-check", "--parts"]
    assert main([*plan, "7"]) == 0
    assert f"Some parts have no tensors: {why}" in " ".join(capsys.readouterr().out.split())
    assert main([*plan, "6"]) == 0
    assert "Some parts have no tensors" not in " ".join(capsys.readouterr().out.split())
    idle = []
    for number in range(1, 8):
        assert main(["run", spec, "-o", output, "--part", f"{number}/7"]) == 0
        said = capsys.readouterr().out
        assert ("0 of 0 tensors written" in said) == (why in said)
        idle += [number] * (why in said)
    assert len(idle) == 1
    assert main(["join", spec, "-o", output]) == 0
    _assert_merged(place)
