"""All mistakes of a spec are told in one report, in the order of their lines."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.spec.check import load_spec, parse_spec
from outliermerge.spec.document import DTYPE_ABBREVIATIONS
from outliermerge.spec.similar import part_meant
from outliermerge.spec.text import MAX_MISTAKES

# Lines of a spec, right and wrong, and where the wrong one is and what is said of it.
PARTS = {
    "merge_method": ("merge_method: ties", "merge_method: tise", "unknown merge method 'tise'"),
    "base_model": ("base_model: b", "base_model: {model: b, renam: x}", "unknown key 'renam'"),
    "models": (
        "models: [{model: one}, {model: two}]",
        "models: [{model: one}, two]",
        "models[1]: found 'two', expected a mapping: write `- model: two`",
    ),
    "dtype": ("dtype: bf16", "dtype: int8", "found 'int8', expected"),
    "seed": ("seed: 1", "seed: x", "seed: found 'x', expected a whole number"),
    "missing": ("missing: base", "missing: skip", "missing: found 'skip', expected"),
    "rename": ("rename: []", "rename: nonesuch", "there is no map 'nonesuch'"),
    "other": ("# nothing", "dtpe: x", "unknown key 'dtpe'. Did you mean 'dtype'?"),
    "quantize": (
        "quantize: fp8",
        "quantize: {to: fp8, format: gguf}",
        "unknown key 'format'. It is a key of the spec: put it beside `quantize`.",
    ),
}


@pytest.mark.parametrize("names", list(itertools.combinations(PARTS, 2)), ids="+".join)
def test_two_mistakes_are_told_together_by_their_lines(names):
    right = {key: line for key, (line, _, _) in PARTS.items() if key != "rename"}
    lines = right | {name: PARTS[name][1] for name in names}
    with pytest.raises(SpecError) as raised:
        parse_spec("\n".join(lines.values()), file="FILE")
    told = str(raised.value).split("\n")
    numbers = {key: number for number, key in enumerate(lines, start=1)}
    wanted = sorted((numbers[name], PARTS[name][2]) for name in names)
    assert len(told) == 2
    for line, (number, said) in zip(told, wanted, strict=True):
        assert line.startswith(f"FILE:{number}:")
        assert said in line


def test_all_parameters_filters_and_models_are_looked_at():
    text = """\
merge_method: ties
base_model: b
models:
  - modle: one
    parameters: {wieght: 1, density: 3}
  - model: two
    parameters: {density: [2, 0.5, 5]}
  - model: two
    rename: [{from: "(", to: ""}, nonesuch]
parameters:
  density: [{filter: x, vlue: 1}, {filter: y, value: z}]
"""
    with pytest.raises(SpecError) as raised:
        parse_spec(text, file="FILE")
    places = [line.split(": ")[1] for line in str(raised.value).split("\n")]
    assert places == [
        "models[0].modle",
        "models[0].parameters.wieght",
        "models[0].parameters.density",
        "models[1].parameters.density[0]",
        "models[1].parameters.density[2]",
        "models[2].model",
        "models[2].rename[0].from",
        "models[2].rename[1]",
        "parameters.density[0].vlue",
        "parameters.density[1].value",
    ]


@pytest.mark.parametrize("number", [MAX_MISTAKES, MAX_MISTAKES + 1, 500])
def test_of_many_mistakes_the_first_are_told_and_the_others_counted(number):
    wrong = "".join(f"x{index}: 1\n" for index in range(number))
    with pytest.raises(SpecError) as raised:
        parse_spec("merge_method: linear\nmodels: [{model: a}]\n" + wrong, file="FILE")
    told = str(raised.value).split("\n")
    assert [line.split(": ")[1] for line in told[:MAX_MISTAKES]] == [
        f"x{index}" for index in range(MAX_MISTAKES)
    ]
    more = number - MAX_MISTAKES
    assert told[MAX_MISTAKES:] == ([f"… and {more} more"] if more else [])


def test_a_key_that_stands_twice_hides_no_other_mistake():
    text = "merge_method: linear\nmodels: [{model: a}]\nseed: 1\nseed: 2\nx: 1\n"
    with pytest.raises(SpecError) as raised:
        parse_spec(text, file="FILE")
    first, second = str(raised.value).split("\n")
    assert first.startswith("FILE:4:1: the key 'seed' stands twice, first in line 3.")
    assert second.startswith("FILE:5:1: x: unknown key 'x'")


def test_a_misspelt_key_is_one_mistake_not_two():
    with pytest.raises(SpecError) as raised:
        load_spec({"merge_methd": "linear", "modles": [{"model": "a"}]})
    assert "missing" not in str(raised.value)
    assert str(raised.value).count("Did you mean") == 2


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ("\n  - a", "write `- model: a`"),
        ("\n  - model a", "write `- model: a`, with a colon and a space"),
        ("\n  - model:a", "write `- model: a`, with a colon and a space"),
        (" a", "write `- model: a`"),
        (" a, b", "write `- model: …` for each, in a line of its own"),
        ("\n  model: a", "write a dash before each, `- model: a`"),
        ("\n  -model: a", "write a space after the dash, `- model: a`"),
    ],
)
def test_a_model_that_is_no_mapping_is_told_how_to_be_written(models, said):
    with pytest.raises(SpecError) as raised:
        parse_spec(f"merge_method: linear\nmodels:{models}\n")
    assert str(raised.value).endswith(said)


@pytest.mark.parametrize("name", ["wieght", "weigth", "densitty"])
def test_a_misspelt_parameter_beside_a_model_is_told_where_it_belongs(name):
    model = {"model": "a", name: 1}
    with pytest.raises(SpecError) as raised:
        load_spec({"merge_method": "ties", "base_model": "b", "models": [model]})
    assert "Did you mean the parameter '" in str(raised.value)
    assert str(raised.value).endswith("Put it under `parameters`.")


def test_all_sources_that_are_none_of_the_models_are_told():
    keys = ("config_source", "tokenizer_source", "processor_source")
    spec = {"merge_method": "linear", "models": [{"model": "a"}]} | dict.fromkeys(keys, "c")
    with pytest.raises(SpecError) as raised:
        load_spec(spec)
    assert {line.split(": ")[1] for line in str(raised.value).split("\n")} == {*keys}


SPELLINGS = {"float16": "float16", "bfloat16": "bfloat16", "float64": "float64"}


@pytest.mark.parametrize("change", [str.lower, str.upper, lambda text: f"torch.{text}"])
@pytest.mark.parametrize(("text", "dtype"), (SPELLINGS | DTYPE_ABBREVIATIONS).items())
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_a_dtype_is_taken_in_every_usual_spelling(key, text, dtype, change):
    spec = load_spec({"merge_method": "linear", "models": [{"model": "a"}], key: change(text)})
    assert spec.as_dict()[key] == dtype


# Parts of names that are in no name


NAMES = [f"model.layers.{n}.{m}.weight" for n in range(3) for m in ("self_attn.q_proj", "mlp.up")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("self_atn", "Did you mean 'self_attn'?"),
        ("SELF_ATTN", "Did you mean 'self_attn'?"),
        ("self-attn", "Did you mean 'self_attn'?"),
        ("self_attn.qproj", "Did you mean 'self_attn.q_proj'?"),
        ("model.layer.0", "Did you mean 'model.layers.0'?"),
        ("*mlp*", "A filter is a part of a name, without signs such as * and ^: write 'mlp'."),
        (r"^model\.layers", "A filter is a part of a name, without signs such as * and ^: write "
         "'model.layers'."),
        ("vision", "Parts of names are: model, layers, self_attn, q_proj, weight, mlp, up."),
    ],
)  # fmt: skip
def test_the_nearest_part_of_a_name_is_found(text, said):
    assert part_meant(text, NAMES) == said


def test_of_no_names_nothing_is_said():
    assert part_meant("x", []) == ""


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", "one", "two")):
        tensors = {name: torch.full((2, 2), float(number)) for name in NAMES}
        save_tensors(Path(name), tensors)


def _refusal(text: str) -> list[str]:
    head = "merge_method: ties\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    with pytest.raises(OutlierMergeError) as raised:
        outliermerge.plan(parse_spec(head + text, file="FILE"))
    return str(raised.value).split("\n")


def test_all_filters_that_match_nothing_are_told_at_their_own_lines(pair):
    entries = "    - {filter: self_atn, value: 1}\n    - {filter: nlp, value: 0}\n    - value: 1\n"
    first, second = _refusal(f"parameters:\n  weight:\n{entries}")
    assert first == (
        "FILE:6:16: parameters.weight[0].filter: the filter 'self_atn' is in no merged tensor's "
        "name. Did you mean 'self_attn'?"
    )
    assert second.startswith("FILE:7:16: parameters.weight[1].filter: the filter 'nlp' is in no")


@pytest.mark.parametrize("key", ["missing", "extra", "unequal"])
def test_all_policies_that_match_nothing_are_told(pair, key):
    word = "drop" if key == "extra" else "base"
    lines = _refusal(f"{key}: [{{filter: mpl, value: {word}}}, {{filter: layer_s, value: {word}}}]")
    assert len(lines) == 2
    assert lines[0].startswith(f"FILE:4:{len(key) + 13}: {key}[0].filter: the filter 'mpl' is in")
    assert lines[1].endswith("Did you mean 'layers'?")


def test_a_rename_that_matches_nothing_names_what_is_near(pair):
    text = "rename: {from: 'model\\.layer\\.', to: x}\n"
    (line,) = _refusal(text)
    assert line.endswith("there is for example 'model.layers.0.mlp.up.weight'. "
                         "Did you mean 'model.layers'?")  # fmt: skip


@pytest.mark.parametrize("name", ["tiez", "Ties", "tias"])
def test_a_misspelt_method_hides_no_other_mistake(name):
    text = f"""merge_method: {name}
base_model: b
models: [{{model: a, parameters: {{wieght: 1}}}}]
parameters: {{desnity: 0.5}}"""
    with pytest.raises(SpecError) as raised:
        parse_spec(text, file="FILE")
    method, weight, density = str(raised.value).split("\n")
    assert method.endswith(f"unknown merge method {name!r}. Did you mean 'ties'?")
    assert "ties has no parameter 'wieght'. Did you mean 'weight'?" in weight
    assert "ties has no parameter 'desnity'. Did you mean 'density'?" in density


def test_a_method_like_no_other_is_told_with_all_that_there_are():
    with pytest.raises(SpecError, match=r"'qqqq'\. Valid: arcee_fusion, .*, wudi\. A method of"):
        parse_spec("merge_method: qqqq\nmodels: [{model: a, parameters: {wieght: 1}}]")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ["a", {"model": "b"}]},
         "models[0]: found 'a', expected a mapping: write {'model': 'a'}"),
        ({"models": "a"}, "models: found 'a', expected a list: write [{'model': 'a'}]"),
        ({"models": {"model": "a"}},
         "models: found a mapping, expected a list: write [{'model': 'a'}]"),
        ({"modifiers": ["x"]},
         "modifiers[0]: found 'x', expected a mapping: write {'modifier': 'x'}"),
        ({"parameters": [{"weight": 1}]}, "parameters: found a list, expected a mapping"),
    ],
)  # fmt: skip
def test_a_dict_is_told_how_to_be_written_in_python(change, said):
    spec = {"merge_method": "task_arithmetic", "base_model": "c", "models": [{"model": "b"}]}
    with pytest.raises(SpecError) as raised:
        load_spec(spec | change)
    assert str(raised.value) == f"spec: {said}"


def test_valid_keys_of_a_kind_are_listed_once():
    text = """\
merge_method: ties
base_model: b
models:
  - {model: one, qqq: 1, www: 2, parameters: {zzz: 1}}
  - {model: two, qqq: 1, parameters: {zzz: 1, yyy: 2}}
qqq: 1
www: 2
"""
    with pytest.raises(SpecError) as raised:
        parse_spec(text, file="FILE")
    told = str(raised.value)
    assert [line.count("Valid: ") for line in told.split("\n")] == [1, 0, 1, 0, 0, 0, 1, 0]
    assert "models[1].qqq: unknown key 'qqq'.\n" in told
    assert [bool("Valid: " in str(each)) for each in raised.value.all] == [True] * 8
    warned = parse_spec("output: x\n" + text, file="FILE", lenient=True).warnings
    assert sum("Valid: " in warning for warning in warned) == 3
