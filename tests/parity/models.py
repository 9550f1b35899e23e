"""The models of the comparison with mergekit: a base and five fine-tunes of each kind and dtype.

They have the layouts that mergekit 0.1.5 knows: T5 1.1, BERT with a pooler, Qwen2-VL's published
config, and Mixtral with packed experts. Of Mixtral's published layout it leaves the experts out.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from checkpoints import fine_tune, save_model
from safetensors.torch import save_file

NUM_MODELS = 5


def family_of(kind: str, dtype: str, folder: Path) -> Path:
    """Return the folder with `base`, `m0`, `m1`, … of a kind and dtype; they are made once."""
    family = folder / f"{kind}-{dtype}"
    if not family.exists():
        _save(kind, family / "base", getattr(torch, dtype))
        for number in range(NUM_MODELS):
            fine_tune(family / "base", family / f"m{number}", seed=number + 1)
    return family


def _save(kind: str, folder: Path, dtype: torch.dtype) -> None:
    if kind == "llama":
        save_model(kind, folder, dtype=dtype)
        return
    if kind == "qwen2_vl":
        save_model(kind, folder, dtype=dtype)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | config["text_config"] | {"model_type": kind}))
        return
    torch.manual_seed(0)
    model = _model(kind).to(dtype)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    tied = {"transformer": "lm_head.weight"}.get(model.base_model_prefix)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k != tied}
    if kind == "t5":
        tensors = {k: v for k, v in tensors.items() if "embed_tokens" not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _model(kind: str) -> transformers.PreTrainedModel:
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=16, vocab_size=96)
        )
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=3,
                num_heads=4,
                vocab_size=96,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
    if kind == "bert":
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                vocab_size=96,
                max_position_embeddings=64,
            )
        )
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )
