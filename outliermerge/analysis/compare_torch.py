"""The sums from which a comparison of models is computed, by torch, span by span.

Shape suffixes: S sources (the base, where there is one, then the models), M models, P pairs of
models in the order of `itertools.combinations`, C elements of a chunk.

Sums over fixed chunks are in float64 and are then added exactly (`math.fsum`), so that a result
does not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, combinations
from typing import TYPE_CHECKING

from outliermerge.analysis.sums import exact_sum
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.execution.passes import Span, spans
from outliermerge.execution.rounds import Round, Steps

if TYPE_CHECKING:
    from torch import Tensor

SPAN_ELEMENTS = 1 << 20
_CACHED_ELEMENTS = 1 << 16  # in float64 a few models' chunks fit in a CPU's caches


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the elements of a chunk, a tensor or a whole model.

    Attributes:
        num_elements: the number of elements of each vector.
        means, squares: each vector's mean and sum of squared deviations from it, (M,).
        base: the sum of the base's elements; 0 without a base.
        gram: the inner products of the vectors, (M, M).
        distances: the squared L2 distance of each pair of vectors, (P,).
    """

    num_elements: int
    means: tuple[float, ...]
    squares: tuple[float, ...]
    base: float
    gram: tuple[tuple[float, ...], ...]
    distances: tuple[float, ...]

    def is_finite(self, model: int) -> bool:
        """Tell whether all values of a model's vector, and of the base, are finite."""
        return math.isfinite(self.squares[model]) and math.isfinite(self.gram[model][model])

    def std(self, model: int) -> float:
        """Return the population standard deviation of a model's vector."""
        return math.sqrt(self.squares[model] / self.num_elements)


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of elements for each pair of models, (M, M); the diagonal is a model with itself.

    Attributes:
        non_zero: elements that are non-zero in both.
        signs: the number of equal signs minus that of opposite signs among the elements above.
        outliers: elements of the first beyond tσ, where σ is the smaller one of the two models:
            what min-σ keeps whole of it in a merge of the two.
        both_outliers: elements that are outliers so in both.
        outlier_signs: among these, the number of equal signs minus the number of opposite signs.
        own_outliers: elements that are outliers in both, by each model's own σ.
    """

    non_zero: tuple[tuple[int, ...], ...]
    signs: tuple[tuple[int, ...], ...]
    outliers: tuple[tuple[int, ...], ...]
    both_outliers: tuple[tuple[int, ...], ...]
    outlier_signs: tuple[tuple[int, ...], ...]
    own_outliers: tuple[tuple[int, ...], ...]


def fold_sums(shares: Sequence[Sums], num_models: int) -> Sums:
    """Add up the chunks' sums in order; combine means and squares by Chan's formula."""
    num_elements = sum(share.num_elements for share in shares)
    models = range(num_models)
    means = tuple(
        exact_sum(share.num_elements * share.means[m] for share in shares) / max(1, num_elements)
        for m in models
    )

    def squares(m: int) -> Iterator[float]:
        for share in shares:
            yield share.squares[m]
            yield share.num_elements * (share.means[m] - means[m]) ** 2

    return Sums(
        num_elements,
        means,
        tuple(exact_sum(squares(m)) for m in models),
        exact_sum(share.base for share in shares),
        tuple(
            tuple(exact_sum(share.gram[a][b] for share in shares) for b in models) for a in models
        ),
        tuple(
            exact_sum(share.distances[p] for share in shares)
            for p in range(math.comb(num_models, 2))
        ),
    )


def fold_counts(shares: Sequence[Counts], num_models: int) -> Counts:
    """Add up the chunks' counts."""
    models = range(num_models)

    def table(name: str) -> tuple[tuple[int, ...], ...]:
        tables = [getattr(share, name) for share in shares]
        return tuple(tuple(sum(each[a][b] for each in tables) for b in models) for a in models)

    return Counts(*(table(field.name) for field in fields(Counts)))


@dataclass(frozen=True)
class PairMeasurer:
    """Measures a tensor of all models at once, in rounds that threads share.

    Attributes:
        reader: reads the sources.
        device: torch's device.
        has_base: whether the first source is a base, which is subtracted from the others.
        t: threshold in units of σ.
        on_progress: called with the number of bytes just read, by any thread.
    """

    reader: Reader
    device: str
    has_base: bool
    t: float
    on_progress: Callable[[int], None]

    def measure(self, sources: Sequence[Source]) -> Steps[tuple[Sums, Counts]]:
        """Read a tensor twice: for its sums, and for the counts, whose thresholds need σ."""
        num_models = len(sources) - self.has_base
        read = spans(sources[0].num_elements, SPAN_ELEMENTS)

        def sums(span: Span) -> list[Sums]:
            return [_sums(chunk_SC, self.has_base) for chunk_SC in self._chunks(sources, span)]

        whole = fold_sums([*chain.from_iterable((yield Round(sums, read)))], num_models)
        own = [
            self.t * whole.std(m) if read and whole.is_finite(m) else math.inf
            for m in range(num_models)
        ]

        def counts(span: Span) -> Counts:
            chunks = self._chunks(sources, span)
            return fold_counts([_counts(c_SC, self.has_base, own) for c_SC in chunks], num_models)

        return whole, fold_counts((yield Round(counts, read)), num_models)

    def _chunks(self, sources: Sequence[Source], span: Span) -> Iterator[Tensor]:
        """Yield the chunks of a span in float64, for the caller to overwrite."""
        import torch

        values = {source: self.reader.values(source, *span) for source in dict.fromkeys(sources)}
        num_elements = span[1] - span[0]
        self.on_progress(sum(source.dtype.num_bytes for source in values) * num_elements)
        values = {source: each.to(self.device) for source, each in values.items()}
        # A GPU takes longer to launch an operation than to run it on a chunk, so it gets larger
        # ones.
        size = _CACHED_ELEMENTS if self.device == "cpu" else SPAN_ELEMENTS
        for start, stop in spans(num_elements, size):
            chunk_SC = torch.empty(
                len(sources), stop - start, dtype=torch.float64, device=self.device
            )
            for row_C, source in zip(chunk_SC, sources, strict=True):
                row_C.copy_(values[source][start:stop])
            yield chunk_SC


def _sums(chunk_SC: Tensor, has_base: bool) -> Sums:
    """Return the sums of a chunk, which is overwritten."""
    import torch

    vectors_MC = chunk_SC[int(has_base) :]
    num_models, num_elements = vectors_MC.shape
    base = chunk_SC[:1].sum(1) if has_base else chunk_SC.new_zeros(1)
    # From the models, not from their task vectors: subtracting a base would only add rounding.
    distances_P = torch.stack([_square(a - b) for a, b in combinations(vectors_MC, 2)])
    if has_base:
        vectors_MC -= chunk_SC[0]
    gram_MM = vectors_MC @ vectors_MC.T
    means_M = vectors_MC.mean(1)
    vectors_MC -= means_M[:, None]
    squares_M = torch.stack([_square(row_C) for row_C in vectors_MC])
    found = iter(torch.cat([means_M, squares_M, base, gram_MM.flatten(), distances_P]).tolist())

    def take(num: int) -> tuple[float, ...]:
        return tuple(next(found) for _ in range(num))

    return Sums(
        num_elements,
        take(num_models),
        take(num_models),
        next(found),
        tuple(take(num_models) for _ in range(num_models)),
        take(len(distances_P)),
    )


def _counts(chunk_SC: Tensor, has_base: bool, own: Sequence[float]) -> Counts:
    """Return the counts of a chunk, which is overwritten.

    Args:
        own: the threshold from each model's σ; min-σ takes the lower one of a pair. It is infinite
            for a model whose values are not all finite, and the counts of that model have no
            meaning.
    """
    import torch

    vectors_MC = chunk_SC[int(has_base) :]
    if has_base:
        vectors_MC -= chunk_SC[0]
    # Arithmetic instead of boolean masks, because masks take torch's CPU kernels several times
    # longer. The sums of signs are exact in float32, because a span has fewer than 2²⁴ elements.
    signs_MC = vectors_MC.sign().float()
    signs_MM = _gram(signs_MC)
    non_zero_MM = _gram(signs_MC.abs_())
    own_MC, outliers_MM = torch.empty_like(signs_MC), torch.zeros_like(signs_MM)
    both_MM, outlier_signs_MM = torch.zeros_like(signs_MM), torch.zeros_like(signs_MM)
    order = sorted(range(len(own)), key=own.__getitem__)
    for number, low in enumerate(order):  # the pairs in which this model's σ is the smaller one
        pair = order[number:]
        found_MC = torch.stack([vectors_MC[m].hardshrink(own[low]) for m in pair])
        found_MC = found_MC.sign_().float()  # 0 where |x| ≤ tσ
        outlier_signs_MM[low, pair] = outlier_signs_MM[pair, low] = found_MC @ found_MC[0]
        own_MC[low] = found_MC.abs_()[0]
        both_MM[low, pair] = both_MM[pair, low] = found_MC @ found_MC[0]
        outliers_MM[low, pair] = found_MC[0].sum()
        outliers_MM[pair, low] = found_MC.sum(1)
    found = torch.stack(
        [non_zero_MM, signs_MM, outliers_MM, both_MM, outlier_signs_MM, _gram(own_MC)]
    )
    return Counts(*(tuple(map(tuple, table)) for table in found.long().tolist()))


def _square(row_C: Tensor) -> Tensor:
    return row_C.dot(row_C)


def _gram(rows_MC: Tensor) -> Tensor:
    return rows_MC @ rows_MC.T
