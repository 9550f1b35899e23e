"""The figures of a report for papers: PNGs, drawn by matplotlib."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from outliermerge.analysis.extras import require
from outliermerge.analysis.report.data import STATISTICS, Shown, Spot, colour_range, find_spots
from outliermerge.analysis.report.grid import Grid, Line, Place, decades, round_ticks
from outliermerge.analysis.table import BINS, HALF_WIDTH, TensorStats
from outliermerge.errors import OutlierMergeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 300
_MAX_COLUMNS = 6
_MAX_LINES = 7
_FILL, _POINTS = "#a9c4dd", "#0b62a3"
_FIT, _LIMITS = Line("#c2410c"), {2: Line("#71767b", "--", 0.5), 3: Line("#71767b", ":", 0.5)}
_EDGES = np.linspace(-HALF_WIDTH, HALF_WIDTH, BINS + 1)
_Z = np.linspace(-5, 5, 201)
_BELL = np.exp(-(_Z**2) / 2) / np.sqrt(2 * np.pi)


def check_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        OutlierMergeError: matplotlib is not installed.
    """
    require("matplotlib.figure", "a figure")


def draw_figures(subjects: Sequence[Shown], folder: Path) -> list[Path]:
    """Write figures of each subject's layers: densities, QQ plots, σ against depth, heat maps.

    Grids have types of module as rows and evenly sampled layers as columns. Only matrices are
    drawn. Files are named after the figure, the model and its part.

    Returns:
        The paths of the files.

    Raises:
        OutlierMergeError: matplotlib is not installed, or a file cannot be written.
    """
    check_matplotlib()
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            for part, cells in _parts(subject).items():
                figures: dict[str, Figure] = {
                    "density": _grid(cells, _draw_density, "weight"),
                    "density_log": _grid(cells, _draw_log_density, "weight"),
                    "qq": _grid(
                        cells, _draw_qq, "Gaussian quantile, σ, against that of the weights"
                    ),
                    "sigma_by_depth": _depth(cells),
                    "heatmap_sigma": _heat(cells, "std"),
                    "heatmap_kurtosis": _heat(cells, "kurtosis"),
                    "heatmap_outliers": _heat(cells, "outside_3_ratio"),
                }
                for kind, figure in figures.items():
                    path = _free_path(folder, f"{kind}_{_file_name(subject, part)}", written)
                    with warnings.catch_warnings():
                        # Of names with letters that the font lacks, and of very long names.
                        warnings.simplefilter("ignore", UserWarning)
                        figure.savefig(path, dpi=DPI, pil_kwargs={"compress_level": 3})
                    written.append(path)
    except OSError as error:
        raise OutlierMergeError(f"{folder}: cannot be written: {error}") from error
    return written


def _free_path(folder: Path, stem: str, written: Sequence[Path]) -> Path:
    """Return a path that no other figure has: different names may become the same file name."""
    names = (f"{stem}_{number}" if number > 1 else stem for number in count(1))
    return next(path for name in names if (path := folder / f"{name}.png") not in written)


def _file_name(subject: Shown, part: str) -> str:
    kind = "W" if subject.stats.base is None else "delta"
    words = re.findall(r"[\w-]+", f"{subject.title} {part}", re.ASCII)
    return "_".join([kind, *words]) or kind


class _Cells:
    """A part's matrices by type of module and layer."""

    def __init__(self, placed: Sequence[tuple[Spot, TensorStats]]) -> None:
        self.modules = list(dict.fromkeys(spot.label for spot, _ in placed))
        layers = {spot.depth: spot.layer for spot, _ in placed if spot.depth is not None}
        self.depths = sorted(layers)
        self.layers = [layers[depth] for depth in self.depths]
        self._tensors: dict[tuple[str, int | None], list[TensorStats]] = {}
        for spot, tensor in placed:
            self._tensors.setdefault((spot.label, spot.depth), []).append(tensor)

    def first(self, module: str, depth: int) -> TensorStats | None:
        """Return the tensor of a cell; the first one if there are several experts."""
        return next(iter(self._tensors.get((module, depth), ())), None)

    def mean(self, module: str, depth: int, column: str) -> float:
        """Return the mean of a column over a cell's tensors, NaN if there are none."""
        values = [getattr(each, column) for each in self._tensors.get((module, depth), ())]
        scale = 100 if column.endswith("_ratio") else 1
        return scale * fmean(values) if values else float("nan")


def _parts(subject: Shown) -> dict[str, _Cells]:
    matrices = subject.stats.matrices
    spots = find_spots([tensor.name for tensor in matrices])
    placed: dict[str, list[tuple[Spot, TensorStats]]] = {}
    for tensor in matrices:
        spot = spots[tensor.name]
        if spot.depth is not None:
            placed.setdefault(spot.part, []).append((spot, tensor))
    return {part: _Cells(found) for part, found in placed.items()}


def _sampled(depths: Sequence[int]) -> list[int]:
    """Return evenly spaced depths, with the first and the last."""
    num = min(_MAX_COLUMNS, len(depths))
    return [depths[round(place)] for place in np.linspace(0, len(depths) - 1, num)]


def _grid(cells: _Cells, draw: Callable[[Grid, int, int, TensorStats], None], label: str) -> Figure:
    depths = _sampled(cells.depths)
    names = [cells.layers[cells.depths.index(depth)] for depth in depths]
    grid = Grid(cells.modules, names, label)
    for row, module in enumerate(cells.modules):
        for column, depth in enumerate(depths):
            tensor = cells.first(module, depth)
            if tensor is not None and tensor.histogram is not None:
                draw(grid, row, column, tensor)
    return grid.figure()


def densities(tensor: TensorStats) -> tuple[Any, Any]:
    """Return bin edges in σ and densities per σ; for few elements, bins are joined."""
    assert tensor.histogram is not None
    num = tensor.num_elements - tensor.num_non_finite
    # Freedman and Diaconis (1981): for a Gaussian, bins of 2.7σ / N^(1/3).
    wanted = 2.7 * num ** (-1 / 3) * BINS / (2 * HALF_WIDTH)
    joined = 2 ** int(np.clip(np.round(np.log2(wanted)), 1, 5))
    counts = np.asarray(tensor.histogram.counts, np.float64).reshape(-1, joined).sum(1)
    edges = _EDGES[::joined]
    return edges, counts / (num * (edges[1] - edges[0]))


def _draw_density(grid: Grid, row: int, column: int, tensor: TensorStats) -> None:
    edges, density = densities(tensor)
    peak = max(density.max(), _BELL.max()) / tensor.std
    place = grid.place(row, column, _ends(tensor, 5), (0, 1.05 * peak))
    _draw_histogram(grid, place, tensor, edges, density)
    grid.draw_axes(place, round_ticks(*place.x), [])


def _draw_log_density(grid: Grid, row: int, column: int, tensor: TensorStats) -> None:
    edges, density = densities(tensor)
    filled = np.flatnonzero(density)
    reach = max(4.2, -edges[filled[0]], edges[filled[-1] + 1])
    ends = density[filled].min() / 2 / tensor.std, 2 * density.max() / tensor.std
    place = grid.place(row, column, _ends(tensor, reach), ends, is_log=True)
    _draw_histogram(grid, place, tensor, edges, np.maximum(density, ends[0] * tensor.std))
    grid.draw_axes(place, round_ticks(*place.x), decades(*place.y, 4))


def _ends(tensor: TensorStats, sigmas: float) -> tuple[float, float]:
    return tensor.mean - sigmas * tensor.std, tensor.mean + sigmas * tensor.std


def _draw_histogram(grid: Grid, place: Place, tensor: TensorStats, edges: Any, shares: Any) -> None:
    at, scale = tensor.mean, tensor.std
    grid.draw_area(place, at + scale * edges, shares / scale, _FILL)
    grid.draw_line(place, at + scale * _Z, _BELL / scale, _FIT)
    for sigmas, line in _LIMITS.items():
        for sign in (-1, 1):
            x = at + sign * sigmas * scale
            grid.draw_line(place, np.array([x, x]), np.array(place.y), line)


def _draw_qq(grid: Grid, row: int, column: int, tensor: TensorStats) -> None:
    gaussian, own = quantile_pairs(tensor)
    reach = max(4.8, *map(abs, own)) if own else 4.8
    place = grid.place(row, column, (-4.8, 4.8), (-reach, reach))
    grid.draw_line(place, np.array([-4.8, 4.8]), np.array([-4.8, 4.8]), _FIT)
    if own:
        grid.draw_points(place, gaussian, own, _POINTS)
    grid.draw_axes(place, [-4, -2, 0, 2, 4], round_ticks(-reach, reach))


def quantile_pairs(tensor: TensorStats) -> tuple[list[float], list[float]]:
    """Return Gaussian quantiles and the tensor's own, both in σ from the mean.

    The tensor's quantiles are interpolated in its histogram; there are none beyond its outermost
    elements.
    """
    assert tensor.histogram is not None
    counts = np.asarray(tensor.histogram.counts, np.float64)
    num = tensor.num_elements - tensor.num_non_finite
    ranks = tensor.histogram.num_below + np.concatenate([[0.0], np.cumsum(counts)])
    gaussian, own = [], []
    for quantile in np.arange(-4.5, 4.501, 0.125):
        rank = NormalDist().cdf(quantile) * num
        if 1 <= rank <= num - 1 and ranks[0] <= rank <= ranks[-1]:
            last = int(np.searchsorted(ranks, rank)) or 1
            share = (rank - ranks[last - 1]) / (ranks[last] - ranks[last - 1])
            gaussian.append(float(quantile))
            own.append(float(_EDGES[last - 1] + share * (_EDGES[last] - _EDGES[last - 1])))
    return gaussian, own


def _depth(cells: _Cells) -> Figure:
    """Return a figure of σ against depth, with a plot for every seven types of module."""
    from matplotlib.figure import Figure

    num = -(-len(cells.modules) // _MAX_LINES)
    figure = Figure(figsize=(5.6, 2.4 * num + 0.4), layout="constrained")
    panels = figure.subplots(num, 1, squeeze=False, sharex=True)[:, 0]
    for number, axes in enumerate(panels):
        for module in cells.modules[number * _MAX_LINES :][:_MAX_LINES]:
            sigmas = [cells.mean(module, depth, "std") for depth in cells.depths]
            axes.plot(cells.depths, sigmas, marker="o", markersize=2.5, linewidth=0.9, label=module)
        # From 0, or differences of a few percent would look like cliffs.
        axes.margins(y=0.1)
        axes.set_ylim(0, None)
        axes.set_ylabel("σ")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6, frameon=False)
    _name_layers(panels[-1], cells)
    return figure


def _name_layers(axes: Axes, cells: _Cells) -> None:
    step = -(-len(cells.depths) // 16)
    axes.set_xticks(cells.depths[::step], cells.layers[::step])
    axes.set_xlabel("layer")


def _heat(cells: _Cells, column: str) -> Figure:
    from matplotlib.figure import Figure

    values = [[cells.mean(module, depth, column) for depth in cells.depths]
              for module in cells.modules]  # fmt: skip
    width = min(8.0, 2.6 + 0.22 * len(cells.depths))
    figure = Figure(figsize=(width, 1.0 + 0.24 * len(cells.modules)), layout="constrained")
    axes = figure.subplots()
    ends = (-0.5, len(cells.depths) - 0.5, len(cells.modules) - 0.5, -0.5)
    low, high = colour_range([value for row in values for value in row], column)
    image = axes.imshow(values, aspect="auto", cmap="viridis", extent=ends, vmin=low, vmax=high)
    axes.set_yticks(range(len(cells.modules)), cells.modules)
    step = -(-len(cells.depths) // 16)
    axes.set_xticks(range(0, len(cells.depths), step), cells.layers[::step])
    axes.set_xlabel("layer", fontsize=7)
    axes.tick_params(labelsize=6, length=2)
    bar = figure.colorbar(image, pad=0.02)
    bar.set_label(STATISTICS[column], fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return figure
