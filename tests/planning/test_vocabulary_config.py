"""A number of rows in configs of any nesting, where a loader looks for it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from checkpoints import load_folder

import outliermerge
from outliermerge.planning import vocabulary_config
from outliermerge.planning.vocabulary_config import vocabulary_sizes, with_vocab_size


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vocab_size": 9}, {"vocab_size": 12}),
        ({"vocab_size": 12}, {"vocab_size": 12}),
        ({}, {"vocab_size": 12}),
        ({"padded_vocab_size": 9, "vocab_size": 9}, {"padded_vocab_size": 12, "vocab_size": 12}),
        (
            {"text_config": {"vocab_size": 9}, "vocab_size": 9},
            {"text_config": {"vocab_size": 12}, "vocab_size": 12},
        ),
        (
            {"text_config": {"vocab_size": 9}, "vocab_size": 7},
            {"text_config": {"vocab_size": 12}, "vocab_size": 7},
        ),
        (
            {"text_config": {"hidden_size": 1}, "vocab_size": 9},
            {"text_config": {"hidden_size": 1, "vocab_size": 12}, "vocab_size": 12},
        ),
        (
            {"thinker_config": {"text_config": {}, "audio_config": {"vocab_size": 5}}},
            {
                "thinker_config": {
                    "text_config": {"vocab_size": 12},
                    "audio_config": {"vocab_size": 5},
                }
            },
        ),
        (
            {"llm_config": {"vocab_size": 9}, "qformer_config": {"vocab_size": 9}},
            {"llm_config": {"vocab_size": 12}, "qformer_config": {"vocab_size": 9}},
        ),
        ({"thinker": {"decoder": {"vocab_size": 9}}}, {"thinker": {"decoder": {"vocab_size": 12}}}),
    ],
)
def test_rows_are_written_at_the_language_models_level(config, expected):
    before = json.dumps(config)
    assert with_vocab_size(config, 12) == expected
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    ("config", "num_rows", "expected"),
    [
        ({"model_type": "llama"}, 32000, {}),
        ({"model_type": "llama"}, 32008, {"vocab_size": 32008}),
        ({"model_type": "qwen2"}, 32000, {"vocab_size": 32000}),
        ({"model_type": "llava"}, 32000, {}),
        ({"model_type": "llava"}, 32008, {"text_config": {"vocab_size": 32008}}),
        ({"model_type": "llava", "text_config": {"model_type": "qwen2"}}, 151936, {}),
    ],
)
def test_a_silent_config_has_the_default_of_its_type(config, num_rows, expected):
    changed = with_vocab_size(config, num_rows)
    assert changed == {**config, **expected}
    filled = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(changed)
    assert filled.get_text_config().vocab_size == num_rows


def test_without_transformers_a_silent_config_is_told_the_rows(monkeypatch):
    monkeypatch.setattr(vocabulary_config, "effective_config", lambda _: None)
    config = {"model_type": "llava", "text_config": {"hidden_size": 4}}
    assert with_vocab_size(config, 32000)["text_config"] == {"hidden_size": 4, "vocab_size": 32000}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vocab_size": 9}, (9, set())),
        ({"text_config": {"vocab_size": 9}, "vocab_size": 7}, (9, set())),
        ({"text_config": {"vocab_size": 9}, "q_former": {"vocab_size": 8}}, (9, {8})),
        ({"thinker": {"decoder": {"vocab_size": 9}}}, (9, set())),
        ({"encoder": {"vocab_size": 9}, "decoder": {"vocab_size": 8}}, (None, {8, 9})),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama"}, "b": {"vocab_size": 8}},
            (32000, {8}),
        ),
        ({"text_config": {}, "b": {"vocab_size": 8}}, (None, {8})),
        ({"vocab_size": True}, (None, set())),
    ],
)
def test_other_parts_vocabularies_are_told_apart(config, expected):
    assert vocabulary_sizes(config) == expected


def llava(rows: int) -> transformers.LlavaForConditionalGeneration:
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 2}
    text = transformers.LlamaConfig(**tiny, vocab_size=rows)
    vision = transformers.CLIPVisionConfig(**tiny, image_size=8, patch_size=4, projection_dim=8)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("policy", ["base", "common", "union"])
@pytest.mark.parametrize("silent", ["base", "task", "both"])
def test_a_model_of_a_silent_config_can_be_loaded_after_its_rows_change(tmp_path, policy, silent):
    default = transformers.LlamaConfig().vocab_size
    torch.manual_seed(0)
    model = llava(default)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(default + 8, mean_resizing=False)
    model.save_pretrained(tmp_path / "task")
    for name in ("base", "task") if silent == "both" else (silent,):
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        del config["text_config"]["vocab_size"]
        path.write_text(json.dumps(config))
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "task")}],
        "vocabulary": policy,
        "config_source": str(tmp_path / silent) if silent != "both" else "base",
    }
    out = outliermerge.run(spec, output=tmp_path / "out").output
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(out)
    rows = default + 8 if policy == "union" else default
    assert loaded.get_input_embeddings().weight.shape[0] == rows
    assert {t.shape[0] for n, t in load_folder(out).items() if "embed_tokens" in n} == {rows}
