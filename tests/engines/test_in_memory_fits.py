"""Merges of tensors in memory refuse values that are infinite, NaN or too large, as `run` does."""

from __future__ import annotations

import math

import pytest
import torch

import outliermerge
from outliermerge import OutlierMergeError

LARGE = {"float16": 60000.0, "bfloat16": 3e38, "float32": 3e38, "float8_e4m3fn": 448.0}
METHODS = {
    "task_arithmetic": {"lambda": 2.0},  # by kernels
    "iso_c": {"lambda": 8.0},  # by torch
}


@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_that_its_dtype_does_not_hold_is_refused_by_name(method, dtype):
    kind = getattr(torch, dtype)
    zero, one = torch.zeros(4, 4).to(kind), torch.full((4, 4), LARGE[dtype]).to(kind)
    other = torch.full((4, 4), LARGE[dtype] / 2).to(kind)
    models = [{"q": one, "v": zero}, {"q": other, "v": zero}]
    given = {"base": {"q": zero, "v": zero}, "method": method, **METHODS[method]}
    with pytest.raises(OutlierMergeError) as raised:
        outliermerge.merge_state_dicts(models, **given)
    assert str(raised.value) == (
        f"tensor 'q' has values that are infinite or NaN in the merge ({dtype}). Check that "
        "model; allow_non_finite=True goes on."
    )
    found = outliermerge.merge_state_dicts(models, **given, allow_non_finite=True)
    assert torch.equal(found["v"].float(), zero.float())
    if dtype != "float8_e4m3fn":
        assert not found["q"].isfinite().any()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "iso_c", "linear"])
def test_what_is_not_finite_is_told_with_its_model(method, value):
    base, model = torch.zeros(3, 3), torch.ones(3, 3)
    broken = model.clone()
    broken[1, 1] = value
    with pytest.raises(OutlierMergeError, match=r"^tensor 'w' has values .* NaN in models\[1\]\. "):
        outliermerge.merge_tensors([model, broken], base=base, method=method, name="w")
    for same in ([broken, broken], [broken]):  # copied, not merged
        with pytest.raises(OutlierMergeError, match=r"^the tensor has .* in models\[0\]"):
            outliermerge.merge_tensors(same, method="linear")
    found = outliermerge.merge_tensors([broken], method="linear", allow_non_finite=True)
    assert found.isfinite().sum() == 8


def test_tensors_without_elements_are_merged():
    none = torch.zeros(0, 3)
    assert outliermerge.merge_tensors([none, none], method="linear").shape == (0, 3)
