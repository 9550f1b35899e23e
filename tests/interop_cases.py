"""Merges for the tests of other tools: each of the table's methods, with parameters that matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import as_many_as, load_folder
from every_method import OF_ONE_TENSOR
from torch import Tensor

import outliermerge
from outliermerge.methods.table import METHODS

# Of one value for all models, so that every tool can be told them in the same way.
PARAMETERS: dict[str, dict[str, Any]] = {
    "min_sigma": {"t": 1.5, "lambda": 0.75},
    "linear": {"weight": 0.5, "normalize": False},
    "task_arithmetic": {"weight": 0.75},
    "ties": {"density": 0.25, "weight": 0.5},
    "dare_linear": {"density": 0.5, "seed": 7},
    "dare_ties": {"density": 0.5, "rescale_by": "l1", "seed": 7},
    "breadcrumbs": {"density": 0.5, "gamma": 0.125},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.125},
    "della": {"density": 0.5, "epsilon": 0.25, "seed": 7},
    "della_linear": {"density": 0.5, "epsilon": 0.25, "seed": 7},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.25},
    "nuslerp": {"nuslerp_flatten": False},
    "model_stock": {"filter_wise": True},
    **OF_ONE_TENSOR,  # these tools show a method one tensor at a time
    "passthrough": {"scale": 0.5},
}


def with_base(name: str) -> bool:
    """Tell whether a method is tried with a base model: wherever it can be one of the inputs."""
    method = METHODS[name]
    return method.needs_base or method.with_base is not None or method.base_as == "model"


def models_of(name: str, models: list[Path]) -> list[Path]:
    """Return as many models as a method takes: two, or three where it needs them."""
    return as_many_as(name, models[: max(2, METHODS[name].min_models)])


def run_here(
    name: str,
    base: Path | None,
    models: list[Path],
    folder: Path,
    *,
    own: list[dict[str, Any]] | None = None,
    out_dtype: str = "float32",
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge files by this package alone, and return the tensors of the output."""
    seed = parameters.pop("seed", 0)
    spec: dict[str, Any] = {
        "merge_method": name,
        "models": [
            {"model": str(model), "parameters": given}
            for model, given in zip(models, own or [{} for _ in models], strict=True)
        ],
        "parameters": parameters,
        "out_dtype": out_dtype,
        "seed": seed,
    }
    if base is not None:
        spec["base_model"] = str(base)
    outliermerge.run(spec, output=folder)
    return load_folder(folder)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].equal(tensor), name


every_method = pytest.mark.parametrize("name", METHODS)
