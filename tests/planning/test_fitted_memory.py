"""The default memory grows to what a tensor needs; where it cannot, fewer threads run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.cli.main import main
from outliermerge.execution import threads as threads_module
from outliermerge.output import cluster
from outliermerge.planning.blocks import least_bytes
from outliermerge.planning.plan import Options, Plan


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("fitted")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        sizes = {"small.weight": (4, 4), "wide.weight": (64, 96)}
        tensors = {key: torch.randn(size, generator=generator) for key, size in sizes.items()}
        save_tensors(folder / name, tensors)
    return [folder / name for name in ("base", "a", "b")]


def spec_of(models: list[Path]) -> dict[str, Any]:
    base, *others = map(str, models)
    return {"merge_method": "iso_c", "base_model": base, "models": [{"model": m} for m in others]}


def plan_of(models: list[Path]) -> Plan:
    return outliermerge.plan(spec_of(models))


def options_of(plan: Plan, of_one: float, most: float = 0, threads: int = 4) -> Options:
    """Return options whose memory is so many times what the largest tensor needs."""
    needed = max(least_bytes(job, Options("cpu", 1, 1)) for job in plan.jobs)
    return Options("cpu", threads, int(of_one * needed), most_memory_bytes=int(most * needed))


@pytest.mark.parametrize(
    ("of_one", "most", "threads", "becomes"),
    [
        (9, 0, 4, 9),  # there is room for all
        (1, 0, 1, 1),
        (3.5, 0, 3, 3.5),
        (0.1, 9, 4, 4),  # it grows to what all threads need
        (0.1, 2.5, 2, 2),  # or to what may be used
        (3, 2, 3, 3),
    ],
)
def test_threads_and_memory_fit_the_largest_tensor(models, of_one, most, threads, becomes):
    plan = plan_of(models)
    fitted = plan.fitted(options_of(plan, of_one, most))
    assert fitted.threads == threads
    assert fitted.memory_bytes == options_of(plan, becomes).memory_bytes
    assert plan.peak_memory_bytes(fitted) <= fitted.memory_bytes


@pytest.mark.parametrize("most", [0, 0.9])
def test_a_tensor_that_does_not_fit_is_refused(models, most):
    plan = plan_of(models)
    with pytest.raises(outliermerge.ArgumentError, match=r"tensor 'wide\.weight': iso_c") as raised:
        plan.fitted(options_of(plan, 0.5, most))
    advice = ", or merge on a machine with more memory free" if most else ""
    given = str(raised.value).rpartition("Give ")[2]
    assert given.endswith(f"KiB' or more{advice}") or given.endswith(f"KiB or more{advice}")
    # What the message tells to give is enough.
    size = given.split("KiB")[0].strip("`").rpartition(" ")[2].rpartition("=")[2].strip("'\"")
    assert plan.fitted(Options("cpu", 4, 1024 * int(size))).threads == 1


@pytest.mark.parametrize("kind", ["stages", "modules", "quantize"])
def test_memory_for_what_a_tensor_is_computed_of_counts(models, kind):
    """A method on whole matrices takes as much where its merge is only a source of another."""
    own = spec_of(models)
    base = own["base_model"]
    specs: dict[str, dict[str, Any]] = {
        "stages": {
            "stages": [{"name": "first", **own}],
            "merge_method": "linear",
            "models": [{"model": base}, {"model": "first"}],
        },
        "modules": {
            "base_model": base,
            "modules": {"wide": {"merge_method": "iso_c", "models": own["models"]}},
        },
        "quantize": own | {"quantize": "fp8"},
    }
    plan = outliermerge.plan(specs[kind])
    needed = max(least_bytes(job, Options("cpu", 1, 1)) for job in plan.jobs)
    assert needed > max(least_bytes(job, Options("cpu", 1, 1)) for job in plan_of(models).jobs)
    for threads in (1, 3):
        fitted = plan.fitted(Options("cpu", 8, threads * needed))
        assert fitted.threads == threads
        assert fitted.threads * needed <= fitted.memory_bytes
    with pytest.raises(outliermerge.ArgumentError, match=r"wide\.weight.*what it is computed of"):
        plan.fitted(Options("cpu", 8, needed - 1))


def test_the_free_memory_bounds_a_default(models, monkeypatch):
    plan = plan_of(models)
    needed = options_of(plan, 1).memory_bytes
    monkeypatch.setattr(threads_module, "DEFAULT_MEMORY_BYTES", 1000)
    for free, threads in ((8 * needed, 4), (3 * needed, 2), (2 * needed, 1)):
        monkeypatch.setattr(threads_module, "free_memory_bytes", lambda free=free: free)
        fitted = outliermerge.RunOptions(threads=4).on_this_machine(plan)
        assert (fitted.threads, fitted.memory_bytes) == (threads, threads * needed)
    for free in (needed, None):
        monkeypatch.setattr(threads_module, "free_memory_bytes", lambda free=free: free)
        with pytest.raises(outliermerge.ArgumentError, match="too little for tensor"):
            outliermerge.RunOptions(threads=4).on_this_machine(plan)


def test_parts_may_compute_on_gpus_that_a_machine_without_torch_plans_for(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    options = outliermerge.RunOptions(device="cuda").in_parts(plan_of(models))
    assert options.device == "cuda"


def test_run_and_plan_tell_how_many_threads_there_are(models, tmp_path, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(spec_of(models)))
    needed = options_of(plan_of(models), 1).memory_bytes
    flags = ["--threads", "4", "--memory", str(2 * needed), "--no-load-check"]
    assert main(["plan", str(spec), "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["threads"] == 2
    assert main(["run", str(spec), str(tmp_path / "two"), "--verbose", *flags]) == 0
    assert "; 2 threads, device cpu, at most" in capsys.readouterr().err
    assert main(["run", str(spec), str(tmp_path / "all"), "--threads", "4", "--quiet"]) == 0
    two, whole = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("two", "all"))
    assert two == whole


def test_the_gpu_with_the_least_free_memory_bounds_a_default(monkeypatch):
    free = {"cuda:0": 8 * 2**30, "cuda:1": 4 * 2**30}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (free[name], 2**40))
    monkeypatch.setattr(threads_module, "free_memory_bytes", lambda: 6 * 2**30)
    for device, gib in (("cuda", 3), ("cuda:0", 4.5), ("cuda:1", 3), ("cpu", 4.5)):
        options = outliermerge.RunOptions(device=device).on_this_machine()
        assert options.most_memory_bytes == gib * 2**30, device
    given = outliermerge.RunOptions(memory="1GB", device="cuda").on_this_machine()
    assert given.most_memory_bytes == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    in_parts = outliermerge.RunOptions(device="cuda").in_parts(free=8 * 2**30)
    assert in_parts.most_memory_bytes == 6 * 2**30


def test_the_memory_of_parts_elsewhere_is_not_bounded_by_this_machine(models, monkeypatch):
    plan = plan_of(models)
    needed = options_of(plan, 1).memory_bytes
    monkeypatch.setattr(threads_module, "DEFAULT_MEMORY_BYTES", 1000)
    monkeypatch.setattr(threads_module, "free_memory_bytes", lambda: needed // 2)
    chosen = outliermerge.RunOptions(threads=4)
    assert chosen.in_parts(plan).memory_bytes == 4 * needed
    # A part runs on as many machines as possible, with as many threads as all of these can.
    for sizes, threads in (
        ([], 4), ([100 * needed], 4), ([needed, 100 * needed], 4), ([100 * needed, 3 * needed], 2)
    ):  # fmt: skip
        monkeypatch.setattr(cluster, "memory_of_machines", lambda needs, own=sizes: own)
        fitted = cluster.fitting_options(chosen, [plan], {"num_cpus": 4})
        assert (fitted.threads, fitted.memory_bytes) == (threads, threads * needed), sizes
    monkeypatch.setattr(cluster, "memory_of_machines", lambda needs: [needed, needed // 2])
    with pytest.raises(outliermerge.ArgumentError, match="too little for tensor"):
        cluster.fitting_options(chosen, [plan], {"num_cpus": 4})


def test_machines_of_a_cluster_that_lack_what_a_task_needs_lend_no_memory(monkeypatch):
    alive = {"a": {"CPU": 4, "memory": 7e9}, "b": {"CPU": 1, "memory": 9e9}, "c": {"CPU": 8}}
    monkeypatch.setattr(cluster, "_alive", lambda: alive)
    assert cluster.memory_of_machines({"num_cpus": 4, "num_gpus": 0}) == [7 * 10**9]
    assert cluster.memory_of_machines({"num_cpus": 1, "num_gpus": 1}) == []
