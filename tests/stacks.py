"""Tiny models with layers that differ, of several architectures, to take slices of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

Models = Mapping[str, Path]

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
          "num_key_value_heads": 2, "vocab_size": 40}  # fmt: skip
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
           "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Kind:
    """An architecture.

    Attributes:
        make: returns a model with some layers: those of these numbers in a model with more.
        layers: where the layers are.
        after: what lies behind them.
        stack: the name of the stack, if there are several.
    """

    make: Callable[[Sequence[int]], Any]
    layers: str = "model.layers"
    after: Sequence[str] = ("model.norm", "lm_head")
    stack: str | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)


def _like_llama(name: str, **more: Any) -> Callable[[Sequence[int]], Any]:
    def make(layers: Sequence[int]) -> Any:
        own = {key: value(layers) if callable(value) else value for key, value in more.items()}
        config = getattr(transformers, f"{name}Config")
        return getattr(transformers, f"{name}ForCausalLM")(
            config(**_SMALL | _IDS | own, num_hidden_layers=len(layers))
        )

    return make


def _gpt2(layers: Sequence[int]) -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=len(layers), n_head=2, vocab_size=40, n_positions=32, **_IDS
    )
    return transformers.GPT2LMHeadModel(config)


def _t5(encoder: int | None, decoder: int | None, **more: Any) -> Callable[[Sequence[int]], Any]:
    """Return what makes T5, of which one stack has as many layers as are asked for."""

    def make(layers: Sequence[int]) -> Any:
        config = transformers.T5Config(
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_heads=2,
            vocab_size=40,
            num_layers=encoder or len(layers),
            num_decoder_layers=decoder or len(layers),
            decoder_start_token_id=0,
            **more,
        )
        return transformers.T5ForConditionalGeneration(config)

    return make


def _bart(encoder: int | None, decoder: int | None) -> Callable[[Sequence[int]], Any]:
    def make(layers: Sequence[int]) -> Any:
        config = transformers.BartConfig(
            d_model=16,
            vocab_size=40,
            max_position_embeddings=32,
            encoder_layers=encoder or len(layers),
            decoder_layers=decoder or len(layers),
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            decoder_start_token_id=2,
            **_IDS,
        )
        return transformers.BartForConditionalGeneration(config)

    return make


def _llava(text: int | None, vision: int | None) -> Callable[[Sequence[int]], Any]:
    def make(layers: Sequence[int]) -> Any:
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(
                **_SMALL, **_IDS, num_hidden_layers=text or len(layers)
            ),
            vision_config=transformers.CLIPVisionConfig(
                **_VISION | {"num_hidden_layers": vision or len(layers)}
            ),
            image_token_index=39,
        )
        return transformers.LlavaForConditionalGeneration(config)

    return make


def _qwen2_vl(text: int | None, vision: int | None) -> Callable[[Sequence[int]], Any]:
    def make(layers: Sequence[int]) -> Any:
        num_layers = text or len(layers)
        config = transformers.Qwen2VLConfig(
            text_config=_SMALL
            | _IDS
            | {"num_hidden_layers": num_layers, "rope_scaling": _ROPE, "rope_parameters": _ROPE},
            vision_config={
                "depth": vision or len(layers),
                "embed_dim": 16,
                "hidden_size": 16,
                "num_heads": 2,
                "patch_size": 4,
            },
            image_token_id=39,
            video_token_id=38,
        )
        return transformers.Qwen2VLForConditionalGeneration(config)

    return make


def _is_full(layer: int) -> bool:
    return layer < 3


_KINDS_OF_ATTENTION = {
    "layer_types": lambda layers: [
        "sliding_attention" if layer % 2 == 0 else "full_attention" for layer in layers
    ]
}
_EXPERTS = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
            "num_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
_DECODER = {"decoder_input_ids": torch.tensor([[0, 5, 9]])}
KINDS: dict[str, Kind] = {
    "llama": Kind(_like_llama("Llama")),
    "llama-tied": Kind(_like_llama("Llama", tie_word_embeddings=True), after=["model.norm"]),
    "mistral": Kind(_like_llama("Mistral", head_dim=16, sliding_window=2)),
    "gemma": Kind(_like_llama("Gemma", head_dim=16), after=["model.norm"]),
    "gpt2": Kind(_gpt2, "transformer.h", ["transformer.ln_f"]),
    "qwen2": Kind(
        _like_llama(
            "Qwen2",
            use_sliding_window=True,
            sliding_window=2,
            max_window_layers=3,
            layer_types=lambda layers: [
                "full_attention" if layer < 3 else "sliding_attention" for layer in layers
            ],
        )
    ),
    "qwen2_moe": Kind(
        _like_llama(
            "Qwen2Moe",
            **_EXPERTS,
            mlp_only_layers=lambda layers: [n for n, own in enumerate(layers) if own == 1],
        )
    ),
    "gemma2": Kind(
        _like_llama("Gemma2", head_dim=8, sliding_window=2, **_KINDS_OF_ATTENTION),
        after=["model.norm"],
    ),
    "mixtral": Kind(_like_llama("Mixtral", num_local_experts=4, num_experts_per_tok=2)),
    "t5-decoder": Kind(
        _t5(2, None), "decoder.block", ["decoder.final_layer_norm"], "decoder", _DECODER
    ),
    "t5-gated": Kind(
        _t5(2, None, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "decoder.block", ["decoder.final_layer_norm"], "decoder", _DECODER,
    ),
    "t5-encoder": Kind(
        _t5(None, 2), "encoder.block", ["encoder.final_layer_norm"], "encoder", _DECODER
    ),
    "bart-decoder": Kind(_bart(2, None), "model.decoder.layers", [], "decoder", _DECODER),
    "bart-encoder": Kind(_bart(None, 2), "model.encoder.layers", [], "encoder", _DECODER),
    "llava": Kind(
        _llava(None, 2), "model.language_model.layers", ["model.language_model.norm", "lm_head"],
        "text",
    ),
    "llava-vision": Kind(
        _llava(2, None),
        "model.vision_tower.encoder.layers",
        ["model.vision_tower.post_layernorm"],
        "vision",
    ),
    "qwen2_vl": Kind(
        _qwen2_vl(None, 2), "model.language_model.layers",
        ["model.language_model.norm", "lm_head"], "text",
    ),
    "qwen2_vl-vision": Kind(_qwen2_vl(2, None), "model.visual.blocks", [], "vision"),
}  # fmt: skip


def make(kind: str, *, layers: Sequence[int], seed: int) -> Any:
    """Return a model in float32 whose vectors are not the ones and zeros of a fresh one."""
    torch.manual_seed(seed)
    model = KINDS[kind].make(layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def save(kind: str, folder: Path, *, num_layers: int, num_models: int) -> Models:
    """Save a model `base` and models `m0`, `m1`, … that are near it; return their folders."""
    base = make(kind, layers=range(num_layers), seed=0)
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
