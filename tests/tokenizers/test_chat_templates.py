"""`chat_template` in a spec: which one the output has, where it is written, and what is tried."""

from __future__ import annotations

import importlib.resources
import json
import warnings
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import transformers
from vocabularies import save_model

import outliermerge
from outliermerge.optional import is_installed
from outliermerge.planning import chat_templates
from outliermerge.spec.chat_templates import TEMPLATES

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which one?"},
    {"role": "assistant", "content": "The second."},
    {"role": "user", "content": "Why?"},
]
# What the models of these formats were trained on, by their cards.
WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich one?<|im_end|>\n"
    "<|im_start|>assistant\nThe second.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhich one?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nThe second.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nWhich one? [/INST] The second.</s> [INST] Why? [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nWhich one?\n\n### Response:\nThe second.\n\n"
    "### Instruction:\nWhy?\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Which one?\n"
    "[|assistant|]The second.[|endofturn|]\n[|user|]Why?\n[|assistant|]",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nWhich one?<end_of_turn>\n"
    "<start_of_turn>model\nThe second.<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n"
    "<start_of_turn>model\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nWhich one?<|end|>\n"
    "<|assistant|>\nThe second.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nWhich one?</s>\n"
    "<|assistant|>\nThe second.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
    "vicuna": "<s>Be brief. USER: Which one? ASSISTANT: The second.</s>USER: Why? ASSISTANT:",
}
NO_SYSTEM = (
    "{{ raise_exception('no system') if messages[0].role == 'system' }}"
    "{% for turn in messages %}{{ turn.content }}{% endfor %}{{ tools | tojson }}"
)


@pytest.fixture
def models(tmp_path) -> Path:
    for number, name in enumerate(("base", "a", "b")):
        save_model(tmp_path / name, "BPE", seed=number)
    return tmp_path


def _spec(root: Path, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / "a")}, {"model": str(root / "b")}],
    } | keys


def _set(folder: Path, template: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def _written(folder: Path, **values: Any) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=True, **values
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_writes_its_format(name, models, tmp_path):
    out = outliermerge.run(_spec(models, chat_template=name), output=tmp_path / "o").output
    assert _written(out) == WRITTEN[name]


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_named_templates_of_mergekit_write_the_same(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
        from mergekit._data import chat_templates as theirs
    text = importlib.resources.files(theirs).joinpath(f"{name}.jinja").read_text()
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    values = {"messages": TURNS, "add_generation_prompt": True, "bos_token": "<s>",
              "eos_token": "</s>"}  # fmt: skip
    ours = environment.from_string(TEMPLATES[name]).render(values)
    assert environment.from_string(text).render(values) == ours


def test_auto_takes_the_template_that_most_models_have(models, tmp_path):
    _set(models / "base", "{% for t in messages %}<{{ t.content }}>{% endfor %}")
    common = "{% for t in messages %}[{{ t.content }}]{% endfor %}"
    _set(models / "a", f" {common}\n")
    _set(models / "b", [{"name": "rag", "template": "x"}, {"name": "default", "template": common}])
    plan = outliermerge.plan(_spec(models, chat_template="auto"))
    assert plan.chat_template is not None
    assert plan.chat_template.models == (str(models / "a"), str(models / "b"))
    assert plan.chat_template.others == (str(models / "base"),)
    [note] = [note for note in plan.notes if "chat templates differ" in note]
    assert f"  {models}/a, {models}/b: one of " in note and f"  {models}/base: one of " in note
    out = outliermerge.run(_spec(models, chat_template="auto"), output=tmp_path / "o").output
    assert _written(out) == "[Be brief.][Which one?][The second.][Why?]"


def test_auto_without_templates_sets_none(models):
    plan = outliermerge.plan(_spec(models, chat_template="auto"))
    assert plan.chat_template is None
    assert any("no model has a chat template" in note for note in plan.notes)


def test_without_the_key_the_template_comes_with_the_tokenizer(models, tmp_path):
    _set(models / "base", "{{ 'of the base' }}")
    _set(models / "a", "{{ 'of a' }}")
    plan = outliermerge.plan(_spec(models))
    assert plan.chat_template is None
    assert any("chat template: differs between" in note for note in plan.notes)
    out = outliermerge.run(_spec(models, tokenizer_source=str(models / "a")),
                           output=tmp_path / "o").output  # fmt: skip
    assert _written(out) == "of a"


@pytest.mark.parametrize("place", ["config", "list", "jinja", "both", "json", "none"])
def test_it_is_written_where_the_base_has_one(models, tmp_path, place):
    base = models / "base"
    if place in ("config", "both"):
        _set(base, "old")
    if place == "list":
        _set(base, [{"name": "default", "template": "old"}, {"name": "rag", "template": "rag"}])
    if place in ("jinja", "both"):
        (base / "chat_template.jinja").write_text("old")
    if place == "json":
        (base / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    out = outliermerge.run(_spec(models, chat_template="chatml"), output=tmp_path / "o").output
    names = {path.name for path in out.iterdir() if path.name.startswith("chat_template")}
    assert names == {"jinja": {"chat_template.jinja"}, "both": {"chat_template.jinja"},
                     "json": {"chat_template.json"}}.get(place, set())  # fmt: skip
    texts = [(out / name).read_text() for name in (*names, "tokenizer_config.json")]
    assert not any('"old"' in text or text == "old" for text in texts)
    assert _written(out) == WRITTEN["chatml"]
    if place == "list":
        assert _written(out, chat_template="rag") == "rag"
    assert outliermerge.verify(out) == []


def test_a_trial_says_what_the_template_takes(models):
    for text, takes in {
        "chatml": "takes a system turn, passes over tools",
        NO_SYSTEM: "refuses a system turn (no system), takes tools",
        "{% for turn in messages if turn.role != 'system' %}{{ turn.content }}{% endfor %}":
            "passes over a system turn, passes over tools",
        "{% for turn in messages %}{% generation %}{{ turn.content }}{% endgeneration %}"
        "{% break %}{% endfor %}{{ strftime_now('%Y') }}": "takes a system turn, passes over tools",
        "{% for turn in messages %}{{ turn.content[0].text }}{% endfor %}":
            "takes a system turn, passes over tools",
    }.items():  # fmt: skip
        plan = outliermerge.plan(_spec(models, chat_template=text))
        assert plan.chat_template is not None
        assert plan.chat_template.takes == takes, text


def test_what_it_writes_and_the_tokenizer_lacks_is_noted(models):
    notes = outliermerge.plan(_spec(models, chat_template="chatml")).notes
    assert any("it writes '<|im_start|>', '<|im_end|>', for which" in note for note in notes)
    tokens = {token: {"source": {"kind": "zero"}} for token in ("<|im_start|>", "<|im_end|>")}
    added = _spec(models, chat_template="chatml", tokenizer={"source": "base", "tokens": tokens})
    assert not any("it writes" in note for note in outliermerge.plan(added).notes)


def test_without_jinja_it_is_written_and_a_note_says_so(models, tmp_path, monkeypatch):
    monkeypatch.setattr(
        chat_templates, "is_installed", lambda name: name != "jinja2" and is_installed(name)
    )
    plan = outliermerge.plan(_spec(models, chat_template="chatml"))
    assert any("not tried, as Jinja2 is not installed" in note for note in plan.notes)
    assert plan.chat_template is not None and plan.chat_template.takes == ""
