"""`search --executor ray`: trials as tasks, on a cluster of two nodes on this machine.

What takes longer than starting the cluster is tried by `make faults`.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import save_tensors
from ray_cluster import cluster_of
from waiting import LIMIT_SECONDS, wait_for

from outliermerge.cli.main import main as cli

ray = pytest.importorskip("ray")
pytest.importorskip("ray.cluster_utils")

# Ray leaves sockets to the garbage collector, and warns of versions to come.
pytestmark = pytest.mark.filterwarnings("default")
SCORED = Path(__file__).parents[1] / "scored.py"
DEADLY = """
import os, signal, time
from pathlib import Path
from scored import closeness

def dies(model, questions=None):
    mean = float(model["w"].double().mean())
    if questions is not None and mean > 0.9:
        os.kill(os.getpid(), signal.SIGKILL)
    return closeness(model, questions)

def dies_once(model, questions=None):
    if questions is not None and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return closeness(model, questions)

def slow(model, questions=None):
    time.sleep(0.5 * (questions is not None))
    return closeness(model, questions)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(2) as started:
        yield started


@pytest.fixture(scope="module")
def connected(cluster: Any) -> Iterator[Any]:
    """The cluster, with this process as its driver: it keeps its workers from test to test."""
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models, a spec, a space and functions; there `search` is run."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name, mean in (("base", 0.0), ("a", 1.0), ("b", 0.2)):
        noise = 0.01 * torch.randn(40, 30, generator=generator)
        save_tensors(tmp_path / name, {"w": mean + noise})
    spec = {"merge_method": "task_arithmetic", "base_model": "base"}
    spec["models"] = [{"model": "a"}, {"model": "b"}]  # type: ignore[assignment]
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    space = "lambda: {low: 0.1, high: 1.5}\nmodels.2.weight: {low: 0, high: 1}\n"
    (tmp_path / "space.yaml").write_text(space)
    shutil.copy(SCORED, tmp_path)
    (tmp_path / "deadly.py").write_text(DEADLY)
    return tmp_path


def line(suite: str, output: str, trials: int, *more: str) -> list[str]:
    words = ["search", "spec.yaml", "--space", "space.yaml", "--suite", suite, "-o", output]
    return [*words, "--trials", str(trials), "--questions", "8", "--threads", "1", "-q", *more]


def on_ray(cluster: Any, suite: str, output: str, trials: int, *more: str) -> list[str]:
    return line(suite, output, trials, "--executor", "ray", "--address", cluster.address, *more)


def result(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(output, "result.json").read_text())
    return found


def tried(output: str) -> list[Any]:
    return [
        (trial["point"], trial["state"], trial["values"], trial["steps"])
        for trial in result(output)["trials"]
    ]


@pytest.mark.parametrize(
    ("suite", "trials", "states"),
    [
        ("scored:closeness", 3, {"done"}),
        pytest.param("deadly:dies_once", 8, {"done", "stopped"}, marks=pytest.mark.faults),
    ],
)
def test_one_job_finds_what_a_process_finds_though_a_worker_is_lost(
    suite: str,
    trials: int,
    states: set[str],
    connected: Any,
    place: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The trials, those that are stopped, the scores, the table and the bytes of the winner."""
    assert cli(on_ray(connected, suite, "there", trials, "--jobs", "1")) == 0
    assert cli(line(suite, "here", trials)) == 0
    assert {state for _, state, *_ in tried("here")} == states
    assert tried("there") == tried("here")
    for name in ("search.md", "best.yaml", "result.json"):
        assert Path("there", name).read_bytes() == Path("here", name).read_bytes()
    assert not list(Path("there/work").glob("*.process"))
    if suite == "deadly:dies_once":
        assert "trial 1 was lost: WorkerCrashedError; it goes on" in caplog.text


@pytest.mark.faults
def test_several_jobs_try_the_points_of_a_sampler_that_looks_at_none(
    connected: Any, place: Path
) -> None:
    more = ("--sampler", "random")
    assert cli(on_ray(connected, "scored:closeness", "there", 6, *more)) == 0
    assert cli(line("scored:closeness", "here", 6, *more)) == 0
    assert [point for point, *_ in tried("there")] == [point for point, *_ in tried("here")]


@pytest.mark.faults
def test_a_trial_that_kills_its_workers_fails_and_the_others_go_on(
    connected: Any, place: Path
) -> None:
    Path("space.yaml").write_text("lambda: [0.4, 1.5]\n")
    assert cli(on_ray(connected, "deadly:dies", "there", 2, "--sampler", "grid")) == 0
    states = {trial["point"]["lambda"]: trial for trial in result("there")["trials"]}
    assert states["0.4"]["state"] == "done"
    assert states["1.5"]["state"] == "failed"
    assert "was lost: WorkerCrashedError" in states["1.5"]["reason"]


@pytest.mark.faults
def test_what_fails_on_the_cluster_is_told(
    connected: Any, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(on_ray(connected, "scored:fails", "there", 2)) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "out of luck" in said and "Traceback" not in said


@pytest.mark.faults
def test_a_soup_is_made_in_order(connected: Any, place: Path) -> None:
    words = [
        "search",
        "spec.yaml",
        "--suite",
        "scored:closeness",
        "--strategy",
        "greedy-soup",
        "-q",
    ]
    ways = ["--executor", "ray", "--address", connected.address, "--threads", "1"]
    assert cli([*words, "-o", "there", *ways]) == 0
    assert cli([*words, "-o", "here"]) == 0
    assert tried("there") == tried("here")


@pytest.mark.faults
def test_a_lost_driver_goes_on(cluster: Any, place: Path) -> None:
    words = on_ray(cluster, "deadly:slow", "there", 4, "--jobs", "1")
    command = [sys.executable, "-m", "outliermerge", *words]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    scores = Path("there/scores")  # of three parents, the defaults, and two trials
    done = wait_for(
        lambda: (scores.is_dir() and len(list(scores.iterdir())) >= 6) or driver.poll() is not None
    )
    assert done
    driver.send_signal(signal.SIGKILL)
    assert driver.wait(timeout=LIMIT_SECONDS) == -signal.SIGKILL
    subprocess.run(command, check=True, timeout=LIMIT_SECONDS, stdout=subprocess.DEVNULL)
    assert cli(line("deadly:slow", "here", 4)) == 0
    assert tried("there") == tried("here")
