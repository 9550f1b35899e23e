"""The tables of weight statistics: rows for tensors, and for groups of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from outliermerge.analysis.places import natural, short_names
from outliermerge.display import html_table, html_words, short_repr

BINS = 512
"""The bins of a histogram: from -8σ to 8σ about the mean, each σ/32 wide."""
HALF_WIDTH = 8.0

SUMMARIZED = (
    "mean",
    "std",
    "kept_ratio",
    "skewness",
    "kurtosis",
    "skewness_before",
    "kurtosis_before",
    "small_ratio",
    "skewness_without_small",
    "kurtosis_without_small",
    "outside_2_ratio",
    "outside_3_ratio",
    "outside_4_ratio",
)
"""The columns that are summarised for a group by mean and standard deviation."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of (x - mean) / std in BINS equal bins from -HALF_WIDTH to HALF_WIDTH.

    Attributes:
        counts: the counts of the bins, (BINS,).
        num_below, num_above: how many elements are below and above all bins.
    """

    counts: tuple[int, ...]
    num_below: int
    num_above: int

    def __repr__(self) -> str:
        num = self.num_below + sum(self.counts) + self.num_above
        return short_repr(self, f"{num:,} elements in {len(self.counts)} bins, from -8σ to 8σ")


@dataclass(frozen=True, slots=True)
class TensorStats:
    """The statistics of one tensor's elements; ratios are shares of its finite elements, 0 to 1.

    Undefined statistics, such as the kurtosis of a constant, are NaN.

    Attributes:
        name: the tensor's name.
        layer: the layer's name, such as `model.layers.3`; None outside layers.
        module: the name with layers' numbers replaced by `*`.
        shape: the tensor's shape.
        num_elements: the number of all elements.
        num_non_finite: the number of infinite and NaN elements, which all following statistics
            ignore.
        mean, std: the mean, and the population standard deviation.
        minimum, maximum: the least and the greatest element.
        zero_ratio: the share of exact zeros.
        skewness_before, kurtosis_before: E[(x-μ)³]/σ³ and E[(x-μ)⁴]/σ⁴ of all elements.
        kept_ratio: the share of elements in [μ-fσ, μ+fσ], where f is the filter.
        skewness, kurtosis: those of the kept elements (arXiv 2501.10661, section 2.2).
        small_ratio: the share of elements with |x| below the limit `small`.
        without_small_ratio: the share of elements that are kept and not small.
        std_without_small, skewness_without_small, kurtosis_without_small: those of kept elements
            that are not small (Table 5).
        outside_2_ratio, outside_3_ratio, outside_4_ratio: the share with |x-μ| > 2σ, 3σ, 4σ.
        l1_norm, l2_norm: the tensor's norms.
        label: the label of its shape; None if it gets none.
        histogram: the histogram of its elements; None if all are equal.
    """

    name: str
    layer: str | None
    module: str
    shape: tuple[int, ...]
    num_elements: int
    num_non_finite: int
    mean: float
    std: float
    minimum: float
    maximum: float
    zero_ratio: float
    skewness_before: float
    kurtosis_before: float
    kept_ratio: float
    skewness: float
    kurtosis: float
    small_ratio: float
    without_small_ratio: float
    std_without_small: float
    skewness_without_small: float
    kurtosis_without_small: float
    outside_2_ratio: float
    outside_3_ratio: float
    outside_4_ratio: float
    l1_norm: float
    l2_norm: float
    label: str | None
    histogram: Histogram | None

    def __repr__(self) -> str:
        return short_repr(
            self,
            f"{self.name} {list(self.shape)}, {self.label or 'no label'}",
            f"mean {self.mean:.3g}, std {self.std:.3g}, from {self.minimum:.3g} to "
            f"{self.maximum:.3g}",
            f"kept {self.kept_ratio:.2%}, of these skewness {self.skewness:.2f}, kurtosis "
            f"{self.kurtosis:.2f}",
        )

    @property
    def is_matrix(self) -> bool:
        """Whether at least two of its dimensions are longer than 1."""
        return sum(length > 1 for length in self.shape) > 1

    def as_dict(self) -> dict[str, Any]:
        """Return all but the histogram."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        del named["histogram"]
        return named | {"shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and population standard deviation of a statistic over tensors, without NaNs."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Group:
    """Statistics of a group of matrices, each counted once.

    Attributes:
        name: the name of the layer or type of module; "" for the model.
        num_tensors, num_elements: how many matrices and elements the group has.
        labels: how many matrices have each label.
        spreads: mean and standard deviation of each column in SUMMARIZED, by name.
    """

    name: str
    num_tensors: int
    num_elements: int
    labels: Mapping[str, int]
    spreads: Mapping[str, Spread]

    def __repr__(self) -> str:
        labels = ", ".join(f"{label} ×{num}" for label, num in self.labels.items())
        return short_repr(
            self,
            f"{self.name or 'all matrices'}: {self.num_tensors} matrices, {self.num_elements:,} "
            "elements",
            f"std {self.spreads['std'].mean:.3g}, kurtosis {self.spreads['kurtosis'].mean:.2f}",
            labels,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return numbers by name, a spread as a `_mean` and a `_std` of its column."""
        found: dict[str, Any] = {
            "name": self.name,
            "num_tensors": self.num_tensors,
            "num_elements": self.num_elements,
            "labels": dict(self.labels),
        }
        for name, spread in self.spreads.items():
            found |= {f"{name}_mean": spread.mean, f"{name}_std": spread.std}
        return found


@dataclass(frozen=True, slots=True)
class WeightStats:
    """The statistics of a model's tensors, or of its task vectors against a base.

    Attributes:
        model, base: the names that the caller gave.
        filter: elements within this many σ of the mean were kept.
        small: the magnitude below which an element is small.
        tensors: the statistics of each tensor, in the model's order.
        notes: notes for the user, such as tensors that were left out.
    """

    model: str
    base: str | None
    filter: float
    small: float
    tensors: tuple[TensorStats, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return short_repr(self, *self._said)

    def _repr_html_(self) -> str:
        """Show the types of module as a table in a notebook."""
        names = self.short_names
        rows = [(names[group.name], *_cells(group)) for group in self.modules]
        rows.append(("all matrices", *_cells(self.whole)))
        columns = ("module", "matrices", "σ", "kept", "skewness", "kurtosis", "labels")
        return (
            html_words("; ".join(self._said))
            + html_table(columns, rows)
            + "".join(html_words(f"note: {note}") for note in self.notes)
        )

    @property
    def _said(self) -> list[str]:
        what = self.model if self.base is None else f"{self.model} − {self.base}"
        num = sum(tensor.num_elements for tensor in self.tensors)
        return [
            f"{what}: {len(self.tensors)} tensors, {num:,} elements",
            f"kept within {self.filter:g}σ, small where |x| < {self.small:g}",
        ]

    @property
    def matrices(self) -> list[TensorStats]:
        """The tensors that groups count, as in Tables 1 and 6: matrices that are not constant."""
        return [tensor for tensor in self.tensors if tensor.is_matrix and tensor.std > 0]

    @property
    def modules(self) -> list[Group]:
        """A group for each type of module, in the order of their names."""
        groups = self._groups(lambda tensor: tensor.module)
        return sorted(groups, key=lambda group: natural(group.name))

    @property
    def layers(self) -> list[Group]:
        """A group for each layer, in the order of their numbers."""
        groups = self._groups(lambda tensor: tensor.layer)
        return sorted(groups, key=lambda group: natural(group.name))

    @property
    def whole(self) -> Group:
        """The group of all matrices: a row of Table 1 or 6."""
        return _group("", self.matrices)

    @property
    def short_names(self) -> dict[str, str]:
        """The short name to show for each type of module."""
        return short_names(tensor.module for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Return all but the histograms; NaN stays NaN."""
        return {
            "model": self.model,
            "base": self.base,
            "filter": self.filter,
            "small": self.small,
            "tensors": [tensor.as_dict() for tensor in self.tensors],
            "groups": {
                "modules": [group.as_dict() for group in self.modules],
                "layers": [group.as_dict() for group in self.layers],
                "model": self.whole.as_dict(),
            },
            "notes": list(self.notes),
        }

    def _groups(self, key: Callable[[TensorStats], str | None]) -> list[Group]:
        members: dict[str, list[TensorStats]] = {}
        for tensor in self.matrices:
            name = key(tensor)
            if name is not None:
                members.setdefault(name, []).append(tensor)
        return [_group(name, tensors) for name, tensors in members.items()]


def _cells(group: Group) -> tuple[object, ...]:
    means = {name: each.mean for name, each in group.spreads.items()}
    labels = ", ".join(f"{label} ×{num}" for label, num in group.labels.items())
    return (
        group.num_tensors,
        f"{means['std']:.3g}",
        f"{means['kept_ratio']:.2%}",
        f"{means['skewness']:.2f}",
        f"{means['kurtosis']:.2f}",
        labels,
    )


def _group(name: str, tensors: list[TensorStats]) -> Group:
    labels = [tensor.label for tensor in tensors if tensor.label is not None]
    return Group(
        name=name,
        num_tensors=len(tensors),
        num_elements=sum(tensor.num_elements for tensor in tensors),
        labels={label: labels.count(label) for label in dict.fromkeys(labels)},
        spreads={
            column: spread(getattr(tensor, column) for tensor in tensors) for column in SUMMARIZED
        },
    )


def spread(values: Iterable[float]) -> Spread:
    """Return mean and population standard deviation of the values that are not NaN.

    >>> spread([1.0, 3.0, float("nan")])
    Spread(mean=2.0, std=1.0)
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Spread(math.nan, math.nan)
    mean = math.fsum(known) / len(known)
    squares = math.fsum((value - mean) ** 2 for value in known)
    return Spread(mean, math.sqrt(squares / len(known)))
