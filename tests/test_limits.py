"""Limits of specs and tokenizers: each is told, and what published models have is below it."""

from __future__ import annotations

import json
import os

import pytest
from hostile.merges import chain, doubled, sliced
from hostile.texts import TOKENIZERS, expert, normalized, replace
from kinds import save_models, tokenizer_json

import outliermerge
from outliermerge.api import plan_moe
from outliermerge.checkpoint.tokens import load_tokens
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.execution.routers import add_routers
from outliermerge.spec.check import load_spec
from outliermerge.spec.moe import load_moe_spec


@pytest.fixture
def models(tmp_path, monkeypatch):
    save_models(tmp_path / "models")
    monkeypatch.chdir(tmp_path / "models")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (chain(51), "a chain of more than 50 stages"),
        (chain(900), "a chain of more than 50 stages"),
        (chain(5000), "found 5,000 stages, expected at most 1,000"),
        (doubled(52), "a chain of more than 50 stages"),
    ],
)
def test_stages_that_would_take_for_ever_are_refused(make, said):
    with pytest.raises(SpecError, match=said):
        load_spec(make())


def test_more_modules_than_any_model_has_are_refused():
    module = {"merge_method": "linear", "models": [{"model": "one"}]}
    modules = {f"layers.{number}": module for number in range(1001)}
    with pytest.raises(SpecError, match=r"found 1,001 modules, expected at most 1,000"):
        load_spec({"base_model": "base", "modules": modules})


@pytest.mark.parametrize("make", [chain(50), doubled(45)])
def test_as_many_stages_as_are_allowed_are_planned_and_computed(make, models, tmp_path):
    assert outliermerge.run(make(), output=tmp_path / "out").output.is_dir()


def test_more_layers_than_any_model_has_are_refused(models):
    assert len(outliermerge.plan(sliced(*[[0, 2]] * 20)()).jobs) == 3 + 40 * 9
    with pytest.raises(SpecError, match=r"found 2002 layers in all, expected at most 2,000"):
        outliermerge.plan(sliced(*[[0, 2]] * 1001)())


def _load(tokenizer, tmp_path):
    return load_tokens({"tokenizer.json": json.dumps(tokenizer).encode()}, tmp_path)


@pytest.mark.parametrize("name", ["far ids", "ids far apart", "ids of two billion"])
def test_ids_that_no_vocabulary_has_are_refused(name, tmp_path):
    with pytest.raises(OutlierMergeError, match=r"expected ids below 2,097,152"):
        _load(TOKENIZERS[name](), tmp_path)


@pytest.mark.parametrize("name", ["doubling", "a long replacement", "prefixes"])
def test_normalizers_that_make_texts_too_long_are_refused(name, tmp_path):
    with pytest.raises(OutlierMergeError, match=r"its normalizer makes texts .* times as long"):
        _load(TOKENIZERS[name](), tmp_path)


def test_a_normalizer_whose_name_is_hidden_is_refused(tmp_path):
    text = json.dumps(TOKENIZERS["doubling"]()).replace('"Replace"', '"\\u0052eplace"')
    with pytest.raises(OutlierMergeError, match=r"times as long"):
        load_tokens({"tokenizer.json": text.encode()}, tmp_path)


def test_normalizers_of_published_models_are_taken(tmp_path):
    llama = [{"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")]
    albert = [replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "Lowercase"}]
    t5 = [{"type": "Strip", "strip_left": False, "strip_right": True},
          replace({"Regex": " {2,}"}, "\u2581")]  # fmt: skip
    for each in (llama, albert, t5):
        assert "<x>" in _load(normalized(*each), tmp_path).values()
    assert len(_load(tokenizer_json(), tmp_path)) == 8


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["code " * 8193], "has 8,194 tokens, expected at most 8,192"),
        ([*(f"code {i}" for i in range(100)), "code " * 8000], "when they are filled up"),
    ],
)
def test_prompts_that_take_too_much_memory_are_refused(prompts, said, models):
    mixture = plan_moe(load_moe_spec(expert(positive_prompts=prompts)() | {"gate_mode": "hidden"}))
    with pytest.raises(OutlierMergeError, match=said):
        add_routers(mixture)
