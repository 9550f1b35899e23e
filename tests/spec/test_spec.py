"""What a spec means: precedence, filters, gradients over layers, mergekit's spellings, schema."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from checkpoints import save_tensors

import outliermerge
from outliermerge.methods.contract import merge_method
from outliermerge.methods.parameter import Parameter
from outliermerge.methods.table import METHODS
from outliermerge.spec.check import load_spec, parse_spec
from outliermerge.spec.schema import json_schema
from outliermerge.spec.settings import find_layers, parse_setting

SHIPPED = sorted((Path(__file__).parents[2] / "merge_configs").glob("*.yaml"))

# A language model with 5 layers, a vision tower with 3, a stack of one layer, and a projector.
TEXT, VISION, ONE = "model.layers.", "vision_tower.encoder.layers.", "draft.layers."
NAMES = (
    "model.embed_tokens.weight",
    *(f"{TEXT}{number}.{part}.weight" for number in range(5) for part in ("mlp", "self_attn")),
    *(f"{VISION}{number}.mlp.weight" for number in range(3)),
    f"{ONE}0.mlp.weight",
    "mm_projector.0.weight",
    "mm_projector.2.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, model in enumerate(("base", "a", "b")):
        save_tensors(root / model, {name: torch.full((2, 2), float(seed)) for name in NAMES})
    return root


def _resolved(folder: Path, of_models=({}, {}), method="ties", **parameters) -> dict[str, dict]:
    """Return each tensor's parameters as a plan resolves them."""
    spec = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / model), "parameters": own}
            for model, own in zip("ab", of_models, strict=True)
        ],
        "parameters": parameters,
    }
    return {job.name: dict(job.parameters) for job in outliermerge.plan(spec).jobs}


def _entry(value: object, name: str | None = None) -> dict:
    return {"value": value} if name is None else {"filter": name, "value": value}


# Precedence.


def test_a_models_parameter_wins_over_the_global_one_and_that_over_the_default(folder):
    resolved = _resolved(folder, ({"weight": 0.25}, {}), weight=0.5)
    default = METHODS["ties"].parameters["density"].default

    for name in NAMES:
        assert resolved[name]["weight"] == (0.25, 0.5)
        assert resolved[name]["density"] == (default, default)


def test_a_filtered_list_without_a_match_falls_through_to_the_next_level(folder):
    of_a = {"density": [_entry(0.1, "self_attn")]}
    resolved = _resolved(folder, (of_a, {}), density=[_entry(0.2, "mlp")])

    assert resolved[f"{TEXT}1.self_attn.weight"]["density"] == (0.1, 1.0)
    assert resolved[f"{TEXT}1.mlp.weight"]["density"] == (0.2, 0.2)
    assert resolved["lm_head.weight"]["density"] == (1.0, 1.0)


def test_parameters_of_the_whole_merge_are_one_value(folder):
    resolved = _resolved(folder, **{"lambda": [_entry(0.5, "mlp")], "normalize": False})

    assert resolved[f"{TEXT}0.mlp.weight"]["lambda"] == 0.5
    assert resolved["lm_head.weight"]["lambda"] == 1.0
    assert resolved["lm_head.weight"]["normalize"] is False


def test_a_model_of_weight_0_is_not_one_without_a_weight(folder):
    assert _resolved(folder, ({"weight": 0}, {}))["lm_head.weight"]["weight"] == (0.0, 1.0)


# Filters.


def test_the_first_filter_that_matches_wins(folder):
    resolved = _resolved(
        folder, density=[_entry(0.1, "layers.1."), _entry(0.2, "mlp"), _entry(0.3)]
    )

    assert resolved[f"{TEXT}1.mlp.weight"]["density"] == (0.1, 0.1)
    assert resolved[f"{VISION}1.mlp.weight"]["density"] == (0.1, 0.1)
    assert resolved[f"{TEXT}2.mlp.weight"]["density"] == (0.2, 0.2)
    assert resolved[f"{TEXT}2.self_attn.weight"]["density"] == (0.3, 0.3)


@pytest.mark.parametrize("catch_all", ["*", None])
def test_a_star_or_nothing_matches_every_tensor(catch_all, folder):
    resolved = _resolved(folder, density=[_entry(0.1, "mlp"), {"filter": catch_all, "value": 0.2}])

    for name in NAMES:
        assert resolved[name]["density"] == ((0.1, 0.1) if "mlp" in name else (0.2, 0.2))


@pytest.mark.parametrize(
    ("name", "matches"),
    [
        ("mlp.up", True),
        ("model.layers.0.mlp.up.weight", True),
        ("MLP", False),
        ("mlp*", False),
        ("mlp.*weight", False),
        ("model?layers", False),
        ("up.weight.", False),
    ],
)
def test_a_filter_is_a_part_of_the_name_with_its_case_and_no_pattern(name, matches):
    entries = [_entry(0.5, name)]
    setting = parse_setting(entries, METHODS["ties"].parameters["density"], ())

    assert (setting.entry_for("model.layers.0.mlp.up.weight") is not None) is matches


def test_one_entry_may_stand_without_a_list(folder):
    resolved = _resolved(folder, density=_entry(0.1, "mlp"))

    assert resolved[f"{TEXT}0.mlp.weight"]["density"] == (0.1, 0.1)
    assert resolved["lm_head.weight"]["density"] == (1.0, 1.0)


# Gradients.


@pytest.mark.parametrize(
    ("gradient", "of_layers"),
    [
        ([0.3], [0.3, 0.3, 0.3, 0.3, 0.3]),
        ([0, 1], [0, 0.25, 0.5, 0.75, 1]),
        ([1, 0], [1, 0.75, 0.5, 0.25, 0]),
        ([0, 1, 0], [0, 0.5, 1, 0.5, 0]),
        ([0, 0.4, 0.6, 1], [0, 0.3, 0.5, 0.7, 1]),
        ([0, 1, 0, 1, 0, 1, 0], [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_a_gradient_is_interpolated_between_its_neighbours(gradient, of_layers, folder):
    resolved = _resolved(folder, density=gradient)

    for number, value in enumerate(of_layers):
        for part in ("mlp", "self_attn"):
            found = resolved[f"{TEXT}{number}.{part}.weight"]["density"]
            assert found == pytest.approx((value, value), abs=1e-12)


def test_the_ends_of_a_gradient_are_exact(folder):
    resolved = _resolved(folder, density=[0.1, 0.7])

    assert resolved[f"{TEXT}0.mlp.weight"]["density"] == (0.1, 0.1)
    assert resolved[f"{TEXT}4.mlp.weight"]["density"] == (0.7, 0.7)


def test_a_gradient_restarts_in_a_stack_of_another_depth(folder):
    resolved = _resolved(folder, density=[0, 1])

    of_vision = [resolved[f"{VISION}{number}.mlp.weight"]["density"][0] for number in range(3)]
    assert of_vision == [0, 0.5, 1]


def test_a_stack_of_one_layer_is_at_the_end_of_a_gradient(folder):
    assert _resolved(folder, density=[0, 1])[f"{ONE}0.mlp.weight"]["density"] == (1, 1)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "mm_projector.0.weight",
        "mm_projector.2.weight",
    ],
)
def test_what_is_in_no_layer_is_at_the_start_of_a_gradient(name, folder):
    assert _resolved(folder, density=[0.2, 1])[name]["density"] == (0.2, 0.2)


def test_a_gradient_in_a_filter_entry_runs_over_its_tensors_layers(folder):
    resolved = _resolved(folder, density=[_entry([0, 1], "mlp"), _entry(0.9)])

    assert resolved[f"{TEXT}1.mlp.weight"]["density"] == (0.25, 0.25)
    assert resolved[f"{TEXT}1.self_attn.weight"]["density"] == (0.9, 0.9)


def test_a_plan_shows_each_gradient_by_stack(folder):
    spec = {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "a")}, {"model": str(folder / "b")}],
        "parameters": {"lambda": [0, 1]},
    }

    assert outliermerge.plan(spec).gradients == {
        "lambda": {TEXT: [0, 0.25, 0.5, 0.75, 1], VISION: [0, 0.5, 1]}
    }


@pytest.mark.parametrize(
    ("kind", "values", "of_positions"),
    [
        (bool, [True, False], {0: True, 0.5: True, 0.99: True, 1: False}),
        (str, ["x", "y", "z"], {0: "x", 0.49: "x", 0.5: "y", 0.99: "y", 1: "z"}),
    ],
)
def test_bools_and_texts_do_not_interpolate(kind, values, of_positions):
    parameter = Parameter("p", kind, values[0], False, METHODS["ties"].parameters["weight"].bounds)
    entry = parse_setting(values, parameter, ()).entry_for("any")

    assert entry is not None
    assert {position: entry.at(position) for position in of_positions} == of_positions


def test_a_list_of_bools_takes_one_of_them_in_each_layer(folder):
    resolved = _resolved(folder, normalize=[True, False])

    values = [resolved[f"{TEXT}{number}.mlp.weight"]["normalize"] for number in range(5)]
    assert values == [True, True, True, True, False]


@merge_method(space="weight")
def _counted(weights, *, count: int = 1):
    """Take an integer."""
    return weights[0] * count


def test_a_gradient_of_integers_gives_integers(folder):
    parameter = _counted.parameters["count"]
    entry = parse_setting([1, 3], parameter, ()).entry_for("any")

    assert entry is not None
    for position in (0, 0.25, 0.5, 0.75, 1):
        assert parameter.check(entry.at(position)) in (1, 2, 3)


# Layers.


def test_layers_are_found_by_the_first_number_that_a_module_follows():
    layers = find_layers(
        [
            "h.0.attn.weight",
            "h.11.mlp.experts.3.weight",
            "mm_projector.0.weight",
            "lm_head.weight",
            "model.layers.2.norm.weight",
            "0.auto_model.embeddings.weight",
        ]
    )

    assert {name: (layer.stack, layer.index, layer.num_layers) for name, layer in layers.items()} \
        == {
            "h.0.attn.weight": ("h.", 0, 12),
            "h.11.mlp.experts.3.weight": ("h.", 11, 12),
            "model.layers.2.norm.weight": ("model.layers.", 2, 3),
            "0.auto_model.embeddings.weight": ("", 0, 1),
        }  # fmt: skip


def test_positions_run_from_0_to_1_in_each_stack():
    layers = find_layers(name for name in NAMES)

    assert [layers[f"{TEXT}{number}.mlp.weight"].position for number in range(5)] == [
        0, 0.25, 0.5, 0.75, 1,
    ]  # fmt: skip
    assert [layers[f"{VISION}{number}.mlp.weight"].position for number in range(3)] == [0, 0.5, 1]
    assert layers[f"{ONE}0.mlp.weight"].position == 1
    assert not {"mm_projector.0.weight", "lm_head.weight", "model.norm.weight"} & set(layers)


# mergekit's spellings.


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "'0.001'", ".001", "1.0e-3", "+1e-3"])
def test_a_number_written_as_a_text_is_taken(text, folder):
    resolved = _resolved(folder, **{"lambda": yaml.safe_load(text)})

    assert resolved["lm_head.weight"]["lambda"] == 0.001


def test_numbers_written_as_texts_interpolate(folder):
    resolved = _resolved(folder, density=yaml.safe_load("[1e-1, 3e-1]"))

    assert resolved[f"{TEXT}2.mlp.weight"]["density"] == pytest.approx((0.2, 0.2))


MERGEKIT = """\
# An example in the style of mergekit's own.
models:
  - model: DIR/base
    # no parameters necessary for base model
  - model: DIR/a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: DIR/b
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: DIR/base
parameters:
  normalize: true
  int8_mask: true
dtype: torch.bfloat16
tokenizer_source: base
"""


def test_a_mergekit_file_that_lists_the_base_is_taken_as_it_is(folder):
    spec = parse_spec(MERGEKIT.replace("DIR", str(folder)))

    assert [model.reference for model in spec.models] == [str(folder / "a"), str(folder / "b")]
    assert spec.document.dtype == "bfloat16"
    jobs = {job.name: job for job in outliermerge.plan(yaml.safe_load(
        MERGEKIT.replace("DIR", str(folder)))).jobs}  # fmt: skip
    job = jobs[f"{TEXT}2.mlp.weight"]
    assert job.parameters["density"] == (0.7, 0.33)
    assert job.parameters["weight"] == (1.0, 0.5)
    assert job.parameters["normalize"] is True
    assert len(job.sources) == 3
    assert job.output.dtype.name == "bfloat16"
    assert jobs["lm_head.weight"].parameters["weight"] == (1.0, 0.0)


def test_a_base_listed_by_another_path_is_still_the_base(folder):
    text = MERGEKIT.replace("- model: DIR/base", "- model: DIR/a/../base/")
    spec = parse_spec(text.replace("DIR", str(folder)))

    assert len(spec.models) == 2


def test_a_base_listed_in_a_mean_of_weights_is_one_of_its_models(folder):
    text = "merge_method: linear\nbase_model: DIR/base\nmodels:\n" + "".join(
        f"  - model: DIR/{name}\n    parameters: {{weight: {weight}}}\n"
        for name, weight in (("base", 1), ("a", 2), ("b", 3))
    )
    spec = parse_spec(text.replace("DIR", str(folder)))

    assert len(spec.models) == 3
    job = outliermerge.plan(yaml.safe_load(text.replace("DIR", str(folder)))).jobs[0]
    assert job.parameters["weight"] == (1, 2, 3)
    assert len(job.sources) == 3


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize("prefix", ["", "torch."])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_are_taken_with_and_without_torch(key, prefix, name, folder):
    spec = {"merge_method": "linear", "models": [{"model": str(folder / "a")}]}
    checked = load_spec(spec | {key: prefix + name})

    assert getattr(checked.document, key) == name
    assert {job.output.dtype.name for job in outliermerge.plan(checked).jobs} == {name}


def test_out_dtype_wins_over_dtype_for_what_is_stored(folder):
    spec = {"merge_method": "linear", "models": [{"model": str(folder / "a")}],
            "dtype": "float64", "out_dtype": "float16"}  # fmt: skip
    jobs = outliermerge.plan(spec).jobs

    assert {job.output.dtype.name for job in jobs} == {"float16"}
    assert {job.compute_dtype for job in jobs} == {"float64"}


def test_int8_mask_has_no_effect(folder, tmp_path):
    models = [{"model": str(folder / model)} for model in "ab"]
    outputs = []
    for mask in (True, False):
        spec = {"merge_method": "ties", "base_model": str(folder / "base"), "models": models,
                "parameters": {"int8_mask": mask, "density": 0.5}}  # fmt: skip
        result = outliermerge.run(spec, output=tmp_path / str(mask))
        outputs.append((result.output / "model.safetensors").read_bytes())

    assert outputs[0] == outputs[1]


def test_yaml_anchors_and_merge_keys_are_taken(folder):
    text = """\
merge_method: ties
base_model: DIR/base
models:
  - model: DIR/a
    parameters: &shared {weight: 0.5, density: 0.2}
  - model: DIR/b
    parameters: {<<: *shared, weight: 0.7}
"""
    text = text.replace("DIR", str(folder))

    job = outliermerge.plan(parse_spec(text)).jobs[0]
    assert job.parameters["weight"] == (0.5, 0.7)
    assert job.parameters["density"] == (0.2, 0.2)


# Dicts and files.


def test_a_dict_is_the_same_as_its_yaml(folder, tmp_path):
    text = MERGEKIT.replace("DIR", str(folder))
    path = tmp_path / "spec.yaml"
    path.write_text(text)

    from_file, from_text = load_spec(path), load_spec(str(path))
    from_dict = load_spec(yaml.safe_load(text))
    assert from_file.as_dict() == from_text.as_dict() == from_dict.as_dict()
    assert from_dict.method is from_file.method
    assert outliermerge.plan(from_dict).jobs == outliermerge.plan(from_file).jobs


def test_a_dict_is_not_changed(folder):
    raw = yaml.safe_load(MERGEKIT.replace("DIR", str(folder)))
    before = yaml.safe_dump(raw)
    outliermerge.plan(raw)

    assert yaml.safe_dump(raw) == before


def _good_specs(folder: Path) -> dict[str, str]:
    head = f"base_model: {folder / 'base'}\nmodels:\n  - model: {folder / 'a'}\n"
    good = {
        "mergekit": MERGEKIT.replace("DIR", str(folder)),
        "smallest": f"merge_method: linear\nmodels:\n  - model: {folder / 'a'}\n",
        "all keys": "merge_method: min_sigma\n" + head + "parameters: {t: 3, lambda: 0.5}\n"
        "dtype: float32\nout_dtype: bfloat16\ntokenizer_source: base\noutput: 'a: b #é'\n"
        "missing: base\nextra: copy\n",
        "number as a text": "merge_method: task_arithmetic\n"
        + head
        + "parameters:\n  lambda: 1e-3\n  weight: [1e-3, 2]\n",
        "own method": "merge_method: package.module:function\n" + head,
        "nulls": f"merge_method: linear\nbase_model:\nmodels:\n  - model: {folder / 'a'}\n"
        "dtype: ~\nout_dtype: ~\noutput: ~\ntokenizer_source: ~\n",
        "filters": "merge_method: ties\n" + head + "parameters:\n  density:\n"
        "    - {filter: mlp, value: [0.1, 0.2]}\n    - {filter: '*', value: 1}\n"
        "  normalize: [true, false]\n",
    }
    return good | {path.name: path.read_text("utf-8") for path in SHIPPED}


GOOD_NAMES = [
    "mergekit", "smallest", "all keys", "number as a text", "own method", "nulls", "filters",
    *(path.name for path in SHIPPED),
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in GOOD_NAMES if name != "own method"])
def test_a_spec_written_as_yaml_reads_back_as_the_same(name, folder):
    spec = parse_spec(_good_specs(folder)[name])

    again = parse_spec(spec.as_yaml())
    assert again.as_dict() == spec.as_dict()
    assert again.document == spec.document
    assert [model.reference for model in again.models] == [m.reference for m in spec.models]
    assert again.as_yaml() == spec.as_yaml()


@pytest.mark.parametrize(
    "character", ["\x85", "\u2028", "\xa0", "é", "\ufeff", "\x07", "\n", "'", "𝄞"]
)
def test_any_character_of_a_spec_survives_being_written(character):
    raw = {"merge_method": "linear", "models": [{"model": f"a{character}b"}], "output": character}

    assert parse_spec(load_spec(raw).as_yaml()).as_dict() == raw


def test_a_written_spec_holds_only_what_was_set(folder):
    spec = parse_spec(_good_specs(folder)["smallest"])

    assert spec.as_dict() == {"merge_method": "linear", "models": [{"model": str(folder / "a")}]}


# The JSON schema.


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_specs_are_valid_by_the_schema(name, folder, validator):
    validator.validate(yaml.safe_load(_good_specs(folder)[name]))


HEAD = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}]}
INERT = {
    "a label": HEAD | {"name": "mine"},
    "no parameters": HEAD | {"parameters": None},
    "no parameters of a model": HEAD | {"models": [{"model": "a", "parameters": None}]},
    "a mask's dtype": HEAD | {"parameters": {"int8_mask": True}},
    "a mask's dtype of a model": HEAD
    | {"models": [{"model": "a", "parameters": {"int8_mask": True}}]},
}


@pytest.mark.parametrize("name", INERT)
def test_what_has_no_effect_is_taken_and_valid_by_the_schema(name, validator):
    load_spec(INERT[name])
    validator.validate(INERT[name])


SLICED = {
    "merge_method": "passthrough",
    "slices": [{"sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"scale": 2}}]}],
}
BAD = {
    "unknown key": HEAD | {"dtpe": "float32"},
    "unknown key of a model": HEAD | {"models": [{"model": "a", "weight": 1}]},
    "unknown method": HEAD | {"merge_method": "tiez"},
    "no method": {"models": [{"model": "a"}]},
    "no models": {"merge_method": "linear"},
    "empty models": HEAD | {"models": []},
    "empty model": HEAD | {"models": [{"model": ""}]},
    "model of a number": HEAD | {"models": [{"model": 1}]},
    "no base model": {"merge_method": "ties", "models": [{"model": "a"}]},
    "null for the base model": HEAD | {"base_model": None},
    "unknown parameter": HEAD | {"parameters": {"densty": 1}},
    "parameter of another method": HEAD | {"parameters": {"t": 2}},
    "unknown parameter of a model": HEAD | {"models": [{"model": "a", "parameters": {"zzz": 1}}]},
    "shared parameter under a model": HEAD
    | {"models": [{"model": "a", "parameters": {"lambda": 1}}]},
    "out of range": HEAD | {"parameters": {"density": 1.5}},
    "out of range in a gradient": HEAD | {"parameters": {"density": [0.5, -0.1]}},
    "out of range in a filter entry": HEAD
    | {"parameters": {"density": [{"filter": "mlp", "value": 2}]}},
    "out of range of a model": HEAD | {"models": [{"model": "a", "parameters": {"density": 2}}]},
    "text for a number": HEAD | {"parameters": {"density": "high"}},
    "number for a bool": HEAD | {"parameters": {"normalize": 2}},
    "bool for a number": HEAD | {"parameters": {"density": True}},
    "null for a value": HEAD | {"parameters": {"density": None}},
    "empty gradient": HEAD | {"parameters": {"density": []}},
    "nested list": HEAD | {"parameters": {"density": [[1]]}},
    "filter entry without a value": HEAD | {"parameters": {"density": [{"filter": "mlp"}]}},
    "unknown key in a filter entry": HEAD
    | {"parameters": {"density": [{"filtr": "mlp", "value": 1}]}},
    "empty filter": HEAD | {"parameters": {"density": [{"filter": "", "value": 1}]}},
    "unknown dtype": HEAD | {"dtype": "fp8"},
    "integer dtype": HEAD | {"out_dtype": "int8"},
    "unknown policy": HEAD | {"missing": "skip"},
    "slices beside models": HEAD
    | {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
    "no slices": SLICED | {"slices": []},
    "no sources": SLICED | {"slices": [{"sources": []}]},
    "no range": SLICED | {"slices": [{"sources": [{"model": "a"}]}]},
    "a range of one": SLICED | {"slices": [{"sources": [{"model": "a", "layer_range": [1]}]}]},
    "parameter of another method in a slice": SLICED
    | {"slices": [SLICED["slices"][0] | {"parameters": {"t": 1}}]},
    "stack without slices": HEAD | {"stack": "text"},
    "another tokenizer": HEAD | {"tokenizer_source": 5},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_specs_are_refused_by_the_schema_and_by_the_package(case, validator):
    with pytest.raises(outliermerge.SpecError):
        load_spec(BAD[case])
    assert not validator.is_valid(BAD[case])


@pytest.mark.parametrize("value", ["1e-3", "0.5", ".5", "1"])
def test_numbers_as_texts_are_valid_by_the_schema_as_they_are_by_the_package(value, validator):
    spec = HEAD | {"parameters": {"density": value}}

    load_spec(spec)
    assert validator.is_valid(spec)


SLERP = {
    "merge_method": "slerp",
    "slices": [
        {
            "sources": [
                {"model": name, "layer_range": [0, 2], "parameters": None} for name in "ab"
            ],
            "base_model": "a",
            "parameters": {"t": 0.5, "int8_mask": True},
        }
    ],
}


@pytest.mark.parametrize("spec", [HEAD, SLICED, SLICED | {"stack": "text"}, SLERP])
def test_the_head_of_the_bad_specs_is_good(spec, validator):
    load_spec(spec)
    validator.validate(spec)
