"""Sweeps and kept stages in a store: the bytes of a local run, and all of them in the end."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_server import BucketServer
from outputs_elsewhere import NAMES, bucket_served, files_of, save_layers, spec_of
from waiting import LIMIT_SECONDS

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import ArgumentError, OutlierMergeError

pytest.importorskip("obstore")

ADDRESS, MANIFEST, RECORDS = "s3://bucket/swept", "outliermerge.json", ".outliermerge/"
LAMBDAS = {"lambda": [0.5, 1.0]}
SHARD_SIZE = "320KB"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        save_layers(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def swept(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of each merge for itself, as a store's outputs are made."""
    folder = tmp_path_factory.mktemp("swept")
    for variant in outliermerge.plan_sweep(spec_of(models), LAMBDAS, shard_size=SHARD_SIZE):
        outliermerge.run(variant.plan, output=folder / variant.name)
    return files_of(folder)


@pytest.fixture
def server(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BucketServer]:
    with bucket_served(tmp_path / "served", monkeypatch) as served:
        yield served


def _sweep(models: Path, **more: Any) -> list[outliermerge.RunResult]:
    return outliermerge.sweep(
        spec_of(models), LAMBDAS, output=ADDRESS, shard_size=SHARD_SIZE, **more
    )


def test_a_sweep_has_an_address_for_each_merge(
    models: Path, server: BucketServer, swept: dict[str, bytes], tmp_path: Path
) -> None:
    results = _sweep(models)
    assert [result.output for result in results] == [
        f"{ADDRESS}/lambda=0.5",
        f"{ADDRESS}/lambda=1.0",
    ]
    assert server.objects("swept/") == swept
    assert [result.num_resumed for result in results] == [0, 0]
    with pytest.raises(OutlierMergeError, match=r"lambda=0\.5: exists already"):
        _sweep(models)
    assert [result.num_resumed for result in _sweep(models, overwrite=True)] == [0, 0]
    assert server.objects("swept/") == swept


@pytest.mark.parametrize("number", [*range(0, 60, 2)])
@pytest.mark.sampled(8)
def test_a_sweep_may_break_at_any_request(
    models: Path, server: BucketServer, swept: dict[str, bytes], number: int
) -> None:
    """Refuse all that is written from some request on, as if the process had been killed there."""
    server.write_fault = lambda *_: "403" if len(server.written) > number else ""
    try:
        _sweep(models)
    except OutlierMergeError as error:
        assert ADDRESS in str(error)
    server.write_fault = lambda *_: ""
    there = server.objects("swept/")
    for name in ("lambda=0.5", "lambda=1.0"):
        own = {file: content for file, content in there.items() if file.startswith(f"{name}/")}
        if f"{name}/{MANIFEST}" in own:
            whole = {file: content for file, content in own.items() if RECORDS not in file}
            assert whole == {f: c for f, c in swept.items() if f.startswith(f"{name}/")}
    has_all = {name for name in there if RECORDS not in name} == swept.keys()
    is_done = has_all and not any(RECORDS in name for name in there)
    if not is_done:
        _sweep(models)
    assert server.objects("swept/") == swept


def test_what_is_finished_is_not_made_again(
    models: Path, server: BucketServer, swept: dict[str, bytes]
) -> None:
    server.write_fault = lambda method, name, part: "403" if "1.0/model-00002" in name else ""
    with pytest.raises(OutlierMergeError, match="model-00002"):
        _sweep(models)
    server.write_fault = lambda method, name, part: ""
    server.written.clear()
    first, second = _sweep(models)
    assert first.num_resumed == len(first.manifest["tensors"])
    assert 0 < second.num_resumed < first.num_resumed
    made = {name for _, name, _ in server.written if "/model-" in name and RECORDS not in name}
    assert all("1.0/model-0000" in name and "00001" not in name[-24:-12] for name in made)
    assert server.objects("swept/") == swept


def test_the_command_says_what_was_made(
    models: Path, server: BucketServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(spec_of(models)))
    words = ["sweep", str(tmp_path / "spec.json"), "--set", "lambda=0.5,1", "-o", ADDRESS]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"in {ADDRESS}:" in said and "lambda=0.5" in said
    assert outliermerge.verify(f"{ADDRESS}/lambda=1") == []


def _staged(models: Path) -> dict[str, Any]:
    both = [{"model": f"{models}/a"}, {"model": f"{models}/b"}]
    stage = {"name": "half", "merge_method": "linear", "models": both}
    return {
        "stages": [stage],
        "merge_method": "linear",
        "models": [{"model": "half"}, {"model": f"{models}/base"}],
    }


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_kept_stage_is_written_beside_the_output(
    models: Path,
    server: BucketServer,
    tmp_path: Path,
    in_parts: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(_staged(models)))
    same = [str(tmp_path / "spec.json"), "--keep", "half", "--shard-size", SHARD_SIZE]
    assert main(["run", *same, "-o", str(tmp_path / "local")]) == 0
    if in_parts:
        for number in (2, 1):
            assert main(["run", *same, "-o", "s3://bucket/there", "--part", f"{number}/2"]) == 0
        assert main(["join", *same, "-o", "s3://bucket/there"]) == 0
    else:
        assert main(["run", *same, "-o", "s3://bucket/there"]) == 0
    said = capsys.readouterr().out
    assert "s3://bucket/there-half" in said
    for name in ("", "-half"):
        assert server.objects(f"there{name}/") == files_of(tmp_path / f"local{name}")


def test_names_that_no_address_can_have_are_refused(models: Path, server: BucketServer) -> None:
    spec = _staged(models)
    spec["stages"][0]["name"] = "a?b"
    spec["models"][0]["model"] = "a?b"
    with pytest.raises(ArgumentError, match="expected a folder of a bucket"):
        outliermerge.run(spec, output=ADDRESS, keep=["a?b"])
    with pytest.raises(ArgumentError, match="a web server takes no outputs"):
        outliermerge.sweep(spec_of(models), LAMBDAS, output="https://host/swept")
    assert not server.written


KEEP = ["run", "--keep", "half", "-o", "s3://bucket/there"]
COMMANDS = {
    "a sweep": [["sweep", "--set", "lambda=0.5,1", "-o", ADDRESS]],
    "a kept stage": [KEEP],
    "parts and a kept stage": [
        [*KEEP, "--part", "1/2"],
        [*KEEP, "--part", "2/2"],
        ["join", *KEEP[1:]],
    ],
}
DRIVER = """
import sys
from outliermerge.cli.main import main
from outliermerge.output import bucket_writer
from outliermerge.storage import bucket
bucket.PART_BYTES, bucket_writer.WINDOW_BYTES = 50_000, 100_000
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.faults
@pytest.mark.parametrize("what", COMMANDS)
def test_commands_that_are_killed_again_and_again_go_on(
    models: Path,
    server: BucketServer,
    tmp_path: Path,
    what: str,
    record_property: Callable[..., None],
) -> None:
    spec = spec_of(models) if what == "a sweep" else _staged(models)
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    draw, kills = random.Random(what), 0
    for command, *words in COMMANDS[what]:
        line = [command, str(tmp_path / "spec.json"), *words, "--shard-size", SHARD_SIZE, "-q"]
        while True:
            process: subprocess.Popen[bytes] | None = None
            left = [draw.randrange(1, 40)]

            def kill(name: str, part: int, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    assert process is not None  # noqa: B023
                    process.send_signal(signal.SIGKILL)  # noqa: B023
                    process.wait()  # noqa: B023

            server.on_write = kill
            process = subprocess.Popen([sys.executable, "-c", DRIVER, *line])
            if process.wait(LIMIT_SECONDS) == 0:
                break
            assert process.returncode == -signal.SIGKILL
            kills += 1
    server.on_write = lambda name, part: None
    for address in {name.partition("/")[0] for name in server.objects()}:
        local = tmp_path / "local" / address
        if what == "a sweep":
            continue
        if not local.exists():
            outliermerge.run(
                spec, output=tmp_path / "local" / "there", shard_size=SHARD_SIZE, keep=["half"]
            )
        assert server.objects(f"{address}/") == files_of(local)
    if what == "a sweep":
        for variant in outliermerge.plan_sweep(spec, {"lambda": [0.5, 1]}, shard_size=SHARD_SIZE):
            outliermerge.run(variant.plan, output=tmp_path / "local" / variant.name)
        assert server.objects("swept/") == files_of(tmp_path / "local")
    assert kills
    record_property("points", kills)
