"""What `tokenizer` makes of models with other tokenizers, against mergekit 0.1.5 itself."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity.both import assert_same_answers, logits_of
from safetensors.torch import load_file
from vocabularies import KINDS, TEXTS, save_family, save_model

import outliermerge

Merge = Callable[[dict[str, Any], Path], Path]
ROWS = ("model.embed_tokens.weight", "lm_head.weight")
CHAT, OTHER, OUTSIDE = "MODELS/chat", "MODELS/other", "MODELS/outside"
OF_CHAT = {"source": CHAT, "force": True}
FORMS: dict[str, dict[str, Any]] = {
    "source base": {"tokenizer_source": "base"},
    "source union": {"tokenizer_source": "union"},
    "source of a model": {"tokenizer_source": CHAT},
    "empty": {"tokenizer": {}},
    "base": {"tokenizer": {"source": "base"}},
    "a model": {"tokenizer": {"source": OTHER}},
    "a model that is not merged": {"tokenizer": {"source": OUTSIDE}},
    "padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
    "forced": {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<|im_end|>": OF_CHAT,
                "<x>": {
                    "source": {"kind": "model_token", "model": CHAT, "token_id": 7},
                    "force": True,
                },
            },
        }
    },
    "new": {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<new>": {"source": {"kind": "zero"}},
                "<copy>": {"source": {"kind": "model_token", "model": OTHER, "token": "<x>"}},
                "<|im_start|>": {"source": CHAT},
            },
        }
    },
    "its README's tokens": {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<|im_start|>": {"source": CHAT},
                "<|im_end|>": OF_CHAT,
                "<renamed>": {
                    "source": {"kind": "model_token", "model": OTHER, "token": "<x>"},
                },
                "<unused>": {"source": {"kind": "zero"}},
            },
        }
    },
    "its README's two formats of chats": {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<|im_start|>": {"source": CHAT},
                "<|im_end|>": {"source": CHAT},
                "<x>": {"source": OTHER, "force": True},
            },
        }
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "MODELS/base", "parameters": {"weight": 0.2}},
            {"model": CHAT, "parameters": {"weight": 0.5}},
            {"model": OTHER, "parameters": {"weight": 0.3}},
        ],
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "MODELS/base",
        "models": [
            {"model": CHAT, "parameters": {"weight": 0.5}},
            {"model": OTHER, "parameters": {"weight": 0.3}},
        ],
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "MODELS/base",
        "models": [
            {"model": CHAT, "parameters": {"weight": 0.5, "density": 0.7}},
            {"model": OTHER, "parameters": {"weight": 0.3, "density": 0.5}},
        ],
        "parameters": {"normalize": True},
    },
}


@pytest.fixture(scope="module")
def merge_by_mergekit() -> Merge:
    with warnings.catch_warnings():
        # Its lazy_unpickle.py names a private module of numpy that has been renamed.
        warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

    def merge(spec: dict[str, Any], folder: Path) -> Path:
        config = MergeConfiguration.model_validate(copy.deepcopy(spec))
        # In the order of the file, which mergekit leaves to the seed of Python's hashes.
        models = [*([config.base_model] if config.base_model else []),
                  *(entry.model for entry in config.models)]  # fmt: skip
        object.__setattr__(config, "referenced_models", lambda: models)
        run_merge(config, str(folder), MergeOptions(quiet=True, write_model_card=False))
        return folder

    return merge


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    found = {kind: save_family(root / kind.replace(" ", "-"), kind) for kind in KINDS}
    for kind, folder in found.items():
        save_model(folder / "outside", kind, "other", ["<y>", "<|im_end|>"], seed=3)
    return found


def _named(value: Any, root: Path) -> Any:
    if isinstance(value, dict):
        return {key: _named(entry, root) for key, entry in value.items()}
    if isinstance(value, list):
        return [_named(entry, root) for entry in value]
    return value.replace("MODELS", str(root)) if isinstance(value, str) else value


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_tokens_are_those_of_mergekit(
    kind, form, method, families, merge_by_mergekit, tmp_path, caplog
):
    caplog.set_level(logging.CRITICAL)
    spec = _named(METHODS[method] | FORMS[form] | {"dtype": "float32"}, families[kind])
    theirs = merge_by_mergekit(spec, tmp_path / "theirs")
    ours = outliermerge.run(spec, output=tmp_path / "ours", load_check=False).output

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours)
    their_ids, ids = their_tokenizer.get_vocab(), tokenizer.get_vocab()
    assert ids.keys() == their_ids.keys()
    assert sorted(ids.values()) == list(range(len(ids)))
    theirs_in, ours_in = (load_file(f / "model.safetensors") for f in (theirs, ours))
    assert theirs_in.keys() == ours_in.keys()
    order = sorted(ids)
    given = FORMS[form].get("tokenizer", {})
    source = FORMS[form].get("tokenizer_source") or given.get("source", "union")
    owner = source.removeprefix("MODELS/") if source in (CHAT, OTHER) else "base"
    own = load_file(families[kind] / owner / "model.safetensors")
    for name, expected in theirs_in.items():
        found = ours_in[name]
        if name in ROWS:  # mergekit leaves out rows without a token, which we keep
            is_reserved = source != OUTSIDE or len(own[name]) - 5 <= len(ids)
            assert len(found) == max(len(expected), len(own[name]) if is_reserved else 0)
            padding = found[len(ids) :], expected[len(ids) :]
            if (
                len(expected) > len(ids) and method != "ties"
            ):  # of elements that tie it keeps some, we all
                torch.testing.assert_close(*padding, rtol=1e-6, atol=2e-7)
            more = (len(found) - len(expected)) / len(expected)
            found = found[[ids[token] for token in order]]
            expected = expected[[their_ids[token] for token in order]]
            if more and method == "ties":  # the rows that stay are ranked with the others
                differ = (found - expected).abs() > 2e-7
                assert differ.double().mean() < 2 * more
                continue
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-7)
    has_pieces = "union" in str(FORMS[form]) or form == "empty"
    for text in [*TEXTS.values(), "a <|im_start|>user b<|im_end|>"]:
        if not has_pieces:  # mergekit makes added tokens of pieces, which we do not
            assert tokenizer.tokenize(text) == their_tokenizer.tokenize(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(ours)
    assert model.get_input_embeddings().weight.shape[0] >= len(ids)
    if method == "linear":  # the tensors are equal for all methods
        read = order[:: max(1, len(order) // 20)]
        answers = [
            logits_of(folder, [own[token] for token in read])[..., [own[token] for token in order]]
            for folder, own in ((ours, ids), (theirs, their_ids))
        ]
        assert_same_answers(*answers)


OWN = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
OF_TWO_MODELS = "{% for turn in messages %}[{{ turn.content }}]{% endfor %}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", ["auto", "chatml", OWN])
def test_chat_templates_are_those_of_mergekit(template, merge_by_mergekit, tmp_path):
    root = save_family(tmp_path / "family", "BPE")
    for name, own in (("base", OWN), ("chat", OF_TWO_MODELS), ("other", OF_TWO_MODELS)):
        path = root / name / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": own}))
    forms = {"tokenizer_source": "base", "chat_template": template, "dtype": "float32"}
    spec = _named(METHODS["task_arithmetic"] | forms, root)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        for folder in (
            merge_by_mergekit(spec, tmp_path / "theirs"),
            outliermerge.run(spec, output=tmp_path / "ours", load_check=False).output,
        )
    )
    assert ours == theirs
    assert ("[Why?][So.]" in ours) == (template == "auto")
