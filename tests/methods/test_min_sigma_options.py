"""What σ of min-σ is measured over and how, and outliers of opposite signs: against the formula."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load_folder, save_tensors
from torch import Tensor

import outliermerge

SHAPES = {"wide": (37, 61), "conv": (5, 3, 2, 2), "vector": (101,), "even": (4, 6), "one": (1,)}
OPTIONS = list(itertools.product(("tensor", "row", "model"), ("std", "mad"), ("sum", "elect")))
WEIGHTS = [1.0, -0.5, 2.0]


@pytest.fixture(scope="module")
def states() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(4)

    def drawn(scale: float) -> dict[str, Tensor]:
        # A t distribution: most elements are noise, some are far from 0.
        normal = {
            name: torch.randn(3, *shape, generator=generator) for name, shape in SHAPES.items()
        }
        return {name: scale * x[0] / x[1:].square().mean(0).sqrt() for name, x in normal.items()}

    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return base, [drawn(scale) for scale in (1, 2, 1.5)]


def deviation(values: np.ndarray, scale: str) -> float:
    if scale == "std":
        return float(values.std())
    return 1.4826 * float(np.sort(abs(values).ravel())[(values.size - 1) // 2])


def expected(name: str, models: list[dict[str, Tensor]], sigma: str, scale: str, conflict: str):
    deltas = [model[name].double().numpy() for model in models]
    rows = [delta.reshape(len(delta) if delta.ndim > 1 else 1, -1) for delta in deltas]
    if sigma == "row":
        each = [[deviation(row, scale) for row in matrix] for matrix in rows]
        threshold = 1.5 * np.array(each).min(0)[:, None]
    elif sigma == "tensor":
        threshold = np.array(1.5 * min(deviation(delta, scale) for delta in deltas))
    else:
        whole = [np.concatenate([t.double().numpy().ravel() for t in m.values()]) for m in models]
        threshold = np.array(1.5 * min(deviation(model, scale) for model in whole))
    outliers = [np.where(abs(row) > threshold, row, 0.0) for row in rows]
    vote = sum(weight * each for weight, each in zip(WEIGHTS, outliers, strict=True))
    total = np.zeros_like(rows[0])
    for weight, row, own in zip(WEIGHTS, rows, outliers, strict=True):
        kept = own
        if conflict == "elect":
            kept = np.where(np.sign(weight * own) == np.where(vote >= 0, 1, -1), own, 0)
        total += weight * (kept + (row - own) / len(rows))
    return total.reshape(deltas[0].shape), [int((own != 0).sum()) for own in outliers]


@pytest.mark.parametrize(("sigma", "scale", "conflict"), OPTIONS)
def test_values_are_those_of_the_formula(sigma, scale, conflict, states):
    base, models = states
    merged = outliermerge.merge_state_dicts(
        models, base=base, method="min_sigma", t=1.5, weight=WEIGHTS,
        sigma=sigma, scale=scale, conflict=conflict,
    )  # fmt: skip
    for name, tensor in merged.items():
        wanted, _ = expected(name, models, sigma, scale, conflict)
        assert np.allclose(tensor.numpy(), wanted, rtol=1e-5, atol=1e-5), name


@pytest.fixture(scope="module")
def folders(states, tmp_path_factory) -> tuple[Path, list[Path]]:
    base, models = states
    place = tmp_path_factory.mktemp("models")
    saved = [save_tensors(place / f"m{n}", model) for n, model in enumerate(models)]
    return save_tensors(place / "base", base), saved


@pytest.mark.parametrize("scale", ["std", "mad"])
@pytest.mark.parametrize("sigma", ["tensor", "row", "model"])
@pytest.mark.parametrize("kernels", [True, False])
def test_files_give_the_same_and_count_outliers(kernels, sigma, scale, folders, states, tmp_path):
    spec: dict[str, Any] = {
        "merge_method": "min_sigma",
        "base_model": str(folders[0]),
        "models": [
            {"model": str(path), "parameters": {"weight": weight}}
            for path, weight in zip(folders[1], WEIGHTS, strict=True)
        ],
        "parameters": {"t": 1.5, "sigma": sigma, "scale": scale},
    }
    outliermerge.run(spec, output=tmp_path / "out", kernels=kernels)
    manifest = json.loads((tmp_path / "out" / "outliermerge.json").read_text())["tensors"]
    for name, tensor in load_folder(tmp_path / "out").items():
        wanted, outliers = expected(name, states[1], sigma, scale, "sum")
        assert np.allclose(tensor.numpy(), wanted, rtol=1e-5, atol=1e-5), name
        assert manifest[name]["statistics"]["outliers"] == outliers


def test_a_median_of_0_keeps_every_change_whole():
    own = torch.tensor([0.0, 0, 0, 1, -2])
    other = torch.tensor([1.0, 1, 1, 1, 1])
    merged = outliermerge.merge_tensors([own, other], base=torch.zeros(5), scale="mad")
    assert torch.equal(merged, own + other)


def test_elected_outliers_lose_to_no_smaller_ones_of_the_other_sign():
    noise = 3 * [0.125]
    big, small = torch.tensor([9.0, *noise, -9.0]), torch.tensor([-3.0, *noise, -3.0])
    merged = outliermerge.merge_tensors(
        [big, small], base=torch.zeros(5), scale="mad", conflict="elect"
    )
    assert merged.tolist() == [9.0, *noise, -12.0]


def test_nan_stays_where_signs_are_elected():
    own = torch.tensor([float("nan"), 1.0, -1.0])
    merged = outliermerge.merge_tensors(
        [own, -own], base=torch.zeros(3), sigma="row", scale="mad", conflict="elect",
        allow_non_finite=True,
    )  # fmt: skip
    assert merged.isnan().tolist()[0]


def test_sigma_of_models_takes_what_one_lacks_as_the_bases(folders, states, tmp_path):
    lacking = {name: tensor for name, tensor in states[1][0].items() if name != "wide"}
    filled = lacking | {"wide": states[0]["wide"]}
    outputs = []
    for name, state in {"lacking": lacking, "filled": filled}.items():
        models = [save_tensors(tmp_path / name, state), *folders[1][1:]]
        spec = {
            "merge_method": "min_sigma", "base_model": str(folders[0]), "missing": "base",
            "models": [{"model": str(path)} for path in models], "parameters": {"sigma": "model"},
        }  # fmt: skip
        outliermerge.run(spec, output=tmp_path / f"of-{name}")
        outputs.append(load_folder(tmp_path / f"of-{name}"))
    assert all(outputs[0][name].equal(outputs[1][name]) for name in outputs[1])
    assert outliermerge.plan(spec | {"parameters": {"sigma": "row"}}).jobs
