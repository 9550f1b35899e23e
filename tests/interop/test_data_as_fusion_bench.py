"""Methods that take statistics give FusionBench's values where both are given the same matrices."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors
from statistics_of import save_statistics
from torch import Tensor

import outliermerge

pytestmark = pytest.mark.interop
SHAPES = {"layer.q.weight": (50, 40), "layer.down.weight": (40, 70), "layer.norm.weight": (40,)}
LINEAR = ("layer.q.weight", "layer.down.weight")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder, drawn = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(2)
    for number in range(3):
        model = {name: torch.randn(shape, generator=drawn) for name, shape in SHAPES.items()}
        inputs = {name: torch.randn(90, SHAPES[name][1], generator=drawn) for name in LINEAR}
        save_tensors(folder / f"m{number}", model)
        save_statistics(
            folder / f"s{number}",
            folder / f"m{number}",
            gram={name: x.T @ x / len(x) for name, x in inputs.items()},
            fisher={n: torch.randn(s, generator=drawn).square() for n, s in SHAPES.items()},
        )
    return folder


def merged(place: Path, folder: Path, method: str, weights: list[float], **parameters: Any) -> Any:
    models = [
        {
            "model": str(place / f"m{number}"),
            "statistics": str(place / f"s{number}"),
            "parameters": {"weight": weight},
        }
        for number, weight in enumerate(weights)
    ]
    spec = {"merge_method": method, "models": models, "parameters": parameters}
    outliermerge.run(spec, output=folder)
    return load_folder(folder)


def by_name(place: Path) -> dict[str, list[Tensor]]:
    models = [load_folder(place / f"m{number}") for number in range(3)]
    return {name: [model[name].double() for model in models] for name in SHAPES}


@pytest.mark.parametrize("reduce", [0.9, 0.6, 1.0])
def test_regmean(reduce, place, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what FusionBench imports
        from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    grams = [load_folder(place / f"s{number}/gram") for number in range(3)]
    theirs = merging_with_regmean_weights(
        by_name(place),
        [{n.removesuffix(".weight"): own[n].double() for n in LINEAR} for own in grams],
        reduce_non_diagonal_ratio=reduce,
    )
    ours = merged(place, tmp_path / "out", "regmean", [1, 1, 1], reduce=reduce)
    for name in SHAPES:
        assert torch.allclose(ours[name].double(), theirs[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher(normalize, place, tmp_path):
    """Its norms of whole models, and its scales, are the weights of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
    fishers = [load_folder(place / f"s{number}/fisher") for number in range(3)]
    scales = [0.2, 0.5, 0.3]
    theirs = merging_with_fisher_weights(
        by_name(place),
        [{name: one.double() for name, one in own.items()} for own in fishers],
        torch.tensor(scales, dtype=torch.float64),
        normalize_fisher_weight=normalize,
        minimal_fisher_weight=1e-6,
    )
    if normalize:
        norms = [sum(float(one.double().square().sum()) for one in own.values()) for own in fishers]
        scales = [scale / norm**0.5 for scale, norm in zip(scales, norms, strict=True)]
    ours = merged(place, tmp_path / "out", "fisher", scales, epsilon=1e-6)
    for name in SHAPES:
        assert torch.allclose(ours[name].double(), theirs[name], rtol=1e-5, atol=1e-6), name
