"""Quantised weights, computed in float32 from codes and scales when they are read.

Each layout that is read has its reader in another file. codes.py refuses codes that none explains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.layout import component_of
from outliermerge.checkpoint.quantized.bitsandbytes import bitsandbytes
from outliermerge.checkpoint.quantized.blocks import fp8
from outliermerge.checkpoint.quantized.codes import are_plain, refuse_codes
from outliermerge.checkpoint.quantized.compressed import compressed_tensors
from outliermerge.checkpoint.quantized.gguf import SUFFIX, from_gguf
from outliermerge.checkpoint.quantized.gptq import awq, gptq
from outliermerge.checkpoint.quantized.model import CODES, TAKE_ORIGINAL, Changes, QuantizedModel
from outliermerge.checkpoint.quantized.mxfp4 import mxfp4
from outliermerge.checkpoint.quantized.scales import fbgemm, modelopt, quanto, undeclared
from outliermerge.checkpoint.quantized.torchao import torchao
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import (
    DTYPES,
    FLOAT_DTYPES,
    Checkpoint,
    DType,
    TensorMeta,
)
from outliermerge.errors import OutlierMergeError, listing

_T = TypeVar("_T")
# Keys of a config.json that say how its model is quantised; the second is from early versions of
# compressed-tensors.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_CACHE_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")
_CACHE = re.compile(r"(^|[./])(q|k|v|kv)_(scale|zero_point)$")
_COMPANIONS = re.compile(
    r"(_scale_inv|weight_(scale|zero_point|shape|packed|g_idx|global_scale|format)|\.SCB"
    r"|_proj_(blocks|scales)|\.(qweight|qzeros|scales|g_idx)|_weight_qdata"
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
# In which older versions say what config.json says now.
_OTHER_SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Methods that always store codes; others may store plain weights and quantise them when loading.
_STORED = ("aqlm", "auto-round", "awq", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8",
           "fp8", "gptq", "higgs", "hqq", "modelopt", "mxfp4", "quark", "spqr", "torchao",
           "vptq")  # fmt: skip
_ADVICE = {
    "gguf": "Convert it with from_pretrained(…, gguf_file=…) of transformers, then "
    "save_pretrained().",
}
# Model types whose Conv1D weights bitsandbytes stores transposed.
_CONV1D = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")


def dequantize(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose quantised weights are read as float32; other tensors are unchanged.

    Raises:
        OutlierMergeError: the method or layout is not supported, or tensors are missing, left over,
            or of a wrong shape.
    """
    if checkpoint.root.suffix == SUFFIX:
        return from_gguf(checkpoint)
    changes, companions, notes = Changes(), dict[str, TensorMeta](), list[str]()
    renamed: dict[str, str] = {}
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
        refuse_codes(_without(prefix, tensors), _without(prefix, found))
        changes |= found
        renamed |= model.renamed
        companions |= {
            name: tensors[name]
            for name, new in found.items()
            if new is None or name in model.renamed
        }
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
    replaced = {
        renamed.get(name, name): source
        for name, stored in checkpoint.tensors.items()
        if (source := changes.get(name, stored)) is not None
    }
    gone = [name for name in checkpoint.sidecars if PurePosixPath(name).name in _SETTINGS_FILES]
    return replace(
        checkpoint,
        tensors=replaced,
        notes=(*checkpoint.notes, *notes),
        sidecars=tuple(name for name in checkpoint.sidecars if name not in gone),
        left_behind=(*checkpoint.left_behind, *gone),
        companions=companions,
    )


def _without(prefix: str, named: Mapping[str, _T]) -> Mapping[str, _T]:
    if not prefix:
        return named
    return {name.removeprefix(prefix): value for name, value in named.items()}


def _settings(home: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantisation settings in a component's files, or None."""
    levels = (config, text_config(config))
    named = (level.get(key) for key in QUANTIZATION_KEYS for level in levels)
    settings = next((s for s in named if s), None)
    for file, method in _OTHER_SETTINGS.items():
        if settings is None and (own := read_json(home / file)):
            settings = {"quant_method": method, **own}
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


_READERS: Mapping[str, tuple[Callable[[QuantizedModel], Changes], str]] = {
    "awq": (awq, "scales"),
    "bitsandbytes": (bitsandbytes, "SCB or quant_state"),
    "compressed-tensors": (compressed_tensors, "weight_scale"),
    "fbgemm_fp8": (fbgemm, "weight_scale"),
    "fp8": (fp8, "weight_scale_inv or weight_scale"),
    "gptq": (gptq, "scales"),
    "modelopt": (modelopt, "weight_scale"),
    "mxfp4": (mxfp4, "_scales"),
    "quanto": (quanto, "_scale"),
    "torchao": (torchao, "scale"),
}
