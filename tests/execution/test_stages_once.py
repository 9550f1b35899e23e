"""Blocks of a stage are computed once for each tensor of the output, though often read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import family, load_folder

import outliermerge
from outliermerge.execution import merged, threads
from outliermerge.output.options import RunOptions


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    base, tasks = family("llama", folder, num_models=2, dtype=torch.bfloat16)
    return [str(base), *map(str, tasks)]


def in_stages(models: list[str], number: int, **last: Any) -> dict[str, Any]:
    """Return a chain of merges, each of the two before it."""
    names = models[1:]
    stages = []
    for at in range(number):
        method = ("linear", "karcher", "nuslerp")[at % 3]
        entries = [{"model": name, "parameters": {"weight": 0.5}} for name in names[-2:]]
        if method == "karcher":
            entries = [{"model": name} for name in names[-2:]]
        stages.append({"name": f"s{at}", "merge_method": method, "models": entries})
        names.append(f"s{at}")
    base, entries = {"base_model": models[0]}, [{"model": name} for name in names[-2:]]
    return {"stages": stages, "merge_method": "ties", "models": entries, **base, **last}


@pytest.mark.parametrize("memory", ["1GiB", "2MiB"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.sampled(2)
def test_each_block_of_each_stage_is_merged_once(kernels, memory, models, monkeypatch, tmp_path):
    spec = in_stages(models, 6, parameters={"density": 0.4})
    monkeypatch.setattr(threads, "_read_again", lambda group: frozenset())
    outliermerge.run(spec, output=tmp_path / "again", kernels=kernels, threads=2)
    monkeypatch.undo()

    counts: Counter[tuple[int, tuple[int, int]]] = Counter()
    merge = merged._Feed.merge

    def counted(feed: Any, span: tuple[int, int], prepared: Any, out: memoryview) -> None:
        counts[id(feed.merged), span] += 1
        merge(feed, span, prepared, out)

    monkeypatch.setattr(merged._Feed, "merge", counted)
    plan = outliermerge.plan(spec)
    outliermerge.run(plan, output=tmp_path / "once", kernels=kernels, threads=2, memory=memory)
    expected, found = load_folder(tmp_path / "again"), load_folder(tmp_path / "once")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert len(counts) == 6 * len(plan.jobs)  # of tensors that are one block
    assert set(counts.values()) == {1}


def test_the_memory_of_a_plan_has_what_is_held_of_stages(models):
    """A merge of two stages by a method that reads them three times."""
    plan = outliermerge.plan(in_stages(models, 2, parameters={"density": 0.4}))
    largest = max(job.num_elements for job in plan.jobs)
    options = RunOptions(threads=2, memory="64MiB").on_this_machine()
    held = options.threads * 2 * 4 * largest  # two stages in float32
    assert held <= plan.block_memory_bytes(options) <= plan.peak_memory_bytes(options)
    kept = plan._held_bytes(options), plan._held_bytes(replace(options, memory_bytes=1000))
    assert kept == (held, 1000)


def test_what_a_stage_of_stages_needs_to_be_planned_does_not_double(models, tmp_path):
    """Ways through the stages are 2 ** 30; nothing may go all of them."""
    plan = outliermerge.plan(in_stages(models, 44))
    assert len(repr(plan.jobs[0].sources)) < 1000
    outliermerge.run(plan, output=tmp_path / "out")
    assert outliermerge.verify(tmp_path / "out") == []
