"""Tiny models of the types that are published in one layout and have another one in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
SHARED: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}


@dataclass(frozen=True)
class Structure:
    """A type of model.

    Attributes:
        made: its class, and what its config is made of.
        published: changes the tensors that transformers saves into those that are published.
        is_one: they are published as they are in memory.
    """

    made: Callable[[], Any]
    published: Callable[[Tensors], Tensors] = lambda tensors: tensors
    is_one: bool = False


def _text(name: str, head: str = "ForCausalLM", **keys: Any) -> Callable[[], Any]:
    def made() -> Any:
        config = getattr(transformers, f"{name}Config")(**SHARED | keys)
        return getattr(transformers, f"{name}{head}")(config)

    return made


def _seeing(name: str, text: dict[str, Any], vision: dict[str, Any], **keys: Any) -> Any:
    def made() -> Any:
        config = getattr(transformers, f"{name}Config")(
            text_config=SHARED | text, vision_config=vision, **keys
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return made


def _turned(tensors: Tensors) -> Tensors:
    """Return packed experts as Qwen3-VL-MoE is published: each is transposed."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }


def _of_gemma(tensors: Tensors) -> Tensors:
    """Return tensors with the names of transformers before 4.52."""
    starts = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    return {
        next(
            (new + name[len(old) :] for old, new in starts.items() if name.startswith(old)), name
        ): t
        for name, t in tensors.items()
    }


_QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
_TOKENS = {"image_token_id": 30, "video_token_id": 31, "vision_start_token_id": 32,
           "vision_end_token_id": 33}  # fmt: skip
_LATENT = {
    "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
STRUCTURES: dict[str, Structure] = {
    "mixtral": Structure(_text("Mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=4)),
    "qwen3_moe": Structure(_text("Qwen3Moe", num_experts=4, head_dim=8, **EXPERTS)),
    "qwen3_next": Structure(
        _text(
            "Qwen3Next", num_experts=4, head_dim=8, shared_expert_intermediate_size=12,
            linear_key_head_dim=4, linear_value_head_dim=4, linear_num_key_heads=2,
            linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"],
            **EXPERTS,
        )
    ),
    "qwen3_vl": Structure(
        _seeing("Qwen3VL", {"head_dim": 4}, _QWEN_VISION, **_TOKENS), is_one=True
    ),
    "qwen3_vl_moe": Structure(
        _seeing("Qwen3VLMoe", EXPERTS | {"num_experts": 4, "head_dim": 4}, _QWEN_VISION, **_TOKENS),
        _turned,
    ),
    "deepseek_v3": Structure(_text("DeepseekV3", **_LATENT, **EXPERTS)),
    "glm4_moe": Structure(
        _text("Glm4Moe", n_routed_experts=4, n_shared_experts=1, head_dim=8,
              first_k_dense_replace=1, **EXPERTS)
    ),
    "gpt_oss": Structure(
        _text("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8), is_one=True
    ),
    "gemma3": Structure(
        _seeing(
            "Gemma3",
            {"head_dim": 4},
            {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24,
             "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
            mm_tokens_per_image=4, image_token_index=30, boi_token_index=31, eoi_token_index=32,
        ),
        _of_gemma,
    ),
    "llama4": Structure(
        _seeing(
            "Llama4",
            {"num_local_experts": 4, "head_dim": 4, "intermediate_size_mlp": 24},
            {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "vision_output_dim": 16,
             "projector_input_dim": 16, "projector_output_dim": 16},
            image_token_index=30, boi_token_index=31, eoi_token_index=32,
        ),
        is_one=True,
    ),
    "phi3": Structure(_text("Phi3"), is_one=True),
}  # fmt: skip


def save_both(
    structure: Structure, folder: Path, seed: int, base: Tensors | None = None
) -> Tensors:
    """Save a model into the folders `old`, as published, and `new`, as it is in memory.

    Args:
        base: the model that it differs from by a little.

    Returns:
        its tensors in memory.
    """
    torch.manual_seed(seed)
    model = structure.made()
    model.eval()
    own = model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(0.3 * drawn if base is None else base[name] + 0.1 * drawn)
    model.save_pretrained(folder / "new", save_original_format=False)
    model.save_pretrained(folder / "old")
    tensors = load_file(folder / "old" / "model.safetensors")
    published = structure.published(tensors)
    save_file(published, folder / "old" / "model.safetensors", metadata={"format": "pt"})
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def loaded(structure: Structure, folder: Path) -> Any:
    """Load a model by its class; nothing may be missing, and nothing over."""
    kind = type(structure.made())
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    wrong = {key: value for key, value in found.items() if value}
    assert not wrong, wrong
    return model.eval()


def add_tensors(folder: Path, tensors: Tensors) -> None:
    """Add tensors to those of a folder."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def without_config(folder: Path) -> Path:
    """Copy a model without its model type."""
    other = folder.with_name(f"{folder.name}-bare")
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    del config["model_type"], config["architectures"]
    (other / "config.json").write_text(json.dumps(config))
    return other
