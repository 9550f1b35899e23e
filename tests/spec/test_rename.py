"""Names changed on the way in and out: shipped maps, regular expressions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import load_folder, save_tensors
from layouts import ORIGINAL_TO_HF

import outliermerge
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.spec.rename import MAP_NAMES, parse_rename

V4_TO_V5 = {
    "language_model.lm_head.weight": "lm_head.weight",
    "language_model.model.layers.3.mlp.up_proj.weight": (
        "model.language_model.layers.3.mlp.up_proj.weight"
    ),
    "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
    "image_newline": "model.image_newline",
    "vision_tower.vision_model.pre_layrnorm.weight": "model.vision_tower.pre_layrnorm.weight",
}


def _apply(raw, names):
    return parse_rename(raw, ("rename",)).apply(names)


@pytest.mark.parametrize(
    ("forwards", "backwards", "pairs"),
    [
        ("llava_original_to_hf", "llava_hf_to_original", ORIGINAL_TO_HF),
        (
            "llava_next_original_to_hf",
            "llava_next_hf_to_original",
            ORIGINAL_TO_HF | {"model.image_newline": "image_newline"},
        ),
        ("transformers_v4_to_v5", "transformers_v5_to_v4", V4_TO_V5),
    ],
)
def test_a_shipped_map_goes_both_ways(forwards, backwards, pairs):
    assert _apply(forwards, pairs) == pairs
    assert _apply(backwards, pairs.values()) == {new: old for old, new in pairs.items()}


def test_the_tower_is_found_with_and_without_its_old_level():
    fresh = {
        "vision_tower.embeddings.class_embedding": "model.vision_tower.embeddings.class_embedding"
    }
    assert _apply("transformers_v4_to_v5", fresh) == fresh
    middle = "model.vision_tower.vision_model.embeddings.class_embedding"
    assert _apply("transformers_v5_to_v4", [middle])[middle] == middle.removeprefix("model.")


def test_rules_are_applied_in_order_after_a_map():
    raw = [
        "llava_original_to_hf",
        {"from": r"^vision_tower\.vision_model\.", "to": "vision_tower."},
    ]
    name = "model.vision_tower.vision_tower.vision_model.x.weight"
    assert _apply(raw, [name]) == {name: "vision_tower.x.weight"}


def test_a_replacement_may_use_groups():
    raw = [{"from": r"\.(gamma|beta)$", "to": r".the_\1"}]
    assert _apply(raw, ["LayerNorm.gamma"]) == {"LayerNorm.gamma": "LayerNorm.the_gamma"}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(8, 4), "b.weight": torch.randn(6)}
    save_tensors(tmp_path / "base", base)
    for number in (1, 2):
        moved = {f"old.{k}": v + 0.1 * number * torch.randn_like(v) for k, v in base.items()}
        save_tensors(tmp_path / f"m{number}", moved)
    return tmp_path


def _spec(models: Path, **keys) -> dict:
    rename = [{"from": r"^old\.", "to": ""}]
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / f"m{n}"), "rename": rename} for n in (1, 2)],
    } | keys


def test_a_model_is_merged_under_its_new_names(models, tmp_path):
    outliermerge.run(_spec(models), output=tmp_path / "out")

    base, merged = load_folder(models / "base"), load_folder(tmp_path / "out")
    assert set(merged) == set(base)
    for name, tensor in base.items():
        moved = [load_folder(models / f"m{n}")[f"old.{name}"].double() for n in (1, 2)]
        expected = tensor.double() + sum(m - tensor.double() for m in moved)
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)


def test_the_output_is_written_under_its_new_names(models, tmp_path):
    plain = outliermerge.run(_spec(models), output=tmp_path / "plain").output
    rename = [{"from": r"^(\w)\.", "to": r"model.\1."}]
    renamed = outliermerge.run(_spec(models, rename=rename), output=tmp_path / "new").output

    expected = {f"model.{name}": tensor for name, tensor in load_folder(plain).items()}
    found = load_folder(renamed)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert outliermerge.verify(renamed) == []


def test_the_base_may_be_renamed_too(models, tmp_path):
    spec = _spec(models)
    rename = [{"from": "^", "to": "old."}]
    spec["base_model"] = {"model": spec["base_model"], "rename": rename}
    spec["models"] = [{"model": entry["model"]} for entry in spec["models"]]
    assert set(load_folder(outliermerge.run(spec, output=tmp_path / "out").output)) == {
        "old.a.weight",
        "old.b.weight",
    }


def test_filters_are_on_the_names_of_the_merge_not_of_the_output(models):
    rename = [{"from": "^a", "to": "zzz"}]
    weight = [{"filter": "a.weight", "value": 0.5}, {"value": 1}]
    plan = outliermerge.plan(_spec(models, rename=rename, parameters={"weight": weight}))
    assert {job.name: job.parameters["weight"] for job in plan.jobs} == {
        "zzz.weight": (0.5, 0.5),
        "b.weight": (1.0, 1.0),
    }


def test_the_plan_shows_the_pairing(models):
    plan = json.loads(json.dumps(outliermerge.plan(_spec(models)).as_dict()))
    assert plan["inputs"][1]["renamed"] == {
        r"^old\.": {"num_tensors": 2, "from": "old.a.weight", "to": "a.weight"}
    }
    names = {tensor["name"]: tensor["stored_names"] for tensor in plan["tensors"]}
    assert names["a.weight"] == ["a.weight", "old.a.weight", "old.a.weight"]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            "llava_orginal_to_hf",
            "there is no map 'llava_orginal_to_hf'. Did you mean 'llava_original_to_hf'?",
        ),
        (5, "rename: found 5, expected the name of a map, or a list of `from:` and `to:`"),
        ([], "models[0].rename: must not be empty"),
        ([{"from": "x"}], "models[0].rename[0]: needs `to`, a text"),
        ([{"to": "x"}], "models[0].rename[0]: needs `from`, a text"),
        ([{"from": "x", "to": "y", "flags": 1}], "unknown key 'flags'. Valid: from, to."),
        ([{"from": "(", "to": "y"}], "'(' is not a regular expression: missing )"),
        ([{"from": "x", "to": r"\1"}], r"'\\1': invalid group reference 1"),
    ],
)  # fmt: skip
def test_a_wrong_rule_is_refused_in_the_spec(models, rename, message):
    spec = _spec(models)
    spec["models"][0]["rename"] = rename
    with pytest.raises(SpecError) as caught:
        outliermerge.plan(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            [{"from": "absent", "to": "x"}],
            "models[0].rename[0]: 'absent' matches no tensor; there is for example 'old.a.weight'",
        ),
        (
            "llava_original_to_hf",
            "models[0].rename: 'llava_original_to_hf' matches no tensor",
        ),
        (
            [{"from": r"old\.[ab]", "to": "a"}],
            "models[0].rename[0]: 'old.a.weight' and 'old.b.weight' both become 'a.weight'",
        ),
    ],
)
def test_a_rule_that_does_not_fit_the_model_is_refused(models, rename, message):
    spec = _spec(models)
    spec["models"][0]["rename"] = rename
    with pytest.raises(SpecError) as caught:
        outliermerge.plan(spec)
    assert message in str(caught.value)


def test_the_output_may_not_lose_a_tensor_to_a_rename(models):
    with pytest.raises(SpecError, match="both become 'x'"):
        outliermerge.plan(_spec(models, rename=[{"from": ".*weight", "to": "x"}]))


def test_names_in_another_layout_get_the_map_that_pairs_them(tmp_path):
    torch.manual_seed(0)
    tensors = {new: torch.randn(4, 4) for new in ORIGINAL_TO_HF.values()}
    save_tensors(tmp_path / "base", tensors)
    save_tensors(tmp_path / "m", {old: tensors[new] for old, new in ORIGINAL_TO_HF.items()})
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "m")}],
    }
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    wanted = f"`rename: llava_original_to_hf` on {tmp_path / 'm'} pairs 7 of its 7 tensors"
    assert wanted in str(caught.value)


def test_the_schema_knows_every_map():
    from outliermerge.spec.schema import json_schema

    rename = json_schema()["properties"]["rename"]
    assert set(rename["anyOf"][0]["enum"]) == set(MAP_NAMES)
