"""Mistakes in slices are told with their place and what to do."""

from __future__ import annotations

import pytest
from stacks import save

import outliermerge
from outliermerge.errors import OutlierMergeError
from outliermerge.spec.check import parse_spec

STACK = "merge_method: passthrough\nslices:\n"
ONE = "- sources:\n  - {model: a, layer_range: [0, 2]}\n"
TWO = ONE + "  - {model: b, layer_range: [0, 2]}\n"
SLERP = "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n"
TIES = "merge_method: ties\nbase_model: base\nslices:\n"


def sources(*ranges: str) -> str:
    rows = (
        f"  - {{model: {name}, layer_range: {each}}}\n"
        for name, each in zip("abc", ranges, strict=False)
    )
    return "- sources:\n" + "".join(rows)


OF_THE_TEXT = {
    "a reversed range": (
        STACK + sources("[5, 2]"),
        "4:29: slices[0].sources[0].layer_range: found [5, 2], a reversed range: [a, b] takes the "
        "layers a to b - 1",
    ),
    "an empty range": (STACK + sources("[2, 2]"), "4:29: slices[0].sources[0].layer_range: found "
                       "[2, 2], an empty range: [a, b] takes the layers a to b - 1"),
    "a negative range": (STACK + sources("[-2, 4]"), "4:29: slices[0].sources[0].layer_range: "
                         "found [-2, 4]: layers are counted from 0"),
    "a range of one number": (STACK + sources("[3]"), "4:29: slices[0].sources[0].layer_range: "
                              "found 1 value(s), expected 2: write [a, b] for the "
                              "layers a to b - 1"),
    "a range of three numbers": (STACK + sources("[0, 1, 2]"), "4:29: slices[0].sources[0]."
                                 "layer_range: found 3 value(s), expected 2: write [a, b] for the "
                                 "layers a to b - 1"),
    "a number for a range": (STACK + sources("4"), "4:29: slices[0].sources[0].layer_range: "
                             "found 4, expected a list: write [a, b] for the layers a to b - 1"),
    "a text for a range": (STACK + sources("2-6"), "4:29: slices[0].sources[0].layer_range: "
                           "found '2-6', expected a list: write [2, 6] for the layers 2 to 5"),
    "a range of texts": (STACK + sources("[a, 2]"), "4:30: slices[0].sources[0].layer_range[0]: "
                         "found 'a', expected a whole number"),
    "no range": (STACK + "- sources:\n  - {model: a}\n",
                 "4:5: slices[0].sources[0]: `layer_range` is missing"),
    "a misspelt range": (
        STACK + "- sources:\n  - {model: a, layer_rnage: [0, 2]}\n",
        "4:16: slices[0].sources[0].layer_rnage: unknown key 'layer_rnage'. Did you mean "
        "'layer_range'?",
    ),
    "no model": (STACK + "- sources:\n  - {layer_range: [0, 2]}\n",
                 "4:5: slices[0].sources[0]: `model` is missing"),
    "no sources": (STACK + "- parameters: {}\n", "3:3: slices[0]: `sources` is missing"),
    "empty sources": (STACK + "- sources: []\n", "3:12: slices[0].sources: must not be empty"),
    "no slices": ("merge_method: passthrough\nslices: []\n", "2:9: slices: must not be empty"),
    "slices that are no list": (
        "merge_method: passthrough\nslices: {sources: []}\n",
        "2:9: slices: found a mapping, expected a list",
    ),
    "models besides": (
        STACK + ONE + "models: [{model: a}]\n",
        "2:1: slices: `slices` and `models` stand beside each other, expected one of the two",
    ),
    "two sources for passthrough": (
        STACK + TWO, "4:3: slices[0].sources: passthrough takes 1 model(s), found 2: leave 1 out",
    ),
    "one source for slerp": (
        SLERP + sources("[0, 2]"),
        "6:3: slices[0].sources: slerp takes 2 model(s), the base model among them, found 1: "
        "add 1",
    ),
    "three models for slerp": (
        SLERP.replace("base_model: a", "base_model: c") + TWO,
        "6:3: slices[0].sources: slerp takes 2 model(s), the base model among them, found 3: "
        "leave 1 out, or take multislerp or karcher",
    ),
    "a model twice in a slice": (
        "merge_method: linear\nslices:\n" + ONE + "  - {model: a, layer_range: [2, 4]}\n",
        "5:13: slices[0].sources[1].model: 'a' stands twice, first as sources[0]",
    ),
    "unequal ranges": (
        "merge_method: linear\nslices:\n" + sources("[0, 2]", "[1, 4]"),
        "4:3: slices[0].sources: found ranges of 2, 3 layers, expected the same number of all "
        "sources",
    ),
    "a base that is in no source, beside shifted ranges": (
        TIES + sources("[0, 2]", "[1, 3]"),
        "5:3: slices[0].sources: the base model 'base' is not among the sources, whose ranges "
        "differ: list it with its own `layer_range`",
    ),
    "no base": (
        TIES.replace("base_model: base\n", "") + ONE,
        "1:1: `base_model` is missing: ties works on differences from a base model",
    ),
    "different bases": (
        "merge_method: slerp\nslices:\n" + TWO + "  base_model: a\n" + TWO + "  base_model: b\n",
        "10:15: slices[1].base_model: found 'b', but another base model is 'a': all slices have "
        "the same one here",
    ),
    "a base of one slice": (
        "merge_method: slerp\nslices:\n" + TWO + "  base_model: a\n" + TWO,
        "7:3: slices[1]: has no `base_model`, as other slices have: write it at the top, for all "
        "slices",
    ),
    "an unknown parameter of a slice": (
        STACK + ONE + "  parameters: {scal: 2}\n",
        "5:16: slices[0].parameters.scal: passthrough has no parameter 'scal'. Did you mean "
        "'scale'?",
    ),
    "an unknown parameter of a source": (
        STACK + "- sources:\n  - model: a\n    layer_range: [0, 2]\n    parameters: {t: 2}\n",
        "6:18: slices[0].sources[0].parameters.t: passthrough has no parameter 't'. Valid: scale.",
    ),
    "a key of a model": (
        STACK + "- sources:\n  - {model: a, layer_range: [0, 2], missing: base}\n",
        "4:37: slices[0].sources[0].missing: unknown key 'missing'. Valid: layer_range, model, "
        "parameters.",
    ),
    "parameters of the base": (
        TIES + "- sources:\n  - {model: base, layer_range: [0, 2]}\n  - {model: a, layer_range: "
        "[0, 2], missing: base}\n",
        "6:37: slices[0].sources[1].missing: unknown key 'missing'. Valid: layer_range, model, "
        "parameters.",
    ),
    "a stack without slices": (
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nstack: text\n",
        "3:1: stack: `stack` names the layers that `slices` are of; without them it has no effect",
    ),
    "a file's whole content wrong": (
        STACK + sources("[5, 2]") + sources("[-1, 2]"),
        "6:29: slices[1].sources[0].layer_range: found [-1, 2]: layers are counted from 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_TEXT)
def test_a_mistake_in_slices_is_told_with_its_place(name):
    text, said = OF_THE_TEXT[name]
    with pytest.raises(outliermerge.SpecError) as caught:
        parse_spec(text, file="merge.yaml")
    lines = str(caught.value).splitlines()
    assert any(line.removeprefix("merge.yaml:") == said for line in lines), lines


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "a": save("llama", folder / "llama", num_layers=3, num_models=1)["base"],
        "b": save("llama", folder / "deeper", num_layers=4, num_models=1)["m0"],
        "towers": save("llava", folder / "llava", num_layers=3, num_models=0)["base"],
        "pair": save("bart-decoder", folder / "bart", num_layers=3, num_models=0)["base"],
        "wide": save("qwen2_moe", folder / "moe", num_layers=3, num_models=0)["base"],
    }


def of(model: str) -> str:
    return f"- sources:\n  - {{model: MODELS/{model}, layer_range: [0, 2]}}\n"


OF_THE_MODELS = {
    "a range beyond the model": (
        STACK + of("a") + of("a").replace("[0, 2]", "[1, 4]"),
        "slices[1].sources[0].layer_range: found [1, 4], but MODELS/a has 3 layers "
        "(model.layers.*): end at 3",
    ),
    "a base that is too short": (
        "merge_method: task_arithmetic\nbase_model: MODELS/a\nslices:\n"
        + of("b").replace("[0, 2]", "[2, 4]"),
        "slices[0]: takes the same layers of the base model, but MODELS/a has 3 layers "
        "(model.layers.*): list it with its own range",
    ),
    "several stacks": (
        STACK + of("towers"),
        "slices: MODELS/towers has several stacks of layers, and `stack` does not say which one is "
        "sliced: text (3 layers, language_model.model.layers.*), vision (2 layers, ",
    ),
    "an unknown stack": (
        STACK + of("pair") + "stack: text\n",
        "stack: found 'text', expected one of the stacks of MODELS/pair: decoder (3 layers, "
        "model.decoder.layers.*), encoder (2 layers, model.encoder.layers.*)",
    ),
    "a model of another architecture": (
        STACK + of("a") + of("pair"),
        "slices[1].sources[0].layer_range: found [0, 2], but MODELS/pair has 0 layers "
        "(model.layers.*)",
    ),
    "layers of another kind": (
        "merge_method: linear\nslices:\n" + of("a").replace("2]}", "2]}\n  - {model: MODELS/wide, "
        "layer_range: [0, 2]}"),
        "model.layers.0.mlp.gate_proj.weight: not in MODELS/wide",
    ),
    "one model under two names": (
        "merge_method: linear\nslices:\n" + of("a").replace("2]}", "2]}\n  - {model: MODELS/./a, "
        "layer_range: [1, 3]}"),
        "stands twice, first as sources[0]",
    ),
    "a filter of no tensor": (
        STACK + of("a") + "  parameters: {scale: [{filter: self_atn, value: 2}, {value: 1}]}\n",
        "slices[0].parameters.scale[0].filter: the filter 'self_atn' is in no merged tensor's "
        "name. Did you mean 'self_attn'?",
    ),
    "models measured together, but other ones in each slice": (
        "merge_method: ties\nbase_model: MODELS/a\nparameters: {trim: model, density: 0.5}\n"
        "slices:\n" + of("b") + of("wide").replace("wide", "b+x").replace("b+x", "b")
        .replace("- sources:\n", "- sources:\n  - {model: MODELS/m0, layer_range: [0, 2]}\n"),
        "model.embed_tokens.weight is not merged of all models in the same order, and ties "
        "measures whole models together: list the same sources in every slice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_MODELS)
def test_what_does_not_fit_the_models_is_told(name, models, tmp_path):
    (tmp_path / "m0").symlink_to(models["b"].parent / "base")
    for model, folder in models.items():
        (tmp_path / model).symlink_to(folder)
    text, said = OF_THE_MODELS[name]
    (tmp_path / "merge.yaml").write_text(text.replace("MODELS", str(tmp_path)))
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(tmp_path / "merge.yaml")
    assert said in str(caught.value).replace(str(tmp_path), "MODELS"), str(caught.value)
