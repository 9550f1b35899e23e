"""The model card: how the model is used, and how far it has moved from its base."""

from __future__ import annotations

import ast
import json
import math

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.output.card import usage

TOKENIZER, PROCESSOR = "tokenizer.json", "processor_config.json"


@pytest.mark.parametrize(
    ("config", "sidecars", "wanted"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, [TOKENIZER], "AutoModelForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, [TOKENIZER], "AutoModelForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, [], "AutoModelForCausalLM"),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            [PROCESSOR],
            "AutoProcessor",
        ),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            [],
            "AutoModelForImageTextToText",
        ),
        ({"architectures": ["T5ForConditionalGeneration"]}, [TOKENIZER], "AutoModelForSeq2SeqLM"),
        (
            {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"},
            [TOKENIZER],
            "AutoModelForSpeechSeq2Seq",
        ),
        ({"architectures": ["BertForMaskedLM"]}, [TOKENIZER], "AutoModelForMaskedLM"),
        ({"architectures": ["BertModel"]}, ["vocab.txt"], "AutoModel"),
        ({"architectures": ["BertModel"]}, [], "AutoModel"),
        ({"architectures": ["ViTForImageClassification"]}, [], "AutoModelForImageClassification"),
        ({"model_type": "bert"}, [TOKENIZER], "AutoModel"),
        (
            {"architectures": ["XForCausalLM"], "auto_map": {}},
            [TOKENIZER],
            "trust_remote_code=True",
        ),
        ({"_class_name": "UNet2DConditionModel"}, [], "from diffusers import UNet2DConditionModel"),
        (None, ["model_index.json"], "DiffusionPipeline"),
        (None, ["modules.json"], "SentenceTransformer"),
        (None, ["adapter_config.json"], "AutoPeftModel"),
    ],
)
def test_the_card_says_how_a_model_of_its_kind_is_loaded(config, sidecars, wanted):
    contents = {} if config is None else {"config.json": json.dumps(config).encode()}
    snippet = usage(contents, {*sidecars, *contents})
    assert wanted in snippet
    ast.parse(snippet)


@pytest.mark.parametrize(
    "config",
    [b"{}", b"[]", b"no json", b'{"architectures": [3]}', b'{"_class_name": "x; import os"}'],
)
def test_what_is_not_known_is_left_out(config):
    assert usage({"config.json": config}, {"config.json"}) == ""
    assert usage({}, set()) == ""


@pytest.fixture
def models(tmp_path):
    torch.manual_seed(0)
    base = {
        "layers.0.w.weight": torch.randn(300, 700),
        "layers.1.w.weight": 3 * torch.randn(300, 500).bfloat16(),
        "half": torch.randn(5000).half(),
        "double": torch.randn(333).double(),
    }
    found = {"base": base}
    for name, scale in (("a", 0.1), ("b", 0.2)):
        found[name] = {
            key: (value + scale * torch.randn(value.shape)).to(value.dtype)
            for key, value in base.items()
        }
    for name, tensors in found.items():
        save_tensors(tmp_path / name, tensors)
    return found


def _spec(tmp_path, method):
    return {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "a")}, {"model": str(tmp_path / "b")}],
    }


def _flat(tensors, base=None):
    return torch.cat(
        [
            (tensors[name].double() - (base[name].double() if base else 0)).flatten()
            for name in sorted(tensors)
        ]
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "min_sigma"])
def test_the_drift_is_near_that_of_all_elements(models, tmp_path, method):
    result = outliermerge.run(_spec(tmp_path, method), output=tmp_path / "out")
    drift = result.manifest["drift"]

    from safetensors.torch import load_file

    moved = _flat(load_file(tmp_path / "out" / "model.safetensors"), models["base"])
    tasks = [_flat(models[name], models["base"]) for name in "ab"]
    size = float(moved.norm() / _flat(models["base"]).norm())
    assert drift["relative_size"] == pytest.approx(size, rel=0.05)
    for name, task in zip("ab", tasks, strict=True):
        cosine = float(moved @ task / moved.norm() / task.norm())
        assert drift["cosines"][str(tmp_path / name)] == pytest.approx(cosine, abs=0.05)
    length = float(moved.norm() / (tasks[0].norm() + tasks[1].norm()) * 2)
    assert drift["length"] == pytest.approx(length, rel=0.05)
    assert drift["num_sampled"] < drift["num_elements"] == len(moved)
    assert ("outliers_kept" in drift) == (method == "min_sigma")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"the change is {100 * drift['relative_size']:.2g}% of the base" in card


def test_the_share_of_outliers_is_that_of_all_elements(models, tmp_path):
    result = outliermerge.run(_spec(tmp_path, "min_sigma"), output=tmp_path / "out")
    tensors = result.manifest["tensors"].values()
    counts = [sum(e["statistics"]["outliers"][model] for e in tensors) for model in (0, 1)]
    num = sum(math.prod(entry["shape"]) for entry in tensors)
    shares = list(result.manifest["drift"]["outliers_kept"].values())
    assert shares == [float(f"{count / num:.3g}") for count in counts]


def test_small_models_are_measured_whole(tmp_path):
    for number, name in enumerate(("base", "a", "b")):
        save_tensors(tmp_path / name, {"w": torch.full((4, 8), float(1 + number))})
    result = outliermerge.run(_spec(tmp_path, "task_arithmetic"), output=tmp_path / "out")
    assert result.manifest["drift"] == {
        "relative_size": 3.0,
        "cosines": {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0},
        "length": 2.0,
        "num_sampled": 32,
        "num_elements": 32,
    }
    assert "on all merged elements" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_without_task_vectors_no_drift_is_told(models, tmp_path, method):
    spec = _spec(tmp_path, method)
    spec["models"] = spec["models"][: 1 if method == "passthrough" else 2]
    result = outliermerge.run(spec, output=tmp_path / "out")
    assert "drift" not in result.manifest
    assert "Drift" not in (tmp_path / "out" / "README.md").read_text()
