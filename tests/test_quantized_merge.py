"""Merges of quantised checkpoints: the same as of the models that the libraries dequantise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from checkpoints import as_many_as, family, load_folder
from safetensors.torch import save_file
from test_quantized import fp8_quantized, read

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.methods.table import METHODS

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


def _quantise(source: Path, target: Path, kind: str) -> Path:
    """Copy a model with its linear layers quantised as the libraries store them."""
    settings, quantise = METHODS_OF_QUANTISING[kind]
    shutil.copytree(source, target)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_folder(source).items():
        linear = "_proj.weight" in name
        tensors |= quantise(name, tensor) if linear else {name: tensor}
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return target


def _dequantised(source: Path, target: Path) -> Path:
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    base, tuned = family("llama", folder, num_models=3, dtype=torch.float32)
    paths = {"base": base}
    for kind, path in zip(METHODS_OF_QUANTISING, tuned, strict=True):
        paths[kind] = _quantise(path, folder / kind, kind)
        paths[f"{kind} dequantised"] = _dequantised(paths[kind], folder / f"{kind}-plain")
    return paths


@pytest.mark.parametrize("method", [name for name in METHODS if name != "passthrough"])
def test_quantised_task_models_merge_as_their_dequantised_selves(method, models, tmp_path):
    def run(suffix: str) -> dict[str, torch.Tensor]:
        names = [f"{kind}{suffix}" for kind in METHODS_OF_QUANTISING]
        spec = {
            "merge_method": method,
            "base_model": str(models["base"]),
            "models": [{"model": str(models[name])} for name in as_many_as(method, names)],
        }
        output = outliermerge.run(spec, output=tmp_path / f"out{suffix}").output
        assert outliermerge.verify(output) == []
        return load_folder(output)

    found, expected = run(""), run(" dequantised")
    assert found.keys() == expected.keys() == load_folder(models["base"]).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", METHODS_OF_QUANTISING)
def test_the_output_of_a_quantised_base_is_not_quantised(kind, models, tmp_path):
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(models[kind]),
        "models": [{"model": str(models["nf4" if kind != "nf4" else "int8"])}],
        "out_dtype": "float32",
    }
    plan = outliermerge.plan(spec)
    assert any("quantised with" in note for note in plan.notes)
    output = outliermerge.run(plan, output=tmp_path / "out").output
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        output, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32


def test_the_bytes_do_not_depend_on_memory_or_threads(models, tmp_path):
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(models["base"]),
        "models": [{"model": str(models[kind])} for kind in METHODS_OF_QUANTISING],
    }
    one = outliermerge.run(spec, output=tmp_path / "one", threads=1).output
    two = outliermerge.run(spec, output=tmp_path / "two", threads=2, memory="8MB").output
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
