"""The same bytes on all ways: threads, parts, a Ray cluster, models and outputs elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bucket_server import BucketServer
from documents import ROOT
from outputs_elsewhere import NAMES, bucket_served, files_of, save_layers, spec_of

import outliermerge
from outliermerge.output.parts import join, run_part

RAY = ("--address", "local", "--threads", "1", "--parts", "3", "-q")
SHARD_SIZE, METHODS = "320KB", ("ties", "min_sigma", "della", "model_stock")


def _threads(number: int, memory: str) -> Callable[[str, str], Path]:
    def run(method: str, served: str) -> Path:
        options = outliermerge.RunOptions(threads=number, memory=memory)
        spec = spec_of(Path("served/bucket").absolute(), method)
        outliermerge.run(spec, output="out", shard_size=SHARD_SIZE, options=options)
        return Path("out")

    return run


def _elsewhere(models: str, output: str, num_parts: int = 0) -> Callable[[str, str], Path]:
    def run(method: str, served: str) -> Path:
        pytest.importorskip("obstore")
        at = models.format(http=served)
        spec = spec_of(at if "://" in at else Path(at).absolute(), method)
        if not num_parts:
            outliermerge.run(spec, output=output, shard_size=SHARD_SIZE)
        for part in range(num_parts, 0, -1):
            plan = outliermerge.plan(spec, shard_size=SHARD_SIZE)
            run_part(plan, output, part, num_parts)
        if num_parts:
            join(outliermerge.plan(spec, shard_size=SHARD_SIZE), output)
        return Path("served/bucket/out" if "://" in output else output)

    return run


def _ray(method: str, served: str) -> Path:
    pytest.importorskip("ray")
    Path("spec.json").write_text(json.dumps(spec_of(Path("served/bucket").absolute(), method)))
    line = ["run", "spec.json", "-o", "out", "--shard-size", SHARD_SIZE, "--executor", "ray"]
    subprocess.run(
        [sys.executable, "-m", "outliermerge", *line, *RAY],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    return Path("out")


HERE = "served/bucket"
WAYS: dict[str, Callable[[str, str], Path]] = {
    "2 threads": _threads(2, "1GiB"),
    "3 threads, little memory": _threads(3, "3MiB"),
    "3 parts, joined": _elsewhere(HERE, "out", num_parts=3),
    "3 parts on a Ray cluster": _ray,
    "models on a web server": _elsewhere("{http}/bucket", "out"),
    "models in S3": _elsewhere("s3://bucket", "out"),
    "output in S3": _elsewhere(HERE, "s3://bucket/out"),
    "output in S3, 3 parts": _elsewhere(HERE, "s3://bucket/out", num_parts=3),
    "models and output in S3": _elsewhere("s3://bucket", "s3://bucket/out"),
}


@pytest.fixture
def server(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BucketServer]:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        save_layers(tmp_path / "served" / "bucket" / name, seed)
    with bucket_served(tmp_path / "served", monkeypatch) as served:
        yield served


_MADE: dict[str, dict[str, bytes]] = {}


def _wanted(method: str) -> dict[str, bytes]:
    """Return the weights that a run of one thread writes, which is made once."""
    if method not in _MADE:
        _MADE[method] = _weights(_threads(1, "1GiB")(method, ""))
        Path("out").rename("alone")
    return _MADE[method]


def _weights(folder: Path) -> dict[str, bytes]:
    found = {name: content for name, content in files_of(folder).items() if "model" in name}
    assert sum(name.endswith(".safetensors") for name in found) == 3
    return found


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[pytest.mark.faults] if run is _ray else [])
        for way, run in WAYS.items()
    ],
)
def test_all_ways_give_the_same_bytes(server: BucketServer, way: str, method: str) -> None:
    wanted = _wanted(method)
    assert _weights(WAYS[way](method, server.url)) == wanted


def test_the_table_of_the_documents_has_all_ways() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for way in WAYS:
        assert f"| {way} | {' | '.join(['same'] * len(METHODS))} |" in rows
    assert f"| | {' | '.join(f'`{method}`' for method in METHODS)} |" in rows
