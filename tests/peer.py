"""mergekit 0.1.5 on tensors in memory, to compare with; and tensors that are worth a comparison."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHAPES: tuple[tuple[int, ...], ...] = ((1,), (7,), (300,), (1, 9), (9, 1), (24, 33), (3, 4, 5, 6))


def merged_by_mergekit(
    method: str, models: Sequence[Tensor], *, base: Tensor | None = None, **parameters: Any
) -> Tensor:
    """Merge as mergekit does, the base before the models."""
    with warnings.catch_warnings():
        # Its lazy_unpickle.py names a private module of numpy that has been renamed.
        warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
        import mergekit.merge_methods as peer

    tensors = [*models] if base is None else [base, *models]
    return peer.merge_tensors(
        [tensor.clone() for tensor in tensors],  # multislerp works in place
        method,
        parameters=parameters,
        base_index=None if base is None else 0,
    )


def drawn(shape: tuple[int, ...], num_tensors: int, *, apart: float = 1.0) -> list[Tensor]:
    """Return tensors of some lengths: one and others that are so far from it."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    first, *others = (torch.randn(shape, generator=generator) for _ in range(num_tensors))
    return [first, *(first + apart * (1 + n) * x for n, x in enumerate(others))]


def assert_close(found: Tensor, expected: Tensor, *, like: Sequence[Tensor], ulps: float) -> None:
    """Compare by float32's rounding of the largest value among the inputs and the output."""
    assert found.shape == expected.shape
    largest = max(float(tensor.abs().max()) for tensor in (*like, expected))
    assert float((found.double() - expected.double()).abs().max()) <= ulps * 2**-24 * largest
