"""Small merges of quantised, adapted and packed models, and into such, for tests that try each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from packing import GPTQ, gptq
from safetensors.torch import save_file

import outliermerge
from outliermerge.execution.threads import choose_options
from outliermerge.output.manifest import identity

WIDTH, WIDE, HALF = 32, 64, 16
LAYER = "model.layers.0"
LINEAR = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (HALF, WIDTH),
    "self_attn.v_proj": (HALF, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDE, WIDTH),
    "mlp.up_proj": (WIDE, WIDTH),
    "mlp.down_proj": (WIDTH, WIDE),
}
TOKENS = ("<s>", "</s>", "a", "b", "ab")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": WIDTH,
    "intermediate_size": WIDE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": len(TOKENS),
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "head_dim": 16,  # with these a GGUF file's config has the same keys
    "rope_theta": 10_000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
NUM_EXPERTS = 3
RULES = [
    {
        "from": ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
        "to": "experts.gate_up_proj",
        "axis": 1,
    },
    {"from": "experts.*.down_proj.weight", "to": "experts.down_proj"},
]
# What each merge has besides its method and its base.
FORMS: dict[str, dict[str, Any]] = {
    "fp8": {"models": ["fp8", "two"]},
    "gptq": {"models": ["gptq", "two"]},
    "gguf": {"models": ["gguf/model.gguf", "two"]},
    "lora": {"models": ["base+lora", "two"]},
    "loha": {"models": ["base+loha", "two"]},
    "packed": {"base": "experts", "models": ["packed"], "convert": RULES},
    "unpacked": {"base": "packed", "models": ["experts"], "convert": RULES},
    "to-fp8": {"quantize": "fp8"},
    "to-int8": {"quantize": "int8"},
    "to-mxfp4": {"quantize": "mxfp4"},
    "to-base": {"base": "fp8", "quantize": "as-base"},
    "to-gguf": {"format": "gguf", "quantize": "q8_0"},
    "rounded": {"rounding": "stochastic", "seed": 3},
}
# What they import where a merge needs it.
IMPORTED = ("gguf",)


def spec(form: str, root: Path, weight: float = 0.5) -> dict[str, Any]:
    """Return a merge of the models in a folder; another weight gives other bytes."""
    more = dict(FORMS[form])
    base, models = more.pop("base", "base"), more.pop("models", ["one", "two"])
    paths = ["+".join(str(root / part) for part in model.split("+")) for model in models]
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(root / base),
        "models": [{"model": path} for path in paths],
        "parameters": {"weight": weight},
        **more,
    }


def identities(root: Path) -> dict[str, Any]:
    """Return by form what a run that goes on compares."""
    options = choose_options(device="cpu", memory="1GiB", threads=1, kernels=True)
    return {form: identity(outliermerge.plan(spec(form, root)), options) for form in FORMS}


def save_specs(folder: Path, models: Path, *, start: str = "", end: str = "", **more: Any) -> None:
    """Write a file for each form, with something before and after its name if wanted."""
    for form in FORMS:
        (folder / f"{start}{form}{end}.yaml").write_text(yaml.safe_dump(spec(form, models, **more)))


def save_models(root: Path) -> None:
    """Save what the merges read."""
    from checkpoints import save_lora  # it imports transformers

    for seed, name in enumerate(("base", "one", "two")):
        save(root / name, _llama(seed), CONFIG)
    one = _llama(1)
    save(root / "fp8", _coded(one, _fp8), CONFIG | {"quantization_config": FP8})
    save(root / "gptq", _coded(one, gptq), CONFIG | {"quantization_config": GPTQ})
    alone = {"merge_method": "passthrough", "models": [{"model": str(root / "one")}]}
    outliermerge.run(alone | {"format": "gguf", "quantize": "q8_0"}, output=root / "gguf")
    layer = f"{LAYER}.self_attn.q_proj"
    draw = torch.Generator().manual_seed(7)
    factors = {
        f"{layer}.lora_A.weight": torch.randn(1, WIDTH, generator=draw),
        f"{layer}.lora_B.weight": torch.randn(WIDTH, 1, generator=draw),
    }
    save_lora(root / "lora", factors, target_modules=["q_proj"])
    factors = {
        f"{layer}.hada_w{number}_{end}": torch.randn(shape, generator=draw)
        for number in (1, 2)
        for end, shape in (("a", (WIDTH, 2)), ("b", (2, WIDTH)))
    }
    save_lora(root / "loha", factors)
    said = {"peft_type": "LOHA", "r": 2, "alpha": 2, "target_modules": ["q_proj"]}
    (root / "loha" / "adapter_config.json").write_text(json.dumps(said))
    experts = {"model_type": "test"}
    for seed, name in enumerate(("experts", "packed")):
        save(root / name, _experts(seed, is_packed=name == "packed"), experts)


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Save a model, a Llama with its tokenizer."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if config["model_type"] == "llama":
        (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))


def num_tensors(whole: Path) -> int:
    """Return how many tensors an output has."""
    return len(json.loads((whole / "outliermerge.json").read_text())["tensors"])


def assert_same(output: Path, whole: Path) -> None:
    """Check that an output has the files of another, and is alone in its folder."""
    from outputs_elsewhere import files_of  # the driver of faults imports this module without it

    found, expected = files_of(output), files_of(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert outliermerge.verify(output) == []
    assert [path.name for path in output.parent.iterdir() if path.name != "cache"] == [output.name]


def _llama(seed: int) -> dict[str, torch.Tensor]:
    rows, norm = len(TOKENS), (WIDTH,)
    shapes = {f"{LAYER}.{part}": shape for part, shape in LINEAR.items()} | {
        "model.embed_tokens": (rows, WIDTH),
        f"{LAYER}.input_layernorm": norm,
        f"{LAYER}.post_attention_layernorm": norm,
        "model.norm": norm,
        "lm_head": (rows, WIDTH),
    }
    draw = torch.Generator().manual_seed(seed)
    return {f"{n}.weight": torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()}


def _coded(tensors: dict[str, torch.Tensor], quantise: Any) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stored |= quantise(name, tensor) if "_proj.weight" in name else {name: tensor}
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def _fp8(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = values.shape
    blocks = values.float().view(rows // 16, 16, columns // 16, 16)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    codes = (blocks / scales).view(rows, columns).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales[:, 0, :, 0].clone()}


def _experts(seed: int, *, is_packed: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    gate, up, down = (
        torch.randn(NUM_EXPERTS, *shape, generator=draw)
        for shape in ((WIDE, WIDTH), (WIDE, WIDTH), (WIDTH, WIDE))
    )
    stem = f"{LAYER}.mlp.experts"
    if is_packed:
        return {f"{stem}.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.down_proj": down}
    return {
        f"{stem}.{number}.{part}_proj.weight": each[number].clone()
        for number in range(NUM_EXPERTS)
        for part, each in (("gate", gate), ("up", up), ("down", down))
    }


def _tokenizer() -> dict[str, Any]:
    """Return what a tokenizer.json of BPE on bytes holds, as a GGUF output needs one."""
    of_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": n, "content": TOKENS[n], "special": True} | flags for n in (0, 1)],
        "normalizer": None,
        "pre_tokenizer": of_bytes | {"use_regex": True},
        "post_processor": None,
        "decoder": of_bytes | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(TOKENS)},
            "merges": [["a", "b"]],
        },
    }
