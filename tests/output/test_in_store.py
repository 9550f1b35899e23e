"""Outputs in object stores: the bytes of a local run, never half an output, and going on."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_server import FAULTS, BucketServer
from outputs_elsewhere import NAMES, bucket_served, files_of, save_layers, spec_of, weights_in
from range_server import s3_at
from safetensors.torch import save_file
from waiting import LIMIT_SECONDS

import outliermerge
from outliermerge import RunOptions
from outliermerge.cli.main import main
from outliermerge.errors import ArgumentError, OutlierMergeError
from outliermerge.output import bucket_writer
from outliermerge.storage import bucket as buckets
from outliermerge.storage import ranges
from outliermerge.storage.system import punch

pytest.importorskip("obstore")

OUT, MANIFEST = "out/merged/", "outliermerge.json"
ADDRESS = "s3://bucket/out/merged"
SHARD_SIZE = "320KB"  # two layers
RECORDS = ".outliermerge/"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        save_layers(folder / name, seed)
    return folder


@pytest.fixture
def server(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BucketServer]:
    monkeypatch.chdir(tmp_path)
    with bucket_served(tmp_path / "served", monkeypatch) as served:
        yield served


def _run(spec: dict[str, Any], output: str = ADDRESS, **more: Any) -> outliermerge.RunResult:
    return outliermerge.run(spec, output=output, shard_size=SHARD_SIZE, **more)


def _puts(server: BucketServer) -> Counter[str]:
    """Return how often each weight file was asked to be begun or written."""
    names = [name for method, name, _ in server.written if method == "POST"]
    return Counter(name.rpartition("/")[2] for name in names if name.endswith(".safetensors"))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("ties", {"threads": 1}),
        ("ties", {"threads": 3, "memory": "3MiB"}),
        ("linear", {}),
        ("della", {"kernels": False, "threads": 2, "memory": "4MiB"}),
        ("model_stock", {}),
    ],
)
@pytest.mark.sampled(2)
def test_an_output_in_a_store_is_that_on_a_disk(
    models: Path, server: BucketServer, method: str, more: dict[str, Any]
) -> None:
    local = _run(spec_of(models, method), "local", **more)
    there = _run(spec_of(models, method), **more)
    assert server.objects(OUT) == files_of(Path(local.output))
    assert (there.output, there.manifest) == (ADDRESS, local.manifest)
    assert not server.uploads
    assert outliermerge.verify(ADDRESS) == []


def test_stages_and_slices_go_to_a_store(models: Path, server: BucketServer) -> None:
    def spec() -> dict[str, Any]:
        whole = [{"model": f"{models}/{name}", "layer_range": [0, 4]} for name in ("a", "b")]
        again = [{"model": "mixed", "layer_range": [2, 6]}]
        stage = spec_of(models, "linear") | {"name": "mixed"}
        slices = [{"sources": whole[:1]}, {"sources": again}]
        return {"stages": [stage], "merge_method": "passthrough", "slices": slices}

    local, _ = _run(spec(), "local"), _run(spec())
    assert server.objects(OUT) == files_of(Path(local.output))


def test_models_and_output_may_be_in_the_same_bucket(models: Path, server: BucketServer) -> None:
    for name in NAMES:
        (server.folder / "bucket" / name).mkdir(parents=True)
        for file, content in files_of(models / name).items():
            (server.folder / "bucket" / name / file).write_bytes(content)
    local = _run(spec_of(models), "local")
    _run(spec_of("s3://bucket"))
    assert weights_in(server.objects(OUT)) == weights_in(files_of(Path(local.output)))
    for output in ("s3://bucket/base", "s3://bucket/base/new"):
        with pytest.raises(OutlierMergeError, match=r"is, holds or is inside the model .*/base"):
            _run(spec_of("s3://bucket"), output)


def test_a_run_that_could_not_write_goes_on_with_whole_files(
    models: Path, server: BucketServer
) -> None:
    local = _run(spec_of(models), "local")
    for number in range(1, 4):

        def fault(method: str, name: str, part: int, number: int = number) -> str:
            return "500" if f"model-0000{number}" in name and part > 1 else ""

        server.write_fault = fault
        with pytest.raises(OutlierMergeError) as caught:
            _run(spec_of(models))
        assert f"{ADDRESS}/model-0000{number}-of-00003.safetensors: cannot be written" in str(
            caught.value
        )
        there = server.objects(OUT)
        assert MANIFEST not in there and f"model-0000{number}-of-00003.safetensors" not in there
        left = "is an output that is not finished" if number > 1 else "nothing is there"
        with pytest.raises(OutlierMergeError, match=left):
            outliermerge.verify(ADDRESS)
    server.write_fault = lambda method, name, part: ""
    before = _puts(server)
    done = _run(spec_of(models))
    files = [entry["file"] for entry in done.manifest["tensors"].values()]
    assert done.num_resumed == len(files) - files.count("model-00003-of-00003.safetensors") > 0
    assert _puts(server) - before == {"model-00003-of-00003.safetensors": 2}  # begun, and ended
    assert weights_in(server.objects(OUT)) == weights_in(files_of(Path(local.output)))
    assert not [name for name in server.objects(OUT) if name.startswith(RECORDS)]


@pytest.mark.parametrize("num_faults", [25, pytest.param(500, marks=pytest.mark.faults)])
def test_faults_never_give_wrong_bytes(
    models: Path,
    server: BucketServer,
    num_faults: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[..., None],
) -> None:
    monkeypatch.setattr(ranges, "STALL_SECONDS", 0.1)
    server.stall_seconds = 0.6
    draw, did = random.Random(3), Counter[str]()
    wanted = files_of(Path(_run(spec_of(models), "local").output))

    def fault(method: str, name: str, part: int) -> str:
        kind = draw.choice(FAULTS) if draw.random() < 0.25 else ""
        did[kind] += 1
        return kind

    number = 0
    while did.total() - did[""] < num_faults:
        number += 1
        server.write_fault = fault
        address, refused = f"{ADDRESS}-{number}", 0
        while True:
            try:
                _run(spec_of(models), address)
                break
            except OutlierMergeError as error:
                refused += 1
                assert address in str(error) and refused < 20
        server.write_fault = lambda method, name, part: ""
        there = server.objects(f"out/merged-{number}/")
        assert {name: there[name] for name in wanted} == wanted
        assert there.keys() == wanted.keys()
    record_property("points", did.total() - did[""])
    assert all(did[kind] for kind in FAULTS)


DRIVER = """
import sys
from outliermerge.cli.main import main
from outliermerge.output import bucket_writer
from outliermerge.storage import bucket
bucket.PART_BYTES, bucket_writer.WINDOW_BYTES = 50_000, 100_000
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("num_kills", [2, pytest.param(60, marks=pytest.mark.faults)])
def test_a_run_that_is_killed_goes_on(
    models: Path, server: BucketServer, num_kills: int, tmp_path: Path
) -> None:
    """Kill the process while an object or a part of one is written, or right after that."""
    local = _run(spec_of(models), "local")
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_of(models)))
    draw, kills, number = random.Random(1), 0, 0
    while kills < num_kills:
        number += 1
        out = f"out/killed-{number}/"
        command = ["run", str(spec), "-o", f"s3://bucket/{out}", "--shard-size", SHARD_SIZE, "-q"]
        is_done = False
        while not is_done:
            process: subprocess.Popen[bytes] | None = None
            left = [draw.randrange(1, 12) if kills < num_kills else 1000]

            def kill(name: str, part: int, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    assert process is not None  # noqa: B023
                    process.send_signal(signal.SIGKILL)  # noqa: B023
                    process.wait()  # noqa: B023

            server.on_write = kill
            process = subprocess.Popen([sys.executable, "-c", DRIVER, *command])
            is_done = process.wait(LIMIT_SECONDS) == 0
            assert is_done or process.returncode == -signal.SIGKILL
            kills += not is_done
            there = server.objects(out)
            if not is_done and MANIFEST in there:  # then all that is left is to remove the records
                assert weights_in(there) == weights_in(files_of(Path(local.output)))
        there = server.objects(out)
        assert weights_in(there) == weights_in(files_of(Path(local.output)))
        assert there.keys() == files_of(Path(local.output)).keys()
        assert outliermerge.verify(f"s3://bucket/{out}") == []


def test_blocks_that_wait_take_bounded_disk_space(
    models: Path, server: BucketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def punched(descriptor: int, position: int, num_bytes: int) -> bool:
        held.append(os.fstat(descriptor).st_blocks * 512)
        return punch(descriptor, position, num_bytes)

    monkeypatch.setattr(bucket_writer, "punch", punched)
    server.in_bytes_per_second = 1e6  # merging is faster
    _run(spec_of(models, "linear"), threads=2)
    total = sum(len(content) for content in server.objects(OUT).values())
    window = bucket_writer.WINDOW_BYTES
    two_tensors, headers = 2 * 300 * 257 * 2, 3 * 2 * 4096
    assert 0 < max(held) < window + two_tensors + headers + 50_000 < 0.6 * total


def test_the_manifest_comes_last(models: Path, server: BucketServer) -> None:
    _run(spec_of(models))
    names = [name.removeprefix(f"bucket/{OUT}") for method, name, _ in server.written]
    last = names.index(MANIFEST)
    assert names[last + 1 :] == ["bucket"]  # the records are removed
    assert all(name in names[:last] for name in server.objects(OUT) if name != MANIFEST)


def test_two_processes_may_write_one_output(models: Path, server: BucketServer) -> None:
    local = _run(spec_of(models), "local")
    server.latency_seconds = 0.01
    errors: list[BaseException] = []

    def work() -> None:
        try:
            _run(spec_of(models))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.latency_seconds = 0
    # One that comes late does not write into what is finished.
    assert all("another process has finished it" in str(error) for error in errors)
    assert len(errors) < 3
    there = server.objects(OUT)
    assert weights_in(there) == weights_in(files_of(Path(local.output)))
    assert there.keys() == files_of(Path(local.output)).keys()


def test_another_merge_is_refused_while_one_is_unfinished(
    models: Path, server: BucketServer
) -> None:
    server.write_fault = lambda method, name, part: "503" if "model-00002" in name else ""
    with pytest.raises(OutlierMergeError, match="cannot be written"):
        _run(spec_of(models))
    server.write_fault = lambda method, name, part: ""
    with pytest.raises(OutlierMergeError) as caught:
        _run(spec_of(models, "linear"))
    assert re.search(r"was begun by another merge \(process .*\): the spec", str(caught.value))
    assert "Use fresh=True to start over" in str(caught.value)
    with pytest.raises(OutlierMergeError, match="begun by another merge"):
        outliermerge.run(spec_of(models, "linear"), output=ADDRESS, shard_size="200KB")
    done = outliermerge.run(
        spec_of(models, "linear"),
        output=ADDRESS,
        shard_size="200KB",
        options=RunOptions(fresh=True),
    )
    local = outliermerge.run(spec_of(models, "linear"), output="local", shard_size="200KB")
    assert done.num_resumed == 0
    assert server.objects(OUT) == files_of(Path(local.output))


def test_a_merge_that_was_started_over_by_another_does_not_finish(
    models: Path, server: BucketServer
) -> None:
    def start_over(name: str, part: int) -> None:
        if "model-00003" in name and part == 0:
            server.on_write = lambda name, part: None
            record = server.folder / "bucket" / OUT / RECORDS / "run.jsonl"
            text = record.read_bytes()
            record.unlink()
            (server.folder / "bucket" / OUT / "kept").write_bytes(text)

    server.on_write = start_over
    with pytest.raises(OutlierMergeError, match="finished it or started it over meanwhile"):
        _run(spec_of(models))
    assert MANIFEST not in server.objects(OUT)


def test_a_run_that_comes_late_leaves_another_output_alone(
    models: Path, server: BucketServer
) -> None:
    def overtake(name: str, part: int) -> None:
        if "model-00001" in name and part == 0:
            server.on_write = lambda name, part: None
            _run(spec_of(models, "linear"), fresh=True)

    server.on_write = overtake
    with pytest.raises(OutlierMergeError, match="finished it or started it over meanwhile"):
        _run(spec_of(models))
    local = _run(spec_of(models, "linear"), "local")
    assert server.objects(OUT) == files_of(Path(local.output))


def test_weights_that_were_replaced_meanwhile_are_found(models: Path, server: BucketServer) -> None:
    def replace(name: str, part: int) -> None:
        if "model-00003" in name and part == 0:
            server.on_write = lambda name, part: None
            (server.folder / "bucket" / OUT / "model-00001-of-00003.safetensors").write_bytes(b"no")

    server.on_write = replace
    with pytest.raises(OutlierMergeError) as caught:
        _run(spec_of(models, "linear"))
    assert "weight files are not as they were written" in str(caught.value)
    assert "model-00001-of-00003.safetensors" in str(caught.value)
    before = _puts(server)
    _run(spec_of(models, "linear"))
    assert _puts(server) - before == {"model-00001-of-00003.safetensors": 2}
    assert outliermerge.verify(ADDRESS) == []


def test_an_old_output_is_replaced_only_when_asked(models: Path, server: BucketServer) -> None:
    outliermerge.run(spec_of(models, "linear"), output=ADDRESS, shard_size="200KB")
    before = server.objects(OUT)
    with pytest.raises(OutlierMergeError, match="exists already"):
        _run(spec_of(models))
    assert server.objects(OUT) == before
    order: list[tuple[str, bool]] = []

    def note(name: str, part: int) -> None:
        order.append((name, MANIFEST in server.objects(OUT)))

    server.on_write = note
    _run(spec_of(models), overwrite=True)
    server.on_write = lambda name, part: None
    local = _run(spec_of(models), "local")
    assert server.objects(OUT) == files_of(Path(local.output))
    # It is no output from the first weight file on, until the last object.
    begun = next(i for i, (name, _) in enumerate(order) if "model-" in name)
    assert [there for _, there in order[begun:-1]] == [False] * (len(order) - begun - 1)


def test_what_outliermerge_did_not_write_is_left_alone(models: Path, server: BucketServer) -> None:
    folder = server.folder / "bucket" / "out" / "merged"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutlierMergeError, match=r"is not empty, and has no outliermerge.json"):
        _run(spec_of(models), overwrite=True)
    (folder / "notes.txt").unlink()
    _run(spec_of(models))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutlierMergeError, match=r"did not write in the new output:\n.*notes.txt"):
        _run(spec_of(models), overwrite=True)
    with pytest.raises(OutlierMergeError, match="is inside the output s3://bucket/out/merged"):
        _run(spec_of(models), f"{ADDRESS}/deeper")
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("hf://org/name", "outliermerge push"),
        ("https://host/merged", "a web server takes no outputs"),
        ("s3://key:word@bucket/merged", "keys are no part of it"),
        ("s3://bucket", "expected a folder of a bucket: s3://bucket/name"),
        ("s3://bucket/a.safetensors", "leave out .safetensors"),
        ("s3a://bucket/merged", "is no address that an output can have"),
        ("s3:/bucket/merged", "is no address that an output can have"),
        ("s3://", "is no address that an output can have"),
        ("file:///tmp/merged", "is no address that an output can have"),
        ("s3://bucket/a/../b", "no folders `.` and `..`"),
        ("s3://bucket/.", "no folders `.` and `..`"),
        ("s3://bucket/a\tb", "a\\tb: has characters that cannot be printed"),
        ("s3://bucket/" + 1000 * "x", "1,000 bytes, and at most 900"),
    ],
)
def test_addresses_that_take_no_output_are_refused(models: Path, output: str, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        outliermerge.run(spec_of(models), output=output)
    assert said in str(caught.value) and "word" not in str(caught.value)


def test_what_is_not_written_to_a_store_is_refused(models: Path, server: BucketServer) -> None:
    with pytest.raises(ArgumentError, match="is a single file and so is the output"):
        files = [{"model": f"{models}/{name}/model.safetensors"} for name in "ab"]
        outliermerge.run({"merge_method": "linear", "models": files}, output=ADDRESS)
    assert not server.written


def test_parts_write_whole_files_and_are_joined(
    models: Path, server: BucketServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_of(models)))
    run = ["run", str(spec), "-o", ADDRESS, "--shard-size", SHARD_SIZE]
    join = ["join", str(spec), "-o", ADDRESS, "--shard-size", SHARD_SIZE]
    assert main([*join]) == 1 and "no part of it is being written" in capsys.readouterr().err
    assert main([*run, "--part", "2/2"]) == 0
    assert main([*run, "--part", "2/2", "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out.split("written in")[-1].partition("\n")[2])[
            "num_written"
        ]
        == 0
    )
    assert main([*run, "--part", "1/3"]) == 2
    said = capsys.readouterr().err
    over = f"To start over, stop all parts and remove all that is in {ADDRESS}/."
    assert "was begun in 2 parts, not in 3" in said and over in said
    assert main([*run, "--part", "1/2", "--fresh"]) == 2 and over in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(json.dumps(spec_of(models, "linear")))
    assert main(["run", str(other), *run[2:], "--part", "1/2"]) == 1
    said = capsys.readouterr().err
    assert "was begun by another merge" in said and over in said and "--fresh" not in said
    assert main([*join]) == 1
    said = capsys.readouterr().err
    assert "part 1/2 lacks" in said and "part 2/2" not in said
    assert f"-o {ADDRESS} --part 1/2" in said
    assert MANIFEST not in server.objects(OUT)
    assert main([*run, "--part", "1/2"]) == 0
    (server.folder / "bucket" / OUT / "model-00002-of-00003.safetensors").write_bytes(b"damaged")
    assert main([*join]) == 1
    assert "part 2/2 lacks 4 of 8 tensors" in capsys.readouterr().err
    assert main([*run, "--part", "2/2"]) == 0
    capsys.readouterr()
    assert main([*join]) == 0
    said = capsys.readouterr().out  # what is not read back is not said to be
    assert "each weight file of the size and ETag that its part noted" in said
    local = _run(spec_of(models), "local")
    assert server.objects(OUT) == files_of(Path(local.output))


def test_a_plan_shows_parts_of_whole_files(
    models: Path, server: BucketServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_of(models)))
    said = ["plan", str(spec), "-o", ADDRESS, "--shard-size", SHARD_SIZE, "--parts", "2", "--json"]
    assert main(said) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["output"] == ADDRESS
    assert sorted(part["num_tensors"] for part in plan["parts"]) == [8, 10]
    _run(spec_of(models))
    assert main(said) == 0
    assert "a run would stop: s3://bucket/out/merged: exists already" in capsys.readouterr().out


def test_keys_are_nowhere(
    models: Path, server: BucketServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(method: str, name: str, part: int) -> str:
        return "500" if "model-00003" in name else ""

    server.write_fault = fault
    with pytest.raises(OutlierMergeError) as caught:
        _run(spec_of(models))
    texts = [*server.objects("").values(), str(caught.value).encode(), caplog.text.encode()]
    server.write_fault = lambda method, name, part: ""
    _run(spec_of(models))
    texts += server.objects("").values()
    texts += [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    for key in ("key-of-the-test", "secret-of-the-test"):
        assert not [text for text in texts if key.encode() in text]


def test_a_changed_input_is_merged_again(
    models: Path, server: BucketServer, tmp_path: Path
) -> None:
    """An input that was copied again has other marks: what was made of it is compared."""
    for name in NAMES:
        (tmp_path / "own" / name).mkdir(parents=True)
        for file, content in files_of(models / name).items():
            (tmp_path / "own" / name / file).write_bytes(content)
    server.write_fault = lambda method, name, part: "503" if "model-00003" in name else ""
    with pytest.raises(OutlierMergeError):
        _run(spec_of(tmp_path / "own"))
    server.write_fault = lambda method, name, part: ""
    path = tmp_path / "own" / "a" / "model.safetensors"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-40_000] ^= 1  # in the last layers
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    _run(spec_of(tmp_path / "own"))
    local = _run(spec_of(tmp_path / "own"), "local")
    assert weights_in(server.objects(OUT)) == weights_in(files_of(Path(local.output)))


def test_a_run_without_a_network_says_so(
    models: Path, server: BucketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(OutlierMergeError, match="Is the network there"):
        _run(spec_of(models))


def test_a_real_s3_server(
    models: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    monkeypatch.chdir(tmp_path)
    tensors = {"w": torch.randn(1200, 2400).half(), "v": torch.randn(1200, 2400).half()}
    (tmp_path / "large").mkdir()
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    (tmp_path / "large" / "config.json").write_text("{}")
    monkeypatch.setattr(buckets, "PART_BYTES", 5 << 20)  # S3's least
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        for name, value in s3_at(url).items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        spec = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "large")}]}
        _run(spec_of(models))
        outliermerge.run(spec, output="s3://bucket/large")
        with pytest.raises(OutlierMergeError, match="exists already"):
            _run(spec_of(models))
        _run(spec_of(models, "linear"), overwrite=True)
        found = client.list_objects_v2(Bucket="bucket")["Contents"]
        there = {
            each["Key"]: client.get_object(Bucket="bucket", Key=each["Key"])["Body"].read()
            for each in found
        }
        assert not client.list_multipart_uploads(Bucket="bucket").get("Uploads")
        assert outliermerge.verify(ADDRESS) == []
    finally:
        server.stop()
    small = _run(spec_of(models, "linear"), "small").output
    large = outliermerge.run(spec, output="large-here").output
    local = {f"{OUT}{name}": content for name, content in files_of(Path(small)).items()}
    local |= {f"large/{name}": content for name, content in files_of(Path(large)).items()}
    assert there == local


def test_a_name_may_have_any_printable_character(models: Path, server: BucketServer) -> None:
    name = "a b/+%20&<o'ö日\"{c}[*]^|~;="
    local = _run(spec_of(models, "linear"), "local")
    _run(spec_of(models, "linear"), f"s3://bucket/{name}/")
    assert server.objects(f"{name}/") == files_of(Path(local.output))
    assert outliermerge.verify(f"s3://bucket/{name}") == []
    with pytest.raises(OutlierMergeError, match="exists already"):
        _run(spec_of(models, "linear"), f"s3://bucket/{name}")


def test_an_object_may_be_empty(models: Path, server: BucketServer) -> None:
    there = server.folder / "bucket" / "a"
    there.mkdir(parents=True)
    for file, content in files_of(models / "a").items():
        (there / file).write_bytes(content)
    (there / "notes.txt").write_bytes(b"")
    done = outliermerge.run(
        {"merge_method": "passthrough", "models": [{"model": "s3://bucket/a"}]}, output=ADDRESS
    )
    assert outliermerge.verify(done.output) == []


@pytest.mark.parametrize("word", ["false", "0", "No"])
def test_an_endpoint_without_tls_is_asked_only_where_that_is_allowed(
    models: Path, server: BucketServer, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", word)
    for spec, output in ((spec_of(models), ADDRESS), (spec_of("s3://bucket"), "local")):
        with pytest.raises(OutlierMergeError) as caught:
            _run(spec, output)
        assert f"the environment's AWS_ALLOW_HTTP is {word}, and the endpoint in" in str(
            caught.value
        )
        assert "Name one that begins with https://, or unset AWS_ALLOW_HTTP" in str(caught.value)
    assert not server.written and not server.ranges
    monkeypatch.setenv("AWS_ALLOW_HTTP", "maybe")
    with pytest.raises(OutlierMergeError, match="is 'maybe', expected true or false"):
        _run(spec_of(models))
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "false")  # of another store
    _run(spec_of(models))


def test_what_is_wrong_with_a_store_is_told_in_one_line(
    models: Path, server: BucketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(output: str) -> str:
        with pytest.raises(OutlierMergeError) as caught:
            _run(spec_of(models), output)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "Is there such a bucket, at that endpoint?" in said("s3://absent/merged")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    assert "Account must be specified. Which keys are used" in said("az://bucket/merged")
    for name in ("AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "a-secret\r")
            text = said(ADDRESS)
            assert f"the environment's {name} has a line's end" in text and "secret" not in text


@pytest.mark.parametrize("number", [*range(1, 40)])
@pytest.mark.sampled(10)
def test_a_run_may_break_at_any_request(
    models: Path, server: BucketServer, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse all that is written from some request on, as if the process had been killed there."""
    wanted = files_of(Path(_run(spec_of(models, "linear"), "local").output))
    _run(spec_of(models))
    before = server.objects(OUT)
    server.written.clear()
    server.write_fault = lambda *_: "403" if len(server.written) > number else ""
    with pytest.raises(OutlierMergeError):
        _run(spec_of(models, "linear"), overwrite=True)
    server.write_fault = lambda *_: ""
    there = {n: c for n, c in server.objects(OUT).items() if not n.startswith(RECORDS)}
    if MANIFEST in there:
        assert there in (before, wanted)
    _run(spec_of(models, "linear"), overwrite=True)
    assert server.objects(OUT) == wanted


def test_a_run_that_is_told_to_end_aborts_its_upload(
    models: Path, server: BucketServer, tmp_path: Path
) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(spec_of(models)))
    command = ["run", str(tmp_path / "spec.json"), "-o", ADDRESS, "--shard-size", SHARD_SIZE, "-q"]
    driver = DRIVER.replace("main(sys.argv[1:])", "main()")

    def end(name: str, part: int) -> None:
        if part:
            process.send_signal(signal.SIGTERM)
            server.on_write = lambda name, part: None

    server.on_write, server.in_bytes_per_second = end, 2e5
    process = subprocess.Popen([sys.executable, "-c", driver, *command], stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 130, said
    assert said == b"error: interrupted: the same command goes on from here\n"
    assert not server.uploads and MANIFEST not in server.objects(OUT)
