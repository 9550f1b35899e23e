"""Small checkpoints in true layouts: built by transformers, then moved a little to fine-tunes."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from outliermerge.methods.table import METHODS

KINDS = ("llama", "qwen2_vl", "llava", "mixtral", "bert")


def _model(kind: str) -> transformers.PreTrainedModel:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
    if kind == "mixtral":
        config = transformers.MixtralConfig(**text, num_local_experts=4, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config)
    if kind == "bert":
        config = transformers.BertConfig(
            **{k: v for k, v in text.items() if k != "num_key_value_heads"}
        )
        return transformers.BertForMaskedLM(config)
    if kind == "llava":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text),
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
                projection_dim=16,
            ),
            image_token_index=90,
        )
        return transformers.LlavaForConditionalGeneration(config)
    if kind == "qwen2_vl":
        config = transformers.Qwen2VLConfig(
            text_config=text
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 14,
            },
        )
        return transformers.Qwen2VLForConditionalGeneration(config)
    raise ValueError(kind)


@cache
def _state(kind: str) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = _model(kind).eval()
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save_model(
    kind: str, folder: Path, *, dtype: torch.dtype, shard_size: str = "5GB"
) -> dict[str, torch.Tensor]:
    """Save the base model of a kind as transformers does, and return what it stored."""
    model, state = _state(kind)
    model.load_state_dict(state)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    model.float()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    return load_folder(folder)


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Return a folder's tensors, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def fine_tune(source: Path, target: Path, *, seed: int, scale: float = 0.01) -> None:
    """Copy a checkpoint with a heavy-tailed task vector added to every float tensor."""
    target.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            moved = {}
            for name, tensor in load_file(path).items():
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=generator) * scale
                    outlier = torch.rand(tensor.shape, generator=generator) < 0.03
                    delta = torch.where(outlier, noise * 8, noise)
                    tensor = (tensor.float() + delta).to(tensor.dtype)
                moved[name] = tensor
            save_file(moved, target / path.name, metadata={"format": "pt"})
        else:
            (target / path.name).write_bytes(path.read_bytes())


def family(
    kind: str,
    folder: Path,
    *,
    num_models: int = 2,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
) -> tuple[Path, list[Path]]:
    """Build a base model and fine-tunes of it."""
    base = folder / "base"
    save_model(kind, base, dtype=dtype, shard_size=shard_size)
    models = []
    for number in range(num_models):
        models.append(folder / f"task{number}")
        fine_tune(base, models[-1], seed=number + 1)
    return base, models


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Save tensors as a bare model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "test"}))
    return folder


def save_lora(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Write a folder with a LoRA of rank 1 as PEFT does, from tensors by their names in the model.

    Args:
        folder: made where it is missing.
        tensors: what adapter_model.safetensors holds, less `base_model.model.`.
        config: further keys of adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["l"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    saved = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(saved, folder / "adapter_model.safetensors")
    return folder


def small_unet() -> Any:
    """Return a UNet of diffusers with random weights, the smallest that it makes."""
    logging.disable(logging.WARNING)
    import diffusers

    logging.disable(logging.NOTSET)
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )


def as_many_as(method: str, models: list[Any]) -> list[Any]:
    """Return the first of some models: as many as a method takes beside a base."""
    most = METHODS[method].max_models
    if most is not None and METHODS[method].base_as == "first":
        most -= 1
    return models[:most]
