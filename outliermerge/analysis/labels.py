"""The label of a tensor's shape: Gaussian, sharp, inverted T, line, or other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from statistics import NormalDist

from outliermerge.analysis.table import BINS, HALF_WIDTH, Histogram

LABELS = ("Gaussian", "sharp", "inverted T", "line", "other")

FEWEST = 1_000
"""The fewest elements that get a label. Of 300 simulations with 1,000 points at noise 0.01, 53 are
labelled "other" and 247 "inverted T"; with 5,000 points or more, all labels are right."""
LINE_WIDTH = 0.175
INVERTED_T_WIDTH = 0.38
GAUSSIAN_KURTOSIS = 3.3
FLAT_KURTOSIS = 2.25
SKEWNESS = 0.5

_BIN_WIDTH = 2 * HALF_WIDTH / BINS
_MIDDLES = [(number + 0.5) * _BIN_WIDTH - HALF_WIDTH for number in range(BINS)]
_KEPT = slice(round((HALF_WIDTH - 3) / _BIN_WIDTH), round((HALF_WIDTH + 3) / _BIN_WIDTH))
_POWERS = [[middle**power for middle in _MIDDLES[_KEPT]] for power in (1, 2, 3, 4)]
_QUARTILE = NormalDist().inv_cdf(0.75)


def label_of(histogram: Histogram | None) -> str | None:
    """Return the label of a tensor's shape, from its histogram alone.

    arXiv 2501.10661 names the shapes (section 2.2) and simulates them by noise on sparse weights
    (section B.2), but gives no rule. The following rule is ours; it does not depend on a
    `--filter`:

    - width: half the distance of the quartiles of all elements, over that of a Gaussian with
      their σ: 1 for a Gaussian, near 0 where half of the elements are a spike.
    - skewness and kurtosis of what 3σ keep, from the bins: the paper's measure.

    In this order: width below 0.175: "line". |skewness| above 0.5 (less is "fairly symmetrical":
    Bulmer, Principles of Statistics, 1979) or kurtosis below 2.25 (half way from the uniform's 1.8
    to the 2.83 that a Gaussian has when 3σ are kept): "other". Kurtosis below 3.3: "Gaussian",
    which a few far outliers do not change. Width below 0.38: "inverted T". All else: "sharp".
    Limits between these are geometric means, rounded, of the two nearest noises that the paper
    gives different names; at 10 million points and seed 42:

        noise      0.001  0.005   0.01   0.03   0.05    0.1    0.2    0.3
        width      0.032  0.126  0.243  0.602  0.795  0.949  0.991  0.997
        kurtosis   11.93  11.49  10.31   5.42   3.72   2.97   2.85   2.84
        the paper   line   line      T  sharp  sharp  Gauss  Gauss  Gauss

    so the nearest are 28% from a limit of the width, and 10% from one of the kurtosis. (A width as
    small as the first is that of a bin: in truth it is 0.025.) Laplace
    (kurtosis 3.9) and Student-t with 5 degrees of freedom (3.5) are sharp, the logistic (3.2) is
    Gaussian, uniform and bimodal tensors and exponential or log-normal ones are other.

    Returns:
        One of LABELS; None for fewer than 1,000 elements, and for constants.

    Example:
        >>> edges = [number / 32 - 8 for number in range(513)]
        >>> shares = [NormalDist().cdf(b) - NormalDist().cdf(a) for a, b in zip(edges, edges[1:])]
        >>> label_of(Histogram(tuple(round(1e6 * share) for share in shares), 0, 0))
        'Gaussian'
    """
    if histogram is None or _num_elements(histogram) < FEWEST:
        return None
    width = _width(histogram)
    if width < LINE_WIDTH:
        return "line"
    skewness, kurtosis = _moments(histogram.counts[_KEPT])
    if abs(skewness) > SKEWNESS or kurtosis < FLAT_KURTOSIS:
        return "other"
    if kurtosis < GAUSSIAN_KURTOSIS:
        return "Gaussian"
    return "inverted T" if width < INVERTED_T_WIDTH else "sharp"


def _num_elements(histogram: Histogram) -> int:
    return histogram.num_below + sum(histogram.counts) + histogram.num_above


def _width(histogram: Histogram) -> float:
    reached = list(accumulate(histogram.counts, initial=histogram.num_below))
    num_elements = reached[-1] + histogram.num_above

    def quantile(share: float) -> float:
        """Return a quantile; elements are taken as evenly spread inside a bin."""
        target = share * num_elements
        # By Chebyshev's inequality, less than 2% of any elements are beyond 8σ.
        number = bisect_left(reached, target, 1) - 1
        inside = (target - reached[number]) / histogram.counts[number]
        return (number + inside) * _BIN_WIDTH - HALF_WIDTH

    return (quantile(0.75) - quantile(0.25)) / 2 / _QUARTILE


def _moments(counts: Sequence[int]) -> tuple[float, float]:
    """Return skewness and kurtosis of the elements within 3σ of the mean."""
    num = sum(counts)
    first, second, third, fourth = (sum(map(mul, counts, powers)) / num for powers in _POWERS)
    variance = second - first**2
    central_third = third - 3 * first * second + 2 * first**3
    central_fourth = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central_third / variance**1.5, central_fourth / variance**2
