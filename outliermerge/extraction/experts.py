"""The experts of a layer in one tensor (E, X, Y): a pair of factors for each, of one rank.

peft's layer for such a parameter has one rank. It is that of the expert which needs most, so that a
bound holds for each expert; the others use it too, and lose less than they may.

Shape suffixes: E experts, R rows and C columns of one of them, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from outliermerge.checkpoint.rearranged import one_of
from outliermerge.checkpoint.sources import Reading, Source
from outliermerge.extraction.factors import Change, Factors, Wanted, factored, most_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Experts:
    """The experts of a layer in one tensor, of a base and a model.

    Attributes:
        name: of the tensor.
        base, model: the two, (E, R, C).
        wanted: how much of each expert is kept.
    """

    name: str
    base: Source
    model: Source
    wanted: Wanted

    @property
    def num_passes(self) -> int:
        """How often they are read: with a bound, once more for the rank that they share."""
        return self.wanted.num_passes * (2 if self._have_own_ranks else 1)

    @property
    def _have_own_ranks(self) -> bool:
        return self.wanted.energy is not None or self.wanted.error is not None

    @property
    def most_bytes(self) -> int:
        """About how much memory they take: one expert while it is factored, and all factors."""
        num, rows, columns = self.model.shape
        rank = min(self.wanted.rank or rows, rows, columns)
        if self.wanted.rank is None:  # of larger factors nothing is kept
            rank = min(rank, rows * columns // (rows + columns) + 1)
        one = most_bytes(one_of(self.base, 0), one_of(self.model, 0), self.wanted)
        return one + 2 * num * rank * (rows + columns) * self.wanted.dtype.num_bytes

    def factored(
        self, reader: Reading, device: str, on_progress: Callable[[int], None]
    ) -> Factors | None:
        """Return B (R, r·E) and A (E·r, C), as peft has them; None if nothing was changed.

        Raises:
            OutlierMergeError: a value is infinite or NaN, or the error cannot be kept.
        """

        def change(expert: int) -> Change:
            return Change(
                f"{self.name}[{expert}]", one_of(self.base, expert), one_of(self.model, expert),
                reader=reader, device=device, on_progress=on_progress,
            )  # fmt: skip

        every = range(self.model.shape[0])
        found = [factored(change(expert), self.wanted) for expert in every]
        norm = math.hypot(*(one.norm for one in found if one))
        rank = max((one.rank for one in found if one), default=0)
        is_larger = any(one and one.b_Rr is None for one in found)
        shared = replace(self.wanted, rank=rank, energy=None, error=None)
        for expert in every if self._have_own_ranks else ():
            one = found[expert]
            if one is not None and one.rank < rank and not is_larger:
                found[expert] = factored(change(expert), shared)
            else:
                change(expert).skip(self.wanted.num_passes)
        if not norm:
            return None
        if is_larger:
            return Factors(None, None, norm, 0.0, rank)
        return self._together(found, rank, norm)

    def _together(self, found: Sequence[Factors | None], rank: int, norm: float) -> Factors:
        """Put the factors of all experts into two matrices; what an expert lacks in rank is 0."""
        import torch

        num, rows, columns = self.model.shape
        stored = getattr(torch, self.wanted.dtype.name)
        b_RrE, a_ErC = (
            torch.zeros(shape, dtype=stored) for shape in ((rows, rank, num), (num, rank, columns))
        )
        for expert, one in enumerate(found):
            if one is not None and one.b_Rr is not None and one.a_rC is not None:
                b_RrE[:, : one.rank, expert] = one.b_Rr.cpu()
                a_ErC[expert, : one.rank] = one.a_rC.cpu()
        lost = math.hypot(*(one.norm * one.error for one in found if one))
        worst = max(one.error for one in found if one)
        b_Rr, a_rC = b_RrE.flatten(1), a_ErC.flatten(0, 1)
        return Factors(b_Rr, a_rC, norm, lost / norm, rank, worst)


def turned(b_Rr: Tensor, a_rC: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the same experts, each with its axes swapped."""
    rank = a_rC.shape[0] // num_experts
    a_CrE = a_rC.view(num_experts, rank, -1).permute(2, 1, 0)
    b_ErR = b_Rr.view(-1, rank, num_experts).permute(2, 1, 0)
    return a_CrE.flatten(1), b_ErR.flatten(0, 1)
