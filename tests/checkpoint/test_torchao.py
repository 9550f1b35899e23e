"""torchao's tensors, with headers as torchao 0.18 writes them.

The package is no oracle here, because its import warns with this version of torch; it was compared
by hand with what is read.
"""

from __future__ import annotations

import json

import pytest
import torch
from quantizing import read
from safetensors.torch import save_file

from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.errors import OutlierMergeError

R, C = 12, 64
BF16 = {"_type": "torch.dtype", "_data": "bfloat16"}
KINDS = {
    "float8 by row": ("Float8Tensor", torch.float8_e4m3fn, (R, 1), [1, C], torch.float32),
    "float8": ("Float8Tensor", torch.float8_e4m3fn, (1, 1), [R, C], torch.float32),
    "float8 by block": ("Float8Tensor", torch.float8_e5m2, (3, 4), [4, 16], torch.float32),
    "int8 by row": ("Int8Tensor", torch.int8, (R, 1), [1, C], torch.float32),
    "int4 by group": ("IntxUnpackedToInt8Tensor", torch.int8, (R, 4), [1, 16], torch.bfloat16),
}


def layer(kind: str, dtype: torch.dtype, grid, block, scale_dtype):
    """Return a layer's tensors, what the header says of it, and its weight in float64."""
    torch.manual_seed(0)
    scale = (torch.rand(grid) / 50 + 0.001).to(scale_dtype)
    stored = {"a._weight_scale": scale}
    wide = scale.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    if dtype == torch.int8:
        codes = torch.randint(-8, 8, (R, C), dtype=torch.int8)
        zero = torch.randint(-3, 3, grid, dtype=torch.int8)
        stored["a._weight_zero_point"] = zero
        zeros = zero.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        expected = (codes.double() - zeros) * wide
    else:
        codes = torch.randn(R, C).to(dtype)
        expected = codes.double() * wide
    parts = [name.removeprefix("a._weight_") for name in stored]
    said = {"_type": kind, "_data": {"block_size": block, "dtype": BF16},
            "_tensor_data_names": ["qdata", *parts]}  # fmt: skip
    return {"a._weight_qdata": codes, **stored}, said, expected


def opened(folder, tensors, said):
    tensors = tensors | {"a.bias": torch.ones(R)}
    plain = json.dumps({"_type": "Tensor"})
    metadata = {"a.weight": json.dumps(said), "a.bias": plain, "format": "pt",
                "tensor_names": json.dumps(["a.weight", "a.bias"])}  # fmt: skip
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    config = {"quantization_config": {"quant_method": "torchao"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_codes_by_scales(tmp_path, kind):
    stored, said, expected = layer(*KINDS[kind])
    result = dequantize(opened(tmp_path, stored, said))
    assert set(result.tensors) == {"a.weight", "a.bias"}
    source = result.tensors["a.weight"]
    assert (source.shape, source.out_dtype.name) == ((R, C), "bfloat16")
    torch.testing.assert_close(read(source).double(), expected, rtol=1e-6, atol=0)


GOOD, SAID, _ = layer(*KINDS["int8 by row"])
WRONG_BLOCK = SAID | {"_data": {"block_size": [1, 32]}}


@pytest.mark.parametrize(
    ("stored", "said", "name", "message"),
    [
        (GOOD, SAID | {"_type": "Int4TilePackedTo4dTensor"}, "a._weight_qdata",
         "torchao's Int4TilePackedTo4dTensor, which cannot be read (Float8Tensor, Int8Tensor"),
        (GOOD, SAID | {"_data": None}, "a._weight_qdata", "with the block_size None, expected"),
        (GOOD, SAID | {"_data": {"block_size": [1, 0]}}, "a._weight_qdata", "block_size [1, 0]"),
        (GOOD, WRONG_BLOCK, "a._weight_scale", "float32 (12, 1) and zero points int8 (12, 1) for a "
         "weight (12, 64) with the block_size [1, 32], expected (12, 2)"),
        (GOOD | {"a._weight_zero_point": torch.ones(3)}, SAID, "a._weight_scale", "zero points"),
        (GOOD | {"a._weight_scale": None}, SAID, "a._weight_qdata", "lacks its qdata or scale"),
        (GOOD | {"a._weight_scale": torch.ones(R, 1, dtype=torch.int32)}, SAID,
         "a._weight_scale", "int32, expected a float"),
        (GOOD, "text", "a._weight_scale", "is no part of a complete quantised weight (torchao)"),
    ],
)  # fmt: skip
def test_broken_tensors_are_refused_by_name(tmp_path, stored, said, name, message):
    kept = {key: value for key, value in stored.items() if value is not None}
    with pytest.raises(OutlierMergeError) as error:
        dequantize(opened(tmp_path, kept, said))
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'model.safetensors'}: tensor {name!r}: ")
    assert message in text
