"""The figures for papers, against the elements that they show."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from outliermerge.analysis.report.data import Shown
from outliermerge.analysis.report.figures import densities, draw_figures, quantile_pairs
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
    with pytest.raises(OutlierMergeError, match=r"pip install 'outliermerge\[weights\]'"):
        draw_figures([subject({"w": gaussian(8, 8)})], tmp_path)


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutlierMergeError, match="file/png: cannot be written"):
        draw_figures([subject({"w": gaussian(8, 8)})], tmp_path / "file" / "png")
