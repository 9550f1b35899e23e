"""Fits a power law to distances, and tells whether another law fits them better."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from outliermerge.analysis.extras import require

FEWEST_DISTANCES = 10
"""That are fitted. Clauset, Shalizi and Newman (SIAM Review 51, 2009) advise 50 or more."""
SIGNIFICANCE = 0.1
"""Below which p the sign of a likelihood ratio means something (the same, section 5)."""

MOST_DISTANCES = 3_000
"""That are fitted: the search for xmin takes a time that grows with their square."""

_GREATEST_ALPHA = 50.0
_MOST_SIGMAS = 20.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """A power law against another law, on the distances that the power law is fitted to.

    Attributes:
        ratio: log-likelihood ratio over its standard deviation; above 0 for the power law.
        p: how likely a ratio so far from 0 is if both fit alike; below 0.1 the sign means
            something.
    """

    ratio: float
    p: float


@dataclass(frozen=True, slots=True)
class PowerLawFit:
    """The density `x^-alpha` from xmin on, by the method of Clauset, Shalizi and Newman.

    Attributes:
        num_distances: that are above 0, and fitted.
        xmin: from where on the power law fits best: the least KS distance.
        num_tail: distances from xmin on; of fewer than 50 little can be said.
        alpha: maximum likelihood.
        standard_error: of alpha, `(alpha - 1) / sqrt(num_tail)`.
        ks_distance: greatest difference of the tail's distribution from the fitted one.
        exponential, lognormal: the power law against these.
    """

    num_distances: int
    xmin: float
    num_tail: int
    alpha: float
    standard_error: float
    ks_distance: float
    exponential: Comparison
    lognormal: Comparison

    @property
    def verdict(self) -> str:
        """What the comparisons say: "power law", "exponential", "lognormal" or "undecided".

        A power law is said where it fits better than an exponential and no worse than a
        log-normal: it is a limit of log-normals, so that it never fits much better than these.
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


def _is_sure(comparison: Comparison) -> bool:
    return comparison.p < SIGNIFICANCE


def fit_power_law(distances: Sequence[float]) -> PowerLawFit | None:
    """Fit a power law to the tail of distances, and compare it with other laws.

    Of more than 3,000 distances, 3,000 are taken that are evenly spread in their order. Uses the
    package `powerlaw` (Alstott, Bullmore and Plenz, PLOS ONE 9, 2014). Its p-values take
    distances for independent. Those between all pairs of layers are not: they say too much.

    Returns:
        The fit; None for fewer than 10 different distances above 0, and for such as are so much
        alike that alpha would be 50 or more.

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
        # It says so of candidates for xmin, and of other laws, that fit badly: that is the answer.
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
        # Towards the power law that is their limit, log-normals underflow: what lies above xmin
        # is then ever more σ above their median. At 20 the two can no longer be told apart.
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
        exponential=Comparison(*map(float, compared["exponential"])),
        lognormal=Comparison(*map(float, compared["lognormal"])),
    )
