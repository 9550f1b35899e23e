"""An output ends its texts with the tokens with which the merged models end theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from vlm_replicas import save_vlm
from vocabularies import save_model

import outliermerge
from outliermerge.planning.moe import plan_mixture
from outliermerge.spec.moe import load_moe_spec

END = "<|im_end|>"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base, a chat model that ends with a token of its own, and a model that ends as the base."""
    save_model(tmp_path / "base", "BPE", added=[END])
    for name in ("chat", "maths"):
        save_model(tmp_path / name, "BPE", added=[END], seed=1)
    for name in ("base", "chat", "maths"):
        write(tmp_path / name, eos_token_id=2)
    write(tmp_path / "chat", eos_token_id=[id_of(tmp_path / "chat"), 2])
    return tmp_path


def write(folder: Path, **values: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def id_of(folder: Path, token: str = END) -> int:
    entries = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return next(entry["id"] for entry in entries if entry["content"] == token)


def merge(folder: Path, **more: Any) -> tuple[dict[str, Any], str]:
    """Return the output's generation config, and the notes on how texts end."""
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in ("chat", "maths")],
        **more,
    }
    planned = outliermerge.plan(spec)
    out = folder / "out"
    outliermerge.run(planned, output=out, overwrite=out.exists())
    said = "\n".join(note for note in planned.notes if "ends its texts" in note)
    path = out / "generation_config.json"
    return json.loads(path.read_text()) if path.exists() else {}, said


def test_the_end_of_a_turn_is_added_behind_the_bases(models):
    found, said = merge(models)
    assert found == {"eos_token_id": [2, id_of(models / "base")]}
    assert said == (
        f"{models / 'chat'} ends its texts with '{END}': the output stops there, too "
        f"(eos_token_id {id_of(models / 'base')} in generation_config.json)"
    )


def test_a_tokenizer_may_say_it_alone(models):
    write(models / "chat", eos_token_id=2)
    path = models / "chat" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": END}))
    assert merge(models)[0] == {"eos_token_id": [2, id_of(models / "base")]}


def test_models_that_end_as_the_base_change_nothing(models):
    write(models / "chat", eos_token_id=2)
    before = (models / "base" / "generation_config.json").read_bytes()
    assert merge(models)[1] == ""
    assert (models / "out" / "generation_config.json").read_bytes() == before


def test_a_config_that_is_asked_for_stays(models):
    before = (models / "base" / "generation_config.json").read_bytes()
    _, said = merge(models, config_source=str(models / "maths"))
    assert "the output may not stop there. Another `config_source` brings its own" in said
    assert (models / "out" / "generation_config.json").read_bytes() == before
    assert merge(models, config_source=str(models / "chat")) == (
        {"eos_token_id": [id_of(models / "base"), 2]}, "",
    )  # fmt: skip


def test_without_a_generation_config_it_is_a_note(models):
    (models / "base" / "generation_config.json").unlink()
    found, said = merge(models)
    assert found == {} and "which config.json of" in said and "may not stop there" in said


@pytest.mark.parametrize("source", ["base", "union", "chat"])
def test_ids_follow_their_tokens(source, models):
    """Only the chat model has the token, and the tokenizer of the spec says what becomes of it."""
    for seed, (name, added) in enumerate({"base": [], "maths": ["<x>"]}.items(), start=2):
        shutil.rmtree(models / name)
        save_model(models / name, "BPE", added=added, seed=seed)
        write(models / name, eos_token_id=2)
    named = str(models / "chat") if source == "chat" else source
    found, said = merge(models, tokenizer_source=named)
    if source == "base":
        assert found == {"eos_token_id": 2}
        assert "which the output's tokenizer does not have" in said
    elif source == "union":
        assert found == {"eos_token_id": [2, id_of(models / "out")]}
        assert "the output stops there, too" in said
    else:  # whose tokenizer it is, its ids are taken
        assert found == {"eos_token_id": [id_of(models / "chat"), 2]} and said == ""


def test_a_token_that_no_union_can_keep_is_not_said_to_be_kept_by_one(models):
    shutil.rmtree(models / "chat")
    save_model(models / "chat", "Unigram", added=[END], seed=1)
    write(models / "chat", eos_token_id=id_of(models / "chat"))
    for name in ("base", "maths"):
        shutil.rmtree(models / name)
        save_model(models / name, "BPE")
        write(models / name, eos_token_id=2)
    _, said = merge(models, tokenizer={"source": "base"})
    assert "`outliermerge tokenizer transplant MODEL DONOR` gives a model" in said
    assert "as tokenizers of different kinds (BPE, Unigram) have no union" in said
    assert "tokenizer_source: union" not in said


# Modules and mixtures


def test_modules_end_their_texts_as_their_models(models):
    part = {"merge_method": "linear", "models": [
        {"model": str(models / name), "parameters": {"weight": 0.5}} for name in ("base", "chat")
    ]}  # fmt: skip
    spec = {"base_model": str(models / "base"), "modules": {"default": part}}
    plan = outliermerge.plan(spec)
    out = outliermerge.run(plan, output=models / "out").output
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {"eos_token_id": [2, id_of(models / "base")]}
    said = [note for note in plan.notes if "ends its texts" in note]
    assert len(said) == 1 and said[0].startswith(f"{models / 'chat'} ends its texts with '{END}'")


@pytest.mark.parametrize(("part", "ends"), [("text", [3, 4]), ("vision", 3)])
def test_only_modules_that_write_texts_say_how_these_end(part, ends, tmp_path):
    words = {f"w{number}": number for number in range(40)}
    for seed, name in enumerate(("base", "chat"), start=1):
        save_vlm(tmp_path / name, seed=seed)
        tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        write(tmp_path / name, eos_token_id=2 + seed)
    entries = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in
               ("base", "chat")]  # fmt: skip
    merged = {"merge_method": "linear", "models": entries}
    spec = {"base_model": str(tmp_path / "base"), "modules": {part: merged}}
    out = outliermerge.run(spec, output=tmp_path / "out", load_check=False).output
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": ends}


def test_a_mixture_ends_its_texts_as_its_experts(models):
    spec = {
        "base_model": str(models / "base"),
        "gate_mode": "random",
        "experts": [{"source_model": str(models / name)} for name in ("chat", "maths")],
    }
    out = outliermerge.moe(spec, output=models / "out", load_check=False).run.output
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {"eos_token_id": [2, id_of(models / "base")]}
    save_model(models / "new", "BPE", added=[END, "<new>"], seed=3)
    write(models / "new", eos_token_id=id_of(models / "new", "<new>"))
    spec["experts"].append({"source_model": str(models / "new")})
    said = "\n".join(plan_mixture(load_moe_spec(spec)).plan.notes)
    assert "a `base_model` that has the token keeps it" in said and "union" not in said
