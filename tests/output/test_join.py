"""`run --part K/N` and `join`: parts of a merge on the command line, and what finishes them."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import save_tensors
from kinds import KINDS, STAGE, command, save_models, save_specs
from waiting import LIMIT_SECONDS, held, stopped

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.execution import threads
from outliermerge.output.division import divided, part_costs, part_work_bytes
from outliermerge.output.journal import Journal, parts
from outliermerge.output.names import journal_path

NUM_TENSORS = 9


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models and a spec of each of some methods, and Llamas with a spec of each kind."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {f"w{n}": torch.randn(30 + 5 * n, 40, generator=generator) for n in range(NUM_TENSORS)}
    for name in ("base", "one", "two"):
        moved = {k: t + 0.01 * torch.randn(t.shape, generator=generator) for k, t in base.items()}
        buffer = {"ids": torch.arange(5)}  # that must be equal
        save_tensors(root / name, base if name == "base" else moved)
        save_tensors(root / "equal" / name, (base if name == "base" else moved) | buffer)
    for method, parameters in {
        "ties": {"density": 0.4},
        "task_arithmetic": {"weight": 0.5},
        "model": {"density": 0.4, "trim": "model"},
    }.items():
        document = {
            "merge_method": "ties" if method == "model" else method,
            "base_model": str(root / "base"),
            "models": [{"model": str(root / "one")}, {"model": str(root / "two")}],
            "parameters": parameters,
        }
        (root / f"{method}.yaml").write_text(yaml.safe_dump(document))
    equal = (root / "task_arithmetic.yaml").read_text().replace(str(root), str(root / "equal"))
    (root / "equal.yaml").write_text(equal)
    save_models(root / "llamas")
    save_specs(root, root / "llamas")
    return root


def words(models: Path, kind: str, output: Path, *more: str) -> list[str]:
    word = command(kind) if kind in KINDS else "run"
    quick = ["--no-routing"] if word == "moe" else []
    return [word, str(models / f"{kind}.yaml"), "-o", str(output), "--threads", "2", *quick, *more]


def join(models: Path, kind: str, output: Path, *more: str) -> list[str]:
    return ["join", str(models / f"{kind}.yaml"), "-o", str(output), "--threads", "2", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["ties", "model", *KINDS])
def test_parts_of_every_kind_of_merge_are_joined_to_the_bytes_of_a_run(
    models: Path, tmp_path: Path, kind: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    for part in ("2/3", "3/3", "1/3"):
        assert cli.main(words(models, kind, output, "--part", part)) == 0
    assert not output.exists()
    assert f"part 1/3 of {output} is done: " in capsys.readouterr().out
    assert cli.main(join(models, kind, output)) == 0
    assert f"joined {output}: " in capsys.readouterr().out
    whole = tmp_path / "whole" / "out"
    assert cli.main(words(models, kind, whole)) == 0
    assert contents(output) == contents(whole)
    assert cli.main(["verify", str(output)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_a_part_says_what_it_did_and_does_it_once(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(models, "ties", tmp_path / "out", "--part", "1/2", "--json")
    assert cli.main(line) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["part"], first["num_parts"], first["output"]) == (1, 2, str(tmp_path / "out"))
    assert first["num_written"] == first["num_tensors"] > 0
    assert cli.main(line) == 0
    assert json.loads(capsys.readouterr().out)["num_written"] == 0


def test_join_names_the_parts_that_lack_tensors_with_commands_that_write_them(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    more = ("--shard-size", "20kB", "--no-kernels")
    assert cli.main(words(models, "ties", output, "--part", "2/4", *more)) == 0
    capsys.readouterr()
    assert cli.main(join(models, "ties", output, *more)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {output}: is not whole, 3 of 4 parts are not done:\n")
    sizes = [len(jobs) for jobs in divided(outliermerge.plan(models / "ties.yaml"), 4)]
    assert f"part 1/4 lacks {sizes[0]} of {sizes[0]} tensors" in said.err
    assert "part 2/4" not in said.err
    assert cli.main(join(models, "ties", output, "--json", *more)) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["whole"], found["output"]) == (False, str(output))
    assert [part["command"] is None for part in found["parts"]] == [False, True, False, False]
    assert [len(part["lacking"]) for part in found["parts"]] == [sizes[0], 0, *sizes[2:]]
    lines = [line.strip() for line in said.err.splitlines() if "outliermerge run" in line]
    assert lines == [part["command"] for part in found["parts"] if part["command"]]
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "outliermerge"
        assert cli.main(arguments) == 0
    assert cli.main(join(models, "ties", output, *more)) == 0


def test_join_finds_a_damaged_tensor_and_its_part_mends_it(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    for part in ("1/2", "2/2"):
        assert cli.main(words(models, "ties", output, "--part", part)) == 0
    planned = outliermerge.plan(models / "ties.yaml")
    job = divided(planned, 2)[1][1]
    shard = tmp_path / "out.partial" / job.output.file
    data = bytearray(shard.read_bytes())
    data[job.output.offset + 5] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert cli.main(join(models, "ties", output, "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    assert [part["lacking"] for part in found["parts"]] == [[], [job.name]]
    assert not output.exists()
    assert cli.main(words(models, "ties", output, "--part", "2/2", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["num_written"] == 1
    assert cli.main(join(models, "ties", output)) == 0
    assert outliermerge.verify(output) == []


def test_join_says_that_a_part_is_being_written(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert cli.main(words(models, "ties", output, "--part", "1/2")) == 0
    process = subprocess.Popen(held(1, "after", *words(models, "ties", output, "--part", "2/2")))
    assert stopped(process)
    try:
        capsys.readouterr()
        assert cli.main(join(models, "ties", output)) == 1
        said = capsys.readouterr().err
        assert f"part 2/2 is being written (process {process.pid} on " in said
        assert "Wait until they are done, then join again." in said
        assert cli.main(words(models, "ties", output, "--part", "2/2")) == 1
        assert "another run of part 2-of-2" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=LIMIT_SECONDS) == 0
    assert cli.main(join(models, "ties", output)) == 0


@pytest.mark.parametrize("part", ["0/16", "17/16", "3", "3/0", "-1/4", "x/y", "3/16/2", ""])
def test_no_part_is_refused(
    models: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(models, "ties", tmp_path / "out", f"--part={part}")) == 2
    said = capsys.readouterr().err
    assert f"error: argument --part: found {part!r}, expected K/N, such as 3/16" in said
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_was_removed_by_hand_is_named(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert cli.main(words(models, "ties", output, "--part", "1/2")) == 0
    journal_path(output).unlink()
    capsys.readouterr()
    for word, said in (("join", "is missing"), ("run", "goes on only with its")):
        assert cli.main([word, *words(models, "ties", output)[1:4]]) == 1
        told = capsys.readouterr().err
        assert said in told and journal_path(output).name in told
    assert parts(output) == ["1-of-2"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--part", "1/2", "--fresh"], "--fresh: a part does not start over"),
        (["--part", "1/2", "--executor", "ray"], "--part: not with --executor ray"),
        (["--address", "auto"], "--address: only with --executor ray"),
        (["--parts", "3"], "--parts: only with --executor ray"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    models: Path, tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(models, "ties", tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_kept_stages_are_written_in_parts_beside_the_output(
    models: Path, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, keep = tmp_path / "out", ("--keep", STAGE)
    names = {"out", f"out-{STAGE}"}
    assert cli.main(words(models, "stages", output, "--part", "2/2", *keep)) == 0
    assert cli.main(join(models, "stages", output, *keep)) == 1
    assert f"--part 1/2 --keep {STAGE}" in capsys.readouterr().err
    assert not names & {path.name for path in tmp_path.iterdir()}
    assert cli.main(words(models, "stages", output, "--part", "1/2", *keep)) == 0
    assert cli.main(join(models, "stages", output, *keep)) == 0
    assert capsys.readouterr().out.count("joined ") == 2
    assert {path.name for path in tmp_path.iterdir() if "out" in path.name} == names
    whole = tmp_path / "whole" / "out"
    assert cli.main(words(models, "stages", whole, *keep)) == 0
    for name in names:
        assert contents(tmp_path / name) == contents(tmp_path / "whole" / name)


def test_neither_join_nor_a_driver_asks_for_the_gpus_of_the_parts(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole" / "out"
    cuda = ("--device", "cuda")
    with monkeypatch.context() as patch:  # a machine whose GPU is a CPU
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(threads, "devices", lambda name: ["cpu"])
        for part in ("1/2", "2/2"):
            assert cli.main(words(models, "equal", output, "--part", part, *cuda)) == 0
        assert cli.main(words(models, "equal", whole, *cuda)) == 0

    def asked(*_: object) -> None:
        raise AssertionError("asked for a GPU")

    for name in ("is_available", "device_count", "current_device", "_lazy_init", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, asked)
    assert outliermerge.RunOptions(device="cuda:3").in_parts().device == "cuda:3"
    assert cli.main(join(models, "equal", output, *cuda)) == 0
    assert contents(output) == contents(whole)


def test_another_number_of_parts_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert cli.main(words(models, "ties", output, "--part", "3/4")) == 0
    assert cli.main(words(models, "ties", output, "--part", "2/3")) == 2
    said = capsys.readouterr().err
    assert f"error: --part: {output} was begun in 4 parts, not in 3" in said
    assert "remove" in said
    assert parts(output) == ["3-of-4"]
    for path in (tmp_path / "out.partial", journal_path(output), journal_path(output, "3-of-4")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli.main(words(models, "ties", output, "--part", "2/3")) == 0


@pytest.mark.parametrize("made", ["nothing", "output", "run", "another spec"])
def test_join_refuses_what_is_not_in_parts(
    models: Path, tmp_path: Path, made: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    said = "no part of it is being written. Run its parts first, each with --part 1/N to --part N/N"
    if made == "output":
        assert cli.main(words(models, "ties", output)) == 0
        said = "exists already, and no part of it is being written"
    if made == "run":
        process = subprocess.Popen(held(2, "after", *words(models, "ties", output)))
        assert stopped(process)
        process.kill()
        process.wait(timeout=LIMIT_SECONDS)
        said = "was begun by a run that was not divided into parts"
    if made == "another spec":
        assert cli.main(words(models, "task_arithmetic", output, "--part", "1/1")) == 0
        said = "was begun by another merge: the spec"
    before = contents(tmp_path)
    capsys.readouterr()
    assert cli.main(join(models, "ties", output)) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert said in printed.err
    assert "--fresh" not in printed.err
    assert contents(tmp_path) == before


def test_a_join_that_was_stopped_while_it_renamed_is_finished_by_the_next(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outliermerge.output import folder

    output = tmp_path / "out"
    for part in ("1/2", "2/2"):
        assert cli.main(words(models, "ties", output, "--part", part)) == 0

    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder.OutputFolder, "forget", interrupt)
        assert cli.main(join(models, "ties", output)) == 130
    assert output.exists()
    assert cli.main(join(models, "ties", output)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_output_stays_until_the_new_one_is_joined(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert cli.main(words(models, "task_arithmetic", output)) == 0
    old = contents(output)
    assert cli.main(words(models, "ties", output, "--part", "1/2")) == 1
    assert "exists already" in capsys.readouterr().err
    for part in ("1/2", "2/2"):
        assert cli.main(words(models, "ties", output, "--part", part, "--overwrite")) == 0
        assert contents(output) == old
    assert cli.main(join(models, "ties", output, "--overwrite")) == 0
    assert contents(output) != old
    assert outliermerge.verify(output) == []


def test_models_on_a_disk_that_has_another_number_elsewhere_are_the_same(
    models: Path, tmp_path: Path
) -> None:
    """Machines number a disk that they share differently; that is no reason to read it again."""
    output = tmp_path / "out"
    assert cli.main(words(models, "model", output, "--part", "1/1")) == 0
    journal = Journal(output, "1-of-1")
    marks = journal.last("marks")
    journal.close()
    stamp = (models / "base" / "model.safetensors").stat()
    assert marks[str(models / "base" / "model.safetensors")] == [stamp.st_ino, stamp.st_ctime_ns]


def test_plan_says_what_each_part_takes(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", str(models / "model.yaml"), "--threads", "2", "--parts", "3"]
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    planned = outliermerge.plan(models / "model.yaml")
    assert [part["part"] for part in found["parts"]] == [1, 2, 3]
    assert sum(part["num_tensors"] for part in found["parts"]) == NUM_TENSORS
    assert sum(part["read_bytes"] for part in found["parts"]) == planned.num_read_bytes
    written = sum(job.num_written_bytes for job in planned.jobs)
    assert sum(part["write_bytes"] for part in found["parts"]) == written
    assert all(part["memory_bytes"] and part["seconds"] for part in found["parts"])
    # Each part measures the whole model by itself.
    assert all(part["work_bytes"] > planned.work_bytes / 3 for part in found["parts"])
    assert cli.main(line) == 0
    printed = capsys.readouterr().out
    assert "part  tensors" in printed
    assert "3/3" in printed


def test_the_work_of_one_part_is_that_of_the_plan(models: Path) -> None:
    for name in ("ties", "model", "task_arithmetic"):
        planned = outliermerge.plan(models / f"{name}.yaml")
        assert part_work_bytes(planned, planned.jobs) == planned.work_bytes
        options = outliermerge.RunOptions(threads=1).on_this_machine()
        estimate = outliermerge.estimate(planned, threads=1)
        (cost,) = part_costs(planned, 1, options, estimate)
        assert (cost.work_bytes, cost.memory_bytes) == (planned.work_bytes, estimate.process_bytes)
        assert cost.seconds == estimate.seconds


def test_parts_without_tensors_are_done_at_once(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for part in range(1, 21):
        assert cli.main(words(models, "ties", output, "--part", f"{part}/20")) == 0
    assert cli.main(join(models, "ties", output)) == 0


def _kill_at_random(models: Path, folder: Path, seed: int) -> None:
    """Kill each part at random moments until it is done, and check what is joined."""
    chance, output = random.Random(seed), folder / "out"
    left = [1, 2, 3]
    num_kills = 0
    while left:
        part = chance.choice(left)
        line = words(models, "ties", output, "--part", f"{part}/3")
        moment = chance.randint(1, 3), chance.choice(["before", "after"])
        process = subprocess.Popen(held(*moment, *line), stdout=subprocess.DEVNULL)
        if stopped(process) and num_kills < 4:
            process.kill()
            num_kills += 1
        elif process.poll() is None:
            process.send_signal(signal.SIGCONT)
        if process.wait(timeout=LIMIT_SECONDS) == 0:
            left.remove(part)
    assert num_kills >= 2
    assert cli.main(join(models, "ties", output)) == 0
    assert cli.main(words(models, "ties", folder / "whole" / "out")) == 0
    assert contents(output) == contents(folder / "whole" / "out")


def test_parts_killed_at_random_moments_are_joined_to_the_same_bytes(
    models: Path, tmp_path: Path
) -> None:
    _kill_at_random(models, tmp_path, 0)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 25))
def test_parts_killed_at_many_random_moments_are_joined_to_the_same_bytes(
    models: Path, tmp_path: Path, seed: int
) -> None:
    _kill_at_random(models, tmp_path, seed)
