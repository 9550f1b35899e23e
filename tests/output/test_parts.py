"""Plans carried out in parts by several processes: the same bytes as by one."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors
from stopping import stopping_after
from waiting import LIMIT_SECONDS, stopped

import outliermerge
from outliermerge import ArgumentError, OutlierMergeError, RunOptions
from outliermerge.output.journal import Journal, parts
from outliermerge.output.parts import part_of, run_part
from outliermerge.planning.plan import Plan

DRIVER = Path(__file__).parents[1] / "part_driver.py"
NUM_TENSORS = 14


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {
        f"layers.{i:02}.weight": torch.randn(40 + 30 * i, 130, generator=generator).bfloat16()
        for i in range(NUM_TENSORS - 2)
    }
    base["large.weight"] = torch.randn(700, 300, generator=generator)
    base["steps"] = torch.arange(9)
    for name in ("base", "one", "two"):
        tensors = {
            key: tensor if key == "steps" or name == "base" else tensor
            + 0.01 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for key, tensor in base.items()
        }  # fmt: skip
        save_tensors(folder / name, tensors)
    return folder


def spec(models: Path, method: str = "min_sigma", **more: object) -> dict[str, object]:
    tuned = [{"model": str(models / name)} for name in ("one", "two")]
    return {"merge_method": method, "base_model": str(models / "base"), "models": tuned, **more}


@pytest.fixture(scope="module")
def planned(models: Path) -> Plan:
    return outliermerge.plan(spec(models), shard_size="300kB")


@pytest.fixture(scope="module")
def expected(planned: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "out"
    outliermerge.run(planned, output=folder)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start(
    plan: Path, output: Path, part: int, num_parts: int = 3, number: int = 0, when: str = "after"
) -> subprocess.Popen:
    arguments = [plan, output, part, num_parts, number, when]
    return subprocess.Popen(
        [sys.executable, str(DRIVER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> int:
    """Return how many tensors a process wrote."""
    printed, failed = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, failed
    return int(printed)


def killed(process: subprocess.Popen) -> None:
    assert stopped(process)
    process.kill()
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == -signal.SIGKILL


@pytest.fixture
def plan_file(planned: Plan, tmp_path: Path) -> Path:
    file = tmp_path / "plan.pickle"
    file.write_bytes(pickle.dumps(planned))
    return file


@pytest.mark.parametrize(
    ("victim", "when"),
    [
        (1, "before"),
        (2, "after"),
        (3, "before"),
        pytest.param(1, "after", marks=pytest.mark.faults),
        pytest.param(2, "before", marks=pytest.mark.faults),
        pytest.param(3, "after", marks=pytest.mark.faults),
    ],
)
def test_three_processes_one_of_them_killed_write_what_one_writes(
    planned: Plan,
    plan_file: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    victim: int,
    when: str,
) -> None:
    output = tmp_path / "out"
    numbers = {part: 2 if part == victim else 0 for part in (1, 2, 3)}
    running = {part: start(plan_file, output, part, 3, n, when) for part, n in numbers.items()}
    killed(running.pop(victim))
    num_written = sum(map(ended, running.values()))
    again = ended(start(plan_file, output, victim))
    assert num_written + again == NUM_TENSORS - (2 if when == "after" else 1)
    result = outliermerge.run(planned, output=output)
    assert result.num_resumed == NUM_TENSORS
    assert contents(output) == expected
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_run_does_what_parts_have_left(
    planned: Plan, plan_file: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    num_written = ended(start(plan_file, output, 2))
    killed(start(plan_file, output, 1, number=1))
    result = outliermerge.run(planned, output=output)
    assert result.num_resumed == num_written + 1
    assert contents(output) == expected


def test_parts_do_what_a_stopped_run_has_left(
    planned: Plan,
    plan_file: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    with stopping_after(monkeypatch, 5), pytest.raises(KeyboardInterrupt):
        outliermerge.run(planned, output=output, memory="64MiB", threads=1)
    num_written = sum(ended(start(plan_file, output, part)) for part in (1, 2, 3))
    assert num_written == NUM_TENSORS - 5
    assert outliermerge.run(planned, output=output).num_resumed == NUM_TENSORS
    assert contents(output) == expected


def test_a_part_is_written_once(plan_file: Path, tmp_path: Path, planned: Plan) -> None:
    output = tmp_path / "out"
    assert ended(start(plan_file, output, 2)) == len(part_of(planned, 2, 3))
    assert ended(start(plan_file, output, 2)) == 0


def test_bytes_that_were_lost_are_written_again(
    planned: Plan, plan_file: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for part in (1, 2, 3):
        ended(start(plan_file, output, part))
    job = part_of(planned, 2, 3)[0]
    shard = tmp_path / "out.partial" / job.output.file
    data = bytearray(shard.read_bytes())
    data[job.output.offset + 1] ^= 255
    shard.write_bytes(data)
    assert outliermerge.run(planned, output=output).num_resumed == NUM_TENSORS - 1
    assert contents(output) == expected


def test_while_a_part_is_written_neither_a_run_nor_the_same_part_gets_in(
    planned: Plan, plan_file: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    holding = start(plan_file, output, 2, number=1)
    assert stopped(holding)
    for fresh in (False, True):
        with pytest.raises(OutlierMergeError, match=r"of part 2-of-3 \(process \d+ on"):
            outliermerge.run(planned, output=output, fresh=fresh)
    options = RunOptions(memory="64MiB", threads=2, kernels=True)
    with pytest.raises(OutlierMergeError, match="of part 2-of-3"):
        run_part(planned, output, 2, 3, options)
    other = RunOptions(memory="64MiB", threads=2, kernels=False)
    with pytest.raises(OutlierMergeError, match="of part 2-of-3"):
        run_part(planned, output, 1, 3, other)
    assert parts(output) == ["2-of-3"]
    holding.send_signal(signal.SIGCONT)
    ended(holding)
    outliermerge.run(planned, output=output)
    assert contents(output) == expected


def test_parts_of_another_merge_are_not_mixed_in(
    models: Path, planned: Plan, plan_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    ended(start(plan_file, output, 2))
    other = outliermerge.plan(spec(models, parameters={"t": 1.0}), shard_size="300kB")
    options = RunOptions(memory="64MiB", threads=2, kernels=True)
    with pytest.raises(OutlierMergeError, match="begun by another merge: the spec changed"):
        run_part(other, output, 1, 3, options)
    with pytest.raises(OutlierMergeError, match="begun by another merge: the spec changed"):
        outliermerge.run(other, output=output)
    outliermerge.run(other, output=output, fresh=True)
    outliermerge.run(other, output=tmp_path / "alone")
    assert contents(output) == contents(tmp_path / "alone")


@pytest.mark.parametrize("method", ["ties", "linear", "task_arithmetic"])
def test_other_methods_and_one_file(models: Path, tmp_path: Path, method: str) -> None:
    file = {name: str(models / name / "model.safetensors") for name in ("base", "one", "two")}
    document = {
        "merge_method": method,
        "base_model": file["base"],
        "models": [{"model": file["one"]}, {"model": file["two"]}],
    }
    planned = pickle.loads(pickle.dumps(outliermerge.plan(document)))
    options = RunOptions(memory="64MiB", threads=2, kernels=True)
    for part in (4, 1, 3, 2):
        run_part(planned, tmp_path / "out.safetensors", part, 4, options)
    outliermerge.run(planned, output=tmp_path / "out.safetensors")
    outliermerge.run(planned, output=tmp_path / "alone.safetensors")
    names = "out.safetensors", "alone.safetensors"
    one, other = ((tmp_path / name).read_bytes() for name in names)
    assert one == other


def test_parts_are_of_all_jobs_and_of_about_the_same_bytes(planned: Plan) -> None:
    largest = max(map(planned.num_work_bytes, planned.jobs))
    for num_parts in (1, 2, 3, 5, 13, 40):
        found = [part_of(planned, part, num_parts) for part in range(1, num_parts + 1)]
        assert [job for jobs in found for job in jobs] == list(planned.jobs)
        sizes = [sum(map(planned.num_work_bytes, jobs)) for jobs in found]
        assert max(sizes) <= sum(sizes) / num_parts + largest


@pytest.mark.parametrize("part", [0, 4, -1])
def test_a_part_that_is_not_there_is_refused(planned: Plan, part: int) -> None:
    with pytest.raises(ArgumentError, match=f"part: found {part} of 3"):
        part_of(planned, part, 3)


def test_a_finished_output_is_not_written_again(
    planned: Plan, plan_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    outliermerge.run(planned, output=output)
    before = output.stat().st_ino
    options = RunOptions(memory="64MiB", threads=2, kernels=True)
    with pytest.raises(OutlierMergeError, match="exists already"):
        run_part(planned, output, 1, 3, options)
    run_part(planned, output, 1, 3, replace(options, overwrite=True))
    assert output.stat().st_ino == before
    outliermerge.run(planned, output=output, overwrite=True)
    assert output.stat().st_ino != before


def _change(models: Path, name: str, content: Path) -> None:
    """Let a model's name lead to other files; their sizes and times are equal."""
    (models / name).unlink(missing_ok=True)
    (models / name).symlink_to(content)


@pytest.mark.parametrize("in_parts", [False, True])
def test_inputs_that_changed_twice_are_compared_for_each_process_that_wrote(
    models: Path, tmp_path: Path, in_parts: bool
) -> None:
    for name, other in [("first", "one"), ("second", "two")]:
        shutil.copytree(models / other, tmp_path / name)
        os.utime(tmp_path / name / "model.safetensors", (1_700_000_000, 1_700_000_000))
    tuned = [{"model": str(tmp_path / "x")}, {"model": str(models / "two")}]
    document = spec(models) | {"models": tuned}
    for number, content in enumerate(("first", "second", "first"), 1):
        _change(tmp_path, "x", tmp_path / content)
        changing = outliermerge.plan(document, shard_size="300kB")
        if number == 3:
            break
        with pytest.raises(KeyboardInterrupt):
            _stop_after(4 * number, changing, tmp_path / "out", in_parts=in_parts)
    outliermerge.run(changing, output=tmp_path / "out", load_check=False)
    outliermerge.run(changing, output=tmp_path / "again", load_check=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def _stop_after(number: int, plan: Plan, output: Path, *, in_parts: bool) -> None:
    written = itertools.count(1)

    def stopping(record: Journal, entry: dict[str, object]) -> None:
        add(record, entry)
        if "tensor" in entry and next(written) == number:
            raise KeyboardInterrupt

    add = Journal.add
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "add", stopping)
        if in_parts:
            options = RunOptions(memory="64MiB", threads=1, kernels=True)
            run_part(plan, output, 1, 1, options)
        else:
            outliermerge.run(plan, output=output, load_check=False, threads=1)


def test_a_part_starts_over_where_its_journal_is_of_another_merge(
    planned: Plan, models: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    options = RunOptions(memory="64MiB", threads=2, kernels=True)
    other = outliermerge.plan(spec(models, parameters={"t": 3.0}), shard_size="300kB")
    run_part(other, tmp_path / "other", 1, 2, options)
    run_part(planned, tmp_path / "out", 2, 2, options)
    name = "{}.partial.journal.1-of-2"
    shutil.copy(tmp_path / name.format("other"), tmp_path / name.format("out"))
    assert run_part(planned, tmp_path / "out", 1, 2, options) > 0
    result = outliermerge.run(planned, output=tmp_path / "out")
    assert result.num_resumed == NUM_TENSORS
    assert contents(tmp_path / "out") == expected
