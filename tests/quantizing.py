"""Models quantised as the libraries store them, and their values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import torch
import transformers
from checkpoints import load_folder
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from packing import AWQ, GPTQ, awq, gptq
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Checkpoint, Source


def read(source: Source) -> torch.Tensor:
    with Reader() as reader:
        return reader.values(source, 0, source.num_elements).view(source.shape)


PLAIN = {"norm.weight": torch.ones(6)}


def checkpoint(folder: Path, tensors: dict, quantization: object = None, **config) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def scheme(**args) -> QuantizationScheme:
    weights = QuantizationArgs(**{"num_bits": 8, "type": "float", **args})
    return QuantizationScheme(targets=["Linear"], weights=weights)


def compressed_config(*schemes: QuantizationScheme, layout: str = "naive-quantized") -> dict:
    groups = {f"group_{n}": json.loads(s.model_dump_json()) for n, s in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


def fp8_quantized(name: str, values: torch.Tensor, block: list[int] | None) -> dict:
    config = transformers.FineGrainedFP8Config(weight_block_size=block)
    return Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one(name, values)


INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def _int8(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales, _ = bnb.int8_vectorwise_quant(values.half())
    return {
        name: codes,
        name.replace("weight", "SCB"): scales,
        f"{name}_format": torch.tensor(0, dtype=torch.uint8),
    }


def _nf4(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, state = bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    parts = state.as_dict(packed=True)
    return {name: codes, **{f"{name}.{part}": value for part, value in parts.items()}}


METHODS_OF_QUANTISING = {
    "int8": (INT8, _int8),
    "nf4": (NF4, _nf4),
    "fp8": (FP8, lambda name, values: fp8_quantized(name, values, [16, 16])),
}


_INT4 = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=16),
)


def _int4(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    scales = values.float().reshape(len(values), -1, 16).abs().amax(-1) / 7 + 1e-4
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    parts = {"weight": values.float(), "weight_scale": scales}
    stem = name.removesuffix("weight")
    return {f"{stem}{part}": v for part, v in compressor.compress(parts, _INT4).items()}


# Those whose codes are packed, several in a word.
PACKED = {
    "gptq": (GPTQ, gptq),
    "awq": (AWQ, awq),
    "int4": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": json.loads(_INT4.model_dump_json())},
        },
        _int4,
    ),
}


def quantise(source: Path, target: Path, kind: str) -> Path:
    """Copy a model with its linear layers quantised as the libraries store them."""
    settings, quantise_tensor = (METHODS_OF_QUANTISING | PACKED)[kind]
    shutil.copytree(source, target)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_folder(source).items():
        linear = "_proj.weight" in name
        tensors |= quantise_tensor(name, tensor) if linear else {name: tensor}
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return target


def dequantised(source: Path, target: Path) -> Path:
    """Copy a quantised model as plain float32; test_quantized.py shows these values right."""
    shutil.copytree(source, target)
    opened = dequantize(open_checkpoint(source))
    save_file(
        {name: read(tensor).contiguous() for name, tensor in opened.tensors.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target
