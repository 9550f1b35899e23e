"""Model Stock: against float64 on whole tensors and rows, and mergekit."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from peer import SHAPES, assert_close, drawn, merged_by_mergekit
from torch import Tensor

import outliermerge
from outliermerge import ArgumentError
from outliermerge.methods.table import find_method


def stock(base: Tensor, models: list[Tensor], filter_wise: bool, *, least: float = 0.0) -> Tensor:
    shape = (-1, base.shape[-1]) if filter_wise and base.ndim > 1 else (1, -1)
    base, *models = (tensor.double().reshape(shape) for tensor in (base, *models))
    rows = []
    for number, row in enumerate(base):
        deltas = [model[number] - row for model in models]
        cosines = []
        for one, other in combinations(deltas, 2):
            product = max(float(one.norm() * other.norm()), least)
            cosines.append(float(one @ other) / product if product else 0.0)
        cosine, count = sum(cosines) / len(cosines), len(models)
        divisor = 1 + (count - 1) * cosine
        t = count * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
        rows.append(t * sum(model[number] for model in models) / count + (1 - t) * row)
    return torch.stack(rows)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("num_models", [2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_values_are_those_of_float64_and_of_mergekit(shape, num_models, filter_wise):
    base, *models = drawn(shape, num_models + 1)
    models = [model + 2 * models[0] for model in models]  # cosines far from the singular one
    found = outliermerge.merge_tensors(
        models, base=base, method="model_stock", filter_wise=filter_wise
    )
    like = [base, *models]
    assert_close(found, stock(base, models, filter_wise).view(shape), like=like, ulps=64)
    theirs = merged_by_mergekit("model_stock", models, base=base, filter_wise=filter_wise)
    assert_close(found, theirs, like=like, ulps=200)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("kind", ["equal", "one is the base", "all are the base", "opposite"])
def test_special_task_vectors_give_what_mergekit_gives(kind, filter_wise):
    base, one, other = (torch.round(x * 64) / 64 for x in drawn((4, 6), 3))
    models = {
        "equal": [one, one],
        "one is the base": [one, base, other],
        "all are the base": [base, base],
        "opposite": [base + one, base - one],
    }[kind]
    found = outliermerge.merge_tensors(
        models, base=base, method="model_stock", filter_wise=filter_wise
    )
    theirs = merged_by_mergekit("model_stock", models, base=base, filter_wise=filter_wise)
    assert_close(found, theirs, like=[base, one, other], ulps=16)
    if "base" in kind or kind == "opposite":
        assert torch.equal(found, base) == (kind != "one is the base")


@pytest.mark.parametrize("filter_wise", [False, True])
def test_short_task_vectors_are_merged_by_their_angle_and_as_mergekit_does_where_asked(filter_wise):
    base = torch.zeros(3, 8)
    models = [3e-5 * model for model in drawn((3, 8), 2, apart=0.1)]
    given = {"base": base, "method": "model_stock", "filter_wise": filter_wise}
    found = outliermerge.merge_tensors(models, **given)
    assert_close(found, stock(base, models, filter_wise).view(3, 8), like=models, ulps=16)
    theirs = merged_by_mergekit("model_stock", models, base=base, filter_wise=filter_wise)
    assert float(theirs.norm() / found.norm()) < 0.5
    same = outliermerge.merge_tensors(models, **given, compat="mergekit")
    clamped = stock(base, models, filter_wise, least=1e-6).view(3, 8)
    assert_close(same, clamped, like=models, ulps=16)
    assert_close(same, theirs, like=models, ulps=64)


def test_an_unknown_compat_is_refused():
    with pytest.raises(ArgumentError, match="'compat': found 'mergkit', expected none or mergekit"):
        outliermerge.merge_tensors(
            drawn((3,), 2), base=torch.zeros(3), method="model_stock", compat="mergkit"
        )


def test_a_value_that_is_not_finite_leaves_the_mean():
    deltas = torch.stack(drawn((50,), 2))
    deltas[0, 3] = torch.inf
    gram = torch.full((2, 2), torch.nan, dtype=torch.float64)
    assert torch.equal(find_method("model_stock").function(deltas, gram=gram), deltas.mean(0))
