"""Small dense models with a tokenizer, to make mixtures of, and a reference for DeepSeek's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from checkpoints import fine_tune
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

WORDS = ("code", "python", "loop", "math", "sum", "prime", "chat", "hello", "story", "poem")
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "tied": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500.0},
    ),
    "biased": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True},
    ),
    "deep": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"num_hidden_layers": 4}),
    "wide": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"intermediate_size": 64}),
    "gelu": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"hidden_act": "gelu"}),
    "mistral": (
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        {"sliding_window": 4, "head_dim": 16},
    ),
    "qwen2": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "vocab_size": 264,
        },
    ),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
    "phi3": (transformers.PhiConfig, transformers.PhiForCausalLM, {}),
}


def _words() -> Tokenizer:
    names = ("<unk>", "<s>", "</s>", *WORDS)
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _pieces() -> Tokenizer:
    """Return a tokenizer of bytes, as transformers' class for Qwen2 needs it."""
    names = ("<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def save_words(folder: Path, *, pieces: bool = False) -> None:
    """Save a tokenizer of words, or of bytes."""
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=_pieces() if pieces else _words(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)


def save_dense(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model of a kind, drawn anew, with a tokenizer of words."""
    config_class, model_class, more = _KINDS[kind]
    torch.manual_seed(3)
    model = model_class(config_class(**_SIZES | more))
    with torch.no_grad():
        for parameter in model.parameters():  # else norms are 1, biases 0, activations tiny
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    save_words(folder, pieces=kind == "qwen2")
    return folder


def dense_family(kind: str, folder: Path, **more: Any) -> tuple[Path, Path, Path]:
    """Save a base model and two fine-tunes of it."""
    base = save_dense(kind, folder / "base", **more)
    for seed, name in enumerate(("one", "two"), start=1):
        fine_tune(base, folder / name, seed=seed, scale=0.05)
    return base, folder / "one", folder / "two"


def mixture_by_mergekit(spec: dict[str, Any], folder: Path) -> None:
    """Make a mixture as mergekit-moe does, but of hidden states in float32, not in bfloat16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mergekit.moe.router as router
        from mergekit.moe.config import MoEMergeConfig
        from mergekit.options import MergeOptions
        from mergekit.scripts.moe import build

        class InFloat32:
            @staticmethod
            def from_pretrained(path: str, **options: Any) -> Any:
                return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

        with mock.patch.object(router, "AutoModelForCausalLM", InFloat32):
            config = MoEMergeConfig.model_validate(spec)
            build(config, str(folder), MergeOptions(quiet=True), device="cpu")


def load(folder: Path) -> Any:
    """Load a mixture in transformers, which must find all weights and no others."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(found.values()), found
    return model.eval()


class _DeepseekMlp(nn.Module):
    """Routed experts by softmax, their weights made to add up to 1, plus shared experts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        mlp = transformers.models.llama.modeling_llama.LlamaMLP
        self.chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(mlp(config) for _ in range(config.n_routed_experts))
        if config.n_shared_experts:
            self.shared_experts = mlp(config)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scores = self.gate(states).softmax(-1).topk(self.chosen, dim=-1)
        weights = scores.values / scores.values.sum(-1, keepdim=True)
        outputs = torch.stack([expert(states) for expert in self.experts], dim=-2)
        picked = outputs.gather(
            -2, scores.indices[..., None].expand(*scores.indices.shape, states.shape[-1])
        )
        result = (weights[..., None] * picked).sum(-2)
        return result + self.shared_experts(states) if hasattr(self, "shared_experts") else result


def deepseek(folder: Path) -> Any:
    """Load a mixture in DeepSeek's form, for which transformers has no class of its own.

    It is a Llama with other MLP layers; all weights must have the names and shapes of this class.
    """
    from checkpoints import load_folder

    raw = json.loads((folder / "config.json").read_text())
    assert raw["model_type"] == "deepseek" and raw["scoring_func"] == "softmax"
    assert raw["norm_topk_prob"] and raw["first_k_dense_replace"] == 0
    config = transformers.LlamaConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = _DeepseekMlp(config)
    model.load_state_dict(load_folder(folder), strict=True)
    return model.eval()
