"""mergekit's files, strictly and leniently read; mergekit 0.1.5 itself says what they mean."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import family, load_folder
from torch import Tensor

import outliermerge
from outliermerge.cli.main import command_first, main
from outliermerge.errors import WARNING

TIES = """\
merge_method: ties
base_model: DIR/base
models:
  - model: DIR/model0
    parameters: {weight: 0.5, density: 0.6}
  - model: DIR/model1
    parameters: {weight: 0.3, density: 0.4}
"""
LINEAR = """\
merge_method: linear
models:
  - model: DIR/model0
  - model: DIR/model1
parameters: {weight: 1}
"""
SLERP = """\
merge_method: slerp
base_model: DIR/model0
models:
  - model: DIR/model1
"""
# What mergekit passes over in silence: the file, and the warning after its name.
PASSED_OVER = {
    "a misspelt key at the top": (
        TIES + "dype: float16\n",
        [":8:1: dype: unknown key 'dype'. Did you mean 'dtype'?"],
    ),
    "a parameter at the top": (
        TIES + "normalize: false\n",
        [":8:1: normalize: unknown key 'normalize'. It is a parameter of ties: put it under"],
    ),
    "a misspelt parameter at the top": (
        TIES + "nomalize: false\n",
        ["nomalize: unknown key 'nomalize'. Did you mean the parameter 'normalize'? Put it under"],
    ),
    "a misspelt parameter": (
        TIES + "parameters: {nomalize: false}\n",
        [":8:14: parameters.nomalize: ties has no parameter 'nomalize'. Did you mean 'normalize'?"],
    ),
    "a parameter in another case": (
        TIES + "parameters: {Normalize: false}\n",
        ["Did you mean 'normalize'?"],
    ),
    "a parameter that the method has not": (
        SLERP + "parameters: {t: 0.3, normalize: true}\n",
        [":5:22: parameters.normalize: slerp has no parameter 'normalize'. Valid: t."],
    ),
    "filters of an unknown parameter": (
        TIES + "parameters: {smooth: [{filter: mlp, value: 1}, {value: 0}]}\n",
        ["no parameter 'smooth'"],
    ),
    "a misspelt parameter of a model": (
        TIES.replace("density: 0.4", "dentisy: 0.4"),
        ["models[1].parameters.dentisy: ties has no parameter 'dentisy'. Did you mean 'density'?"],
    ),
    "a parameter of the whole merge under a model": (
        TIES.replace("density: 0.4", "normalize: false"),
        ["models[1].parameters.normalize: 'normalize' is of the whole merge"],
    ),
    "a parameter beside the model": (
        TIES.replace("    parameters: {weight: 0.3, density: 0.4}", "    density: 0.4")
        + "parameters: {weight: 1}\n",
        [":7:5: models[1].density: unknown key 'density'. It is a parameter of ties: put it under"],
    ),
    "a weight beside a model, and one for all": (
        LINEAR.replace("model1", "model1\n    weight: 3"),
        [":5:5: models[1].weight: unknown key 'weight'."],
    ),
    "an unknown key beside the model": (
        TIES + "    description: mine\n",
        ["models[1].description: unknown key"],
    ),
    "a filter that matches nothing": (
        TIES + "parameters: {lambda: [{filter: mpl, value: 2}, {value: 0.7}]}\n",
        ["lambda[0].filter: the filter 'mpl' is in no merged tensor's name. Did you mean 'mlp'?"],
    ),
    "only a filter that matches nothing": (
        TIES + "parameters: {lambda: {filter: layernorms, value: 2}}\n",
        ["parameters.lambda.filter: the filter 'layernorms' is in no"],
    ),
    "a pattern for a filter": (
        TIES + "parameters: {lambda: [{filter: '*.mlp.*', value: 2}]}\n",
        ["write '.mlp.'"],
    ),
    "a filter that is never reached": (
        TIES
        + "parameters: {lambda: [{filter: self_attn, value: 2}, {filter: q_proj, value: 3}]}\n",
        ["lambda[1].filter: the filter 'q_proj' is never reached"],
    ),
    "an entry after one for all": (
        TIES + "parameters: {lambda: [{value: 0.5}, {value: 3}]}\n",
        ["lambda[1].value: this entry is never reached"],
    ),
    "a filter of one model": (
        TIES.replace("density: 0.4", "density: [{filter: none, value: 0.1}, {value: 0.9}]"),
        ["models[1].parameters.density[0].filter: the filter 'none'"],
    ),
    "an unknown key of a filter": (
        TIES + "parameters: {lambda: [{fliter: mlp, value: 2}]}\n",
        ["lambda[0].fliter: unknown key 'fliter'. Valid: filter, value."],
    ),
    "a key that stands twice": (
        LINEAR + "parameters: {weight: 2, normalize: false}\n",
        [":6:1: the key 'parameters' stands twice"],
    ),
    "several": (
        TIES + "dype: float16\nauthor: me\n"
        "parameters: {smooth: 1, lambda: [{filter: mpl, value: 2}, {value: 0.7}]}\n",
        ["dype: unknown", "author: unknown", "ties has no parameter 'smooth'", "filter 'mpl'"],
    ),
}
# What both readings take, with a note or without one.
TOLERATED = {
    "the base among the models": (TIES + "  - model: DIR/base\n", ""),
    "the base among the models, with parameters": (
        TIES + "  - model: DIR/base\n    parameters: {weight: 0.9, density: 0.1}\n",
        "parameters of the base model",
    ),
    "slerp's base with parameters": (
        SLERP + "  - model: DIR/model0\n    parameters: {weight: 1}\nparameters: {t: 0.4}\n",
        "parameters of the base model",
    ),
    "numbers for booleans": (
        TIES + "parameters: {normalize: 0.0, int8_mask: 1.0, rescale: 1}\n",
        "int8_mask",
    ),
    "parameters without a value": (TIES + "  - model: DIR/model2\n    parameters:\n"
                                   "parameters: {weight: 0.2}\n", ""),
    "no parameters at the top": (TIES + "parameters:\n", ""),
    "a gradient of one value": (TIES + "parameters: {lambda: [0.6]}\n", ""),
    "numbers as text": (TIES + "parameters: {lambda: 7e-1}\n", ""),
    "a label": (TIES + "name: mine\n", "name (a label)"),
    "an empty label": (TIES + "name:\n", "name (a label)"),
    "null for a key": (TIES + "out_dtype:\ntokenizer_source: null\n", ""),
    "a scale by model and filter": (
        "merge_method: passthrough\nmodels:\n  - model: DIR/model0\n    parameters:\n"
        "      scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: [0, 2]}, "
        "{value: 1}]\n",
        "",
    ),
    "a lambda below 0": (TIES + "parameters: {lambda: -0.5}\n", ""),
}  # fmt: skip
# What mergekit refuses, and what our message says; leniently, too.
REFUSED = {
    "a weight beside each model, and no other": (
        "merge_method: task_arithmetic\nbase_model: DIR/base\nmodels:\n"
        "  - model: DIR/model0\n    weight: 1.0\n  - model: DIR/model1\n    weight: 0.8\n",
        "models[0].weight: unknown key 'weight'. It is a parameter of task_arithmetic",
    ),
    "t at the top": (SLERP + "t: 0.4\n", "t: unknown key 't'. It is a parameter of slerp"),
    "a misspelt weight": (
        LINEAR.replace("weight", "wieght"),
        "linear has no parameter 'wieght'. Did you mean 'weight'?",
    ),
    "an unknown parameter with parameters in it": (
        TIES.replace("density: 0.4", "dare: {drop_rate: 0.9}"),
        "ties has no parameter 'dare'",
    ),
    "a misspelt method key": (
        TIES.replace("merge_method", "merge_metod"), "Did you mean 'merge_method'?"
    ),
    "misspelt models": (TIES.replace("models:", "model:"), "Did you mean 'models'?"),
    "a misspelt value of a filter": (
        TIES + "parameters: {lambda: [{filter: mlp, vlaue: 2}]}\n", "unknown key 'vlaue'"
    ),
    "slerp without a base": (LINEAR.replace("linear", "slerp"), "`base_model` is missing: slerp"),
    "slerp of a third base": (
        SLERP + "  - model: DIR/model2\nparameters: {t: 0.5}\n",
        "slerp takes 2 model(s), the base model among them, found 3: leave 1 out",
    ),
    "a model twice": (TIES + "  - model: DIR/model0\n", "stands twice, first as models[0]"),
    "an unknown method": (TIES.replace("ties", "SWCM"), "unknown merge method 'SWCM'"),
    "a text for a number": (TIES.replace("0.4", "much"), "expected a number"),
    "parameters that are no mapping": (TIES + "parameters: [0.5]\n", "expected a mapping"),
    "density and epsilon too far": (
        TIES.replace("ties", "della").replace("0.6", "0.9"), "expected between 0 and 1"
    ),
}  # fmt: skip
Peer = Callable[[str, Path], dict[str, Tensor]]


@pytest.fixture(scope="module")
def by_mergekit() -> Peer:
    with warnings.catch_warnings():
        # Its lazy_unpickle.py names a private module of numpy that has been renamed.
        warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

    def merge(text: str, folder: Path) -> dict[str, Tensor]:
        options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
        # It passes over our `compat`.
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(folder), options)
        return load_folder(folder)

    return merge


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base, others = family("llama", folder, num_models=3)
    base.rename(folder / "base")
    for number, other in enumerate(others):
        other.rename(folder / f"model{number}")
    return folder


def written(text: str, models: Path, folder: Path) -> Path:
    file = folder / "merge.yaml"
    file.write_text(text.replace("DIR", str(models)))
    return file


def warnings_of(plan: outliermerge.Plan) -> list[str]:
    return [note for note in plan.notes if note.startswith(WARNING)]


def assert_equal_outputs(ours: Path, theirs: dict[str, Tensor]) -> None:
    found = load_folder(ours)
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("case", PASSED_OVER)
def test_what_mergekit_passes_over_is_an_error_or_a_warning(case, models, by_mergekit, tmp_path):
    text, said = PASSED_OVER[case]
    file = written(text, models, tmp_path)
    with pytest.raises(outliermerge.SpecError) as refused:
        outliermerge.plan(file)
    plan = outliermerge.plan(file, lenient=True)
    (warning,) = warnings_of(plan)
    rows = warning.splitlines()[1:]
    assert len(rows) == len(said)
    for part, row in zip(said, rows, strict=True):
        assert row.startswith(f"  {file}:")
        assert part in row
    assert str(refused.value).splitlines()[0] == rows[0].strip()
    assert pickle.loads(pickle.dumps(plan)).notes == plan.notes
    output = outliermerge.run(plan, output=tmp_path / "ours").output
    assert_equal_outputs(output, by_mergekit(file.read_text(), tmp_path / "theirs"))


@pytest.mark.parametrize("case", PASSED_OVER)
@pytest.mark.sampled(2)
def test_the_recipe_of_a_lenient_merge_runs_strictly_and_gives_the_same_bytes(
    case, models, tmp_path
):
    file = written(PASSED_OVER[case][0], models, tmp_path)
    first = outliermerge.run(file, lenient=True, output=tmp_path / "first").output
    for again in ("recipe.yaml", "outliermerge.json"):
        plan = outliermerge.plan(first / again)
        assert not warnings_of(plan)
        output = outliermerge.run(plan, output=tmp_path / again.replace(".", "-")).output
        old, new = (load_folder(folder) for folder in (first, output))
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("case", TOLERATED)
def test_both_readings_take_it_as_mergekit_does(case, models, by_mergekit, tmp_path):
    text, note = TOLERATED[case]
    file = written(text, models, tmp_path)
    strict, lenient = (outliermerge.plan(file, lenient=lenient) for lenient in (False, True))
    assert strict.notes == lenient.notes
    assert any(note in each for each in (*strict.notes, ""))
    assert not warnings_of(lenient)
    output = outliermerge.run(strict, output=tmp_path / "ours").output
    assert_equal_outputs(output, by_mergekit(file.read_text(), tmp_path / "theirs"))


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_mergekit_refuses_is_refused_in_both_readings(
    case, lenient, models, by_mergekit, tmp_path
):
    text, said = REFUSED[case]
    file = written(text, models, tmp_path)
    with pytest.raises(outliermerge.SpecError) as refused:
        outliermerge.plan(file, lenient=lenient)
    assert said in str(refused.value)
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        by_mergekit(file.read_text(), tmp_path / "theirs")


@pytest.mark.parametrize("case", ["a key of ours", "a policy's filter", "a wrong word"])
def test_mistakes_in_keys_that_only_we_know_stay_errors(case, models, tmp_path):
    wrong = {
        "a key of ours": "modifiers: [{modifier: 'a:b', paramters: {}}]\n",
        "a policy's filter": "missing: [{filter: nonesuch, value: base}]\n",
        "a wrong word": "vocabulary: unoin\n",
    }[case]
    with pytest.raises(outliermerge.SpecError):
        outliermerge.plan(written(TIES + wrong, models, tmp_path), lenient=True)


def test_linear_averages_an_outside_base_in_only_leniently(models, by_mergekit, tmp_path):
    file = written(LINEAR + "base_model: DIR/base\n", models, tmp_path)
    plan = outliermerge.plan(file, lenient=True)
    assert any("averages the base model" in note for note in plan.notes)
    output = outliermerge.run(plan, output=tmp_path / "ours").output
    theirs = by_mergekit(file.read_text(), tmp_path / "theirs")
    assert_equal_outputs(output, theirs)
    again = outliermerge.run(output / "recipe.yaml", output=tmp_path / "again").output
    assert_equal_outputs(again, theirs)
    strict = outliermerge.plan(file)
    assert any("mergekit would average it in" in note for note in strict.notes)
    without = written(LINEAR, models, tmp_path)
    expected = load_folder(outliermerge.run(without, output=tmp_path / "without").output)
    assert_equal_outputs(outliermerge.run(strict, output=tmp_path / "strict").output, expected)


@pytest.mark.parametrize(("text", "name"), [(TIES.replace("weight", "density").replace(
    "density: 0.6", "x: 1").replace("density: 0.4", "x: 1"), "weight"), (SLERP, "t")])  # fmt: skip
def test_a_parameter_that_mergekit_requires_is_named_where_it_is_not_given(
    text, name, models, tmp_path
):
    notes = outliermerge.plan(written(text, models, tmp_path), lenient=True).notes
    assert any(note.startswith(f"no `{name}` is given: ") for note in notes)


def test_commands_read_leniently_with_a_flag_and_in_mergekits_form(models, tmp_path, capsys):
    file = written(PASSED_OVER["several"][0], models, tmp_path)
    assert main(["run", str(file), str(tmp_path / "strict")]) == 2
    assert main(["plan", str(file)]) == 2
    assert not (tmp_path / "strict").exists()
    capsys.readouterr()
    assert main(["plan", str(file), "--lenient", "--no-load-check"]) == 0
    assert "warning: without effect, as mergekit passes" in capsys.readouterr().err
    for words, name in ((["run", "--lenient"], "a"), ([], "b")):
        assert main([*words, str(file), str(tmp_path / name), "--no-load-check"]) == 0
        said = capsys.readouterr().err
        assert said.count("warning: ") == 1
        assert "note: warning" not in said
        assert "Did you mean 'mlp'?" in said
    assert command_first([str(file), "out"])[:2] == ["run", "--lenient"]


def test_dicts_are_read_leniently_too(models):
    text = PASSED_OVER["several"][0].replace("DIR", str(models))
    plan = outliermerge.plan(yaml.safe_load(text), lenient=True)
    assert "spec: dype: unknown key" in warnings_of(plan)[0]
