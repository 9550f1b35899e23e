"""bitsandbytes' 8 and 4 bits.

Read as bitsandbytes 0.50 writes them: functional.py (QuantState) and nn/modules.py (Linear8bitLt).
"""

from __future__ import annotations

import json
import math

from outliermerge.checkpoint.quantized.blocks import are_sizes, scaled_weight
from outliermerge.checkpoint.quantized.model import TAKE_ORIGINAL, Changes, QuantizedModel
from outliermerge.checkpoint.quantized.tensors import CodeTensor
from outliermerge.checkpoint.sources import DTYPES, Source, TensorMeta

_MAX_STATE = 1 << 16  # bytes of a quant_state; usual ones have a few hundred
# bitsandbytes multiplies by this number instead of dividing by 127.
_INT8_STEP = 7.874015718698502e-3


def bitsandbytes(model: QuantizedModel) -> Changes:
    """Read bitsandbytes' int8 by row, and its nf4 and fp4 by block."""
    changes: Changes = {}
    for name, weight in model.tensors.items():
        stem = name.removesuffix("weight")
        for kind in ("nf4", "fp4"):
            if (state := f"{name}.quant_state.bitsandbytes__{kind}") in model.tensors:
                changes |= _four_bit(model, name, state)
        if weight.dtype.name == "int8" and stem != name and f"{stem}SCB" in model.tensors:
            if layout := model.tensors.get(f"{stem}weight_format"):
                changes[f"{stem}weight_format"] = None
                if (number := model.first_bytes(layout, 1)[0]) != 0:
                    what = f"its weight_format is {number}, of old bitsandbytes versions, expected"
                    model.broken(name, f"{what} 0 (rows). {TAKE_ORIGINAL}")
            changes |= scaled_weight(model, name, f"{stem}SCB", [(1, None)], _INT8_STEP)
    return changes


def _four_bit(model: QuantizedModel, name: str, state_name: str) -> Changes:
    meta = model.tensors[state_name]
    try:
        if meta.num_elements > _MAX_STATE:
            raise ValueError(f"it has {meta.num_elements:,} bytes")
        state = json.loads(model.first_bytes(meta, meta.num_elements))
        shape, block = tuple(state["shape"]), state["blocksize"]
        nested_block = state.get("nested_blocksize")
        offset = float(state["nested_offset"]) if nested_block else None
        if not are_sizes((*shape, block, nested_block or 1)) or not shape:
            raise ValueError(f"shape {shape}, block sizes {block} and {nested_block}")
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        model.broken(state_name, f"not a quant_state of bitsandbytes: {error!r}")
    num_blocks = -(-math.prod(shape) // block)
    # Counted in bytes, because the weight may be stored as any dtype.
    expected = {"": ("", -(-math.prod(shape) // 2)), ".quant_map": ("float32", 64)}
    expected[".absmax"] = ("uint8", num_blocks) if nested_block else ("float32", 4 * num_blocks)
    if nested_block:
        expected[".nested_absmax"] = ("float32", 4 * -(-num_blocks // nested_block))
        expected[".nested_quant_map"] = ("float32", 1024)
    metas: dict[str, TensorMeta] = {}
    for part, (dtype, num_bytes) in expected.items():
        found = model.tensors.get(f"{name}{part}")
        if found is None or found.dtype.name != (dtype or found.dtype.name):
            model.broken(name, f"quantised, but its {part[1:]} ({dtype}) is missing")
        if found.num_bytes != num_bytes:
            what = f"has {found.num_bytes} bytes, its quant_state's shape {shape} needs {num_bytes}"
            model.broken(f"{name}{part}", what)
        metas[part] = found
    absmax: Source = metas[".absmax"]
    if nested_block:
        absmax = CodeTensor(
            name=metas[".absmax"].name, shape=(num_blocks,), out_dtype=DTYPES["float32"],
            weight=metas[".absmax"], bits=8, values=metas[".nested_quant_map"],
            absmax=metas[".nested_absmax"], block=nested_block, offset=offset,
        )  # fmt: skip
    tensor = CodeTensor(
        name=metas[""].name, shape=shape, out_dtype=model.out_dtype, weight=metas[""], bits=4,
        values=metas[".quant_map"], absmax=absmax, block=block,
    )  # fmt: skip
    return {state_name: None, **{f"{name}{part}": None for part in expected}, name: tensor}
