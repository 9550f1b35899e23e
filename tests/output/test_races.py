"""Several runs with the same output at the same time: one of them wins, and nothing is mixed.

A sample of the trials is run; `make faults` runs 500.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tensors
from kinds import KINDS, command, save_models, save_specs
from safetensors.torch import save_file

NUM_TRIALS = 24
NUM_ALL_TRIALS = 500
NUM_TRIALS_OF_A_KIND = 60
LONGEST_DELAY = 0.03  # seconds; about what a run takes


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    cache = tmp_path_factory.mktemp("cache")
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "race_driver.py")],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(commands: list[tuple[list[str], float]]) -> list[tuple[int, str]]:
        assert process.stdin is not None
        assert process.stdout is not None
        shutil.rmtree(cache, ignore_errors=True)
        process.stdin.write(json.dumps(commands) + "\n")
        process.stdin.flush()
        return [(code, message) for code, message in json.loads(process.stdout.readline())]

    yield run
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    process.wait(timeout=600)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, two specs for folders and two for files, and the output of each."""
    root = tmp_path_factory.mktemp("races")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "task"):
        tensors = {f"w{n}": torch.randn(8, 10, generator=generator) for n in range(4)}
        save_tensors(root / name, tensors)
        save_file(tensors, root / f"{name}.safetensors")
    save_models(root / "models")
    for number, weight in enumerate((0.25, 0.75)):
        save_specs(root, root / "models", weight=weight, end=str(number))
    for kind, suffix in (("folder", ""), ("file", ".safetensors")):
        for number, weight in enumerate((0.25, 0.75)):
            (root / f"{kind}{number}.yaml").write_text(
                f"merge_method: task_arithmetic\nbase_model: {root}/base{suffix}\n"
                f"models:\n- model: {root}/task{suffix}\nparameters:\n  weight: {weight}\n"
            )
    return root


def _command(place: Path, kind: str, number: int, output: Path, *more: str) -> list[str]:
    spec = str(place / f"{kind}{number}.yaml")
    word = command(kind) if kind in KINDS else "run"
    more = (*more, "--no-routing") if word == "moe" else more
    return [word, spec, "--output", str(output), "--no-load-check", "--threads", "1", *more]


def _state(output: Path) -> dict[str, bytes]:
    """What has an output's name, without the words on it that name its folder."""
    found = {}
    for path in [output, *output.rglob("*"), output.with_name(output.name + ".outliermerge.json")]:
        if path.is_file():
            found[path.relative_to(output.parent).as_posix()] = path.read_bytes()
    return found


OUTPUTS = pytest.mark.parametrize("kind", ["folder", "file"])
OLD = pytest.mark.parametrize("old", [False, True])


@OUTPUTS
@OLD
def test_of_several_runs_at_once_one_wins_and_the_others_say_why(race, place, tmp_path, kind, old):
    _race(race, place, tmp_path, kind, old, NUM_TRIALS // 4)


@pytest.mark.faults
@OUTPUTS
@OLD
def test_of_many_races_none_is_lost(race, place, tmp_path, kind, old, record_property):
    _race(race, place, tmp_path, kind, old, NUM_ALL_TRIALS // 4)
    record_property("points", NUM_ALL_TRIALS // 4)


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_runs_of_every_kind_of_spec_one_wins(race, place, tmp_path, kind):
    _race(race, place, tmp_path, kind, kind in ("stages", "moe"), 2)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
@OLD
def test_of_many_races_of_every_kind_of_spec_none_is_lost(
    race, place, tmp_path, kind, old, record_property
):
    _race(race, place, tmp_path, kind, old, NUM_TRIALS_OF_A_KIND // 2)
    record_property("points", NUM_TRIALS_OF_A_KIND // 2)


def _race(race: Any, place: Path, tmp_path: Path, kind: str, old: bool, num_trials: int) -> None:
    suffix = ".safetensors" if kind == "file" else ""
    work = tmp_path / "work"
    output = work / f"out{suffix}"
    expected = []
    for number in range(2):
        work.mkdir()
        assert race([(_command(place, kind, number, output), 0)])[0][0] == 0
        expected.append(_state(output))
        shutil.rmtree(work)
    assert expected[0] != expected[1]
    for trial in range(num_trials):
        chance = random.Random(f"{kind} {old} {trial}")
        work.mkdir()
        if old:
            assert race([(_command(place, kind, 0, output), 0)])[0][0] == 0
        numbers = [chance.randrange(2) for _ in range(chance.choice([2, 2, 3]))]
        more = ["--overwrite"] if old else []
        done = race(
            [
                (
                    _command(place, kind, number, output, *more),
                    chance.choice([0, chance.random() * LONGEST_DELAY]),
                )
                for number in numbers
            ]
        )
        codes = [code for code, _ in done]
        winners = [number for number, code in zip(numbers, codes, strict=True) if code == 0]
        assert set(codes) <= {0, 1}, done
        assert winners, done
        if not old:
            assert len(winners) == 1, done
        for code, message in done:
            what = ("another run", "exists already") if not old else ("another run",)
            assert code == 0 or any(text in message for text in what), message
        found = _state(output)
        assert found in [expected[number] for number in winners], "it is no winner's"
        extra = {"out.safetensors.outliermerge.json"} if kind == "file" else set()
        assert {path.name for path in work.iterdir()} == {output.name, *extra}
        shutil.rmtree(work)


def test_of_parts_and_joins_at_once_nothing_is_lost(race, place, tmp_path):
    _race_parts(race, place, tmp_path, NUM_TRIALS // 4)


@pytest.mark.faults
def test_of_many_parts_and_joins_at_once_nothing_is_lost(race, place, tmp_path, record_property):
    _race_parts(race, place, tmp_path, NUM_ALL_TRIALS // 4)
    record_property("points", NUM_ALL_TRIALS // 4)


def _race_parts(race: Any, place: Path, tmp_path: Path, num_trials: int) -> None:
    """Start parts, some of them twice, and joins at the same time; then do what is left."""
    work = tmp_path / "work"
    output = work / "out"
    work.mkdir()
    assert race([(_command(place, "folder", 0, output), 0)])[0][0] == 0
    expected = _state(output)
    shutil.rmtree(work)
    parts = [_command(place, "folder", 0, output, "--part", f"{n}/3") for n in (1, 2, 3)]
    join = ["join", *_command(place, "folder", 0, output)[1:]]
    refusals = ("another run", "is not whole", "no part of it is being written", "exists already")
    for trial in range(num_trials):
        chance = random.Random(f"parts {trial}")
        work.mkdir()
        begun = chance.sample(parts, chance.randrange(3))
        assert all(code == 0 for code, _ in race([(part, 0) for part in begun]))
        chosen = [*parts, *chance.choices(parts, k=chance.randrange(3)), join, join]
        for code, message in race([(words, chance.random() * LONGEST_DELAY) for words in chosen]):
            assert code in (0, 1), message
            assert code == 0 or any(text in message for text in refusals), message
        if not output.exists():
            for words in (*parts, join):
                code, message = race([(words, 0)])[0]
                assert code == 0, message
        assert _state(output) == expected
        assert [path.name for path in work.iterdir()] == ["out"]
        shutil.rmtree(work)


@OUTPUTS
@OLD
def test_what_appears_under_the_name_during_a_run_is_left_alone(place, tmp_path, kind, old):
    import outliermerge

    suffix = ".safetensors" if kind == "file" else ""
    output = tmp_path / f"out{suffix}"
    if old:
        outliermerge.run(place / f"{kind}0.yaml", output=output)

    def appear(num_bytes: int) -> None:
        if old:
            shutil.move(output, tmp_path / f"moved{suffix}")
        if not output.exists():
            if kind == "folder":
                output.mkdir()
                (output / "thesis.txt").write_text("mine")
            else:
                output.write_text("mine")

    seen = []

    def once(num_bytes: int) -> None:
        if not seen:
            appear(num_bytes)
        seen.append(num_bytes)

    with pytest.raises(outliermerge.OutlierMergeError, match="something else has got this name"):
        outliermerge.run(
            place / f"{kind}1.yaml", output=output, overwrite=old, on_progress=once, threads=1
        )

    mine = output / "thesis.txt" if kind == "folder" else output
    assert mine.read_text() == "mine"
    if kind == "folder":
        shutil.rmtree(output)
    else:
        output.unlink()
        output.with_name(f"{output.name}.outliermerge.json").unlink(missing_ok=True)
    result = outliermerge.run(place / f"{kind}1.yaml", output=output)
    assert result.num_resumed == 4, "the work was lost"


def test_files_put_into_the_old_output_during_a_run_are_kept(place, tmp_path):
    import outliermerge

    output = tmp_path / "out"
    outliermerge.run(place / "folder0.yaml", output=output)
    result = outliermerge.run(
        place / "folder1.yaml",
        output=output,
        overwrite=True,
        on_progress=lambda _: (output / "notes.txt").write_text("mine"),
    )
    assert result.left_behind == tmp_path / "out.replaced"
    assert [path.name for path in result.left_behind.iterdir()] == ["notes.txt"]
    assert outliermerge.verify(output) == []
