"""Files of mixtures that are wrong, and files that are no mixtures: what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import fine_tune
from moe_models import save_dense

import outliermerge
from outliermerge.cli.main import main as cli
from outliermerge.spec.moe import MoeDocument, load_moe_spec, parse_moe_spec

GOOD = """\
base_model: base
gate_mode: hidden
dtype: float32
experts:
  - source_model: one
    positive_prompts: [code]
  - source_model: two
    positive_prompts: [math]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "biased", "deep", "wide", "gelu", "mistral", "phi3", "qwen2"):
        save_dense(kind, folder / ("base" if kind == "llama" else kind))
    for seed, name in enumerate(("one", "two")):
        fine_tune(folder / "base", folder / name, seed=seed)
    (folder / "empty").mkdir()
    return folder


def changed(**more: Any) -> str:
    """Return the good file with top-level keys changed; None leaves a key out."""
    document = yaml.safe_load(GOOD) | more
    return yaml.safe_dump({k: v for k, v in document.items() if v is not None}, sort_keys=False)


# By name the text of a file, and what is said of it: the start of a line, and words in it.
WRONG: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "no experts": (changed(experts=None), [("moe.yaml:1:1:", "`experts` is missing")]),
    "an empty list": (changed(experts=[]), [("moe.yaml:4:10:", "must not be empty")]),
    "no base": (changed(base_model=None), [("moe.yaml:1:1:", "`base_model` is missing")]),
    "unknown keys": (
        GOOD.replace("gate_mode", "gatemode").replace("positive_prompts: [math]", "prompts: [x]"),
        [
            ("moe.yaml:2:1:", "unknown key 'gatemode'. Did you mean 'gate_mode'?"),
            ("moe.yaml:8:5:", "experts[1].prompts: unknown key 'prompts'"),
        ],
    ),
    "a key twice": (GOOD + "dtype: bfloat16\n", [("moe.yaml:9:1:", "'dtype' stands twice")]),
    "a wrong mode": (changed(gate_mode="hiden"), [("moe.yaml:2:12:", "found 'hiden', expected")]),
    "a wrong dtype": (changed(dtype="int8"), [("moe.yaml:3:8:", "found 'int8', expected")]),
    "no source_model": (
        GOOD.replace("source_model: two\n    ", ""), [("moe.yaml:7:5:", "is missing")]
    ),
    "a text for prompts": (
        GOOD.replace("[math]", "math"), [("moe.yaml:8:23:", "found 'math', expected a list")]
    ),
    "no prompts": (
        GOOD.replace("    positive_prompts: [math]\n", ""),
        [("moe.yaml:7:5:", "`positive_prompts` is missing: the router of gate_mode hidden")],
    ),
    "too many per token": (
        GOOD + "experts_per_token: 3\n", [("moe.yaml:9:20:", "found 3, expected at most the 2")]
    ),
    "none per token": (GOOD + "experts_per_token: 0\n", [("moe.yaml:9:20:", "1 or more")]),
    "negative noise": (
        GOOD + "    noise_scale: -1\n", [("moe.yaml:9:18:", "found -1, expected 0.0 or more")]
    ),
    "a factor that is no number": (
        GOOD + "    residual_scale: .nan\n", [("moe.yaml:9:21:", "found nan: ")]
    ),
    "infinite noise": (GOOD + "    noise_scale: .inf\n", [("moe.yaml:9:18:", "found inf: ")]),
    "an unknown architecture": (
        GOOD + "architecture: mixtrl\n", [("moe.yaml:9:15:", "Did you mean 'mixtral'?")]
    ),
    "no mapping": ("- a\n", [("moe.yaml:1:1:", "expected a mapping with `experts`")]),
    "a merge": (
        "merge_method: linear\nmodels: []\n", [("moe.yaml:1:1:", "run it with `outliermerge run`")]
    ),
}  # fmt: skip

# In the same way files whose models do not fit.
UNFIT: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "absent models": (
        GOOD.replace("one", "ones").replace("two", "./twoo"),
        [("moe.yaml:5:", "'ones'"), ("moe.yaml:7:", "'./twoo': no such file or folder")],
    ),
    "other shapes and layers": (
        GOOD.replace("one", "wide").replace("two", "deep"),
        [("moe.yaml:5:", "[64, 32], the base has [48, 32]"), ("moe.yaml:7:", "layers.3.mlp")],
    ),
    "another architecture": (
        GOOD.replace("one", "phi3"), [("moe.yaml:5:", "phi3 has model_type 'phi'")]
    ),
    "another activation": (
        GOOD.replace("one", "gelu"), [("moe.yaml:5:", "hidden_act 'gelu', the base")]
    ),
    "biases": (
        GOOD.replace("base\n", "biased\n").replace("one", "biased"),
        [("moe.yaml:1:", "biases, which mixtral has no place for")],
    ),
    "an expert with biases": (
        GOOD.replace("one", "biased"), [("moe.yaml:5:", "has biases in its MLP layers")]
    ),
    "a base of no known kind": (
        GOOD.replace("base\n", "phi3\n"), [("moe.yaml:1:", "the base is a phi model")]
    ),
    "a base without weights": (GOOD.replace("base\n", "empty\n"), [("moe.yaml:1:", "empty")]),
    "qwen without shared": (
        GOOD + "architecture: qwen\n", [("moe.yaml:9:", "exactly one shared expert, found 0")]
    ),
    "mixtral with shared": (
        GOOD + "architecture: mixtral\nshared_experts: [{source_model: one}]\n",
        [("moe.yaml:9:", "it has no shared experts")],
    ),
    "two shared": (
        GOOD + "shared_experts: [{source_model: one}, {source_model: two}]\n",
        [("moe.yaml:1:", "deepseek: it has at most one shared expert, found 2")],
    ),
    "a shared expert without prompts": (
        GOOD + "architecture: qwen\nshared_experts: [{source_model: one}]\n",
        [("moe.yaml:9:", "its shared expert has a router: give it `positive_prompts`")],
    ),
    "a shared expert with prompts": (
        GOOD
        + "architecture: deepseek\nshared_experts: [{source_model: one, positive_prompts: [a]}]\n",
        [("moe.yaml:9:", "its shared expert has no router")],
    ),
    "a qwen as mixtral": (
        GOOD.replace("base\n", "qwen2\n") + "architecture: mixtral\n",
        [("moe.yaml:9:", "it is made of llama or mistral models, the base is qwen2")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*WRONG, *UNFIT])
def test_what_is_wrong_is_told_with_its_line(name, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    text, expected = (WRONG | UNFIT)[name]
    Path("moe.yaml").write_text(text)
    assert cli(["moe", "moe.yaml", str(tmp_path / "out")]) == (2 if name in WRONG else 1)
    said = capsys.readouterr().err
    lines = said.removeprefix("error: ").splitlines()
    for start, words in expected:
        assert any(line.startswith(start) for line in lines), said
        assert words in said
    assert not (tmp_path / "out").exists()


def test_all_mistakes_are_told_at_once(models, monkeypatch):
    monkeypatch.chdir(models)
    with pytest.raises(outliermerge.SpecError) as caught:
        parse_moe_spec("gate_mode: x\ndtype: y\nexperts: [{source_model: 1, noise: 2}]\n")
    assert len(str(caught.value).splitlines()) == 5


def test_lenient_reading_passes_over_unknown_keys():
    with pytest.raises(outliermerge.SpecError, match="tokenizer"):
        parse_moe_spec(GOOD + "tokenizer: x\n")
    spec = parse_moe_spec(GOOD + "tokenizer: x\n", lenient=True)
    assert len(spec.warnings) == 1 and "tokenizer" not in spec.as_dict()
    assert parse_moe_spec("merge_method: moe\n" + GOOD).moe.gate_mode == "hidden"


@pytest.mark.parametrize("arguments", [["run"], ["plan"], ["sweep", "--set", "t=1"], []])
def test_other_commands_point_to_this_one(arguments, tmp_path, capsys):
    file = tmp_path / "moe.yaml"
    file.write_text(GOOD)
    assert cli([*arguments, str(file), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "moe.yaml:4:1: experts: a file for mergekit-moe: run it with `outliermerge moe" in said


@pytest.mark.parametrize("arguments", [["run"], ["plan"], []])
def test_a_file_for_mergekit_evolve_is_pointed_to_search(arguments, tmp_path, capsys):
    file = tmp_path / "evolve.yaml"
    file.write_text("genome:\n  models: [a, b]\n  merge_method: linear\ntasks: []\n")
    assert cli([*arguments, str(file), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "mergekit-evolve" in said and "outliermerge search" in said


def test_mergekits_forms_of_prompts_are_read():
    document = yaml.safe_load(GOOD) | {"shared_experts": None, "gate_mode": "random"}
    document["experts"][0]["positive_prompts"] = None
    spec = load_moe_spec(document)
    assert spec.moe.experts[0].positive_prompts == [] and spec.moe.shared == []
    assert MoeDocument.model_validate(spec.as_dict()) == spec.moe


def test_a_config_of_a_model_is_named_as_such(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9}'
    )
    assert cli(["run", str(file), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "a model's config.json, not a spec" in said and len(said.splitlines()) == 1
