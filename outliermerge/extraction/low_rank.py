"""Merges of adapters in their factors: ΔW is never made whole.

The changes of the models are products BᵢAᵢ. A linear merge Σ cᵢBᵢAᵢ is the product of the joined
factors, whose ranks add up. A smaller rank takes the singular values of that product, which are
those of a small matrix between orthonormal bases of both sides (QR). In *core space* (Core Space
Merging, arXiv 2509.17786) any method merges: U is the left singular vectors of all Bᵢ beside each
other, V the right ones of all Aᵢ, each change is UMᵢVᵀ, and the small Mᵢ are merged in their place.

Shape suffixes: M models, R rows, C columns, k the sum of the ranks, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outliermerge.checkpoint.adapters.tensors import LowRankSum
from outliermerge.checkpoint.sources import Reading, Source
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.extraction.factors import Factors, Wanted, balanced, chosen_rank
from outliermerge.methods.task import Task
from outliermerge.planning.merged import merge_of
from outliermerge.tensors import merge_tensors

if TYPE_CHECKING:
    from torch import Tensor

_LINEAR = ("task_arithmetic", "linear")


@dataclass(frozen=True)
class LowRank:
    """A tensor whose change is made of those of adapters.

    Attributes:
        adapters: the tensor as each model's adapter changes it; None where it does not.
        task: how they are merged; None if there is one that is not merged.
        coefficients: cᵢ, if the merge is their weighted sum.
    """

    adapters: tuple[LowRankSum | None, ...]
    task: Task | None
    coefficients: tuple[float, ...] | None

    @property
    def rank(self) -> int:
        """The sum of the ranks, which is the most that a merge of them has."""
        return sum(one.lora_a.shape[0] for one in self.adapters if one)


def is_unchanged(base: Source, model: Source) -> bool:
    """Tell whether a tensor is the base's by what it is made of, so that it need not be read."""
    merged = merge_of(model)
    if merged is None:
        return base == model
    task = merged.task
    kept = task.is_delta and not task.modifiers
    kept = kept or (not task.is_delta and task.method.idempotent(task.parameters))
    return kept and all(source == base for source in merged.sources)


def low_rank_of(base: Source, model: Source) -> LowRank | None:
    """Return what a tensor's change is made of; None if it is not of adapters alone."""
    if _adapts(base, model):
        assert isinstance(model, LowRankSum)
        return LowRank((model,), None, (1.0,))
    merged = merge_of(model)
    if merged is None or len(merged.sources) != len(merged.task.dtypes):
        return None
    models = merged.sources[int(merged.task.is_delta) :]
    if not all(_adapts(base, one) or one == base for one in models):
        return None
    adapters = tuple(one if isinstance(one, LowRankSum) else None for one in models)
    return LowRank(adapters, merged.task, _coefficients(merged.task))


def _adapts(base: Source, model: Source) -> bool:
    return type(model) is LowRankSum and model.base == base


def _coefficients(task: Task) -> tuple[float, ...] | None:
    """Return the weights of a merge that is a weighted sum of task vectors."""
    import torch

    if task.method.name not in _LINEAR or task.modifiers:
        return None
    each_MM = torch.eye(task.num_models, dtype=torch.float64)
    found = tuple(map(float, task.method(each_MM, **task.parameters)))
    is_sum = task.is_delta or math.isclose(sum(found), 1)  # else the base is scaled, too
    return found if is_sum else None


def joined(low: LowRank, reader: Reading, wanted: Wanted) -> Factors | None:
    """Return the factors of a weighted sum; without a bound the joined ones. None if it is 0."""
    assert low.coefficients is not None
    pairs = _pairs(low, reader)
    lefts = [c * pair[0] for c, pair in zip(low.coefficients, pairs, strict=True) if pair and c]
    rights = [pair[1] for c, pair in zip(low.coefficients, pairs, strict=True) if pair and c]
    if not lefts:
        return None
    return _of_rank(_beside(lefts), _below(rights), wanted, _name(low))


def in_core_space(low: LowRank, reader: Reading, wanted: Wanted) -> Factors | None:
    """Return the factors of a merge in core space; None if nothing is changed.

    Raises:
        ArgumentError: the method does not merge a tensor by itself.
    """
    import torch

    assert low.task is not None
    task, pairs = low.task, _pairs(low, reader)
    held = [pair for pair in pairs if pair]
    left_Rk = torch.linalg.svd(_beside([pair[0] for pair in held]), full_matrices=False)[0]
    right_kC = torch.linalg.svd(_below([pair[1] for pair in held]), full_matrices=False)[2]
    nothing_kk = left_Rk.new_zeros(left_Rk.shape[1], right_kC.shape[0])
    cores = [
        (left_Rk.T @ pair[0]) @ (pair[1] @ right_kC.T) if pair else nothing_kk for pair in pairs
    ]
    declared = {k: v for k, v in task.parameters.items() if k in task.method.parameters}
    merged_kk = merge_tensors(
        cores, base=nothing_kk, method=task.method, name=task.context.name,
        seed=task.context.seed, **declared,
    )  # fmt: skip
    if not merged_kk.any():
        return None
    return _of_rank(left_Rk @ merged_kk, right_kC, wanted, _name(low))


def _name(low: LowRank) -> str:
    return next(one.name for one in low.adapters if one)


def _pairs(low: LowRank, reader: Reading) -> list[tuple[Tensor, Tensor] | None]:
    """Return each change as L (R, r) and R (r, C) in float64, the scale in L."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for one in low.adapters:
        if one is None:
            found.append(None)
            continue
        left, right = one.factors(reader, 0, one.num_rows)
        found.append((left.double() * one.scale, right.double()))
    return found


def _of_rank(left_Rk: Tensor, right_kC: Tensor, wanted: Wanted, name: str) -> Factors | None:
    """Return the factors of a product, of the rank that is wanted.

    Raises:
        OutlierMergeError: a value is infinite or NaN.
    """
    import torch

    stored = getattr(torch, wanted.dtype.name)
    bases_Rk, inner_kk = torch.linalg.qr(left_Rk)
    bases_Ck, outer_kk = torch.linalg.qr(right_kC.T)
    small_kk = inner_kk @ outer_kk.T
    norm = float(small_kk.norm())
    if not math.isfinite(norm):
        raise OutlierMergeError(f"{shown(name)}: the adapters hold values that are infinite or NaN")
    if not norm:
        return None
    if not wanted.is_bounded:
        factors = left_Rk.to(stored), right_kC.to(stored)
        return Factors(*factors, norm, _lost(left_Rk, right_kC, *factors) / norm, len(right_kC))
    u_kk, values_k, v_kk = torch.linalg.svd(small_kk)
    rank = chosen_rank(values_k.square(), norm**2, len(values_k), wanted)
    while True:
        factors = balanced(
            bases_Rk @ (u_kk[:, :rank] * values_k[:rank]), bases_Ck @ v_kk[:rank].T, wanted.dtype
        )
        error = _lost(left_Rk, right_kC, *factors) / norm
        if wanted.error is None or error <= wanted.error or rank == len(values_k):
            return Factors(*factors, norm, error, rank)
        rank += 1


def _lost(left_Rk: Tensor, right_kC: Tensor, b_Rr: Tensor, a_rC: Tensor) -> float:
    """Return the Frobenius norm of the difference of two products."""
    import torch

    inner = torch.linalg.qr(_beside([left_Rk, -b_Rr.double()]))[1]
    outer = torch.linalg.qr(_below([right_kC, a_rC.double()]).T)[1]
    return float((inner @ outer.T).norm())


def _beside(matrices: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat([*matrices], dim=1)


def _below(matrices: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat([*matrices])
