"""MXFP4 of gpt-oss: fp4 in blocks of 32, each with an exponent as its scale.

Read as transformers 5.23 does (integrations/mxfp4.py): `X_blocks` (experts, rows, blocks, 16 bytes)
and `X_scales` (experts, rows, blocks) are the parameter X (experts, columns, rows).
"""

from __future__ import annotations

import math

from outliermerge.checkpoint.quantized.model import TAKE_ORIGINAL, Changes, QuantizedModel
from outliermerge.checkpoint.quantized.packed import Unpacked, exponents, turned
from outliermerge.checkpoint.quantized.tensors import ScaledTensor
from outliermerge.checkpoint.rearranged import reshaped
from outliermerge.checkpoint.sources import DTYPES

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BLOCK = 32


def mxfp4(model: QuantizedModel) -> Changes:
    """Read the experts of gpt-oss in the layout of transformers' parameters."""
    changes: Changes = {}
    for blocks_name, blocks in model.tensors.items():
        name = blocks_name.removesuffix("_blocks")
        scales_name = f"{name}_scales"
        if name == blocks_name or scales_name not in model.tensors:
            continue
        scales = model.tensors[scales_name]
        if name in model.tensors:
            model.broken(blocks_name, f"stored beside {name}, the same weight. Fetch it again.")
        if (
            {blocks.dtype.name, scales.dtype.name} != {"uint8"}
            or len(blocks.shape) != 4
            or blocks.shape != (*scales.shape, _BLOCK // 2)
            or not blocks.num_elements
        ):
            model.broken(
                blocks_name,
                f"{blocks.dtype.name} {blocks.shape} with scales {scales.dtype.name} "
                f"{scales.shape}, expected uint8 (experts, rows, blocks, {_BLOCK // 2}) and uint8 "
                f"(experts, rows, blocks). Fetch the model again. {TAKE_ORIGINAL}",
            )
        experts, rows, num_blocks = scales.shape
        columns = num_blocks * _BLOCK
        codes = Unpacked(
            name=blocks.name, shape=(experts, rows, columns), out_dtype=DTYPES["uint8"],
            dtype=DTYPES["uint8"], bits=4,
            source=reshaped(blocks, (experts, rows, math.prod(blocks.shape[2:]))),
        )  # fmt: skip
        changes[scales_name], model.renamed[blocks_name] = None, name
        changes[blocks_name] = ScaledTensor(
            name=blocks.name, shape=(experts, columns, rows), out_dtype=model.out_dtype,
            weight=turned(codes), scale=exponents(turned(scales)), block=(_BLOCK, 1), values=FP4,
        )  # fmt: skip
    return changes
