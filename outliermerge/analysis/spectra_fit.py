"""Fits a power law to distances, and compares it with other laws."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from outliermerge.analysis.extras import require

FEWEST_DISTANCES = 10
"""The fewest that are fitted. Clauset, Shalizi and Newman (SIAM Review 51, 2009) advise 50."""
SIGNIFICANCE = 0.1
"""The sign of a likelihood ratio is significant if p is below this (same paper, section 5)."""

MOST_DISTANCES = 3_000
"""The most that are fitted: the time to search xmin grows with the square of their number."""

_GREATEST_ALPHA = 50.0
_MOST_SIGMAS = 20.0


@dataclass(frozen=True, slots=True)
class FitComparison:
    """The comparison of a power law with another law, on the distances of the fit.

    Attributes:
        ratio: the log-likelihood ratio divided by its standard deviation; above 0 favours the power
            law.
        p: the probability of a ratio that far from 0 if both laws fit equally well. The sign of the
            ratio is significant if p is below 0.1.
    """

    ratio: float
    p: float


@dataclass(frozen=True, slots=True)
class PowerLawFit:
    """The fitted density `x^-alpha` for x ≥ xmin, by the method of Clauset, Shalizi and Newman.

    Attributes:
        num_distances: the number of fitted distances, which are above 0.
        xmin: the start of the tail for which the power law fits best (least KS distance).
        num_tail: the number of distances from xmin on; a fit to fewer than 50 says little.
        alpha: the exponent, by maximum likelihood.
        standard_error: the standard error of alpha, `(alpha - 1) / sqrt(num_tail)`.
        ks_distance: the largest difference between the tail's and the fitted cumulative
            distribution.
        exponential, lognormal: the comparisons of the power law with these laws.
    """

    num_distances: int
    xmin: float
    num_tail: int
    alpha: float
    standard_error: float
    ks_distance: float
    exponential: FitComparison
    lognormal: FitComparison

    @property
    def verdict(self) -> str:
        """The result of the comparisons: "power law", "exponential", "lognormal" or "undecided".

        It is "power law" if a power law fits better than an exponential and no worse than a
        log-normal. A power law is a limit of log-normals, so it never fits much better than these.
        """
        others = {"exponential": self.exponential, "lognormal": self.lognormal}
        better = {name: each for name, each in others.items() if _is_sure(each) and each.ratio < 0}
        if better:
            return min(better, key=lambda name: better[name].ratio)
        sure = _is_sure(self.exponential) and self.exponential.ratio > 0
        return "power law" if sure else "undecided"

    def as_dict(self) -> dict[str, Any]:
        """Return numbers by name, with the verdict."""
        return asdict(self) | {"verdict": self.verdict}


def _is_sure(comparison: FitComparison) -> bool:
    return comparison.p < SIGNIFICANCE


def fit_power_law(distances: Sequence[float]) -> PowerLawFit | None:
    """Fit a power law to the tail of distances, and compare it with other laws.

    If there are more than 3,000 distances, 3,000 of them are taken, evenly spaced in the given
    order. The package `powerlaw` does the fit (Alstott, Bullmore and Plenz, PLOS ONE 9, 2014). Its
    p-values assume independent distances. Distances between all pairs of layers are not
    independent, so the p-values are too small.

    Returns:
        The fit; None for fewer than 10 different distances above 0, and for distances so similar
        that alpha would be 50 or more.

    Raises:
        OutlierMergeError: `powerlaw` is not installed.
    """
    powerlaw = require("powerlaw", "fitting a power law")
    import numpy as np

    given = np.array([distance for distance in distances if distance > 0])
    if len(np.unique(given)) < FEWEST_DISTANCES:
        return None
    if len(given) > MOST_DISTANCES:
        places = np.linspace(0, len(given) - 1, MOST_DISTANCES).round().astype(int)
        given = np.sort(given)[places]
    unit = float(np.exp(np.log(given).mean()))
    with warnings.catch_warnings():
        # The search reads an attribute that powerlaw 2.0 itself calls deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        # It warns of candidates for xmin and of other laws that fit badly; such a bad fit is a
        # valid answer here.
        warnings.simplefilter("ignore", UserWarning)
        fit = powerlaw.Fit(
            given / unit, verbose=0, parameter_ranges={"alpha": [1.0, _GREATEST_ALPHA]}
        )
        tail = fit.data / fit.xmin
        laws = {"xmin": 1.0, "data": tail, "verbose": 0}
        power_law = powerlaw.Power_Law(**laws, parameter_ranges={"alpha": [1.0, _GREATEST_ALPHA]})
        alpha = float(power_law.alpha)
        if alpha > 0.99 * _GREATEST_ALPHA:
            return None
        # As log-normals approach their limit, a power law, they underflow, because the tail above
        # xmin is more and more σ above their median. At 20σ the two laws are indistinguishable.
        least_mu = -(_MOST_SIGMAS**2) / (alpha - 1)
        others = {
            "exponential": powerlaw.Exponential(**laws),
            "lognormal": powerlaw.Lognormal(**laws, parameter_ranges={"mu": [least_mu, None]}),
        }
        compared = {
            name: powerlaw.loglikelihood_ratio(
                power_law.loglikelihoods(tail), other.loglikelihoods(tail), normalized_ratio=True
            )
            for name, other in others.items()
        }
    return PowerLawFit(
        num_distances=len(given),
        xmin=float(fit.xmin) * unit,
        num_tail=len(tail),
        alpha=alpha,
        standard_error=(alpha - 1) / math.sqrt(len(tail)),
        ks_distance=float(power_law.D),
        exponential=FitComparison(*map(float, compared["exponential"])),
        lognormal=FitComparison(*map(float, compared["lognormal"])),
    )
