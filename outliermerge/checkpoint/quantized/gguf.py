"""GGUF: llama.cpp's names, types and configs, as those of transformers.

Read as transformers 5.23 reads it (modeling_gguf_pytorch_utils.py, integrations/ggml.py). The
package gguf dequantises blocks.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from outliermerge.checkpoint.formats.gguf_file import HEADER, read_file
from outliermerge.checkpoint.quantized.packed import OfPacked, refuse_scale
from outliermerge.checkpoint.rearranged import join, reshaped, swap
from outliermerge.checkpoint.sources import DTYPES, Checkpoint, DType, Reading, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.storage.failures import naming
from outliermerge.storage.machine import cache_folder

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
_DENSE = {
    "token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {"post_attention_norm": "post_attention_layernorm",
               "ffn_norm": "pre_feedforward_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"}  # fmt: skip
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_exps": "mlp.experts.gate_up_proj", "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
# Keys of a config by llama.cpp's, after the architecture's name.
_CONFIG = {
    "context_length": "max_position_embeddings", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "vocab_size": "vocab_size",
}  # fmt: skip
_MOE_CONFIG = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
               "expert_feed_forward_length": "moe_intermediate_size",
               "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}  # fmt: skip
_HEAD = {"attention.key_length": "head_dim"}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
           "unknown_token_id": "unk_token_id", "padding_token_id": "pad_token_id"}  # fmt: skip
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<end>weight|bias)")
# Tables that are computed from the config.
_PASSED_OVER = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp stores the models of one type of transformers.

    Attributes:
        names: of modules, after those of all.
        config: keys of the config, after those of all.
        is_turned: queries and keys are in the order of rows of Meta's rotary embeddings.
        norm: what is added to norms.
        said: of the config, because no file says it.
        has_bias: the config says whether queries, keys and values have a bias.
    """

    model_type: str
    architecture: str
    names: Mapping[str, str]
    config: Mapping[str, str]
    is_turned: bool = False
    norm: float = 0.0
    said: Mapping[str, Any] | None = None
    has_bias: bool = False


_GEMMA = {**_HEAD, "attention.sliding_window": "sliding_window"}
_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", {}, {"rope.dimension_count": "head_dim"},
                           is_turned=True, has_bias=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", {}, {}),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", _HEAD_NORMS, _HEAD, has_bias=True),
    "qwen2moe": _Architecture("qwen2_moe", "Qwen2MoeForCausalLM", _EXPERTS, _MOE_CONFIG),
    "qwen3moe": _Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**_HEAD_NORMS, **_EXPERTS},
                              {**_HEAD, **_MOE_CONFIG}, said={"norm_topk_prob": True},
                              has_bias=True),
    "phi3": _Architecture("phi3", "Phi3ForCausalLM", {"attn_qkv": "self_attn.qkv_proj",
                                                      "ffn_up": "mlp.gate_up_proj"}, {}),
    "gemma2": _Architecture("gemma2", "Gemma2ForCausalLM", _FOUR_NORMS, _GEMMA, norm=-1.0),
    "gemma3": _Architecture("gemma3_text", "Gemma3ForCausalLM", {**_FOUR_NORMS, **_HEAD_NORMS},
                            _GEMMA, norm=-1.0),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GgmlTensor(OfPacked):
    """A tensor of one of ggml's types, of which the source has the bytes (…, bytes of a row).

    Attributes:
        kind: the number of the type.
        plus: what is added to all values.
    """

    kind: int
    plus: float = 0.0

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        data = self.packed(reader, first, last).numpy()
        values = torch.from_numpy(dequantize(data, GGMLQuantizationType(self.kind)))
        if not values.isfinite().all():
            refuse_scale(self, "NaN or infinite, of one of its blocks")
        return values.view(last - first, -1) + self.plus


def from_gguf(checkpoint: Checkpoint) -> Checkpoint:
    """Return a GGUF file's tensors with the names and values that transformers gives them.

    Raises:
        OutlierMergeError: its architecture, a tensor or a type is not known.
    """
    if checkpoint.root.suffix != SUFFIX:
        return checkpoint
    header = json.loads(checkpoint.metadata[""][HEADER])
    values, types = header["values"], header["types"]
    known = _architecture(checkpoint.root, values)
    metas = {name: meta for name, meta in checkpoint.tensors.items() if name not in _PASSED_OVER}
    out_dtype = _out_dtype(metas.values())
    made: dict[str, list[Source]] = {}
    for name, meta in metas.items():
        assert isinstance(meta, TensorMeta)
        new = _name(checkpoint.root, name, known)
        source = _source(meta, types[name], new, known, values, out_dtype)
        if new.endswith("shared_expert_gate.weight"):
            source = reshaped(source, (1, *source.shape))
        made.setdefault(new, []).append(source)
    passed = [name for name in checkpoint.tensors if name in _PASSED_OVER]
    num = sum(
        isinstance(meta, TensorMeta) and meta.dtype.name == "uint8" for meta in metas.values()
    )
    notes = [f"{checkpoint.root}: {num} weights quantised as GGUF are read as float32; it has no "
             "tokenizer that is read, and its config is made of its header"]  # fmt: skip
    if passed:
        notes.append(
            f"{checkpoint.root}: passed over, as transformers does, so that a config made of it "
            f"lacks their rope_scaling:\n{listing(passed)}"
        )
    return replace(
        checkpoint,
        tensors={name: _joined(checkpoint.root, name, parts) for name, parts in made.items()},
        notes=(*checkpoint.notes, *notes),
        metadata={"": {}},
        sidecars=("config.json",),
        components={"": "model"},
    )


def gguf_home(path: Path) -> Path:
    """Return a folder in our cache with the config.json of a GGUF file, made of its header."""
    metas, _, texts = read_file(path)
    header = json.loads(texts[HEADER])
    config = _config(path, header, {meta.name for meta in metas}, _out_dtype(metas))
    content = json.dumps(config, indent=2).encode()
    home = cache_folder("gguf")
    folder = home / xxhash.xxh3_128_hexdigest(content)
    with naming(home, "written"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # Once it is there it stays: plans keep the stamps of what they have read.
            with suppress(FileExistsError):
                (folder / "config.json").hardlink_to(file.name)
        if (folder / "config.json").read_bytes() != content:
            raise OutlierMergeError(f"{folder}: holds another file than its name says. Remove it.")
    return folder


def _architecture(path: Path, values: Mapping[str, Any]) -> _Architecture:
    name = values.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise OutlierMergeError(
            f"{path}: its general.architecture is {quoted(name)}, whose names of tensors are not "
            f"known ({', '.join(_ARCHITECTURES)} are). Name the model that it was made of instead, "
            "or convert it: from_pretrained(…, gguf_file=…) of transformers, then "
            "save_pretrained()."
        )
    if values.get("split.count", 1) not in (0, 1):
        raise OutlierMergeError(
            f"{path}: is one of {values['split.count']} parts. Join them first by "
            "llama-gguf-split of llama.cpp, which merges parts"
        )
    return _ARCHITECTURES[name]


def _out_dtype(metas: Any) -> DType:
    """Return what an output stores by default: the dtype of matrices, bfloat16 of quantised."""
    found = {meta.dtype.name for meta in metas if len(meta.shape) > 1} - {"uint8"}
    quantised = any(meta.dtype.name == "uint8" for meta in metas)
    return DTYPES[found.pop() if len(found) == 1 and not quantised else "bfloat16"]


def _name(path: Path, name: str, known: _Architecture) -> str:
    match = _NAME.fullmatch(name)
    part = {**_DENSE, **known.names}.get(match["part"]) if match else None
    is_outside = part is not None and part.startswith(("model.", "lm_head"))
    if match is None or part is None or is_outside != (match["layer"] is None):
        raise OutlierMergeError(
            f"{path}: tensor {quoted(name)}: is not known of the architecture "
            f"{known.model_type}. Name the model that it was made of instead."
        )
    start = "" if is_outside else f"model.layers.{int(match['layer'])}."
    end = "" if ".experts." in part else f".{match['end']}"
    return f"{start}{part}{end}"


def _source(
    meta: TensorMeta, kind: int, name: str, known: _Architecture, values: Mapping[str, Any],
    out_dtype: DType,
) -> Source:  # fmt: skip
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import _type_traits

    plus = known.norm if name.endswith("norm.weight") else 0.0
    stored: Source = meta
    is_packed = meta.dtype.name == "uint8"
    if is_packed and GGMLQuantizationType(kind) not in _type_traits:
        raise OutlierMergeError(
            f"{meta.path}: tensor {quoted(meta.name)}: is of the type "
            f"{GGMLQuantizationType(kind).name}, which the package gguf does not dequantise"
        )
    block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    shape = (*meta.shape[:-1], meta.shape[-1] // num_bytes * block) if is_packed else meta.shape
    if not is_packed and (plus or meta.dtype != out_dtype):
        row = meta.shape[-1] * num_bytes
        stored = replace(meta, dtype=DTYPES["uint8"], shape=(*meta.shape[:-1], row))
        is_packed = True
    if known.is_turned and re.search(r"self_attn\.[qk]_proj\.", name):
        stored = _turned_back(stored, shape[0], name, values)
    if not is_packed:
        return stored
    return GgmlTensor(
        name=meta.name, shape=shape, out_dtype=out_dtype, source=stored, kind=kind, plus=plus
    )


def _turned_back(source: Source, rows: int, name: str, values: Mapping[str, Any]) -> Source:
    """Return queries or keys in the order of rows that transformers' rotary embeddings expect."""
    start = values["general.architecture"]
    which = ("head_count_kv", "head_count") if "k_proj" in name else ("head_count",)
    found = (values.get(f"{start}.attention.{key}") for key in which)
    heads = next((number for number in found if number is not None), None)
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise OutlierMergeError(
            f"{source.stored[0].path}: tensor {quoted(source.name)}: has {rows} rows for "
            f"{shown(heads)} attention heads, expected an even number for each"
        )
    return swap(source, heads, rows // heads // 2, 2, source.shape)


def _joined(path: Path, name: str, parts: list[Source]) -> Source:
    """Return the only part, or experts' gate and up side by side."""
    is_pair = name.endswith("experts.gate_up_proj")
    if len(parts) == 1 and not is_pair:
        return parts[0]
    ends = [part.name.rpartition("_exps")[0].rpartition("_")[2] for part in parts]
    kinds = {(part.shape, part.dtype) for part in parts}
    if not is_pair or sorted(ends) != ["gate", "up"] or len(kinds) > 1 or len(parts[0].shape) != 3:
        found = ", ".join(f"{quoted(part.name)} {list(part.shape)}" for part in parts)
        what = "ffn_gate_exps and ffn_up_exps of one shape (experts, rows, columns)"
        raise OutlierMergeError(
            f"{path}: {name} is made of {found}, expected {what if is_pair else 'one tensor'}. "
            "Fetch it again."
        )
    gate, up = sorted(parts, key=lambda part: "ffn_up" in part.name)
    return join([gate, up], 1)


def _config(path: Path, header: Mapping[str, Any], names: set[str], dtype: DType) -> dict[str, Any]:
    values, counts = header["values"], header["counts"]
    known = _architecture(path, values)
    start = f"{values['general.architecture']}."
    config: dict[str, Any] = {
        "architectures": [known.architecture], "model_type": known.model_type,
        "tie_word_embeddings": "output.weight" not in names, "dtype": dtype.name,
        **(known.said or {}),
    }  # fmt: skip
    for key, new in {**_CONFIG, **known.config}.items():
        value = values.get(start + key)
        if value is not None and not isinstance(value, list):  # of a layer each
            config[new] = value
    for key, new in _TOKENS.items():
        if (value := values.get(f"tokenizer.ggml.{key}")) is not None:
            config[new] = value
    if known.has_bias and "blk.0.attn_q.bias" in names:
        config["attention_bias"] = True
    if "vocab_size" not in config and (number := counts.get("tokenizer.ggml.tokens")):
        config["vocab_size"] = number
    return config
