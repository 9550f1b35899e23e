"""What a page reads from a merge's manifest, whatever the method recorded."""

from __future__ import annotations

import pytest

from outliermerge.analysis.report.recorded import merge_payload

MODELS = ["org/a", "org/b", "org/c"]
TITLES = {"org/base": "base", "org/a": "A", "org/b": "B", "org/c": "C"}


def manifest(*statistics, parameters=(), method="magmax:magmax", sources=None, base=True):
    """Return a manifest with a tensor of two elements for each of some statistics."""
    parameters = list(parameters) or [{}] * len(statistics)
    sources = sources or [*(["org/base"] if base else []), *MODELS]
    return {
        "spec": {"merge_method": method, "models": [{"model": model} for model in MODELS]},
        "inputs": [
            *([{"model": "org/base", "role": "base"}] if base else []),
            *({"model": model, "role": "model"} for model in MODELS),
        ],
        "tensors": {
            f"layers.{number}.up.weight": {
                "shape": [2, 5],
                "action": "merge",
                "sources": sources,
                "statistics": each,
                "parameters": given,
            }
            for number, (each, given) in enumerate(zip(statistics, parameters, strict=True))
        },
    }


def recorded(*statistics, **options):
    """Return the names of what is drawn, and the first tensor's numbers."""
    found = merge_payload(manifest(*statistics, **options), TITLES)
    return list(found["series"]), found["tensors"][0]["numbers"]


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(
    ("value", "other", "lines"),
    [
        (2.5, 3.5, {"x": {"": 2.5}}),
        (0, 7, {"x": {"": 0}}),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], {"x": {"A": 1.0, "B": 2.0, "C": 3.0}}),
        ([1.0, 2.0], [1.0, 3.0], {"x": {"1": 1.0, "2": 2.0}}),
        ([1.0] * 7, [2.0] * 7, {"x": {str(place): 1.0 for place in range(1, 8)}}),
        (
            [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
            [[2.0, 2.0, 3.0], [5.0, 5.0, 6.0]],
            {"x: 1": {"A": 1.0, "B": 2.0, "C": 3.0}, "x: 2": {"A": 4.0, "B": 5.0, "C": 6.0}},
        ),
        ([1.0, "inf", "nan"], [2.0, 3.0, 4.0], {"x": {"A": 1.0, "B": None, "C": None}}),
    ],
)
def test_numbers_of_every_shape_become_lines(value, other, lines, base):
    assert recorded({"x": value}, {"x": other}, base=base) == (list(lines), lines)


def test_a_base_is_named_where_it_is_merged_like_a_model():
    numbers = [{"x": [0.0, 1.0, 2.0, 3.0]}, {"x": [9.0, 1.0, 2.0, 3.0]}]
    _, lines = recorded(*numbers, method="linear")
    assert lines == {"x": {"base": 0.0, "A": 1.0, "B": 2.0, "C": 3.0}}
    _, lines = recorded(*numbers, method="min_sigma")  # then it is not a number of the base
    assert lines == {"x": {"1": 0.0, "2": 1.0, "3": 2.0, "4": 3.0}}


def test_models_of_one_name_are_told_apart_by_their_place():
    _, lines = recorded({"x": [1, 2]}, {"x": [3, 4]}, sources=["org/base", "org/a", "org/a"])
    assert lines == {"x": {"1": 1, "2": 2}}


@pytest.mark.parametrize(
    "value",
    [1.5, [1.0, 2.0, 3.0], [[1.0] * 3, [2.0] * 3], "text", True, "inf", ["nan"] * 3, [], [[]]],
)
def test_what_is_the_same_everywhere_or_no_number_is_not_drawn(value):
    assert recorded({"x": value}, {"x": value}) == ([], {})


@pytest.mark.parametrize(
    ("statistics", "parameters"), [(({}, {}), ()), (({}, {}), ({"t": 2.0}, {"t": 2.0})), ((), ())]
)
def test_merge_that_recorded_nothing_has_nothing_to_draw(statistics, parameters):
    found = merge_payload(manifest(*statistics, parameters=parameters), TITLES)
    assert found["series"] == {}


def test_parameters_that_change_from_layer_to_layer_are_drawn_and_ranged():
    given = [{"weight": [0.2, 0.5, 1.0], "t": 2}, {"weight": [0.8, 0.5, 1.0], "t": 2}]
    found = merge_payload(manifest({}, {}, parameters=given), TITLES)
    assert list(found["series"]) == ["weight"]
    assert found["by_model"]["weight"] == {"A": (0.2, 0.8), "B": (0.5, 0.5), "C": (1.0, 1.0)}


def test_outliers_are_also_shares_of_each_tensor_and_of_all():
    found = merge_payload(manifest({"outliers": [1, 5, 10]}, {"outliers": [3, 5, 0]}), TITLES)
    assert found["tensors"][0]["numbers"]["kept whole, %"] == {"A": 10.0, "C": 100.0, "B": 50.0}
    whole = {line: low for line, (low, high) in found["by_model"]["kept whole, %"].items()}
    assert whole == {"A": 20.0, "B": 50.0, "C": 50.0}


def test_rows_and_numbers_are_explained_by_the_methods_own_documentation():
    trim = [{"limits": [[low, low], [scale, scale]]} for low, scale in ((0.1, 1.0), (0.2, 1.5))]
    sources = ["org/base", "org/a", "org/b"]
    found = merge_payload(manifest(*trim, method="ties", sources=sources), TITLES)
    assert list(found["series"]) == ["limits: least magnitude kept", "limits: rescaling factor"]
    sigma = [{"sigma": [0.1, 0.2, 0.3]}, {"sigma": [0.2, 0.3, 0.4]}]
    found = merge_payload(manifest(*sigma, method="min_sigma"), TITLES)
    assert found["series"] == {"sigma": "standard deviation of each task vector."}
