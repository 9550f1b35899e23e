"""T5, which ties three tensors to a fourth: stored once, or four times as older tools did."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import load_folder
from safetensors.torch import save_file

import outliermerge

COPIES = ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=40,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    stored = load_folder(tmp_path / "base")
    assert not set(COPIES) & set(stored)
    for name, whole in (("once", False), ("four times", True)):
        shutil.copytree(tmp_path / "base", tmp_path / name)
        moved = {key: value + 0.01 * torch.randn_like(value) for key, value in stored.items()}
        if whole:
            moved |= {copy: moved["shared.weight"].clone() for copy in COPIES}
        save_file(moved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    return {name: tmp_path / name for name in ("base", "once", "four times")}


@pytest.mark.parametrize(
    ("base", "tasks", "dropped"),
    [
        ("base", ("once", "four times"), COPIES),
        ("four times", ("once", "base"), ()),
    ],
)
def test_copies_are_left_out_or_follow_what_they_are_tied_to(
    base, tasks, dropped, models, tmp_path
):
    plan = outliermerge.plan(
        {
            "merge_method": "min_sigma",
            "base_model": str(models[base]),
            "models": [{"model": str(models[name])} for name in tasks],
        }
    )
    output = outliermerge.run(plan, output=tmp_path / "out").output

    merged = load_folder(output)
    assert plan.dropped == dropped
    assert merged.keys() == load_folder(models[base]).keys()
    assert all(torch.equal(merged[n], merged["shared.weight"]) for n in COPIES if n in merged)
    _, info = transformers.T5ForConditionalGeneration.from_pretrained(
        output, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
