"""Packed codes: MXFP4, exponents as scales, compressed-tensors' packed formats; by their owners."""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_folder
from compressed_tensors.compressors.base import BaseCompressor
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import PLAIN, checkpoint, compressed_config, read, scheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import outliermerge
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 8]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
E8M0 = torch.float8_e8m0fnu


def bytes_of(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(torch.uint8)


def gpt_oss(experts: int = 3, rows: int = 10, blocks: int = 2, name: str = "e.down_proj") -> dict:
    return {
        f"{name}_blocks": bytes_of(experts, rows, blocks, 16),
        f"{name}_scales": bytes_of(experts, rows, blocks, low=100, high=140, seed=1),
    }


def refusal(opened) -> str:
    with pytest.raises(OutlierMergeError) as error:
        dequantize(opened)
    return str(error.value)


@pytest.mark.parametrize("shape", [(3, 10, 2), (1, 64, 1), (2, 700, 4)])
def test_mxfp4_experts_are_what_transformers_makes_of_them(tmp_path, shape):
    stored = gpt_oss(*shape)
    opened = dequantize(checkpoint(tmp_path, stored | PLAIN, MXFP4))
    source = opened.tensors["e.down_proj"]
    assert set(opened.tensors) == {"e.down_proj", *PLAIN}
    assert (source.shape, source.out_dtype.name) == (
        (shape[0], shape[2] * 32, shape[1]),
        "bfloat16",
    )
    for dtype in (torch.float32, torch.bfloat16):
        expected = convert_moe_packed_tensors(*stored.values(), dtype=dtype)
        assert torch.equal(read(source).to(dtype), expected)


@pytest.mark.parametrize("exponent", [0, 1, 253, 254])
def test_the_least_and_greatest_exponents_are_read(tmp_path, exponent):
    stored = gpt_oss()
    stored["e.down_proj_scales"] = torch.full_like(stored["e.down_proj_scales"], exponent)
    source = dequantize(checkpoint(tmp_path, stored, MXFP4)).tensors["e.down_proj"]
    expected = convert_moe_packed_tensors(*stored.values(), dtype=torch.float64)
    assert torch.equal(read(source).double(), expected.float().double())


@pytest.mark.parametrize("dtype", [torch.uint8, E8M0, torch.float32])
@pytest.mark.parametrize("block", [[16, 8], [1, 8]])
def test_fp8_scales_may_be_exponents(tmp_path, dtype, block):
    torch.manual_seed(0)
    weight = torch.randn(32, 24).to(torch.float8_e4m3fn)
    exponents = bytes_of(32 // block[0], 24 // block[1], low=90, high=150)
    scale = exponents.view(E8M0).float() if dtype == torch.float32 else exponents.view(dtype)
    config = FP8 | {"weight_block_size": block, "scale_fmt": "ue8m0"}
    opened = checkpoint(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, config)
    source = dequantize(opened).tensors["a.weight"]
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(read(source), expected)


def packed(name, values, with_type, layout, **parts):
    """Return what compressed_tensors stores for a weight, and what it makes of that."""
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress({"weight": values, **parts}, with_type)
    expected = compressor.decompress(stored, with_type)["weight"]
    return {f"{name}.{part}": value for part, value in stored.items()}, expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    ("args", "scale_shape", "symmetric"),
    [({"strategy": "channel"}, (40, 1), True), ({"strategy": "channel"}, (40, 1), False),
     ({"strategy": "group", "group_size": 16}, (40, 6), True),
     ({"strategy": "group", "group_size": 16}, (40, 6), False),
     ({"strategy": "tensor"}, (1,), True)],
)  # fmt: skip
def test_packed_whole_numbers_are_what_the_library_makes_of_them(
    tmp_path, bits, symmetric, args, scale_shape
):
    torch.manual_seed(0)
    with_type = scheme(type="int", num_bits=bits, symmetric=symmetric, **args)
    half = 1 << bits - 1
    zero = torch.randint(-half, half, scale_shape, dtype=torch.int8)
    stored, expected = packed(
        "a", torch.randn(40, 96), with_type, "pack-quantized",
        weight_scale=torch.rand(scale_shape) + 0.01, weight_zero_point=zero,
    )  # fmt: skip
    config = compressed_config(with_type, layout="pack-quantized")
    opened = dequantize(checkpoint(tmp_path, PLAIN | stored, config))
    assert set(opened.tensors) == {"a.weight", *PLAIN}
    assert torch.equal(read(opened.tensors["a.weight"]), expected)


@pytest.mark.parametrize("columns", [90, 100])
def test_packed_rows_may_end_within_a_word(tmp_path, columns):
    torch.manual_seed(0)
    with_type = scheme(type="int", num_bits=4, strategy="channel")
    scale = torch.rand(5, 1)
    stored, expected = packed(
        "a", torch.randn(5, columns), with_type, "pack-quantized", weight_scale=scale
    )
    config = compressed_config(with_type, layout="pack-quantized")
    source = dequantize(checkpoint(tmp_path, stored, config)).tensors["a.weight"]
    assert torch.equal(read(source), expected)


@pytest.mark.parametrize("unset", [False, True])
def test_the_columns_of_a_group_may_be_in_another_order(tmp_path, unset):
    torch.manual_seed(0)
    with_type = scheme(type="int", num_bits=4, strategy="group", group_size=16)
    stored, expected = packed(
        "a", torch.randn(40, 96), with_type, "pack-quantized", weight_scale=torch.rand(40, 6)
    )
    order = torch.arange(96)[torch.randperm(96)] // 16
    if not unset:
        scale = stored["a.weight_scale"]
        codes = expected / scale.repeat_interleave(16, 1)
        expected = codes.round() * scale[:, order]
    stored["a.weight_g_idx"] = (torch.full((96,), -1) if unset else order).int()
    config = compressed_config(with_type, layout="pack-quantized")
    source = dequantize(checkpoint(tmp_path, stored, config)).tensors["a.weight"]
    assert torch.equal(read(source), expected)


@pytest.mark.parametrize("layout", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_packed_floats_are_what_the_library_makes_of_them(tmp_path, layout):
    torch.manual_seed(0)
    is_nv = layout.startswith("nv")
    size = 16 if is_nv else 32
    how = (
        {"strategy": "tensor_group"}
        if is_nv
        else {"strategy": "group", "scale_dtype": "torch.uint8"}
    )
    with_type = scheme(num_bits=4, group_size=size, **how)
    parts = {"weight_scale": torch.exp2(torch.randint(-6, 4, (40, 96 // size)).float())}
    if is_nv:
        parts = {
            "weight_scale": torch.rand(40, 6) * 100,
            "weight_global_scale": torch.tensor([37.5]),
        }
    stored, expected = packed("a", torch.randn(40, 96), with_type, layout, **parts)
    config = compressed_config(with_type, layout=layout)
    opened = dequantize(checkpoint(tmp_path, stored, config))
    assert list(opened.tensors) == ["a.weight"]
    assert torch.equal(read(opened.tensors["a.weight"]).to(expected.dtype), expected)


INT4 = scheme(type="int", num_bits=4, strategy="group", group_size=16)
GOOD, _ = packed("a", torch.ones(8, 32), INT4, "pack-quantized", weight_scale=torch.ones(8, 2))
INT4_CONFIG = compressed_config(INT4, layout="pack-quantized")
UNEVEN = compressed_config(
    scheme(type="int", num_bits=4, strategy="group", group_size=16, symmetric=False),
    layout="pack-quantized",
)
NV = scheme(num_bits=4, group_size=16, strategy="tensor_group")
NV_GOOD, _ = packed("a", torch.ones(8, 32), NV, "nvfp4-pack-quantized",
                    weight_scale=torch.ones(8, 2), weight_global_scale=torch.ones(1))  # fmt: skip
NV_CONFIG = compressed_config(NV, layout="nvfp4-pack-quantized")
OSS = gpt_oss()
UNPACKED = {
    "a.weight": torch.ones(8, 32, dtype=torch.int8), "a.weight_scale": GOOD["a.weight_scale"]
}  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "config", "name", "message"),
    [
        (OSS | {"e.down_proj_scales": bytes_of(3, 10, 3)}, MXFP4, "e.down_proj_blocks",
         "uint8 (3, 10, 2, 16) with scales uint8 (3, 10, 3), expected"),
        (OSS | {"e.down_proj_blocks": bytes_of(3, 10, 2, 15)}, MXFP4, "e.down_proj_blocks",
         "uint8 (3, 10, 2, 15) with scales"),
        (OSS | {"e.down_proj_scales": torch.ones(3, 10, 2)}, MXFP4, "e.down_proj_blocks",
         "with scales float32"),
        (OSS | {"e.down_proj_scales": None}, MXFP4, "e.down_proj_blocks", "is no part of a"),
        (OSS | {"e.down_proj_blocks": None}, MXFP4, "e.down_proj_scales", "is no part of a"),
        (OSS | {"e.down_proj": torch.ones(2, 2)}, MXFP4, "e.down_proj_blocks",
         "stored beside e.down_proj, the same weight"),
        (GOOD | {"a.weight_shape": torch.tensor([8, 33])}, INT4_CONFIG, "a.weight_packed",
         "(8, 4) for a weight (8, 33), with scales float32 (8, 2): fits none of"),
        (GOOD | {"a.weight_shape": torch.tensor([9, 32])}, INT4_CONFIG, "a.weight_shape",
         "says (9, 32), but the codes are (8, 4)"),
        (GOOD | {"a.weight_shape": torch.tensor([8])}, INT4_CONFIG, "a.weight_shape",
         "int64 (1,), expected 2 whole numbers"),
        (GOOD | {"a.weight_shape": None}, INT4_CONFIG, "a.weight_packed", "shape is missing"),
        (GOOD | {"a.weight_scale": None}, INT4_CONFIG, "a.weight_packed", "scale is missing"),
        (GOOD | {"a.weight_scale": torch.ones(8, 3)}, INT4_CONFIG, "a.weight_packed", "fits none"),
        (GOOD | {"a.weight_packed": torch.ones(8, 4)}, INT4_CONFIG, "a.weight_packed",
         "float32 (8, 4), expected a matrix of bytes or of int32"),
        (GOOD | {"a.weight": torch.ones(8, 4)}, INT4_CONFIG, "a.weight_packed", "stored beside"),
        (GOOD | {"a.weight_g_idx": torch.ones(4)}, INT4_CONFIG, "a.weight_g_idx",
         "float32 (4,), expected int32 (32,)"),
        (GOOD, UNEVEN, "a.weight_scale", "its config says that there is a a.weight_zero_point"),
        (UNPACKED, UNEVEN, "a.weight_scale", "its config says that there is a a.weight_zero_point"),
        (GOOD | {"a.weight_zero_point": torch.ones(8, 2, dtype=torch.int32)}, UNEVEN,
         "a.weight_zero_point", "int32 (8, 2), expected int32 (1, 2)"),
        (NV_GOOD | {"a.weight_scale": torch.ones(8, 2)}, NV_CONFIG, "a.weight_scale",
         "float32 (8, 2) for a weight (8, 32), expected float8_e4m3fn with one for 16 columns"),
        (NV_GOOD | {"a.weight_global_scale": torch.ones(2)}, NV_CONFIG, "a.weight_global_scale",
         "float32 (2,), expected one float32"),
        (NV_GOOD | {"a.weight_global_scale": None}, NV_CONFIG, "a.weight_scale", "expected uint8"),
    ],
)  # fmt: skip
def test_broken_packed_tensors_are_refused_by_name(tmp_path, stored, config, name, message):
    kept = {name: value for name, value in stored.items() if value is not None}
    text = refusal(checkpoint(tmp_path, kept, config))
    assert text.startswith(f"{tmp_path / 'model.safetensors'}: tensor {name!r}: ")
    assert message in text


@pytest.mark.parametrize(
    ("stored", "config", "name", "message"),
    [
        (OSS | {"e.down_proj_scales": OSS["e.down_proj_scales"] * 0 + 255}, MXFP4,
         "e.down_proj_scales", "NaN (the exponent 255)"),
        ({"a.weight": torch.ones(32, 8).to(torch.float8_e4m3fn), 
          "a.weight_scale_inv": torch.full((2, 1), 255, dtype=torch.uint8)},
         FP8, "a.weight_scale_inv", "NaN (the exponent 255)"),
        ({"a.weight": torch.ones(32, 8).to(torch.float8_e4m3fn),
          "a.weight_scale_inv": torch.tensor([[1.0], [float("nan")]])},
         FP8, "a.weight_scale_inv", "has a scale that is nan, expected a finite number"),
        (GOOD | {"a.weight_scale": torch.full((8, 2), float("inf"))}, INT4_CONFIG,
         "a.weight_scale", "has a scale that is inf"),
        (NV_GOOD | {"a.weight_global_scale": torch.zeros(1)}, NV_CONFIG, "a.weight_global_scale",
         "has a scale that is 0.0"),
        (GOOD | {"a.weight_g_idx": torch.arange(32, dtype=torch.int32)}, INT4_CONFIG,
         "a.weight_g_idx", "has the groups 0 to 31, expected 0 to 1"),
    ],
)  # fmt: skip
def test_scales_that_make_nothing_of_weights_are_refused_as_they_are_read(
    tmp_path, stored, config, name, message
):
    opened = dequantize(checkpoint(tmp_path, stored, config))
    with pytest.raises(OutlierMergeError) as error:
        for source in opened.tensors.values():
            read(source)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'model.safetensors'}: tensor {name!r}: ")
    assert message in text


def test_exponents_that_no_layout_explains_are_refused(tmp_path):
    text = refusal(checkpoint(tmp_path, PLAIN | {"a.s": bytes_of(4, 4).view(E8M0)}))
    assert "tensor 'a.s' (F8_E8M0) holds exponents" in text


def test_unknown_formats_of_scales_are_refused(tmp_path):
    stored = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    text = refusal(checkpoint(tmp_path, stored, FP8 | {"scale_fmt": "ue9m0"}))
    assert "quantization_config: scale_fmt is 'ue9m0', expected one of float, ue8m0" in text


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Return a tensor of each kind, large enough for several groups of rows."""
    folder = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    oss = checkpoint(folder / "oss", gpt_oss(3, 300, 3), MXFP4)
    uneven = scheme(type="int", num_bits=3, strategy="group", group_size=16, symmetric=False)
    stored, _ = packed("a", torch.randn(160, 480), uneven, "pack-quantized",
                       weight_scale=torch.rand(160, 30),
                       weight_zero_point=torch.zeros(160, 30, dtype=torch.int8) + 3)  # fmt: skip
    ints = checkpoint(folder / "int", stored, compressed_config(uneven, layout="pack-quantized"))
    sources = [s for c in (oss, ints) for s in dequantize(c).tensors.values()]
    return [(source, read(source).flatten()) for source in sources]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_values_do_not_depend_on_how_they_are_read(kinds, data):
    source, whole = data.draw(st.sampled_from(kinds))
    start = data.draw(st.integers(0, source.num_elements))
    stop = data.draw(st.integers(start, source.num_elements))
    with Reader() as reader:
        assert torch.equal(reader.values(source, start, stop), whole[start:stop])


def test_mxfp4_experts_merge_with_those_of_a_plain_model_in_another_layout(tmp_path):
    stored = gpt_oss(2, 6, 1, name="mlp.experts.gate_up_proj")
    checkpoint(tmp_path / "task", stored, MXFP4)
    whole = convert_moe_packed_tensors(*stored.values(), dtype=torch.float32)
    torch.manual_seed(0)
    base = {f"mlp.experts.{n}.gate_up_proj": torch.randn(6, 32) for n in range(2)}
    checkpoint(tmp_path / "base", base)
    spec = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / "base")}, {"model": str(tmp_path / "task")}],
        "convert": [{"from": "experts.*.gate_up_proj", "to": "experts.gate_up_proj",
                     "transpose": True}],
        "out_dtype": "float32",
    }  # fmt: skip
    output = outliermerge.run(spec, output=tmp_path / "out", memory="16MB").output
    found = load_folder(output)
    assert found.keys() == base.keys()
    for n in range(2):
        expected = (base[f"mlp.experts.{n}.gate_up_proj"].double() + whole[n].T.double()) / 2
        assert torch.equal(found[f"mlp.experts.{n}.gate_up_proj"], expected.float())
