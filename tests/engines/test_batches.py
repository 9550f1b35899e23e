"""Methods on whole matrices give for a stack of tensors what they give for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines.batched import batches, merge_batch
from outliermerge.engines.triton import TensorMerge
from outliermerge.methods.contract import MergeMethod, merge_method
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task


@merge_method(space="delta", cut="tensor")
def truncated(deltas: Tensor, *, rank: int = 2) -> Tensor:
    """Sum of task vectors, cut to a rank."""
    u, s, vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    merged: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return merged


@merge_method(space="weight", cut="tensor")
def largest(weights: Tensor) -> Tensor:
    """The model of the largest norm, and what it is."""
    return weights[int(weights.flatten(1).norm(dim=1).argmax())]


@merge_method(space="weight", cut="tensor")
def masked(weights: Tensor) -> Tensor:
    """A mean of random halves."""
    return (weights * torch.bernoulli(torch.full_like(weights, 0.5))).mean(0)


def work(
    method: MergeMethod, shape: tuple[int, ...], seed: int, dtype: torch.dtype, **given: Any
) -> TensorMerge:
    generator = torch.Generator().manual_seed(seed)
    sources = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    kind = DTYPES[str(dtype).removeprefix("torch.")]
    task = Task(
        method=method,
        parameters=method.resolve(3 - (method.space == "delta"), given),
        dtypes=(kind,) * 3,
        out_dtype=kind,
        compute_dtype="float64" if dtype == torch.float64 else "float32",
        shape=shape,
    )
    return TensorMerge(task, tuple(sources), torch.full(shape, 7.0, dtype=dtype))


def expected(merge: TensorMerge, rank: int) -> tuple[Tensor, float]:
    """Return the result in float64, and how much it changes per relative change of its input.

    A truncation is the less well defined, the nearer the first value dropped is to the last kept.
    """
    base, *models = (source.double() for source in merge.sources)
    u, s, vh = torch.linalg.svd(sum(models) - 2 * base, full_matrices=False)
    result = base + u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    return result, float(s[0] * (1 + s[0] / (s[rank - 1] - s[rank])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_stack_of_tensors_is_merged_as_the_formula_says(dtype: torch.dtype) -> None:
    merges = [work(truncated, (12, 9), seed, dtype, rank=3) for seed in range(5)]
    assert merge_batch(merges)
    kind = torch.finfo(dtype)
    for merge in merges:
        reference, condition = expected(merge, 3)
        computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        allowed = kind.eps * reference.abs() + 4 * computed.eps * condition
        assert merge.result.dtype == dtype
        assert ((merge.result.double() - reference).abs() <= allowed).all()


@pytest.mark.parametrize("method", [largest, masked])
def test_a_method_that_cannot_be_stacked_leaves_the_results_alone(method: MergeMethod) -> None:
    merges = [work(method, (4, 4), seed, torch.float32) for seed in range(2)]
    assert not merge_batch(merges)
    assert all((merge.result == 7).all() for merge in merges)


def sizes(merges: Sequence[TensorMerge], memory_bytes: int) -> list[list[int]]:
    return [
        [merges.index(merge) for merge in batch]
        for batch in batches(merges, memory_bytes=memory_bytes)
    ]


def test_what_differs_in_shape_dtype_or_parameters_is_apart() -> None:
    merges = [
        work(truncated, (4, 4), 0, torch.float32),
        work(truncated, (4, 5), 1, torch.float32),
        work(truncated, (4, 4), 2, torch.float32, rank=1),
        work(truncated, (4, 4), 3, torch.float32),
        work(truncated, (4, 4), 4, torch.bfloat16),
        work(find_method("min_sigma"), (4, 4), 5, torch.float32),
        work(truncated, (0, 4), 6, torch.float32),
    ]
    assert sizes(merges, 1 << 20) == [[0, 3], [1], [2], [4]]


def test_a_batch_stays_in_its_memory() -> None:
    merges = [work(truncated, (8, 8), seed, torch.float32) for seed in range(5)]
    one = 4 * 3 * 64 * 4  # four copies of three sources of float32
    assert sizes(merges, 2 * one) == [[0, 1], [2, 3], [4]]
    assert sizes(merges, 1) == [[0], [1], [2], [3], [4]]
