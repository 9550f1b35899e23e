"""A plan counts the readings of methods that search a rank in all tensors of a model together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tensors
from stopping import stopping_after

import outliermerge
from outliermerge.execution.files import FileFeed
from outliermerge.planning.plan import Plan

SIZES = {"a.weight": (600, 700), "b.weight": (512, 600)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("passes")
    generator = torch.Generator().manual_seed(0)
    return [
        save_tensors(
            folder / name,
            {key: torch.randn(size, generator=generator) for key, size in SIZES.items()},
        )
        for name in ("base", "one", "two")
    ]


def plan_of(models: list[Path], method: str, parameters: dict[str, Any]) -> Plan:
    base, *others = map(str, models)
    spec: dict[str, Any] = {"merge_method": method, "parameters": parameters}
    spec["models"] = [{"model": model} for model in others]
    return outliermerge.plan(spec | ({} if method == "linear" else {"base_model": base}))


@pytest.mark.parametrize(
    ("method", "parameters", "readings"),
    [
        ("ties", {"density": 0.3, "trim": "model"}, 3),
        ("ties", {"density": 0.3, "trim": "model", "rescale": True}, 4),
        ("ties", {"density": 1.0, "trim": "model"}, 1),
        ("min_sigma", {"sigma": "model"}, 2),
        ("min_sigma", {"sigma": "model", "scale": "mad"}, 3),
        ("pcb", {}, 5),
        ("metagpt", {}, 2),
    ],
)
def test_a_plan_counts_the_readings(models, tmp_path, monkeypatch, method, parameters, readings):
    plan = plan_of(models, method, parameters)
    assert {job.num_passes for job in plan.jobs} == {readings}
    measured: list[int] = []

    def measure(feed: FileFeed, span: tuple[int, int], passes: Any) -> Any:
        measured.append(span[1] - span[0])
        return measured_as_ever(feed, span, passes)

    measured_as_ever = FileFeed.measure
    monkeypatch.setattr(FileFeed, "measure", measure)
    outliermerge.run(plan, output=tmp_path / "out")
    num_elements = sum(rows * columns for rows, columns in SIZES.values())
    assert sum(measured) == (readings - 1) * num_elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.3}),  # two readings to find a rank; in 64 bits, four
        ("ties", {"density": 0.3, "trim": "model"}),
        ("breadcrumbs", {"density": 0.3, "gamma": 0.1, "rescale": True}),
        ("pcb", {"trim": "tensor"}),
        ("arcee_fusion", {}),
        ("linear", {}),
    ],
)
def test_progress_ends_where_it_was_planned_and_not_before(dtype, method, parameters, tmp_path):
    generator = torch.Generator().manual_seed(2)
    drawn = {name: torch.randn(70_000, generator=generator).to(dtype) for name in ("a", "b", "c")}
    for name in ("base", "one", "two"):
        # A tensor of equal models is only copied.
        moved = {key: tensor + (name > "p" and key != "b") for key, tensor in drawn.items()}
        moved["c"] += torch.randn(70_000, generator=generator).to(dtype)
        save_tensors(tmp_path / name, moved)
    models = [tmp_path / name for name in ("base", "one", "two")]
    plan = plan_of(models[:2] if method == "arcee_fusion" else models, method, parameters)
    seen: list[int] = []
    outliermerge.run(plan, output=tmp_path / "out", on_progress=seen.append, threads=1)
    assert sum(seen) == plan.work_bytes
    last = plan.jobs[-1]
    assert sum(seen[:-1]) < plan.work_bytes  # the last bytes are those of the last tensor
    assert seen[-1] <= plan.num_work_bytes(last)


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_progress_of_a_run_that_goes_on_ends_where_it_was_planned(
    models, tmp_path, monkeypatch, trim
):
    plan = plan_of(models, "ties", {"density": 0.3, "trim": trim})
    with stopping_after(monkeypatch, 1), pytest.raises(KeyboardInterrupt):
        outliermerge.run(plan, output=tmp_path / "out", threads=1)
    seen: list[int] = []
    done = outliermerge.run(plan, output=tmp_path / "out", on_progress=seen.append, threads=1)
    assert done.num_resumed == 1
    assert sum(seen) == plan.work_bytes


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.3, "trim": "model"}),
        ("min_sigma", {"sigma": "model", "scale": "mad"}),
        ("pcb", {}),
    ],
)
def test_a_model_may_have_tensors_of_64_bits_beside_others(method, parameters, tmp_path):
    generator = torch.Generator().manual_seed(1)
    for name in ("base", "one", "two"):
        drawn = {key: torch.randn(9000, generator=generator) for key in ("a", "b", "c")}
        save_tensors(tmp_path / name, drawn | {"b": drawn["b"].double()})
    spec = {
        "merge_method": method, "base_model": str(tmp_path / "base"), "parameters": parameters,
        "models": [{"model": str(tmp_path / name)} for name in ("one", "two")],
    }  # fmt: skip
    found = [
        outliermerge.run(spec, output=tmp_path / str(kernels), kernels=kernels).manifest["tensors"]
        for kernels in (True, False)
    ]
    for name in ("a", "b", "c"):
        (rows, expected) = (each[name]["statistics"] for each in found)
        for key, values in rows.items():
            flat, wanted = (torch.tensor(x, dtype=torch.float64) for x in (values, expected[key]))
            assert torch.allclose(flat, wanted, rtol=1e-6), (name, key)
