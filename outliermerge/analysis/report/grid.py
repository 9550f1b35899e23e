"""A grid of small plots, drawn on one pair of axes.

Matplotlib makes ticks, labels and spines anew for each pair of axes, which takes most of the time
of a grid of 42 plots. So a grid is one pair of axes, in inches, that the plots are drawn on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 1.28, 0.89  # of one plot, in inches
_GAP_X, _GAP_Y = 0.32, 0.36
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.6, 0.1, 0.25, 0.4
_TICK = 0.028
_INK = "black"


@dataclass(frozen=True)
class Line:
    """How a line is drawn."""

    colour: str
    style: str = "-"
    width: float = 0.7


@dataclass(frozen=True)
class Place:
    """Where a plot of a grid is, and what its axes show.

    Attributes:
        left, bottom: its corner, in inches.
        x, y: the ends of its axes.
        is_log: whether y is logarithmic.
    """

    left: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]
    is_log: bool = False

    def at(self, x: Any, y: Any) -> Any:
        """Return points in inches, (N, 2)."""
        low, high = self.y
        if self.is_log:
            y, low, high = np.log10(y), math.log10(low), math.log10(high)
        across = self.left + _WIDTH * (np.asarray(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = self.bottom + _HEIGHT * (np.asarray(y) - low) / (high - low)
        return np.stack(np.broadcast_arrays(across, up), -1)

    def holds(self, x: Any, y: Any) -> Any:
        """Tell which points are inside the plot."""
        return (self.x[0] <= x) & (x <= self.x[1]) & (self.y[0] <= y) & (y <= self.y[1])


@dataclass
class Grid:
    """Collects what the plots of a grid show, and draws it all at once.

    Attributes:
        rows, columns: the names of modules and of layers.
        label: what the horizontal axes show.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    label: str
    _lines: dict[Line, list[Any]] = field(default_factory=dict)
    _areas: dict[str, list[Any]] = field(default_factory=dict)
    _points: dict[str, list[Any]] = field(default_factory=dict)
    _texts: list[tuple[float, float, str, dict[str, Any]]] = field(default_factory=list)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the figure, in inches."""
        across, down = len(self.columns), len(self.rows)
        return (
            _LEFT + across * _WIDTH + (across - 1) * _GAP_X + _RIGHT,
            _TOP + down * _HEIGHT + (down - 1) * _GAP_Y + _BOTTOM,
        )

    def place(
        self,
        row: int,
        column: int,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        is_log: bool = False,
    ) -> Place:
        """Return the place of a plot whose axes have these ends."""
        left = _LEFT + column * (_WIDTH + _GAP_X)
        bottom = self.size[1] - _TOP - _HEIGHT - row * (_HEIGHT + _GAP_Y)
        return Place(left, bottom, x, y, is_log)

    def draw_line(self, place: Place, x: Any, y: Any, line: Line) -> None:
        """Draw a line, where it is inside the plot."""
        points = place.at(x, np.where(place.holds(x, y), y, np.nan))
        self._lines.setdefault(line, []).append(points)

    def draw_area(self, place: Place, edges: Any, heights: Any, colour: str) -> None:
        """Fill the stairs of a histogram, where they are inside the plot."""
        low, high = place.y
        x = np.clip(np.repeat(edges, 2), *place.x)
        y = np.clip(np.concatenate([[low], np.repeat(heights, 2), [low]]), low, high)
        self._areas.setdefault(colour, []).append(place.at(x, y))

    def draw_points(self, place: Place, x: Any, y: Any, colour: str) -> None:
        """Draw dots."""
        self._points.setdefault(colour, []).append(place.at(x, y))

    def draw_axes(self, place: Place, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        """Draw the left and the lower axis with these ticks."""
        left, bottom = place.left, place.bottom
        axis, tick = Line(_INK, width=0.5), Line(_INK, width=0.4)
        corner = [(left, bottom + _HEIGHT), (left, bottom), (left + _WIDTH, bottom)]
        self._lines.setdefault(axis, []).append(np.array(corner))
        marks = self._lines.setdefault(tick, [])
        for value in x_ticks:
            across = place.at(value, place.y[0])[0]
            marks.append(np.array([(across, bottom), (across, bottom - _TICK)]))
            self._write(across, bottom - 0.05, number(value), 5, ha="center", va="top")
        for value in y_ticks:
            up = place.at(place.x[0], value)[1]
            marks.append(np.array([(left, up), (left - _TICK, up)]))
            self._write(left - 0.045, up, number(value), 5, ha="right", va="center")

    def figure(self) -> Figure:
        """Return the figure with all that was drawn."""
        from matplotlib.collections import LineCollection, PolyCollection
        from matplotlib.figure import Figure

        width, height = self.size
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(0, height)
        for colour, areas in self._areas.items():
            axes.add_collection(PolyCollection(areas, facecolor=colour), autolim=False)
        for line, paths in self._lines.items():
            drawn = LineCollection(
                paths, colors=line.colour, linestyles=line.style, linewidths=line.width
            )
            axes.add_collection(drawn, autolim=False)
        for colour, points in self._points.items():
            axes.plot(*np.concatenate(points).T, ".", color=colour, markersize=1.5)
        self._name_rows_and_columns()
        for across, up, text, how in self._texts:
            axes.text(across, up, text, **how)
        return figure

    def _name_rows_and_columns(self) -> None:
        width, height = self.size
        for column, name in enumerate(self.columns):
            across = _LEFT + column * (_WIDTH + _GAP_X) + _WIDTH / 2
            self._write(across, height - _TOP + 0.05, f"layer {name}", 7, ha="center", va="bottom")
        for row, name in enumerate(self.rows):
            up = height - _TOP - row * (_HEIGHT + _GAP_Y) - _HEIGHT / 2
            turned = {"rotation": 90, "ha": "right", "va": "center", "multialignment": "center"}
            self._write(_LEFT - 0.28, up, _broken(name), 6, **turned)
        self._write(width / 2, 0.05, self.label, 7, ha="center", va="bottom")

    def _write(self, across: float, up: float, text: str, size: float, **how: Any) -> None:
        # A name is not mathematics, whatever signs it has.
        self._texts.append((across, up, text, {"fontsize": size, "parse_math": False, **how}))


def _broken(module: str) -> str:
    """Return a name in two lines, with its first words on the first."""
    return "\n".join(filter(None, module.rpartition(".")[::2]))


def number(value: float) -> str:
    """Return a tick's label.

    >>> number(-0.05), number(2.0), number(1e-05)
    ('−0.05', '2', '1e−5')
    """
    return f"{value:.6g}".replace("e-0", "e-").replace("-", "−")


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers between two ends, as many as are allowed, and at least two.

    >>> round_ticks(-0.11, 0.12)
    [-0.1, -0.05, 0.0, 0.05, 0.1]
    """
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (unit, 2 * unit, 5 * unit, 10 * unit):
        places = range(math.ceil(low / step), math.floor(high / step) + 1)
        if len(places) <= most:
            break
    return [float(f"{place * step:.12g}") for place in places]


def decades(low: float, high: float, num: int) -> list[float]:
    """Return powers of ten between two ends, at most as many as asked for.

    >>> decades(0.004, 30.0, 3)
    [0.01, 1.0]
    """
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, -(-(last - first + 1) // num))
    return [10.0**power for power in range(first, last + 1, step)]
