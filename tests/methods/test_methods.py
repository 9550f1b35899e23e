"""Every method against its formula, written here in float64, on checkpoints of true layouts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import KINDS, family, load_folder, save_tensors
from every_method import NEEDS_BASE, OF_DELTAS, SEVERAL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import outliermerge
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, StandardDeviation
from outliermerge.methods.statistics.trim import Trim

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# The formulas. `p` holds a tensor's parameters, per-model ones as a list.


def min_sigma(base: Tensor | None, models: list[Tensor], p: dict[str, Any]) -> Tensor:
    deltas = [(model - base).double() for model in models]
    sigma = min(float(np.std(delta.numpy())) for delta in deltas)
    limit = p.get("t", 2) * sigma
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, p["weight"], strict=True):
        total += weight * torch.where(delta.abs() <= limit, delta / len(deltas), delta)
    return base.double() + p.get("lambda", 1) * total


def linear(base: Tensor | None, models: list[Tensor], p: dict[str, Any]) -> Tensor:
    total = sum(w * model.double() for w, model in zip(p["weight"], models, strict=True))
    return total / sum(p["weight"]) if p.get("normalize", True) else total


def task_arithmetic(base: Tensor | None, models: list[Tensor], p: dict[str, Any]) -> Tensor:
    total = sum(w * (model - base).double() for w, model in zip(p["weight"], models, strict=True))
    if p.get("normalize", False):
        total = total / sum(p["weight"])
    return base.double() + p.get("lambda", 1) * total


def ties(base: Tensor | None, models: list[Tensor], p: dict[str, Any]) -> Tensor:
    weighted = []
    for model, weight, density in zip(models, p["weight"], p["density"], strict=True):
        delta = (model - base).double()
        magnitudes = delta.abs().flatten().sort(descending=True).values
        k = max(1, int(density * len(magnitudes)))
        kept = torch.where(delta.abs() >= magnitudes[k - 1], delta, 0.0)
        if p.get("rescale", False):
            kept = kept * (delta.abs().sum() / kept.abs().sum())
        weighted.append(weight * kept)
    majority = 2 * (sum(weighted) >= 0).double() - 1
    total, divisor = torch.zeros_like(majority), torch.zeros_like(majority)
    for change, weight in zip(weighted, p["weight"], strict=True):
        agrees = (torch.sign(change) == majority).double()
        total += change * agrees
        divisor += weight * agrees
    if p.get("normalize", True):
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return base.double() + p.get("lambda", 1) * total


def passthrough(base: Tensor | None, models: list[Tensor], p: dict[str, Any]) -> Tensor:
    return p.get("scale", 1) * models[0].double()


ORACLES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (min_sigma, linear, task_arithmetic, ties, passthrough)
}
PER_MODEL = {"weight": 1.0, "density": 1.0}


# What a spec's parameters come to for one tensor.


def position_of(name: str, names: list[str]) -> float:
    pattern = re.compile(r"^(.*?\b(?:layers|layer|blocks)\.)(\d+)\.")
    match = pattern.match(name)
    if match is None:
        return 0.0
    stack = match[1]
    last = max(int(m[2]) for m in map(pattern.match, names) if m and m[1] == stack)
    return int(match[2]) / last


def value_at(raw: Any, name: str, position: float) -> Any:
    if isinstance(raw, dict):
        raw = [raw]
    if isinstance(raw, list) and isinstance(raw[0], dict):
        fitting = [e for e in raw if e.get("filter") in (None, "*") or e["filter"] in name]
        return value_at(fitting[0]["value"], name, position) if fitting else None
    if isinstance(raw, list):
        return float(np.interp(position, np.linspace(0, 1, len(raw)), raw))
    return raw


def parameters_of(spec: dict[str, Any], name: str, names: list[str]) -> dict[str, Any]:
    position = position_of(name, names)
    shared = spec.get("parameters", {})
    found = {key: value_at(raw, name, position) for key, raw in shared.items()}
    for key, default in PER_MODEL.items():
        levels = [[m.get("parameters", {}), shared] for m in spec["models"]]
        found[key] = [
            next(
                (
                    value
                    for level in both
                    if key in level and (value := value_at(level[key], name, position)) is not None
                ),
                default,
            )
            for both in levels
        ]
    return {key: value for key, value in found.items() if value is not None}


def assert_close(merged: Tensor, expected: Tensor, scale: float, name: str) -> None:
    """Allow float32 arithmetic at the inputs' scale, and one rounding to the stored dtype."""
    kind = torch.finfo(merged.dtype)
    rounding = kind.eps / 2 * expected.abs() + kind.smallest_normal * kind.eps
    allowed = 1e-6 * scale + rounding
    excess = ((merged.double() - expected).abs() - allowed).max()
    assert excess <= 0, f"{name}: off by {excess} more than allowed"


def run(folder: Path, method: str, base: Path | None, models: list[Path], **more: Any):
    own = more.pop("own", [{}] * len(models))
    spec: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(m)} | ({"parameters": p} if p else {})
            for m, p in zip(models, own, strict=True)
        ],
    } | more
    if base is not None:
        spec["base_model"] = str(base)
    return spec, outliermerge.run(spec, output=folder / "out", threads=2)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    @cache
    def build(kind: str, num_models: int, dtype: torch.dtype, shard_size: str):
        folder = tmp_path_factory.mktemp(kind)
        return family(kind, folder, num_models=num_models, dtype=dtype, shard_size=shard_size)

    return build


def filtered(attention: Any, embedding: Any, otherwise: Any) -> list[dict[str, Any]]:
    return [
        {"filter": "att", "value": attention},
        {"filter": "embed", "value": embedding},
        {"value": otherwise},
    ]


# Weights of ties are sums of few powers of two, so that float32 sees the same sign of a sum.
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "min_sigma": ("min_sigma", {}, []),
    "min_sigma-t3": ("min_sigma", {"t": 3}, []),
    "min_sigma-t0": ("min_sigma", {"t": 0}, []),
    "min_sigma-t-by-layer": ("min_sigma", {"t": [0.5, 1.5, 3.5, 2]}, []),
    "min_sigma-t-by-filter": ("min_sigma", {"t": filtered([1, 2], 3, 0.7)}, []),
    "min_sigma-weight-lambda": (
        "min_sigma",
        {"lambda": 0.6, "weight": 0.9},
        [{"weight": 1.7}, {"weight": [0.2, -0.4]}],
    ),
    "linear": ("linear", {}, []),
    "linear-weights": ("linear", {}, [{"weight": 0.3}, {"weight": 1.1}, {"weight": 0.4}]),
    "linear-sum": (
        "linear",
        {"normalize": False, "weight": filtered(0.3, 0.2, [0.5, 0.6])},
        [{"weight": {"filter": "att", "value": [0.1, 0.9]}}],
    ),
    "task_arithmetic": ("task_arithmetic", {}, []),
    "task_arithmetic-mean": (
        "task_arithmetic",
        {"normalize": True, "lambda": filtered(0.4, 1, 1.3)},
        [{"weight": 0.3}, {"weight": [0.1, 0.7, 0.2]}, {"weight": 2}],
    ),
    "ties": ("ties", {"density": 0.3}, []),
    "ties-whole": ("ties", {}, [{"weight": 0.75}]),
    "ties-rescale": (
        "ties",
        {"density": filtered(0.2, 0.5, 0.6), "rescale": True, "lambda": 0.8},
        [{"weight": 1.25, "density": 0.1}, {"weight": 0.5}],
    ),
    "ties-sum": (
        "ties",
        {"normalize": False, "density": [0.25, 0.75]},
        [{"weight": 0.5}, {"weight": [0.25, 1.25]}, {"weight": -0.75}],
    ),
    "passthrough": ("passthrough", {}, []),
    "passthrough-scale": ("passthrough", {"scale": filtered([0.5, 1.5], 2, 0.7)}, []),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_follows_the_formula(kind, case, families, tmp_path):
    turn = KINDS.index(kind) + list(CASES).index(case)
    dtype, num_models = DTYPES[turn % 3], 2 + turn // 3 % 2
    base, models = families(kind, num_models, dtype, "50KB" if turn % 2 else "5GB")
    method, parameters, own = CASES[case]
    if method == "passthrough":
        models = models[:1]
    own = (own + [{}] * 3)[: len(models)]
    needs_base = method not in ("linear", "passthrough")
    spec, result = run(
        tmp_path, method, base if needs_base else None, models, own=own, parameters=parameters
    )
    inputs, weights = [load_folder(model) for model in models], load_folder(base)
    merged = load_folder(result.output)
    assert merged.keys() == weights.keys()
    for name, tensor in merged.items():
        p = parameters_of(spec, name, list(weights))
        before, after = weights[name].float(), [model[name].float() for model in inputs]
        expected = ORACLES[method](before, after, p)
        assert tensor.dtype == dtype
        assert_close(tensor, expected, max(float(x.abs().max()) for x in [before, *after]), name)


@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", [name for name in ORACLES if name in SEVERAL])
def test_every_dtype_and_number_of_models(method, dtype, num_models, families, tmp_path):
    base, models = families("llama", num_models, dtype, "50KB")
    own = [{"weight": weight} for weight in (1.5, 0.75, 0.25)[:num_models]]
    if method == "ties":
        own = [p | {"density": d} for p, d in zip(own, (0.4, 0.15, 0.7), strict=False)]
    needs_base = method in NEEDS_BASE
    spec, result = run(tmp_path, method, base if needs_base else None, models, own=own)
    weights, inputs = load_folder(base), [load_folder(model) for model in models]
    for name, tensor in load_folder(result.output).items():
        before, after = weights[name].float(), [model[name].float() for model in inputs]
        expected = ORACLES[method](before, after, parameters_of(spec, name, list(weights)))
        assert_close(tensor, expected, max(float(x.abs().max()) for x in [before, *after]), name)


# Decisions.


def tensors_of(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Run a merge of bare tensors: `base` and `models` are dicts, the rest is of the spec."""
    method = changes.pop("method", "min_sigma")
    base = save_tensors(folder / "base", {k: v.clone() for k, v in changes.pop("base").items()})
    models = [
        save_tensors(folder / f"m{number}", {k: v.clone() for k, v in tensors.items()})
        for number, tensors in enumerate(changes.pop("models"))
    ]
    _, result = run(folder, method, base, models, **changes)
    return load_folder(result.output)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "outliermerge.json").read_text())["tensors"]


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    )


ZERO4 = {"w": torch.zeros(4)}


@pytest.mark.parametrize(
    ("delta", "t", "is_outlier"),
    [
        # mean 1, population σ 1; the sample's is 1.15, that about zero 1.41
        ([0, 0, 2, 2], 1.9, [False, False, True, True]),
        # mean 2, σ 1: an interval about the mean would hold all
        ([1, 1, 3, 3], 2, [False, False, True, True]),
        # mean 0, σ 1: exactly ±tσ is noise
        ([1, -1, 1, -1], 1, [False] * 4),
        ([1, -1, 1, -1], math.nextafter(1, 0) - 1e-7, [True] * 4),
        # mean 0.5, σ 0.5
        ([0, 1, 0, 1], 2, [False] * 4),
        ([0, 1, 0, 1], 1.99, [False, True, False, True]),
    ],
)
def test_sigma_is_the_population_deviation_and_the_interval_is_centred_and_closed(
    delta, t, is_outlier, tmp_path
):
    own = torch.tensor(delta, dtype=torch.float32)
    wide = torch.tensor([64.0, -64.0, 64.0, -64.0])
    merged = tensors_of(tmp_path, base=ZERO4, models=[{"w": own}, {"w": wide}], parameters={"t": t})
    expected = wide + torch.where(torch.tensor(is_outlier), own, own / 2)
    assert torch.equal(merged["w"], expected)
    assert manifest_of(tmp_path)["w"]["statistics"]["outliers"] == [sum(is_outlier), 4]


def test_the_smallest_sigma_classifies_all_models_and_the_next_float_is_an_outlier(tmp_path):
    above = float(np.nextafter(np.float32(2), np.float32(3)))
    narrow = torch.tensor([1.0, -1.0, 1.0, -1.0])
    wide = torch.tensor([2.0, -2.0, above, -above])
    merged = tensors_of(tmp_path, base=ZERO4, models=[{"w": narrow}, {"w": wide}])
    half = narrow / 2
    assert torch.equal(merged["w"], half + torch.tensor([1.0, -1.0, above, -above]))
    statistics = manifest_of(tmp_path)["w"]["statistics"]
    assert statistics["threshold"] == 2
    assert statistics["sigma"] == pytest.approx([1, 2], rel=1e-6)


def test_n_counts_the_task_models_that_have_the_tensor(tmp_path):
    noise = torch.tensor([3.0, -3.0, 3.0, -3.0])
    has, lacks = {"w": noise, "v": noise}, {"v": noise}
    merged = tensors_of(
        tmp_path,
        base={"w": torch.zeros(4), "v": torch.zeros(4)},
        models=[has, lacks, has],
        missing="base",
    )
    assert torch.equal(merged["w"], noise / 2 * 2)
    assert torch.allclose(merged["v"], noise, rtol=1e-6)
    assert len(manifest_of(tmp_path)["w"]["statistics"]["sigma"]) == 2

    uneven = {"w": torch.tensor([9.0, 1.0, -1.0, 0.0])}
    folder = tmp_path / "uneven"
    merged = tensors_of(
        folder, base={"w": torch.zeros(4), "v": torch.zeros(4)},
        models=[uneven | {"v": noise}, lacks, {"w": noise, "v": noise}], missing="base",
    )  # fmt: skip
    expected = min_sigma(torch.zeros(4), [uneven["w"], noise], {"weight": [1, 1]})
    assert torch.equal(merged["w"].double(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_task_model_comes_back_bit_for_bit(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(500, generator=generator) * 100).to(dtype)
    model = (torch.randn(500, generator=generator) * 1e-3).to(dtype)
    model[:2] = torch.tensor([-0.0, 0.0])
    if dtype == torch.float32:
        assert not same_bytes(base + (model - base), model)
    merged = tensors_of(tmp_path, base={"w": base}, models=[{"w": model}])
    assert same_bytes(merged["w"], model)


def test_a_tensor_that_one_of_two_models_has_is_that_models_bit_for_bit(tmp_path):
    base, model = torch.full((4,), 1e8), torch.tensor([1.0, -0.0, 3e-9, 7.0])
    merged = tensors_of(
        tmp_path,
        base={"w": base, "v": base},
        models=[{"w": model, "v": model}, {"v": base + 64}],
        missing="base",
    )
    assert same_bytes(merged["w"], model)
    assert not same_bytes(merged["v"], model)


def test_one_task_model_with_a_weight_or_lambda_is_scaled(tmp_path):
    model = {"w": torch.tensor([1.0, -1.0, 4.0, 0.0])}
    for number, (parameters, own) in enumerate([({"lambda": 0.5}, {}), ({}, {"weight": 0.5})]):
        merged = tensors_of(
            tmp_path / str(number), base=ZERO4, models=[model], parameters=parameters, own=[own]
        )
        assert torch.equal(merged["w"], model["w"] / 2)


@pytest.mark.parametrize("frozen", [0.0, 0.25], ids=["untouched", "shifted"])
def test_a_model_without_deviation_keeps_every_element_whole(frozen, tmp_path):
    base = torch.tensor([0.5, -1.0, 2.0, 4.0])
    small = torch.tensor([2.0**-20, -(2.0**-20), 0.0, 1.0])
    merged = tensors_of(
        tmp_path, base={"w": base}, models=[{"w": base + frozen}, {"w": base + small}]
    )
    assert torch.equal(merged["w"], base + frozen + small)
    assert manifest_of(tmp_path)["w"]["statistics"]["threshold"] == 0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("method", [name for name in OF_DELTAS if name in SEVERAL])
@pytest.mark.sampled(3)
def test_a_tensor_that_no_model_changed_is_the_bases_byte_for_byte(method, dtype, tmp_path):
    frozen = torch.tensor([-0.0, 0.0, 1.5, -2.0]).to(dtype)
    moved = frozen + 1
    merged = tensors_of(
        tmp_path,
        method=method,
        base={"w": frozen, "v": frozen},
        models=[{"w": frozen, "v": moved}, {"w": frozen, "v": moved}],
    )
    assert same_bytes(merged["w"], frozen)
    manifest = manifest_of(tmp_path)
    assert [manifest[name]["action"] for name in ("w", "v")] == ["copy", "merge"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_float32_with_one_rounding_at_the_end(dtype, tmp_path):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4000, generator=generator).to(dtype)
    models = [(base + torch.randn(4000, generator=generator) * s).to(dtype) for s in (0.1, 0.2)]

    def rule(base: Tensor, models: list[Tensor]) -> Tensor:
        deltas = [model - base for model in models]
        limit = 2 * min(float(np.std(delta.double().numpy())) for delta in deltas)
        kept = [torch.where(d.abs() > limit, d, d / 2) for d in deltas]
        return base + (kept[0] + kept[1])

    merged = tensors_of(tmp_path, base={"w": base}, models=[{"w": m} for m in models])["w"]
    once = rule(base.float(), [model.float() for model in models]).to(dtype)
    assert same_bytes(merged, once)
    assert not same_bytes(rule(base, models), once)


def test_a_weight_never_moves_the_threshold(tmp_path):
    generator = torch.Generator().manual_seed(4)
    deltas = [torch.randn(1000, generator=generator) * s for s in (1.0, 1.5)]
    plain = tensors_of(
        tmp_path / "1", base={"w": torch.zeros(1000)}, models=[{"w": d} for d in deltas]
    )
    merged = tensors_of(
        tmp_path / "2",
        base={"w": torch.zeros(1000)},
        models=[{"w": d} for d in deltas],
        own=[{"weight": 256.0}, {"weight": 2.0**-8}],
        parameters={"lambda": 8},
    )
    left, right = (manifest_of(tmp_path / n)["w"]["statistics"] for n in "12")
    assert left == right and min(left["outliers"]) > 0
    expected = min_sigma(torch.zeros(1000), deltas, {"weight": [256, 2**-8], "lambda": 8})
    assert torch.allclose(merged["w"].double(), expected, rtol=1e-6)
    assert not torch.allclose(merged["w"], plain["w"])


def test_lambda_scales_the_sum_of_task_vectors(tmp_path):
    base = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    models = [{"w": base["w"] + torch.tensor([8.0, 1.0, -1.0, 0.0])}] * 2
    for method in ("min_sigma", "task_arithmetic", "ties"):
        folders = [tmp_path / method / name for name in ("whole", "scaled")]
        whole, scaled = (
            tensors_of(f, method=method, base=base, models=models, parameters={"lambda": value})
            for f, value in zip(folders, (1, -0.25), strict=True)
        )
        change = whole["w"] - base["w"]
        assert change.abs().max() > 0
        assert torch.equal(scaled["w"] - base["w"], change * -0.25)


def test_t_by_gradient_and_filter_moves_the_threshold_layer_by_layer(tmp_path):
    delta = torch.tensor([1.0, -1.0, 1.0, -1.0])
    wide = delta * 16
    names = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("mlp", "attn")]
    names += ["embed.weight", "norm.weight", "tower.layers.0.mlp.weight", "projector.2.weight"]
    tensors_of(
        tmp_path,
        base={name: torch.zeros(4) for name in names},
        models=[dict.fromkeys(names, delta), dict.fromkeys(names, wide)],
        parameters={"t": [{"filter": "attn", "value": 5}, {"value": [1, 3, 9, 2, 6]}]},
    )
    thresholds = {k: v["statistics"]["threshold"] for k, v in manifest_of(tmp_path).items()}
    expected = {name: 5.0 if "attn" in name else 1.0 for name in names}
    for layer, t in enumerate([1.0, 9.0, 6.0]):
        expected[f"model.layers.{layer}.mlp.weight"] = t
    expected["tower.layers.0.mlp.weight"] = 6.0  # the only layer of its stack is the last
    assert thresholds == expected


def test_counts_of_outliers_stay_counts_where_values_are_not_finite(tmp_path):
    changed = torch.tensor([math.nan, 1.0, -1.0, 0.0])
    base = save_tensors(tmp_path / "base", {"w": torch.zeros(4)})
    models = [
        save_tensors(tmp_path / name, {"w": delta})
        for name, delta in (("a", changed), ("b", torch.tensor([1.0, -1.0, 1.0, -1.0])))
    ]
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
    }
    result = outliermerge.run(spec, output=tmp_path / "out", allow_non_finite=True)
    assert result.non_finite.keys() == {"w"}
    assert load_folder(result.output)["w"].isnan().tolist() == [True, False, False, False]
    statistics = result.manifest["tensors"]["w"]["statistics"]
    assert all(0 <= count <= 4 for count in statistics["outliers"])


@pytest.mark.parametrize("method", ["min_sigma", "task_arithmetic", "ties"])
def test_an_infinite_element_stays_infinite_where_that_is_allowed(method, tmp_path):
    base = save_tensors(tmp_path / "base", {"w": torch.zeros(4)})
    models = [
        save_tensors(tmp_path / name, {"w": torch.tensor(delta)})
        for name, delta in (("a", [math.inf, 1.0, -1.0, 0.0]), ("b", [1.0, -1.0, 1.0, -1.0]))
    ]
    spec = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
    }
    result = outliermerge.run(spec, output=tmp_path / "out", allow_non_finite=True)
    merged = load_folder(result.output)["w"]
    assert merged[0] == math.inf
    assert merged[1:].isfinite().all()


# TIES.


@pytest.mark.parametrize(
    ("density", "num_elements", "num_kept"),
    [(0.05, 10, 1), (0.29, 100, 28), (0.5, 7, 3), (0.999, 10, 9), (1, 10, 10), (0, 10, 0)],
)
def test_ties_keeps_exactly_k_elements(density, num_elements, num_kept, tmp_path):
    order = torch.randperm(num_elements, generator=torch.Generator().manual_seed(0))
    delta = (order + 1).float() * torch.where(order % 2 == 0, 1.0, -1.0)
    merged = tensors_of(
        tmp_path,
        method="ties",
        base={"w": torch.full((num_elements,), 0.5)},
        models=[{"w": 0.5 + delta}],
        parameters={"density": density},
    )["w"]
    expected = torch.where(order >= num_elements - num_kept, delta, 0.0)
    assert torch.equal(merged - 0.5, expected)


def test_ties_keeps_every_element_tied_with_the_kth(tmp_path):
    delta = torch.tensor([4.0, -2.0, 2.0, 2.0, 1.0, -2.0, 0.0, 1.5])
    merged = tensors_of(
        tmp_path,
        method="ties",
        base={"w": torch.zeros(8)},
        models=[{"w": delta}],
        parameters={"density": 0.25},
    )["w"]
    assert torch.equal(merged, torch.tensor([4.0, -2.0, 2.0, 2.0, 0.0, -2.0, 0.0, 0.0]))


def test_ties_in_float64_tells_apart_what_float32_cannot(tmp_path):
    delta = torch.tensor([1.0, 1 + 1e-12, 1 - 1e-12, 0.5], dtype=torch.float64)
    merged = tensors_of(
        tmp_path,
        method="ties",
        base={"w": torch.zeros(4, dtype=torch.float64)},
        models=[{"w": delta}],
        parameters={"density": 0.25},
    )["w"]
    assert same_bytes(merged, torch.tensor([0, 1 + 1e-12, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("method", ["min_sigma", "linear", "task_arithmetic", "ties"])
def test_dtype_float64_computes_in_float64(method, tmp_path):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(300, generator=generator)
    models = [base + torch.randn(300, generator=generator) * s for s in (0.1, 0.3, 0.2)]
    own = [{"weight": w} for w in (0.3, 0.9, 0.7)]
    p: dict[str, Any] = {"weight": [0.3, 0.9, 0.7], "density": [0.5] * 3}
    parameters = {"density": 0.5} if method == "ties" else {}
    merged = tensors_of(
        tmp_path,
        method=method,
        base={"w": base},
        models=[{"w": m} for m in models],
        own=own,
        parameters=parameters,
        dtype="float64",
    )["w"]
    expected = ORACLES[method](base.double(), [m.double() for m in models], p)
    assert merged.dtype == torch.float64
    assert torch.allclose(merged, expected, rtol=0, atol=1e-14 * float(expected.abs().max()))


# Statistics.


def measured(statistic, block_ME: Tensor, parameters: dict[str, Any] | None = None) -> list[Any]:
    state = statistic.start(*block_ME.shape, parameters or {})
    passes = 0
    while not isinstance(state, list):
        for start in range(0, block_ME.shape[1], CHUNK_ELEMENTS):
            state.add(state.measure(block_ME[:, start : start + CHUNK_ELEMENTS].clone()))
        state, passes = state.finish(), passes + 1
    most = 1 if isinstance(statistic, StandardDeviation) else 3 + 2 * (block_ME.itemsize == 8)
    assert passes <= most
    return state


@pytest.mark.parametrize("mean", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("num_elements", [1, 3, CHUNK_ELEMENTS, 150_001])
def test_the_deviation_is_exact_far_from_zero(mean, num_elements):
    generator = torch.Generator().manual_seed(6)
    block = torch.randn(2, num_elements, generator=generator) + mean
    found = measured(StandardDeviation(), block)
    expected = np.std(block.double().numpy().astype(np.longdouble), axis=1)
    np.testing.assert_allclose(found, expected.astype(float), rtol=1e-11, atol=0)


def test_the_deviation_of_a_constant_is_zero():
    assert measured(StandardDeviation(), torch.full((1, 1000), 0.1)) == [0.0]


def floats(width: int) -> st.SearchStrategy[list[float]]:
    number = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return st.lists(st.one_of(number, st.sampled_from([0.0, -0.0, 1.0, -1.0])), min_size=1)


def check_trim(values: list[float], dtype: torch.dtype, density: float) -> None:
    block = torch.tensor([values], dtype=dtype)
    (threshold,), (scale,) = measured(Trim(), block, {"density": [density], "rescale": False})
    magnitudes = np.abs(block[0].numpy())
    k = max(1, int(density * len(values)))
    assert threshold == np.partition(magnitudes, len(values) - k)[len(values) - k]
    assert scale == 1


@given(values=floats(32), density=st.floats(0.001, 0.999))
@settings(max_examples=150, deadline=None)
def test_trim_finds_the_kth_magnitude_in_float32(values, density):
    check_trim(values, torch.float32, density)


@given(values=floats(64), density=st.floats(0.001, 0.999))
@settings(max_examples=100, deadline=None)
def test_trim_finds_the_kth_magnitude_in_float64(values, density):
    check_trim(values, torch.float64, density)


@given(values=st.lists(st.floats(-8, 8, width=32), min_size=2), density=st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_trim_rescales_to_the_l1_norm(values, density):
    block = torch.tensor([values], dtype=torch.float32)
    (threshold,), (scale,) = measured(Trim(), block, {"density": [density], "rescale": True})
    magnitudes = np.abs(block[0].double().numpy())
    kept = magnitudes[magnitudes >= threshold].sum()
    if kept < 1e-7:
        assert scale == 1
    else:
        assert scale == pytest.approx(magnitudes.sum() / kept, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trim_of_several_models_and_blocks(dtype):
    generator = torch.Generator().manual_seed(7)
    block = torch.randn(4, 140_003, generator=generator, dtype=torch.float64).to(dtype)
    block[1] = block[1].to(torch.bfloat16).to(dtype)
    densities = [0.1, 0.2, 1.0, 0.0]
    thresholds, scales = measured(Trim(), block, {"density": densities, "rescale": True})
    for row, (density, threshold) in enumerate(zip(densities, thresholds, strict=True)):
        magnitudes = np.abs(block[row].numpy())
        k = int(density * len(magnitudes))
        if 0 < density < 1:
            assert threshold == np.partition(magnitudes, -k)[-k]
            kept = magnitudes[magnitudes >= threshold].astype(float).sum()
            assert scales[row] == pytest.approx(magnitudes.astype(float).sum() / kept, rel=1e-10)
    assert thresholds[2:] == [0.0, math.inf]
    assert scales[2:] == [1.0, 1.0]
