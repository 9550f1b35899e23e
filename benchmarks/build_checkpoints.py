"""Checkpoints of real shapes with random weights: a base model and two fine-tunes of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "0.5B": {"hidden": 896, "intermediate": 4864, "layers": 24, "key_value": 128, "heads": 14},
    "1.5B": {"hidden": 1536, "intermediate": 8960, "layers": 28, "key_value": 256, "heads": 12},
}
VOCABULARY = 151_936


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Qwen2 model with a tied head."""
    s = SHAPES[size]
    hidden, inner, key_value = s["hidden"], s["intermediate"], s["key_value"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(s["layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.k_proj.bias": (key_value,),
            prefix + "self_attn.k_proj.weight": (key_value, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "self_attn.q_proj.bias": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.v_proj.bias": (key_value,),
            prefix + "self_attn.v_proj.weight": (key_value, hidden),
        }
    return tensors | {"model.norm.weight": (hidden,)}


def build(size: str, folder: Path, *, num_models: int = 2) -> list[Path]:
    """Write a base model and num_models fine-tunes in bfloat16, and return their folders."""
    names = ["base", *(f"task{number}" for number in range(num_models))]
    folders = [folder / name for name in names]
    if all((path / "config.json").is_file() for path in folders):
        return folders
    generator = torch.Generator().manual_seed(0)
    states: list[dict[str, torch.Tensor]] = [{} for _ in folders]
    for name, shape in shapes(size).items():
        base = torch.randn(shape, generator=generator) * 0.02
        states[0][name] = base.bfloat16()
        for state in states[1:]:
            delta = torch.randn(shape, generator=generator) * 0.002
            state[name] = base.add_(delta).bfloat16()
            base.sub_(delta)
    s = SHAPES[size]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": s["hidden"],
        "intermediate_size": s["intermediate"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["key_value"] // (s["hidden"] // s["heads"]),
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    for path, state in zip(folders, states, strict=True):
        path.mkdir(parents=True, exist_ok=True)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config, indent=2))
    return folders
