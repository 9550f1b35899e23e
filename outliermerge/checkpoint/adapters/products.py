"""Changes of weights that are products of small factors, computed row by row.

A change is a matrix: R rows, and C columns that are all further axes of the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from outliermerge.checkpoint.computed import ComputedTensor, read_rows
from outliermerge.checkpoint.sources import Reading, Source, TensorMeta
from outliermerge.errors import shown

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]


class MisfitError(Exception):
    """Factors that are missing, or that do not fit together; its text says which."""


class Product(Protocol):
    """A matrix that is computed from stored factors."""

    @property
    def size(self) -> Size:
        """R and C."""

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        """The stored tensors that it is computed from."""

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""


@dataclass(frozen=True)
class Whole:
    """A matrix that is stored as it is."""

    matrix: Source

    @property
    def size(self) -> Size:
        shape = self.matrix.shape
        return (shape[0], math.prod(shape[1:])) if shape else (1, 1)

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.matrix.stored

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        return read_rows(reader, self.matrix, first, last).float()


@dataclass(frozen=True)
class Pair:
    """L·R of L (R, r, …) and R (r, …); what follows r in L has one element."""

    left: Source
    right: Source

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if len(left) < 2 or len(right) < 2 or math.prod(left[1:]) != right[0]:
            raise MisfitError(
                f"{described(self.left)} and {described(self.right)} have no common rank"
            )

    @property
    def size(self) -> Size:
        return self.left.shape[0], math.prod(self.right.shape[1:])

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.left.stored, *self.right.stored)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        left = read_rows(reader, self.left, first, last).float()
        return left @ reader.whole(self.right).flatten(1).float()


@dataclass(frozen=True)
class Tucker:
    """Σ_ij L[p, i] · T[i, j, …] · R[j, q], as a matrix with rows p and columns (q, …).

    Attributes:
        core: T (r, r, …).
        left: L (R, r, …), as in a Pair.
        right: R (r, Q, …).
    """

    core: Source
    left: Source
    right: Source

    def __post_init__(self) -> None:
        core, left, right = self.core.shape, self.left.shape, self.right.shape
        ranks = (math.prod(left[1:]), right[0]) if len(left) > 1 and len(right) > 1 else ()
        if len(core) < 3 or core[:2] != ranks:
            raise MisfitError(
                f"{described(self.core)}, {described(self.left)} and {described(self.right)} do "
                "not fit together"
            )

    @property
    def size(self) -> Size:
        columns = math.prod(self.right.shape[1:]) * math.prod(self.core.shape[2:])
        return self.left.shape[0], columns

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.core.stored, *self.left.stored, *self.right.stored)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        import torch

        left = read_rows(reader, self.left, first, last).float()
        core = reader.whole(self.core).flatten(2).float()
        right = reader.whole(self.right).flatten(1).float()
        inner = torch.einsum("pi,ijk->pjk", left, core)
        return torch.einsum("pjk,jq->pqk", inner, right).flatten(1)


@dataclass(frozen=True)
class Hadamard:
    """Two matrices, multiplied element by element (LoHa, arXiv 2108.06098)."""

    one: Product
    other: Product

    def __post_init__(self) -> None:
        if self.one.size != self.other.size:
            raise MisfitError(
                f"its two products have the sizes {list(self.one.size)} and "
                f"{list(self.other.size)}, expected one"
            )

    @property
    def size(self) -> Size:
        return self.one.size

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.one.stored, *self.other.stored)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        return self.one.rows(reader, first, last) * self.other.rows(reader, first, last)


@dataclass(frozen=True)
class Kronecker:
    """The Kronecker product of two matrices (LoKr, arXiv 2212.10650)."""

    one: Product
    other: Product

    @property
    def size(self) -> Size:
        (rows, columns), (inner_rows, inner_columns) = self.one.size, self.other.size
        return rows * inner_rows, columns * inner_columns

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.one.stored, *self.other.stored)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        import torch

        height = self.other.size[0]
        parts = []
        for row in range(first // height, -(-last // height)):
            low, high = max(first, row * height), min(last, (row + 1) * height)
            outer = self.one.rows(reader, row, row + 1)
            inner = self.other.rows(reader, low - row * height, high - row * height)
            parts.append((outer[0, None, :, None] * inner[:, None, :]).flatten(1))
        return torch.cat(parts)


def described(source: Source) -> str:
    """Return a tensor's name and shape, for messages."""
    return f"{shown(source.name)} {list(source.shape)}"


@dataclass(frozen=True, kw_only=True)
class ProductSum(ComputedTensor):
    """W + s·P, with s = `scale`, or `scale` · `alpha` where the file has that as a tensor.

    Attributes:
        base: W (R, …).
        product: P, of R rows and the columns of W.
    """

    base: Source
    product: Product
    scale: float
    alpha: TensorMeta | None = None

    transposed = False  # P has the axes of W

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        alpha = (self.alpha,) if self.alpha else ()
        return (*self.base.stored, *self.product.stored, *alpha)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        scale = self.scale * (reader.whole(self.alpha).item() if self.alpha else 1.0)
        change = self.product.rows(reader, first, last) * scale
        return read_rows(reader, self.base, first, last).float() + change


@dataclass(frozen=True, kw_only=True)
class ExpertSum(ComputedTensor):
    """W[e] + s·B[e]·A[e] for packed experts W (E, R, C), or with (B[e]·A[e])ᵀ.

    Attributes:
        lora_a: (E·r, C): the factors of one expert after another.
        lora_b: (R, r·E): of each rank those of all experts.
        transposed: A is (E·r, R) and B (C, r·E), as peft before 0.19 trained them.
    """

    base: Source
    lora_a: TensorMeta
    lora_b: TensorMeta
    scale: float
    transposed: bool

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.base.stored, self.lora_a, self.lora_b)

    @property
    def num_rows(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def num_columns(self) -> int:
        return self.shape[2]

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) of (E·R, C) as (last - first, C) of float32."""
        import torch

        num_experts, height, columns = self.shape
        rank = self.lora_a.shape[0] // num_experts
        values = reader.values(self.base, first * columns, last * columns)
        changes = []
        for expert in range(first // height, -(-last // height)):
            low = max(first - expert * height, 0)
            high = min(last - expert * height, height)
            own = read_rows(reader, self.lora_a, expert * rank, (expert + 1) * rank).float()
            if self.transposed:
                whole = reader.whole(self.lora_b).view(columns, rank, num_experts)
                changes.append(own[:, low:high].T @ whole[..., expert].T.float())
            else:
                some = read_rows(reader, self.lora_b, low, high).view(-1, rank, num_experts)
                changes.append(some[..., expert].float() @ own)
        return values.view(-1, columns).float() + torch.cat(changes) * self.scale


@dataclass(frozen=True, kw_only=True)
class Multiplied(ComputedTensor):
    """W with its rows or columns multiplied by a vector ((IA)³, arXiv 2205.05638).

    Attributes:
        base: W (R, …).
        vector: one value for each row, or for each index of the second axis.
        by_row: which of them.
        added: is added to the vector: LyCORIS stores its difference from 1.
    """

    base: Source
    vector: TensorMeta
    by_row: bool
    added: float = 0.0

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.base.stored, self.vector)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        import torch

        values = read_rows(reader, self.base, first, last).float()
        vector = reader.whole(self.vector).flatten().float() + self.added
        if self.by_row:
            return values * vector[first:last, None]
        # In a convolution of several groups, each group of rows has inputs of its own.
        inputs = self.shape[1]
        groups = vector.view(-1, inputs)
        group_rows = self.num_rows // len(groups)
        own = groups[torch.arange(first, last) // group_rows]
        return (values.view(last - first, inputs, -1) * own[..., None]).flatten(1)
