"""A plan counts the memory of the bins in which statistics count, to find values by their ranks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.methods.statistics import importance, trim
from outliermerge.output import estimate as estimating
from outliermerge.planning.blocks import counter_bytes
from outliermerge.planning.plan import Plan

SIZES = {"small": (300, 200), "large": (1024, 2100)}  # the large one is sampled first


@pytest.fixture(scope="module", params=SIZES)
def models(request, tmp_path_factory) -> list[Path]:
    folder, generator = tmp_path_factory.mktemp("counted"), torch.Generator().manual_seed(0)

    def saved(name: str) -> Path:
        values = torch.randn(SIZES[request.param], generator=generator).bfloat16()
        return save_tensors(folder / name, {"layers.0.w.weight": values})

    return [saved(name) for name in ("base", "one", "two")]


def plan_of(models: list[Path], method: str, parameters: dict[str, Any]) -> Plan:
    base, *others = map(str, models)
    others = others[:1] if method == "arcee_fusion" else others
    spec = {"merge_method": method, "base_model": base, "parameters": parameters}
    return outliermerge.plan(spec | {"models": [{"model": model} for model in others]})


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.3, "trim": "model"}),
        ("breadcrumbs", {"density": 0.3, "gamma": 0.1}),
        ("min_sigma", {"scale": "mad"}),
        ("pcb", {}),
        ("pcb", {"trim": "tensor"}),
        ("sce", {"select_topk": 0.1}),
        ("arcee_fusion", {}),
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_the_bins_of_a_run_are_in_its_plan(
    models, tmp_path, monkeypatch, method, parameters, kernels
):
    made = list[int]()
    for kind in (trim.Select, importance._Ranked):

        def noting(self: Any, *args: Any, began: Any = kind.__init__, **more: Any) -> None:
            began(self, *args, **more)
            made.append(sum(one.nbytes for one in self._counts if one is not None))

        monkeypatch.setattr(kind, "__init__", noting)
    plan = plan_of(models, method, parameters)
    outliermerge.run(plan, output=tmp_path / "out", kernels=kernels, load_check=False)
    # A pass is made while the bins of the one before are still there.
    most = max(map(sum, pairwise(made)))
    (job,) = plan.jobs
    options = outliermerge.RunOptions(threads=1, kernels=kernels, device="cpu").on_this_machine()
    told = counter_bytes(job, options)
    assert 0.9 * most < told < 2.5 * most + (3 << 20) * (not kernels)
    alone = plan_of(models, "linear", {})
    for tell in (Plan.block_memory_bytes, Plan.peak_memory_bytes):
        assert tell(plan, options) > tell(alone, options) + 0.9 * most


def test_the_bins_of_stages_are_in_a_plan(models):
    base, one, two = map(str, models)
    ties = {"merge_method": "ties", "base_model": base, "parameters": {"density": 0.3}}
    ties["models"] = [{"model": one}, {"model": two}]
    stages = {"merge_method": "linear", "models": [{"model": base}, {"model": "first"}]}
    options = outliermerge.RunOptions(threads=2).on_this_machine()
    (alone,) = plan_of(models, "ties", {"density": 0.3}).jobs
    plan = outliermerge.plan(stages | {"stages": [{"name": "first", **ties}]})
    assert plan.counter_bytes(options) == counter_bytes(alone, options)
    assert plan.peak_memory_bytes(options) > counter_bytes(alone, options)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"density": 1.0}), ("sce", {"select_topk": 1.0}), ("min_sigma", {}), ("linear", {})],
    ids=json.dumps,
)
def test_what_looks_for_no_rank_has_no_bins(models, method, parameters):
    plan = plan_of(models, method, parameters)
    options = outliermerge.RunOptions(threads=4).on_this_machine()
    assert plan.counter_bytes(options) == 0


def test_as_many_tensors_are_counted_as_are_measured_at_once(models):
    """Threads each measure a tensor of one block; of larger ones two at a time."""
    options = [outliermerge.RunOptions(threads=n).on_this_machine() for n in (1, 2, 8)]
    (job,) = plan_of(models, "ties", {"density": 0.3}).jobs
    one, two, eight = (counter_bytes(job, each) for each in options)
    if job.num_elements < 10**6:
        assert (two, eight) == (2 * one, 8 * one)
    else:
        own = 2 * 4 << 15  # each thread's own bins, of two models
        assert (two, eight) == (2 * one, 2 * one + 6 * own)
    (job,) = plan_of(models, "ties", {"density": 0.3, "trim": "model"}).jobs
    one, two, eight = (counter_bytes(job, each) for each in options)
    assert eight - two == 6 * (two - one) == 6 * (2 * 4 << 15)


def test_numpy_is_counted_where_it_is_still_to_be_imported(models, tmp_path, monkeypatch):
    def program(method: str, **parameters: float) -> int:
        plan = plan_of(models, method, parameters)
        found = outliermerge.estimate(plan, output=tmp_path / "out").program_bytes
        assert found is not None
        return found

    monkeypatch.setattr(estimating, "resident_bytes", lambda: 10**9)
    assert program("ties", density=0.3) == program("linear")
    monkeypatch.setattr(estimating, "sys", SimpleNamespace(modules={}))
    assert program("ties", density=0.3) == program("linear") + estimating._NUMPY_BYTES
