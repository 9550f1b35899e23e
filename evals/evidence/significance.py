"""Differences paired by seed: their errors, tests, and the correction for many comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, std(ddof=1) / √n; NaN of one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p of Student's t for differences whose mean may be 0."""
    mean, error = mean_and_error(differences)
    if math.isnan(error):
        return 1.0
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean / error), len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    corrected, greatest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(order):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = greatest
    return corrected


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Return Spearman's correlation and its p; NaN and 1 of fewer than three pairs."""
    if len(left) < 3 or len(set(left)) < 2 or len(set(right)) < 2:
        return math.nan, 1.0
    found = stats.spearmanr(left, right)
    return float(found.statistic), float(found.pvalue)
