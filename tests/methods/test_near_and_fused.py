"""nearswap and arcee_fusion: against float64 on whole tensors, and mergekit."""

from __future__ import annotations

import pytest
import torch
from peer import SHAPES, assert_close, drawn, merged_by_mergekit
from torch import Tensor

import outliermerge


@pytest.mark.parametrize("t", [0.0, -1.0, 1e-7, 0.01, 0.5, 3.0])
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


@pytest.mark.parametrize("shape", [(), (1,), (0, 3)], ids=str)
def test_arcee_fusion_of_next_to_nothing_takes_the_model(shape):
    base, other = torch.zeros(shape), torch.ones(shape)
    found = outliermerge.merge_tensors([other], base=base, method="arcee_fusion")
    assert torch.equal(found, other)
