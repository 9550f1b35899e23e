"""`quantize: as-base`: what a merge does not move keeps its bytes, what it moves is coded anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from checkpoints import load_folder
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from quantizing import (
    NF4,
    PACKED,
    PLAIN,
    checkpoint,
    compressed_config,
    dequantised,
    read,
    scheme,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize

NAME = "a.weight"
MXFP4 = {"quant_method": "mxfp4"}
UE8M0 = {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"}
SHAPE = (48, 512)


def _four_bits(values: torch.Tensor, kind: str, **more: Any) -> dict[str, torch.Tensor]:
    codes, state = bnb.quantize_4bit(values, quant_type=kind, **more)
    parts = state.as_dict(packed=True)
    return {NAME: codes, **{f"{NAME}.{part}": value for part, value in parts.items()}}


def _whole(values: torch.Tensor, bits: int, symmetric: bool, layout: str, **args: Any) -> Any:
    """Return the parts that compressed-tensors stores, and the config."""
    kind = scheme(type="int", num_bits=bits, symmetric=symmetric, **args)
    assert kind.weights is not None
    groups = values.view(len(values), -1, args.get("group_size", values.shape[1]))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), kind.weights)
    parts = {"weight": values, "weight_scale": scale}
    if not symmetric:
        parts["weight_zero_point"] = zero.to(torch.int8)
    if layout == "pack-quantized":
        made = BaseCompressor.get_value_from_registry(layout).compress(parts, kind)
    else:
        codes = quantize(values, scale, zero, kind.weights, dtype=torch.int8)
        made = parts | {"weight": codes}
    return {f"a.{k}": v for k, v in made.items()}, compressed_config(kind, layout=layout)


def _mxfp4(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return blocks and scales of experts (2, in, out), with any codes."""
    experts = 2
    generator = torch.Generator().manual_seed(0)
    shape = (experts, SHAPE[0], SHAPE[1] // 64)
    codes = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(118, 124, shape, generator=generator).to(torch.uint8)
    return {f"{NAME}_blocks": codes, f"{NAME}_scales": scales}


def _ue8m0(values: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    blocks = values.view(3, 16, 32, 16)
    exponents = (blocks.abs().amax((1, 3)) / 448).log2().ceil()
    codes = (blocks / exponents.exp2()[:, None, :, None]).view(SHAPE).to(torch.float8_e4m3fn)
    scale = exponents.exp2()
    if dtype == torch.uint8:
        scale = (exponents + 127).to(dtype)
    return {NAME: codes, f"{NAME}_scale_inv": scale}


GROUP = {"strategy": "group", "group_size": 32}
ROW = {"strategy": "channel"}
KINDS: dict[str, Any] = {
    "nf4": lambda v: (_four_bits(v, "nf4"), NF4),
    "nf4, nested": lambda v: (_four_bits(v, "nf4", compress_statistics=True), NF4),
    "fp4": lambda v: (_four_bits(v, "fp4", blocksize=128), NF4),
    "mxfp4": lambda v: (_mxfp4(v), MXFP4),
    "4 bits": lambda v: _whole(v, 4, True, "pack-quantized", **GROUP),
    "4 bits, zero points": lambda v: _whole(v, 4, False, "pack-quantized", **GROUP),
    "3 bits, zero points": lambda v: _whole(v, 3, False, "pack-quantized", **GROUP),
    "8 bits": lambda v: _whole(v, 8, True, "pack-quantized", **ROW),
    "int8, zero points": lambda v: _whole(v, 8, False, "int-quantized", **ROW),
    "fp8, exponents": lambda v: (_ue8m0(v, torch.uint8), UE8M0),
    "fp8, powers of 2": lambda v: (_ue8m0(v, torch.float32), UE8M0),
}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _values(folder: Path) -> torch.Tensor:
    return read(dequantize(open_checkpoint(folder)).tensors[NAME]).float()


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("as_base")
    torch.manual_seed(0)
    stored, config = KINDS[request.param](torch.randn(SHAPE) * 0.02)
    checkpoint(folder / "base", PLAIN | stored, config, dtype="float32")
    shutil.copytree(folder / "base", folder / "again")
    dequantised(folder / "base", folder / "plain")
    return folder / "base"


def _merge(base: Path, task: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(task)}],
        "parameters": {"weight": 1},
        "quantize": "as-base",
    }
    outliermerge.run(spec, output=output, options=outliermerge.RunOptions(**options))
    return load_folder(output)


def _moved(base: Path, folder: Path, factor: float) -> tuple[Path, torch.Tensor]:
    """Return a plain model, of which the first half of the weight is another, and its weight."""
    weight = _values(base)
    half = len(weight) // 2
    torch.manual_seed(1)
    weight[:half] = torch.randn(weight[:half].shape) * weight[:half].std() * factor
    checkpoint(folder, PLAIN | {NAME: weight}, dtype="float32")
    return folder, weight


@pytest.mark.sampled(5)
@pytest.mark.parametrize("task", ["again", "plain"])
def test_a_model_merged_with_itself_is_the_same_bytes(
    base: Path, tmp_path: Path, task: str
) -> None:
    stored = load_folder(base)
    written = _merge(base, base.parent / task, tmp_path / "out")
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape)
        assert _bits(written[name]).equal(_bits(tensor)), name
    configs = (json.loads((f / "config.json").read_text()) for f in (base, tmp_path / "out"))
    assert next(configs)["quantization_config"] == next(configs)["quantization_config"]


@pytest.mark.sampled(3)
def test_what_is_not_moved_keeps_its_values_and_the_rest_is_near(
    base: Path, tmp_path: Path
) -> None:
    task, wanted = _moved(base, tmp_path / "task", 0.7)
    _merge(base, task, tmp_path / "out")
    found, before, half = _values(tmp_path / "out"), _values(base), len(wanted) // 2
    assert found[half:].equal(before[half:])
    off = float((found[:half] - wanted[:half]).norm() / wanted[:half].norm())
    assert 0 < off < 0.3
    manifest = json.loads((tmp_path / "out/outliermerge.json").read_text())
    said = [e["statistics"]["quantization_error"] for e in manifest["tensors"].values()
            if e.get("statistics", {}).get("quantization_error")]  # fmt: skip
    whole = float((found - wanted).double().norm() / wanted.double().norm())
    assert said == [pytest.approx(whole, rel=1e-3)]


@pytest.mark.sampled(3)
def test_the_bytes_depend_neither_on_threads_nor_on_memory(base: Path, tmp_path: Path) -> None:
    task, _ = _moved(base, tmp_path / "task", 3.0)
    written = _merge(base, task, tmp_path / "out")
    again = _merge(base, task, tmp_path / "again", threads=3, memory="8MiB")
    for name, tensor in again.items():
        assert _bits(tensor).equal(_bits(written[name])), name


@pytest.mark.parametrize("kind", ["nf4", "4 bits", "4 bits, zero points", "int8, zero points"])
def test_what_is_moved_is_coded_as_its_owner_does(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(SHAPE) * scale for scale in (0.02, 0.05))
    stored, config = KINDS[kind](first)
    checkpoint(tmp_path / "base", PLAIN | stored, config, dtype="float32")
    checkpoint(tmp_path / "task", PLAIN | {NAME: second}, dtype="float32")
    spec = {
        "merge_method": "linear",
        "models": [
            {"model": str(tmp_path / "base"), "parameters": {"weight": 0}},
            {"model": str(tmp_path / "task"), "parameters": {"weight": 1}},
        ],
        "parameters": {"normalize": False},
        "quantize": "as-base",
    }
    outliermerge.run(spec, output=tmp_path / "out")
    written = load_folder(tmp_path / "out")
    for name, tensor in KINDS[kind](second)[0].items():
        same = (_bits(written[name]) == _bits(tensor)).double().mean()
        assert same == 1 if "scale" in name or "absmax" in name else same > 0.999, name


def test_nested_scales_that_are_too_small_are_fitted_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored, config = KINDS["nf4, nested"](torch.randn(SHAPE) * 0.02)
    base = tmp_path / "base"
    checkpoint(base, PLAIN | stored, config, dtype="float32")
    task, wanted = _moved(base, tmp_path / "task", 8.0)
    written = _merge(base, task, tmp_path / "out")
    found, before, half = _values(tmp_path / "out"), _values(base), len(wanted) // 2
    assert float((found - wanted).norm() / wanted.norm()) < 0.13
    assert (found[half:] - before[half:]).norm() < 0.1 * before[half:].norm()
    codes = (_bits(written[NAME]), _bits(stored[NAME]))
    assert codes[0][len(codes[0]) // 2 :].equal(codes[1][len(codes[1]) // 2 :])


def test_blocks_that_become_zeros_leave_nested_scales_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored, config = KINDS["nf4, nested"](torch.randn(SHAPE) * 0.02)
    base, nested = tmp_path / "base", f"{NAME}.nested_absmax"
    checkpoint(base, PLAIN | stored, config, dtype="float32")
    weight = _values(base)
    weight[0] = 0
    checkpoint(tmp_path / "task", PLAIN | {NAME: weight}, dtype="float32")
    written = _merge(base, tmp_path / "task", tmp_path / "out")
    assert _values(tmp_path / "out").equal(weight)
    blocks = SHAPE[1] // 64  # of the row of zeros
    kept = [found[f"{NAME}.absmax"][blocks:] for found in (written, stored)]
    assert kept[0].equal(kept[1])
    assert written[nested].equal(stored[nested])


def test_transformers_dequantises_what_is_written_as_ours_does(tmp_path: Path) -> None:
    stored = _mxfp4(torch.empty(0))
    base = tmp_path / "base"
    checkpoint(base, PLAIN | stored, MXFP4, dtype="bfloat16")
    task, wanted = _moved(base, tmp_path / "task", 1.0)
    written = _merge(base, task, tmp_path / "out")
    parts = (written[f"{NAME}_blocks"], written[f"{NAME}_scales"])
    theirs = convert_moe_packed_tensors(*parts, dtype=torch.float32)
    assert theirs.equal(_values(tmp_path / "out"))
    assert (theirs - wanted).norm() < 0.13 * wanted.norm()


OTHERS = {
    "gptq": (*PACKED["gptq"], r"config\.json is of gptq, and these can be: bitsandbytes"),
    "awq": (*PACKED["awq"], r"config\.json is of awq, and these can be"),
    "codes stored as floats": (
        NF4,
        lambda name, values: _four_bits(values, "nf4", quant_storage=torch.bfloat16),
        r"of a kind that can only be read, or have other names in the output:\n.*a\.weight",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    config, quantise, message = OTHERS[kind]
    values = torch.randn(32, 64).bfloat16()
    checkpoint(tmp_path / "base", PLAIN | quantise(NAME, values), config)
    checkpoint(tmp_path / "task", PLAIN | {NAME: values})
    with pytest.raises(outliermerge.OutlierMergeError, match=message):
        _merge(tmp_path / "base", tmp_path / "task", tmp_path / "out")
