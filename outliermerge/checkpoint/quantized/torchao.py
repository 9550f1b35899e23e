"""torchao's tensors of 8-bit codes, which hold scales and zero points for blocks.

Read as torchao 0.18 writes them (prototype/safetensors): a weight X.weight is X._weight_qdata,
X._weight_scale and X._weight_zero_point, and the file's header says of what kind it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from outliermerge.checkpoint.formats.safetensors_file import read_metadata
from outliermerge.checkpoint.quantized.blocks import are_sizes
from outliermerge.checkpoint.quantized.model import (
    CODES,
    TAKE_ORIGINAL,
    Changes,
    QuantizedModel,
)
from outliermerge.checkpoint.quantized.tensors import ScaledTensor
from outliermerge.checkpoint.sources import FLOAT_DTYPES

_KINDS = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
_PARTS = ("qdata", "scale", "zero_point")


def torchao(model: QuantizedModel) -> Changes:
    """Read torchao's float8, int8 and unpacked integers of fewer bits."""
    keys = {meta.name: key for key, meta in model.tensors.items()}
    changes: Changes = {}
    for name, said in _quantised(model):
        module, _, leaf = name.rpartition(".")
        start = f"{module}._{leaf}_" if module else f"_{leaf}_"
        found = {part: keys[start + part] for part in _PARTS if start + part in keys}
        if not found:
            continue  # another file's
        first = next(iter(found.values()))
        if said.get("_type") not in _KINDS:
            model.broken(
                first,
                f"a part of {name}, torchao's {said.get('_type')}, which cannot be read "
                f"({', '.join(_KINDS)} can). {TAKE_ORIGINAL}",
            )
        if not {"qdata", "scale"} <= found.keys():
            model.broken(
                first, f"a part of {name}, which lacks its qdata or scale. Fetch it again."
            )
        changes |= _weight(model, name, found, said.get("_data"))
    return changes


def _quantised(model: QuantizedModel) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the tensors that are quantised, with what the headers of files say of them."""
    paths = dict.fromkeys(meta.path for meta in model.tensors.values() if meta.offset is not None)
    seen: set[str] = set()
    for path in paths:
        for name, text in read_metadata(path).items():
            try:
                said = json.loads(text)
            except (ValueError, RecursionError):
                continue  # other texts stand beside
            is_plain = not isinstance(said, dict) or said.get("_type") == "Tensor"
            if not is_plain and "_type" in said and name not in seen:
                seen.add(name)
                yield name, said


def _weight(model: QuantizedModel, name: str, found: Mapping[str, str], said: object) -> Changes:
    codes, scale = model.tensors[found["qdata"]], model.tensors[found["scale"]]
    zero = model.tensors[found["zero_point"]] if "zero_point" in found else None
    block = said.get("block_size") if isinstance(said, Mapping) else None
    shape = codes.shape
    is_block = isinstance(block, list) and len(block) == len(shape) and are_sizes(block)
    if codes.dtype.name not in CODES or len(shape) < 2 or not codes.num_elements or not is_block:
        model.broken(
            found["qdata"],
            f"{codes.dtype.name} {shape} with the block_size {block!r}, expected 8-bit codes of a "
            f"matrix, and a size for each axis. Fetch the model again. {TAKE_ORIGINAL}",
        )
    assert isinstance(block, list)
    sizes = [min(one, axis) for one, axis in zip(block, shape, strict=True)]
    grid = tuple(-(-axis // one) for one, axis in zip(sizes, shape, strict=True))
    is_like = zero is None or zero.num_elements == scale.num_elements
    fits = scale.num_elements == math.prod(grid) and scale.shape in (grid, (), (1,))
    if any(one > 1 for one in sizes[:-2]) or not fits or not is_like:
        zeros = "" if zero is None else f" and zero points {zero.dtype.name} {zero.shape}"
        model.broken(
            found["scale"],
            f"{scale.dtype.name} {scale.shape}{zeros} for a weight {shape} with the block_size "
            f"{block}, expected {grid}. Fetch the model again. {TAKE_ORIGINAL}",
        )
    if scale.dtype.name not in FLOAT_DTYPES:
        model.broken(found["scale"], f"{scale.dtype.name}, expected a float. {TAKE_ORIGINAL}")
    tensor = ScaledTensor(
        name=codes.name, shape=shape, out_dtype=model.out_dtype, weight=codes, scale=scale,
        zero_point=zero, block=(sizes[-2], sizes[-1]),
    )  # fmt: skip
    prefix = found["qdata"].removesuffix(codes.name)
    model.renamed[found["qdata"]] = prefix + name
    return {**dict.fromkeys(found.values()), found["qdata"]: tensor}
