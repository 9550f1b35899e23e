"""LLaVA-NeXT-Llama-3-8B and Dart-Math at small width: names, layouts and dtypes as published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VLM, MATHS = "llava-hf/llama3-llava-next-8b-hf", "hkust-nlp/dart-math-llama3-8b-uniform"
# 128320 and 128256 at full size: <image> is 128256, then rows up to a multiple of 64.
NUM_ROWS, NUM_TOKENS = 44, 40
_TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 3, "rms_norm_eps": 1e-5,
         "rope_theta": 5e5}  # fmt: skip
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
           "num_hidden_layers": 2, "image_size": 8, "patch_size": 4,
           "model_type": "clip_vision_model"}  # fmt: skip


def save_vlm(folder: Path, *, seed: int = 1) -> None:
    """Save a LLaVA-NeXT: `language_model.model.*`, `vision_tower.*`, `image_newline`, float16."""
    text: dict[str, Any] = _TEXT | {"vocab_size": NUM_ROWS, "model_type": "llama"}
    config = transformers.LlavaNextConfig(
        text_config=text,
        vision_config=_VISION,
        image_token_index=NUM_TOKENS,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        tie_word_embeddings=False,
    )
    _save(transformers.LlavaNextForConditionalGeneration, config, folder, torch.float16, seed)
    path = folder / "model.safetensors"  # transformers 5 leaves out `vision_model.`
    tower = re.compile(r"^vision_tower\.(?!vision_model\.)")
    tensors = {tower.sub("vision_tower.vision_model.", n): t for n, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def save_llm(folder: Path, *, seed: int = 2, **changes: Any) -> None:
    """Save a Llama: `model.*` and `lm_head.weight`, bfloat16."""
    config = transformers.LlamaConfig(**_TEXT | {"vocab_size": NUM_TOKENS} | changes)
    _save(transformers.LlamaForCausalLM, config, folder, torch.bfloat16, seed)


def _save(kind: Any, config: Any, folder: Path, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = kind(config)
    for parameter in model.parameters():  # norms and biases that differ, too
        parameter.data += torch.randn(parameter.shape) * 0.05
    model.to(dtype).save_pretrained(folder)
