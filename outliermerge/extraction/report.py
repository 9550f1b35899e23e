"""What was asked of an extraction, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.sources import DTYPES
from outliermerge.display import human_bytes, short_repr
from outliermerge.errors import ArgumentError, argument, suggest
from outliermerge.extraction.factors import Wanted

DTYPE_NAMES = ("float32", "bfloat16", "float16")
FORMAT = 1
REPORT_NAME = "extraction.json"


@dataclass(frozen=True)
class Settings:
    """What is extracted, as `extract` takes it."""

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    factor_embeddings: bool = False
    partial: bool = False
    randomized: bool = False
    seed: int = 0
    dtype: str = "float32"
    core: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def wanted(self, *, of_merge: bool = False) -> Wanted:
        """Return how each matrix is factored.

        Args:
            of_merge: an adapter is made of a merge, of which everything may be kept.

        Raises:
            ArgumentError: an argument is out of range, or two contradict each other.
        """
        rank, energy, error = self.rank, self.energy, self.error
        if rank is None and energy is None and error is None and not of_merge:
            raise ArgumentError(
                f"nothing says how much is kept: give {argument('rank')}, {argument('energy')} or "
                f"{argument('error')}"
            )
        if self.core and not of_merge:
            raise ArgumentError(f"{argument('core')}: is for merges: give a spec as the model")
        if error is not None and (rank is not None or energy is not None):
            other = argument("rank" if rank is not None else "energy")
            raise ArgumentError(f"{argument('error')}: is a bound, and {other} another: give one")
        if rank is not None and rank < 1:
            raise ArgumentError(f"{argument('rank')}: found {rank}, expected 1 or more")
        if energy is not None and not 0 < energy <= 1:
            raise ArgumentError(
                f"{argument('energy')}: found {energy}, expected more than 0, up to 1"
            )
        if error is not None and not 0 < error < 1:
            raise ArgumentError(f"{argument('error')}: found {error}, expected between 0 and 1")
        if self.randomized and rank is None:
            raise ArgumentError(
                f"{argument('randomized')}: needs {argument('rank')}, which says how many singular "
                "vectors are looked for"
            )
        if self.dtype not in DTYPE_NAMES:
            raise ArgumentError(
                f"{argument('dtype')}: no dtype of factors {self.dtype!r}. "
                f"{suggest(self.dtype, DTYPE_NAMES)}"
            )
        found = Wanted(rank, energy, error, self.randomized, self.seed, DTYPES[self.dtype])
        if error is not None and error <= found.least_error:
            raise ArgumentError(
                f"{argument('error')}: {error:g} cannot be kept by factors in {self.dtype}, whose "
                f"rounding alone makes up to {found.least_error:.2g}. Give a larger bound, or "
                f"{argument('dtype', 'float32')}"
            )
        return found


@dataclass(frozen=True, slots=True)
class Extracted:
    """A tensor that differs from the base's, and how the adapter holds it.

    Attributes:
        name: its name in the base.
        shape: its shape.
        how: `linear`, `transposed`, `embedding`, `convolution`, `experts`, `turned experts` (whose
            class multiplies by them as they are stored) or `parameter` (all factored), `bias` or
            `whole`.
        rank: of the factors; 0 if it is not factored.
        norm: the Frobenius norm of the change; NaN where the base has another shape.
        error: the norm of what is lost, over it.
        num_bytes: what the adapter's file has for it.
        worst: of packed experts the largest error of one of them; None of what is not.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    rank: int
    norm: float
    error: float
    num_bytes: int
    worst: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        norm = None if math.isnan(self.norm) else self.norm
        return named | {"shape": list(self.shape), "norm": norm}


@dataclass(frozen=True)
class Extraction:
    """An adapter that was made.

    Attributes:
        output: its folder.
        model, base: the names that the caller gave.
        settings: what was asked.
        tensors: the tensors that it changes, in the base's order.
        num_unchanged: tensors that are as in the base.
        num_excluded: tensors that were not chosen, and not compared.
        left_out: changed tensors that it does not hold, and why (`partial`).
        notes: what a person should know of it.
        num_bytes: of its tensors.
        seconds: how long it took.
    """

    output: Path
    model: str
    base: str
    settings: Settings
    tensors: tuple[Extracted, ...]
    num_unchanged: int
    num_excluded: int
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    num_bytes: int
    seconds: float

    @property
    def error(self) -> float:
        """The norm of what is lost of all tensors, over that of the change; without left_out."""
        lost = math.hypot(*(t.norm * t.error for t in self.tensors if t.norm == t.norm))
        whole = math.hypot(*(t.norm for t in self.tensors if t.norm == t.norm))
        return lost / whole if whole else 0.0

    def __repr__(self) -> str:
        ranks = [t.rank for t in self.tensors if t.rank]
        return short_repr(
            self,
            f"{self.output}, {human_bytes(self.num_bytes)}",
            f"{len(ranks)} factored, r={min(ranks)} to {max(ranks)}" if ranks else "",
            f"{len(self.tensors) - len(ranks)} whole, error {self.error:.2g}",
            f"left out: {len(self.left_out)}" if self.left_out else "",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all by name, as JSON values."""
        return {
            "format": FORMAT,
            "outliermerge": version("outliermerge"),
            "model": self.model,
            "base": self.base,
            "settings": asdict(self.settings),
            "error": self.error,
            "num_unchanged": self.num_unchanged,
            "num_excluded": self.num_excluded,
            "num_bytes": self.num_bytes,
            "seconds": round(self.seconds, 3),
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
            "tensors": [tensor.as_dict() for tensor in self.tensors],
        }
