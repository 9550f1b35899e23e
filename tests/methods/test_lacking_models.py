"""Tensors that fewer models have than a method needs: `missing: base` gives what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import load_folder, save_tensors
from every_method import OF_DELTAS, OF_ONE_TENSOR

import outliermerge
from outliermerge.errors import SpecError
from outliermerge.methods.table import METHODS
from outliermerge.spec.check import parse_spec

NAMES = [f"model.layers.{number}.q_proj.weight" for number in range(2)]
OF_SEVERAL = [name for name in OF_DELTAS if METHODS[name].max_models != 1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, two models that have all of its tensors, and one of them without the second."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(6, 6, generator=generator) for name in NAMES}
    save_tensors(tmp_path / "base", base)
    for model in ("whole", "short"):
        own = {name: base[name] + 0.1 * torch.randn(6, 6, generator=generator) for name in NAMES}
        save_tensors(tmp_path / model, own)
    save_tensors(tmp_path / "filled", own | {NAMES[1]: base[NAMES[1]]})
    save_tensors(tmp_path / "short", {NAMES[0]: own[NAMES[0]]})
    return tmp_path


def merged(place: Path, method: str, models: list[str], **parameters: object) -> torch.Tensor:
    spec = {
        "merge_method": method,
        "base_model": str(place / "base"),
        "models": [{"model": str(place / model)} for model in models],
        "parameters": OF_ONE_TENSOR.get(method, {}) | parameters,
        "missing": "base",
    }
    output = outliermerge.run(spec, output=place / "-".join([method, *models]), load_check=False)
    return load_folder(output.output)[NAMES[1]]


@pytest.mark.parametrize("method", OF_SEVERAL)
@pytest.mark.sampled(4)
def test_every_method_merges_a_tensor_that_one_model_has(method, place):
    assert merged(place, method, ["whole", "short"]).isfinite().all()


@pytest.mark.parametrize("method", ["consensus_ta", "nuslerp", "model_stock"])
def test_where_too_few_models_have_a_tensor_the_others_have_the_bases(method, place):
    found = merged(place, method, ["whole", "short"])
    assert torch.equal(found, merged(place, method, ["whole", "filled"]))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("pcb", {"trim": "model"}),
        ("metagpt", {"norms": "model"}),
        ("ties", {"trim": "model", "density": 0.4}),
        ("min_sigma", {"sigma": "model", "t": 0.5}),
    ],
)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_where_whole_models_are_measured_the_others_have_the_bases(
    method, parameters, kernels, place
):
    """The tensors of all of them count: so the one that all models have depends on the other."""

    def merged_of(second: str, names: list[str] = NAMES) -> list[torch.Tensor]:
        spec = {
            "merge_method": method,
            "base_model": str(place / "base"),
            "models": [{"model": str(place / model)} for model in ("whole", second)],
            "parameters": parameters,
            "missing": "base",
        }
        output = place / f"{second}-{len(names)}"
        outliermerge.run(spec, output=output, kernels=kernels)
        found = load_folder(output)
        return [found[name] for name in names]

    short, filled = merged_of("short"), merged_of("filled")
    assert all(map(torch.equal, short, filled))
    for model in ("base", "whole", "filled"):
        tensors = load_folder(place / model)
        save_tensors(place / model, {NAMES[0]: tensors[NAMES[0]]})
    assert not torch.equal(merged_of("filled", NAMES[:1])[0], short[0])


def test_a_tensor_of_its_own_beside_whole_models_is_refused_with_what_to_do(place):
    spec = {
        "merge_method": "ties",
        "base_model": str(place / "base"),
        "models": [{"model": str(place / model)} for model in ("whole", "short")],
        "parameters": {
            "density": 0.4,
            "trim": [{"filter": "layers.1", "value": "tensor"}, {"value": "model"}],
        },
        "missing": "base",
    }
    said = r"layers\.1\.q_proj\.weight is not in all models, .*Give `trim: model` for this one, too"
    with pytest.raises(outliermerge.OutlierMergeError, match=said):
        outliermerge.plan(spec)


def test_a_consensus_of_more_models_than_are_merged_is_refused_at_its_line(place):
    text = """\
merge_method: consensus_ta
base_model: b
models: [{model: m}, {model: n}]
parameters:
  consensus: [{filter: mlp, value: 3}, {value: 2}]
"""
    with pytest.raises(SpecError) as raised:
        parse_spec(text, file="FILE")
    assert str(raised.value) == (
        "FILE:5:36: parameters.consensus[0].value: found 3 with 2 model(s), expected at most as "
        "many as there are models"
    )
    one = torch.ones(2)
    with pytest.raises(outliermerge.ArgumentError, match="found 3 with 1 model"):
        outliermerge.merge_tensors([one], base=one, method="consensus_ta", consensus=3)
