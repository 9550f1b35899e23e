"""Every id that a written tokenizer gives leads to the row that was trained for its token.

Each model's rows say whose they are and for which token, so that the row of an id is known.
"""

from __future__ import annotations

import json
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
