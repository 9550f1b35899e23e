"""Matrices in codes of 4 bits, as GPTQ and AWQ store them; needs no library of theirs."""

from __future__ import annotations

import torch


def _words(codes: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Pack eight codes of a row (R, C) into a whole number of 32 bits."""
    words = sum(codes[:, n::8].long() << 4 * place for n, place in enumerate(places))
    return (((words + (1 << 31)) % (1 << 32)) - (1 << 31)).int()


def _by_group(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 4-bit codes (in, out), and zero points and scales (groups, out)."""
    by_group = values.float().T.reshape(values.shape[1] // 16, 16, -1)
    low, high = by_group.amin(1), by_group.amax(1)
    scales = ((high - low) / 14 + 1e-4).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)
    codes = (by_group / scales[:, None].float() + zeros[:, None]).round().clamp(0, 15)
    return codes.flatten(0, 1).int(), zeros.int(), scales


def gptq(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors that GPTQ stores for a weight, in groups of 16."""
    codes, zeros, scales = _by_group(values)
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": _words(codes.T, [*range(8)]).T,
        f"{stem}qzeros": _words(zeros - 1, [*range(8)]),
        f"{stem}scales": scales,
        f"{stem}g_idx": torch.arange(len(codes), dtype=torch.int32) // 16,
    }


def awq(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors that AWQ stores for a weight, in groups of 16."""
    codes, zeros, scales = _by_group(values)
    stem, places = name.removesuffix("weight"), [0, 4, 1, 5, 2, 6, 3, 7]
    packed = {"qweight": _words(codes, places), "qzeros": _words(zeros, places), "scales": scales}
    return {f"{stem}{part}": value for part, value in packed.items()}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
