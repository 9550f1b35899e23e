"""Configs, tokenizers and processors: whose the output has, what a merge changes in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import load_folder, save_tensors
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import outliermerge
from outliermerge.errors import OutlierMergeError, SpecError

WORDS = ["[UNK]", "red", "green", "blue", "circle", "square"]


def _tokenizer(folder: Path, added: list[str], words: list[str] = WORDS) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    decoder = {str(len(words) + n): {"content": token} for n, token in enumerate(added)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _model(folder: Path, num_rows: int, seed: int, **config) -> Path:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(0))
    tensors = {
        "model.embed_tokens.weight": embeddings
        + 0.1 * torch.randn(num_rows, 4, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 4, generator=generator),
    }
    save_tensors(folder, tensors)
    config = {"model_type": "llama", "vocab_size": num_rows, "num_hidden_layers": 1} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A base, and two models with a special token each that the base lacks."""
    for number, (name, added) in enumerate({"base": [], "a": ["<a>"], "b": ["<b>"]}.items()):
        _model(tmp_path / name, 8 + len(added), number)
        _tokenizer(tmp_path / name, added, [*WORDS, "up", "down"])
    return tmp_path


def _spec(folder: Path, **keys) -> dict:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "a")}, {"model": str(folder / "b")}],
        "parameters": {"weight": 0.5},
    } | keys


def test_a_union_has_a_row_and_a_token_for_each_added_token(three, tmp_path):
    spec = _spec(three, vocabulary="union")
    out = outliermerge.run(spec, output=tmp_path / "out").output

    merged = load_folder(out)["model.embed_tokens.weight"]
    a, b = (load_folder(three / n)["model.embed_tokens.weight"] for n in "ab")
    assert merged.shape == (10, 4)
    torch.testing.assert_close(merged[8], a[8], rtol=0, atol=1e-6)
    torch.testing.assert_close(merged[9], b[8], rtol=0, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 10
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("red <a> <b>")["input_ids"] == [1, 8, 9]
    assert tokenizer.convert_ids_to_tokens([8, 9]) == ["<a>", "<b>"]
    described = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {key: value["content"] for key, value in described.items()} == {"8": "<a>", "9": "<b>"}
    assert outliermerge.verify(out) == []


def test_the_plan_tells_which_tokens_a_union_adds(three):
    plan = outliermerge.plan(_spec(three, vocabulary="union"))
    assert plan.as_dict()["added_tokens"] == [
        {"id": 8, "token": "<a>", "from": str(three / "a")},
        {"id": 9, "token": "<b>", "from": str(three / "b")},
    ]
    assert plan.num_rows == 10
    assert "model.embed_tokens.weight" in plan.proof.resized
    assert any("2 tokens are added to the tokenizer" in note for note in plan.notes)


def test_a_tokenizer_that_has_all_tokens_is_taken_as_it_is(three, tmp_path):
    spec = _spec(three, vocabulary="union", tokenizer_source=str(three / "a"))
    spec["models"] = spec["models"][:1]
    out = outliermerge.run(spec, output=tmp_path / "out").output
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (three / "a" / name).read_bytes()


def test_a_union_cannot_add_pieces_of_a_tokenizers_model(three):
    _tokenizer(three / "a", [], [*WORDS, "up", "down", "left"])
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(_spec(three, vocabulary="union"))
    assert f"pieces of the tokenizer's own model:\n  'left' of {three / 'a'}" in str(caught.value)


def test_a_union_needs_a_tokenizer_that_can_be_extended(three):
    for name in ("base", "a", "b"):
        words = json.loads((three / name / "tokenizer.json").read_text())["model"]["vocab"]
        added = json.loads((three / name / "tokenizer.json").read_text())["added_tokens"]
        (three / name / "vocab.json").write_text(json.dumps(words))
        (three / name / "added_tokens.json").write_text(
            json.dumps({entry["content"]: entry["id"] for entry in added})
        )
    (three / "base" / "tokenizer.json").unlink()
    with pytest.raises(OutlierMergeError, match=r"which has no tokenizer\.json"):
        outliermerge.plan(_spec(three, vocabulary="union"))


def test_a_tokenizer_of_another_model_must_fit_the_rows(three):
    spec = _spec(three, vocabulary="base", tokenizer_source=str(three / "a"))
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    assert "has tokens beyond the output's 8 rows:\n  8: '<a>'" in str(caught.value)
    _tokenizer(three / "a", ["<a>"], [*WORDS, "down", "up"])
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    assert "6: 'up' in the output, 'down' in that tokenizer" in str(caught.value)


def test_each_kind_of_file_comes_from_the_model_that_the_spec_chooses(three, tmp_path):
    for name in ("base", "a", "b"):
        _model(three / name, 8, 1, max_position_embeddings={"base": 1, "a": 2, "b": 3}[name])
        _tokenizer(three / name, [], [*WORDS, "up", "down"])
        (three / name / "preprocessor_config.json").write_text(json.dumps({"from": name}))
        (three / name / "chat_template.jinja").write_text(name)
        (three / name / "generation_config.json").write_text(json.dumps({"from": name}))
    spec = _spec(
        three,
        config_source=str(three / "a"),
        processor_source=str(three / "b"),
        tokenizer_source="base",
    )
    result = outliermerge.run(spec, output=tmp_path / "out")
    chosen = {
        "config.json": "a",
        "generation_config.json": "a",
        "preprocessor_config.json": "b",
        "chat_template.jinja": "base",
        "tokenizer.json": "base",
    }
    for file, name in chosen.items():
        assert (result.output / file).read_bytes() == (three / name / file).read_bytes(), file


def test_files_that_differ_are_listed_before_the_merge(three):
    for name in ("base", "a", "b"):
        _model(three / name, 8, 1, max_position_embeddings=4096 if name == "base" else 8192)
        _tokenizer(three / name, [], [*WORDS, "up", "down"])
    (three / "a" / "chat_template.jinja").write_text("a")
    (three / "base" / "preprocessor_config.json").write_text('{"size": 336}')
    (three / "a" / "preprocessor_config.json").write_text('{\n"size": 336}')
    (three / "b" / "preprocessor_config.json").write_text('{"size": 448}')
    note = next(n for n in outliermerge.plan(_spec(three)).notes if "files differ" in n)
    base, a, b = (three / name for name in ("base", "a", "b"))
    assert f"the output has the config of {base}, tokenizer of {base}, processor of {base}" in note
    assert f"max_position_embeddings: 4096 in {base}, 8192 in {a}" in note
    assert f"chat template: in {a}, not in {base}" in note
    assert f"preprocessor_config.json: differs between {base} and {b}" in note
    assert f"preprocessor_config.json: differs between {base} and {a}" not in note


ROPE_V4 = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
ROPE_V5 = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"rope_theta": 10000.0}, {"rope_theta": 1e6}, "rope_theta: 10000.0 in DIR/base"),
        (ROPE_V4, ROPE_V5, None),
        (ROPE_V4, {"rope_theta": 500000.0}, "rope_scaling: {'rope_type': 'linear', 'factor': 2.0}"),
        ({"rope_scaling": None, "rope_theta": 1.0}, {"rope_parameters": {
            "rope_theta": 1.0, "rope_type": "default"}}, None),
        ({"model_type": "llava"}, {"image_aspect_ratio": "anyres"},
         "image_aspect_ratio: not given in DIR/base, anyres in DIR/a"),
        ({"mm_patch_merge_type": "flat"}, {"mm_patch_merge_type": "spatial_unpad"},
         "mm_patch_merge_type: flat in DIR/base, spatial_unpad in DIR/a"),
        ({"text_config": {"max_position_embeddings": 2048}}, {"max_position_embeddings": 4096},
         "max_position_embeddings: 2048 in DIR/base, 4096 in DIR/a"),
        ({"vision_feature_layer": -2}, {"mm_vision_select_layer": -2}, None),
        ({"num_experts_per_tok": 2, "architectures": ["A"]},
         {"num_experts_per_tok": 4, "architectures": ["B"], "dtype": "float16"},
         "num_experts_per_tok: 2 in DIR/base, 4 in DIR/a"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
         {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, None),
        ({"architectures": ["A"], "torch_dtype": "float16"},
         {"architectures": ["B"], "dtype": "bfloat16"}, None),
        ({"model_type": "chatglm", "rope_ratio": 1}, {"model_type": "chatglm", "rope_ratio": 50},
         "rope_ratio: 1 in DIR/base, 50 in DIR/a"),
        ({"rope_local_base_freq": 10000.0}, {"rope_local_base_freq": 50.0},
         "rope_local_base_freq: 10000.0 in DIR/base, 50.0 in DIR/a"),
        *(({key: 1}, {key: 2}, f"{told}: 1 in DIR/base, 2 in DIR/a")
          for key, told in (("rope_interleave", "rope_interleave"), ("rope_dim", "rope_dim"),
                            ("rope_pct", "partial_rotary_factor"), ("rope_new", "rope_new"))),
        ({"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e6, "long": "x" * 80}
                              for kind in ("a", "b")}},
         {"rope_parameters": {"a": {"rope_type": "default", "rope_theta": 1e6, "long": "x" * 80},
                              "b": {"rope_type": "default", "rope_theta": 1e4, "long": "x" * 80}}},
         "rope_scaling: (b (rope_theta 1000000.0)) in DIR/base, "
         "(b (rope_theta 10000.0)) in DIR/a"),
        ({"vision_config": {"image_size": 336}}, {"vision_config": {"image_size": 224}},
         "vision_config.image_size: 336 in DIR/base, 224 in DIR/a"),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False},
         "tie_word_embeddings: True in DIR/base, False in DIR/a"),
    ],
)  # fmt: skip
def test_configs_are_compared_in_any_layout(tmp_path, ours, theirs, expected):
    for name, config in (("base", ours), ("a", theirs)):
        save_tensors(tmp_path / name, {"w": torch.ones(2, 2)})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    spec = _spec(tmp_path)
    spec["models"] = spec["models"][:1]
    notes = "\n".join(outliermerge.plan(spec).notes).replace(str(tmp_path), "DIR")
    if expected is None:
        assert "files differ" not in notes
    else:
        assert expected in notes


@pytest.mark.parametrize(
    ("ours", "theirs", "what"),
    [
        ({"num_attention_heads": 4}, {"num_attention_heads": 8}, "num_attention_heads: 4 in"),
        ({"num_key_value_heads": 4}, {"num_key_value_heads": 2}, "num_key_value_heads: 4 in"),
        ({"num_hidden_layers": 4}, {"num_hidden_layers": 2}, "num_hidden_layers: 4 in"),
        (
            {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4},
            {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32},
            "head_dim: 16 (the default) in",
        ),
        *(
            ({key: 4}, {key: 2}, f"{name}: 4 in")
            for key, name in (
                ("n_heads", "num_attention_heads"),
                ("n_head", "num_attention_heads"),
                ("n_layers", "num_hidden_layers"),
                ("encoder_attention_heads", "encoder_attention_heads"),
                ("decoder_attention_heads", "decoder_attention_heads"),
                ("num_decoder_layers", "num_decoder_layers"),
                ("decoder_layers", "decoder_layers"),
            )
        ),
        (
            {"vision_config": {"num_attention_heads": 4}},
            {"vision_config": {"num_attention_heads": 2}},
            "vision_config.num_attention_heads: 4 in",
        ),
    ],
)
def test_a_merge_that_makes_no_sense_is_refused(tmp_path, ours, theirs, what):
    for name, config in (("base", ours), ("a", theirs)):
        save_tensors(tmp_path / name, {"w": torch.ones(2, 2)})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    spec = _spec(tmp_path)
    spec["models"] = spec["models"][:1]
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    assert "their weights do not mean the same" in str(caught.value)
    assert what in str(caught.value)


def test_a_source_that_is_no_model_of_the_spec_is_refused(three):
    for key in ("config_source", "tokenizer_source", "processor_source"):
        with pytest.raises(SpecError, match=f"{key}: 'basee' is none of the models.*Did you mean"):
            outliermerge.plan(_spec(three, **{key: "basee"}))


def test_more_layers_than_the_config_has_are_refused(tmp_path):
    layer = "model.layers.{}.mlp.up_proj.weight"
    save_tensors(tmp_path / "base", {layer.format(0): torch.ones(2, 2)})
    save_tensors(tmp_path / "a", {layer.format(n): torch.ones(2, 2) for n in range(2)})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"num_hidden_layers": 1}))
    (tmp_path / "a" / "config.json").write_text("{}")
    spec = _spec(tmp_path, extra="copy")
    spec["models"] = spec["models"][:1]
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    assert "model.layers.: 2 layers, where the reference has 1 and the config says 1" in str(
        caught.value
    )


def test_a_config_that_does_not_describe_its_tensors_is_doubted(tmp_path):
    for name in ("base", "a"):
        save_tensors(tmp_path / name, {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)})
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    spec = _spec(tmp_path)
    spec["models"] = spec["models"][:1]
    notes = outliermerge.plan(spec).notes
    assert "the config says num_hidden_layers 3, but the tensors have 1 in model.layers.*" in notes


@pytest.mark.parametrize("said", [{"dtype": "bfloat16"}, {"torch_dtype": "float16"}])
@pytest.mark.parametrize("nested", [False, True])
def test_the_config_of_another_model_says_the_dtype_that_is_stored(tmp_path, said, nested):
    for name in ("base", "a"):
        save_tensors(tmp_path / name, {"w": torch.ones(2, 2)})
        config = {"text_config": said} if nested else said
        written = config if name == "a" else {"dtype": "float32"}
        (tmp_path / name / "config.json").write_text(json.dumps(written))
    spec = _spec(tmp_path, config_source=str(tmp_path / "a"))
    spec["models"] = spec["models"][:1]
    outliermerge.run(spec, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["text_config"] if nested else config) == dict.fromkeys(said, "float32")
