"""The simulation of section C.6, and the labels of shapes against the paper's names for them."""

from __future__ import annotations

import json
import math
import re
import sys
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats
import torch

from outliermerge.analysis.labels import LABELS, label_of
from outliermerge.analysis.simulate import (
    NOISES,
    PAPER_LABELS,
    _noisy,
    _optimal_weights,
    draw,
    simulate,
)
from outliermerge.analysis.stats import stats_of_tensor
from outliermerge.analysis.table import Histogram
from outliermerge.errors import ArgumentError, OutlierMergeError

EVEN = (np.arange(200_000) + 0.5) / 200_000


def label(values, **options):
    return stats_of_tensor(torch.from_numpy(np.asarray(values)), name="x", **options).label


@pytest.fixture(scope="module")
def simulation():
    return simulate(num_points=200_000)


# The labels


@pytest.mark.parametrize("seed", range(5))
def test_every_noise_has_the_papers_label_whatever_the_seed(seed):
    found = simulate(seed=seed, num_points=50_000).weights
    assert {each.noise: each.stats.label for each in found[1:]} == PAPER_LABELS


@pytest.mark.parametrize("num_points", [5_000, 500_000])
def test_every_noise_has_the_papers_label_whatever_the_number_of_points(num_points):
    found = simulate(num_points=num_points).weights
    assert {each.noise: each.stats.label for each in found[1:]} == PAPER_LABELS


def test_the_limits_are_where_the_docstring_says_the_simulation_puts_them():
    """The recipe once more, in plain numpy, and the two figures without a histogram."""
    rows = {
        name: [float(word) for word in re.findall(r"\d+\.\d+", line)]
        for name in ("noise", "width", "kurtosis")
        for line in (label_of.__doc__ or "").splitlines()
        if line.split()[:1] == [name] and line.startswith(" " * 8)
    }
    assert rows["noise"] == list(NOISES)
    generator = np.random.default_rng(7)
    body = generator.normal(0, 0.1, 199_000)
    body[(abs(body) < 0.001) | (abs(body) > 0.5)] = 0
    optimal = np.concatenate([body, generator.uniform(0.6, 1, 1_000), np.zeros(800_000)])
    for noise, width, kurtosis in zip(*rows.values(), strict=True):
        values = optimal + generator.normal(0, noise, 1_000_000)
        lower, upper = np.quantile(values, [0.25, 0.75])
        kept = values[abs(values - values.mean()) <= 3 * values.std()]
        found = (upper - lower) / 2 / NormalDist().inv_cdf(0.75) / values.std()
        # The bins' quartiles are right to a quarter of a bin of σ / 32.
        assert found == pytest.approx(width, rel=0.02, abs=1 / 128)
        assert scipy.stats.kurtosis(kept, fisher=False) == pytest.approx(kurtosis, rel=0.01)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (scipy.stats.norm.ppf(EVEN), "Gaussian"),
        (scipy.stats.logistic.ppf(EVEN), "Gaussian"),
        (scipy.stats.truncnorm.ppf(EVEN, -2, 2), "Gaussian"),
        (scipy.stats.t(5).ppf(EVEN), "sharp"),
        (scipy.stats.laplace.ppf(EVEN), "sharp"),
        (scipy.stats.t(2).ppf(EVEN), "inverted T"),
        (scipy.stats.cauchy.ppf(EVEN), "line"),
        (np.where(EVEN < 0.95, 0.0, scipy.stats.norm.ppf(EVEN)), "line"),
        (EVEN, "other"),
        (np.concatenate([scipy.stats.norm.ppf(EVEN) - 3, scipy.stats.norm.ppf(EVEN) + 3]), "other"),
        (np.round(EVEN * 3), "other"),
        (scipy.stats.expon.ppf(EVEN), "other"),
        (-scipy.stats.lognorm(0.5).ppf(EVEN), "other"),
    ],
    ids=[
        *("Gaussian", "logistic", "cut at 2σ", "Student-t(5)", "Laplace", "Student-t(2)"),
        *("Cauchy", "sparse", "uniform", "bimodal", "four values", "exponential", "-log-normal"),
    ],
)
def test_known_distributions_have_sensible_labels(values, expected):
    assert label(values) == expected
    assert expected in LABELS


@pytest.mark.parametrize("expected", ["Gaussian", "sharp", "other"])
@pytest.mark.parametrize("change", [{"filter": 1.5}, {"small": 10.0}])
def test_a_label_does_not_depend_on_the_options(expected, change):
    laws = {
        "Gaussian": scipy.stats.norm,
        "sharp": scipy.stats.laplace,
        "other": scipy.stats.uniform,
    }
    assert label(laws[expected].ppf(EVEN), **change) == expected


def test_a_label_does_not_depend_on_scale_and_mean():
    values = scipy.stats.laplace.ppf(EVEN)
    assert label(values * 1e-6 + 1e-3) == label(values * 1e6) == "sharp"


def test_a_few_far_outliers_leave_a_gaussian_one():
    values = scipy.stats.norm.ppf(EVEN)
    values[:20] = 100.0
    assert label(values) == "Gaussian"


def test_few_elements_and_constants_have_no_label():
    assert label(scipy.stats.norm.ppf((np.arange(999) + 0.5) / 999)) is None
    assert label(scipy.stats.norm.ppf((np.arange(1_000) + 0.5) / 1_000)) == "Gaussian"
    assert label(np.full(5_000, 0.25)) is None
    assert label_of(None) is None


def test_elements_beyond_the_bins_count_for_the_quartiles():
    """Half of the elements in one bin are a line only while the others are few."""
    counts = [0] * 512
    counts[256] = 600
    assert label_of(Histogram(tuple(counts), 0, 0)) is None
    assert label_of(Histogram(tuple(counts), 200, 200)) == "line"


# The recipe


def test_the_optimal_weights_are_those_of_the_recipe():
    optimal = _optimal_weights(np.random.default_rng(42), 1_000_000)
    body = optimal[(optimal != 0) & (optimal < 0.55)]
    outliers = optimal[optimal > 0.55]
    assert len(optimal) == 1_000_000
    assert len(outliers) == 1_000
    assert outliers.min() >= 0.6
    assert outliers.max() <= 1.0
    assert outliers.mean() == pytest.approx(0.8, abs=4 * 0.4 / math.sqrt(12 * 1_000))
    assert abs(body).min() >= 0.001
    assert abs(body).max() <= 0.5
    # Of 199,000 those within 0.01 σ of zero are set to zero, and those beyond 5 σ.
    dropped = 2 * (NormalDist().cdf(0.01) - 0.5) + 2 * NormalDist().cdf(-5)
    spread = math.sqrt(199_000 * dropped * (1 - dropped))
    assert len(body) == pytest.approx(199_000 * (1 - dropped), abs=4 * spread)
    assert body.std() == pytest.approx(0.1 / math.sqrt(1 - dropped), rel=0.01)
    assert abs(body.mean()) < 4 * 0.1 / math.sqrt(len(body))


def test_the_places_of_the_optimal_weights_are_random():
    optimal = _optimal_weights(np.random.default_rng(42), 1_000_000)
    for chosen in (optimal != 0, optimal > 0.55):
        tenths = chosen.reshape(10, -1).sum(1)
        assert scipy.stats.chisquare(tenths).pvalue > 1e-4


def test_noise_is_gaussian_of_the_given_size_and_drawn_anew_for_each():
    generator = np.random.default_rng(42)
    optimal = _optimal_weights(generator, 200_000)
    (zero, first), *noisy = _noisy(generator, optimal, [0.01, 0.3])
    assert zero == 0
    assert (first == optimal).all()
    added = [(values - optimal) / noise for noise, values in noisy]
    for standard in added:
        assert scipy.stats.kstest(standard, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(*added)[0, 1]) < 4 / math.sqrt(200_000)


def test_the_simulation_counts_its_points(simulation):
    assert (simulation.seed, simulation.num_points, simulation.num_outliers) == (42, 200_000, 200)
    optimal, *noisy = simulation.weights
    assert (optimal.noise, optimal.expected, optimal.stats.name) == (0.0, None, "W*")
    assert optimal.stats.zero_ratio == 1 - simulation.num_non_zero / 200_000
    assert 0.196 < simulation.num_non_zero / 200_000 < 0.2
    assert [each.noise for each in noisy] == list(NOISES)
    assert [each.expected for each in noisy] == list(PAPER_LABELS.values())
    for each in noisy:
        expected = math.hypot(optimal.stats.std, each.noise)
        assert each.stats.std == pytest.approx(expected, rel=0.01)
        assert each.stats.num_elements == 200_000


def test_a_seed_gives_the_same_points_and_another_gives_others():
    first, again, other = (
        simulate(seed=seed, num_points=2_000, noises=[0.01]) for seed in (5, 5, 6)
    )
    assert first == again
    assert first.weights[1].stats.mean != other.weights[1].stats.mean


def test_the_simulation_is_json_and_tells_its_progress():
    told, done = [], []
    simulation = simulate(
        num_points=2_000, noises=[0.01, 0.07], on_total=told.append, on_progress=done.append
    )
    assert done == [16_000] * 3 and told == [48_000]
    table = json.loads(json.dumps(simulation.as_dict(), allow_nan=False))
    assert [row["noise"] for row in table["weights"]] == [0.0, 0.01, 0.07]
    assert [row["expected"] for row in table["weights"]] == [None, "inverted T", None]
    assert table["weights"][2]["kurtosis"] == simulation.weights[2].stats.kurtosis


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 999}, "num_points: found 999, expected 1,000 or more"),
        ({"noises": [0.1, 0.0]}, "noises: found 0.0, expected a standard deviation above 0"),
        ({"noises": [math.nan]}, "noises: found nan"),
        ({"seed": -1}, "seed: found -1, expected 0 or more"),
    ],
)
def test_arguments_out_of_range_are_told(options, message):
    with pytest.raises(ArgumentError, match=message):
        simulate(**options)


# The figure


def test_the_figure_has_a_filled_panel_for_each(simulation, tmp_path):
    import matplotlib.image

    draw(simulation, tmp_path / "figure.png")
    pixels = matplotlib.image.imread(tmp_path / "figure.png")[..., :3]
    blue = np.abs(pixels - [0, 0x72 / 255, 0xB2 / 255]).max(-1) < 0.01
    height, width = (side // 3 for side in blue.shape)
    shares = [
        blue[row * height : (row + 1) * height, column * width : (column + 1) * width].mean()
        for row in range(3)
        for column in range(3)
    ]
    assert 0 < shares[0] < shares[2] < shares[3] < shares[5] < shares[8]
    assert min(shares) > 0.0005


def test_a_figure_of_other_noises_can_be_drawn(tmp_path):
    draw(simulate(num_points=1_000, noises=[0.5, 0.6, 0.7]), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_figure_in_no_folder_is_told(simulation, tmp_path):
    with pytest.raises(OutlierMergeError, match=r"f\.png: cannot be written: there is no folder"):
        draw(simulation, tmp_path / "absent" / "f.png")


def test_a_missing_matplotlib_is_told_with_what_to_install(simulation, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutlierMergeError, match=r"pip install matplotlib"):
        draw(simulation, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []
