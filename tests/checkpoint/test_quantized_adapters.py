"""An adapter over a quantised base gives what it gives over the base's dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import load_folder
from safetensors.torch import save_file

import outliermerge
from outliermerge.errors import OutlierMergeError

Q, HEAD, EMBEDDINGS = "model.layers.0.self_attn.q_proj", "lm_head.weight", "model.embed_tokens"
CONFIGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "plain": None,
}


def save_base(folder: Path, kind: str, of: str, tie: bool | None) -> None:
    """Save a base of a kind whose values are those of one that is quantised with `of`."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    embeddings = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    if of == "fp8":
        scale = weight.abs().max().reshape(1, 1) / 448
        codes, name = (weight / scale).to(torch.float8_e4m3fn), f"{Q}.weight_scale_inv"
        values = codes.float() * scale
    else:
        scale = weight.abs().amax(1)
        codes, name = (weight * 127 / scale[:, None]).round().to(torch.int8), f"{Q}.SCB"
        values = codes.float() * scale[:, None] * 7.874015718698502e-3
    stored = {f"{Q}.weight": values} if kind == "plain" else {f"{Q}.weight": codes, name: scale}
    stored |= {f"{EMBEDDINGS}.weight": embeddings, HEAD: embeddings.clone()}
    config = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "dtype": "bfloat16"}
    config |= {} if tie is None else {"tie_word_embeddings": tie}
    config |= {"quantization_config": CONFIGS[kind]} if CONFIGS[kind] else {}
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def save_adapter(folder: Path, saved: list[str], targets: list[str]) -> None:
    made = torch.Generator().manual_seed(2)
    tensors = {}
    for name, rows in ((Q, 8), ("lm_head", 16)):
        if name.rpartition(".")[2] in targets:
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 8, generator=made)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=made)
    for name in (EMBEDDINGS, "lm_head"):
        if name.rpartition(".")[2] in saved:
            tensors[f"base_model.model.{name}.weight"] = torch.randn(16, 8, generator=made)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": saved}))


def outcome(folder: Path, kind: str) -> dict[str, torch.Tensor] | str:
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / kind),
        "models": [{"model": str(folder / "adapter"), "parameters": {"weight": 0.5}}],
        "dtype": "float32",
    }
    try:
        return load_folder(outliermerge.run(spec, output=folder / f"of_{kind}").output)
    except OutlierMergeError as error:
        return str(error).replace(str(folder / kind), "base")


@pytest.mark.parametrize("quantised", ["fp8", "bitsandbytes"])
@pytest.mark.parametrize("tie", [True, False, None])
@pytest.mark.parametrize(
    ("saved", "targets"),
    [
        ([], ["q_proj"]),
        ([], ["q_proj", "lm_head"]),
        (["embed_tokens"], ["q_proj"]),
        (["lm_head"], ["q_proj"]),
        (["embed_tokens", "lm_head"], ["q_proj"]),
    ],
    ids=str,
)
def test_a_quantised_base_with_a_stored_head_is_like_its_values(
    tmp_path, quantised, tie, saved, targets
):
    for kind in (quantised, "plain"):
        save_base(tmp_path / kind, kind, quantised, tie)
    save_adapter(tmp_path / "adapter", saved, targets)
    ours, expected = outcome(tmp_path, quantised), outcome(tmp_path, "plain")
    if isinstance(expected, str):
        assert ours == expected
        return
    assert isinstance(ours, dict) and ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    written = json.loads((tmp_path / f"of_{quantised}/config.json").read_text())
    assert "quantization_config" not in written
