"""The figures for papers, against the elements that they show."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from outliermerge.analysis.report.data import LEAST_SHARE, Shown, colour_range
from outliermerge.analysis.report.figures import densities, draw_figures, quantile_pairs
from outliermerge.analysis.report.grid import Grid, Line, decades, round_ticks
from outliermerge.analysis.stats import stats_of_tensor
from outliermerge.analysis.table import WeightStats
from outliermerge.errors import OutlierMergeError

KINDS = {"density", "density_log", "qq", "sigma_by_depth", "heatmap_sigma", "heatmap_kurtosis",
         "heatmap_outliers"}  # fmt: skip


def subject(tensors, *, base=None):
    found = tuple(stats_of_tensor(values, name=name) for name, values in tensors.items())
    return Shown("org/my model", "model", WeightStats("m", base, 3.0, 1e-3, found))


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_each_part_has_its_figures_at_300_dpi(tmp_path):
    tensors = {f"text.layers.{n}.up.weight": gaussian(32, 32, seed=n) for n in range(2)}
    tensors |= {f"vision.blocks.{n}.attn.q.weight": gaussian(16, 16, seed=n) for n in range(2)}
    tensors |= {"text.layers.0.norm.weight": gaussian(32), "head.weight": gaussian(8, 8)}
    paths = draw_figures([subject(tensors, base="b")], tmp_path / "new" / "folder")
    parts = ("text_layers", "vision_blocks")
    assert {path.name for path in paths} == {
        f"{kind}_delta_org_my_model_{part}.png" for kind in KINDS for part in parts
    }
    for path in paths:
        with Image.open(path) as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            # Neither blank nor without colour.
            assert np.asarray(image.convert("HSV"))[..., 1].max() > 100


def test_constant_and_absent_matrices_leave_their_places_empty(tmp_path):
    tensors = {
        "layers.0.up.weight": torch.ones(8, 8),
        "layers.1.up.weight": gaussian(8, 8),
        "layers.1.gate.weight": gaussian(8, 8),
    }
    assert len(draw_figures([subject(tensors)], tmp_path)) == len(KINDS)


def test_models_whose_names_differ_in_signs_alone_have_figures_each(tmp_path):
    tensors = {"layers.0.up.weight": gaussian(8, 8)}
    pair = [replace(subject(tensors), title=title) for title in ("p.1", "p 1")]
    assert len(set(draw_figures(pair, tmp_path))) == 2 * len(KINDS)
    assert len(list(tmp_path.iterdir())) == 2 * len(KINDS)


def test_model_without_layers_has_no_figures(tmp_path):
    assert draw_figures([subject({"w": gaussian(8, 8)})], tmp_path) == []


@pytest.mark.parametrize("num", [1, 7, 8, 15])
def test_figure_of_depth_has_at_most_seven_lines_a_plot_and_starts_at_0(tmp_path, num, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *_, **__: figures.append(self)
    )
    draw_figures(
        [subject({f"layers.{n}.m{m}.weight": gaussian(8, 8) for n in (0, 1) for m in range(num)})],
        tmp_path,
    )
    (plots,) = [figure.axes for figure in figures if "σ" == figure.axes[0].get_ylabel()]
    lines = [line for plot in plots for line in plot.get_lines()]
    assert len(lines) == num and all(len(plot.get_lines()) <= 7 for plot in plots)
    assert all(plot.get_ylim()[0] == 0 for plot in plots)


@pytest.mark.parametrize(
    ("values", "column", "span"),
    [
        ([0.0198, 0.0202], "std", LEAST_SHARE * 0.0202),
        ([0.01, 0.02], "std", 0.01),
        ([-0.03, 0.02], "skewness", 1.0),
        ([-3.0, 2.0], "skewness", 5.0),
        ([3.0, float("nan")], "kurtosis", LEAST_SHARE * 3),
        ([float("nan")], "kurtosis", 0.0),
        ([], "kurtosis", 0.0),
    ],
)
def test_colours_do_not_make_small_differences_large(values, column, span):
    low, high = colour_range(values, column)
    assert high - low == pytest.approx(span)
    assert all(low <= value <= high for value in values if value == value)


@pytest.mark.parametrize("scale", [1e-9, 0.003, 1.0, 7e8])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.2, 9.7), (-8.3, -1.1)])
def test_ticks_are_round_and_inside_and_two_to_five(low, high, scale):
    ticks = round_ticks(low * scale, high * scale)
    assert 2 <= len(ticks) <= 5 and low * scale <= ticks[0] < ticks[-1] <= high * scale
    assert all(len(f"{tick:.12g}".strip("-0.").partition("e")[0]) <= 2 for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.4, 90.0), (1e-7, 3.0), (1e-300, 1e300)])
def test_decades_are_inside_and_few(low, high):
    found = decades(low, high, 4)
    assert 1 <= len(found) <= 4 and low <= found[0] and found[-1] <= high


def test_nothing_is_drawn_outside_its_plot():
    grid = Grid(["a", "b"], ["0", "1"], "weight")
    place = grid.place(1, 1, (-1.0, 1.0), (0.1, 10.0), is_log=True)
    x = np.linspace(-3, 3, 50)
    grid.draw_line(place, x, 10**x, Line("red"))
    grid.draw_area(place, x, np.full(49, 99.0), "blue")
    axes = grid.figure().axes[0]
    for drawn in axes.collections:
        for path in drawn.get_paths():
            inside = path.vertices[np.isfinite(path.vertices).all(1)]
            corner = np.array([place.left, place.bottom])
            assert (inside >= corner - 1e-9).all()
            assert (inside <= corner + place.at(1.0, 10.0) - place.at(-1.0, 0.1) + 1e-9).all()


@pytest.mark.parametrize("num", [64, 4096])
def test_densities_are_shares_of_elements_by_width(num):
    values = gaussian(8, num // 8)
    values[0, 0] = 30.0
    edges, found = densities(stats_of_tensor(values, name="w"))
    scaled = values.double().numpy()
    scaled = (scaled - scaled.mean()) / scaled.std()
    counts, _ = np.histogram(scaled, edges)
    assert found == pytest.approx(counts / (num * np.diff(edges)), abs=1e-12)
    assert (found * np.diff(edges)).sum() == pytest.approx((num - (num < 65 or 1)) / num, abs=0.02)


def test_quantiles_are_those_of_the_elements_to_a_bin():
    values = gaussian(64, 64) ** 3
    gaussian_quantiles, own = quantile_pairs(stats_of_tensor(values, name="w"))
    scaled = np.sort(values.double().numpy().ravel())
    scaled = (scaled - scaled.mean()) / scaled.std()
    ranks = torch.special.ndtr(torch.tensor(gaussian_quantiles).double()).numpy() * len(scaled)
    assert own == pytest.approx(scaled[np.ceil(ranks).astype(int) - 1], abs=1 / 32)


def test_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutlierMergeError, match=r"pip install matplotlib"):
        draw_figures([subject({"w": gaussian(8, 8)})], tmp_path)


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutlierMergeError, match="file/png: cannot be written"):
        draw_figures([subject({"w": gaussian(8, 8)})], tmp_path / "file" / "png")
