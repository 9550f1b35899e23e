"""`--executor ray`: parts as tasks on a Ray cluster of several nodes, on this machine.

More kills are tried by `make faults`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bucket_server import BucketServer
from checkpoints import save_tensors
from kinds import save_models, save_specs
from outputs_elsewhere import bucket_served
from ray_cluster import cluster_of
from waiting import LIMIT_SECONDS, wait_for

from outliermerge import optional
from outliermerge.cli import main as cli
from outliermerge.errors import OutlierMergeError
from outliermerge.output.folder import OutputFolder
from outliermerge.output.names import journal_path, partial_folder
from outliermerge.output.ray import _Driver
from outliermerge.output.writer import OutputWriter

ray = pytest.importorskip("ray")
pytest.importorskip("ray.cluster_utils")

# Ray leaves sockets to the garbage collector, and warns of versions to come.
pytestmark = pytest.mark.filterwarnings("default")
NUM_TENSORS, NUM_PARTS = 24, 4
SLOW = """
import time
from outliermerge.methods.table import METHODS
from outliermerge.output.journal import Journal

def add_slowly(journal, entry, add=Journal.add):
    time.sleep(0.1 * ("tensor" in entry))
    add(journal, entry)

Journal.add, slow = add_slowly, METHODS["linear"]
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketServer]:
    """A bucket, whose keys are in the environment in which the cluster is started."""
    with pytest.MonkeyPatch.context() as patch:
        with bucket_served(tmp_path_factory.mktemp("served"), patch) as server:
            yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a spec whose merge takes its time, a quick one, and the output of each."""
    root = tmp_path_factory.mktemp("ray")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "task"):
        tensors = {f"w{n}": torch.randn(30, 40, generator=generator) for n in range(NUM_TENSORS)}
        save_tensors(root / name, tensors)
    (root / "slow.py").write_text(SLOW)
    both = [{"model": "base"}, {"model": "task"}]
    for name, method in (("slow", "slow:slow"), ("quick", "linear")):
        spec = {"merge_method": method, "models": both}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    stage = {"name": "half", "merge_method": "linear", "models": both}
    staged = {"stages": [stage], "merge_method": "linear", "models": [both[0], {"model": "half"}]}
    (root / "staged.yaml").write_text(yaml.safe_dump(staged))
    save_models(root / "llamas")
    save_specs(root, root / "llamas", gate_mode="random")
    return root


@pytest.fixture(scope="module")
def cluster(place: Path, bucket: BucketServer) -> Iterator[Any]:
    """A head without processors, and nodes of one processor each."""
    with cluster_of(2, place) as started:
        yield started


@pytest.fixture(scope="module")
def connected(cluster: Any) -> Iterator[Any]:
    """The cluster, with this process as its driver: it keeps its workers from test to test."""
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def line(cluster: Any, name: str, output: Path, *more: str, command: str = "run") -> list[str]:
    words = [command, f"{name}.yaml", "-o", str(output), "--executor", "ray", "--threads", "1"]
    return [*words, "--address", cluster.address, "--memory", "64MiB", *more]


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_as_alone(place: Path, name: str, output: Path) -> None:
    """Check an output against that of a run of threads, which is made once."""
    alone = place / f"{name} alone"
    if not alone.exists():  # `slow` is not for this process, as it stays slow
        command = ["-m", "outliermerge", "run", f"{name}.yaml", "-o", str(alone)]
        subprocess.run([sys.executable, *command], cwd=place, check=True)
    for file in ("model.safetensors", "outliermerge.json"):
        assert (output / file).read_bytes() == (alone / file).read_bytes()
    left = {path.name for path in output.parent.iterdir() if path.name.startswith(output.name)}
    assert left == {output.name}


def test_a_cluster_that_is_not_there_and_a_missing_ray_are_told(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["run", "quick.yaml", "-o", str(tmp_path / "out"), "--executor", "ray"]
    with monkeypatch.context() as patch:
        patch.setattr(optional, "is_installed", lambda module: module != "ray")
        assert cli.main(words) == 1
    assert "pip install 'outliermerge[ray]'" in capsys.readouterr().err
    assert cli.main([*words, "--address", "no address"]) == 1
    assert "--address no address: no Ray cluster can be reached: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_parts_on_a_cluster_give_the_bytes_of_a_run(
    connected: Any, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert cli.main(line(connected, "quick", output, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_tensors"], found["num_resumed"]) == (NUM_TENSORS, 0)
    assert_as_alone(here, "quick", output)


def _while_it_runs(
    cluster: Any, output: Path, disturb: Callable[[subprocess.Popen[str]], None]
) -> str:
    """Run a merge, disturbed when its first tensors are written; return what it says of it."""
    words = line(cluster, "slow", output, "--parts", str(NUM_PARTS))
    command = [sys.executable, "-m", "outliermerge", *words]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    parts = [journal_path(output, f"{n}-of-{NUM_PARTS}") for n in range(1, NUM_PARTS + 1)]
    assert wait_for(lambda: sum(map(_num_written, parts)) or driver.poll() is not None)
    disturb(driver)
    _, said = driver.communicate(timeout=LIMIT_SECONDS)
    assert driver.returncode == 0, said
    return said


def _num_written(path: Path) -> int:
    return path.read_bytes().count(b'{"tensor"') if path.exists() else 0


def test_a_lost_node_costs_only_what_its_part_had_not_written(
    cluster: Any, here: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    said = _while_it_runs(
        cluster, output, lambda driver: _replace_a_node(cluster, random.Random(0))
    )
    assert "was lost: NodeDiedError; it goes on" in said or "was lost: WorkerCrashed" in said
    assert_as_alone(here, "slow", output)


def _replace_a_node(cluster: Any, chance: random.Random) -> None:
    nodes = sorted(cluster.worker_nodes, key=lambda node: node.node_id)
    cluster.remove_node(chance.choice(nodes), allow_graceful=False)
    cluster.add_node(num_cpus=1)


def test_a_lost_driver_goes_on(cluster: Any, here: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "outliermerge", *line(cluster, "slow", output)]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    journals = [journal_path(output, f"{n}-of-2") for n in (1, 2)]
    assert wait_for(lambda: sum(map(_num_written, journals)) >= 3 or driver.poll() is not None)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait(timeout=LIMIT_SECONDS) == -signal.SIGKILL
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_resumed"] >= 3
    assert_as_alone(here, "slow", output)


def test_a_tensor_that_arrives_with_other_bytes_is_written_again(
    connected: Any,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output, take, damaged = tmp_path / "out", _Driver._take_written, []

    def damaging(self: _Driver, part: tuple[int, int], written: Any) -> str:
        if "w5" in written.checksums and not damaged:
            damaged.append(part)
            _damage(self, "w5")
        return take(self, part, written)

    monkeypatch.setattr(_Driver, "_take_written", damaging)
    assert cli.main(line(connected, "quick", output)) == 0
    assert len(damaged) == 1
    assert "1 tensor(s), such as w5, arrived with other bytes than were" in caplog.text
    assert_as_alone(here, "quick", output)


def _damage(driver: _Driver, name: str) -> None:
    ((plan, output),) = driver._plans
    (tensor,) = (job.output for job in plan.jobs if job.name == name)
    with (partial_folder(output) / tensor.file).open("r+b") as file:
        file.seek(tensor.offset + 3)
        file.write(b"x")


def test_parts_are_read_back_by_other_nodes_than_their_writers_and_not_by_the_driver(
    connected: Any, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, pairs, read = tmp_path / "out", [], []
    other, checksum = _Driver._other_machine, OutputWriter.checksum

    def noted(self: _Driver, part: tuple[int, int]) -> str:
        pairs.append((self._parts[part].machine, other(self, part)))
        return pairs[-1][1]

    def reading(self: OutputWriter, tensor: Any) -> str:
        read.append(tensor.name)
        return checksum(self, tensor)

    monkeypatch.setattr(_Driver, "_other_machine", noted)
    monkeypatch.setattr(OutputWriter, "checksum", reading)
    assert cli.main(line(connected, "quick", output, "--parts", "4")) == 0
    nodes = {node.node_id for node in connected.worker_nodes}
    assert len(pairs) == 4
    assert all({writer, reader} == nodes for writer, reader in pairs)
    assert read == []
    assert_as_alone(here, "quick", output)


@pytest.mark.parametrize("lost", ["bytes", "end", "file"])
def test_parts_of_an_earlier_command_are_read_back_before_they_are_joined(
    connected: Any,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    output, drivers = tmp_path / "out", []

    def stop(self: _Driver, parts: Any) -> None:
        drivers.append(self)
        raise OutlierMergeError("stopped before it was read back")

    with monkeypatch.context() as patch:
        patch.setattr(_Driver, "read_back", stop)
        assert cli.main(line(connected, "quick", output, "--parts", "2")) == 1
    file = tmp_path / "out.partial" / "model.safetensors"
    if lost == "bytes":
        _damage(drivers[0], "w5")
    elif lost == "end":
        os.truncate(file, file.stat().st_size - 1000)
    else:
        file.unlink()
    assert not output.exists()
    assert cli.main(line(connected, "quick", output)) == 0
    assert_as_alone(here, "quick", output)


def test_an_error_of_a_part_is_told_once(
    connected: Any, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {f"w{n}": torch.full((30, 40), float("inf")) for n in range(NUM_TENSORS)}
    save_tensors(tmp_path / "bad", bad)
    spec = {"merge_method": "linear", "models": [{"model": "base"}, {"model": "bad"}]}
    spec["models"][1]["model"] = str(tmp_path / "bad")
    (here / "bad.yaml").write_text(yaml.safe_dump(spec))
    assert cli.main(line(connected, "bad", tmp_path / "out", "--quiet")) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "has values that are infinite" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("command", "name", "more"),
    [
        ("sweep", "quick", ["--set", "weight=0.25,0.75", "--parts", "2"]),
        ("run", "staged", ["--keep", "half"]),
        ("moe", "moe", ["--no-routing", "--parts", "1"]),
    ],
)
def test_other_outputs_than_one_merge_are_written_on_a_cluster(
    connected: Any, here: Path, tmp_path: Path, command: str, name: str, more: list[str]
) -> None:
    there, alone = tmp_path / "there" / "out", tmp_path / "alone" / "out"
    for folder in (there, alone):
        folder.parent.mkdir()
    more = [*more, "--no-load-check"]
    assert cli.main(line(connected, name, there, *more, command=command)) == 0
    own = [word for word in more if word != "--parts" and not word.isdecimal()]
    assert cli.main([command, f"{name}.yaml", "-o", str(alone), "--threads", "1", *own]) == 0
    assert files_of(alone.parent)
    assert files_of(there.parent) == files_of(alone.parent)


def test_a_sweep_that_was_stopped_goes_on_with_what_is_left(
    connected: Any, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, num_joined = tmp_path / "swept", []
    words = line(connected, "quick", output, "--set", "weight=0.25,0.75", "--json", command="sweep")
    name, forget = OutputFolder.name, OutputFolder.forget

    def stop(self: OutputFolder) -> Any:
        if num_joined:
            raise KeyboardInterrupt
        num_joined.append(1)
        return name(self)

    with monkeypatch.context() as patch:  # one output has its name, the other not yet
        patch.setattr(OutputFolder, "name", stop)
        assert cli.main(words) == 130
    num_joined.clear()

    def stop_forgetting(self: OutputFolder) -> None:
        if num_joined:
            raise KeyboardInterrupt
        num_joined.append(1)
        forget(self)

    with monkeypatch.context() as patch:  # both have their names, one has no journal any more
        patch.setattr(OutputFolder, "forget", stop_forgetting)
        assert cli.main(words) == 130
    assert cli.main(words) == 0
    assert {path.name for path in output.iterdir()} == {"weight=0.25", "weight=0.75"}
    assert cli.main(["sweep", "quick.yaml", "-o", str(tmp_path / "alone"), *words[-3:-1]]) == 0
    assert files_of(output) == files_of(tmp_path / "alone")


def test_the_machine_of_the_driver_is_not_asked_for_a_gpu(
    cluster: Any,
    connected: Any,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that says that it has a GPU, and has none, refuses; the driver does not."""

    def asked(*_: object) -> None:
        raise AssertionError("asked for a GPU")

    def said(device: str) -> str:
        words = line(connected, "quick", tmp_path / "out", "--device", device, "-v")
        assert cli.main(words) == 2
        return capsys.readouterr().err

    refusal = "error: device cuda is not on this machine: it has 0 CUDA device(s)"
    node = cluster.add_node(num_cpus=1, num_gpus=1)
    try:
        with monkeypatch.context() as patch:
            for name in ("is_available", "device_count"):
                patch.setattr(torch.cuda, name, asked)
            assert refusal in said("cuda")
        assert refusal in said("auto")  # of the cluster, not of this machine
    finally:
        cluster.remove_node(node)


@pytest.mark.parametrize(
    ("command", "name", "more"),
    [
        ("run", "quick", []),
        ("sweep", "quick", ["--set", "weight=0.25,0.75", "--parts", "2"]),
        pytest.param("run", "staged", ["--keep", "half"], marks=pytest.mark.faults),
        pytest.param("moe", "moe", ["--no-routing", "--parts", "3"], marks=pytest.mark.faults),
    ],
)
@pytest.mark.sampled(2)
def test_parts_on_a_cluster_are_written_to_a_bucket(
    connected: Any,
    bucket: BucketServer,
    here: Path,
    tmp_path: Path,
    command: str,
    name: str,
    more: list[str],
) -> None:
    pytest.importorskip("obstore")
    there = f"{command}-{name}/out"
    more = [*more, "--no-load-check", "--shard-size", "2KB"]
    address = Path(f"s3://bucket/{there}")
    words = line(connected, name, address, *more, command=command)
    words[words.index(str(address))] = f"s3://bucket/{there}"
    assert cli.main(words) == 0
    alone = tmp_path / "out"
    own = [word for word in more if word != "--parts" and not word.isdecimal()]
    assert cli.main([command, f"{name}.yaml", "-o", str(alone), "--threads", "1", *own]) == 0
    wanted = files_of(tmp_path)
    assert bucket.objects(f"{command}-{name}/") == wanted
    assert sum(file.endswith(".safetensors") for file in wanted) > 2


@pytest.mark.faults
def test_a_lost_node_costs_a_bucket_nothing(
    cluster: Any, bucket: BucketServer, here: Path, tmp_path: Path
) -> None:
    pytest.importorskip("obstore")
    words = line(cluster, "slow", tmp_path, "--parts", str(NUM_PARTS), "--shard-size", "15KB")
    words[words.index(str(tmp_path))] = "s3://bucket/lost/out"
    command = [sys.executable, "-m", "outliermerge", *words]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: bool(bucket.objects("lost/out/model-")) or driver.poll() is not None)
    _replace_a_node(cluster, random.Random(1))
    _, said = driver.communicate(timeout=LIMIT_SECONDS)
    assert driver.returncode == 0, said
    assert "was lost: " in said
    own = [word for word in words[words.index("--shard-size") :]]
    subprocess.run(
        [sys.executable, "-m", "outliermerge", "run", "slow.yaml", "-o", tmp_path / "alone", *own],
        check=True,
    )
    assert bucket.objects("lost/out/") == files_of(tmp_path / "alone")


def test_a_corrected_spec_needs_no_flag_where_nothing_was_written(
    connected: Any, here: Path, tmp_path: Path
) -> None:
    bad = {f"w{n}": torch.full((30, 40), float("inf")) for n in range(NUM_TENSORS)}
    save_tensors(tmp_path / "bad", bad)
    models = [{"model": "base"}, {"model": str(tmp_path / "bad")}]
    spec = {"merge_method": "linear", "models": models}
    (here / "worse.yaml").write_text(yaml.safe_dump(spec))
    output = tmp_path / "out"
    assert cli.main(line(connected, "worse", output, "--quiet", "--parts", "3")) == 1
    assert cli.main(line(connected, "quick", output, "--quiet", "--parts", "2")) == 0
    assert_as_alone(here, "quick", output)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(6))
def test_nodes_that_are_killed_again_and_again_lose_nothing(
    cluster: Any, here: Path, tmp_path: Path, seed: int
) -> None:
    output, chance, kills = tmp_path / "out", random.Random(seed), []

    def disturb(driver: subprocess.Popen[str]) -> None:
        while driver.poll() is None and len(kills) < 6:
            _replace_a_node(cluster, chance)
            kills.append(1)
            time.sleep(chance.random() * 3)

    assert "was lost: " in _while_it_runs(cluster, output, disturb)
    assert_as_alone(here, "slow", output)
