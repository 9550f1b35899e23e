"""A table as a bar chart."""

from __future__ import annotations

import io
import math
import textwrap
from collections import Counter
from pathlib import Path

from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.cells import AVG, Table
from outliermerge.output.replaceable import GENERATOR
from outliermerge.storage.files import write_whole

# Okabe and Ito, "Color Universal Design" (2008), without black: safe for colour-blind readers.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def draw(table: Table, path: Path) -> None:
    """Write a PNG: a group of bars for each task and avg, a bar with ± 1 SE for each row.

    Raises:
        OutlierMergeError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        # The object interface: pyplot would choose a backend and keep every figure.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutlierMergeError("a chart needs matplotlib: pip install matplotlib") from error
    columns = [*table.titles, *([AVG] if table.averaged else [])]
    bar = 0.84 / len(table.rows)
    # 0.13 inch is the narrowest bar whose error bar can still be read.
    width = max(7.0, len(columns) * max(1.0, 0.13 / bar) + 1.0)
    # A letter of the legend is about 0.08 inch wide.
    num_legend_columns = int(width / (0.08 * max(len(row.name) for row in table.rows) + 0.5))
    figure = Figure(figsize=(width, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    # avg is set apart from the tasks whose mean it is.
    places = [place + 0.25 * (column == AVG) for place, column in enumerate(columns)]
    for number, (row, (colour, hatch)) in enumerate(zip(table.rows, _looks(table), strict=True)):
        shift = (number - (len(table.rows) - 1) / 2) * bar
        cells = [row.cell(column) for column in columns]
        axes.bar(
            [place + shift for place in places],
            [_known(cell.value) for cell in cells],
            bar,
            yerr=[_known(cell.stderr) for cell in cells],
            error_kw={"ecolor": "black", "elinewidth": 0.8, "capsize": 1.5},
            label=row.name,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.6,
        )
        for place, cell in zip(places, cells, strict=True):
            if cell.failure is not None:
                axes.text(place + shift, 0, "  failed", rotation=90, ha="center", fontsize=6)
    axes.set_xticks(places, [textwrap.fill(table.heading(column), 11) for column in columns])
    axes.set_xlim(places[0] - 0.5, places[-1] + 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("score")
    axes.set_title(table.suite)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="outside lower center",
        ncols=min(max(num_legend_columns, 1), 4),
        frameon=False,
        fontsize=8,
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": GENERATOR})
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise OutlierMergeError(f"{path}: cannot be written: {error.strerror}") from error


def _known(number: float | None) -> float:
    return math.nan if number is None else number  # matplotlib draws nothing for NaN


def _looks(table: Table) -> list[tuple[str, str]]:
    """Return each row's colour and hatch: parents grey, merges coloured, the paper's hatched."""
    counts = Counter(row.group for row in table.rows)
    seen: Counter[str] = Counter()
    looks = []
    for row in table.rows:
        number = seen[row.group]
        seen[row.group] += 1
        if row.group == "merged":
            looks.append((_PALETTE[number % len(_PALETTE)], "" if number < len(_PALETTE) else "//"))
        else:
            level = 0.82 - 0.37 * number / max(1, counts[row.group] - 1)
            looks.append((f"{level:.2f}", "" if row.group == "parent" else "///"))
    return looks
