"""The architectures of mixtures: which models they hold, and their tensors' names and config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from outliermerge.errors import listing, quoted
from outliermerge.spec.moe import MoeDocument

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense MLP layer; `down_proj` is the last."""

_QKV_BIASES = frozenset(f"self_attn.{name}_proj.bias" for name in "qkv")
_QK_NORMS = frozenset(f"self_attn.{name}_norm.weight" for name in "qk")
_ATTENTION = frozenset(
    {"input_layernorm.weight", "post_attention_layernorm.weight"}
    | {f"self_attn.{name}_proj.weight" for name in "qkvo"}
)
_KINDS = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2,
        "num_key_value_heads": 8, "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}  # fmt: skip
"""The kinds of models that mixtures are made of, and what their configs may leave out."""


@dataclass(frozen=True)
class MoeArchitecture:
    """An architecture of mixtures.

    Attributes:
        name: as a file names it.
        kinds: the model types of the models that it can be made of.
        expert: an expert's matrix in a layer, with {index} and {name}.
        router: the routers' matrix in a layer.
        shared: a shared expert's matrix, with {name}; empty if there can be none.
        shared_router: the router of the shared expert; empty if it has none.
        needs_shared: whether there must be a shared expert.
        names: other names of the matrices.
        attention: what a layer of the base may have besides its MLP.
        unfit: returns why it cannot hold the attention of a base with a config; empty if it can.
        config: makes the keys that the output's config has besides the base's.
    """

    name: str
    kinds: tuple[str, ...]
    expert: str
    router: str
    config: Callable[[MoeDocument, Mapping[str, Any]], dict[str, Any]]
    shared: str = ""
    shared_router: str = ""
    needs_shared: bool = False
    names: Mapping[str, str] | None = None
    attention: frozenset[str] = _ATTENTION
    unfit: Callable[[Mapping[str, Any]], str] = lambda base: ""

    def matrix(self, name: str, index: int | None) -> str:
        """Return the name in a layer of an expert's matrix, of the shared one's for None."""
        name = (self.names or {}).get(name, name)
        pattern = self.shared if index is None else self.expert
        return pattern.format(index=index, name=name)

    def why_not(self, document: MoeDocument, base: Mapping[str, Any]) -> str:
        """Return why it cannot hold a mixture with a base of a config; empty if it can."""
        kind = str(base.get("model_type"))
        shared, drawn = document.shared, document.gate_mode in ("random", "uniform_random")
        if kind not in self.kinds:
            return f"it is made of {' or '.join(self.kinds)} models, the base is {kind}"
        if self.needs_shared and len(shared) != 1:
            return f"it has exactly one shared expert, found {len(shared)} in `shared_experts`"
        if self.shared_router and not shared[0].positive_prompts and not drawn:
            return "its shared expert has a router: give it `positive_prompts`"
        if shared and not self.shared:
            return "it has no shared experts"
        if len(shared) > 1:
            return f"it has at most one shared expert, found {len(shared)}"
        if shared and not self.shared_router and shared[0].positive_prompts:
            return "its shared expert has no router: leave out `positive_prompts`"
        return self.unfit({**_KINDS[kind], **base})


def _mixtral(document: MoeDocument, base: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": len(document.experts),
        "num_experts_per_tok": document.experts_per_token,
        "sliding_window": base.get("sliding_window"),
    }


def _qwen(document: MoeDocument, base: Mapping[str, Any]) -> dict[str, Any]:
    size = base["intermediate_size"]
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": size,
        "qkv_bias": base["model_type"] == "qwen2",
        **_as_qwen(document, base),
    }


def _qwen3(document: MoeDocument, base: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_as_qwen(document, base),
    }


def _as_qwen(document: MoeDocument, base: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": len(document.experts),
        "num_experts_per_tok": document.experts_per_token,
        "moe_intermediate_size": base["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **_windows(base),
    }


def _windows(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers see only a window of the text, as in the base."""
    window, number = base.get("sliding_window"), base["num_hidden_layers"]
    if window is None or not base.get("use_sliding_window", base["model_type"] == "mistral"):
        return {"sliding_window": None, "use_sliding_window": False}
    first = base.get("max_window_layers", 28) if "use_sliding_window" in base else 0
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(number)]
    return {"use_sliding_window": True, "layer_types": base.get("layer_types") or kinds}


def _no_deepseek(base: Mapping[str, Any]) -> str:
    """Return why DeepSeek's class, which has fewer kinds of attention, cannot hold a base's."""
    heads, width = base.get("num_attention_heads"), base.get("hidden_size")
    head, window = base.get("head_dim"), base.get("sliding_window")
    if head is not None and heads is not None and head * heads != width:
        return f"its head_dim is hidden_size / num_attention_heads, the base's is {head}"
    has_window = base["model_type"] == "mistral" and window is not None
    if has_window and window < base["max_position_embeddings"]:
        return f"it has no sliding window, the base has one of {window} tokens"
    rope = base.get("rope_parameters") or base.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        return f"it has no positions of type {quoted(kind)}, as the base has"
    return ""


def _deepseek(document: MoeDocument, base: Mapping[str, Any]) -> dict[str, Any]:
    code = "deepseek-ai/deepseek-moe-16b-base--{}"
    modeling = code.format("modeling_deepseek.Deepseek")
    rope = base.get("rope_parameters") or base
    return {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "n_routed_experts": len(document.experts),
        "n_shared_experts": len(document.shared) or None,
        "num_experts_per_tok": document.experts_per_token,
        "moe_intermediate_size": base["intermediate_size"],
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None,
        "sliding_window": None,
        "auto_map": {
            "AutoConfig": code.format("configuration_deepseek.DeepseekConfig"),
            "AutoModel": f"{modeling}Model",
            "AutoModelForCausalLM": f"{modeling}ForCausalLM",
        },
    }


MOE_ARCHITECTURES = (
    MoeArchitecture(
        name="mixtral",
        kinds=("llama", "mistral"),
        expert="block_sparse_moe.experts.{index}.{name}.weight",
        router="block_sparse_moe.gate.weight",
        names={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        config=_mixtral,
    ),
    MoeArchitecture(
        name="deepseek",
        kinds=("llama", "mistral"),
        expert="mlp.experts.{index}.{name}.weight",
        router="mlp.gate.weight",
        shared="mlp.shared_experts.{name}.weight",
        config=_deepseek,
        unfit=_no_deepseek,
    ),
    MoeArchitecture(
        name="qwen",
        kinds=("qwen2", "llama", "mistral"),
        expert="mlp.experts.{index}.{name}.weight",
        router="mlp.gate.weight",
        shared="mlp.shared_expert.{name}.weight",
        shared_router="mlp.shared_expert_gate.weight",
        needs_shared=True,
        attention=_ATTENTION | _QKV_BIASES,
        config=_qwen,
    ),
    MoeArchitecture(
        name="qwen3",
        kinds=("qwen3",),
        expert="mlp.experts.{index}.{name}.weight",
        router="mlp.gate.weight",
        attention=_ATTENTION | _QK_NORMS,
        config=_qwen3,
    ),
)
"""In the order in which they are tried."""


def choose_architecture(
    document: MoeDocument, base: Mapping[str, Any]
) -> tuple[MoeArchitecture | None, str]:
    """Return the architecture for a mixture, or None and why there is none.

    Args:
        base: the base's config.
    """
    kind = str(base.get("model_type"))
    wanted = (document.architecture or "").lower()
    # mergekit's `qwen` is Qwen2-MoE or Qwen3-MoE, as the models are.
    tried = [a for a in MOE_ARCHITECTURES if not wanted or a.name.startswith(wanted)]
    reasons = {each.name: each.why_not(document, base) for each in tried}
    found = next((each for each in tried if not reasons[each.name]), None)
    if found is not None:
        return found, ""
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        return None, f"the base is a {kind} model: mixtures are made of {known} models"
    return None, "no architecture holds this mixture:\n" + listing(
        [f"{name}: {why}" for name, why in reasons.items()]
    )


def mixture_config(
    architecture: MoeArchitecture, document: MoeDocument, base: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config of a mixture.

    Defaults differ between the dense and the mixed classes, so they are written out.

    Args:
        base: the config of the base model.
    """
    heads = base["num_attention_heads"]
    full: dict[str, Any] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "num_key_value_heads": heads,
        **_KINDS[base["model_type"]],
        **base,
    }
    if "rope_parameters" not in full:
        full.setdefault("rope_theta", 10000.0)
    if full.get("head_dim") is None:
        full["head_dim"] = full["hidden_size"] // heads
    if full["num_key_value_heads"] is None:
        full["num_key_value_heads"] = heads
    full.pop("auto_map", None)
    return full | architecture.config(document, full)
