"""A plan counts the readings of methods that search a rank in all tensors of a model together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tensors

import outliermerge

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
def test_the_work_done_is_the_work_planned(models, tmp_path, method, parameters, readings):
    base, *others = map(str, models)
    spec: dict[str, Any] = {"merge_method": method, "base_model": base, "parameters": parameters}
    plan = outliermerge.plan(spec | {"models": [{"model": model} for model in others]})
    assert {job.num_passes for job in plan.jobs} == {readings}
    seen: list[int] = []
    outliermerge.run(plan, output=tmp_path / "out", on_progress=seen.append)
    # Besides, the first elements of two sources are compared.
    assert 1 <= sum(seen) / plan.work_bytes < 1.25


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
