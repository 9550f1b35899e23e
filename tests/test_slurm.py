"""The scripts and the program of `examples/` for Slurm: parts as an array, then a join."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import slurm_cluster
import torch
import yaml
from bucket_server import BucketServer
from checkpoints import save_tensors
from documents import ROOT
from outputs_elsewhere import files_of
from waiting import LIMIT_SECONDS

import outliermerge

NUM_PARTS = 4
SUBMIT = ROOT / "examples" / "slurm" / "submit.sh"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with models, merge.yaml, and programs on the PATH."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "task"):
        tensors = {f"w{n}": torch.randn(40, 30, generator=generator) for n in range(11)}
        save_tensors(tmp_path / name, tensors)
    spec = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "task"), "parameters": {"density": 0.5}}],
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(spec))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    _program(tmp_path / "bin" / "outliermerge", "-m outliermerge")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    return tmp_path


def _program(path: Path, words: str) -> None:
    path.write_text(f'#!/bin/sh\nexec {json.dumps(sys.executable)} {words} "$@"\n')
    path.chmod(0o755)


def _submit(
    place: Path, environment: dict[str, str], output: str = "", flags: Sequence[str] = ()
) -> tuple[str, str]:
    """Submit the merge; return the numbers of the array and of the join."""
    words = [str(place / "merge.yaml"), output or str(place / "out"), str(NUM_PARTS), *flags]
    command = [str(SUBMIT), *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.replace(";", "").split()
    return words[3], words[6]


def _assert_joined(place: Path) -> None:
    logs = "\n".join(f"{p.name}: {p.read_text()}" for p in sorted(place.glob("slurm-*.out")))
    assert (place / "out").is_dir(), logs
    outliermerge.run(place / "merge.yaml", output=place / "whole")
    for name in ("model.safetensors", "outliermerge.json"):
        assert (place / "out" / name).read_bytes() == (place / "whole" / name).read_bytes()
    for number in range(1, NUM_PARTS + 1):
        assert f"part {number}/{NUM_PARTS} of {place / 'out'} is done" in logs
    assert f"joined {place / 'out'}: 11 tensors" in logs


def test_the_scripts_for_slurm_are_carried_out_by_plain_processes(place: Path) -> None:
    _program(place / "bin" / "sbatch", str(ROOT / "tests" / "stand_in_sbatch.py"))
    assert _submit(place, dict(os.environ)) == ("1", "2")
    _assert_joined(place)
    assert (place / "job-1").read_text() == "0 0 0 0"


@pytest.mark.parametrize("in_store", [False, True])
def test_flags_behind_the_number_go_to_the_parts_and_to_the_join_of_plain_processes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_store: bool
) -> None:
    _program(place / "bin" / "sbatch", str(ROOT / "tests" / "stand_in_sbatch.py"))
    flags = ["--shard-size", "12KB", "--no-load-check"]
    with BucketServer(tmp_path / "served") as server:
        output = "s3://bucket/out" if in_store else str(place / "out")
        _submit(place, {**os.environ, **server.s3()}, output, flags)
        assert (place / "job-1").read_text() == "0 0 0 0"
        assert (place / "job-2").read_text() == "0", (place / "slurm-2.out").read_text()
        found = server.objects("out/") if in_store else files_of(place / "out")
    outliermerge.run(place / "merge.yaml", output=place / "whole", shard_size="12KB")
    assert found == files_of(place / "whole")
    assert sum(name.endswith(".safetensors") for name in found) == 6  # of two tensors each


def test_where_a_part_fails_the_join_says_by_plain_processes_which_is_to_be_run_again(
    place: Path,
) -> None:
    _program(place / "bin" / "sbatch", str(ROOT / "tests" / "stand_in_sbatch.py"))
    words = f'if [ "$SLURM_ARRAY_TASK_ID" = 3 ]; then exit 7; fi\nexec {sys.executable}'
    (place / "bin" / "outliermerge").write_text(f'#!/bin/sh\n{words} -m outliermerge "$@"\n')
    _submit(place, dict(os.environ))
    assert (place / "job-1").read_text() == "0 0 7 0"
    assert (place / "job-2").read_text() == "1"
    said = (place / "slurm-2.out").read_text()
    assert "is not whole, 1 of 4 parts are not done" in said
    assert f"outliermerge run {place}/merge.yaml -o {place}/out --part 3/4" in said
    _program(place / "bin" / "outliermerge", "-m outliermerge")
    part, join = (SUBMIT.with_name(f"{name}.sbatch") for name in ("part", "join"))
    same = [str(place / "merge.yaml"), str(place / "out")]
    subprocess.run(["sbatch", "--parsable", "--array=3", part, *same, "4"], check=True)
    subprocess.run(["sbatch", "--parsable", "--dependency=afterany:3", join, *same], check=True)
    _assert_joined(place)


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if why := slurm_cluster.missing():
        pytest.skip(f"no Slurm: {why}")
    cluster = slurm_cluster.slurm(tmp_path_factory.mktemp("slurm"))
    try:
        environment = cluster.__enter__()
    except slurm_cluster.CannotStart as error:
        pytest.skip(f"no Slurm: {error}")
    yield environment
    cluster.__exit__(None, None, None)


def test_the_scripts_for_slurm_are_carried_out_by_slurm(place: Path, slurm: dict[str, str]) -> None:
    path = {"PATH": f"{place / 'bin'}:{slurm['PATH']}"}
    environment = slurm | path | {"PYTHONPATH": os.environ["PYTHONPATH"]}
    parts, join = _submit(place, environment)
    end = time.monotonic() + LIMIT_SECONDS
    while _queue(environment):
        assert time.monotonic() < end, _queue(environment)
        time.sleep(0.5)
    assert {path.name for path in place.glob("slurm-*.out")} == {
        f"slurm-{join}.out", *(f"slurm-{parts}_{n}.out" for n in range(1, NUM_PARTS + 1))
    }  # fmt: skip
    _assert_joined(place)


def _queue(environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["squeue", "--noheader"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_program_for_submitit_merges_on_this_machine(place: Path) -> None:
    pytest.importorskip("submitit")
    program = ROOT / "examples" / "submitit_merge.py"
    arguments = [str(place / "merge.yaml"), str(place / "out"), "3", "local"]
    done = subprocess.run(
        [sys.executable, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert f"joined: {place / 'out'}" in done.stdout
    written = json.loads(done.stdout.partition("tensors written: ")[2].partition("\n")[0])
    assert (len(written), sum(written)) == (3, 11)
    assert outliermerge.verify(place / "out") == []
