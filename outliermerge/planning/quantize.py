"""Quantised outputs: each weight becomes codes and scales, which are copies of computed sources.

So the executor, the journal, parts and `verify` know nothing of them. How codes are made is in
checkpoint/quantized/encoded.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.quantized.coding import Coding
from outliermerge.checkpoint.quantized.encoded import Codes
from outliermerge.checkpoint.quantized.fitted import Scales
from outliermerge.checkpoint.quantized.grouped import GROUP, MxCodes, MxScales
from outliermerge.checkpoint.sources import DTYPES, DType, Source
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.planning.as_base import as_base
from outliermerge.planning.experts_apart import experts_apart, is_packed
from outliermerge.planning.model_parts import kinds_of
from outliermerge.planning.plan import Input, Job
from outliermerge.planning.quantized_jobs import Quantized, copy_of, sources_of
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.quantize import AS_BASE, QuantizeEntry

_BLOCK = 128
_CODES = {"fp8": DTYPES["float8_e4m3fn"], "int8": DTYPES["int8"]}
# Matrices that no tool quantises: rows of tokens and positions, heads, norms, and routers.
_IGNORED = re.compile(
    r"(^|\.)(embed\w*|\w*embeddings?|wte|wpe|shared|\w*head|score|classifier|output|output_layer"
    r"|\w*norm\w*|relative_attention_bias|gate|router|shared_expert_gate)(\.(layer|classifier))?"
    r"\.weight$"
)
_IGNORED_KINDS = ("vision", "audio", "projector")
_TRANSPOSED = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")  # Conv1D


def quantized(
    spec: MergeSpec, entry: QuantizeEntry, inputs: Sequence[Input], jobs: Sequence[Job]
) -> Quantized:
    """Return the jobs that write codes and scales in the place of weights.

    Args:
        jobs: of the merge; where their outputs are is not known yet.

    Raises:
        SpecError: the output cannot be quantised so.
    """
    try:
        if entry.to == AS_BASE:
            return as_base(inputs[0], jobs)
        return _anew(entry, inputs, jobs)
    except OutlierMergeError as error:
        raise spec.source.error(("quantize",), str(error)) from error


def _anew(entry: QuantizeEntry, inputs: Sequence[Input], jobs: Sequence[Job]) -> Quantized:
    checkpoint = inputs[0].checkpoint
    if checkpoint.root.is_file() or set(checkpoint.components) != {""}:
        raise OutlierMergeError(
            f"{shown(inputs[0].reference)} is no folder of one model with a config.json, which "
            "says how weights are quantised"
        )
    config = read_json(inputs[0].home / "config.json")
    if (kind := config.get("model_type")) in _TRANSPOSED:
        raise OutlierMergeError(
            f"models of the type {kind} store their weights transposed, which no loader of "
            "quantised weights reads"
        )
    apart = experts_apart(config, jobs)
    if not _all_fit(entry, [expert.job for own in apart.values() for expert in own]):
        apart = {}
    units = [
        (job, expert)
        for job in jobs
        for expert in (apart[job.name] if job.name in apart else [None])
    ]
    matrices = [expert.job if expert else job for job, expert in units]
    kinds = kinds_of(job.name for job in matrices)
    chosen = {
        job.name
        for job in matrices
        if _can_be_quantised(entry, job) and kinds.get(job.name) not in _IGNORED_KINDS
    }
    if not chosen:
        sizes = f" of multiples of {_BLOCK}" if entry.scale_of == "block" else ""
        raise OutlierMergeError(
            f"no tensor of the output can be quantised: none is a linear layer's matrix{sizes}"
        )
    ignored = [
        job.name.removesuffix(".weight")
        for job in matrices
        if _is_linear(job) and job.name not in chosen
    ]
    source_by_name = sources_of(jobs, chosen | apart.keys())
    end = "_scale_inv" if entry.quant_method == "fp8" else "_scale"
    made: list[Job] = []
    for (whole, expert), job in zip(units, matrices, strict=True):
        source = source_by_name.get(whole.name)
        if source is None or job.name not in chosen:
            made.append(job if source is None else copy_of(job, job.name, source, is_merge=True))
            continue
        source = expert.of(source) if expert else source
        if entry.to == "mxfp4":
            stem = job.name.removesuffix("weight")
            made.append(copy_of(job, f"{stem}weight_scale", MxScales(source), is_companion=True))
            made.append(copy_of(job, f"{stem}weight_packed", MxCodes(source)))
            continue
        scales = _scales(entry, source, job.output.dtype)
        made.append(copy_of(job, job.name + end, scales, is_companion=True))
        made.append(copy_of(job, job.name, Codes(scales)))
    settings = _settings(entry, ignored)
    packed = sum(map(is_packed, jobs))
    per = "" if entry.to == "mxfp4" else f" per {entry.scale_of}"
    note = (
        f"{len(chosen)} weights are quantised to {entry.to}{per}; "
        f"{len(matrices) - len(chosen)} tensors are not"
    )
    if apart:
        note += f". {packed} packed experts are written one by one, as servers load quantised ones"
    elif packed:
        note += (
            f", {packed} packed experts among them: transformers' table does not say how to write "
            "them one by one, or they do not fit or are left out. `layout:` of a model that has "
            "them one by one has them quantised"
        )
    return Quantized(tuple(made), settings, note)


def _all_fit(entry: QuantizeEntry, experts: Sequence[Job]) -> bool:
    return all(_can_be_quantised(entry, job) for job in experts)


def _can_be_quantised(entry: QuantizeEntry, job: Job) -> bool:
    return (
        _is_linear(job)
        and _fits(entry, job.output.shape)
        and not _IGNORED.search(job.name)
        and not any(part in job.name for part in entry.ignore)
    )


def _is_linear(job: Job) -> bool:
    shape = job.output.shape
    is_matrix = len(shape) == 2 and min(shape) > 0
    return is_matrix and job.name.endswith(".weight") and job.output.dtype.is_float


def _fits(entry: QuantizeEntry, shape: tuple[int, ...]) -> bool:
    """Tell whether what multiplies in blocks can take a matrix: DeepSeek-V3 cuts blocks of rows."""
    if entry.to == "mxfp4":
        return shape[-1] % GROUP == 0
    if entry.scale_of != "block":
        return True
    whole = shape[1:] if entry.quant_method == "fp8" else shape
    return all(size % _BLOCK == 0 for size in whole)


def _scales(entry: QuantizeEntry, source: Source, dtype: DType) -> Scales:
    rows, columns = source.shape
    block = {"tensor": (rows, columns), "channel": (1, columns), "block": (_BLOCK, _BLOCK)}
    own = {"tensor": (1,), "channel": (rows, 1)}
    size = block[entry.scale_of]
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    return Scales(
        source=source,
        shape=own.get(entry.scale_of, grid),
        coding=Coding(_CODES[entry.to]),
        block=size,
        scale_dtype=DTYPES["float32"] if entry.quant_method == "fp8" else dtype,
    )


def _settings(entry: QuantizeEntry, ignored: Sequence[str]) -> dict[str, Any]:
    """Return what a config says of weights that are quantised as this spec says."""
    if entry.quant_method == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
            "modules_to_not_convert": list(ignored),
        }
    weights: dict[str, Any]
    if entry.to == "mxfp4":
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": GROUP, "scale_dtype": "torch.uint8"}
        return _compressed("mxfp4-pack-quantized", weights, None, ignored)
    is_float, per = entry.to == "fp8", entry.scale_of
    common = {
        "num_bits": 8,
        "type": "float" if is_float else "int",
        "symmetric": True,
    }
    weights = {**common, "dynamic": False, "strategy": per}
    inputs: dict[str, Any] = {**common, "dynamic": True, "strategy": "token"}
    if per == "block":
        weights["block_structure"] = [_BLOCK, _BLOCK]
        inputs |= {"strategy": "group", "group_size": _BLOCK}
    layout = "float-quantized" if is_float else "int-quantized"
    return _compressed(layout, weights, inputs, ignored)


def _compressed(
    layout: str,
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any] | None,
    ignored: Sequence[str],
) -> dict[str, Any]:
    """Return a config of compressed-tensors: how linear layers' weights and inputs are coded."""
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
    }
