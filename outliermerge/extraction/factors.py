"""A matrix as a product of two small ones: the leading singular vectors of what was trained.

Everything is computed of M, the change with its longer side first, in blocks of rows in float64.
The right singular vectors come from the Gram matrix MᵀM of the shorter side, or, where a random
start is asked for, from subspace iterations with it (arXiv 0909.4061). M is then projected on them,
so what is kept of M is a projection whatever the vectors' own error is: of vectors whose singular
value is s it is about ε(s₁/s)², s₁ the largest value, ε that of float64. Values below s₁√(Sε)
cannot be told from 0. The error of the rounded factors is measured in one more pass.

Shape suffixes: L longer side, S shorter side, B rows of a block, K tried vectors, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outliermerge import rng
from outliermerge.checkpoint.sources import DTYPES, DType, Reading, Source
from outliermerge.errors import OutlierMergeError, shown

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ELEMENTS = 1 << 22
_OVERSAMPLING, _ITERATIONS = 10, 3
_EPSILON = 2.0**-52
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Wanted:
    """How much of each matrix is kept.

    Attributes:
        rank: the rank; with `energy` the most.
        energy: the least share of the squared norm that is kept.
        error: the most that the Frobenius norm of what is lost may be, over that of the change.
        randomized: find the singular vectors from a random start.
        seed: of the random start.
        dtype: of the factors.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    randomized: bool = False
    seed: int = 0
    dtype: DType = DTYPES["float32"]

    @property
    def num_passes(self) -> int:
        """How often a matrix is read: for its vectors, their products, and the error."""
        return (_ITERATIONS if self.randomized else 1) + 2

    @property
    def is_bounded(self) -> bool:
        """Whether anything says how much is kept; else everything of a low-rank change is."""
        return (self.rank, self.energy, self.error) != (None, None, None)

    @property
    def least_error(self) -> float:
        """The error that rounding the factors may make, over the norm of their product."""
        unit = _ROUNDING[self.dtype.name]
        return 2 * unit + unit**2


@dataclass(frozen=True)
class Factors:
    """A matrix W' − W ≈ BA.

    Attributes:
        b_Rr, a_rC: the factors, in the dtype of the adapter; None if the matrix takes less.
        norm: the Frobenius norm of the change.
        error: that of what is lost, over it.
        rank: the rank.
        worst: of packed experts the largest error of one of them.
    """

    b_Rr: Tensor | None
    a_rC: Tensor | None
    norm: float
    error: float
    rank: int
    worst: float | None = None


class Change:
    """What a matrix was changed by: model − base.

    Args:
        name: its name, for messages.
        base, model: the two, of shape (R, …).
        reader: reads them.
        device: torch's device.
        on_progress: called with the bytes just read, or passed over again.
    """

    def __init__(
        self,
        name: str,
        base: Source,
        model: Source,
        *,
        reader: Reading,
        device: str,
        on_progress: Callable[[int], None],
    ) -> None:
        self.name, self._base, self._model = name, base, model
        self._reader, self._device, self._on_progress = reader, device, on_progress
        self.num_rows, self.num_columns = matrix_shape(model)
        self.is_tall = self.num_rows >= self.num_columns
        self.long = max(self.num_rows, self.num_columns)
        self.short = min(self.num_rows, self.num_columns)
        self._held: list[Tensor] | None = None

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield M from its first to its last row: start, stop and (stop - start, S) in float64."""
        num_bytes = self._base.dtype.num_bytes + self._model.dtype.num_bytes
        step = max(1, BLOCK_ELEMENTS // self.short)
        for start in range(0, self.long, step):
            stop = min(start + step, self.long)
            model_BS, base_BS = self._rows(start, stop) if self.is_tall else self._cut(start, stop)
            yield start, stop, model_BS.double() - base_BS.double()
            self._on_progress((stop - start) * self.short * num_bytes)

    def _rows(self, start: int, stop: int) -> list[Tensor]:
        span = start * self.short, stop * self.short
        read = (self._reader.values(source, *span) for source in (self._model, self._base))
        return [one.view(stop - start, self.short).to(self._device) for one in read]

    def _cut(self, start: int, stop: int) -> list[Tensor]:
        """Return columns, transposed; the whole tensors are held, as files have them by rows."""
        if self._held is None:
            read = (self._reader.values(s, 0, s.num_elements) for s in (self._model, self._base))
            self._held = [one.view(self.short, self.long) for one in read]
        return [one[:, start:stop].T.to(self._device) for one in self._held]

    @property
    def num_bytes(self) -> int:
        """The bytes of one pass."""
        return self._base.num_bytes + self._model.num_bytes

    def skip(self, num_passes: int) -> None:
        """Count passes that are not needed as done."""
        self._on_progress(num_passes * self.num_bytes)


def matrix_shape(source: Source) -> tuple[int, int]:
    """Return rows and columns; all dimensions after the first are columns."""
    return source.shape[0], math.prod(source.shape[1:])


def most_bytes(base: Source, model: Source, wanted: Wanted) -> int:
    """Return about how much memory one matrix takes while it is factored."""
    rows, columns = matrix_shape(model)
    long, short = max(rows, columns), min(rows, columns)
    held = 0 if rows >= columns else base.num_bytes + model.num_bytes
    tried = min(short, (wanted.rank or short) + _OVERSAMPLING) if wanted.randomized else short
    gram = 3 * 8 * short * tried
    rank = min(wanted.rank or short, short)
    factors = (8 + 8 + 4) * rank * (long + short)
    return held + gram + factors + 4 * 8 * min(BLOCK_ELEMENTS, long * short)


def factored(change: Change, wanted: Wanted) -> Factors | None:
    """Return the factors of a matrix; None if nothing was changed.

    Raises:
        OutlierMergeError: a value is infinite or NaN, or the error cannot be kept.
    """
    find = _randomized if wanted.randomized else _exact
    found = find(change, wanted)
    if found is None:
        change.skip(2)
        return None
    vectors_SK, squares_K, total = found
    rank = chosen_rank(squares_K, total, change.short, wanted)
    norm = math.sqrt(total)
    if wanted.rank is None and rank * (change.long + change.short) >= change.long * change.short:
        change.skip(2)
        return Factors(None, None, norm, 0.0, rank)
    projected_LK = _projected(change, vectors_SK[:, :rank])
    while True:
        factors = balanced(projected_LK, vectors_SK[:, :rank], wanted.dtype)
        error = _error(change, *factors) / norm
        if not math.isfinite(error):
            raise OutlierMergeError(
                f"{shown(change.name)}: its factors are too large for {wanted.dtype.name}"
            )
        if wanted.error is None or error <= wanted.error:
            break
        if rank == change.short:
            raise OutlierMergeError(
                f"{shown(change.name)}: has an error of {error:.3g} with factors of full rank in "
                f"{wanted.dtype.name}, expected {wanted.error:g} at most"
            )
        further = min(change.short, rank + max(1, rank // 8))
        more_LK = _projected(change, vectors_SK[:, rank:further])
        projected_LK, rank = _joined(projected_LK, more_LK), further
    tall_Lr, short_rS = factors
    if change.is_tall:
        return Factors(tall_Lr, short_rS, norm, error, rank)
    return Factors(short_rS.T.contiguous(), tall_Lr.T.contiguous(), norm, error, rank)


def _exact(change: Change, wanted: Wanted) -> tuple[Tensor, Tensor, float] | None:
    """Return right singular vectors (S, S), squared values, and the squared norm; None for 0."""
    import torch

    gram_SS = torch.zeros(change.short, change.short, dtype=torch.float64, device=change._device)
    for _, _, block_BS in change.blocks():
        gram_SS += block_BS.T @ block_BS
    total = _checked_total(change, float(gram_SS.trace()))
    if not total:
        return None
    squares_S, vectors_SS = torch.linalg.eigh(gram_SS)
    return vectors_SS.flip(1), squares_S.flip(0), total


def _randomized(change: Change, wanted: Wanted) -> tuple[Tensor, Tensor, float] | None:
    """The same of the largest values alone: K is the rank and some more."""
    import torch

    assert wanted.rank is not None
    num = min(change.short, wanted.rank + _OVERSAMPLING)
    name = f"extract {change.name}"
    start = rng.standard_normal(wanted.seed, name, 0, change.short * num, change._device)
    vectors_SK = torch.linalg.qr(start.double().view(change.short, num))[0]
    for iteration in range(_ITERATIONS):
        product_SK, total = torch.zeros_like(vectors_SK), 0.0
        for _, _, block_BS in change.blocks():
            product_SK += block_BS.T @ (block_BS @ vectors_SK)
            total += float(block_BS.square().sum())
        if not _checked_total(change, total):
            change.skip(_ITERATIONS - 1 - iteration)
            return None
        if iteration < _ITERATIONS - 1:
            vectors_SK = torch.linalg.qr(product_SK)[0]
    squares_K, turned_KK = torch.linalg.eigh(vectors_SK.T @ product_SK)
    return vectors_SK @ turned_KK.flip(1), squares_K.flip(0), total


def _checked_total(change: Change, total: float) -> float:
    if not math.isfinite(total):
        raise OutlierMergeError(
            f"{shown(change.name)}: found values that are infinite, NaN or too large to be "
            "squared, expected others: there is no adapter of them"
        )
    return total


def chosen_rank(squares_K: Tensor, total: float, short: int, wanted: Wanted) -> int:
    """Return the rank that is wanted, at most the number of values that can be told from 0."""
    most = max(1, int((squares_K > squares_K[0] * short * _EPSILON).sum()))
    if wanted.rank is not None:
        most = min(most, wanted.rank)
    if wanted.energy is not None:
        least = wanted.energy * total
    elif wanted.error is not None:
        least = (1 - wanted.error**2 + wanted.least_error**2) * total
    else:
        return most
    kept_K = squares_K[:most].clamp(min=0).cumsum(0)
    return min(most, int((kept_K < least).sum()) + 1)


def _projected(change: Change, vectors_Sr: Tensor) -> Tensor:
    """Return M V, (L, r)."""
    import torch

    projected_Lr = torch.empty(
        change.long, vectors_Sr.shape[1], dtype=torch.float64, device=vectors_Sr.device
    )
    for start, stop, block_BS in change.blocks():
        projected_Lr[start:stop] = block_BS @ vectors_Sr
    return projected_Lr


def _joined(first: Tensor, second: Tensor) -> Tensor:
    import torch

    return torch.cat([first, second], dim=1)


def balanced(projected_Lr: Tensor, vectors_Sr: Tensor, dtype: DType) -> tuple[Tensor, Tensor]:
    """Return P (L, r) and Q (r, S), of equal norm for each singular value, in the dtype.

    Args:
        projected_Lr: left singular vectors, times the values.
        vectors_Sr: right singular vectors.
        dtype: of what is returned.
    """
    import torch

    roots_r = projected_Lr.norm(dim=0).sqrt()
    stored = getattr(torch, dtype.name)
    safe_r = roots_r.masked_fill(roots_r == 0, 1)
    return (
        (projected_Lr / safe_r).to(stored),
        (vectors_Sr * roots_r).T.contiguous().to(stored),
    )


def _error(change: Change, tall_Lr: Tensor, short_rS: Tensor) -> float:
    """Return the Frobenius norm of M − PQ."""
    squares = 0.0
    short_rS = short_rS.double()
    for start, stop, block_BS in change.blocks():
        block_BS -= tall_Lr[start:stop].double() @ short_rS
        squares += float(block_BS.square_().sum())
    return math.sqrt(squares)
