"""What a user is told of `tokenizer`, `tokenizer_source` and `chat_template` that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from vocabularies import save_model

from outliermerge.cli import main as cli
from outliermerge.spec.check import load_spec, parse_spec
from outliermerge.spec.schema import json_schema

HEAD = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: chat
  - model: bare
"""
ROW = HEAD + "tokenizer:\n  tokens:\n    <x>:\n      source: "
FORMS = "expected a model, {kind: zero}, or {kind: model_token, model: …, token: …}"
MODELS = "Valid: bare, base, chat"
BAD = {
    "unknown source": (
        HEAD + "tokenizer: {source: uniom}\n",
        "6:21: tokenizer.source: 'uniom' is none of the models, no other folder and no hub "
        "id. Did you mean 'union'?",
    ),
    "unknown model as source": (
        HEAD + "tokenizer_source: zzz\n",
        "6:19: tokenizer_source: 'zzz' is none of the models, no other folder and no hub id. "
        f"{MODELS}, union.",
    ),
    "a text for a mapping": (
        HEAD + "tokenizer: union\n",
        "6:12: tokenizer: found 'union', expected a mapping",
    ),
    "unknown key": (
        HEAD + "tokenizer: {sorce: base}\n",
        "6:13: tokenizer.sorce: unknown key 'sorce'. Did you mean 'source'?",
    ),
    "unknown key of a token": (
        HEAD + "tokenizer: {tokens: {<x>: {forse: true}}}\n",
        "6:28: tokenizer.tokens.<x>.forse: unknown key 'forse'. Did you mean 'force'?",
    ),
    "no multiple": (
        HEAD + "tokenizer: {pad_to_multiple_of: 0}\n",
        "6:33: tokenizer.pad_to_multiple_of: found 0, expected 1 or more",
    ),
    "a multiple that is no number": (
        HEAD + "tokenizer: {pad_to_multiple_of: many}\n",
        "6:33: tokenizer.pad_to_multiple_of: found 'many', expected a whole number",
    ),
    "force without source": (
        HEAD + "tokenizer: {tokens: {<x>: {force: true}}}\n",
        "6:28: tokenizer.tokens.<x>.force: it forces no row: `source` is missing, "
        + FORMS.removeprefix("expected "),
    ),
    "unknown model of a token": (
        ROW + "zzz\n",
        f"9:15: tokenizer.tokens.<x>.source: 'zzz' is none of the models. {MODELS}.",
    ),
    "a row of no kind": (
        ROW + "{model: chat}\n",
        f"9:15: tokenizer.tokens.<x>.source: found a mapping, {FORMS}",
    ),
    "a row of an unknown kind": (
        ROW + "{kind: mean}\n",
        f"9:15: tokenizer.tokens.<x>.source: found kind 'mean', {FORMS}",
    ),
    "unknown key of a row": (
        ROW + "{kind: zero, modle: chat}\n",
        "9:28: tokenizer.tokens.<x>.source.modle: unknown key 'modle'. Valid: kind.",
    ),
    "a row of neither": (
        ROW + "{kind: model_token, model: chat}\n",
        "9:15: tokenizer.tokens.<x>.source: found neither, expected `token` or `token_id`",
    ),
    "a row of both": (
        ROW + "{kind: model_token, model: chat, token: a, token_id: 3}\n",
        "9:15: tokenizer.tokens.<x>.source: found both, expected `token` or `token_id`",
    ),
    "a token that its model lacks": (
        ROW + "base\n",
        "9:15: tokenizer.tokens.<x>.source: base has no token '<x>'",
    ),
    "another token that its model lacks": (
        ROW + "{kind: model_token, model: chat, token: <y>}\n",
        "9:55: tokenizer.tokens.<x>.source.token: chat has no token '<y>'",
    ),
    "an id beyond the rows": (
        ROW + "{kind: model_token, model: chat, token_id: 9999}\n",
        "9:58: tokenizer.tokens.<x>.source.token_id: chat has ROWS rows, found 9,999",
    ),
    "a token that no model has": (
        HEAD + "tokenizer: {tokens: {<y>: {}}}\n",
        "6:22: tokenizer.tokens.<y>: no model has '<y>', so that `source` must say which row it "
        "gets",
    ),
    "both keys": (
        HEAD + "tokenizer: {}\ntokenizer_source: base\n",
        "7:1: tokenizer_source: `tokenizer` says which tokens and rows the output has, "
        "`tokenizer_source: base` says it as well: remove one of them",
    ),
    "beside vocabulary": (
        HEAD + "tokenizer: {}\nvocabulary: union\n",
        "7:1: vocabulary: `tokenizer` says which tokens and rows the output has, "
        "`vocabulary: union` says it as well: remove one of them",
    ),
    "union beside vocabulary": (
        HEAD + "tokenizer_source: union\nvocabulary: base\n",
        "7:1: vocabulary: `tokenizer_source: union` says which rows the output has, `vocabulary` "
        "says it as well: remove one of them",
    ),
    "a model without tokenizer": (
        HEAD + "tokenizer: {source: bare}\n",
        "6:12: tokenizer: bare has no tokenizer files that can be read",
    ),
    "unknown template": (
        HEAD + "chat_template: chatlm\n",
        "6:16: chat_template: 'chatlm' is no known format, and no Jinja template. Did you mean "
        "'chatml'?",
    ),
    "a template that is no Jinja": (
        HEAD + 'chat_template: "{% for turn in messages %}{{ turn.content }}"\n',
        "6:16: chat_template: inline: not valid Jinja: line 1: Unexpected end of template. Jinja "
        "was looking for the following tags: 'endfor' or 'else'. The innermost block that needs "
        "to be closed is 'for'.",
    ),
    "a template that fails": (
        HEAD + 'chat_template: "{{ messages.nothing.at_all }}"\n',
        "6:16: chat_template: inline: the template fails: 'list object' has no attribute "
        "'nothing' (tried with user, assistant, user)",
    ),
    "a template that writes nothing": (
        HEAD + 'chat_template: "{{ bos_token }} hello"\n',
        "6:16: chat_template: inline: the template does not write what the user says (tried with "
        "user, assistant, user)",
    ),
    "a template without end": (
        HEAD + 'chat_template: "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}'
        '{% endfor %}"\n',
        "6:16: chat_template: inline: it takes more than 5 s or too much memory for three turns",
    ),
    "a template that fills the memory": (
        HEAD + "chat_template: \"{{ 'a' * 9999999999 }}\"\n",
        "6:16: chat_template: inline: the template fails: MemoryError (tried with user, "
        "assistant, user)",
    ),
    "a template that leaves the sandbox": (
        HEAD + 'chat_template: "{{ messages.__class__.__mro__ }}"\n',
        "6:16: chat_template: inline: the template fails: access to attribute '__class__' of "
        "'list' object is unsafe. (tried with user, assistant, user)",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("specs")
    save_model(root / "base", "WordPiece")
    save_model(root / "chat", "WordPiece", added=["<x>"], seed=1)
    save_model(root / "bare", "WordPiece", seed=2, tokenizer=False)
    return root


@pytest.mark.parametrize("case", BAD)
@pytest.mark.sampled(2)
def test_a_bad_spec_is_refused_with_this_message(case, folder, capsys, monkeypatch):
    text, expected = BAD[case]
    monkeypatch.chdir(folder)
    template = "tokenizer_source: base\n" if "chat_template" in text else ""
    Path("spec.yaml").write_text(text + template, "utf-8")
    code = cli.main(["plan", "spec.yaml", "--no-load-check"])
    rows = json.loads(Path("chat/config.json").read_text())["vocab_size"]
    expected = expected.replace("ROWS", str(rows))
    assert (code, capsys.readouterr().err) == (2, f"error: spec.yaml:{expected}\n")


LENIENT = """\
tokenizer:
  sorce: base
  tokens:
    <x>:
      forse: true
      source: {kind: zero, modle: chat}
"""


def test_unknown_keys_that_mergekit_passes_over_are_warnings_when_read_leniently(
    folder, monkeypatch
):
    monkeypatch.chdir(folder)
    spec = parse_spec(HEAD + LENIENT, lenient=True)
    assert [warning.split(": ")[1] for warning in spec.warnings] == [
        "tokenizer.sorce", "tokenizer.tokens.<x>.forse", "tokenizer.tokens.<x>.source.modle"
    ]  # fmt: skip
    assert spec.tokenizer is not None and spec.tokenizer.source == "union"
    assert spec.as_dict()["tokenizer"] == {
        "source": "union", "tokens": {"<x>": {"source": {"kind": "zero"}}}
    }  # fmt: skip
    assert load_spec(spec.as_dict()).tokenizer == spec.tokenizer


def test_the_schema_takes_what_the_checks_take(folder):
    validator = jsonschema.Draft202012Validator(json_schema())
    good = [
        {},
        {"source": "chat", "pad_to_multiple_of": None, "tokens": None},
        {"tokens": {"<x>": {}, "<y>": {"source": {"kind": "zero"}, "force": True}}},
        {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "a", "token_id": 3}}}},
    ]
    bad = [
        {"pad_to_multiple_of": 0},
        {"tokens": {"<x>": {"source": {"kind": "mean"}}}},
        {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "a"}}}},
        {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "a", "token": "b",
                                       "token_id": 3}}}},
    ]  # fmt: skip
    spec = yaml.safe_load(HEAD)
    assert all(validator.is_valid(spec | {"tokenizer": value}) for value in good)
    assert not any(validator.is_valid(spec | {"tokenizer": value}) for value in bad)
