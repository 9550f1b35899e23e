"""Layouts in which a weight is codes × scales, with a scale per tensor, row, or group of a row.

They are read as these libraries write them:
    ComfyUI: QUANTIZATION.md and comfy/utils.py (convert_old_quants); musubi-tuner,
        modules/fp8_optimization_utils.py (groups of columns).
    optimum-quanto 0.2.7: nn/qmodule.py, tensor/weights/qbytes.py.
    fbgemm_fp8 (transformers 5.23, integrations/fbgemm_fp8.py) and modelopt's FP8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from outliermerge.checkpoint.formats.safetensors_file import read_metadata
from outliermerge.checkpoint.quantized.model import (
    ACTIVATIONS,
    CODES,
    TAKE_ORIGINAL,
    Changes,
    QuantizedModel,
)
from outliermerge.checkpoint.quantized.tensors import RowScaledTensor
from outliermerge.checkpoint.sources import FLOAT_DTYPES

# ComfyUI's formats of the form codes × scale, and the dtype of their codes.
_COMFY_FORMATS = {"float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2",
                  "float8_e4m3fn_rowwise": "float8_e4m3fn", "int8_tensorwise": "int8"}  # fmt: skip
# Keys that say how ComfyUI multiplies; they do not change the weight.
_COMFY_HARMLESS = ("format", "full_precision_matrix_mult", "orig_dtype")
_SCALE_NAMES = ("weight_scale", "scale_weight")
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


def quanto(model: QuantizedModel) -> Changes:
    """Read optimum-quanto's 8-bit weights, which are stored as X._data and X._scale."""
    changes: Changes = {}
    for name, weight in model.tensors.items():
        stem = name.removesuffix("._data")
        if stem == name or f"{stem.removesuffix('._data')}._scale" not in model.tensors:
            continue
        is_packed = f"{stem}._shift" in model.tensors or weight.dtype.name not in CODES
        if is_packed or f"{stem}._scale" not in model.tensors:
            model.broken(
                name,
                f"quantised with quanto, {weight.dtype.name} with fewer than 8 bits, which cannot "
                f"be read (qint8 and qfloat8 can). {TAKE_ORIGINAL}",
            )
        if stem in model.tensors:
            model.broken(name, f"stored beside {stem}, the same weight. Fetch the model again.")
        changes |= scaled_rows(model, name, f"{stem}._scale")
        model.renamed[name] = stem
    if changes:
        # Layers that are not quantised have scales of their activations as well.
        ends = (".input_scale", ".output_scale")
        changes |= {name: None for name in model.tensors if name.endswith(ends)}
    return changes


def fbgemm(model: QuantizedModel) -> Changes:
    """Read fbgemm_fp8: a scale per row."""
    return _named_scales(model, ("weight_scale",), CODES)


def modelopt(model: QuantizedModel) -> Changes:
    """Read modelopt's FP8: a scale per tensor or per row."""
    method = str(model.settings.get("quant_algo"))
    if method not in _MODELOPT:
        model.refuse(
            f"modelopt's {method} cannot be read ({', '.join(_MODELOPT)} can). {TAKE_ORIGINAL}"
        )
    return _named_scales(model, ("weight_scale",), CODES)


def undeclared(model: QuantizedModel) -> tuple[Changes, str]:
    """Read layouts that no config.json declares; also return the name of the layout."""
    if not any(
        meta.dtype.name in (*CODES, "uint8") or name.endswith(_SCALE_NAMES)
        for name, meta in model.tensors.items()
    ):
        return {}, ""
    if changes := quanto(model):
        return changes, "quanto"
    formats = _comfy_formats(model)
    changes = {}
    for module, (named_by, settings) in formats.items():
        changes |= _comfy_weight(model, module, named_by, settings)
    kind = "ComfyUI's layout" if formats else "fp8"
    # An int8 weight may also be rotated, so only float8 is read without a declared format.
    changes |= _named_scales(model, _SCALE_NAMES, CODES[:2], done=changes)
    markers = [name for name in model.tensors if name.rpartition(".")[2] == "scaled_fp8"]
    for name in markers:
        if model.tensors[name].num_elements <= 2:
            changes[name], kind = None, "ComfyUI's scaled fp8"
    changes |= {name: None for name in model.tensors if name.endswith(".comfy_quant")}
    return changes, kind


def _comfy_formats(model: QuantizedModel) -> dict[str, tuple[str, Any]]:
    """Return the declared format of each module of a file, and where it is declared."""
    formats: dict[str, tuple[str, Any]] = {}
    for name, meta in model.tensors.items():
        if name.endswith(".comfy_quant") and meta.dtype.name == "uint8":
            text = bytearray(meta.num_bytes)
            meta.read(model.reader, 0, meta.num_elements, memoryview(text))
            formats[name.removesuffix(".comfy_quant")] = name, _parsed(bytes(text))
    # The header has the stored names, without the prefix of a wrapper or component.
    stored = {meta.name: name for name, meta in model.tensors.items()}
    paths = dict.fromkeys(meta.path for meta in model.tensors.values() if meta.offset is not None)
    for path in paths:
        content = _parsed(read_metadata(path).get("_quantization_metadata", '{"layers": {}}'))
        layers = content.get("layers") if isinstance(content, dict) else None
        if not isinstance(layers, dict):
            model.broken(
                next(iter(model.tensors)),
                "its file's header has a _quantization_metadata that is no JSON object with "
                f"layers. Fetch it again. {TAKE_ORIGINAL}",
            )
        for layer, settings in layers.items():
            name = stored.get(f"{layer}.weight", f"{layer}.weight")
            formats.setdefault(name.removesuffix(".weight"), (name, settings))
    return formats


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _comfy_weight(model: QuantizedModel, module: str, named_by: str, settings: Any) -> Changes:
    name = f"{module}.weight"
    scale = next((n for end in _SCALE_NAMES if (n := f"{module}.{end}") in model.tensors), None)
    if not isinstance(settings, Mapping):
        settings = {"format": settings}
    shown = str(settings.get("format"))
    more = [key for key, value in settings.items() if value and key not in _COMFY_HARMLESS]
    shown += f" with {', '.join(more)}" if more else ""
    known = name if name in model.tensors else named_by
    if known not in model.tensors:
        known = next(iter(model.tensors))
        shown += f" (its _quantization_metadata names {module}, which it does not have)"
    dtype = model.tensors[known].dtype.name
    if (
        more
        or scale is None
        or known != name
        or _COMFY_FORMATS.get(str(settings.get("format"))) != dtype
    ):
        model.broken(
            known,
            f"quantised in ComfyUI's layout {shown}, with {dtype} codes and "
            f"{scale or 'no weight_scale'}: cannot be read ({', '.join(_COMFY_FORMATS)} can). "
            f"{TAKE_ORIGINAL}",
        )
    return scaled_rows(model, name, scale)


def _named_scales(
    model: QuantizedModel,
    ends: tuple[str, ...],
    dtypes: tuple[str, ...],
    *,
    done: Changes | None = None,
) -> Changes:
    changes: Changes = {}
    for name, weight in model.tensors.items():
        module = name.removesuffix("weight")
        scale = next((n for end in ends if (n := f"{module}{end}") in model.tensors), None)
        if module != name and scale and weight.dtype.name in dtypes and name not in (done or ()):
            changes |= scaled_rows(model, name, scale)
    return changes


def scaled_rows(model: QuantizedModel, name: str, scale_name: str) -> Changes:
    """Replace a weight's codes by their product with scales of the tensor, its rows or groups.

    For groups, scales have the shape (R, G, 1) for a weight (R, C), as musubi-tuner stores them.
    """
    weight, scale = model.tensors[name], model.tensors[scale_name]
    groups = num_groups(weight.shape, scale.shape)
    if groups is None or scale.dtype.name not in FLOAT_DTYPES or not weight.num_elements:
        model.broken(
            scale_name,
            f"{scale.dtype.name} {scale.shape} as the scale of {name} {weight.shape}, expected a "
            f"float for the tensor, for each row, or of shape (rows, groups, 1). {TAKE_ORIGINAL}",
        )
    tensor = RowScaledTensor(
        name=weight.name, shape=weight.shape, out_dtype=model.out_dtype, weight=weight,
        scale=scale, num_groups=groups,
    )  # fmt: skip
    module = name.removesuffix("._data").removesuffix("weight")
    gone = [scale_name, *(module + end for end in ACTIVATIONS)]
    return {name: tensor, **{other: None for other in gone if other in model.tensors}}


def num_groups(shape: tuple[int, ...], scale: tuple[int, ...]) -> int | None:
    """Return how many scales a row has; 0 for one scale of all rows; None if the shapes do not fit.

    >>> num_groups((6, 8), ()), num_groups((6, 8), (6, 1)), num_groups((6, 8), (6, 4, 1))
    (0, 1, 4)
    >>> num_groups((6, 8), (1, 8)) is None
    True
    """
    if all(size == 1 for size in scale):
        return 0
    if len(shape) < 2 or scale[0] != shape[0]:
        return None
    if all(size == 1 for size in scale[1:]) and len(scale) <= len(shape):
        return 1
    is_grouped = len(shape) == 2 and len(scale) == 3 and scale[2] == 1 and scale[1]
    return scale[1] if is_grouped and shape[1] % scale[1] == 0 else None
