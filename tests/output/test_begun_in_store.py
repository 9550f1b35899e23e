"""An output of which nothing is finished is begun anew by any merge, without a flag."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_server import BucketServer
from outputs_elsewhere import NAMES, bucket_served, files_of, save_layers, spec_of
from waiting import LIMIT_SECONDS

import outliermerge
from outliermerge.errors import OutlierMergeError
from outliermerge.output.bucket_folder import BucketFolder
from outliermerge.output.part_states import states_of_all

pytest.importorskip("obstore")

OUT, ADDRESS, MANIFEST = "out/merged/", "s3://bucket/out/merged", "outliermerge.json"
SHARD_SIZE = "320KB"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        save_layers(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def linear(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the corrected merge."""
    folder = tmp_path_factory.mktemp("alone") / "merged"
    return files_of(Path(str(_run(spec_of(models, "linear"), str(folder)).output)))


@pytest.fixture
def server(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BucketServer]:
    with bucket_served(tmp_path / "served", monkeypatch) as served:
        yield served


def _run(spec: dict[str, Any], output: str = ADDRESS, **more: Any) -> outliermerge.RunResult:
    return outliermerge.run(spec, output=output, shard_size=SHARD_SIZE, **more)


def _wrong(models: Path) -> dict[str, Any]:
    """A merge whose values are infinite."""
    return spec_of(models, "task_arithmetic") | {"parameters": {"weight": 1e30}}


def _refuse_first_file(method: str, name: str, part: int) -> str:
    return "403" if "model-00001" in name and (part or method == "POST") else ""


def _nothing(method: str, name: str, part: int) -> str:
    return ""


def test_a_run_that_fails_before_its_first_file_leaves_nothing(
    models: Path, server: BucketServer, linear: dict[str, bytes]
) -> None:
    server.write_fault = _refuse_first_file
    with pytest.raises(OutlierMergeError, match=r"model-00001.* cannot be written"):
        _run(spec_of(models))
    assert server.objects() == {} and not server.uploads
    server.write_fault = _nothing
    _run(spec_of(models, "linear"))
    assert server.objects(OUT) == linear


def test_a_run_that_fails_in_its_first_tensor_leaves_nothing(
    models: Path, server: BucketServer, tmp_path: Path
) -> None:
    wrong = _wrong(models)
    with pytest.raises(OutlierMergeError, match="infinite"):
        _run(wrong)
    assert server.objects() == {}


def _killed(
    server: BucketServer, tmp_path: Path, spec: dict[str, Any], when: str, *more: str
) -> None:
    """Kill a run when an object whose name has some text is written."""
    (tmp_path / "spec.json").write_text(json.dumps(spec))

    def kill(name: str, part: int) -> None:
        if when in name:
            server.on_write = lambda name, part: None
            process.send_signal(signal.SIGKILL)
            process.wait()

    server.on_write = kill
    words = ["run", str(tmp_path / "spec.json"), "-o", ADDRESS, "--shard-size", SHARD_SIZE, "-q"]
    driver = (
        "import sys; from outliermerge.cli.main import main; from outliermerge.storage import "
        "bucket; bucket.PART_BYTES = 50_000; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver, *words, *more])
    assert process.wait(LIMIT_SECONDS) == -signal.SIGKILL


def test_a_run_that_is_killed_in_its_first_file_gives_way(
    models: Path, server: BucketServer, linear: dict[str, bytes], tmp_path: Path
) -> None:
    _killed(server, tmp_path, spec_of(models), "model-00001")
    assert server.objects(OUT).keys() == {".outliermerge/run.jsonl"}
    _run(spec_of(models, "linear"))
    assert server.objects(OUT) == linear


def test_a_run_that_is_killed_after_its_first_file_does_not(
    models: Path, server: BucketServer, tmp_path: Path
) -> None:
    _killed(server, tmp_path, spec_of(models), "model-00002")
    with pytest.raises(OutlierMergeError, match=r"by another merge \(process \d+ on .*, since"):
        _run(spec_of(models, "linear"))
    assert _run(spec_of(models)).num_resumed > 0


def test_a_run_that_goes_on_elsewhere_does_not(
    models: Path, server: BucketServer, tmp_path: Path
) -> None:
    """Whether a process of another machine has ended, nobody can tell."""
    _killed(server, tmp_path, spec_of(models), "model-00001")
    record = server.folder / "bucket" / OUT / ".outliermerge" / "run.jsonl"
    from outliermerge.output.journal import entry_line, entry_of

    first, second = record.read_bytes().splitlines()
    entry = entry_of(second)
    assert entry is not None
    entry["process"]["host"] = "elsewhere"
    record.write_bytes(first + b"\n" + entry_line(entry))
    with pytest.raises(OutlierMergeError, match=r"by another merge \(process \d+ on elsewhere"):
        _run(spec_of(models, "linear"))


def test_a_run_that_is_alive_does_not(models: Path, server: BucketServer) -> None:
    said: list[str] = []

    def overtake(name: str, part: int) -> None:
        if "model-00001" in name and part == 1:
            server.on_write = lambda name, part: None
            with pytest.raises(OutlierMergeError, match="was begun by another merge") as caught:
                _run(spec_of(models, "linear"))
            said.append(str(caught.value))

    server.on_write = overtake
    _run(spec_of(models))
    assert f"(process {os.getpid()} on " in said[0]
    assert outliermerge.verify(ADDRESS) == []


@pytest.mark.parametrize("how", ["fails", "killed"])
@pytest.mark.sampled(2)
def test_an_old_output_that_lost_its_manifest_is_known_as_ours(
    models: Path, server: BucketServer, linear: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    outliermerge.run(spec_of(models), output=ADDRESS, shard_size="200KB")
    if how == "killed":
        _killed(server, tmp_path, spec_of(models, "task_arithmetic"), "model-00001", "--overwrite")
    else:
        server.write_fault = _refuse_first_file
        with pytest.raises(OutlierMergeError, match="cannot be written"):
            _run(spec_of(models), overwrite=True)
        server.write_fault = _nothing
    assert MANIFEST not in server.objects(OUT)
    _run(spec_of(models, "linear"))
    assert server.objects(OUT) == linear


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.sampled(2)
def test_an_old_output_that_is_whole_is_replaced_only_when_asked(
    models: Path, server: BucketServer, tmp_path: Path, method: str
) -> None:
    """A run with --overwrite was killed before it wrote anything."""
    outliermerge.run(spec_of(models), output=ADDRESS, shard_size="200KB")
    before = server.objects(OUT)
    _killed(server, tmp_path, spec_of(models), "run.jsonl", "--overwrite")
    with pytest.raises(OutlierMergeError, match="exists already"):
        _run(spec_of(models, method))
    left = {n: c for n, c in server.objects(OUT).items() if not n.startswith(".outliermerge/")}
    assert left == before
    _run(spec_of(models, method), overwrite=True)
    local = files_of(Path(str(_run(spec_of(models, method), f"{tmp_path}/local").output)))
    assert server.objects(OUT) == local


def test_parts_that_were_stopped_before_they_were_counted_are_none(
    models: Path, server: BucketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a cluster's driver begins them, instead of looking for how many there are."""
    plan = outliermerge.plan(spec_of(models), shard_size=SHARD_SIZE)
    options = outliermerge.RunOptions().in_parts()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BucketFolder, "share", stop)
        with pytest.raises(KeyboardInterrupt):
            outliermerge.run_part(plan, ADDRESS, 1, 2)
    assert server.objects(OUT).keys() == {".outliermerge/run.jsonl"}
    assert states_of_all([(plan, ADDRESS)], options) == [None]
    with pytest.raises(OutlierMergeError, match="not divided into parts"):
        outliermerge.join(plan, ADDRESS)
    for number in (1, 2):
        assert outliermerge.run_part(plan, ADDRESS, number, 2) > 0
    (states,) = states_of_all([(plan, ADDRESS)], options)
    assert states is not None and all(state.is_whole for state in states)
    outliermerge.join(plan, ADDRESS)
    assert outliermerge.verify(ADDRESS) == []
