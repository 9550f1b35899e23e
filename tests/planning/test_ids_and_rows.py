"""Every id that a written tokenizer gives leads to the row that was trained for its token.

Each model's rows say whose they are and for which token, so that the row of an id is known.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import load_folder
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import outliermerge
from outliermerge.errors import OutlierMergeError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PIECES = ["<unk>", *"abcdefgh", "ab", "cd", "##x", "▁"]
KINDS = ["BPE", "WordPiece", "Unigram", "WordLevel"]
POLICIES = ["error", "base", "common", "union"]

# By name: rows behind the pieces' in the base and in the models, and the tokens that these add.
SITUATIONS = {
    "no reserved rows": (0, 0, [], []),
    "tokens of two": (0, 0, ["<a>"], ["<b>"]),
    "reserved, unused": (6, 6, [], []),
    "reserved in the base alone": (6, 0, [], []),
    "used by one": (6, 6, ["<a>", "<c>"], []),
    "used by one, resized": (6, 0, ["<a>", "<c>"], []),
    "used by both alike": (6, 6, ["<a>"], ["<a>"]),
    "used for different tokens": (6, 6, ["<a>"], ["<b>"]),
    "one token at different ids": (6, 6, ["<a>", "<c>"], ["<b>", "<a>"]),
    "more than are reserved": (1, 0, ["<a>", "<c>", "<d>"], ["<b>", "<d>"]),
    "more padding in a model": (2, 9, ["<a>"], ["<b>"]),
}


def build(kind: str, added: list[str]) -> Tokenizer:
    ids = {piece: number for number, piece in enumerate(PIECES)}
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE(ids, [("a", "b"), ("c", "d")], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    elif kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    elif kind == "WordLevel":
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    else:
        tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=0))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    return tokenizer


def save_tokenizer(folder: Path, kind: str, added: list[str], *, old: bool = False) -> None:
    """Save as transformers 5 does, or with the files of version 4 beside."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=build(kind, added), unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    if old:
        ids = {token: len(PIECES) + place for place, token in enumerate(added)}
        decoder = {
            str(id_): {"content": token, "special": True}
            for token, id_ in {"<unk>": 0, **ids}.items()
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
        config["added_tokens_decoder"] = decoder
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "added_tokens.json").write_text(json.dumps(ids))
        named = {"unk_token": "<unk>", "additional_special_tokens": added}
        (folder / "special_tokens_map.json").write_text(json.dumps(named))


def save_slow(folder: Path, kind: str, added: list[str]) -> None:
    if kind == "vocab.txt":
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
        config = {"tokenizer_class": "BertTokenizer", "unk_token": "<unk>"}
        config |= {f"{word}_token": "<unk>" for word in ("sep", "pad", "cls", "mask")}
    else:
        (folder / "vocab.json").write_text(json.dumps({p: n for n, p in enumerate(PIECES)}))
        (folder / "merges.txt").write_text("#version: 0.2\na b\nc d\n")
        config = {"tokenizer_class": "GPT2Tokenizer"}
        config |= {f"{word}_token": "<unk>" for word in ("unk", "bos", "eos")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = {token: len(PIECES) + place for place, token in enumerate(added)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))


def save_rows(folder: Path, number: int, added: list[str], spare: int, **config) -> None:
    """Save a model whose rows are (model, token's id, 1, noise); of reserved rows, noise."""
    rows = len(PIECES) + len(added)
    num_rows = len(PIECES) + max(spare, len(added))
    generator = torch.Generator().manual_seed(number)
    table = torch.randn(num_rows, 4, generator=generator).round(decimals=2)
    table[:rows, 0], table[:rows, 2] = number, 1
    table[:rows, 1] = torch.arange(rows)
    tensors = {EMBEDDINGS: table, HEAD: -table, "model.norm.weight": torch.ones(4)}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": len(table),
        "tie_word_embeddings": False,
    } | config
    (folder / "config.json").write_text(json.dumps(config))


def save_models(root: Path, situation: str, save, *args, **kwargs) -> None:
    base_spare, spare, *added = SITUATIONS[situation]
    for number, (name, tokens) in enumerate(zip(("base", "a", "b"), ([], *added), strict=True)):
        (root / name).mkdir()
        save_rows(root / name, number, tokens, spare if number else base_spare)
        save(root / name, *args, tokens, **kwargs)


@cache
def tokens_of(folder: Path) -> dict[str, int]:
    """Return the ids that transformers gives, which have to be those of the tokenizers library."""
    ids = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    if (folder / "tokenizer.json").is_file():
        plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert plain.get_vocab(with_added_tokens=True) == ids
        assert all(plain.token_to_id(token) == id_ for token, id_ in ids.items())
    return ids


def check_files_agree(folder: Path, ids: dict[str, int]) -> None:
    def read(name: str) -> dict:
        path = folder / name
        return json.loads(path.read_text()) if path.is_file() else {}

    for entry in read("tokenizer.json").get("added_tokens", []):
        assert ids[entry["content"]] == entry["id"]
    for id_, entry in read("tokenizer_config.json").get("added_tokens_decoder", {}).items():
        assert ids[entry["content"]] == int(id_)
    assert read("added_tokens.json").items() <= ids.items()


def check(root: Path, out: Path, policy: str) -> None:
    ids = tokens_of(out)
    check_files_agree(out, ids)
    merged = load_folder(out)
    num_rows = len(merged[EMBEDDINGS])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == num_rows
    trained = {name: tokens_of(root / name) for name in ("base", "a", "b")}
    stored = {name: load_folder(root / name) for name in trained}
    if policy == "union":
        assert set().union(*trained.values()) == set(ids)
    for name, (token, id_) in product((EMBEDDINGS, HEAD), ids.items()):
        rows = {
            m: stored[m][name][own[token]].double() for m, own in trained.items() if token in own
        }
        assert rows
        if policy == "error":
            assert all(trained[model][token] == id_ for model in rows)
            rows = {model: tensors[name][id_].double() for model, tensors in stored.items()}
        base = rows.get("base", sum(rows.values()) / len(rows))
        expected = base + sum(0.5 * (rows.get(model, base) - base) for model in ("a", "b"))
        torch.testing.assert_close(merged[name][id_].double(), expected, rtol=0, atol=1e-5)


def merge(root: Path, policy: str, source: str, **keys) -> Path | str:
    """Return the merged folder, or the message of a refusal."""
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / "a")}, {"model": str(root / "b")}],
        "parameters": {"weight": 0.5},
        "vocabulary": policy,
        "tokenizer_source": str(root / source),
    } | keys
    try:
        return outliermerge.run(spec, output=root / f"{policy}_{source}").output
    except OutlierMergeError as error:
        return str(error)


# Policies and sources of tokenizers that do not go: a letter for each source.
REFUSED = {
    "no reserved rows": {},
    "tokens of two": {"error": "xab", "base": "ab", "common": "ab"},
    "reserved, unused": {},
    "reserved in the base alone": {"error": "xab"},
    "used by one": {"common": "xab"},
    "used by one, resized": {"error": "xab", "common": "a"},
    "used by both alike": {"common": "xab"},
    "used for different tokens": {"error": "xab", "common": "xab"},
    "one token at different ids": {"error": "xab", "common": "xab"},
    "more than are reserved": {"error": "xab", "base": "ab", "common": "ab"},
    "more padding in a model": {"error": "xab", "common": "xab"},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_id_leads_to_its_row(tmp_path, kind, situation):
    save_models(tmp_path, situation, save_tokenizer, kind, old=kind in ("BPE", "WordLevel"))
    sources = ("base", "a", "b") if kind == "WordLevel" else ("base", "a")
    for policy, source in product(POLICIES, sources):
        out = merge(tmp_path, policy, source)
        letter = "x" if source == "base" else source
        assert isinstance(out, str) == (letter in REFUSED[situation].get(policy, "")), out
        if isinstance(out, Path):
            check(tmp_path, out, policy)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("kind", ["vocab.txt", "vocab.json"])
@pytest.mark.sampled(3)
def test_each_id_of_a_tokenizer_without_a_json_leads_to_its_row(tmp_path, kind, situation):
    save_models(tmp_path, situation, save_slow, kind)
    for policy, source in product(POLICIES, ("base", "a")):
        out = merge(tmp_path, policy, source)
        if isinstance(out, Path):
            check(tmp_path, out, policy)
        else:
            assert policy != "base" or source == "a"
        if policy == "union" and source == "base" and any(SITUATIONS[situation][2:]):
            assert "which has no tokenizer.json" in out


# Adapters with tokenizer files of their own.


def save_adapter(folder: Path, spare: int, added: list[str], whole: bool) -> None:
    """Save an adapter over the base: embeddings and head whole, or their new rows alone."""
    folder.mkdir()
    save_rows(folder, 1, added, spare)
    rows = load_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    first = len(PIECES)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"]}
    config |= {"base_model_name_or_path": str(folder.parent / "base"), "bias": "none"}
    tensors = {}
    for name in (EMBEDDINGS, HEAD):
        module = name.removesuffix(".weight")
        if whole:
            tensors[f"base_model.model.{name}"] = rows[name]
        else:
            part = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
            tensors[part] = rows[name][first : first + len(added)].clone()
    if not whole:
        ids = list(range(first, first + len(added)))
        config["trainable_token_indices"] = {"embed_tokens": ids, "lm_head": ids}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_tokenizer(folder, "WordLevel", added)


@pytest.mark.parametrize("source", ["base", "a"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("base_spare", "spare", "whole"), [(0, 0, True), (6, 0, True), (6, 6, True), (6, 6, False)]
)
def test_each_id_of_an_adapters_tokenizer_leads_to_its_row(
    tmp_path, base_spare, spare, whole, policy, source
):
    (tmp_path / "base").mkdir()
    save_rows(tmp_path / "base", 0, [], base_spare)
    save_tokenizer(tmp_path / "base", "WordLevel", [])
    save_adapter(tmp_path / "a", spare, ["<a>", "<b>"], whole)
    out = merge(tmp_path, policy, source, models=[{"model": str(tmp_path / "a")}])
    if isinstance(out, str):
        assert policy != "union"
        assert (policy, source) != ("base", "base")
        return
    ids = tokens_of(out)
    check_files_agree(out, ids)
    if policy == "union":
        assert {"<a>", "<b>"} <= ids.keys()
    merged = load_folder(out)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(merged[EMBEDDINGS])
    old = load_folder(tmp_path / "base")[EMBEDDINGS]
    for place, token in enumerate(["<a>", "<b>"]):
        if token in ids:
            row = torch.tensor([1.0, len(PIECES) + place, 1.0])
            if policy == "error":  # half of the way from the base's row
                row = (row + old[ids[token]][:3]) / 2
            torch.testing.assert_close(merged[EMBEDDINGS][ids[token]][:3], row, rtol=0, atol=1e-5)
            torch.testing.assert_close(merged[HEAD][ids[token]][:3], -row, rtol=0, atol=1e-5)


# Tokenizer files that do not say what a loader gives.


def change_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("source", ["base", "a", "b"])
def test_ids_that_a_loader_does_not_give_are_not_trusted(tmp_path, policy, source):
    save_models(tmp_path, "used for different tokens", save_tokenizer, "BPE", old=True)

    def renumber(tokenizer: dict) -> None:
        tokenizer["added_tokens"][-1]["id"] = 18

    change_json(tmp_path / "a" / "tokenizer.json", renumber)
    for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        (tmp_path / "a" / name).unlink()
    assert json.loads((tmp_path / "a" / "tokenizer.json").read_text())["added_tokens"][-1] == {
        "id": 18, "content": "<a>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    out = merge(tmp_path, policy, source)
    if isinstance(out, str):
        assert policy in ("error", "common")
        return
    ids = tokens_of(out)
    assert set(ids.values()) <= set(range(19))
    if (policy, source) != ("base", "a"):  # that one is copied as it is
        check(tmp_path, out, policy)


@pytest.mark.parametrize("source", ["base", "a", "b"])
def test_a_special_token_that_only_a_config_names_has_its_row(tmp_path, source):
    """transformers gives <pad> the first reserved row, which another model has for its token."""
    save_models(tmp_path, "used for different tokens", save_tokenizer, "WordLevel")
    save_rows(tmp_path / "base", 0, ["<pad>"], 6)
    change_json(
        tmp_path / "base" / "tokenizer_config.json", lambda value: value.update(pad_token="<pad>")
    )
    out = merge(tmp_path, "union", source)
    assert isinstance(out, Path) == (source == "base"), out
    if source == "base":
        ids = tokens_of(out)
        assert [ids[token] for token in ("<pad>", "<a>", "<b>")] == [13, 14, 15]
        rows = load_folder(out)[EMBEDDINGS][13:16, :3]
        torch.testing.assert_close(rows, torch.tensor([[0.0, 13, 1], [1, 13, 1], [2, 13, 1]]))


# What configs say of rows.


def named(ids: dict[str, object], file: str = "config.json"):
    return lambda folder: change_json(folder / file, lambda config: config.update(ids))


@pytest.mark.parametrize(
    ("situation", "where", "ids", "keys", "refusal"),
    [
        # the base's config names a reserved row, which another token would take
        ("used for different tokens", "base", {"image_token_index": 14}, {"vocabulary": "union"},
         "config.json: image_token_index 14, a row that is for '<b>'"),
        ("used for different tokens", "base", {"eos_token_id": [2, 14]}, {"vocabulary": "union"},
         "config.json: eos_token_id 14, a row that is for '<b>'"),
        ("used for different tokens", "base", {"text_config": {"boi_token_id": 14}},
         {"vocabulary": "union"}, "config.json: text_config.boi_token_id 14, a row"),
        ("used for different tokens", "base", {"vision_config": {"pad_token_id": 14}},
         {"vocabulary": "union"}, None),
        ("used for different tokens", "base", {"pad_token_id": -1, "bos_token_id": None},
         {"vocabulary": "union"}, None),
        # a model was trained with that token at that id
        ("used for different tokens", "base", {"image_token_index": 13},
         {"vocabulary": "union"}, None),
        # the config of a model whose token moves, stays, or is left out
        ("used for different tokens", "b", {"image_token_id": 13},
         {"vocabulary": "union", "config_source": "b"},
         "config.json: image_token_id 13 ('<b>'), a row that is for '<a>'"),
        ("used for different tokens", "a", {"image_token_id": 13},
         {"vocabulary": "union", "config_source": "a"}, None),
        ("tokens of two", "a", {"image_token_id": 13},
         {"vocabulary": "base", "config_source": "a"},
         "config.json: image_token_id 13 ('<a>'), a row that it does not have"),
        # padding that is cut
        ("reserved in the base alone", "base", {"image_token_id": 15}, {"vocabulary": "common"},
         "config.json: image_token_id 15, a row that it does not have"),
        ("reserved in the base alone", "base", {"image_token_id": 15}, {"vocabulary": "base"},
         None),
    ],
)  # fmt: skip
def test_rows_that_the_config_names_stay_what_they_are(
    tmp_path, situation, where, ids, keys, refusal
):
    save_models(tmp_path, situation, save_tokenizer, "WordLevel")
    named(ids)(tmp_path / where)
    keys = {k: str(tmp_path / v) if k == "config_source" else v for k, v in keys.items()}
    out = merge(tmp_path, keys.pop("vocabulary"), "base", **keys)
    if refusal is None:
        assert isinstance(out, Path), out
    else:
        assert refusal in str(out)
        assert f"the config of {tmp_path / where} names rows by ids" in out


def test_a_generation_config_names_rows_too(tmp_path):
    save_models(tmp_path, "used for different tokens", save_tokenizer, "WordLevel")
    (tmp_path / "base" / "generation_config.json").write_text('{"suppress_tokens": [3, 14]}')
    out = merge(tmp_path, "union", "base")
    assert "generation_config.json: suppress_tokens 14, a row that is for '<b>'" in out


def test_a_config_source_that_is_silent_gets_the_rows_of_the_output(tmp_path):
    save_models(tmp_path, "reserved, unused", save_tokenizer, "WordLevel")
    for name in ("base", "b"):
        change_json(tmp_path / name / "config.json", lambda config: config.pop("vocab_size"))
    out = merge(tmp_path, "error", "base", config_source=str(tmp_path / "b"))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(PIECES) + 6
