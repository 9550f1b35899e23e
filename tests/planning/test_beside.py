"""Files beside the weights: broken ones are refused by name, each has one owner, configs are
compared by what they mean."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import save_tensors
from safetensors.torch import save_file

import outliermerge
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.planning import differences
from outliermerge.planning.differences import _shown_apart, compare_configs
from outliermerge.planning.owners import kind_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 11421896\n"

JSON_DAMAGE = {
    "pointer": (lambda data: POINTER, "a Git LFS pointer.*git lfs pull"),
    "web page": (lambda data: b"<!DOCTYPE html><html></html>", "is a web page.*Fetch it again"),
    "empty": (lambda data: b"", "is empty.*Fetch it again"),
    "blank": (lambda data: b" \n", "is empty.*Fetch it again"),
    "cut off": (lambda data: data.rstrip()[:-1], r"ends at line \d+ column \d+ .*cut off"),
    "cut off in a text": (lambda data: data[: data.index(b'"') + 2], "cut off"),
    "byte order mark": (lambda data: b"\xef\xbb\xbf" + data, "byte order mark.*UTF-8 without one"),
    "UTF-16": (lambda data: data.decode().encode("utf-16"), "is UTF-16.*Save it as UTF-8"),
    "UTF-16 unmarked": (lambda data: data.decode().encode("utf-16-le"), "is UTF-16"),
    "Latin-1": (lambda data: data[:1] + b'"\xe9": 1, ' + data[1:], r"byte 2 \(0xe9\) is no UTF-8"),
    "comment": (lambda data: data[:1] + b"\n// said\n" + data[1:], "line 2 column 1: a comment"),
    "trailing comma": (lambda data: data.rstrip()[:-1] + b",}", r"line \d+ column \d+: a comma"),
    "no object": (lambda data: b"[]", "holds a list, expected a JSON object"),
    "a key twice": (lambda data: data[:1] + b'"k": 1, "k": 2, ' + data[1:], "has the key 'k'"),
    "NaN": (lambda data: data[:1] + b'"k": NaN, ' + data[1:], "has NaN"),
    "too deep": (lambda data: data[:1] + b'"k": ' + b"[" * 10**5, "too deep"),
    "words": (lambda data: b"not found", "no JSON: line 1 column 1"),
}  # fmt: skip
TEXT_DAMAGE = {
    "pointer": (lambda data: POINTER, "a Git LFS pointer.*git lfs pull"),
    "web page": (lambda data: b"<html><body>404</body></html>", "is a web page"),
    "UTF-16": (lambda data: "héllo".encode("utf-16"), "is UTF-16"),
    "Latin-1": (lambda data: "hé".encode("latin-1"), r"byte 1 \(0xe9\) is no UTF-8"),
}

TOKENS = {"a": 0, "b": 1, "<s>": 2}
TOKENIZER_FILES = {
    "tokenizer.json": {"model": {"type": "WordLevel", "vocab": TOKENS, "unk_token": "a"}},
    "tokenizer_config.json": {"eos_token": "<s>"},
    "special_tokens_map.json": {"eos_token": "<s>"},
    "added_tokens.json": {"<s>": 2},
    "vocab.json": TOKENS,
    "chat_template.json": {"chat_template": "{{ messages }}"},
    "tekken.json": {"config": {}},
}
FILES = {
    "config.json": {"model_type": "x", "hidden_size": 4},
    "generation_config.json": {"do_sample": True},
    "preprocessor_config.json": {"size": 1},
    "processor_config.json": {"size": 1},
    "video_preprocessor_config.json": {"size": 1},
    "sentence_bert_config.json": {"max_seq_length": 8},
    "config_sentence_transformers.json": {"prompts": {}},
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
} | TOKENIZER_FILES
TEXTS = (
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "merges.txt",
    "vocab.txt",
    "qwen.tiktoken",
    "modeling_x.py",
    "tokenization_x.py",
)


def _write(path: Path, data: bytes | str | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data) if isinstance(data, dict) else data
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _model(folder: Path, number: int, files: dict[str, Any]) -> Path:
    save_tensors(folder, {"w": torch.full((4, 4), float(number))})
    for name, data in files.items():
        _write(folder / name, data)
    return folder


def _spec(folder: Path, *models: str, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in models or ("task",)],
        "parameters": {"weight": 0.5},
    } | keys


def _adapter(folder: Path, files: dict[str, Any]) -> Path:
    for name, data in files.items():
        _write(folder / name, data)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["w"]}
    _write(folder / "adapter_config.json", config)
    factors = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(4, 1)}
    tensors = {f"base_model.model.l.{name}.weight": factor for name, factor in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _refused(spec: dict[str, Any], path: Path, found: str) -> None:
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    message = str(caught.value)
    assert str(path) in message, message
    assert re.search(found, message, re.DOTALL), message


@pytest.mark.sampled(4)
@pytest.mark.parametrize("role", ["base", "task", "other"])
@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_a_broken_json_file_is_refused_by_name(damage, role, tmp_path):
    change, found = JSON_DAMAGE[damage]
    for number, name in enumerate(("base", "task", "other")):
        _model(tmp_path / name, number, FILES)
    keys = {"tokenizer_source": str(tmp_path / "other")} if role == "other" else {}
    for name, content in FILES.items():
        path = tmp_path / role / name
        _write(path, change(json.dumps(content, indent=1).encode()))
        _refused(_spec(tmp_path, "task", "other", **keys), path, found)
        _write(path, content)
    outliermerge.plan(_spec(tmp_path, "task", "other", **keys))


@pytest.mark.parametrize("role", ["base", "task"])
@pytest.mark.parametrize("damage", TEXT_DAMAGE)
def test_a_broken_text_file_is_refused_by_name(damage, role, tmp_path):
    change, found = TEXT_DAMAGE[damage]
    for number, name in enumerate(("base", "task")):
        _model(tmp_path / name, number, dict.fromkeys(TEXTS, "a b\n"))
    for name in TEXTS:
        path = tmp_path / role / name
        _write(path, change(b""))
        _refused(_spec(tmp_path), path, found)
        _write(path, "a b\n")
    outliermerge.plan(_spec(tmp_path))


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("tokenizer.model", POINTER, "git lfs pull"),
        ("tokenizer.model", b"", "is empty"),
        ("sentencepiece.bpe.model", POINTER, "git lfs pull"),
        ("spiece.model", b"<html>", "web page"),
        ("vocab.txt", b"", "is empty"),
        ("chat_template.jinja", b"\xef\xbb\xbf{{ a }}", "byte order mark"),
        ("vocab.txt", b"\xef\xbb\xbf[PAD]", "byte order mark"),
        ("tokenizer.json", b'{"a": Infinity}', "has Infinity"),
        ("modules.json", b'[{"idx": 0},]', "a comma"),
        ("LICENSE", POINTER, "git lfs pull"),
    ],
)
def test_a_file_that_its_reader_could_not_read_is_refused(name, data, found, tmp_path):
    for number, folder in enumerate(("base", "task")):
        _model(tmp_path / folder, number, {})
    _write(tmp_path / "base" / name, data)
    _refused(_spec(tmp_path), tmp_path / "base" / name, found)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_a_broken_tokenizer_of_an_adapter_is_refused(damage, name, tmp_path):
    change, found = JSON_DAMAGE[damage]
    base = _model(tmp_path / "base", 1, FILES)
    save_tensors(base, {"l.weight": torch.ones(4, 4)})
    adapter = _adapter(tmp_path / "task", TOKENIZER_FILES)
    outliermerge.plan(_spec(tmp_path))
    _write(adapter / name, change(json.dumps(TOKENIZER_FILES[name], indent=1).encode()))
    _refused(_spec(tmp_path), adapter / name, found)


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_a_broken_config_of_an_adapter_is_refused(damage, tmp_path):
    change, found = JSON_DAMAGE[damage]
    save_tensors(tmp_path / "base", {"l.weight": torch.ones(4, 4)})
    path = _adapter(tmp_path / "task", {}) / "adapter_config.json"
    path.write_bytes(change(path.read_bytes()))
    _refused(_spec(tmp_path), path, found)


@pytest.mark.parametrize("damage", [name for name in JSON_DAMAGE if name != "no object"])
def test_a_broken_index_is_refused(damage, tmp_path):
    change, found = JSON_DAMAGE[damage]
    for number, name in enumerate(("base", "task")):
        _model(tmp_path / name, number, {})
    (tmp_path / "task/model.safetensors").rename(tmp_path / "task/model-00001-of-00001.safetensors")
    path = tmp_path / "task/model.safetensors.index.json"
    content = {"metadata": {}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
    _write(path, content)
    outliermerge.plan(_spec(tmp_path))
    path.write_bytes(change(json.dumps(content).encode()))
    _refused(_spec(tmp_path), path, found)


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_a_broken_file_that_nobody_reads_does_no_harm(damage, tmp_path):
    change, _ = JSON_DAMAGE[damage]
    data = change(b'{"a": "b"}')
    base = _model(tmp_path / "base", 0, FILES)
    save_tensors(base, {"l.weight": torch.ones(4, 4)})
    _write(base / "notes/deep/er.json", data)
    # Neither a task model's results nor an adapter's config.json is used or compared.
    task = _model(tmp_path / "task", 1, FILES)
    save_tensors(task, {"l.weight": torch.zeros(4, 4)})
    _write(task / "config.json", FILES["config.json"])
    _write(base / "config.json", FILES["config.json"])
    _write(task / "all_results.json", data)
    _write(_adapter(tmp_path / "adapter", {}) / "config.json", data)
    plan = outliermerge.plan(_spec(tmp_path, "task", "adapter"))
    assert not any("files differ" in note for note in plan.notes), plan.notes


def test_a_list_in_a_file_that_is_of_no_loader_is_carried_over(tmp_path):
    # sentence-transformers' all-MiniLM-L6-v2 has such a file, of its training data.
    for number, name in enumerate(("base", "task")):
        _model(tmp_path / name, number, {"data_config.json": f'[{{"weight": {number}}}]'})
    plan = outliermerge.plan(_spec(tmp_path))
    assert "data_config.json" in [sidecar.name for sidecar in plan.sidecars]
    [note] = [note for note in plan.notes if "files differ" in note]
    assert "data_config.json: differs between" in note


def test_infinity_is_a_number_of_configs(tmp_path):
    # transformers 4 writes it so into Mamba 2's, transformers 5 with a tag.
    tagged = '{"model_type": "x", "limit": {"__float__": "Infinity"}}'
    _model(tmp_path / "base", 0, {"config.json": '{"model_type": "x", "limit": Infinity}'})
    _model(tmp_path / "task", 1, {"config.json": tagged})
    assert not any("files differ" in note for note in outliermerge.plan(_spec(tmp_path)).notes)


# Configs by what they mean. By model type and key what transformers takes where it is absent, and
# another value.
DEFAULTS = {
    ("llama", "head_dim"): (16, 32),
    ("llama", "num_key_value_heads"): (4, 2),
    ("llama", "rope_theta"): (10000.0, 500000.0),
    ("llama", "rms_norm_eps"): (1e-6, 1e-5),
    ("llama", "hidden_act"): ("silu", "gelu"),
    ("llama", "max_position_embeddings"): (2048, 4096),
    ("llama", "tie_word_embeddings"): (False, True),
    ("mistral", "sliding_window"): (4096, None),
    ("mistral", "num_key_value_heads"): (8, 4),
    ("qwen2", "head_dim"): (16, 32),
    ("qwen2", "num_key_value_heads"): (32, 4),
    ("gemma3_text", "head_dim"): (256, 16),
    ("gemma3_text", "tie_word_embeddings"): (True, False),
    ("gemma3_text", "sliding_window"): (4096, 512),
}
SENSELESS = ("head_dim", "num_key_value_heads")
STATES = ("absent", "default", "other")


def _config(model_type: str, key: str, state: str, nested: bool) -> dict[str, Any]:
    default, other = DEFAULTS[model_type, key]
    config = {"model_type": model_type, "hidden_size": 64, "num_attention_heads": 4}
    if state != "absent":
        config[key] = default if state == "default" else other
    if nested and key == "tie_word_embeddings":  # LLaVA's own, by default its text's
        tied = {key: config.pop(key)} if key in config else {}
        return {"model_type": "llava", "text_config": config} | tied
    return {"model_type": "llava", "text_config": config} if nested else config


@pytest.mark.parametrize("nested", [False, True], ids=["top", "text_config"])
@pytest.mark.parametrize(("model_type", "key"), DEFAULTS)
def test_configs_are_compared_by_what_they_mean(model_type, key, nested):
    default, other = DEFAULTS[model_type, key]
    if nested and (model_type, key) == ("gemma3_text", "tie_word_embeddings"):
        return  # LLaVA goes by its text part, whatever it says itself
    values = {"absent": default, "default": default, "other": other}
    for ours, theirs in itertools.product(STATES, STATES):
        pair = [
            (name, _config(model_type, key, state, nested))
            for name, state in (("A", ours), ("B", theirs))
        ]
        notes, problems = compare_configs(pair)
        told = problems if key in SENSELESS else notes
        assert len(notes) + len(problems) == len(told), (ours, theirs, notes, problems)
        if values[ours] == values[theirs]:
            assert told == [], (ours, theirs)
        else:
            assert [line.partition(":")[0] for line in told] == [key], (ours, theirs)
            for state, name in ((ours, "A"), (theirs, "B")):
                value = "not given" if values[state] is None else values[state]
                said = " (the default)" if state == "absent" else ""
                assert f"{value}{said} in {name}" in told[0]


@pytest.mark.parametrize("key", ["head_dim", "sliding_window", "rope_theta", "rms_norm_eps"])
def test_an_absent_key_whose_default_is_unknown_is_named_and_not_refused(key):
    said, silent = {"model_type": "no such type", "a": 1, key: 8}, {"model_type": "no such type"}
    assert compare_configs([("A", said), ("B", silent | {"a": 1})]) == (
        [f"A says {key} 8; B does not say"],
        [],
    )
    assert compare_configs([("A", silent), ("B", said)])[0] == [
        f"B says {key} 8, a 1; A does not say"
        if key in SENSELESS
        else f"B says a 1, {key} 8; A does not say"
    ]


def test_many_unknown_defaults_are_one_line():
    said = {f"k{n}": n for n in range(9)} | {"head_dim": 8}
    [line] = compare_configs([("A", said | {"b": 1}), ("B", {"b": 1})])[0]
    assert line == "A says head_dim 8, k0 0, k1 1, k2 2, k3 3, k4 4 and 4 more; B does not say"


def test_defaults_are_not_asked_for_where_both_configs_say_all(monkeypatch):
    def ask(config):
        raise AssertionError("it takes seconds")

    monkeypatch.setattr(differences, "effective_config", ask)
    config = {"model_type": "llama", "head_dim": 8, "rope_scaling": None, "vision_config": {"a": 1}}
    notes, problems = compare_configs([("A", config), ("B", config | {"head_dim": 4})])
    assert (notes, problems) == ([], ["head_dim: 8 in A, 4 in B"])
    assert compare_configs([("A", config), ("B", config | {"_name_or_path": "x"})]) == ([], [])


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2", "phi3", "llava", "mistral"])
def test_a_config_with_all_its_defaults_written_out_is_no_difference(kind):
    short = {"model_type": kind}
    full = transformers.CONFIG_MAPPING[kind]().to_dict()
    assert compare_configs([("A", short), ("B", full)]) == ([], [])
    assert compare_configs([("A", full), ("B", short)]) == ([], [])


def test_scaling_by_kinds_of_layers_is_compared_in_both_forms():
    old = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    new = transformers.CONFIG_MAPPING["gemma3_text"].from_dict(dict(old)).to_dict()
    assert compare_configs([("A", old), ("B", new)]) == ([], [])
    other = old | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert "rope_scaling" in compare_configs([("A", other), ("B", new)])[0][0]


def test_defaults_of_a_model_type_are_not_those_of_other_code_that_uses_its_name():
    ours = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
            "vision_config": {"num_attention_heads": 2}}  # fmt: skip
    theirs = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    notes, problems = compare_configs([("A", ours), ("B", theirs)])
    assert (notes, problems) == (["A says vision_config.num_attention_heads 2; B does not say"], [])
    assert compare_configs([("A", ours), ("B", {"model_type": "llava"})])[1]


def test_parts_of_a_pipeline_are_compared_by_what_they_mean():
    pytest.importorskip("diffusers")
    short = {"_class_name": "UNet2DConditionModel", "sample_size": 64}
    said = short | {"attention_head_dim": 8, "cross_attention_dim": 1280}
    assert compare_configs([("A", short), ("B", said)]) == ([], [])
    notes, problems = compare_configs([("A", short), ("B", said | {"attention_head_dim": 4})])
    assert (notes, problems) == ([], ["attention_head_dim: 8 (the default) in A, 4 in B"])


# Whose file is which.
OWNED = {
    "config": (
        "config.json", "generation_config.json", "modeling_x.py", "configuration_x.py",
        "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
        "1_Pooling/config.json", "LICENSE",
    ),
    "tokenizer": (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v3",
        "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "tekken.json", "bpe.codes",
        "chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja",
        "tokenization_x.py", "helper.py",
    ),
    "processor": (
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
        "processing_x.py", "image_processing_x.py", "feature_extraction_x.py",
        "video_processing_x.py", "resize.py",
    ),
}  # fmt: skip


def _owned_files(name: str) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for file in (file for names in OWNED.values() for file in names):
        files[file] = {"from": name} if file.endswith(".json") else f"# {name}\n"
    files["modules.json"] = json.dumps([{"from": name}])
    model = TOKENIZER_FILES["tokenizer.json"]["model"]
    files["tokenizer.json"] = {"model": model | {"unk_token": name}}
    files["added_tokens.json"], files["vocab.json"] = {"<s>": 2}, TOKENS
    files["config.json"]["auto_map"] = {"AutoModel": "modeling_x.X"}
    files["tokenizer_config.json"]["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    files["tokenization_x.py"] += "from .helper import x\n"
    files["processor_config.json"]["auto_map"] = {"AutoProcessor": "processing_x.X"}
    files["processing_x.py"] += "from .resize import x\n"
    return files


@pytest.mark.parametrize("owners", list(itertools.product(("base", "task"), repeat=3)))
def test_each_file_comes_from_its_owner(owners, tmp_path):
    for number, name in enumerate(("base", "task")):
        _model(tmp_path / name, number, _owned_files(name))
    chosen = dict(zip(OWNED, owners, strict=True))
    keys = {f"{kind}_source": str(tmp_path / name) for kind, name in chosen.items()}
    plan = outliermerge.plan(_spec(tmp_path, **keys))
    found = {sidecar.name: sidecar.path for sidecar in plan.sidecars}
    expected = {
        file: tmp_path / chosen[kind] / file for kind, files in OWNED.items() for file in files
    }
    assert found == expected


def test_nothing_of_another_tokenizer_is_left_beside_the_chosen_one(tmp_path):
    base = {"tokenizer.json": TOKENIZER_FILES["tokenizer.json"], "tekken.json": {},
            "additional_chat_templates/rag.jinja": "a",
            "preprocessor_config.json": {"a": 1}}  # fmt: skip
    _model(tmp_path / "base", 0, base)
    _model(tmp_path / "task", 1, {"vocab.json": TOKENS, "merges.txt": "a b\n"})
    plan = outliermerge.plan(_spec(tmp_path, tokenizer_source=str(tmp_path / "task")))
    names = [sidecar.name for sidecar in plan.sidecars]
    assert names == ["config.json", "merges.txt", "preprocessor_config.json", "vocab.json"]
    [note] = [note for note in plan.notes if "files differ" in note]
    base, task = tmp_path / "base", tmp_path / "task"
    assert (
        f"additional_chat_templates/rag.jinja, preprocessor_config.json, tekken.json, "
        f"tokenizer.json: in {base}, not in {task}" in note
    )
    assert f"merges.txt, vocab.json: in {task}, not in {base}" in note


def test_an_adapters_own_tokenizer_comes_whole(tmp_path):
    base = _model(tmp_path / "base", 0, {"tekken.json": {}, **TOKENIZER_FILES})
    save_tensors(base, {"l.weight": torch.ones(4, 4)})
    own = {"tokenizer.json": TOKENIZER_FILES["tokenizer.json"],
           "additional_chat_templates/rag.jinja": "a"}  # fmt: skip
    adapter = _adapter(tmp_path / "task", own)
    plan = outliermerge.plan(_spec(tmp_path, tokenizer_source=str(adapter)))
    found = {sidecar.name: sidecar.path for sidecar in plan.sidecars}
    assert found == {"config.json": base / "config.json"} | {name: adapter / name for name in own}


@pytest.mark.parametrize("kind", ["tokenizer", "processor"])
def test_a_source_that_has_none_of_it_is_refused(kind, tmp_path):
    for number, name in enumerate(("base", "task")):
        _model(tmp_path / name, number, FILES if name == "base" else {"chat_template.jinja": "a"})
    with pytest.raises(SpecError, match=rf"{kind}_source: .*task has no {kind} files"):
        outliermerge.plan(_spec(tmp_path, **{f"{kind}_source": str(tmp_path / "task")}))


def test_every_vocabulary_file_of_transformers_is_a_tokenizers():
    models = Path(transformers.__file__).parent / "models"
    names: set[str] = set()
    for path in models.glob("*/tokenization_*.py"):
        for block in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL):
            names |= set(re.findall(r':\s*"([^"]+\.\w+)"', block))
    assert {"tokenizer.json", "spiece.model", "bpe.codes", "dict.txt"} <= names
    assert [name for name in sorted(names) if kind_of(name) != "tokenizer"] == []


# Of transformers 4, fairseq, pyctcdecode and sentence-transformers.
MORE_VOCABULARIES = (
    "alphabet.json", "artists.json", "bpe.codes", "byte_maps.json", "dict.en.txt", "dict.src.txt",
    "dict.txt", "emoji.json", "encoder.json", "entity_vocab.json", "genres.json", "lyrics.json",
    "normalizer.json", "prophetnet.tokenizer", "sentencepiece.bpe.model", "source.spm",
    "spm_char.model", "target.spm", "target_vocab.json", "unigram.json", "vocab-src.json",
    "vocab-tgt.json", "vocab.bpe", "word_pronunciation.json", "word_shape.json",
)  # fmt: skip


@pytest.mark.parametrize("owner", ["base", "task"])
def test_vocabularies_of_any_name_come_from_the_tokenizers_owner(owner, tmp_path):
    for number, name in enumerate(("base", "task")):
        files = {file: json.dumps({name: 0}) for file in MORE_VOCABULARIES}
        _model(tmp_path / name, number, {"vocab.json": TOKENS, "config.json": {}} | files)
    plan = outliermerge.plan(_spec(tmp_path, tokenizer_source=str(tmp_path / owner)))
    carried = {file.name: file.path.parent.name for file in plan.sidecars}
    assert {carried.get(name, owner) for name in MORE_VOCABULARIES} == {owner}
    assert carried["config.json"] == "base"
    [note] = [note for note in plan.notes if "files differ" in note]
    assert [name for name in MORE_VOCABULARIES if name in carried and name not in note] == []


@pytest.mark.parametrize("data", [("{}", "[]"), ("a", "b"), ("{", "}")])
@pytest.mark.parametrize("name", ["LICENSE", "whatever.json", "1_Pooling/notes.txt"])
def test_a_carried_file_of_no_loader_is_named_only_where_models_differ_in_it(name, data, tmp_path):
    for number, (model, text) in enumerate(zip(("base", "task"), data, strict=True)):
        text = "{}" if name.endswith(".json") and model == "base" else text
        _model(tmp_path / model, number, {name: text, f"only_{model}.txt": "x"})
    differing = [note for note in outliermerge.plan(_spec(tmp_path)).notes if "differ" in note]
    assert len(differing) == 1 and name in differing[0] and "only_" not in differing[0]


# Every name of heads and layers that a class of transformers has, and some of other code.
COUNTS = (
    "attention_head_dim", "d_kv", "decoder_attention_heads", "decoder_layers",
    "decoder_num_attention_heads", "depths", "encoder_attention_heads", "encoder_layers",
    "head_dim", "head_size", "kv_channels", "linear_num_key_heads", "linear_num_value_heads",
    "n_head", "n_head_kv", "n_heads", "n_kv_heads", "n_layer", "n_layers",
    "num_attention_heads", "num_decoder_layers", "num_encoder_layers", "num_heads",
    "num_hidden_layers", "num_key_value_heads", "num_kv_heads", "num_layers", "qk_rope_head_dim",
    "v_head_dim",
)  # fmt: skip
NO_COUNTS = {
    "attention_heads_dropout": (0.1, 0.2), "max_window_layers": (28, 36), "head_type": ("a", "b"),
    "num_nextn_predict_layers": (1, 0), "mtp_num_hidden_layers": (1, 0), "num_beams": (1, 4),
    "encoder_layerdrop": (0.0, 0.1), "num_labels": (2, 3), "use_heads": (True, False),
    "return_attention_heads": (True, False),
}  # fmt: skip


@pytest.mark.parametrize("nested", [None, "text_config", "vision_config", "decoder"])
def test_other_numbers_of_heads_or_layers_are_refused_by_every_name(nested):
    def of(key: str, value: Any) -> dict[str, Any]:
        own = {"hidden_size": 64, key: value}
        return {"model_type": "no such type"} | ({nested: own} if nested else own)

    for key in COUNTS:
        values = ([2, 2], [1, 3]) if key == "depths" else (4, 2)
        notes, problems = compare_configs([("A", of(key, values[0])), ("B", of(key, values[1]))])
        assert (notes, len(problems)) == ([], 1), key
    for key, values in NO_COUNTS.items():
        notes, problems = compare_configs([("A", of(key, values[0])), ("B", of(key, values[1]))])
        assert (len(notes), problems) == (1, []), key


def test_every_class_of_transformers_says_its_heads_and_layers_by_a_known_name():
    known = {"num_attention_heads", "num_hidden_layers", "num_key_value_heads"}
    pattern = re.compile(r'"(\w+)":\s*"(\w+)"')
    models = Path(transformers.__file__).parent / "models"
    for path in models.glob("*/configuration_*.py"):
        for block in re.findall(r"attribute_map = \{(.*?)\}", path.read_text(), re.DOTALL):
            for general, own in pattern.findall(block):
                if general in known:
                    pair = [("A", {own: 4}), ("B", {own: 2})]
                    assert compare_configs(pair)[1] != [], (path.name, own)


def test_two_names_for_one_value_that_disagree_are_told(monkeypatch):
    config = {"model_type": "gpt2", "n_head": 4, "num_attention_heads": 4}
    pair = [("A", config), ("B", config | {"n_head": 2})]
    assert compare_configs(pair) == ([], [])  # GPT-2's class goes by the second, so both have 4
    monkeypatch.setattr(differences, "effective_config", lambda config: None)
    assert compare_configs(pair)[1] == ["num_attention_heads: 4 in A, 2 or 4 in B"]


ROPE_KEYS = {
    "rope_ratio": (1, 50), "rope_local_base_freq": (1e4, 50.0), "rope_interleave": (True, False),
    "rope_pct": (0.25, 0.5), "rotary_pct": (0.25, 1.0), "rotary_emb_base": (10000, 500000),
    "rope_theta": (1e4, 1e6), "rope_scaling": (None, {"rope_type": "linear", "factor": 2.0}),
    "rope_axes_dim": ([16, 24], [24, 16]), "global_rope_theta": (1e4, 16e4),
    "rope_parameters": ({"rope_theta": 1e4}, {"rope_theta": 1e6}), "rope_type": ("2d", "3d"),
    "rope_of_a_name_to_come": ({"a": {"b": 1}}, {"a": {"b": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("nested", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("key", ROPE_KEYS)
def test_every_key_of_rope_counts(key, nested):
    configs = []
    for name, value in zip("AB", ROPE_KEYS[key], strict=True):
        own = {key: value, "hidden_size": 4}
        config = {"model_type": "no such type"} | ({nested: own} if nested else own)
        configs.append((name, config))
    notes, problems = compare_configs(configs)
    assert (len(notes), problems) == (1, [])
    assert compare_configs([configs[1], ("C", configs[1][1])]) == ([], [])


# The same by older and by newer keys.
ROPE_SPELLINGS = {
    "base": ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    "scaled": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
    ),
    "partial": (
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    ),
    "NeoX": (
        {"rotary_emb_base": 5e5, "rotary_pct": 0.5},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    ),
    "local": (
        {"rope_theta": 5e5, "rope_local_base_freq": 1e4,
         "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {
            "full_attention": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        }},
    ),
    "ModernBERT": (
        {"global_rope_theta": 5e5, "local_rope_theta": 1e4},
        {"rope_parameters": {
            "full_attention": {"rope_theta": 5e5, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        }},
    ),
}  # fmt: skip


def _doubled(value: Any) -> list[Any]:
    """Return a value with each of the numbers in it doubled in its turn."""
    if isinstance(value, dict):
        return [value | {key: new} for key, inner in value.items() for new in _doubled(inner)]
    return [2 * value] if isinstance(value, float) else []


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS)
def test_rope_is_the_same_by_old_and_new_keys(spelling):
    old, new = ({"a": 1, **keys} for keys in ROPE_SPELLINGS[spelling])
    assert compare_configs([("A", old), ("B", new)]) == ([], [])
    for one, other in ((old, new), (new, old), (old, old), (new, new)):
        for changed in _doubled(other):
            assert len(compare_configs([("A", one), ("B", changed)])[0]) == 1, changed


@pytest.mark.parametrize("value", [
    {"x" * 40: 1, "y" * 60: {"in": {"deep": 1}}}, ["same"] * 60 + [1], "same " * 60 + "1",
    {f"k{n}": n for n in range(40)} | {"last": 1},
], ids=["nested", "list", "text", "wide"])  # fmt: skip
def test_what_differs_is_shown_however_long_the_values(value):
    other = json.loads(json.dumps(value).replace("1}", "2}").replace("1]", "2]"))
    other = value[:-1] + "2" if isinstance(value, str) else other
    for wrapped in ("a", "rope_scaling") if isinstance(value, dict) else ("a",):
        notes, _ = compare_configs([("A", {"b": 1, wrapped: value}),
                                    ("B", {"b": 1, wrapped: other})])  # fmt: skip
        assert notes != []
        for note in notes:
            ours, theirs = note.partition(": ")[2].removesuffix(" in B").split(" in A, ")
            assert ours != theirs and len(note) < 400


# dtype


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("said", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_config_says_the_dtype_that_is_stored(key, said, stored, tmp_path):
    def says(dtype: str) -> dict[str, Any]:
        own = {key: dtype, "hidden_size": 4}
        return {"hidden_size": 4, "vocab_size": None, **own, "text_config": own, "decoder": own}

    stored_name = str(stored).removeprefix("torch.")
    for number, (name, dtype) in enumerate((("base", stored_name), ("task", said))):
        save_tensors(tmp_path / name, {"w": torch.full((4, 4), float(number), dtype=stored)})
        _write(tmp_path / name / "config.json", says(dtype))
    source = str(tmp_path / "task")
    out = outliermerge.run(_spec(tmp_path, config_source=source), output=tmp_path / "out").output
    written = (out / "config.json").read_bytes()
    assert json.loads(written) == says(stored_name)
    if said == stored_name:
        assert written == (tmp_path / "task/config.json").read_bytes()


def test_a_dtype_that_some_tensors_have_stays(tmp_path):
    config = {"dtype": "bfloat16", "vision_config": {"dtype": "float32"}}
    for name in ("base", "task"):
        tensors = {"w": torch.ones(4, 4, dtype=torch.bfloat16), "norm": torch.ones(4)}
        save_tensors(tmp_path / name, tensors)
        _write(tmp_path / name / "config.json", config)
    out = outliermerge.run(_spec(tmp_path), output=tmp_path / "out").output
    assert (out / "config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()


CODE = "from .shared import x\n"


def _with_code(name: str, shared: str) -> dict[str, Any]:
    return {
        "config.json": {"model_type": "x", "auto_map": {"AutoModel": "modeling_x.X"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}},
        "vocab.json": TOKENS,
        "modeling_x.py": CODE,
        "tokenization_x.py": CODE,
        "shared.py": shared,
    }


def test_code_that_two_sources_need_must_be_the_same(tmp_path):
    _model(tmp_path / "base", 0, _with_code("base", "x = 1\n"))
    _model(tmp_path / "task", 1, _with_code("task", "x = 1\n"))
    spec = _spec(tmp_path, tokenizer_source=str(tmp_path / "task"))
    outliermerge.plan(spec)
    _write(tmp_path / "task/shared.py", "x = 2\n")
    outliermerge.plan(_spec(tmp_path))
    with pytest.raises(OutlierMergeError, match=r"shared\.py: the config of .* and the tokenizer"):
        outliermerge.plan(spec)


@pytest.mark.parametrize("file", ["modeling_x.py", "tokenization_x.py", "shared.py"])
def test_code_that_is_not_there_is_noted(file, tmp_path):
    for number, name in enumerate(("base", "task")):
        _model(tmp_path / name, number, _with_code(name, "x = 1\n"))
    assert not any("auto_map" in note for note in outliermerge.plan(_spec(tmp_path)).notes)
    (tmp_path / "base" / file).unlink()
    assert any(
        note.startswith("the output's `auto_map` needs code") and note.endswith(f": {file}")
        for note in outliermerge.plan(_spec(tmp_path)).notes
    )


def test_code_of_another_repository_is_not_missed(tmp_path):
    config = {"model_type": "x", "auto_map": {"AutoModel": "org/repo--modeling_x.X"}}
    for number, name in enumerate(("base", "task")):
        _model(tmp_path / name, number, {"config.json": config})
    assert not any("auto_map" in note for note in outliermerge.plan(_spec(tmp_path)).notes)


@pytest.mark.parametrize(
    ("config", "generation", "told"),
    [
        ({}, {}, []),
        ({"eos_token_id": 2}, {"eos_token_id": [1, 2]}, []),
        ({"eos_token_id": 1}, {},
         ["config.json of BASE has eos_token_id 1 ('b'), but the tokenizer of TASK has 2 ('<s>')"]),
        ({"text_config": {"eos_token_id": 1}}, {},
         ["config.json of BASE has eos_token_id 1 ('b')"]),
        ({"pad_token_id": 9, "bos_token_id": 1}, {"eos_token_id": [0, 1]},
         ["config.json of BASE has pad_token_id 9 ('no token')",
          "generation_config.json of BASE has eos_token_id 0 ('a'), 1 ('b')"]),
    ],
)  # fmt: skip
def test_ids_that_another_models_tokenizer_does_not_mean_are_noted(
    config, generation, told, tmp_path
):
    files = {
        "config.json": {"model_type": "x"} | config,
        "generation_config.json": generation,
        "tokenizer.json": TOKENIZER_FILES["tokenizer.json"],
        "tokenizer_config.json": {"eos_token": "b"},
    }
    ends = {"eos_token": {"content": "<s>"}, "pad_token": "a", "bos_token": None}
    _model(tmp_path / "base", 0, files)
    _model(tmp_path / "task", 1, files | {"tokenizer_config.json": ends})

    def told_of_ids(**more):
        notes = outliermerge.plan(_spec(tmp_path, **more)).notes  # where texts end: test_stops.py
        return [note for note in notes if "_token_id" in note and "ends its texts" not in note]

    assert not told_of_ids()
    found = told_of_ids(tokenizer_source=str(tmp_path / "task"))
    assert len(found) == len(told), found
    for note, start in zip(found, told, strict=True):
        start = start.replace("BASE", str(tmp_path / "base"))
        assert note.startswith(start.replace("TASK", str(tmp_path / "task")))


def test_differences_of_every_kind_of_file_are_listed_once(tmp_path):
    for number, name in enumerate(("base", "a", "b")):
        files = _owned_files("base" if name == "base" else "other")
        files |= {"results.json": {"from": name}}
        _model(tmp_path / name, number, files)
    [note] = [n for n in outliermerge.plan(_spec(tmp_path, "a", "b")).notes if "differ" in n]
    base, a, b = (tmp_path / name for name in ("base", "a", "b"))
    same = ("config.json", "1_Pooling/config.json", "added_tokens.json", "vocab.json",
            "chat_template.jinja", "chat_template.json")  # fmt: skip
    every = [*(name for names in OWNED.values() for name in names), "results.json"]
    differ = sorted(name for name in every if name not in same)
    assert note.split("\n")[1:] == [
        f"  from: base in {base}, other in {a}",
        f"  from: base in {base}, other in {b}",
        f"  from: base in {base}/1_Pooling, other in {a}/1_Pooling",
        f"  from: base in {base}/1_Pooling, other in {b}/1_Pooling",
        f"  {', '.join([*differ, 'chat template'])}: differ between {base} and {a}, {b}",
    ]


# Of the whole and of its text part they are read, and stand in test_quantized_merge.py.
@pytest.mark.parametrize("nesting", [("vision_config",), ("audio_config", "encoder_config")])
def test_an_output_does_not_say_that_a_part_is_quantised(nesting, tmp_path):
    part: dict[str, Any] = {"hidden_size": 4}
    config = part
    for key in reversed(nesting):
        config = {key: config}
    plain = json.loads(json.dumps(config))
    part["quantization_config"] = {"quant_method": "fp8"}
    for number, name in enumerate(("base", "task")):
        _model(tmp_path / name, number, {"config.json": config})
    out = outliermerge.run(_spec(tmp_path), output=tmp_path / "out").output
    assert json.loads((out / "config.json").read_text()) == plain


@pytest.mark.parametrize(("one", "other"), [(10**90, str(10**90)), (str(10**90), 10**90)])
def test_a_number_and_the_same_as_a_long_text_are_shown(one, other):
    assert _shown_apart(one, other)[0].startswith("1000")
