"""Weights that are codes × scales, with a scale for each block of rows and columns.

Read as these libraries write them:
    fp8: transformers 5.23, integrations/finegrained_fp8.py (DeepSeek's layouts).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from outliermerge.checkpoint.quantized.model import ACTIVATIONS, CODES, Changes, QuantizedModel
from outliermerge.checkpoint.quantized.packed import exponents
from outliermerge.checkpoint.quantized.tensors import ScaledTensor
from outliermerge.checkpoint.sources import FLOAT_DTYPES, Source, TensorMeta

Block = tuple[int | None, int | None]
"""The number of rows and columns that share a scale; None is all of them."""
_SCALES = (None, "float", "ue8m0")
_SCALE_DTYPES = (*FLOAT_DTYPES, "uint8")


def are_sizes(values: Sequence[object]) -> bool:
    """Tell whether values of a config are sizes."""
    return all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)


def fp8(model: QuantizedModel) -> Changes:
    """Read fp8 with a scale per block, tensor or row, which may be an exponent."""
    if (kind := model.settings.get("scale_fmt")) not in _SCALES:
        model.refuse(f"scale_fmt is {kind!r}, expected one of {', '.join(map(str, _SCALES[1:]))}")
    size = model.settings.get("weight_block_size", [128, 128])
    if size is not None and not (isinstance(size, list) and len(size) == 2 and are_sizes(size)):
        model.refuse(f"weight_block_size is {size!r}, expected two whole numbers or null")
    block = (size[0], size[1]) if size else (None, None)
    return scaled(model, {"_scale_inv": [block], "_scale": [(None, None), (1, None)]})


def scaled(model: QuantizedModel, blocks: Mapping[str, list[Block]]) -> Changes:
    """Read weights with scales; `blocks` gives what a scale may cover, by the end of its name."""
    changes: Changes = {}
    for name, meta in model.tensors.items():
        if meta.dtype.name not in CODES:
            continue
        for end, sizes in blocks.items():
            if (scale := name + end) in model.tensors:
                changes.update(scaled_weight(model, name, scale, sizes))
                break
    return changes


def scaled_weight(
    model: QuantizedModel, name: str, scale_name: str, blocks: list[Block], factor: float = 1.0
) -> Changes:
    """Replace a weight's codes by their product with scales of one of several sizes of blocks."""
    weight, scale = model.tensors[name], model.tensors[scale_name]
    zero_point = model.tensors.get(f"{name}_zero_point")
    if len(weight.shape) < 2 or 0 in weight.shape:
        model.broken(name, f"has a scale, but is no matrix: its shape is {weight.shape}")
    fitting, grids = _fitting(weight.shape, scale.shape, tuple(blocks))
    is_like = zero_point is None or zero_point.shape == scale.shape
    if len(fitting) != 1 or scale.dtype.name not in _SCALE_DTYPES or not is_like:
        zero = "" if zero_point is None else f" (zero points: {zero_point.shape})"
        model.broken(
            scale_name,
            f"{scale.dtype.name} {scale.shape}{zero} for a weight {weight.shape}; config.json says "
            f"a float of shape {' or '.join(map(str, sorted(grids.values())))}. Fetch both again.",
        )
    tensor = ScaledTensor(
        name=weight.name, shape=weight.shape, out_dtype=model.out_dtype, weight=weight,
        scale=as_scale(scale), zero_point=zero_point, block=fitting[0], factor=factor,
    )  # fmt: skip
    gone = [scale_name] if zero_point is None else [scale_name, f"{name}_zero_point"]
    if model.has_activations:
        stem = name.removesuffix("weight")
        others = (f"{name}_activation_scale", *(stem + activation for activation in ACTIVATIONS))
        gone += [other for other in others if other in model.tensors]
    return {name: tensor, **dict.fromkeys(gone)}


def as_scale(scale: TensorMeta) -> Source:
    """Return scales that may be stored as exponents (ue8m0)."""
    return exponents(scale) if scale.dtype.name == "uint8" else scale


@lru_cache(maxsize=1024)
def _fitting(
    weight: tuple[int, ...], scale: tuple[int, ...], blocks: tuple[Block, ...]
) -> tuple[list[tuple[int, int]], dict[tuple[int, int], tuple[int, ...]]]:
    """Return the sizes of blocks that shapes allow, and by size the shape that scales have."""
    *stack, R, C = weight
    sizes = {(min(rows or R, R), min(columns or C, C)) for rows, columns in blocks}
    # Stacked experts have a scale for each half, gate and up, even if one block covers both.
    if stack and R % 2 == 0:
        sizes |= {(R // 2, columns) for rows, columns in sizes if rows == R}
    grids = {size: (*stack, -(-R // size[0]), -(-C // size[1])) for size in sizes}
    # A last dimension of 1 may be left out, and the only scale of a tensor may have any shape.
    fitting = [
        size
        for size, grid in grids.items()
        if scale in (grid, grid[:-1] if grid[-1] == 1 else grid)
        or math.prod(scale) == math.prod(grid) == 1
    ]
    return fitting, grids
