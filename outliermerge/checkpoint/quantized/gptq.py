"""GPTQ and AWQ: whole numbers of a few bits, in groups of a row with a scale and a zero point each.

Read as these libraries compute with them on a CPU:
    GPTQ: gptqmodel and auto-gptq. `qweight` (in × bits / 32, out), `qzeros` (groups, out × bits /
        32), `scales` (groups, out); `g_idx` (in): the groups of inputs that are not in order.
    AWQ: autoawq's GEMM. `qweight` (in, out / 8), `qzeros` (groups, out / 8), `scales` (groups,
        out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from outliermerge.checkpoint.quantized.model import TAKE_ORIGINAL, Changes, QuantizedModel
from outliermerge.checkpoint.quantized.packed import Unpacked, turned
from outliermerge.checkpoint.quantized.tensors import ScaledTensor
from outliermerge.checkpoint.sources import DTYPES, FLOAT_DTYPES, Source, TensorMeta

_WORD = 32
_BITS = (2, 3, 4, 8)
# Version 1 stores zero points less 1; all of a word at once, so that one may borrow from the next.
_FORMATS = ("gptq", "gptq_v2")
_VERSIONS = ("gemm",)
# What gptqmodel adds to the words of zero points of 3 bits, which straddle words. Writers before it
# stored each zero point less 1.
_THREE_BITS = (0x24924924, 0x92492492, 0x49249249)
# Which of eight columns the lowest bits of a word hold, and so on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(model: QuantizedModel) -> Changes:
    """Read GPTQ of 2, 3, 4 and 8 bits, with groups in any order."""
    settings = model.settings
    layout = settings.get("checkpoint_format") or "gptq"
    if not isinstance(layout, str) or layout not in _FORMATS:
        model.refuse(
            f"GPTQ's checkpoint_format {layout!r} cannot be read ({', '.join(_FORMATS)} can). "
            f"{TAKE_ORIGINAL}"
        )
    bits = None if settings.get("dynamic") else settings.get("bits")
    if bits is not None and bits not in _BITS:
        model.refuse(
            f"GPTQ of {bits!r} bits cannot be read ({', '.join(map(str, _BITS))} can). "
            f"{TAKE_ORIGINAL}"
        )
    changes: Changes = {}
    for name, qweight, qzeros, scales in _weights(model):
        width = qweight.shape[1]
        own = next((b for b in _BITS if qzeros.shape[1] * _WORD == width * b), None)
        if own is None or bits not in (None, own):
            said = f"{bits} bits" if bits is not None else "2, 3, 4 or 8 bits"
            _misfit(model, name, qweight, qzeros, scales, said)
        rows, groups = qweight.shape[0] * _WORD // own, scales.shape[0]
        group = -(-rows // groups)
        g_idx = model.tensors.get(f"{name}.g_idx")
        is_order = g_idx is not None and g_idx.shape == (rows,) and g_idx.dtype.name == "int32"
        if g_idx is not None and not is_order:
            model.broken(f"{name}.g_idx", f"{g_idx.dtype.name} {g_idx.shape}, expected int32 "
                         f"({rows},). Fetch the model again.")  # fmt: skip
        if -(-rows // group) != groups:
            _misfit(model, name, qweight, qzeros, scales, f"{own} bits")
        plus: tuple[int, ...] = ()
        if (is_first := layout == "gptq") and own != 3:
            plus = (sum(1 << own * place for place in range(_WORD // own)),)
        elif is_first and _is_by_gptqmodel(settings):
            plus = _THREE_BITS
        zeros = _codes(qzeros, (groups, width), own, plus=plus)
        weight = _codes(turned(qweight), (width, rows), own)
        less = 1.0 if is_first and not plus else 0.0
        changes |= _scaled(model, name, weight, zeros, scales, group, g_idx, less)
    return changes


def _is_by_gptqmodel(settings: Mapping[str, Any]) -> bool:
    """Tell whether a config names gptqmodel as what wrote the model."""
    meta = settings.get("meta")
    return isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer"))


def awq(model: QuantizedModel) -> Changes:
    """Read AWQ as autoawq's GEMM has it."""
    settings = model.settings
    version = str(settings.get("version") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version not in _VERSIONS or bits != 4 or settings.get("zero_point", True) is not True:
        model.refuse(
            f"AWQ's version {version!r} with {bits!r} bits and zero_point: "
            f"{settings.get('zero_point', True)!r} cannot be read (gemm with 4 bits and zero "
            f"points can). {TAKE_ORIGINAL}"
        )
    changes: Changes = {}
    for name, qweight, qzeros, scales in _weights(model):
        rows, width = qweight.shape[0], qweight.shape[1] * _WORD // bits
        groups = scales.shape[0]
        group = -(-rows // groups)
        if qzeros.shape[1] != qweight.shape[1] or -(-rows // group) != groups:
            _misfit(model, name, qweight, qzeros, scales, "4 bits")
        if scales.shape[1] != width:
            _misfit(model, name, qweight, qzeros, scales, "4 bits")
        zeros = _codes(qzeros, (groups, width), bits, order=_AWQ_ORDER)
        weight = turned(_codes(qweight, (rows, width), bits, order=_AWQ_ORDER))
        changes |= _scaled(model, name, weight, zeros, scales, group, None)
    return changes


def _weights(model: QuantizedModel) -> list[tuple[str, TensorMeta, TensorMeta, TensorMeta]]:
    """Return the modules that have packed weights, each with these, its zero points and scales."""
    found = []
    for key, qweight in model.tensors.items():
        name = key.removesuffix(".qweight")
        if name == key:
            continue
        parts = [model.tensors.get(f"{name}.{part}") for part in ("qzeros", "scales")]
        qzeros, scales = parts
        if qzeros is None or scales is None:
            absent = " and ".join(
                p for p, m in zip(("qzeros", "scales"), parts, strict=True) if not m
            )
            model.broken(key, f"packed, but its {absent} is missing")
        if f"{name}.weight" in model.tensors:
            model.broken(key, f"stored beside {name}.weight, the same weight. Fetch it again.")
        kinds = [meta.dtype.name for meta in (qweight, qzeros)]
        are_matrices = all(len(m.shape) == 2 and m.num_elements for m in (qweight, qzeros, scales))
        is_like = are_matrices and qzeros.shape[0] == scales.shape[0]
        if kinds != ["int32"] * 2 or scales.dtype.name not in FLOAT_DTYPES or not is_like:
            _misfit(model, name, qweight, qzeros, scales, "int32 and floats")
        found.append((name, qweight, qzeros, scales))
    return found


def _misfit(
    model: QuantizedModel, name: str, qweight: TensorMeta, qzeros: TensorMeta, scales: TensorMeta,
    expected: str,
) -> NoReturn:  # fmt: skip
    found = ", ".join(
        f"{part} {meta.dtype.name} {meta.shape}"
        for part, meta in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales))
    )
    model.broken(
        f"{name}.qweight",
        f"its parts do not fit together ({found}); expected matrices of {expected}. Fetch the "
        f"model again. {TAKE_ORIGINAL}",
    )


def _codes(
    packed: Source,
    shape: tuple[int, ...],
    bits: int,
    order: tuple[int, ...] = (),
    plus: tuple[int, ...] = (),
) -> Unpacked:
    return Unpacked(
        name=packed.name, shape=shape, out_dtype=DTYPES["uint8"], dtype=DTYPES["uint8"],
        source=packed, bits=bits, order=order, plus=plus,
    )  # fmt: skip


def _scaled(
    model: QuantizedModel, name: str, weight: Source, zeros: Source, scales: TensorMeta,
    group: int, g_idx: TensorMeta | None, zero: float = 0.0,
) -> Changes:  # fmt: skip
    if scales.shape != zeros.shape:
        model.broken(f"{name}.scales", f"{scales.shape}, expected {zeros.shape}")
    tensor = ScaledTensor(
        name=f"{name}.qweight", shape=weight.shape, out_dtype=model.out_dtype, weight=weight,
        scale=turned(scales), zero_point=turned(zeros), block=(1, group), groups=g_idx,
        zero=zero,
    )  # fmt: skip
    model.renamed[f"{name}.qweight"] = f"{name}.weight"
    gone = (f"{name}.{part}" for part in ("qzeros", "scales", "g_idx"))
    return {f"{name}.qweight": tensor, **{part: None for part in gone if part in model.tensors}}
