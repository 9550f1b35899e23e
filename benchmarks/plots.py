"""Time and memory against size, and time against the number of models, drawn as PNGs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from report import Report, values

# Okabe and Ito, "Color Universal Design" (2008): told apart by colour-blind readers.
COLOURS = {
    "linear": "#0072B2",
    "task_arithmetic": "#E69F00",
    "min_sigma": "#009E73",
    "ties": "#CC79A7",
}
TOOLS = {"outliermerge": ("-", "o"), "mergekit": ("--", "s")}


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw every plot whose figures are there; return the files."""
    sizes = report.sizes()
    billions = [report.billions(size) for size in sizes]
    counts = [2, 3, 5, 8]

    def by_size(method: str) -> list[Any]:
        return [report.find(method, size) for size in sizes]

    def by_count(method: str) -> list[Any]:
        return [report.find(method, "0.5B", count) for count in counts]

    return [
        path
        for path in (
            _plot(
                folder / "time_by_size.png", billions, by_size, "wall_seconds",
                "parameters of a model (billions)", "whole process (s)", logarithmic=True,
            ),
            _plot(
                folder / "memory_by_size.png", billions, by_size, "peak_anonymous_megabytes",
                "parameters of a model (billions)", "peak memory (MB)", logarithmic=True,
            ),
            _plot(
                folder / "time_by_models.png", counts, by_count, "wall_seconds",
                "task models of 0.5 billion parameters", "whole process (s)", logarithmic=False,
            ),
        )
        if path is not None
    ]  # fmt: skip


def _plot(
    path: Path,
    xs: Sequence[float],
    cases: Callable[[str], list[Any]],
    key: str,
    x_label: str,
    y_label: str,
    *,
    logarithmic: bool,
) -> Path | None:
    """Draw medians, with bars from the least to the largest run."""
    # 1400 pixels wide, of which a page shows every second.
    figure = Figure(figsize=(7, 4.4), dpi=200, layout="constrained", facecolor="white")
    axes: Axes = figure.add_subplot()
    drawn = False
    for tool, (style, marker) in TOOLS.items():
        for method, colour in COLOURS.items():
            points = [
                (x, statistics.median(values(case, tool, key)), values(case, tool, key))
                for x, case in zip(xs, cases(method), strict=True)
                if values(case, tool, key)
            ]
            if len(points) < 2:
                continue
            drawn = True
            axes.errorbar(
                [x for x, _, _ in points],
                [middle for _, middle, _ in points],
                yerr=[
                    [middle - min(runs) for _, middle, runs in points],
                    [max(runs) - middle for _, middle, runs in points],
                ],
                linestyle=style,
                marker=marker,
                markersize=5,
                capsize=2,
                color=colour,
                label=f"{method}, {tool}",
            )
    if not drawn:
        return None
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(xs, [f"{x:.2g}" for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.savefig(path)
    return path
