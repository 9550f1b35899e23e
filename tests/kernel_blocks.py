"""Blocks as kernels take them, and what torch makes of the same tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from outliermerge.engines import _kernels
from outliermerge.methods.kernel_call import CODES

MODULES = [
    importlib.import_module(f"outliermerge.engines._kernels{suffix}")
    for suffix in ("", "_v3", "_v4")[: max(1, _kernels.level() - 1)]
]
NAMES = {code: name for name, code in CODES.items()}


def dtype_of(code: str) -> torch.dtype:
    return getattr(torch, NAMES[code])


def raw(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)


def draw(codes: str, num_elements: int) -> list[Tensor]:
    """Draw tensors that differ little, in some places more."""
    generator = torch.Generator().manual_seed(num_elements)
    first = torch.randn(num_elements, generator=generator)
    moves = torch.randn((len(codes), num_elements), generator=generator) * 0.02
    moves *= 1 + 7 * (torch.rand(moves.shape, generator=generator) < 0.05)
    return [(first + move).to(dtype_of(code)) for code, move in zip(codes, moves, strict=True)]


def block_of(codes: str, sources: list[Tensor], *, is_delta: bool) -> tuple[Any, ...]:
    return codes.encode(), tuple(map(raw, sources)), len(sources[0]), is_delta


def values_of(sources: list[Tensor], *, is_delta: bool) -> Tensor:
    block_SE = torch.stack([source.float() for source in sources])
    return block_SE[1:] - block_SE[0] if is_delta else block_SE


def by_torch(values_ME: Tensor) -> Callable[..., Any]:
    return lambda state, part: state.measure(values_ME[:, part])
