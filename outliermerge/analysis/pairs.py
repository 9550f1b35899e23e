"""The comparison of one tensor, or of a whole model, in two models."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from outliermerge.display import short_repr


@dataclass(frozen=True, slots=True)
class PairStats:
    """The comparison of one tensor in two models, a and b, or of the two whole models.

    A vector is a model's task vector, or its weights if there is no base. An outlier is an element
    with |x| > tσ; one of exactly ±tσ is not. Undefined values are NaN, and so are all measures of a
    pair that contains an infinite value or NaN.

    Attributes:
        name: the tensor's name; "" for whole models.
        layer: the layer's name, such as `model.layers.3`; None outside layers, and for whole
            models.
        module: the name with layers' numbers replaced by `*`; "" for whole models.
        shape: the tensor's shape; () for whole models.
        num_elements: how many elements are compared.
        a, b: the numbers of the models, a < b.
        cosine: the cosine of the angle between the vectors; NaN if one is zero.
        distance: L2 norm of a - b.
        relative_distance: the distance divided by the norm of a; NaN if that is zero.
        norm_a, norm_b: L2 norms of the vectors.
        std_a, std_b: population standard deviations.
        std_difference: |σ_a - σ_b|, a similarity that needs no evaluation of the models (arXiv
            2501.10661, Table 7).
        sign_agreement: the share of equal signs among the elements that are non-zero in both.
        sign_conflict_ratio: the share of all elements whose signs are opposite.
        outlier_overlap: the Jaccard index of the positions of outliers, by each model's own σ: the
            number of elements with |a| > tσ_a and |b| > tσ_b, divided by the number with at least
            one of the two.
        outlier_ratio_a, outlier_ratio_b: the share of elements that min-σ keeps whole in a merge
            of these two: |x| > tσ, where σ is the smaller one of this tensor's two. For whole
            models, each tensor has its own threshold.
        both_outliers_ratio: the share of elements that min-σ keeps whole in both models, and adds
            up.
        conflict_ratio: the share of all elements that are outliers in both models with opposite
            signs. In a merge they cancel out, while those with equal signs add up. Only of task
            vectors does it mean something.
    """

    name: str
    layer: str | None
    module: str
    shape: tuple[int, ...]
    num_elements: int
    a: int
    b: int
    cosine: float
    distance: float
    relative_distance: float
    norm_a: float
    norm_b: float
    std_a: float
    std_b: float
    std_difference: float
    sign_agreement: float
    sign_conflict_ratio: float
    outlier_overlap: float
    outlier_ratio_a: float
    outlier_ratio_b: float
    both_outliers_ratio: float
    conflict_ratio: float

    def __repr__(self) -> str:
        return short_repr(
            self,
            f"models {self.a} and {self.b}, {self.name or 'whole'}, {self.num_elements:,} elements",
            f"cosine {self.cosine:.4f}, equal signs {self.sign_agreement:.1%}, shared outliers "
            f"{self.outlier_overlap:.1%}, conflicts {self.conflict_ratio:.3%}",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the columns by name, NaNs as they are."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return named | {"shape": list(self.shape)}
