"""What a GGUF file says of a model: llama.cpp's keys, by the config of transformers.

What llama.cpp does not read from a file, but has in its code, must be as the config says.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outliermerge.errors import OutlierMergeError, shown

_ROPES = ("default", "linear", "yarn")
_SWA_BASE = 10_000.0  # of the rotary embeddings of Gemma 3's sliding layers
# By the keys of generation_config.json llama.cpp's words.
_SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp",
             "repetition_penalty": "penalty_repeat"}  # fmt: skip


class NotWrittenError(OutlierMergeError):
    """A kind of model or tokenizer that is not written here, and that llama.cpp may know."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes models of one type of transformers.

    Attributes:
        name: llama.cpp's.
        activations: of which it computes one; the first is that of a config that says none.
        is_turned: the rows of queries and keys are in another order: pairs of a rotation lie side
            by side.
        norm: what is added to norms.
        fixed: keys of a config whose values are in llama.cpp's code; the first is that of a config
            that says none.
        ropes: types of rotary embeddings.
        period: of the layers with full attention; the others slide.
        largest: the number of layers of the model whose queries are scaled by hidden size / heads.
    """

    name: str
    activations: tuple[str, ...] = ("silu", "swish")
    is_turned: bool = False
    norm: float = 0.0
    fixed: Mapping[str, tuple[Any, Any]] | None = None
    ropes: tuple[str, ...] = _ROPES
    period: int = 0
    largest: int = 0


_SPARSE = {"decoder_sparse_step": (1, 1), "mlp_only_layers": ([], [])}
_GELU = ("gelu_pytorch_tanh",)
_CAPS = {"attn_logit_softcapping": (None, None), "final_logit_softcapping": (None, None)}
ARCHITECTURES = {
    "llama": Architecture("llama", is_turned=True, ropes=(*_ROPES, "llama3")),
    "mistral": Architecture("llama", is_turned=True, ropes=(*_ROPES, "llama3")),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe", fixed=_SPARSE | {"norm_topk_prob": (False, False)}),
    "qwen3_moe": Architecture("qwen3moe", fixed=_SPARSE | {"norm_topk_prob": (False, True)}),
    "gemma2": Architecture("gemma2", _GELU, norm=1.0, ropes=("default",), period=2, largest=46),
    "gemma3_text": Architecture(
        "gemma3", _GELU, norm=1.0, fixed=_CAPS, ropes=("default", "linear"), period=6, largest=62
    ),
}


def check_config(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a model.

    Raises:
        NotWrittenError: it is of a kind that is not known here.
        OutlierMergeError: llama.cpp computes such models otherwise.
    """
    kind = config.get("model_type")
    known = ARCHITECTURES.get(str(kind))
    if known is None:
        raise NotWrittenError(
            f"gguf is written of the model types {', '.join(ARCHITECTURES)}; this is {kind!r}"
        )
    rope_type = _rope(config).get("rope_type", "default")
    if rope_type not in known.ropes:
        raise OutlierMergeError(
            f"gguf is not written of models of the type {kind} with a rope of type {rope_type!r}: "
            "write safetensors"
        )
    key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    activation = config.get(key, known.activations[0])
    if activation not in known.activations:
        raise OutlierMergeError(
            f"config.json: {key} is {activation!r}, and llama.cpp computes models of the type "
            f"{kind} with {known.activations[0]}: write safetensors"
        )
    fixed = dict(known.fixed or {})
    if known.norm:
        head, num = config.get("head_dim", 256), config["num_hidden_layers"]
        if num == known.largest:
            head = config["hidden_size"] // config["num_attention_heads"]
        fixed["query_pre_attn_scalar"] = (256, head)
        layers = ["full_attention" if (n + 1) % known.period == 0 else "sliding_attention"
                  for n in range(num)]  # fmt: skip
        fixed["layer_types"] = (layers, layers)
        fixed["attention_bias"] = (False, False)
    if kind == "gemma3_text" and "sliding_attention" in (config.get("rope_parameters") or {}):
        own = config["rope_parameters"]["sliding_attention"]
        fixed_rope = {"rope_type": "default", "rope_theta": _SWA_BASE}
        if {key: own.get(key, value) for key, value in fixed_rope.items()} != fixed_rope:
            raise OutlierMergeError(
                f"config.json: rope_parameters of sliding_attention are {shown(own)}, and "
                f"llama.cpp computes Gemma 3 with {fixed_rope}: write safetensors"
            )
    for key, (default, wanted) in fixed.items():
        if (found := config.get(key, default)) != wanted:
            raise OutlierMergeError(
                f"config.json: {key} is {found!r}, and llama.cpp computes models of the type "
                f"{kind} with {wanted!r}: write safetensors"
            )
    return known


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of rotary embeddings: of all layers, or of those that do not slide.

    transformers takes `rope_scaling` before `rope_parameters`.
    """
    found: dict[str, Any] = {"rope_type": "default"}
    for key in ("rope_parameters", "rope_scaling"):
        said = config.get(key) or {}
        said = said.get("full_attention", said)
        kind = {"rope_type": said["type"]} if "type" in said else {}
        found |= {**kind, **said}
    return found


def add_rope(writer: Any, config: Mapping[str, Any]) -> None:
    """Add the parameters of rotary embeddings.

    Raises:
        OutlierMergeError: there are some that llama.cpp does not know.
    """
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))))
    if (kind := rope["rope_type"]) not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "linear":
        return
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
             "beta_fast", "beta_slow"}  # fmt: skip
    others = sorted(key for key, value in rope.items() if key not in known and value is not None)
    if others:
        raise OutlierMergeError(
            f"config.json: the rope of type 'yarn' has {', '.join(others)}, which is not written "
            "to gguf: write safetensors"
        )
    before = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(int(before))
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            getattr(writer, f"add_rope_scaling_yarn_{key}")(float(rope[key]))


def rope_factors(config: Mapping[str, Any]) -> bytes | None:
    """Return what llama.cpp divides the frequencies of Llama 3.1's rotary embeddings by.

    Returns:
        float32 values, one for each pair of a head's elements; None for other ropes.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    factor, before = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    values = []
    for n in range(0, size, 2):
        turns = before * base ** (-n / size) / (2 * math.pi)  # in the context before
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        values.append(1 / ((1 - share) / factor + share))
    return struct.pack(f"<{len(values)}f", *values)


def add_settings(writer: Any, config: Mapping[str, Any], known: Architecture) -> None:
    """Add what a config says of sizes, heads, experts and attention."""
    num_heads, size = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or (256 if known.norm else size // num_heads)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(size)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_rope(writer, config)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config["vocab_size"])
    if "moe" in known.name:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if known.name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if known.period:
        writer.add_sliding_window(config["sliding_window"])
    if known.name == "gemma3":
        writer.add_float32(f"{known.name}.rope.freq_base_swa", _SWA_BASE)
    if known.name == "gemma2":
        writer.add_attn_logit_softcapping(config.get("attn_logit_softcapping") or 0.0)
        writer.add_final_logit_softcapping(config.get("final_logit_softcapping") or 0.0)


def add_sampling(writer: Any, generation: Mapping[str, Any]) -> None:
    """Add what a generation_config.json says of sampling, with packages gguf that know it."""
    for key, word in _SAMPLING.items():
        add = getattr(writer, f"add_sampling_{word}", None)
        if add is not None and generation.get(key) is not None:
            add(generation[key])
