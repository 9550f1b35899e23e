"""compressed-tensors' formats, as compressed_tensors 0.20 writes them (compressors/*/base.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from outliermerge.checkpoint.quantized.blocks import Block, are_sizes, as_scale, scaled
from outliermerge.checkpoint.quantized.model import (
    ACTIVATIONS,
    TAKE_ORIGINAL,
    Changes,
    QuantizedModel,
)
from outliermerge.checkpoint.quantized.mxfp4 import FP4
from outliermerge.checkpoint.quantized.packed import Divided, Unpacked, turned
from outliermerge.checkpoint.quantized.tensors import ScaledTensor
from outliermerge.checkpoint.sources import DTYPES, FLOAT_DTYPES, Source, TensorMeta

FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized",
           "mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")  # fmt: skip
_ADVICE = "Convert it with CompressedTensorsDequantizer of compressed_tensors."
# What stands beside a packed weight.
_PARTS = ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")
_MAX_BITS = 8


@dataclass(frozen=True)
class _Scheme:
    """What config_groups say of weights: their bits, what a scale is for, and zero points."""

    bits: object
    block: Block
    is_symmetric: bool
    is_float: bool


def compressed_tensors(model: QuantizedModel) -> Changes:
    """Read compressed-tensors' formats in which each weight is codes × scales."""
    settings = model.settings
    try:
        groups = [s for s in settings["config_groups"].values() if s.get("weights")]
        transforms = (settings.get("transform_config") or {}).get("config_groups")
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        layouts = {group.get("format") or settings.get("format") for group in groups}
        weights = [(g["weights"], str(g["weights"].get("strategy"))) for g in groups]
    except (AttributeError, LookupError, TypeError) as error:
        model.refuse(f"not one of compressed-tensors: {error!r}. Fetch the model again.")
    if transforms or sparsity != "dense":
        model.refuse(f"compressed-tensors with transforms or sparsity. {TAKE_ORIGINAL}")
    schemes = []
    for args, strategy in weights:
        size = _size(args, strategy)
        if not layouts <= set(FORMATS) or not isinstance(size, list) or not are_sizes(size):
            model.refuse(
                f"compressed-tensors of the format {' and '.join(sorted(map(str, layouts)))}, "
                f"{args.get('num_bits')} bits per {strategy}, cannot be read "
                f"({', '.join(FORMATS)} can). {_ADVICE}"
            )
        rows, columns = [*size, None, None][:2]
        is_symmetric = args.get("symmetric", True) is not False
        is_float = args.get("type") == "float"
        schemes.append(_Scheme(args.get("num_bits"), (rows, columns), is_symmetric, is_float))
    changes = scaled(model, {"_scale": [scheme.block for scheme in schemes]})
    for name, weight in changes.items():
        if isinstance(weight, ScaledTensor) and weight.zero_point is None:
            _refuse_without_zero_points(model, name, weight, schemes)
    for name, meta in model.tensors.items():
        if name.endswith("weight_packed"):
            changes |= _packed(model, name.removesuffix("_packed"), meta, schemes)
    return changes


def _refuse_without_zero_points(
    model: QuantizedModel, name: str, weight: ScaledTensor, schemes: list[_Scheme]
) -> None:
    """Refuse a weight that has none, where the config says of all that fit that they have."""
    scale = model.tensors[f"{name}_scale"]
    fitting = [
        scheme
        for scheme in schemes
        if _block(scheme, weight.shape, scale) == weight.block
        and scheme.is_float == weight.weight.dtype.is_float
    ]
    if fitting and not any(scheme.is_symmetric for scheme in fitting):
        _lacks_zero_points(model, name)


def _lacks_zero_points(model: QuantizedModel, name: str) -> NoReturn:
    model.broken(
        f"{name}_scale", f"its config says that there is a {name}_zero_point. {TAKE_ORIGINAL}"
    )


def _size(args: Mapping[str, Any], strategy: str) -> object:
    """Return the rows and columns that share a scale, as far as they are not all."""
    group = [1, args.get("group_size")]
    sizes = {"tensor": [], "channel": [1], "group": group, "tensor_group": group}
    return sizes.get(strategy, args.get("block_structure") if strategy == "block" else None)


def _packed(
    model: QuantizedModel, name: str, packed: TensorMeta, schemes: list[_Scheme]
) -> Changes:
    """Replace a packed weight, of which int32 holds whole numbers and uint8 holds fp4."""
    scale = model.tensors.get(f"{name}_scale")
    if scale is None:
        model.broken(f"{name}_packed", f"packed, but its {name}_scale is missing")
    if packed.dtype.name not in ("int32", "uint8") or len(packed.shape) < 2:
        model.broken(f"{name}_packed", f"{packed.dtype.name} {packed.shape}, expected a "
                     f"matrix of bytes or of int32. {TAKE_ORIGINAL}")  # fmt: skip
    if not packed.num_elements or not scale.num_elements:
        model.broken(
            f"{name}_packed", f"has the shape {packed.shape}, its scale {scale.shape}: empty"
        )
    make = _whole_numbers if packed.dtype.name == "int32" else _fp4
    tensor = make(model, name, packed, scale, schemes)
    stem = name.removesuffix("weight")
    gone = [f"{name}_{part}" for part in _PARTS] + [stem + other for other in _ACTIVATIONS]
    changes: Changes = {other: None for other in gone if other in model.tensors}
    if name in model.tensors:
        model.broken(f"{name}_packed", f"stored beside {name}, the same weight. Fetch it again.")
    model.renamed[f"{name}_packed"] = name
    return changes | {f"{name}_packed": tensor}


_ACTIVATIONS = (*ACTIVATIONS, "input_global_scale", "input_scale", "output_global_scale")


def _whole_numbers(
    model: QuantizedModel, name: str, packed: TensorMeta, scale: TensorMeta, schemes: list[_Scheme]
) -> ScaledTensor:
    """Return the weight of codes of 1 to 8 bits, packed without gaps into int32."""
    shape = _stored_shape(model, name, packed)
    C = shape[-1]
    fitting = {
        (scheme.bits, scheme.is_symmetric): block
        for scheme in schemes
        if isinstance(scheme.bits, int) and 1 <= scheme.bits <= _MAX_BITS
        and -(-C * scheme.bits // 32) == packed.shape[-1]
        and (block := _block(scheme, shape, scale))
    }  # fmt: skip
    if len(fitting) != 1 or scale.dtype.name not in FLOAT_DTYPES:
        model.broken(
            f"{name}_packed",
            f"{packed.shape} for a weight {shape}, with scales {scale.dtype.name} {scale.shape}: "
            f"fits {len(fitting) or 'none'} of the config_groups in config.json, expected one. "
            f"Fetch both again. {TAKE_ORIGINAL}",
        )
    ((bits, is_symmetric), block), = fitting.items()  # fmt: skip
    stored_zero = model.tensors.get(f"{name}_zero_point")
    zero = None if is_symmetric else _zero_points(model, name, shape, scale, bits)
    groups = model.tensors.get(f"{name}_g_idx")
    if groups is not None and (groups.shape != (C,) or groups.dtype.name not in ("int32", "int64")):
        model.broken(f"{name}_g_idx", f"{groups.dtype.name} {groups.shape}, expected int32 ({C},)")
    return ScaledTensor(
        name=packed.name, shape=shape, out_dtype=model.out_dtype,
        weight=_codes(packed, shape, bits), scale=scale, zero_point=zero, block=block,
        zero=0.0 if zero is not None and zero is not stored_zero else float(1 << bits - 1),
        groups=groups,
    )  # fmt: skip


def _codes(packed: Source, shape: tuple[int, ...], bits: int) -> Unpacked:
    return Unpacked(
        name=packed.name, shape=shape, out_dtype=DTYPES["uint8"], dtype=DTYPES["uint8"],
        source=packed, bits=bits,
    )  # fmt: skip


def _stored_shape(model: QuantizedModel, name: str, packed: TensorMeta) -> tuple[int, ...]:
    """Return the shape in `weight_shape`, which has to be that of the packed codes."""
    meta = model.tensors.get(f"{name}_shape")
    if meta is None:
        model.broken(f"{name}_packed", f"packed, but its {name}_shape is missing")
    if meta.num_elements != len(packed.shape) or meta.dtype.name not in ("int32", "int64"):
        model.broken(f"{name}_shape", f"{meta.dtype.name} {meta.shape}, expected "
                     f"{len(packed.shape)} whole numbers. Fetch the model again.")  # fmt: skip
    shape = tuple(model.reader.values(meta, 0, meta.num_elements).tolist())
    if shape[:-1] != packed.shape[:-1] or shape[-1] < 1:
        model.broken(f"{name}_shape", f"says {shape}, but the codes are "
                     f"{packed.shape}. Fetch the model again.")  # fmt: skip
    return shape


def _zero_points(
    model: QuantizedModel, name: str, shape: tuple[int, ...], scale: TensorMeta, bits: int
) -> Source:
    """Return zero points (…, R, groups), which are packed along the rows or bytes."""
    meta = model.tensors.get(f"{name}_zero_point")
    if meta is None:
        _lacks_zero_points(model, name)
    *stack, rows, groups = scale.shape if len(scale.shape) == len(shape) else (*scale.shape, 1)
    if meta.dtype.name == "int8" and meta.shape == scale.shape:
        return meta
    expected = (*stack, -(-rows * bits // 32), groups)
    if meta.dtype.name != "int32" or meta.shape != expected:
        model.broken(f"{name}_zero_point", f"{meta.dtype.name} {meta.shape}, expected int32 "
                     f"{expected}. {TAKE_ORIGINAL}")  # fmt: skip
    return turned(_codes(turned(meta), (*stack, groups, rows), bits))


def _fp4(
    model: QuantizedModel, name: str, packed: TensorMeta, scale: TensorMeta, schemes: list[_Scheme]
) -> ScaledTensor:
    """Return the weight of fp4 codes, two in a byte, the first in the lower bits."""
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    divisor = model.tensors.get(f"{name}_global_scale")
    blocks = {block for s in schemes if s.bits == 4 and (block := _block(s, shape, scale))}
    kind = "uint8" if divisor is None else "float8_e4m3fn"
    if len(blocks) != 1 or scale.dtype.name != kind:
        sizes = " and ".join(str(s.block[1]) for s in schemes)
        model.broken(
            f"{name}_scale",
            f"{scale.dtype.name} {scale.shape} for a weight {shape}, expected {kind} with one for "
            f"{sizes} columns. Fetch the model again. {TAKE_ORIGINAL}",
        )
    if divisor is not None and (divisor.num_elements != 1 or divisor.dtype.name != "float32"):
        model.broken(
            f"{name}_global_scale", f"{divisor.dtype.name} {divisor.shape}, expected one float32"
        )
    scales = as_scale(scale) if divisor is None else Divided(
        name=scale.name, shape=scale.shape, out_dtype=DTYPES["float32"], source=scale,
        divisor=divisor,
    )  # fmt: skip
    return ScaledTensor(
        name=packed.name, shape=shape, out_dtype=model.out_dtype, weight=_codes(packed, shape, 4),
        scale=scales, block=blocks.pop(), values=FP4,
    )  # fmt: skip


def _block(scheme: _Scheme, shape: tuple[int, ...], scale: TensorMeta) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, where scales of their shape are there."""
    *stack, R, C = shape
    rows, columns = min(scheme.block[0] or R, R), min(scheme.block[1] or C, C)
    grid = (*stack, -(-R // rows), -(-C // columns))
    is_one = math.prod(grid) == scale.num_elements == 1
    fits = is_one or scale.shape in (grid, grid[:-1] if grid[-1] == 1 else grid)
    return (rows, columns) if fits else None
