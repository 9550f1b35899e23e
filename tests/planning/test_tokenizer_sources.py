"""Tokenizers of models that are not merged, or without a tokenizer.json; rows without a token."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
import yaml
from hub_server import HubServer, commit_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from vocabularies import TEXTS, save_model

import outliermerge
from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.cli import main as cli
from outliermerge.errors import OutlierMergeError
from outliermerge.planning.tokenizer_files import how_to_convert

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _spec(root: Path, *names: str, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name)} for name in names or ("chat",)],
        "parameters": {"weight": 0.5},
    } | keys


def _table(folder: Path, name: str = EMBEDDINGS) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name].double()


def _ids(folder: Path) -> dict[str, int]:
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def _only_tokenizer(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.glob("*token*.json"):
        shutil.copy(path, target)
    return target


# The tokenizer of a model that is not merged


@pytest.fixture
def family(tmp_path) -> Path:
    save_model(tmp_path / "base", "WordPiece")
    save_model(tmp_path / "chat", "WordPiece", added=["<|im_end|>"], seed=1)
    save_model(tmp_path / "other", "WordPiece", "other", ["<|im_end|>", "<x>"], seed=2)
    return tmp_path


@pytest.mark.parametrize("key", ["tokenizer", "tokenizer_source"])
@pytest.mark.parametrize("name", [EMBEDDINGS, HEAD])
def test_rows_go_by_the_tokens_of_a_model_that_is_not_merged(family, tmp_path, key, name):
    outside = _only_tokenizer(family / "other", tmp_path / "outside")
    given = {key: {"source": str(outside)} if key == "tokenizer" else str(outside)}
    out = outliermerge.run(_spec(family, **given), output=tmp_path / "o").output
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (outside / file).read_bytes()
    table, base, chat = (_table(folder, name) for folder in (out, family / "base", family / "chat"))
    in_base, in_chat, found = _ids(family / "base"), _ids(family / "chat"), _ids(out)
    assert found == _ids(family / "other")
    num = dict.fromkeys(("both", "chat", "none"), 0)
    for token, id_ in found.items():
        if token in in_base:
            theirs = chat[in_chat[token]]
            expected = base[in_base[token]] + 0.5 * (theirs - base[in_base[token]])
            num["both"] += 1
        elif token in in_chat:  # the base gets it, too, so that there is no difference
            expected = chat[in_chat[token]]
            num["chat"] += 1
        else:
            expected = torch.zeros(8).double()
            num["none"] += 1
        torch.testing.assert_close(table[id_], expected, rtol=0, atol=1e-6)
    assert num["both"] > 20 and num["chat"] == 1 and num["none"] > 20
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(table)
    assert outliermerge.verify(out) == []


def test_a_plan_names_the_tokenizer_and_the_tokens_without_a_row(family, tmp_path):
    outside = _only_tokenizer(family / "other", tmp_path / "outside")
    plan = outliermerge.plan(_spec(family, tokenizer={"source": str(outside)}))
    assert plan.tokenizer is not None and plan.tokenizer.reference == str(outside)
    assert [model.reference for model in plan.tokenizer.models] == [
        str(family / "base"), str(family / "chat")
    ]  # fmt: skip
    lost = len(set(_ids(outside)) - set(_ids(family / "chat")))
    assert any(f"no model has a row for {lost} tokens" in note for note in plan.notes)
    assert len(plan.inputs) == 2


def test_its_special_tokens_are_those_of_its_config_if_it_has_one(family, tmp_path):
    outside = _only_tokenizer(family / "chat", tmp_path / "outside")
    spec = _spec(family, tokenizer={"source": str(outside)})
    ids = _ids(outside)
    out = outliermerge.run(spec, output=tmp_path / "a").output
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == ids["[SEP]"]
    said = {"eos_token_id": [ids["<|im_end|>"], ids["[SEP]"]]}
    (outside / "generation_config.json").write_text(json.dumps(said))
    (family / "base" / "generation_config.json").write_text('{"eos_token_id": 3}')
    out = outliermerge.run(spec, output=tmp_path / "b").output
    assert json.loads((out / "generation_config.json").read_text()) == said


def test_the_output_stops_where_the_models_do_in_its_ids(family, tmp_path):
    outside = _only_tokenizer(family / "other", tmp_path / "outside")
    (family / "base" / "generation_config.json").write_text('{"eos_token_id": 3}')
    end = _ids(family / "chat")["<|im_end|>"]
    (family / "chat" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    spec = _spec(family, tokenizer={"source": str(outside)}, chat_template="auto")
    out = outliermerge.run(spec, output=tmp_path / "o").output
    ids = _ids(outside)
    found = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert found == [ids["[SEP]"], ids["<|im_end|>"]]


def test_no_weights_of_it_are_needed_or_read(family, tmp_path):
    outside = _only_tokenizer(family / "other", tmp_path / "outside")
    (outside / "model.safetensors").write_text("no weights at all")
    (outside / "notes.json").write_text("{}")
    plan = outliermerge.plan(_spec(family, tokenizer={"source": str(outside)}))
    read = {path.name for path, stamp in plan.files if stamp and path.is_relative_to(outside)}
    assert read == {"tokenizer.json", "tokenizer_config.json"}
    assert {s.name for s in plan.sidecars if s.path.parent == outside} == read


def test_another_path_to_a_merged_model_is_that_model(family, tmp_path, monkeypatch):
    monkeypatch.chdir(family)
    spec = {
        "merge_method": "linear",
        "models": [{"model": "base"}, {"model": "chat"}],
        "tokenizer": {"source": "./other/../chat"},
    }
    plan = outliermerge.plan(spec)
    assert plan.tokenizer is not None and plan.tokenizer.reference == "chat"


def test_a_recipe_finds_it_from_another_folder(family, tmp_path, monkeypatch):
    _only_tokenizer(family / "other", tmp_path / "outside")
    monkeypatch.chdir(family)
    spec = {
        "merge_method": "linear",
        "models": [{"model": "base"}, {"model": "chat"}],
        "tokenizer": {"source": "outside"},
    }
    first = outliermerge.run(spec, output=tmp_path / "first").output
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    again = [first / "recipe.yaml", first / "outliermerge.json"]
    for number, recipe in enumerate(again):
        second = outliermerge.run(recipe, output=tmp_path / f"again{number}").output
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes()
    assert yaml.safe_load(again[0].read_text())["tokenizer"]["source"] == str(tmp_path / "outside")


def test_an_output_does_not_replace_the_tokenizer_that_it_is_made_with(family, tmp_path):
    spec = _spec(family, tokenizer_source="base")
    first = outliermerge.run(spec, output=tmp_path / "first").output
    spec = _spec(family, tokenizer={"source": str(first)})
    with pytest.raises(OutlierMergeError, match=r"first: is or holds .*first/"):
        outliermerge.run(spec, output=first, overwrite=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "tokenizer: nothing has no tokenizer files that can be read"),
        ("bare/config.json", "tokenizer: HERE/bare/config.json: is a file, expected a folder"),
        ("./chta", "tokenizer.source: './chta' is none of the models, no other folder and no hub"),
        ("models/chta", "tokenizer: model 'models/chta': no such file or folder"),
    ],
)
def test_a_source_without_tokenizer_is_refused(family, monkeypatch, capsys, source, message):
    monkeypatch.chdir(family)
    save_model(family / "bare", "WordPiece", tokenizer=False)
    (family / "nothing").mkdir()
    (family / "models").mkdir()
    save_model(family / "models" / "chat", "WordPiece")
    Path("spec.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: base}}]\ntokenizer: {{source: {source}}}\n"
    )
    assert cli.main(["plan", "spec.yaml", "--no-load-check"]) in (1, 2)
    message = re.escape(message.replace("HERE", str(family)))
    assert re.match(rf"error: spec\.yaml:3:\d+: {message}", capsys.readouterr().err)


def test_beside_vocabulary_it_must_be_one_of_the_models(family, tmp_path):
    outside = _only_tokenizer(family / "other", tmp_path / "outside")
    spec = _spec(family, tokenizer_source=str(outside), vocabulary="base")
    with pytest.raises(OutlierMergeError, match=r"tokenizer_source: '.*' is none of the models"):
        outliermerge.plan(spec)


def test_of_the_hub_only_its_tokenizer_is_fetched(family, tmp_path):
    repo = tmp_path / "talks"
    shutil.copytree(family / "other", repo)
    (repo / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (repo / "README.md").write_text("words")
    (repo / "preprocessor_config.json").write_text("{}")
    spec = _spec(family, tokenizer={"source": "org/talks"})
    Path(tmp_path / "spec.json").write_text(json.dumps(spec))
    run = [sys.executable, "-m", "outliermerge", "run", str(tmp_path / "spec.json"),
           "--no-load-check", "--output"]  # fmt: skip
    with HubServer({"org/talks": repo}) as hub:
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(
            [*run, str(tmp_path / "o")], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert hub.fetched() == [
            "chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"
        ]  # fmt: skip
    recipe = yaml.safe_load((tmp_path / "o" / "recipe.yaml").read_text())
    assert recipe["tokenizer"]["source"] == f"org/talks@{commit_of(repo)}"
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*run, str(tmp_path / "p")], env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "p" / name).read_bytes()


# Rows without a token


@pytest.fixture
def padded_family(tmp_path) -> Path:
    save_model(tmp_path / "base", "WordPiece", spare=7)
    save_model(tmp_path / "chat", "WordPiece", added=["<x>", "<y>"], seed=1, spare=5)
    save_model(tmp_path / "long", "WordPiece", seed=2, spare=9)
    return tmp_path


def test_reserved_rows_of_the_tokenizers_model_stay(padded_family, tmp_path):
    root = padded_family
    spec = _spec(root, "chat", "long", tokenizer={"source": "base"})
    plan = outliermerge.plan(spec)
    assert plan.num_rows is not None and plan.tokenizer is not None
    assert [(m.kept, m.reserved) for m in plan.tokenizer.models] == [(7, 0), (5, 0), (7, 2)]
    assert any("fewer rows (2 of" in note for note in plan.notes)
    told = [(m["kept"], m["reserved"]) for m in plan.as_dict()["tokenizer"]["rows"]]
    assert told == [(7, 0), (5, 0), (7, 2)]
    out = outliermerge.run(spec, output=tmp_path / "o").output
    table, base, chat, long = (
        _table(f) for f in (out, root / "base", root / "chat", root / "long")
    )
    num_tokens = len(_ids(root / "base"))
    assert len(table) == len(base) == len(chat) == num_tokens + 7
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(base)
    for row in range(num_tokens, num_tokens + 7):
        is_token = row < num_tokens + 2  # of chat: its row is not for this one
        expected = base[row] + 0.5 * (long[row] - base[row])
        expected += 0 if is_token else 0.5 * (chat[row] - base[row])
        torch.testing.assert_close(table[row], expected, rtol=0, atol=1e-6)


def test_tokens_of_a_union_take_reserved_rows_and_the_others_stay(padded_family, tmp_path):
    root = padded_family
    out = outliermerge.run(_spec(root, tokenizer={}), output=tmp_path / "o").output
    table, base, chat = (_table(folder) for folder in (out, root / "base", root / "chat"))
    num_tokens = len(_ids(root / "base"))
    assert len(_ids(out)) == num_tokens + 2 and len(table) == len(base)
    torch.testing.assert_close(table[num_tokens], chat[num_tokens], rtol=0, atol=1e-6)
    middle = (base[num_tokens + 2 :] + chat[num_tokens + 2 :]) / 2
    torch.testing.assert_close(table[num_tokens + 2 :], middle, rtol=0, atol=1e-6)


def test_with_the_tokenizer_of_a_model_its_rows_are_the_outputs(padded_family, tmp_path):
    root = padded_family
    spec = _spec(root, "chat", "long", tokenizer={"source": str(root / "long")})
    out = outliermerge.run(spec, output=tmp_path / "o").output
    table, long = _table(out), _table(root / "long")
    assert len(table) == len(long)
    # Rows that the base lacks are those of the only model that has them.
    torch.testing.assert_close(table[-2:], long[-2:], rtol=0, atol=1e-6)


def test_models_with_one_tokenizer_and_reserved_rows_are_merged_as_they_are(tmp_path):
    for number, name in enumerate(("base", "chat")):
        save_model(tmp_path / name, "byte-level BPE", seed=number, spare=6)
    with_key = outliermerge.run(
        _spec(tmp_path, tokenizer_source="base"), output=tmp_path / "with"
    ).output
    without = outliermerge.run(_spec(tmp_path), output=tmp_path / "without").output
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (with_key / file).read_bytes() == (without / file).read_bytes()


def test_padding_comes_behind_reserved_rows(padded_family, tmp_path):
    spec = _spec(padded_family, tokenizer={"source": "base", "pad_to_multiple_of": 50})
    table = _table(outliermerge.run(spec, output=tmp_path / "o").output)
    own = len(_table(padded_family / "base"))
    assert len(table) == -(-own // 50) * 50 > own
    mean = table[:own].mean(0).expand(len(table) - own, -1)
    torch.testing.assert_close(table[own:], mean, rtol=0, atol=1e-6)


def test_rows_that_are_tokens_of_the_base_are_no_reserved_rows_of_another_tokenizer(tmp_path):
    save_model(tmp_path / "base", "WordPiece", spare=3)
    save_model(tmp_path / "chat", "WordPiece", seed=1, spare=3)
    small = _only_tokenizer(tmp_path / "base", tmp_path / "small")
    content = json.loads((small / "tokenizer.json").read_text())
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if i < 30}
    (small / "tokenizer.json").write_text(json.dumps(content))
    spec = _spec(tmp_path, tokenizer={"source": str(small)})
    assert outliermerge.plan(spec).num_rows == 30


# Tokenizers without a tokenizer.json


def _sentencepiece(folder: Path, **options: Any) -> None:
    corpus = [*30 * ["the quick brown fox jumps over the lazy dog"], *TEXTS.values()]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=file, model_type="bpe", vocab_size=400,
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>",
              "eos_token": "</s>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _with_rows(folder: Path, num_rows: int, seed: int) -> None:
    """Give a model's embeddings and head other random rows."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors |= {name: torch.randn(num_rows, 8, generator=generator) for name in (EMBEDDINGS, HEAD)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": num_rows}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def llamas(tmp_path) -> Path:
    """A base with only a tokenizer.model, and a model with its tokenizer.json and a token more."""
    for seed, name in enumerate(("base", "chat")):
        save_model(tmp_path / name, "BPE", tokenizer=False, seed=seed)
    _sentencepiece(tmp_path / "base")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    num = len(fast)
    fast.add_tokens(["<|im_end|>"], special_tokens=True)
    fast.save_pretrained(tmp_path / "chat")
    _with_rows(tmp_path / "base", num, 3)
    _with_rows(tmp_path / "chat", num + 1, 4)
    return tmp_path


def test_rows_of_a_tokenizer_model_are_matched_by_its_pieces(llamas, tmp_path):
    spec = _spec(llamas, tokenizer={"source": "base"})
    out = outliermerge.run(spec, output=tmp_path / "o").output
    assert (out / "tokenizer.model").read_bytes() == (
        llamas / "base" / "tokenizer.model"
    ).read_bytes()
    table, base, chat = (_table(folder) for folder in (out, llamas / "base", llamas / "chat"))
    in_base, in_chat = _ids(llamas / "base"), _ids(llamas / "chat")
    for token, id_ in in_base.items():
        expected = (base[id_] + chat[in_chat[token]]) / 2
        torch.testing.assert_close(table[id_], expected, rtol=0, atol=1e-6)
    assert len(table) == len(in_base) > 300


@pytest.mark.parametrize("name", ["base.tiktoken", "tokenizer.model"])
def test_rows_of_a_tiktoken_file_are_matched_by_the_bytes_of_tokens(name, tmp_path):
    save_model(tmp_path / "base", "byte-level BPE")
    save_model(tmp_path / "chat", "byte-level BPE", "other", seed=1)
    byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()}
    in_base, in_chat = _ids(tmp_path / "base"), _ids(tmp_path / "chat")
    lines = [
        b"%s %d\n" % (base64.b64encode(bytes(map(byte_of.__getitem__, token))), id_)
        for token, id_ in in_base.items()
    ]
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()
    (tmp_path / "base" / name).write_bytes(b"".join(lines))
    spec = _spec(tmp_path, tokenizer={"source": "base"})
    out = outliermerge.run(spec, output=tmp_path / "o", load_check=False).output
    assert (out / name).read_bytes() == b"".join(lines)
    table, base, chat = (_table(f) for f in (out, tmp_path / "base", tmp_path / "chat"))
    assert len(in_base.keys() & in_chat.keys()) > 256
    for token, id_ in in_base.items():
        theirs = chat[in_chat[token]] if token in in_chat else base[id_]
        torch.testing.assert_close(table[id_], (base[id_] + theirs) / 2, rtol=0, atol=1e-6)


def _follow(error: OutlierMergeError) -> None:
    """Do what a message says."""
    [command] = re.findall(r"AutoTokenizer\S+save_pretrained\(\S+'\)", str(error))
    eval(command, {"AutoTokenizer": transformers.AutoTokenizer})


@pytest.mark.parametrize("key", [{"tokenizer": {}}, {"vocabulary": "union"}])
def test_a_union_that_needs_a_tokenizer_json_says_how_it_is_made_and_then_works(
    llamas, tmp_path, key
):
    spec = _spec(llamas, **key)
    with pytest.raises(OutlierMergeError, match=r"has no tokenizer\.json") as caught:
        outliermerge.plan(spec)
    _follow(caught.value)
    out = outliermerge.run(spec, output=tmp_path / "o").output
    ids = _ids(out)
    assert "<|im_end|>" in ids
    torch.testing.assert_close(
        _table(out)[ids["<|im_end|>"]], _table(llamas / "chat")[ids["<|im_end|>"]],
        rtol=0, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["GPT-2", "BERT"])
def test_a_vocabulary_file_alone_is_told_the_same_way(kind, tmp_path):
    bare = "byte-level BPE" if kind == "GPT-2" else "WordPiece"
    save_model(tmp_path / "base", bare)
    save_model(tmp_path / "chat", bare, added=["<x>"], seed=1)
    path = tmp_path / "base" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.model.save(str(path.parent))
    path.unlink()
    ids = tokenizer.get_vocab()
    config = {"tokenizer_class": f"{kind.replace('-', '').title()}Tokenizer".replace("Gpt", "GPT")}
    if kind == "GPT-2":
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    spec = _spec(tmp_path, tokenizer={"source": "base"})
    plan = outliermerge.plan(spec)
    assert plan.tokenizer is not None and plan.tokenizer.num_tokens == len(ids)
    with pytest.raises(OutlierMergeError, match=r"has no tokenizer\.json: transformers") as caught:
        outliermerge.plan(spec | {"tokenizer": {}})
    _follow(caught.value)
    plan = outliermerge.plan(spec | {"tokenizer": {}})
    assert plan.tokenizer is not None and plan.tokenizer.num_tokens == len(ids) + 1
    assert plan.num_rows == len(ids) + 1


def test_what_is_in_the_hubs_cache_is_not_to_be_written_there():
    snapshot = Path("/cache/models--org--name/snapshots/0123")
    assert how_to_convert(snapshot).startswith("transformers makes the file, in a copy outside")
    assert how_to_convert(Path("/name")).startswith("transformers makes the file: Auto")


def test_a_donor_of_pieces_without_tokenizer_json_is_told(llamas, tmp_path):
    save_model(tmp_path / "new", "BPE", seed=5)
    spec = _spec(llamas, "base", tokenizer={}, base_model=str(tmp_path / "new"))
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    assert "base, which alone has" in str(caught.value)
    assert f"AutoTokenizer.from_pretrained('{llamas / 'base'}')" in str(caught.value)


# Files that would contradict the new tokenizer.json


def _with_model(llamas: Path) -> Path:
    """Make the base one that has both files."""
    base = llamas / "base"
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(base)
    assert (base / "tokenizer.model").exists()
    return base


@pytest.mark.parametrize("key", [{"tokenizer": {}}, {"vocabulary": "union"}])
def test_a_tokenizer_model_stays_if_the_files_beside_it_name_the_added_tokens(
    llamas, tmp_path, key
):
    base = _with_model(llamas)
    config = json.loads((base / "tokenizer_config.json").read_text())
    specials = {"0": "<unk>", "1": "<s>", "2": "</s>"}
    config["added_tokens_decoder"] = {
        i: {"content": t, "special": True} for i, t in specials.items()
    }
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    out = outliermerge.run(_spec(llamas, **key), output=tmp_path / "o").output
    ids = _ids(out)
    assert (out / "tokenizer.model").exists() and "<|im_end|>" in ids
    (out / "tokenizer.json").unlink()
    assert read_tokens(out) == {i: t for t, i in ids.items()}


@pytest.mark.parametrize("key", [{"tokenizer": {}}, {"vocabulary": "union"}])
def test_a_tokenizer_model_that_lacks_an_added_token_is_left_out_with_a_note(llamas, tmp_path, key):
    base = _with_model(llamas)
    for name in ("tokenizer.model.v3", "tekken.json", "base.tiktoken"):
        (base / name).write_text("{}")
    plan = outliermerge.plan(_spec(llamas, **key))
    gone = ["base.tiktoken", "tekken.json", "tokenizer.model", "tokenizer.model.v3"]
    note = f"as they lack 1 token of the output: {', '.join(gone)}"
    assert any(note in said for said in plan.notes)
    assert not {sidecar.name for sidecar in plan.sidecars} & set(gone)
    kept = outliermerge.plan(_spec(llamas, tokenizer={"source": "base"}))
    assert {sidecar.name for sidecar in kept.sidecars} >= set(gone)


# What is said


@pytest.mark.parametrize(
    "asked",
    [
        {"tokenizer": {"source": "union"}},
        {"tokenizer": {"source": "base"}},
        {"tokenizer_source": "CHAT"},
        {"vocabulary": "base"},
        {"vocabulary": "union"},
    ],
    ids=str,
)
def test_a_model_with_only_a_tekken_json_is_refused_by_name(asked, tmp_path):
    save_model(tmp_path / "base", "BPE")
    chat = save_model(tmp_path / "chat", "BPE", seed=1, spare=3, tokenizer=False)
    (chat / "tekken.json").write_text('{"config": {}, "vocab": []}')
    asked = {k: str(chat) if v == "CHAT" else v for k, v in asked.items()}
    with pytest.raises(OutlierMergeError) as error:
        outliermerge.plan(_spec(tmp_path, **asked))
    assert f"{chat} has only tekken.json of a tokenizer, whose tokens are not read" in str(
        error.value
    )
    assert how_to_convert(chat) in str(error.value)


def test_a_donor_with_only_a_tekken_json_is_refused_by_name(tmp_path):
    model = save_model(tmp_path / "base", "BPE")
    donor = save_model(tmp_path / "donor", "BPE", seed=1, tokenizer=False)
    (donor / "tekken.json").write_text('{"config": {}, "vocab": []}')
    with pytest.raises(OutlierMergeError, match=r"has only tekken\.json of a tokenizer"):
        outliermerge.transplant(model, donor, output=tmp_path / "out")


def test_models_with_only_a_tekken_json_are_merged_as_they_are(tmp_path):
    for seed, name in enumerate(("base", "chat")):
        folder = save_model(tmp_path / name, "BPE", seed=seed, tokenizer=False)
        (folder / "tekken.json").write_text('{"config": {}, "vocab": []}')
    out = outliermerge.run(_spec(tmp_path), output=tmp_path / "o", load_check=False).output
    assert (out / "tekken.json").is_file()


@pytest.mark.parametrize("template", ["chatml", "{{ messages[0].content }}"])
def test_a_template_of_models_without_tokenizer_is_noted(tmp_path, template):
    for number, name in enumerate(("base", "chat")):
        save_model(tmp_path / name, "WordPiece", seed=number, tokenizer=False)
    plan = outliermerge.plan(_spec(tmp_path, chat_template=template))
    assert any("base has no tokenizer, and so has the output" in note for note in plan.notes)
    save_model(tmp_path / "with", "WordPiece")
    plan = outliermerge.plan(_spec(tmp_path, "with", chat_template=template))
    assert any("base has no tokenizer, and so has the output" in note for note in plan.notes)
    plan = outliermerge.plan(
        _spec(tmp_path, chat_template=template, tokenizer_source=str(tmp_path / "with"))
    )
    assert not any("has no tokenizer, and so" in note for note in plan.notes)


def test_tokens_of_a_model_in_the_middle_of_slices_are_said_to_be_left_out(tmp_path):
    for seed, name in enumerate(("first", "middle")):
        added = ["<x>", "<y>"] if name == "middle" else []
        save_model(tmp_path / name, "WordPiece", added=added, seed=seed)
    parts = [
        {"model": str(tmp_path / n), "layer_range": [0, 1]} for n in ("first", "middle", "first")
    ]
    spec = {
        "merge_method": "passthrough",
        "slices": [{"sources": [part]} for part in parts],
        "tokenizer": {"source": "union"},
    }
    plan = outliermerge.plan(spec)
    said = f"2 tokens that only {tmp_path / 'middle'} has ('<x>', '<y>'): not in the union"
    assert any(note.startswith(said) for note in plan.notes)
    out = outliermerge.run(spec, output=tmp_path / "o").output
    assert _ids(out) == _ids(tmp_path / "first")
