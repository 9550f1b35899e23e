"""Ids in lists and tables of a generation config, and in nested configs, follow their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vocabularies import save_model

import outliermerge
from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.planning.nested_ids import moved

NEW = {3: 30, 4: 40, 5: 50}
FORMS: dict[str, tuple[str, Any, Any, int]] = {
    "words": ("bad_words_ids", [[3, 4], [9], [5]], [[30, 40], [50]], 1),
    "no word left": ("bad_words_ids", [[9]], None, 1),
    "forced words": ("force_words_ids", [[3], [4, 9]], [[30]], 1),
    "one of several": ("force_words_ids", [[[3], [9]], [[4]]], [[[30]], [[40]]], 1),
    "biased": ("sequence_bias", [[[3, 4], -2.5], [[9], 1.0]], [[[30, 40], -2.5]], 1),
    "biased, as a table of tuples": (
        "sequence_bias", {"(3, 4)": -2.5, "(5,)": 1.0, "(9,)": 1.0},
        {"(30, 40)": -2.5, "(50,)": 1.0}, 1,
    ),
    "biased, as a table of lists": ("sequence_bias", {"[3, 4]": 2.0}, {"[30, 40]": 2.0}, 0),
    "biased, as a table of ids": ("sequence_bias", {"5": 2.0}, {"50": 2.0}, 0),
    "forced at places": (
        "forced_decoder_ids", [[1, 3], [2, None], [3, 9]], [[1, 30], [2, None]], 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_ids_of_every_form_are_moved(form):
    key, value, wanted, num_lost = FORMS[form]
    assert moved(key, value, NEW) == (wanted, num_lost)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bad_words_ids", 3),
        ("bad_words_ids", [3, 4]),
        ("force_words_ids", [["a"]]),
        ("sequence_bias", {"a": 1.0}),
        ("sequence_bias", [[3, 1.0]]),
        ("sequence_bias", [[[3], 1.0, 2]]),
        ("forced_decoder_ids", [3]),
    ],
)
def test_other_forms_are_not_guessed(key, value):
    with pytest.raises(ValueError):
        moved(key, value, NEW)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a model with another tokenizer in which its special tokens have other ids."""
    base = save_model(tmp_path / "base", "BPE", added=["<a>", "<b>", "<gone>"])
    return base, save_model(tmp_path / "other", "BPE", added=["<x>", "<b>", "<a>"], seed=1)


def ids_of(folder: Path) -> dict[str, int]:
    return {token: id_ for id_, token in (read_tokens(folder) or {}).items()}


def merge(models: tuple[Path, Path], **more: Any) -> tuple[Path, list[str]]:
    base, other = map(str, models)
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": other}],
        "tokenizer": {"source": other},
        **more,
    }
    plan = outliermerge.plan(spec)
    out = outliermerge.run(plan, output=models[0].parent / "out", load_check=False).output
    return out, list(plan.notes)


def write(folder: Path, file: str = "generation_config.json", /, **values: Any) -> None:
    path = folder / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


def test_a_generation_config_gets_the_ids_of_its_tokens(models):
    ours, its = map(ids_of, models)
    a, b, gone = (ours[token] for token in ("<a>", "<b>", "<gone>"))
    new_a, new_b = its["<a>"], its["<b>"]
    assert {a, b} != {new_a, new_b} or a != new_a
    write(
        models[0],
        bad_words_ids=[[a], [gone]],
        force_words_ids=[[[a], [b]], [[b]]],
        sequence_bias=[[[a, b], -1.5]],
        suppress_tokens=[a, gone],
        begin_suppress_tokens=[b],
        forced_decoder_ids=[[1, b], [2, None]],
        max_new_tokens=20,
    )
    out, notes = merge(models)
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bad_words_ids": [[new_a]],
        "force_words_ids": [[[new_a], [new_b]], [[new_b]]],
        "sequence_bias": [[[new_a, new_b], -1.5]],
        "suppress_tokens": [new_a],
        "begin_suppress_tokens": [new_b],
        "forced_decoder_ids": [[1, new_b], [2, None]],
        "max_new_tokens": 20,
    }
    assert any("1 of the words in bad_words_ids are left out" in note for note in notes)


def test_what_was_not_moved_is_named(models):
    write(models[0], sequence_bias={"a b": 1.0}, lang_code_ids={"en": 300}, stop=[7])
    before = (models[0] / "generation_config.json").read_bytes()
    out, notes = merge(models)
    for key in ("sequence_bias", "lang_code_ids"):
        assert any(f": {key} stays as it is: ids of tokens in it" in note for note in notes)
    assert not any(" stop " in note for note in notes)
    assert (out / "generation_config.json").read_bytes() == before


def test_with_its_own_tokenizer_nothing_is_moved_or_said(models):
    write(models[0], bad_words_ids=[[9999]], sequence_bias={"a b": 1.0})
    before = (models[0] / "generation_config.json").read_bytes()
    out, notes = merge(models, tokenizer={"source": "base"})
    assert (out / "generation_config.json").read_bytes() == before
    assert not any("bad_words_ids" in note or "sequence_bias" in note for note in notes)


def nest(folder: Path, *keys: str) -> None:
    """Put keys of a config into its `text_config`, without values."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] = {key: config.pop(key) for key in keys}
    for key in [key for key in config if key.endswith("_token_id")]:
        del config[key]
    path.write_text(json.dumps(config))


def test_ids_that_a_nested_config_lacks_are_those_of_the_tokenizers_model(models):
    its = ids_of(models[1])
    nest(models[0], "vocab_size")
    write(models[1], "config.json", eos_token_id=[its["</s>"], its["<x>"]], pad_token_id=its["<x>"])
    out, _ = merge(models)
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] == [its["</s>"], its["<x>"]]
    assert config["text_config"]["pad_token_id"] == its["<x>"]
    assert "eos_token_id" not in config


def test_ids_that_one_level_has_are_not_written_to_another(models):
    ours, its = map(ids_of, models)
    nest(models[0], "vocab_size")
    write(models[0], "config.json", eos_token_id=ours["<a>"])
    write(models[1], "config.json", eos_token_id=its["<x>"])
    out, _ = merge(models)
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == its["<x>"] and "eos_token_id" not in config["text_config"]


def test_what_is_true_of_two_files_is_said_once(models):
    gone = ids_of(models[0])["<gone>"]
    for file in ("config.json", "generation_config.json"):
        write(models[0], file, eos_token_id=[2, gone])
    for file in ("config.json", "generation_config.json"):
        write(models[1], file, eos_token_id=None)
    _, notes = merge(models)
    said = [note for note in notes if "is no token of the output" in note]
    assert len(said) == 1 and said[0].startswith("config.json and generation_config.json of ")
