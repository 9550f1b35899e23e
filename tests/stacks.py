"""Tiny models with layers that differ, of several architectures, to take slices of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

Models = Mapping[str, Path]

_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama_like(config: Any, model: Any, **more: Any) -> Callable[[int], Any]:
    def make(num_layers: int) -> Any:
        settings = _SMALL | _IDS | {"num_key_value_heads": 2} | more
        settings["num_hidden_layers"] = num_layers
        return model(config(**settings))

    return make


def _gpt2(num_layers: int) -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=num_layers, n_head=2, vocab_size=40, n_positions=32, **_IDS
    )
    return transformers.GPT2LMHeadModel(config)


KINDS: dict[str, Callable[[int], Any]] = {
    "llama": _llama_like(transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "gpt2": _gpt2,
}


def make(kind: str, *, num_layers: int, seed: int) -> Any:
    """Return a model in float32 whose vectors are not the ones and zeros of a fresh one."""
    torch.manual_seed(seed)
    model = KINDS[kind](num_layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def save(kind: str, folder: Path, *, num_layers: int, num_models: int) -> Models:
    """Save a model `base` and models `m0`, `m1`, … that are near it; return their folders."""
    base = make(kind, num_layers=num_layers, seed=0)
    base.save_pretrained(folder / "base")
    start = {name: parameter.clone() for name, parameter in base.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for number in range(num_models):
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(start[name] + 0.02 * noise)
        base.save_pretrained(folder / f"m{number}")
    return {name: folder / name for name in ("base", *(f"m{n}" for n in range(num_models)))}
