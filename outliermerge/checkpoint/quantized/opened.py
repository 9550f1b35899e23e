"""Quantised weights, computed in float32 from codes and scales when they are read.

Layouts that are read, as these libraries write them:
    fp8: transformers 5.23, integrations/finegrained_fp8.py (DeepSeek-V3's layout).
    compressed-tensors: compressed_tensors 0.20, compressors/naive_quantized/base.py.
    bitsandbytes: bitsandbytes 0.50, functional.py (QuantState) and nn/modules.py (Linear8bitLt).
scales.py reads further layouts. codes.py refuses codes that no layout explains.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.layout import component_of
from outliermerge.checkpoint.quantized.codes import are_plain, refuse_codes
from outliermerge.checkpoint.quantized.model import ACTIVATIONS, CODES, Changes, QuantizedModel
from outliermerge.checkpoint.quantized.scales import (
    TAKE_ORIGINAL,
    fbgemm,
    modelopt,
    quanto,
    undeclared,
)
from outliermerge.checkpoint.quantized.tensors import CodeTensor, ScaledTensor
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import (
    DTYPES,
    FLOAT_DTYPES,
    Checkpoint,
    DType,
    Source,
    TensorMeta,
)
from outliermerge.errors import OutlierMergeError, listing

# Keys of a config.json that say how its model is quantised; the second is from early versions of
# compressed-tensors.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# The number of rows and columns that share a scale; None is all of them.
_Block = tuple[int | None, int | None]

_CACHE_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")
_MAX_STATE = 1 << 16  # bytes of a quant_state; usual ones have a few hundred
_CACHE = re.compile(r"(^|[./])(q|k|v|kv)_(scale|zero_point)$")
_COMPANIONS = re.compile(
    r"(_scale_inv|weight_(scale|zero_point|shape|packed|g_idx|global_scale|format)|\.SCB"
    r"|\.(nested_)?(absmax|quant_map)|\.quant_state\.\w+)$"
)
# Pairs of name endings that occur together only in quantised models.
_EVIDENCE = (("SCB", "weight", "bitsandbytes"), ("quant_map", "absmax", "bitsandbytes"),
             ("qweight", "qzeros", "gptq or awq"), ("_blocks", "_scales", "mxfp4"),
             ("_packed", "_scale", "compressed-tensors"), ("", "_scale_inv", "fp8"),
             ("", "_scale", "compressed-tensors or fp8"))  # fmt: skip
_MODELOPT_FILE = "hf_quant_config.json"
# Files that, like a config.json, say that a model is quantised; an output is not quantised.
_SETTINGS_FILES = (_MODELOPT_FILE, "quanto_qmap.json", "quantization_map.json",
                   "quantize_config.json", "quant_config.json")  # fmt: skip
# Methods that always store codes; others may store plain weights and quantise them when loading.
_STORED = ("aqlm", "auto-round", "awq", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8",
           "fp8", "gptq", "higgs", "hqq", "modelopt", "mxfp4", "quark", "spqr", "torchao",
           "vptq")  # fmt: skip
_CT_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_CT_ADVICE = "Convert it with CompressedTensorsDequantizer of compressed_tensors."
_ADVICE = {
    "awq": "Convert it with compressed_tensors: AutoAWQConverter, CompressedTensorsDequantizer.",
    "gguf": "Convert it with from_pretrained(…, gguf_file=…) of transformers, then "
    "save_pretrained().",
    "mxfp4": "Convert it with from_pretrained(…, quantization_config=Mxfp4Config("
    "dequantize=True)) of transformers, then save_pretrained().",
}
# bitsandbytes multiplies by this number instead of dividing by 127.
_INT8_STEP = 7.874015718698502e-3
# Model types whose Conv1D weights bitsandbytes stores transposed.
_CONV1D = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")


def dequantize(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose quantised weights are read as float32; other tensors are unchanged.

    Raises:
        OutlierMergeError: the method or layout is not supported, or tensors are missing, left over,
            or of a wrong shape.
    """
    changes, companions, notes = Changes(), dict[str, TensorMeta](), list[str]()
    for folder in checkpoint.components:
        home, prefix = checkpoint.root / folder, f"{folder}/" if folder else ""
        tensors = {
            name: source
            for name, source in checkpoint.tensors.items()
            if component_of(name, checkpoint.components) == folder
            and isinstance(source, TensorMeta)
        }
        config = read_json(home / "config.json")
        settings = _settings(home, config)
        out_dtype, is_stale = _named_dtype(config), False
        with Reader() as reader:
            model = QuantizedModel(
                home, settings or {}, tensors, out_dtype or DTYPES["bfloat16"], reader
            )
            if settings is None:
                found, kind = undeclared(model)
                _refuse_undeclared(home, {n: m for n, m in tensors.items() if n not in found})
                if out_dtype is None:
                    found = _with_dtype_of_others(found, tensors)
            elif is_stale := _is_stale(settings, tensors):
                found, kind = {}, _described(settings)
            else:
                found, kind = _read(model, config.get("model_type")), _described(settings)
        inside = {name.removeprefix(prefix): meta for name, meta in tensors.items()}
        refuse_codes(inside, {name.removeprefix(prefix): new for name, new in found.items()})
        changes |= found
        companions |= {name: tensors[name] for name, new in found.items() if new is None}
        if is_stale:
            notes.append(
                f"{home}: its config says that weights are quantised with {kind}, but none is: "
                "they are read as they are, and the output's config does not say so"
            )
        elif settings is not None or found:
            num_weights = sum(change is not None for change in found.values())
            notes.append(f"{home}: {num_weights} weights quantised with {kind} are read as float32")
    if not notes:
        return checkpoint
    replaced: dict[str, Source] = {}
    for name, stored in checkpoint.tensors.items():
        source = changes.get(name, stored)
        if source is not None:
            # quanto stores X as X._data and X._scale.
            replaced[name.removesuffix("._data") if name in changes else name] = source
    gone = [name for name in checkpoint.sidecars if PurePosixPath(name).name in _SETTINGS_FILES]
    return replace(
        checkpoint,
        tensors=replaced,
        notes=(*checkpoint.notes, *notes),
        sidecars=tuple(name for name in checkpoint.sidecars if name not in gone),
        left_behind=(*checkpoint.left_behind, *gone),
        companions=companions,
    )


def _settings(home: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantisation settings in a component's files, or None."""
    levels = (config, text_config(config))
    named = (level.get(key) for key in QUANTIZATION_KEYS for level in levels)
    settings = next((s for s in named if s), None)
    if settings is None and (modelopt_settings := read_json(home / _MODELOPT_FILE)):
        settings = modelopt_settings.get("quantization")
        if isinstance(settings, dict):
            settings = {"quant_method": "modelopt", **settings}
    is_known = settings is None or isinstance(settings, dict)
    return settings if is_known else {"quant_method": settings}


def _is_stale(settings: Mapping[str, Any], tensors: Mapping[str, TensorMeta]) -> bool:
    """Tell whether a config still says that weights are quantised though they no longer are."""
    # compressed-tensors can also transform the inputs of plain weights.
    method, transforms = settings.get("quant_method"), settings.get("transform_config")
    return method in _STORED and not transforms and are_plain(tensors)


def _named_dtype(config: Mapping[str, Any]) -> DType | None:
    keys, levels = ("dtype", "torch_dtype"), (config, text_config(config))
    dtypes = [str(level.get(key)) for level in levels for key in keys]
    names = [name.removeprefix("torch.") for name in dtypes]
    return next((DTYPES[name] for name in names if name in FLOAT_DTYPES), None)


def _with_dtype_of_others(changes: Changes, tensors: Mapping[str, TensorMeta]) -> Changes:
    """Set the output dtype of weights to that of the plain floats, if these agree."""
    floats = {
        meta.dtype
        for name, meta in tensors.items()
        if name not in changes and meta.dtype.name in FLOAT_DTYPES
    }
    if len(floats) != 1:
        return changes
    (dtype,) = floats
    return {name: new and replace(new, out_dtype=dtype) for name, new in changes.items()}


def _described(settings: Mapping[str, Any]) -> str:
    bits = next((settings[key] for key in ("bits", "w_bit", "nbits") if settings.get(key)), None)
    bits = bits or (settings.get("load_in_8bit") and 8) or (settings.get("load_in_4bit") and 4)
    return f"{settings.get('quant_method')}" + (f" ({bits} bits)" if bits else "")


def _read(model: QuantizedModel, model_type: object) -> Changes:
    method = str(model.settings.get("quant_method"))
    if method not in _READERS:
        model.refuse(
            f"the model is quantised with {_described(model.settings)}, which cannot be read "
            f"({', '.join(_READERS)} can). {_ADVICE.get(method, TAKE_ORIGINAL)}"
        )
    read, scales = _READERS[method]
    changes = read(model)
    if changes and method == "bitsandbytes" and model_type in _CONV1D:
        model.refuse(
            f"bitsandbytes transposes weights of {model_type}: cannot be read. {TAKE_ORIGINAL}"
        )
    for name, meta in model.tensors.items():
        if changes and name not in changes and meta.dtype.name in (*CODES, "uint8"):
            if meta.dtype.is_float or name.endswith(".weight"):
                model.broken(name, f"quantised ({meta.dtype.name}), but its {scales} is missing")
    left = [name for name in model.tensors if name not in changes and _COMPANIONS.search(name)]
    if left:
        what = f"is no part of a complete quantised weight ({method}). All such:"
        model.broken(left[0], f"{what}\n{listing(left)}")
    if changes and any(model.settings.get(key) for key in _CACHE_KEYS):
        changes |= {name: None for name in model.tensors if _CACHE.search(name)}
    return changes


def _refuse_undeclared(home: Path, tensors: Mapping[str, TensorMeta]) -> None:
    for name, meta in tensors.items():
        for end, other, method in _EVIDENCE:
            is_evident = name.endswith(end) and name.removesuffix(end) + other in tensors
            if is_evident and (end or meta.dtype.name in CODES):
                raise OutlierMergeError(
                    f"{home}: tensor {name!r} is quantised ({method}), but no config.json has a "
                    f"quantization_config: use the folder that has it. {TAKE_ORIGINAL}"
                )


def _are_sizes(values: Sequence[object]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)


def _fp8(model: QuantizedModel) -> Changes:
    size = model.settings.get("weight_block_size", [128, 128])
    if size is not None and not (isinstance(size, list) and len(size) == 2 and _are_sizes(size)):
        model.refuse(f"weight_block_size is {size!r}, expected two whole numbers or null")
    block = (size[0], size[1]) if size else (None, None)
    return _scaled(model, {"_scale_inv": [block], "_scale": [(None, None), (1, None)]})


def _compressed_tensors(model: QuantizedModel) -> Changes:
    settings, blocks = model.settings, list[_Block]()
    try:
        schemes = [s for s in settings["config_groups"].values() if s.get("weights")]
        transforms = (settings.get("transform_config") or {}).get("config_groups")
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        layouts = {scheme.get("format") or settings.get("format") for scheme in schemes}
        weights = [(s["weights"], str(s["weights"].get("strategy"))) for s in schemes]
    except (AttributeError, LookupError, TypeError) as error:
        model.refuse(f"not one of compressed-tensors: {error!r}. Fetch the model again.")
    if transforms or sparsity != "dense":
        model.refuse(f"compressed-tensors with transforms or sparsity. {TAKE_ORIGINAL}")
    for args, strategy in weights:
        group, block = [1, args.get("group_size")], args.get("block_structure")
        size = {"tensor": [], "channel": [1], "group": group, "block": block}.get(strategy)
        if not layouts <= set(_CT_FORMATS) or not isinstance(size, list) or not _are_sizes(size):
            model.refuse(
                f"compressed-tensors of the format {' and '.join(sorted(map(str, layouts)))}, "
                f"{args.get('num_bits')} bits per {strategy}, cannot be read "
                f"({', '.join(_CT_FORMATS)} can). {_CT_ADVICE}"
            )
        rows, columns = [*size, None, None][:2]
        blocks.append((rows, columns))
    return _scaled(model, {"_scale": blocks})


def _scaled(model: QuantizedModel, blocks: Mapping[str, list[_Block]]) -> Changes:
    """Read weights with scales; `blocks` gives what a scale may cover, by the end of its name."""
    changes: Changes = {}
    for name in [name for name, meta in model.tensors.items() if meta.dtype.name in CODES]:
        end = next((end for end in blocks if f"{name}{end}" in model.tensors), None)
        if end is not None:
            changes |= _scaled_weight(model, name, name + end, blocks[end])
    return changes


def _scaled_weight(
    model: QuantizedModel, name: str, scale_name: str, blocks: list[_Block], factor: float = 1.0
) -> Changes:
    weight, scale = model.tensors[name], model.tensors[scale_name]
    zero_point = model.tensors.get(f"{name}_zero_point")
    if len(weight.shape) < 2 or not weight.num_elements:
        model.broken(name, f"has a scale, but is no matrix: its shape is {weight.shape}")
    fitting, grids = _fitting(weight.shape, scale.shape, tuple(blocks))
    if fitting and scale.dtype.name == "uint8":
        model.broken(
            scale_name,
            f"uint8 {scale.shape} for a weight {weight.shape}: exponents (E8M0: a scale is 2 to "
            "the power of value - 127), which cannot be read. Store float32 scales in their place "
            f"(tensor.view(torch.float8_e8m0fnu).float()). {TAKE_ORIGINAL}",
        )
    is_like = zero_point is None or zero_point.shape == scale.shape
    if len(fitting) != 1 or scale.dtype.name not in FLOAT_DTYPES or not is_like:
        zero = "" if zero_point is None else f" (zero points: {zero_point.shape})"
        model.broken(
            scale_name,
            f"{scale.dtype.name} {scale.shape}{zero} for a weight {weight.shape}; config.json says "
            f"a float of shape {' or '.join(map(str, sorted(grids.values())))}. Fetch both again.",
        )
    tensor = ScaledTensor(
        name=weight.name, shape=weight.shape, out_dtype=model.out_dtype, weight=weight,
        scale=scale, zero_point=zero_point, block=fitting[0], factor=factor,
    )  # fmt: skip
    stem = name.removesuffix("weight")
    gone = [scale_name, f"{name}_zero_point", f"{name}_activation_scale"]
    gone += [stem + activation for activation in ACTIVATIONS]
    return {name: tensor, **{other: None for other in gone if other in model.tensors}}


@lru_cache(maxsize=1024)
def _fitting(
    weight: tuple[int, ...], scale: tuple[int, ...], blocks: tuple[_Block, ...]
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


def _bnb(model: QuantizedModel) -> Changes:
    changes: Changes = {}
    for name, weight in model.tensors.items():
        stem = name.removesuffix("weight")
        for kind in ("nf4", "fp4"):
            if (state := f"{name}.quant_state.bitsandbytes__{kind}") in model.tensors:
                changes |= _four_bit(model, name, state)
        if weight.dtype.name == "int8" and stem != name and f"{stem}SCB" in model.tensors:
            if layout := model.tensors.get(f"{stem}weight_format"):
                changes[f"{stem}weight_format"] = None
                if (number := int(model.reader.values(layout, 0, 1))) != 0:
                    what = f"its weight_format is {number}, of old bitsandbytes versions, expected"
                    model.broken(name, f"{what} 0 (rows). {TAKE_ORIGINAL}")
            changes |= _scaled_weight(model, name, f"{stem}SCB", [(1, None)], _INT8_STEP)
    return changes


def _four_bit(model: QuantizedModel, name: str, state_name: str) -> Changes:
    meta = model.tensors[state_name]
    try:
        if meta.num_elements > _MAX_STATE:
            raise ValueError(f"it has {meta.num_elements:,} bytes")
        state = json.loads(bytes(model.reader.values(meta, 0, meta.num_elements).tolist()))
        shape, block = tuple(state["shape"]), state["blocksize"]
        nested_block = state.get("nested_blocksize")
        offset = float(state["nested_offset"]) if nested_block else None
        if not _are_sizes((*shape, block, nested_block or 1)) or not shape:
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


_READERS: Mapping[str, tuple[Callable[[QuantizedModel], Changes], str]] = {
    "bitsandbytes": (_bnb, "SCB or quant_state"),
    "compressed-tensors": (_compressed_tensors, "weight_scale"),
    "fbgemm_fp8": (fbgemm, "weight_scale"),
    "fp8": (_fp8, "weight_scale_inv or weight_scale"),
    "modelopt": (modelopt, "weight_scale"),
    "quanto": (quanto, "_scale"),
}
