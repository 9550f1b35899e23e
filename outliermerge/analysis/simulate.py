"""The simulated weights of arXiv 2501.10661, sections B.2 and C.6, and its Fig. 7."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.analysis.extras import require
from outliermerge.analysis.stats import stats_of_tensor
from outliermerge.analysis.table import BINS, HALF_WIDTH, TensorStats
from outliermerge.arguments import checked, nothing
from outliermerge.display import short_repr
from outliermerge.errors import ArgumentError, argument
from outliermerge.notebook import with_bar
from outliermerge.optional import require_torch
from outliermerge.output.replaceable import GENERATOR
from outliermerge.storage.files import write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOISES = (0.001, 0.005, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3)
PAPER_LABELS = {
    0.001: "line",
    0.005: "line",
    0.01: "inverted T",
    0.03: "sharp",
    0.05: "sharp",
    0.1: "Gaussian",
    0.2: "Gaussian",
    0.3: "Gaussian",
}
"""The name in section B.2 of the shape at each standard deviation of the noise."""

_FEWEST_POINTS = 1_000
_SHOWN = 5.0


@dataclass(frozen=True, slots=True)
class SimulatedWeights:
    """The optimal weights with noise.

    Attributes:
        noise: the standard deviation of the noise; 0 for the optimal weights themselves.
        expected: the paper's name of their shape; None if the paper gives none.
        stats: the statistics, with our label of the shape and the histogram.
    """

    noise: float
    expected: str | None
    stats: TensorStats


@dataclass(frozen=True, slots=True)
class Simulation:
    """Simulated optimal weights, without and with noise.

    Attributes:
        seed: the seed of numpy's default generator.
        num_points: the number of weights.
        num_non_zero: how many optimal weights are not zero.
        num_outliers: how many optimal weights are outliers, in [0.6, 1].
        weights: first the optimal weights, then those with each noise, in the given order.
    """

    seed: int
    num_points: int
    num_non_zero: int
    num_outliers: int
    weights: tuple[SimulatedWeights, ...]

    def __repr__(self) -> str:
        labels = ", ".join(f"{each.noise:g} {each.stats.label or '–'}" for each in self.weights)
        return short_repr(
            self, f"{self.num_points:,} points, seed {self.seed}", f"by noise: {labels}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all but the histograms."""
        return {
            "seed": self.seed,
            "num_points": self.num_points,
            "num_non_zero": self.num_non_zero,
            "num_outliers": self.num_outliers,
            "weights": [
                {"noise": each.noise, "expected": each.expected} | each.stats.as_dict()
                for each in self.weights
            ],
        }


@checked
@with_bar("the simulation")
def simulate(
    *,
    seed: int = 42,
    num_points: int = 10_000_000,
    noises: Sequence[float] = NOISES,
    on_total: Callable[[int], None] = nothing,
    on_progress: Callable[[int], None] = nothing,
) -> Simulation:
    """Simulate weights as in arXiv 2501.10661, section C.6, and measure them.

    A fifth of the points is drawn: 0.5% of these in [0.6, 1], the others from N(0, 0.1²). Normal
    values with |x| < 0.001 or |x| > 0.5 are set to zero. All other points are zero. Then noise from
    N(0, s²) is added at every point, drawn again for each s.

    Where the paper says nothing, these are our choices. The generator is numpy's default: the paper
    gives the seed 42 but not the generator, so only its distribution can be reproduced, not its
    points. Outliers are uniform, and positions are drawn without replacement. Outliers are
    positive, as the interval says, although section B.1 assumes a symmetric distribution.

    Args:
        seed: the seed of the generator; the same seed gives the same points.
        num_points: 1,000 or more; the paper's 10 million take about 1 GB of memory.
        noises: standard deviations s, greater than 0.
        on_total: called once, before measuring, with the number of bytes of all points.
        on_progress: called with the number of bytes of the points just measured.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> [each.stats.label for each in simulate(num_points=100_000, noises=[0.01, 0.3]).weights]
        ['line', 'inverted T', 'Gaussian']
    """
    import numpy as np

    if num_points < _FEWEST_POINTS:
        raise ArgumentError(
            f"{argument('num_points')}: found {num_points}, expected {_FEWEST_POINTS:,} or more"
        )
    if wrong := [noise for noise in noises if not 0 < noise < float("inf")]:
        raise ArgumentError(f"noises: found {wrong[0]}, expected a standard deviation above 0")
    if seed < 0:
        raise ArgumentError(f"{argument('seed')}: found {seed}, expected 0 or more")
    require_torch("a simulation")
    on_total((len(noises) + 1) * num_points * np.dtype(np.float64).itemsize)
    generator = np.random.default_rng(seed)
    optimal_E = _optimal_weights(generator, num_points)
    found = []
    for noise, values_E in _noisy(generator, optimal_E, noises):
        found.append(SimulatedWeights(noise, PAPER_LABELS.get(noise), _stats(values_E, noise)))
        on_progress(values_E.nbytes)
    return Simulation(
        seed=seed,
        num_points=num_points,
        num_non_zero=int(np.count_nonzero(optimal_E)),
        num_outliers=int(np.count_nonzero(optimal_E > 0.5)),
        weights=tuple(found),
    )


def _optimal_weights(generator: np.random.Generator, num_points: int) -> NDArray[np.float64]:
    import numpy as np

    num_drawn = num_points // 5
    num_outliers = num_drawn // 200
    drawn = generator.normal(0.0, 0.1, num_drawn)
    drawn[(np.abs(drawn) < 0.001) | (np.abs(drawn) > 0.5)] = 0.0
    drawn[:num_outliers] = generator.uniform(0.6, 1.0, num_outliers)
    optimal_E = np.zeros(num_points)
    optimal_E[generator.choice(num_points, num_drawn, replace=False, shuffle=False)] = drawn
    return optimal_E


def _noisy(
    generator: np.random.Generator, optimal_E: NDArray[np.float64], noises: Sequence[float]
) -> Iterator[tuple[float, NDArray[np.float64]]]:
    yield 0.0, optimal_E
    for noise in noises:
        yield noise, optimal_E + generator.normal(0.0, noise, len(optimal_E))


def _stats(values_E: NDArray[np.float64], noise: float) -> TensorStats:
    import torch

    name = f"W* + N(0, {noise:g}²)" if noise else "W*"
    return stats_of_tensor(torch.from_numpy(values_E).float(), name=name)


def draw(simulation: Simulation, path: Path) -> None:
    """Write Fig. 7 of arXiv 2501.10661 as a PNG: the density of W* with each noise, within 5σ.

    Raises:
        OutlierMergeError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    # The object interface: pyplot would choose a backend and keep every figure.
    new_figure = require("matplotlib.figure", "a figure").Figure
    num_columns = min(3, len(simulation.weights))
    num_rows = -(-len(simulation.weights) // num_columns)
    size = (3.4 * num_columns, 2.5 * num_rows + 0.4)
    figure = new_figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in panels[len(simulation.weights) :]:
        axes.set_axis_off()
    for axes, weights in zip(panels, simulation.weights, strict=False):
        _draw_panel(axes, weights)
    figure.suptitle(f"{simulation.num_points:,} points, seed {simulation.seed}", fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": GENERATOR})
    write_whole(path, content.getvalue())


def _draw_panel(axes: Any, weights: SimulatedWeights) -> None:
    stats = weights.stats
    assert stats.histogram is not None  # simulated weights are never all equal
    bin_width = 2 * HALF_WIDTH / BINS * stats.std
    edges = [stats.mean + stats.std * (2 * HALF_WIDTH * n / BINS - HALF_WIDTH) for n in range(BINS)]
    shares = [count / stats.num_elements / bin_width for count in stats.histogram.counts]
    axes.fill_between(edges, shares, step="post", color="#0072B2", linewidth=0)
    axes.set_xlim(stats.mean - _SHOWN * stats.std, stats.mean + _SHOWN * stats.std)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{stats.name}: {stats.label}", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
