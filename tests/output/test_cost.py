"""What a merge of models elsewhere takes, against what is asked of their server."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models_elsewhere import NAMES, spec_of
from range_server import RangeServer
from safetensors.numpy import save_file

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.output.cost import Machine, cost_of, in_words, is_elsewhere
from outliermerge.planning.plan import Plan
from outliermerge.storage import cached_files, range_cache

CHUNK_BYTES = 1 << 14


@pytest.fixture
def large(served: RangeServer, monkeypatch: pytest.MonkeyPatch) -> RangeServer:
    """Models of several small chunks, instead of the ones of two."""
    for module in (range_cache, cached_files):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK_BYTES)
    draw = np.random.default_rng(0)
    for name in NAMES:
        folder = served.folder / "bucket" / "large" / name
        folder.mkdir(parents=True)
        tensors = {f"w{n}": draw.standard_normal((60, 90 + n)).astype("<f2") for n in range(24)}
        tensors["ids"] = np.arange(5000)  # that must be equal
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return served


def planned(method: str, parameters: dict[str, Any] | None = None) -> Plan:
    spec = spec_of("s3://bucket/large", method)
    if parameters:
        spec["parameters"] = parameters
    return outliermerge.plan(spec)


def asked(server: RangeServer, work: Callable[[], object]) -> tuple[int, int]:
    """Return how many ranges of tensors were asked for, and of how many bytes."""
    server.ranges.clear()
    work()
    ranges = [(start, stop) for name, start, stop in server.ranges if name.endswith("safetensors")]
    return len(ranges), sum(stop - start for start, stop in ranges)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("linear", {}), ("ties", {"density": 0.3}), ("ties", {"density": 0.3, "trim": "model"})],
)
def test_parts_fetch_the_bytes_that_were_foretold(
    large: RangeServer, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    plan = planned(method, parameters)
    cost = cost_of(plan, 3, Machine())
    found = [
        asked(large, lambda part=part: outliermerge.run_part(plan, tmp_path / "out", part, 3))
        for part in (1, 2, 3)
    ]
    assert sum(num_bytes for _, num_bytes in found) == cost.fetched_bytes
    # A thread that needs a range before it was fetched ahead asks for a part of it by itself.
    num_requests = sum(number for number, _ in found)
    assert 0.75 * cost.num_requests <= num_requests <= cost.fetched_bytes / CHUNK_BYTES + 9
    whole = cost_of(plan, 1, Machine())
    assert plan.num_read_bytes < whole.fetched_bytes < cost.fetched_bytes
    assert (whole.first_requests, whole.num_machines) == (3, 1)


def test_what_does_not_fit_into_the_cache_is_fetched_twice(large: RangeServer) -> None:
    machine = Machine()
    once = cost_of(planned("ties", {"density": 0.3, "trim": "model"}), 1, machine)
    twice = cost_of(
        planned("ties", {"density": 0.3, "trim": "model"}), 1, replace(machine, cache_bytes=10)
    )
    assert once.fetched_bytes < 0.6 * twice.fetched_bytes


def test_the_time_is_that_of_what_takes_longest(large: RangeServer) -> None:
    plan = planned("linear")
    quick = Machine(line_bytes=1e12, disk_bytes=1e12, latency_seconds=0.0, work_bytes=1e12)
    least = cost_of(plan, 1, quick).seconds
    whole = cost_of(plan, 1, quick)
    for slow, seconds in (
        ({"line_bytes": 1e3}, whole.fetched_bytes / 1e3),
        ({"work_bytes": 1e3}, plan.work_bytes / 1e3),
        ({"disk_bytes": 1e3}, sum(job.num_written_bytes for job in plan.jobs) / 1e3),
        ({"latency_seconds": 16.0}, whole.num_requests + 3),
    ):
        assert cost_of(plan, 1, replace(quick, **slow)).seconds - least == pytest.approx(seconds)
    # Several machines write the output, and then read it back.
    shared = cost_of(plan, 4, replace(quick, disk_bytes=1e3)).seconds
    assert 0.5 * plan.num_written_bytes / 1e3 < shared < 0.75 * plan.num_written_bytes / 1e3


def test_plan_says_what_models_elsewhere_take(
    large: RangeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(spec_of("s3://bucket/large")))
    words = ["plan", str(tmp_path / "spec.json"), "--no-load-check"]
    assert cli.main([*words, "--json"]) == 0
    one, many = json.loads(capsys.readouterr().out)["elsewhere"]
    assert (one["machines"], many["machines"]) == (1, 64)
    assert cli.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"in {one['requests']} requests; if each machine gets 1 GB a second, about 1 s" in said
    assert not is_elsewhere(outliermerge.plan(spec_of("served/bucket")))
    assert cli.main([*words[:-1], "--parts", "2", "--no-load-check"]) == 0


def test_a_plan_says_how_long_many_machines_take_where_they_are_faster(large: RangeServer) -> None:
    plan, slow = planned("linear"), Machine(line_bytes=1e4)
    one, few = (cost_of(plan, number, slow) for number in (1, 4))
    said = in_words([one, few])
    assert said.endswith(f"about {one.seconds:,.0f} s on 1, {few.seconds:,.0f} s on 4")
    assert few.seconds < 0.5 * one.seconds
    # Where they take as long, they are not told of.
    assert in_words([one, replace(few, seconds=one.seconds)]).endswith(f"{one.seconds:,.0f} s on 1")
