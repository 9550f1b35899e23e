"""Single numbers in several shapes, and layers beyond those that a config counts first."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors
from families import refusal

import outliermerge
from outliermerge.output.load_check import Part, _judge


def plan_of(tmp_path: Any, base: Any, task: Any, config: Any = None, **keys: Any) -> dict[str, Any]:
    for name, tensors in (("base", base), ("task", task)):
        save_tensors(tmp_path / name, tensors)
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "task")}],
        "parameters": {"weight": 0.5},
    } | keys


@pytest.mark.parametrize("shapes", [((), (1,)), ((1,), ()), ((1, 1), (1,)), ((1,), (1, 1, 1))])
def test_one_number_is_merged_in_the_shape_of_the_reference(shapes, tmp_path):
    base = {"a.weight": torch.ones(3), "logit_scale": torch.full(shapes[0], 4.0)}
    task = {"a.weight": torch.zeros(3), "logit_scale": torch.full(shapes[1], 2.0)}
    plan = outliermerge.plan(plan_of(tmp_path, base, task))
    assert any("logit_scale is one number" in note for note in plan.notes)
    merged = load_folder(outliermerge.run(plan, output=tmp_path / "out").output)
    assert torch.equal(merged["logit_scale"], torch.full(shapes[0], 3.0))


def test_more_than_one_number_in_another_shape_is_refused(tmp_path):
    base, task = {"a": torch.ones(4)}, {"a": torch.ones(2, 2)}
    assert "another shape" in refusal(plan_of(tmp_path, base, task))


def layers(count: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(4, 4) for n in range(count)}


DEPTH = {"model_type": "unknown", "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("count", "config"),
    [
        (3, DEPTH | {"num_nextn_predict_layers": 1}),
        (4, DEPTH | {"num_nextn_predict_layers": 2}),
        (3, {"text_config": DEPTH | {"num_nextn_predict_layers": 1}}),
    ],
)
def test_layers_that_predict_more_tokens_are_known(count, config, tmp_path):
    spec = plan_of(tmp_path, layers(2), layers(count), config, extra="copy")
    plan = outliermerge.plan(spec)
    assert not any("num_hidden_layers" in note for note in plan.notes)
    assert len(plan.proof.added) == count - 2


@pytest.mark.parametrize("config", [DEPTH, DEPTH | {"num_nextn_predict_layers": 2}])
def test_layers_that_no_config_knows_are_refused_and_not_only_dropped(config, tmp_path):
    message = refusal(plan_of(tmp_path, layers(2), layers(3), config, extra="copy"))
    assert "`config_source`" in message and "with what was trained in them" in message


@pytest.mark.parametrize(
    ("name", "config", "known"),
    [
        ("model.layers.2.eh_proj.weight", {"num_nextn_predict_layers": 1}, True),
        ("model.layers.3.eh_proj.weight", {"num_nextn_predict_layers": 1}, False),
        ("model.layers.2.eh_proj.weight", {}, False),
        ("model.layers.1.eh_proj.weight", {"num_nextn_predict_layers": 1}, False),
        ("mtp.fc.weight", {"mtp_num_hidden_layers": 1}, True),
        ("mtp.fc.weight", {}, False),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_fine_tunes_layers_that_the_config_counts_are_no_fault_in_loading(
    name, config, known, nested
):
    config = DEPTH | config
    part = Part("", "transformers", "M", {"text_config": config} if nested else config, {})
    found = {"by": "transformers", "missing": [], "unexpected": [name], "mismatched": []}
    verdict = _judge([(part, found, {})], ())
    assert verdict.status == ("loads" if known else "does not load")
    assert any("predict more tokens" in note for note in verdict.notes) == known
