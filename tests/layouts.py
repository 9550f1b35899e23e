"""The names and shapes of models in layouts that hold the same weights, in small."""

from __future__ import annotations

from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]
H, I, V = 8, 12, 22  # noqa: E741


def _linear(name: str, rows: int, columns: int = H, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (H,)} | ({f"{name}.bias": (H,)} if bias else {})


def decoder(
    outside: Mapping[str, tuple[int, ...]], layer: str, parts: Mapping[str, tuple[int, ...]]
) -> Shapes:
    """Return tensors outside of layers, and those of two layers."""
    inside = {layer.format(n) + name: shape for n in range(2) for name, shape in parts.items()}
    return {**outside, **inside}


ATTENTION = {f"self_attn.{x}_proj.weight": (H, H) for x in "qkvo"}
GROUPED = ATTENTION | {f"self_attn.{x}_proj.weight": (4, H) for x in "kv"}
BIASES = {f"self_attn.{x}_proj.bias": (H,) for x in "qkv"}
MLP = {
    "mlp.gate_proj.weight": (I, H),
    "mlp.up_proj.weight": (I, H),
    "mlp.down_proj.weight": (H, I),
}
NORMS = {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
OUTSIDE = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,), "lm_head.weight": (V, H)}
QKV = {"self_attn.qkv_proj.weight": (3 * H, H), "self_attn.o_proj.weight": (H, H)}
FEED = {f"feed_forward.w{n}.weight": (H, I) if n == 2 else (I, H) for n in (1, 2, 3)}
HF = "model.layers.{}."


def hugging(*parts: Mapping[str, tuple[int, ...]]) -> Shapes:
    return decoder(OUTSIDE, HF, {k: v for part in parts for k, v in part.items()})


def experts(fused: Mapping[str, tuple[int, ...]], apart: tuple[str, ...] = ()) -> Shapes:
    place = "block_sparse_moe" if "w1" in apart else "mlp"
    parts = {f"{place}.gate.weight": (4, H)} | {f"{place}.experts.{k}": v for k, v in fused.items()}
    for name, shape in zip(apart, ((I, H), (I, H), (H, I)), strict=False):
        parts |= {f"{place}.experts.{n}.{name}.weight": shape for n in range(4)}
    return hugging(ATTENTION, parts, NORMS)


def _vit(hf: bool) -> Shapes:
    parts: Shapes = {}
    if hf:
        for name in ("query", "key", "value"):
            parts |= _linear(f"attention.attention.{name}", H)
        parts |= _linear("attention.output.dense", H) | _linear("intermediate.dense", 4 * H)
        parts |= _linear("output.dense", H, 4 * H)
        parts |= _norm("layernorm_before") | _norm("layernorm_after")
        outside = {
            "vit.embeddings.cls_token": (1, 1, H),
            "vit.embeddings.position_embeddings": (1, 5, H),
            "vit.embeddings.patch_embeddings.projection.weight": (H, 3, 2, 2),
        } | _norm("vit.layernorm") | _linear("classifier", 4)  # fmt: skip
        return decoder(outside, "vit.encoder.layer.{}.", parts)
    parts |= _linear("attn.qkv", 3 * H) | _linear("attn.proj", H) | _linear("mlp.fc1", 4 * H)
    parts |= _linear("mlp.fc2", H, 4 * H) | _norm("norm1") | _norm("norm2")
    outside = {
        "cls_token": (1, 1, H),
        "pos_embed": (1, 5, H),
        "patch_embed.proj.weight": (H, 3, 2, 2),
    } | _norm("norm") | _linear("head", 4)  # fmt: skip
    return decoder(outside, "blocks.{}.", parts)


def _clip(hf: bool) -> Shapes:
    shapes: Shapes = {"logit_scale": ()}
    for tower in ("text", "vision"):
        if hf:
            parts = {k: v for x in "qkv" for k, v in _linear(f"self_attn.{x}_proj", H).items()}
            parts |= _linear("self_attn.out_proj", H) | _linear("mlp.fc1", 4 * H)
            parts |= _linear("mlp.fc2", H, 4 * H) | _norm("layer_norm1") | _norm("layer_norm2")
            start = f"{tower}_model."
            place = "embeddings.position_embedding.weight"
            own = {f"{tower}_projection.weight": (H, H), f"{start}{place}": (7, H)}
            shapes |= decoder(own, start + "encoder.layers.{}.", parts)
        else:
            parts = {"attn.in_proj_weight": (3 * H, H), "attn.in_proj_bias": (3 * H,)}
            parts |= _linear("attn.out_proj", H) | _linear("mlp.c_fc", 4 * H)
            parts |= _linear("mlp.c_proj", H, 4 * H) | _norm("ln_1") | _norm("ln_2")
            start = "visual." if tower == "vision" else ""
            own = {"visual.proj" if start else "text_projection": (H, H)}
            own[f"{start}positional_embedding"] = (7, H)
            shapes |= decoder(own, start + "transformer.resblocks.{}.", parts)
    return shapes


def _blocks(*, qkv: Mapping[str, tuple[int, ...]], name: str) -> Shapes:
    """GPT-NeoX and those that took over its names."""
    dense = _linear("mlp.dense_h_to_4h", 4 * H) | _linear("mlp.dense_4h_to_h", H, 4 * H)
    parts = {**qkv, **_linear(f"{name}.dense", H), **dense, **_norm("input_layernorm")}
    outside = {"gpt_neox.embed_in.weight": (V, H), "embed_out.weight": (V, H)}
    return decoder(outside, "gpt_neox.layers.{}.", parts)


META = {"tok_embeddings.weight": (V, H), "norm.weight": (H,), "output.weight": (V, H)}
META_NORMS = {"attention_norm.weight": (H,), "ffn_norm.weight": (H,)}
FUSED_EXPERTS = {"gate_up_proj": (4, 2 * I, H), "down_proj": (4, H, I)}
LAYOUTS: dict[str, Shapes] = {
    "hf": hugging(ATTENTION, MLP, NORMS),
    "hf, grouped": hugging(GROUPED, MLP, NORMS),
    "hf, biases": hugging(ATTENTION, BIASES, MLP, NORMS),
    "phi3": hugging(QKV, {"mlp.gate_up_proj.weight": (2 * I, H), "mlp.down_proj.weight": (H, I)},
                    NORMS),
    "qkv alone fused": hugging(QKV, MLP, NORMS),
    "one layer fused": {
        **{k: v for k, v in hugging(QKV, MLP, NORMS).items() if ".layers.1." not in k},
        **{k: v for k, v in hugging(ATTENTION, MLP, NORMS).items() if ".layers.1." in k},
    },
    "meta": decoder(META, "layers.{}.", {f"attention.w{x}.weight": (H, H) for x in "qkvo"}
                    | FEED | META_NORMS),
    "internlm2": decoder({f"model.{k}": v for k, v in META.items()}, HF,
                         {"attention.wqkv.weight": (3 * H, H), "attention.wo.weight": (H, H)}
                         | FEED | META_NORMS),
    "torchtune": decoder(
        {"tok_embeddings.weight": (V, H), "norm.scale": (H,), "output.weight": (V, H)},
        "layers.{}.",
        {f"attn.{x}.weight": (H, H) for x in ("q_proj", "k_proj", "v_proj", "output_proj")}
        | {k.replace("feed_forward", "mlp"): v for k, v in FEED.items()}
        | {"sa_norm.scale": (H,), "mlp_norm.scale": (H,)},
    ),
    "qwen1": decoder(
        {"transformer.wte.weight": (V, H), "transformer.ln_f.weight": (H,),
         "lm_head.weight": (V, H)},
        "transformer.h.{}.",
        {"mlp.w1.weight": (I, H), "mlp.w2.weight": (I, H), "mlp.c_proj.weight": (H, I),
         "attn.c_proj.weight": (H, H), "ln_1.weight": (H,), "ln_2.weight": (H,)}
        | _linear("attn.c_attn", 3 * H),
    ),
    "olmo": decoder(
        {"model.transformer.wte.weight": (V, H), "model.transformer.ff_out.weight": (V, H)},
        "model.transformer.blocks.{}.",
        {"att_proj.weight": (3 * H, H), "attn_out.weight": (H, H), "ff_proj.weight": (2 * I, H),
         "ff_out.weight": (H, I)},
    ),
    "chatglm": decoder(
        {"transformer.embedding.word_embeddings.weight": (V, H),
         "transformer.output_layer.weight": (V, H)},
        "transformer.encoder.layers.{}.",
        {"mlp.dense_h_to_4h.weight": (2 * I, H), "mlp.dense_4h_to_h.weight": (H, I)}
        | _linear("self_attention.query_key_value", H + 4)
        | _linear("self_attention.dense", H, bias=False) | NORMS,
    ),
    "neox": _blocks(qkv=_linear("attention.query_key_value", 3 * H), name="attention"),
    "neox, split": _blocks(
        qkv={k: v for x in ("query", "key", "value")
             for k, v in _linear(f"attention.{x}", H).items()},
        name="attention"),
    "timm": _vit(hf=False),
    "hf vit": _vit(hf=True),
    "open_clip": _clip(hf=False),
    "hf clip": _clip(hf=True),
    "experts fused": experts(FUSED_EXPERTS),
    "experts stacked": experts({"gate_proj": (4, I, H), "up_proj": (4, I, H),
                                "down_proj": (4, H, I)}),
    "experts apart": experts({}, ("gate_proj", "up_proj", "down_proj")),
    "mixtral": experts({}, ("w1", "w3", "w2")),
}  # fmt: skip
PAIRS = [
    ("hf", "meta"),
    ("hf, grouped", "meta"),
    ("hf", "internlm2"),
    ("hf", "torchtune"),
    ("meta", "torchtune"),
    ("hf", "phi3"),
    ("hf", "qkv alone fused"),
    ("hf", "one layer fused"),
    ("hf, biases", "qwen1"),
    ("hf", "olmo"),
    ("hf", "chatglm"),
    ("neox", "neox, split"),
    ("timm", "hf vit"),
    ("open_clip", "hf clip"),
    ("experts fused", "experts apart"),
    ("experts fused", "mixtral"),
    ("experts stacked", "experts apart"),
    ("experts stacked", "experts fused"),
    ("experts apart", "mixtral"),
]

# LLaVA as first published, and as transformers 4 saves it.
ORIGINAL_TO_HF = {
    "lm_head.weight": "language_model.lm_head.weight",
    "model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
    "model.layers.3.mlp.up_proj.weight": "language_model.model.layers.3.mlp.up_proj.weight",
    "model.norm.weight": "language_model.model.norm.weight",
    "model.mm_projector.0.bias": "multi_modal_projector.linear_1.bias",
    "model.mm_projector.2.weight": "multi_modal_projector.linear_2.weight",
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight": (
        "vision_tower.vision_model.pre_layrnorm.weight"
    ),
}
