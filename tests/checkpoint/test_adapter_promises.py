"""What an adapter's config says was trained is in its file, and has the scale of its training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors
from safetensors.torch import save_file

import outliermerge
from outliermerge.errors import OutlierMergeError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]


def base_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [*LAYERS, "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    tensors = {f"{n}.weight": torch.randn(8, 6, generator=generator) for n in names}
    return tensors | {
        "model.embed_tokens.weight": torch.randn(10, 6, generator=generator),
        "lm_head.weight": torch.randn(10, 6, generator=generator),
        "model.norm.weight": torch.randn(6, generator=generator),
    }


def factors(names: list[str], rank: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name in names:
        found[f"{name}.lora_A.weight"] = torch.randn(rank, 6, generator=generator)
        found[f"{name}.lora_B.weight"] = torch.randn(8, rank, generator=generator)
    return found


def make(folder: Path, stored: dict[str, torch.Tensor], **config: Any) -> Path:
    save_tensors(folder / "base", base_tensors())
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(stored, adapter / WEIGHTS)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]} | config
    (adapter / CONFIG).write_text(json.dumps(said))
    return adapter


def spec_of(folder: Path, **entry: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "adapter")} | entry],
    }


def refused(folder: Path, **entry: Any) -> str:
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec_of(folder, **entry))
    return str(caught.value)


PREFIX = {"from": "^", "to": "model."}
NAMES = {
    "as in training": (lambda name: f"base_model.model.{name}", None),
    "without a prefix": (lambda name: name, None),
    "in ddp": (
        lambda name: f"module.base_model.model.{name}",
        [{"from": "^module.base_model.model.", "to": ""}],
    ),
    "in fsdp": (
        lambda name: "base_model.model." + re.sub(r"(layers.\d)", r"\1._fsdp_wrapped_module", name),
        [{"from": r"_fsdp_wrapped_module\.", "to": ""}],
    ),
    "compiled inside": (
        lambda name: "base_model.model." + name.replace("self_attn.", "self_attn._orig_mod."),
        [{"from": r"_orig_mod\.", "to": ""}],
    ),
    "of the inner model": (
        lambda name: "base_model.model." + name.removeprefix("model."), [PREFIX]),
    "in another layout": (
        lambda name: f"base_model.model.{name}".replace("self_attn", "attn"),
        [{"from": r"\.attn\.", "to": ".self_attn."}],
    ),
}  # fmt: skip
PATTERNS = {
    "the full name": r"model.layers.1.self_attn.q_proj",
    "anchored": r"^model\.layers\.1\.self_attn\.q_proj",
    "the end": r"layers.1.self_attn.q_proj",
    "an expression": r".*\.1\..*q_proj",
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("names", NAMES)
def test_a_pattern_gives_its_scale_under_any_names(names, pattern, tmp_path):
    change, rename = NAMES[names]
    stored = factors(LAYERS)
    make(
        tmp_path,
        {change(name): tensor for name, tensor in stored.items()},
        alpha_pattern={PATTERNS[pattern]: 16},
    )
    spec = spec_of(tmp_path, **({"rename": rename} if rename else {}))
    merged = load_folder(outliermerge.run(spec, output=tmp_path / "out").output)
    for layer, alpha in zip(LAYERS, (2, 16), strict=True):
        a, b = (stored[f"{layer}.lora_{x}.weight"].double() for x in "AB")
        expected = base_tensors()[f"{layer}.weight"].double() + alpha / 2 * (b @ a)
        torch.testing.assert_close(
            merged[f"{layer}.weight"].double(), expected, rtol=2e-6, atol=2e-6
        )


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["k_proj", "model.layer.1.self_attn.q_proj", "^layers.0"])
def test_a_pattern_that_matches_no_layer_is_refused_by_name(pattern, key, tmp_path):
    adapter = make(tmp_path, factors(LAYERS), **{key: {"q_proj": 2, pattern: 2}})
    message = refused(tmp_path)
    assert str(adapter / WEIGHTS) in message
    assert f"{CONFIG}: {key}: {pattern!r} matches none of the 2 layers" in message
    for layer in LAYERS:
        assert layer in message


def test_targets_of_which_the_file_holds_nothing_are_noted(tmp_path):
    make(tmp_path, factors(LAYERS), target_modules=["q_proj", "up_proj", "of_no_model"])
    notes = outliermerge.plan(spec_of(tmp_path)).notes
    assert any("names up_proj among its target_modules" in note for note in notes)
    make_again = tmp_path / "again"
    make(make_again, factors(LAYERS), target_modules=["q_proj"])
    assert not any(
        "target_modules" in note for note in outliermerge.plan(spec_of(make_again)).notes
    )


@pytest.mark.parametrize(
    ("named", "held", "lost"),
    [
        (["lm_head"], [], "lm_head"),
        (["norm"], [], "norm"),
        (["norm", "lm_head"], ["lm_head"], "norm"),
        (["score"], [], "score"),
        (["classifier", "score"], ["score"], None),  # peft names both for any classifier
        (["lm_head"], ["lm_head"], None),
        (["embed_tokens", "lm_head"], ["embed_tokens"], None),  # may be tied
        (["model.norm"], ["norm"], None),
    ],
)
def test_modules_that_were_saved_are_in_the_file(named, held, lost, tmp_path):
    wholes = {
        "lm_head": {"lm_head.weight": torch.ones(10, 6)},
        "norm": {"model.norm.weight": torch.ones(6)},
        "score": {"score.weight": torch.ones(3, 6)},
        "embed_tokens": {"model.embed_tokens.weight": torch.ones(10, 6)},
    }
    stored = factors(LAYERS)
    for name in held:
        stored |= wholes[name]
    make(tmp_path, stored, modules_to_save=named)
    if lost:
        message = refused(tmp_path)
        assert f"modules_to_save names {lost!r}, which was trained, but the file holds" in message
    else:
        outliermerge.plan(spec_of(tmp_path) | {"extra": [{"filter": "score", "value": "copy"}]}
                          if held == ["score"] else spec_of(tmp_path))  # fmt: skip


@pytest.mark.parametrize(
    ("said", "held", "message"),
    [
        ({"embed_tokens": [1, 2]}, ["model.embed_tokens"], None),
        ([1, 2], ["model.embed_tokens"], None),
        ([1, 2], [], "but the file holds no row of them"),
        ({"embed": [1, 2]}, ["model.embed_tokens"], "'embed' matches no layer"),
        ({"embed_tokens": [1, 2], "lm_head": [1, 2]}, ["model.embed_tokens"], None),
        ({"embed_tokens": [1, 2], "lm_head": [3]}, ["model.embed_tokens"], "'lm_head' matches no"),
        ({"embed_tokens": [1, 2]}, [], "'embed_tokens' matches no layer"),
    ],
)
def test_trained_tokens_are_in_the_file(said, held, message, tmp_path):
    stored = factors(LAYERS) | {
        f"{name}.token_adapter.trainable_tokens_delta": torch.ones(2, 6) for name in held
    }
    make(tmp_path, stored, trainable_token_indices=said)
    if message is None:
        outliermerge.plan(spec_of(tmp_path))
    else:
        assert message in refused(tmp_path)


@pytest.mark.parametrize("key", ["alora_invocation_tokens", "arrow_config", "layer_replication"])
def test_settings_that_peft_cannot_merge_get_no_advice_to_do_so(key, tmp_path):
    make(tmp_path, factors(LAYERS), **{key: [[0, 1]]})
    message = refused(tmp_path)
    assert "it has no merged form" in message and "merge_and_unload" not in message
