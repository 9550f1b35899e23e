"""A weight as each format that `quantize: as-base` gives back stores it, with the config."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from quantizing import NF4, compressed_config, scheme

NAME = "a.weight"
MXFP4 = {"quant_method": "mxfp4"}
UE8M0 = {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"}
SHAPE = (48, 512)


def four_bits(values: torch.Tensor, kind: str, **more: Any) -> dict[str, torch.Tensor]:
    codes, state = bnb.quantize_4bit(values, quant_type=kind, **more)
    parts = state.as_dict(packed=True)
    return {NAME: codes, **{f"{NAME}.{part}": value for part, value in parts.items()}}


def _whole(
    values: torch.Tensor, bits: int, symmetric: bool, layout: str,
    order: torch.Tensor | None = None, **args: Any,
) -> Any:  # fmt: skip
    """Return the parts that compressed-tensors stores, and the config.

    Args:
        order: the group of each column, where they are not in order.
    """
    kind = scheme(type="int", num_bits=bits, symmetric=symmetric, **args)
    assert kind.weights is not None
    by_group = values if order is None else values[:, order.argsort(stable=True)]
    groups = by_group.view(len(values), -1, args.get("group_size", values.shape[1]))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), kind.weights)
    parts = {"weight": values, "weight_scale": scale}
    if not symmetric:
        parts["weight_zero_point"] = zero.to(torch.int8)
    if order is not None:  # the library has no part in it: let it find the same codes
        codes = quantize(by_group, scale, zero, kind.weights, dtype=torch.int8)
        codes = codes[:, order.argsort(stable=True).argsort()]
        size = args["group_size"]
        beside = codes - zero.repeat_interleave(size, 1) * (not symmetric)
        parts |= {"weight": beside * scale.repeat_interleave(size, 1)}
    if layout == "pack-quantized":
        made = BaseCompressor.get_value_from_registry(layout).compress(parts, kind)
        made |= {"weight_g_idx": order.int()} if order is not None else {}
    else:
        codes = quantize(values, scale, zero, kind.weights, dtype=torch.int8)
        made = parts | {"weight": codes}
    return {f"a.{k}": v for k, v in made.items()}, compressed_config(kind, layout=layout)


def mxfp4(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return blocks and scales of experts (2, in, out), with any codes."""
    experts = 2
    generator = torch.Generator().manual_seed(0)
    shape = (experts, SHAPE[0], SHAPE[1] // 64)
    codes = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(118, 124, shape, generator=generator).to(torch.uint8)
    return {f"{NAME}_blocks": codes, f"{NAME}_scales": scales}


def _ue8m0(values: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    blocks = values.view(3, 16, 32, 16)
    exponents = (blocks.abs().amax((1, 3)) / 448).log2().ceil()
    codes = (blocks / exponents.exp2()[:, None, :, None]).view(SHAPE).to(torch.float8_e4m3fn)
    scale = exponents.exp2()
    if dtype == torch.uint8:
        scale = (exponents + 127).to(dtype)
    return {NAME: codes, f"{NAME}_scale_inv": scale}


GROUP = {"strategy": "group", "group_size": 32}
ROW = {"strategy": "channel"}
ORDER = torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(5)) // 32
KINDS: dict[str, Any] = {
    "nf4": lambda v: (four_bits(v, "nf4"), NF4),
    "nf4, nested": lambda v: (four_bits(v, "nf4", compress_statistics=True), NF4),
    "fp4": lambda v: (four_bits(v, "fp4", blocksize=128), NF4),
    "mxfp4": lambda v: (mxfp4(v), MXFP4),
    "4 bits": lambda v: _whole(v, 4, True, "pack-quantized", **GROUP),
    "4 bits, zero points": lambda v: _whole(v, 4, False, "pack-quantized", **GROUP),
    "3 bits, zero points": lambda v: _whole(v, 3, False, "pack-quantized", **GROUP),
    "4 bits, groups in any order": lambda v: _whole(v, 4, True, "pack-quantized", ORDER, **GROUP),
    "4 bits, zero points, groups in any order": lambda v: _whole(
        v, 4, False, "pack-quantized", ORDER, **GROUP
    ),
    "8 bits": lambda v: _whole(v, 8, True, "pack-quantized", **ROW),
    "int8, zero points": lambda v: _whole(v, 8, False, "int-quantized", **ROW),
    "fp8, exponents": lambda v: (_ue8m0(v, torch.uint8), UE8M0),
    "fp8, powers of 2": lambda v: (_ue8m0(v, torch.float32), UE8M0),
}
