"""nearswap and arcee_fusion: against float64 on whole tensors, and mergekit."""

from __future__ import annotations

import math

import pytest
import torch
from peer import SHAPES, assert_close, drawn, merged_by_mergekit
from torch import Tensor

import outliermerge
from outliermerge.methods.context import Context
from outliermerge.methods.statistics.importance import Quartiles, divergences, scores


@pytest.mark.parametrize("t", [0.0, 1e-7, 0.01, 0.5, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearswap_is_that_of_float64_and_of_mergekit(shape, t):
    base, other = drawn(shape, 2)
    other.view(-1)[::3] = base.view(-1)[::3] * (1 + 2**-23)  # some are very near
    found = outliermerge.merge_tensors([other], base=base, method="nearswap", t=t)
    wide, moved = base.double(), other.double() - base.double()
    share = (t / moved.abs().clamp(min=1e-6)).clamp(0, 1)
    assert_close(found, wide + share * moved, like=(base, other), ulps=4)
    theirs = merged_by_mergekit("nearswap", [other], base=base, t=t)
    assert_close(found, theirs, like=(base, other), ulps=8)


def test_nearswap_goes_from_the_base():
    base, other = torch.zeros(3), torch.tensor([0.5, -2.0, 0.0])
    found = outliermerge.merge_tensors([other], base=base, method="nearswap", t=1.0)
    assert found.tolist() == [0.5, -1.0, 0.0]


def fused(base: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is taken whole, and how far its score is from the threshold."""
    base, other = base.double(), other.double()
    p, q = (x.softmax(-1) + 1e-8 for x in (other, base))
    score = (other - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ranked = score.flatten().sort().values
    low, median, high = (ranked[int(q * (len(ranked) - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (high - low)
    return score >= threshold, (score - threshold).abs() / threshold.abs()


@pytest.mark.parametrize("apart", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] > 1], ids=str)
def test_arcee_fusion_takes_what_is_important_in_float64(shape, apart):
    base, other = drawn(shape, 2, apart=apart)
    found = outliermerge.merge_tensors([other], base=base, method="arcee_fusion")
    taken, margin = fused(base, other)
    clear = margin > 1e-5
    assert torch.equal(found[clear], other.where(taken, base)[clear])
    assert bool(taken.any()) == (base.numel() > 9)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] > 1], ids=str)
def test_arcee_fusion_takes_what_mergekit_takes(shape):
    base, other = drawn(shape, 2)
    theirs = merged_by_mergekit("arcee_fusion", [other], base=base)
    for compat in ("none", "mergekit"):
        found = outliermerge.merge_tensors([other], base=base, method="arcee_fusion", compat=compat)
        assert_close(found, theirs, like=(base, other), ulps=2)


def test_the_divergence_of_a_small_change_is_right_and_mergekits_where_asked():
    base, other = drawn((64, 512), 2, apart=1e-5)
    taken, _ = fused(base, other)
    theirs = merged_by_mergekit("arcee_fusion", [other], base=base)
    found, same = (
        outliermerge.merge_tensors([other], base=base, method="arcee_fusion", compat=compat)
        for compat in ("none", "mergekit")
    )
    wrong = float((found.eq(base) == taken).float().mean())
    assert wrong < 0.01 < float((theirs.eq(base) == taken).float().mean())
    assert_close(same, theirs, like=(base, other), ulps=2)


def test_a_large_tensors_quartiles_are_exact():
    """mergekit draws a million of its scores; rows are read in several steps."""
    base, other = drawn((1100, 2000), 2)
    found = outliermerge.merge_tensors([other], base=base, method="arcee_fusion")
    taken, margin = fused(base, other)
    clear = margin > 1e-5
    assert torch.equal(found[clear], other.where(taken, base)[clear])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("compat", ["none", "mergekit"])
@pytest.mark.parametrize("kind", ["drawn", "near", "ties", "some alike", "huge"])
@pytest.mark.parametrize("shape", [(7,), (1, 9), (6, 33), (5, 1), (2, 4, 5, 6)], ids=str)
def test_quartiles_are_those_of_sorted_scores_wherever_blocks_are_cut(shape, kind, compat, dtype):
    base, other = (tensor.to(dtype) for tensor in drawn(shape, 2))
    if kind == "near":  # in float32 divergences are below 0, too
        other = base + 1e-5 * other
    elif kind == "ties":
        base, other = base.round(), other.round()
    elif kind == "some alike":
        other = torch.where(torch.rand((*shape[:-1], 1)) < 0.6, base, other)
    elif kind == "huge":
        base, other = base * 1e18, other * 1e18
    context, num = Context(shape=shape), base.numel()
    rows_MRC = torch.stack([base, other]).view(2, -1, shape[-1])
    ranked = scores(rows_MRC, divergences(rows_MRC, compat)).flatten().sort().values
    wanted = [float(ranked[quarter * (num - 1) // 4]) for quarter in (1, 2, 3)]
    row = num if len(shape) < 2 else num // shape[0]
    for step in (row, num):
        state = Quartiles().start(2, num, {"compat": compat}, context=context)
        num_passes = 0
        while not isinstance(state, list):
            for start in range(0, num, step):
                block = rows_MRC.view(2, num)[:, start : start + step]
                state.add(state.measure(block, start))
            state, num_passes = state.finish(), num_passes + 1
        assert state == wanted
        assert num_passes == {torch.float32: 2, torch.float64: 4}[dtype]


def test_quartiles_of_scores_that_are_not_numbers_are_found_as_by_sorting():
    block = torch.zeros((2, 8))
    block[1] = torch.tensor([float("nan"), 1.0, -1.0, 2.0, 3.0, float("inf"), 0.0, 5.0])
    state = Quartiles().start(2, 8, {"compat": "none"}, context=Context(shape=(8,)))
    while not isinstance(state, list):
        state.add(state.measure(block))
        state = state.finish()
    assert all(math.isnan(value) for value in state)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3)], ids=str)
def test_arcee_fusion_of_next_to_nothing_takes_the_model(shape):
    base, other = torch.zeros(shape), torch.ones(shape)
    found = outliermerge.merge_tensors([other], base=base, method="arcee_fusion")
    assert torch.equal(found, other)
