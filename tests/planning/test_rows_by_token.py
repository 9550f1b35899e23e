"""`tokenizer` in a spec: which rows the output has, its files, and what a plan says of both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from vocabularies import FURTHER_TEXTS, KINDS, TEXTS, save_family, save_model

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.errors import OutlierMergeError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: save_family(root / kind.replace(" ", "-"), kind) for kind in KINDS}


@pytest.fixture
def family(families) -> Path:
    return families["WordPiece"]


def _spec(root: Path, *names: str, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name)} for name in names or ("chat", "other")],
        "parameters": {"weight": 0.5},
    } | keys


def _rows(folder: Path, name: str = EMBEDDINGS) -> dict[str, torch.Tensor]:
    """Return the rows of a model's tokens."""
    table = load_file(folder / "model.safetensors")[name].double()
    ids = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return {token: table[id_] for token, id_ in ids.items()}


def _cut(folder: Path, text: str) -> list[str]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens


def _decoded(folder: Path, text: str) -> str:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)


def _num_unknown(folder: Path, text: str) -> int:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    unknown = {tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>")} - {None}
    return sum(id_ in unknown for id_ in tokenizer.encode(text).ids)


# The tokenizer


@pytest.mark.parametrize("source", ["base", "chat", "other"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_models_tokenizer_is_taken_byte_for_byte(kind, source, families, tmp_path):
    root = families[kind]
    named = "base" if source == "base" else str(root / source)
    out = outliermerge.run(_spec(root, tokenizer={"source": named}), output=tmp_path / "o").output
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (root / source / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_of_added_tokens_cuts_texts_as_its_sources(kind, families, tmp_path):
    root = families[kind]
    spec = _spec(root, "chat", tokenizer={"source": "union"})
    out = outliermerge.run(spec, output=tmp_path / "o").output
    for text in TEXTS.values():
        assert _cut(out, text) == _cut(root / "base", text)
        assert _decoded(out, text) == _decoded(root / "base", text)
    chat = f"<|im_start|>user {TEXTS['Greek']}<|im_end|>"
    assert _cut(out, chat) == _cut(root / "chat", chat)
    assert transformers.AutoTokenizer.from_pretrained(out).tokenize(chat) == _cut(out, chat)


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_of_pieces_reads_six_scripts_with_the_pieces_of_both(kind, families, tmp_path):
    root = families[kind]
    out = outliermerge.run(_spec(root, tokenizer={}), output=tmp_path / "o").output
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    known = Tokenizer.from_file(str(root / "base" / "tokenizer.json")).get_vocab()
    used = set()
    for text in TEXTS.values():
        assert _decoded(out, text) == _decoded(root / "base", text)
        tokens = _cut(out, text)
        assert tokens == loaded.tokenize(text)
        assert len(tokens) <= len(_cut(root / "base", text))
        used |= set(tokens)
    of_other = "за нас"  # letters that the base was not trained on
    assert _decoded(out, of_other) == _decoded(root / "other", of_other)
    used |= set(_cut(out, of_other))
    assert used - known.keys()  # pieces of the other model are not only there, but used


@pytest.mark.parametrize("source", ["base", "chat", "other", "outside"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_models_tokenizer_encodes_and_decodes_every_script_as_its_own(
    kind, source, families, tmp_path
):
    root = families[kind]
    folder = root / source
    if source == "outside":  # of a model that is not merged
        folder = save_model(tmp_path / "models" / "outside", kind, "other", ["<y>"], seed=5)
    named = "base" if source == "base" else str(folder)
    out = outliermerge.run(_spec(root, tokenizer={"source": named}), output=tmp_path / "o").output
    ours, theirs = map(transformers.AutoTokenizer.from_pretrained, (out, folder))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (TEXTS | FURTHER_TEXTS).values():
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"] and ids
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("names", [("chat",), ("chat", "other")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_union_gives_back_every_script_as_well_as_its_sources(kind, names, families, tmp_path):
    root = families[kind]
    out = outliermerge.run(_spec(root, *names, tokenizer={}), output=tmp_path / "o").output
    sources = [root / name for name in ("base", *names)]
    for text in (TEXTS | FURTHER_TEXTS).values():
        if "BPE" in kind:  # which has a token for every byte, so that nothing is lost
            tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
            continue
        for source in sources:
            assert _num_unknown(out, text) <= _num_unknown(source, text)
            if not _num_unknown(source, text):
                assert _decoded(out, text) == _decoded(source, text)


def test_pieces_keep_the_ids_and_merges_of_the_base_first(families, tmp_path):
    root = families["byte-level BPE"]
    out = outliermerge.run(_spec(root, tokenizer={}), output=tmp_path / "o").output
    base, merged = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (root / "base", out)
    )
    assert base["model"]["vocab"].items() <= merged["model"]["vocab"].items()
    merges = base["model"]["merges"]
    assert merged["model"]["merges"][: len(merges)] == merges
    added = {entry["content"]: entry["id"] for entry in merged["added_tokens"]}
    ids = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    assert added.items() <= ids.items()


def test_files_that_lack_the_pieces_of_others_are_left_out(family, tmp_path):
    for name in ("base", "chat", "other"):
        target = tmp_path / name
        target.mkdir()
        for path in (family / name).iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        (target / "vocab.txt").write_text("\n".join(["a", "b"]))
    plan = outliermerge.plan(_spec(tmp_path, tokenizer={}))
    assert "vocab.txt" not in [file.name for file in plan.sidecars]
    assert any("left out of the tokenizer" in note and "vocab.txt" in note for note in plan.notes)
    plan = outliermerge.plan(_spec(tmp_path, "chat", tokenizer={"source": "base"}))
    assert "vocab.txt" in [file.name for file in plan.sidecars]


def test_pieces_of_another_kind_are_refused(families, tmp_path):
    base = save_model(tmp_path / "base", "BPE")
    save_model(tmp_path / "chat", "Unigram", seed=1)
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(_spec(tmp_path, "chat", tokenizer={}))
    assert f"the one of {base} is BPE:\n  {tmp_path}/chat, which alone has" in str(caught.value)
    assert "more: Unigram\n" in str(caught.value)
    assert "`outliermerge tokenizer transplant MODEL DONOR` gives a model" in str(caught.value)
    with pytest.raises(OutlierMergeError, match=r"Or `outliermerge tokenizer transplant"):
        outliermerge.plan(_spec(tmp_path, "chat"))
    outliermerge.plan(_spec(tmp_path, "chat", tokenizer={"source": "base"}))


# Rows


@pytest.mark.parametrize("name", [EMBEDDINGS, HEAD])
def test_a_missing_row_is_the_bases_or_the_sole_owners_or_the_mean(family, tmp_path, name):
    models = [{"model": str(family / n)} for n in ("base", "chat", "other")]
    linear = {"merge_method": "linear", "models": models, "tokenizer": {}}
    out = outliermerge.run(linear, output=tmp_path / "linear").output
    base, chat, other = (_rows(family / n, name) for n in ("base", "chat", "other"))
    found = _rows(out, name)
    assert found.keys() == base.keys() | chat.keys() | other.keys()
    for token, row in found.items():
        held = [rows[token] for rows in (base, chat, other) if token in rows]
        mean = torch.stack(held).mean(0)  # those who lack it have the mean of the others
        torch.testing.assert_close(row, mean, rtol=0, atol=1e-6)
    spec = _spec(family, tokenizer={})
    found = _rows(outliermerge.run(spec, output=tmp_path / "ta").output, name)
    only = next(token for token in other if token not in base and token not in chat)
    torch.testing.assert_close(found[only], other[only], rtol=0, atol=1e-6)
    both = "<|im_end|>"  # not the base's: it gets the mean, of which the two differ
    torch.testing.assert_close(found[both], (chat[both] + other[both]) / 2, rtol=0, atol=1e-6)
    lacking = next(token for token in base if token not in other)
    torch.testing.assert_close(
        found[lacking], base[lacking] + 0.5 * (chat[lacking] - base[lacking]), rtol=0, atol=1e-6
    )


def test_new_tokens_get_the_rows_that_the_spec_names(family, tmp_path):
    chat = str(family / "chat")
    tokens = {
        "<zero>": {"source": {"kind": "zero"}},
        "<copy>": {"source": {"kind": "model_token", "model": chat, "token": "<|im_end|>"}},
        "<third>": {"source": {"kind": "model_token", "model": "base", "token_id": 3}},
        "<|im_start|>": {"source": chat},
    }
    spec = _spec(family, tokenizer={"source": "base", "tokens": tokens})
    found = _rows(outliermerge.run(spec, output=tmp_path / "o").output)
    assert found["<zero>"].abs().max() == 0
    theirs = _rows(family / "chat")
    for token, other in (("<copy>", "<|im_end|>"), ("<|im_start|>", "<|im_start|>")):
        torch.testing.assert_close(found[token], theirs[other], rtol=0, atol=1e-6)
    third = load_file(family / "base" / "model.safetensors")[EMBEDDINGS][3].double()
    torch.testing.assert_close(found["<third>"], third, rtol=0, atol=1e-6)
    entries = json.loads((tmp_path / "o" / "tokenizer.json").read_text())["added_tokens"]
    special = {entry["content"]: entry["special"] for entry in entries}
    assert special["<|im_start|>"] and not special["<copy>"]  # as in the model that has it


def test_a_forced_row_takes_the_place_of_every_models(family, tmp_path):
    chat = str(family / "chat")
    spec = _spec(
        family, tokenizer={"source": "union", "tokens": {"quick": {"source": chat, "force": True}}}
    )
    token = next(t for t in _rows(family / "base") if t in _rows(family / "other") and len(t) > 1)
    spec["tokenizer"]["tokens"] = {token: {"source": chat, "force": True}}
    found = _rows(outliermerge.run(spec, output=tmp_path / "o").output)
    torch.testing.assert_close(found[token], _rows(family / "chat")[token], rtol=0, atol=1e-6)


def test_padding_is_the_mean_of_each_models_rows(family, tmp_path):
    spec = _spec(family, "chat", tokenizer={"source": "base", "pad_to_multiple_of": 100})
    out = outliermerge.run(spec, output=tmp_path / "o").output
    table = load_file(out / "model.safetensors")[EMBEDDINGS].double()
    own = len(_rows(family / "base")) + 5  # with its reserved rows
    assert len(table) == -(-own // 100) * 100
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(table)
    mean = table[:own].mean(0).expand(len(table) - own, -1)
    torch.testing.assert_close(table[own:], mean, rtol=0, atol=1e-6)


def test_a_token_that_no_model_has_a_row_for_gets_zeros(tmp_path):
    for number, name in enumerate(("base", "chat")):
        save_model(tmp_path / name, "WordPiece", seed=number)
        tokenizer = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        tokenizer.add_special_tokens(["<beyond>"])
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    plan = outliermerge.plan(_spec(tmp_path, "chat", tokenizer={"source": "base"}))
    assert any("('<beyond>'): the output's is zero" in note for note in plan.notes)
    out = outliermerge.run(
        _spec(tmp_path, "chat", tokenizer={"source": "base"}), output=tmp_path / "o"
    ).output
    assert _rows(out)["<beyond>"].abs().max() == 0


def test_a_model_without_tokenizer_is_taken_to_have_the_bases(family, tmp_path):
    for name in ("base", "chat"):
        (tmp_path / name).mkdir()
        for path in (family / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    save_model(tmp_path / "bare", "WordPiece", seed=3, tokenizer=False)
    plan = outliermerge.plan(_spec(tmp_path, "chat", "bare", tokenizer={}))
    assert any("bare has no tokenizer files that can be read" in note for note in plan.notes)
    assert plan.tokenizer is not None
    [bare] = [model for model in plan.tokenizer.models if model.reference.endswith("bare")]
    num_tokens = len(_rows(tmp_path / "base"))
    assert (bare.own, bare.moved, bare.follows) == (num_tokens, 0, str(tmp_path / "base"))


# Configs


def _ids(folder: Path, file: str = "config.json") -> dict[str, Any]:
    config = json.loads((folder / file).read_text())
    return {key: value for key, value in config.items() if key.endswith("_token_id")}


def test_ids_follow_their_tokens_into_another_tokenizer(families, tmp_path):
    root = tmp_path
    save_model(root / "base", "WordPiece", config={"bos_token_id": 2, "pad_token_id": None})
    save_model(root / "other", "WordPiece", "other", ["<|im_end|>"], seed=1)
    base, other = (
        Tokenizer.from_file(str(root / name / "tokenizer.json")) for name in ("base", "other")
    )
    ids = other.token_to_id
    own = next(id_ for token, id_ in base.get_vocab().items() if ids(token) is None)
    (root / "base" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 1], "pad_token_id": 0, "suppress_tokens": [4, own]})
    )
    config = json.loads((root / "other" / "config.json").read_text())
    config |= {"eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("[PAD]")}
    (root / "other" / "config.json").write_text(json.dumps(config))
    spec = _spec(root, "other", tokenizer={"source": str(root / "other")})
    out = outliermerge.run(spec, output=tmp_path / "o").output
    assert _ids(out)["eos_token_id"] == ids("<|im_end|>")  # the tokenizer's model says so
    assert _ids(out)["bos_token_id"] == 2  # [CLS] is 2 in both
    assert _ids(out)["pad_token_id"] == ids("[PAD]")  # the base's config has none
    assert _ids(out, "generation_config.json")["eos_token_id"] == ids("<|im_end|>")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [4]  # [MASK]; the other has no such token
    assert outliermerge.verify(out) == []


def test_a_config_that_names_a_token_the_output_lacks_is_refused(families, tmp_path):
    base = save_model(tmp_path / "base", "WordPiece", added=["<image>"])
    config = json.loads((base / "config.json").read_text())
    image = config["image_token_id"] = config["vocab_size"] - 1
    (base / "config.json").write_text(json.dumps(config))
    save_model(tmp_path / "chat", "WordPiece", seed=1)
    spec = _spec(tmp_path, "chat", tokenizer={"source": str(tmp_path / "chat")})
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    assert f"base: image_token_id {image} ('<image>')" in str(caught.value)
    assert "\n`tokenizer: {source: union}` keeps them. `config_source`" in str(caught.value)
    outliermerge.plan(spec | {"tokenizer": {"source": "union"}})
    save_model(tmp_path / "bytes", "byte-level BPE", seed=1)
    with pytest.raises(OutlierMergeError, match="`outliermerge tokenizer transplant"):
        outliermerge.plan(spec | {"tokenizer": {"source": str(tmp_path / "bytes")}})


# What is said, and what lasts


def test_a_plan_shows_the_tokenizer_and_what_becomes_of_rows(family, capsys, monkeypatch):
    monkeypatch.chdir(family)
    spec = {
        "merge_method": "linear",
        "models": [{"model": name} for name in ("base", "chat", "other")],
        "tokenizer": {"pad_to_multiple_of": 64},
        "chat_template": "chatml",
    }
    plan = outliermerge.plan(spec)
    assert plan.tokenizer is not None
    base, chat, other = plan.tokenizer.models
    num_tokens = len(_rows(family / "base"))
    assert (base.own, base.reserved) == (num_tokens, 5)
    assert (chat.own, chat.dropped) == (num_tokens + 2, 0)
    assert base.own + base.taken + base.averaged == plan.tokenizer.num_tokens
    assert other.own == len(_rows(family / "other")) and other.moved > 0
    as_json = plan.as_dict()["tokenizer"]
    assert as_json["source"] == "union" and as_json["rows"][0]["model"] == "base"
    Path("merge.yaml").write_text(json.dumps(spec))
    assert cli.main(["plan", "merge.yaml", "--no-load-check"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "union of all, made from base:" in said
    assert f"{num_tokens} own" in said and "chatml" in said
    Path("merge.yaml").unlink()


def test_a_recipe_repeats_the_merge_from_another_folder(family, tmp_path, monkeypatch):
    monkeypatch.chdir(family)
    tokens = {
        "<a>": {"source": {"kind": "model_token", "model": "chat", "token_id": 5}},
        "<|im_start|>": {"source": "chat", "force": True},
    }
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "chat"}, {"model": "other"}],
        "tokenizer": {"source": "chat", "tokens": tokens},
        "chat_template": "chatml",
    }
    first = outliermerge.run(spec, output=tmp_path / "first").output
    assert outliermerge.verify(first) == []
    monkeypatch.chdir(tmp_path)
    second = outliermerge.run(first / "recipe.yaml", output=tmp_path / "second").output
    again = outliermerge.run(first / "outliermerge.json", output=tmp_path / "third").output
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_an_explicit_vocabulary_keeps_what_tokenizer_source_meant(family, tmp_path):
    spec = _spec(family, "chat", tokenizer_source=str(family / "chat"), vocabulary="union")
    out = outliermerge.run(spec, output=tmp_path / "o").output
    rows = load_file(out / "model.safetensors")[EMBEDDINGS]
    assert len(rows) == len(_rows(family / "base")) + 5  # reserved rows stay
    assert outliermerge.plan(spec).tokenizer is None


BIG = """
import json, struct, sys
from pathlib import Path
root, rows, columns = Path(sys.argv[1]), 100_000, 4096
def save(name, words):
    folder = root / name
    folder.mkdir()
    size = len(words) * columns * 2
    meta = {"dtype": "BF16", "shape": [len(words), columns], "data_offsets": [0, size]}
    header = json.dumps({"model.embed_tokens.weight": meta}).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    config = {"model_type": "llama", "vocab_size": len(words), "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    model = {"type": "WordLevel", "unk_token": "w0", "vocab": {w: i for i, w in enumerate(words)}}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
shared = [f"w{i}" for i in range(66_000)]
save("base", shared)
save("one", [*reversed(shared[:50_000]), *(f"v{i}" for i in range(34_000))])
import outliermerge
spec = {"merge_method": "linear", "models": [{"model": str(root / n)} for n in ("base", "one")],
        "tokenizer": {"source": "union"}}
plan = outliermerge.plan(spec)
assert plan.num_rows == 100_000, plan.num_rows
outliermerge.run(spec, output=root / "out", load_check=False)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
def test_a_union_of_100000_rows_takes_far_less_memory_than_its_matrix(tmp_path):
    tell = "\nprint(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    done = subprocess.run(
        [sys.executable, "-c", BIG + tell, str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak_bytes = int(done.stdout.split()[-2]) * 1024
    for name in ("base", "one", "out"):
        (tmp_path / name / "model.safetensors").unlink()
    assert peak_bytes < 0.5 * 100_000 * 4096 * 2, f"{peak_bytes:,}"
