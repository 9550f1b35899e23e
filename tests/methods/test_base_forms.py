"""What a spec's base model is to methods that take it as a model, or can do without one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors

import outliermerge
from outliermerge import ArgumentError, SpecError
from outliermerge.methods.table import METHODS
from outliermerge.spec.schema import json_schema

NAMES = tuple(f"model.layers.{n}.{part}.w" for n in range(3) for part in ("attn", "mlp"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for name in "abc":
        state = {name: torch.randn((6, 8), generator=generator) for name in (*NAMES, "norm")}
        save_tensors(root / name, state)
    return root


def spec_of(folder: Path, method: str, models: str, base: str | None, **more: Any) -> dict:
    spec = {"merge_method": method, "models": [{"model": str(folder / m)} for m in models]}
    return spec | ({"base_model": str(folder / base)} if base else {}) | more


def merged(spec: dict, output: Path) -> dict[str, torch.Tensor]:
    return load_folder(outliermerge.run(spec, output=output).output)


@pytest.mark.parametrize("method", ["slerp", "arcee_fusion", "nearswap"])
def test_the_base_may_be_listed_at_any_place_or_not(method, folder, tmp_path):
    more = {"parameters": {"t": 0.2}} if method != "arcee_fusion" else {}
    found = [
        merged(spec_of(folder, method, models, "a", **more), tmp_path / models)
        for models in ("b", "ab", "ba")
    ]
    other = merged(spec_of(folder, method, "ab", "b", **more), tmp_path / "other")
    for name in (*NAMES, "norm"):
        assert all(torch.equal(tensors[name], found[0][name]) for tensors in found)
        assert not torch.equal(other[name], found[0][name])


def test_a_base_beside_the_models_is_a_model_of_karchers(folder, tmp_path):
    found = [
        merged(spec_of(folder, "karcher", models, base), tmp_path / f"{models}-{base}")
        for models, base in (("bc", "a"), ("bca", "a"), ("bca", None))
    ]
    for name in NAMES:
        assert all(torch.allclose(tensors[name], found[0][name]) for tensors in found)


@pytest.mark.parametrize(
    ("method", "models", "base", "message"),
    [
        ("slerp", "ab", None, "`base_model` is missing: slerp merges a model with a base model"),
        ("slerp", "ab", "c", r"slerp takes 2 model\(s\), the base model among them, found 3"),
        ("slerp", "a", "a", r"slerp takes 2 model\(s\), the base model among them, found 1"),
        ("arcee_fusion", "bc", "a", "the base model among them, found 3"),
        ("nearswap", "bc", "a", r"nearswap takes 1 model\(s\) besides the base model, found 2"),
        ("nuslerp", "ab", "a", r"nuslerp takes 2 model\(s\) besides the base model, found 1"),
        ("nuslerp", "abc", None, r"nuslerp takes 2 model\(s\), found 3"),
        ("model_stock", "b", "a", r"takes at least 2 model\(s\) besides the base model, found 1"),
        ("model_stock", "ab", None, "model_stock works on differences from a base model"),
    ],
)
def test_models_that_do_not_fit_are_refused(method, models, base, message, folder):
    with pytest.raises(SpecError, match=message):
        outliermerge.plan(spec_of(folder, method, models, base))


def test_parameters_of_the_base_have_no_effect_which_a_note_says(folder):
    spec = spec_of(folder, "slerp", "ab", "a")
    spec["models"][0]["parameters"] = {"t": 0.4}
    assert any("parameters of the base model" in note for note in outliermerge.plan(spec).notes)
    spec["base_model"] = {"model": spec["base_model"]}
    assert any("parameters of the base model" in note for note in outliermerge.plan(spec).notes)
    spec["base_model"]["model"] += "/"
    with pytest.raises(SpecError, match="is the base model: for slerp its parameters have no"):
        outliermerge.plan(spec)


def test_in_memory_a_base_is_the_first_model_too(folder, tmp_path):
    base, other = (load_folder(folder / name) for name in "ab")
    on_disk = merged(spec_of(folder, "slerp", "b", "a", parameters={"t": 0.2}), tmp_path / "out")
    in_memory = outliermerge.merge_state_dicts([other], base=base, method="slerp", t=0.2)
    assert all(torch.equal(in_memory[name], on_disk[name]) for name in on_disk)
    with pytest.raises(ArgumentError, match="give `base`"):
        outliermerge.merge_state_dicts([base, other], method="slerp")


def test_t_varies_by_filter_and_over_layers(folder, tmp_path):
    t = [{"filter": "attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": 0.25}, {"value": 1}]
    spec = spec_of(folder, "slerp", "b", "a", parameters={"t": t})
    planned = outliermerge.plan(spec)
    expected = {name: n / 2 for n, name in enumerate(NAMES[::2])}
    expected |= {**dict.fromkeys(NAMES[1::2], 0.25), "norm": 1.0}
    assert {job.name: job.parameters["t"] for job in planned.jobs} == expected
    found = merged(spec, tmp_path / "out")
    base, other = (load_folder(folder / name) for name in "ab")
    for name, value in expected.items():
        alone = outliermerge.merge_tensors([other[name]], base=base[name], method="slerp", t=value)
        assert torch.equal(found[name], alone)


@pytest.mark.parametrize(
    ("method", "parameter", "cut"),
    [
        ("nuslerp", "nuslerp_flatten", {True: "element", False: "row"}),
        ("model_stock", "filter_wise", {False: "element", True: "row"}),
    ],
)
def test_a_switch_can_be_set_by_filter_and_the_plan_can_be_pickled(
    method, parameter, cut, folder, tmp_path
):
    setting = [{"filter": "attn", "value": True}, {"value": False}]
    spec = spec_of(folder, method, "bc", "a", parameters={parameter: setting})
    planned = pickle.loads(pickle.dumps(outliermerge.plan(spec)))
    for job in planned.jobs:
        assert job.task.cut == cut["attn" in job.name]
        assert job.task.method.name == method
    found = load_folder(outliermerge.run(planned, output=tmp_path / "out").output)
    base, *models = (load_folder(folder / name) for name in "abc")
    for value in (True, False):
        alone = outliermerge.merge_state_dicts(
            models, base=base, method=method, **{parameter: value}
        )
        names = [name for name in found if ("attn" in name) == value]
        assert names and all(torch.equal(found[name], alone[name]) for name in names)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
def test_methods_of_inner_products_hold_no_tensor_whole(method, kernels, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in "abc":
        wide = torch.randn((3000, 1000), generator=generator)
        save_tensors(tmp_path / name, {"w": wide.bfloat16()})
    spec = spec_of(tmp_path, method, "bc" if method != "slerp" else "b", "a")
    wanted = outliermerge.run(spec, output=tmp_path / "one", threads=1, kernels=kernels)
    few = outliermerge.run(spec, output=tmp_path / "few", threads=1, kernels=kernels, memory="8MB")
    for result in (wanted, few):
        assert result.manifest["tensors"]["w"]["statistics"]["gram"]
    assert few.manifest["tensors"]["w"] == wanted.manifest["tensors"]["w"]


def test_the_schema_knows_which_methods_need_a_base():
    needs = {
        rule["if"]["properties"]["merge_method"]["const"]
        for rule in json_schema()["allOf"]
        if {"required": ["base_model"]} in rule["then"]["anyOf"]
    }
    assert needs == {name for name, method in METHODS.items() if method.needs_base}
    assert "slerp" in needs and not needs & {"nuslerp", "multislerp", "karcher"}
