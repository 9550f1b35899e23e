"""A tensor with a column for every token is aligned like one with a row for every token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import load_folder
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import outliermerge
from outliermerge.errors import OutlierMergeError

EMBEDDINGS = "model.shared.weight"
SHAPES = {"final_logits_bias": (1, -1), "output_bias": (1, 1, -1), "kernel": (3, -1)}
WORDS = [f"word{number}" for number in range(8)]


def save(folder: Path, tokens: list[str], padding: int, name: str, seed: int) -> None:
    """Save embeddings, and a tensor that has the same numbers along its last axis."""
    rows = len(tokens) + padding
    folder.mkdir()
    embeddings = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    columns = embeddings.T if name == "kernel" else embeddings[:, 0]
    tensors = {EMBEDDINGS: embeddings, name: columns.reshape(*SHAPES[name][:-1], rows).contiguous()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bart", "vocab_size": rows}))
    ids = {token: id_ for id_, token in enumerate(tokens) if token in WORDS}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=WORDS[0]))
    tokenizer.add_special_tokens([token for token in tokens if token not in WORDS])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("policy", ["base", "common", "union"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "tokens, padding",
    [([*WORDS, "<a>", "<b>"], 0), ([*WORDS, "<a>"], 5), (WORDS[::-1], 0)],
    ids=["more", "padded", "reordered"],
)
def test_columns_go_where_the_rows_go(tmp_path, policy, name, tokens, padding):
    save(tmp_path / "base", WORDS, 0, name, 0)
    save(tmp_path / "a", tokens, padding, name, 1)
    save(tmp_path / "b", [*WORDS, "<b>"], 0, name, 2)
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "vocabulary": policy,
        "models": [{"model": str(tmp_path / n), "parameters": {"weight": 0.4}} for n in "ab"],
    }
    merged = load_folder(outliermerge.run(spec, output=tmp_path / "out").output)
    expected = merged[EMBEDDINGS].T if name == "kernel" else merged[EMBEDDINGS][:, 0]
    torch.testing.assert_close(merged[name], expected.reshape(*SHAPES[name][:-1], -1))


@pytest.mark.parametrize("name", SHAPES)
def test_columns_that_differ_are_refused_without_a_policy(tmp_path, name):
    save(tmp_path / "base", WORDS, 0, name, 0)
    save(tmp_path / "a", [*WORDS, "<a>"], 0, name, 1)
    models = [{"model": str(tmp_path / n)} for n in ("base", "a")]
    with pytest.raises(OutlierMergeError, match="vocabularies differ"):
        outliermerge.plan({"merge_method": "linear", "models": models})


@pytest.mark.parametrize("name", ["output_bias", "kernel"])
def test_columns_of_no_known_name_that_only_have_the_number_of_tokens_are_unclear(tmp_path, name):
    save(tmp_path / "base", WORDS, 0, name, 0)
    save(tmp_path / "a", WORDS[::-1], 0, name, 1)
    models = [{"model": str(tmp_path / n)} for n in ("base", "a")]
    spec = {"merge_method": "linear", "models": models, "vocabulary": "base"}
    with pytest.raises(OutlierMergeError, match=f"unclear.*\n  {name}"):
        outliermerge.plan(spec)
