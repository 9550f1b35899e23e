"""Small merges of slices, stages, modules, tokenizers and experts, for tests that try each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

KINDS = ("slices", "stages", "modules", "tokenizer", "moe")
# What a mixture of Llamas imports where its routers are made of prompts.
IMPORTED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)
STAGE = "skills"
WORDS = ("<unk>", "<s>", "</s>", "code", "python", "math", "sum", "story")
ADDED = "<|note|>"
MODELS = ("base", "one", "told")
NUM_LAYERS, WIDTH, WIDE = 2, 8, 12
PARTS = {
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH // 2, WIDTH),
    "self_attn.v_proj": (WIDTH // 2, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDE, WIDTH),
    "mlp.up_proj": (WIDE, WIDTH),
    "mlp.down_proj": (WIDTH, WIDE),
}


def save_models(root: Path) -> None:
    """Save Llamas of two layers: a base, one like it, and one with a token more."""
    root.mkdir()
    for seed, name in enumerate(MODELS):
        save_llama(root / name, seed=seed, added=[ADDED] if name == "told" else [])


def save_llama(folder: Path, *, seed: int, added: Sequence[str] = ()) -> None:
    """Save a Llama with a tokenizer of words."""
    folder.mkdir()
    rows = len(WORDS) + len(added)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": WIDTH,
        "intermediate_size": WIDE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": rows,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (rows, WIDTH), "model.norm": (WIDTH,), "lm_head": (rows, WIDTH)}
    for layer in range(NUM_LAYERS):
        shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in PARTS.items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    entries = [(id_, WORDS[id_]) for id_ in (0, 1, 2)]
    entries += [(len(WORDS) + place, token) for place, token in enumerate(added)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(entries)))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | special))


def tokenizer_json(added: Sequence[tuple[int, str]] = (), **changes: Any) -> dict[str, Any]:
    """Return what a tokenizer.json of words holds, with added tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, "special": True} | flags for i, t in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: id_ for id_, word in enumerate(WORDS)},
            "unk_token": "<unk>",
        },
    } | changes


def spec(kind: str, root: Path, weight: float = 0.5, gate_mode: str = "random") -> dict[str, Any]:
    """Return a merge of the models in a folder.

    Args:
        weight: another one gives other bytes.
        gate_mode: of experts; `random` does not need transformers.
    """
    base, one, told = (str(root / name) for name in MODELS)
    task: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "parameters": {"weight": weight},
    }
    slices = [{"sources": [{"model": one, "layer_range": each}]} for each in ([0, 2], [1, 2])]
    if kind == "slices":
        return task | {"slices": slices}
    if kind == "stages":  # the stage's config is not its base's, so that a copy of it is kept
        inner = {"name": STAGE, "merge_method": "ties", "base_model": base, "slices": slices}
        inner |= {"parameters": {"density": 0.5}}
        sources = [
            {"model": STAGE, "layer_range": [1, 3], "parameters": {"weight": weight}},
            {"model": one, "layer_range": [0, 2], "parameters": {"weight": 1.0}},
        ]
        return {"stages": [inner], "merge_method": "linear", "slices": [{"sources": sources}]}
    if kind == "modules":
        first = {"models": [{"model": one}]}
        second = {"merge_method": "linear", "models": [{"model": base}, {"model": one}]}
        return task | {"modules": {"model.layers.0": first, "model.layers.1": second}}
    if kind == "tokenizer":
        return task | {"models": [{"model": told}], "tokenizer": {"source": "union"}}
    experts = [
        {"source_model": one, "positive_prompts": ["code python"], "noise_scale": weight},
        {"source_model": base, "positive_prompts": ["math sum"], "negative_prompts": ["story"]},
    ]
    return {"base_model": base, "gate_mode": gate_mode, "experts": experts}


def save_specs(folder: Path, models: Path, *, start: str = "", end: str = "", **more: Any) -> None:
    """Write a file for each kind: KIND.yaml, with something before and after the kind if wanted."""
    for kind in KINDS:
        text = yaml.safe_dump(spec(kind, models, **more))
        (folder / f"{start}{kind}{end}.yaml").write_text(text)


def command(kind: str) -> str:
    """Return the command that a file of a kind is for."""
    return "moe" if kind == "moe" else "run"
