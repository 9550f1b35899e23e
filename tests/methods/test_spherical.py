"""slerp, nuslerp, multislerp and karcher: against float64 on whole tensors, and mergekit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peer import SHAPES, assert_close, drawn, merged_by_mergekit
from torch import Tensor

import outliermerge
from outliermerge import ArgumentError
from outliermerge.methods.table import find_method

# Oracles: plain, on vectors in float64.


def between(first: Tensor, second: Tensor, t: float, *, straight_from: float) -> Tensor:
    """Interpolate along the last dimension; straight where |sin θ| is not larger."""
    sizes = [x.norm(dim=-1, keepdim=True) for x in (first, second)]
    units = [x / size.where(size > 0, 1) for x, size in zip((first, second), sizes, strict=True)]
    cosine = (units[0] * units[1]).sum(-1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    curved = (((1 - t) * angle).sin() * first + (t * angle).sin() * second) / angle.sin()
    return curved.where(angle.sin() > straight_from, (1 - t) * first + t * second)


def slerped(models: list[Tensor], t: float) -> Tensor:
    least = math.sqrt(1 - 0.9995**2)
    first, second = (model.double().flatten() for model in models)
    return between(first, second, t, straight_from=least).view(models[0].shape)


def nuslerped(models: list[Tensor], weight: list[float], flatten: bool, row_wise: bool) -> Tensor:
    t = weight[1] / sum(weight) if sum(weight) else 0.5
    first, second = (model.double() for model in models)
    if flatten:
        found = between(first.flatten(), second.flatten(), t, straight_from=1e-6)
        return found.view(first.shape)
    if row_wise:
        first, second = (x.transpose(0, -1) for x in (first, second))
    found = between(first, second, t, straight_from=1e-6)
    return found.transpose(0, -1) if row_wise else found


def multislerped(models: list[Tensor], weight: list[float], normalize: bool) -> Tensor:
    weights = torch.tensor(weight, dtype=torch.float64)
    weights = weights / weights.sum() if normalize else weights
    rows = torch.stack([model.double().flatten() for model in models])
    lengths = rows.norm(dim=1)
    mean = (weights / lengths) @ rows
    return (mean / mean.norm() * (weights @ lengths)).view(models[0].shape)


def karcher_mean(models: list[Tensor]) -> Tensor:
    """Descend on the sphere by small steps, far longer than the method does."""
    rows = torch.stack([model.double().flatten() for model in models])
    lengths = rows.norm(dim=1, keepdim=True)
    units = rows / lengths
    mean = units.mean(0)
    for _ in range(400):
        mean = mean / mean.norm()
        angles = (units @ mean).clamp(-1, 1).acos()[:, None]
        aside = units - (units @ mean)[:, None] * mean
        size = aside.norm(dim=1, keepdim=True)
        mean = mean + 0.5 * (aside / size.where(size > 1e-12, 1) * angles).mean(0)
    return (mean / mean.norm() * lengths.mean()).view(models[0].shape)


# Values.

PAIRS = {
    "apart": lambda shape: drawn(shape, 2),
    "near": lambda shape: drawn(shape, 2, apart=1e-3),
    "equal": lambda shape: drawn(shape, 1) * 2,
    "one zero": lambda shape: [torch.zeros(shape), *drawn(shape, 1)],
    "both zero": lambda shape: [torch.zeros(shape)] * 2,
    "scaled": lambda shape: [drawn(shape, 1)[0], 3 * drawn(shape, 1)[0]],
}


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.2, -0.1])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slerp_is_that_of_float64_and_of_mergekit(shape, pair, t):
    base, other = models = PAIRS[pair](shape)
    found = outliermerge.merge_tensors([other], base=base, method="slerp", t=t)
    assert_close(found, slerped(models, t), like=models, ulps=8)
    assert_close(found, merged_by_mergekit("slerp", [other], base=base, t=t), like=models, ulps=50)


def test_slerp_goes_from_the_base():
    base, other = drawn((5, 6), 2)
    for t, expected in ((0.0, base), (1.0, other)):
        found = outliermerge.merge_tensors([other], base=base, method="slerp", t=t)
        assert_close(found, expected, like=(base, other), ulps=2)


@pytest.mark.parametrize("cosine", [0.9994, 0.9996, -0.9994, -0.9996])
def test_slerp_is_straight_where_models_are_nearly_parallel(cosine):
    base = torch.tensor([1.0, 0.0])
    other = 2 * torch.tensor([cosine, math.sqrt(1 - cosine**2)])
    found = outliermerge.merge_tensors([other], base=base, method="slerp", t=0.3)
    straight = 0.7 * base + 0.3 * other
    assert torch.allclose(found, straight, atol=1e-6) == (abs(cosine) > 0.9995)
    theirs = merged_by_mergekit("slerp", [other], base=base, t=0.3)
    assert_close(found, theirs, like=(base, other), ulps=2000)  # sin θ is 1/30


def test_antipodal_models_are_interpolated_straight():
    base = drawn((40,), 1)[0]
    found = outliermerge.merge_tensors([-base], base=base, method="slerp", t=0.25)
    assert_close(found, base / 2, like=(base,), ulps=2)
    # One element makes mergekit's cosine exactly −1 in nuslerp too.
    one = torch.tensor([0.0, 3.0, 0.0])
    pair = {"weight": [3.0, 1.0]}
    for base in (None, torch.ones(3)):
        models = [one, -one] if base is None else [base + one, base - one]
        found = outliermerge.merge_tensors(models, base=base, method="nuslerp", **pair)
        theirs = merged_by_mergekit("nuslerp", models, base=base, **pair)
        assert_close(found, theirs, like=models, ulps=2)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("way", ["flat", "last", "first"])
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair != "near"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nuslerp_is_that_of_float64_and_of_mergekit(shape, pair, way, with_base):
    models = PAIRS[pair](shape)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(9)) if with_base else None
    if base is not None:  # halves of a power of two: their differences are exact
        base, *models = (torch.round(x * 256) / 256 for x in (base, *models))
        models = [base + model for model in models]
    more: dict[str, Any] = {"nuslerp_flatten": way == "flat", "nuslerp_row_wise": way == "first"}
    if way != "flat" and shape[0 if way == "first" else -1] == 1:
        return  # of one element θ is 0 or π: mergekit's rounding of its cosine decides
    for weight in ([0.3, 0.9], [1.0, -1.0], [2.0, 0.0]):
        found = outliermerge.merge_tensors(
            models, base=base, method="nuslerp", weight=weight, **more
        )
        vectors = models if base is None else [model - base for model in models]
        expected = nuslerped(vectors, weight, way == "flat", way == "first")
        expected = expected if base is None else expected + base
        assert_close(found, expected, like=models, ulps=64)
        theirs = merged_by_mergekit("nuslerp", models, base=base, weight=weight, **more)
        assert_close(found, theirs, like=models, ulps=500)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_models", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_multislerp_is_that_of_float64_and_of_mergekit(shape, num_models, normalize, with_base):
    base, *models = drawn(shape, num_models + 1)
    weight = [0.3, 0.5, 1.1, 0.2, 0.7][:num_models]
    given = {"base": base if with_base else None, "weight": weight, "normalize_weights": normalize}
    found = outliermerge.merge_tensors(models, method="multislerp", **given)
    theirs = merged_by_mergekit("multislerp", models, **given)
    assert_close(found, theirs, like=models, ulps=200)
    if num_models > 1:
        origin = base if with_base else torch.zeros(shape)
        expected = multislerped([model - origin for model in models], weight, normalize) + origin
        assert_close(found, expected, like=models, ulps=64)
    else:
        assert torch.equal(found, models[0])


def test_multislerp_of_models_that_cancel_each_other_out_adds_them_up():
    one = drawn((4, 8), 1)[0]
    found = outliermerge.merge_tensors([one, -one], method="multislerp", weight=[0.5, 0.5])
    assert torch.equal(found, merged_by_mergekit("multislerp", [one, -one], weight=[0.5, 0.5]))
    three = [one, one, -one]
    weights = {"weight": [0.25, 0.25, 0.5]}
    with pytest.raises(ValueError, match="weighted sum of the input tensors is zero"):
        merged_by_mergekit("multislerp", three, **weights)
    found = outliermerge.merge_tensors(three, method="multislerp", **weights)
    assert torch.equal(found, torch.zeros(4, 8))


def test_multislerp_refuses_to_normalise_weights_that_add_up_to_0():
    with pytest.raises(ArgumentError, match=r"add up to 0.*normalize_weights: false"):
        outliermerge.merge_tensors(drawn((3,), 2), method="multislerp", weight=[1.0, -1.0])


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("num_models", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_karcher_is_that_of_float64_and_of_mergekit(shape, num_models, with_base):
    models = drawn(shape, num_models + with_base)
    base = models.pop() if with_base else None
    found = outliermerge.merge_tensors(models, base=base, method="karcher", max_iter=100, tol=1e-7)
    every = models if base is None else [*models, base]
    assert_close(found, karcher_mean(every), like=every, ulps=64)
    found = outliermerge.merge_tensors(models, base=base, method="karcher")
    theirs = merged_by_mergekit("karcher", models, base=base)
    assert_close(found, theirs, like=every, ulps=200)


@pytest.mark.parametrize("max_iter", [0, 1, 2])
def test_karcher_stops_where_mergekit_does(max_iter):
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(6, generator=generator) for _ in range(4)]
    given = {"max_iter": max_iter, "tol": 1e-5}
    found = outliermerge.merge_tensors(models, method="karcher", **given)
    assert_close(found, merged_by_mergekit("karcher", models, **given), like=models, ulps=200)
    whole = outliermerge.merge_tensors(models, method="karcher")
    assert not torch.allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["zeros", "one zero", "opposite"])
def test_karcher_of_vectors_without_a_mean_is_mergekits(kind):
    one, other = drawn((3, 4), 2)
    models = {
        "zeros": [torch.zeros(3, 4), torch.zeros(3, 4)],
        "one zero": [one, torch.zeros(3, 4), other],
        "opposite": [one, -2 * one],
    }[kind]
    found = outliermerge.merge_tensors(models, method="karcher")
    assert_close(found, merged_by_mergekit("karcher", models), like=[one, *models], ulps=50)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_lengths_far_beyond_float32_do_no_harm(method):
    """Of squares that float32 cannot hold."""
    for scale in (1e25,) if method == "karcher" else (1e-30, 1e25):  # see its `tol`
        models = [scale * model for model in drawn((20, 30), 2, apart=3.0)]
        given = {"base": models.pop(0)} if method == "slerp" else {}
        found = outliermerge.merge_tensors(models, method=method, **given)
        assert 0 < float(found.abs().max()) / scale < 20
        wide = {n: t.double() for n, t in given.items()}
        expected = outliermerge.merge_tensors([m.double() for m in models], method=method, **wide)
        assert_close(found, expected, like=models, ulps=16)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_a_value_that_is_not_finite_leaves_a_weighted_mean_of_the_others(method):
    models = drawn((50,), 2)
    models[1][7] = math.inf
    gram = torch.full((2, 2), math.nan, dtype=torch.float64)
    found = find_method(method)(torch.stack(models), gram=gram)
    expected = torch.stack(models).mean(0) if method != "multislerp" else found
    assert torch.equal(found, expected)
    assert found.isfinite().sum() == 49
