"""PCB, consensus TA and MetaGPT, against their formulas in float64 on whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import outliermerge
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS

SHAPES = {"wide": (300, 251), "vector": (2003,), "one": (1,), "kernel": (6, 3, 2, 2)}
WEIGHTS = [1.0, 0.5, 1.5]


@pytest.fixture(scope="module")
def states() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(3)

    def drawn(scale: float) -> dict[str, Tensor]:
        return {n: scale * torch.randn(s, generator=generator) for n, s in SHAPES.items()}

    return {n: torch.zeros(s) for n, s in SHAPES.items()}, [drawn(s) for s in (0.5, 1, 0.7)]


def clamped(x: Tensor, low: float, high: float) -> tuple[Tensor, float, float]:
    ordered = x.sort().values
    least = ordered[min(len(x) - 1, int(len(x) * low))]
    most = ordered[max(0, int(len(x) * (1 - high) - 1))]
    return x.clamp(least, most), float(least), float(most)


def pcb(deltas: list[Tensor], density: float, weights: list[float] = WEIGHTS) -> Tensor:
    """Merge vectors, by the formula of the paper's code."""
    total, above, below = sum(deltas), 0, 0
    for weight, delta in zip(weights, deltas, strict=False):
        size, least, most = clamped(delta.abs(), 1e-4, 1e-4)
        self_ = torch.exp(len(deltas) * ((size - least) / (most - least or 1)) ** 2)
        score, low, high = clamped(self_ * torch.tanh(delta * total), 1 - density, 0)
        share = (score - low) / (high - low) if high > low else torch.ones_like(score)
        above, below = above + weight * share * size * delta.sign(), below + share
    return above / below.clamp(min=1e-12)


@pytest.mark.parametrize("trim", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.1, 0.4])
def test_pcb_is_its_formula(density, trim, states):
    base, models = states
    if trim == "tensor":
        names = ["wide", "vector"]
        base, models = {n: base[n] for n in names}, [{n: m[n] for n in names} for m in models]
    merged = outliermerge.merge_state_dicts(
        models, base=base, method="pcb", density=density, trim=trim, weight=WEIGHTS, lambda_=0.8
    )
    deltas = [{n: (m[n] - base[n]).double().flatten() for n in base} for m in models]
    if trim == "model":
        whole = pcb([torch.cat([*delta.values()]) for delta in deltas], density)
        parts = dict(zip(base, whole.split([t.numel() for t in base.values()]), strict=True))
    else:
        parts = {name: pcb([delta[name] for delta in deltas], density) for name in base}
    for name, tensor in merged.items():
        assert torch.allclose(tensor.flatten().double(), 0.8 * parts[name], atol=2e-5), name


def test_pcb_of_one_element_and_of_equal_elements_keeps_what_agrees():
    for size in (1, 7):
        models = [torch.full((size,), value) for value in (1.0, 2.0, -0.5)]
        merged = outliermerge.merge_tensors(
            models, base=torch.zeros(size), method="pcb", trim="tensor"
        )
        assert torch.equal(merged, torch.full((size,), 1.5))


def test_pcb_finds_ranks_in_large_tensors_exactly():
    generator = torch.Generator().manual_seed(5)
    shape = (32 * CHUNK_ELEMENTS + 3,)  # so that a sample is looked at first
    models = [torch.randn(shape, generator=generator) for _ in range(2)]
    merged = outliermerge.merge_tensors(
        models, base=torch.zeros(shape), method="pcb", trim="tensor", weight=WEIGHTS[:2]
    )
    wanted = pcb([model.double() for model in models], 0.1)
    off = (merged.double() - wanted).abs() > 1e-4
    assert off.sum() < 5  # where all shares are next to 0, their ratio is lost in float32
    assert ((merged != 0) != (wanted != 0)).sum() < 5  # rounding at the least score that wins


@pytest.mark.parametrize("consensus", [0, 1, 2, 3])
def test_consensus_ta_is_its_formula(consensus, states):
    base, models = states
    scales = [0.8, 1.4, 2.0]
    parameters: dict[str, Any] = {"tall_mask_lambda": scales, "consensus": consensus}
    merged = outliermerge.merge_state_dicts(
        models, base=base, method="consensus_ta", weight=WEIGHTS, lambda_=0.5, **parameters
    )
    counts = []
    for name, tensor in merged.items():
        deltas = [(model[name] - base[name]).double() for model in models]
        total = sum(w * delta for w, delta in zip(WEIGHTS, deltas, strict=True))
        uses = sum(
            (delta.abs() > scale * (total - delta).abs()).long()
            for delta, scale in zip(deltas, scales, strict=True)
        )
        counts.append(float((uses >= consensus).double().mean()))
        wanted = base[name].double() + 0.5 * total * (uses >= consensus)
        assert torch.allclose(tensor.double(), wanted, atol=1e-6), name
    assert consensus == 3 or (counts[0] == 1) == (consensus == 0)


@pytest.mark.parametrize("norms", ["model", "tensor"])
@pytest.mark.parametrize("lambda_", [1.0, 0.3])
def test_metagpt_is_its_formula(lambda_, norms, states):
    base, models = states
    merged = outliermerge.merge_state_dicts(
        models, base=base, method="metagpt", lambda_=lambda_, norms=norms
    )
    deltas = [{n: (m[n] - base[n]).double() for n in base} for m in models]
    for name, tensor in merged.items():
        names = [name] if norms == "tensor" else [*base]
        squares = [sum(float(delta[n].square().sum()) for n in names) for delta in deltas]
        change = sum(s / sum(squares) * d[name] for s, d in zip(squares, deltas, strict=True))
        assert torch.allclose(tensor.double(), base[name] + lambda_ * change, atol=1e-6), name


def test_metagpt_of_models_that_change_nothing_is_the_base():
    base = {"w": torch.ones(3)}
    assert torch.equal(
        outliermerge.merge_state_dicts([base, base], base=base, method="metagpt")["w"], base["w"]
    )


@pytest.mark.parametrize("method", ["pcb", "metagpt"])
def test_one_tensor_alone_is_refused_where_whole_models_are_measured(method):
    with pytest.raises(outliermerge.ArgumentError, match="measures whole models"):
        outliermerge.merge_tensors([torch.ones(2)], base=torch.zeros(2), method=method)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("pcb", {}),
        ("ties", {"trim": "model", "density": 0.3}),
        ("min_sigma", {"sigma": "model", "scale": "mad"}),
    ],
)
def test_ranks_over_tensors_of_several_dtypes_are_found(method, parameters, states):
    base, models, other = (
        {n: t.double() for n, t in state.items()} for state in (states[0], *states[1][:2])
    )
    mixed = [
        {n: t.float() if n == "wide" else t for n, t in state.items()}
        for state in (base, models, other)
    ]
    merged = outliermerge.merge_state_dicts(mixed[1:], base=mixed[0], method=method, **parameters)
    wide = outliermerge.merge_state_dicts([models, other], base=base, method=method, **parameters)
    for name, tensor in merged.items():
        assert torch.allclose(tensor.double(), wide[name], atol=1e-5), name


@pytest.mark.parametrize("num_models", [80, 81, 120])
def test_pcb_of_many_models_is_its_formula(num_models):
    drawn = torch.Generator().manual_seed(8)
    models = [torch.randn(90, generator=drawn) for _ in range(num_models)]
    weights = [1.0] * num_models
    merged = outliermerge.merge_tensors(models, base=torch.zeros(90), method="pcb", trim="tensor")
    wanted = pcb([model.double() for model in models], 0.1, weights)
    assert torch.allclose(merged.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_pcb_does_not_hide_what_is_not_finite(value):
    models = [torch.linspace(-1, 1, 50), torch.linspace(-1, 2, 50)]
    models[1][7] = value
    with pytest.raises(outliermerge.OutlierMergeError, match=r"infinite or NaN in models\[1\]"):
        outliermerge.merge_tensors(models, base=torch.zeros(50), method="pcb", trim="tensor")
