"""`quantize: as-base`: what a merge does not move keeps its bytes, what it moves is coded anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder
from quantizing import (
    NF4,
    PACKED,
    PLAIN,
    checkpoint,
    dequantised,
    read,
)
from stored_forms import KINDS, MXFP4, NAME, ORDER, SHAPE, four_bits, mxfp4
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize


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
    again = _merge(base, task, tmp_path / "again", threads=3, memory="32MiB")
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


@pytest.mark.parametrize("zero_points", [False, True])
def test_columns_in_any_order_are_coded_with_their_own_scales(
    zero_points: bool, tmp_path: Path
) -> None:
    """In float64: what is written is W's nearest code at the scale of each column's group."""
    kind = f"4 bits,{' zero points,' * zero_points} groups in any order"
    torch.manual_seed(0)
    stored, config = KINDS[kind](torch.randn(SHAPE) * 0.02)
    base = tmp_path / "base"
    checkpoint(base, PLAIN | stored, config, dtype="float32")
    before = _decoded(stored)
    assert (_values(base).double() - before).abs().max() < 1e-8
    task, wanted = _moved(base, tmp_path / "task", 3.0)
    written = _merge(base, task, tmp_path / "out")
    assert written["a.weight_g_idx"].equal(ORDER.int())
    found, half = _decoded(written), len(wanted) // 2
    assert found[half:].equal(before[half:])
    assert (_values(tmp_path / "out").double() - found).abs().max() < 1e-8
    scale = written["a.weight_scale"].double()[:, ORDER]
    off = (found - wanted.double()).abs()[:half]
    assert (off <= scale[:half] * (0.5 + 1e-6)).double().mean() > 0.99
    assert (off <= scale[:half]).all()  # at the ends of a range
    # Scales are of the values of a group's own columns.
    for group in (0, 7):
        own = wanted[:half, ORDER == group].double()
        low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
        span = (high - low) / 15 if zero_points else 2 * torch.maximum(-low, high) / 15
        at = written["a.weight_scale"].double()[:half, group]
        torch.testing.assert_close(at, span, rtol=1e-3, atol=0)


def _decoded(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return (code − zero point) · scale of each column's group, in float64."""

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        """Eight codes of a word, the lowest bits first, stored plus 8."""
        return ((words[..., None].long() >> 4 * torch.arange(8)) & 15).flatten(-2) - 8

    codes = unpacked(stored["a.weight_packed"]).double()
    scale = stored["a.weight_scale"].double()
    zero = torch.zeros_like(scale)
    if "a.weight_zero_point" in stored:  # packed along the rows
        zero = unpacked(stored["a.weight_zero_point"].T).T.double()[: len(scale)]
    return (codes - zero[:, ORDER]) * scale[:, ORDER]


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
    stored = mxfp4(torch.empty(0))
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
        lambda name, values: four_bits(values, "nf4", quant_storage=torch.bfloat16),
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
