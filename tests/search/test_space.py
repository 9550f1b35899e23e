"""What a space makes of a spec: keys of every kind, set by the values of a trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from outliermerge.errors import SpecError
from outliermerge.search.space import Dimension, Space, load_space
from outliermerge.search.space_check import check_space

SPEC: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 0.5}}, {"model": "c"}],
    "parameters": {"density": 0.3},
}


def space_of(tmp_path: Path, text: str) -> Space:
    (tmp_path / "space.yaml").write_text(text)
    return load_space(tmp_path / "space.yaml")


def built(tmp_path: Path, text: str, answers: dict[str, Any], spec: dict[str, Any] = SPEC) -> Any:
    """Return the document of a trial; each value that is asked for must have an answer."""
    space, asked = space_of(tmp_path, text), dict(answers)
    document = space.build(spec, lambda dimension: asked.pop(dimension.name))
    assert asked == {}
    return document


def test_filters_and_layers(tmp_path):
    text = """
lambda: {low: 0.5, high: 2, log: true}
models.1.weight: {low: 0, high: 1, layers: 3}
density:
  - {filter: mlp, low: 0.1, high: 1, layers: 2}
  - {filter: self_attn, choices: [0.2, 0.4]}
  - {value: 0.9}
"""
    document = built(
        tmp_path, text,
        {"lambda": 0.7, "models.1.weight[1/3]": 0.1, "models.1.weight[2/3]": 0.2,
         "models.1.weight[3/3]": 0.3, "density[mlp, 1/2]": 0.6, "density[mlp, 2/2]": 0.8,
         "density[self_attn]": "0.4"},
    )  # fmt: skip
    assert document["parameters"] == {
        "lambda": 0.7,
        "density": [
            {"filter": "mlp", "value": [0.6, 0.8]},
            {"filter": "self_attn", "value": 0.4},
            {"value": 0.9},
        ],
    }
    assert document["models"][0]["parameters"] == {"weight": [0.1, 0.2, 0.3]}
    assert SPEC["models"][0] == {"model": "a"}  # a trial changes no other


def test_a_parameter_that_the_method_lacks_is_neither_asked_for_nor_kept(tmp_path):
    text = "merge_method: [ties, min_sigma]\nt: {low: 1, high: 3}\ndensity: [0.1, 0.2]\n"
    document = built(tmp_path, text, {"merge_method": "min_sigma", "t": 2.5})
    assert document["parameters"] == {"t": 2.5}
    document = built(tmp_path, text, {"merge_method": "ties", "density": "0.2"})
    assert document["parameters"] == {"density": 0.2}


def test_models_that_take_no_part_have_no_parameters(tmp_path):
    text = "models: {least: 2}\nmodels.1.weight: {low: 0, high: 1}\nmodels.3.weight: [1, 2]\n"
    answers = {"models.1": "out", "models.3.weight": "2"}  # then the others are needed
    document = built(tmp_path, text, answers)
    assert document["models"] == [SPEC["models"][1], {"model": "c", "parameters": {"weight": 2}}]


def test_stages_modules_and_the_order_of_slices(tmp_path):
    sources = [{"model": "a", "layer_range": [0, 1]}, {"model": "b", "layer_range": [0, 1]}]
    slices = json.loads(
        json.dumps([{"sources": sources[:1]}, {"sources": sources}, {"sources": sources[1:]}])
    )
    spec = {
        "stages": [{"name": "s", "merge_method": "ties", "base_model": "base",
                    "models": [{"model": "a"}, {"model": "b"}]}],
        "merge_method": "linear", "slices": slices,
    }  # fmt: skip
    text = "slices: order\nslices.2.models.1.weight: [1, 2]\nstages.s.density: [0.5, 1]\n"
    answers = {"slices[1]": 3, "slices[2]": 2, "stages.s.density": "0.5"}
    document = built(tmp_path, text, answers | {"slices.2.models.1.weight": "2"}, spec)
    weighted = {"sources": [{**sources[0], "parameters": {"weight": 2}}, sources[1]]}
    assert document["slices"] == [slices[2], weighted, slices[0]]
    assert document["stages"][0]["parameters"] == {"density": 0.5}
    modules = {"base_model": "base", "modules": {
        "text": {"merge_method": "ties", "models": [{"model": "a"}]},
        "vision": {"merge_method": "linear", "models": [{"model": "b"}]},
    }}  # fmt: skip
    text = (
        "modules.vision.merge_method: [linear, task_arithmetic]\nmodules.text.density: [0.1, 1]\n"
    )
    answers = {"modules.vision.merge_method": "task_arithmetic", "modules.text.density": "0.1"}
    document = built(tmp_path, text, answers, modules)
    assert document["modules"]["vision"]["merge_method"] == "task_arithmetic"
    assert document["modules"]["text"]["parameters"] == {"density": 0.1}


def test_all_values_are_checked_before_the_first_trial(tmp_path):
    text = "density: {low: 0.5, high: 2}\nlambda: [1, high]\nmodels.2.weight: {low: 0, high: 1}\n"
    with pytest.raises(SpecError) as error:
        check_space(space_of(tmp_path, text), SPEC)
    first, second = str(error.value).splitlines()
    assert "space.yaml:1:10: density: with density = 2" in first
    assert "space.yaml:2:9: lambda: with lambda = high" in second


def test_points_of_ranges():
    assert Dimension("a", 0.0, 1.0, 0.25).points == [0, 0.25, 0.5, 0.75, 1]
    assert Dimension("a", 1, 8, 3, is_whole=True).points == [1, 4, 7]
    assert Dimension("a", 0.1, 0.3, 0.1).points == pytest.approx([0.1, 0.2, 0.3])
    assert Dimension("a", 0.0, 1.0).points == []


def test_the_familys_space_fits_its_spec():
    root = Path(__file__).parents[2]
    spec = yaml.safe_load((root / "merge_configs" / "tiny_min_sigma_t2.yaml").read_text())
    check_space(load_space(root / "evals" / "family" / "space.yaml"), spec)
