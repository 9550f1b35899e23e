"""Spectra of layers against torch's, power laws against planted ones, fingerprints of families."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from checkpoints import fine_tune, save_model, save_tensors

from outliermerge.analysis import spectra_values
from outliermerge.analysis.spectra import layer_spectra
from outliermerge.analysis.spectra_fingerprint import (
    NUM_POINTS,
    LayerStd,
    fingerprint_distance,
    make_fingerprint,
)
from outliermerge.analysis.spectra_fit import FitComparison, fit_power_law
from outliermerge.analysis.spectra_values import cosine_distances
from outliermerge.errors import ArgumentError, OutlierMergeError

UP = "model.layers.{}.mlp.up_proj.weight"


def layers_of(shape, *, num_layers=3, name=UP, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name.format(number): (torch.randn(shape, generator=generator) + 0.1).to(dtype)
        for number in range(num_layers)
    }


def save(folder, tensors):
    return str(save_tensors(folder, tensors))


# Singular values


def test_deviations_are_about_the_mean_however_large_it_is(tmp_path):
    far = {
        name: (tensor.double() - 0.1) * 1e-3 + 1e6
        for name, tensor in layers_of((33, 77), name="layers.{}.q.weight").items()
    }
    constant = {f"layers.{number}.k.weight": torch.full((33, 77), 0.3) for number in range(3)}
    found = layer_spectra(save(tmp_path / "m", far | constant), num_values=2)
    (module,) = found.modules
    assert module.stds == pytest.approx(
        [float(w.std(correction=0)) for w in far.values()], rel=1e-6
    )
    assert sum("all its elements are equal" in note for note in found.notes) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (17, 17), (40, 3), (6, 4, 3, 3)])
def test_singular_values_and_deviations_are_torchs(tmp_path, monkeypatch, shape, dtype):
    monkeypatch.setattr(spectra_values, "_BLOCK_ELEMENTS", 100)  # several blocks, the last shorter
    tensors = layers_of(shape, dtype=dtype)
    (module,) = layer_spectra(save(tmp_path / "m", tensors), num_values=5).modules
    assert module.layers == ("model.layers.0", "model.layers.1", "model.layers.2")
    for tensor, values, std in zip(
        tensors.values(), module.singular_values, module.stds, strict=True
    ):
        expected = torch.linalg.svdvals(tensor.double().flatten(1))[:5]
        assert values == pytest.approx(expected.tolist(), rel=1e-12)
        assert std == pytest.approx(float(tensor.double().std(correction=0)), rel=1e-12)


def test_small_leading_values_lose_no_more_digits_than_is_said(tmp_path):
    true = torch.logspace(0, -5, 16, dtype=torch.float64)
    tensors = {}
    for number, raw in enumerate(layers_of((16, 40), dtype=torch.float64).values()):
        left, _, right = torch.linalg.svd(raw, full_matrices=False)
        tensors[UP.format(number)] = left * true @ right
    (module,) = layer_spectra(save(tmp_path / "m", tensors)).modules
    for values in module.singular_values:
        errors = (torch.tensor(values, dtype=torch.float64) / true - 1).abs()
        assert (errors <= 50 * 1.2e-16 / true**2 + 1e-15).all()


def test_a_low_rank_task_vector_has_as_many_values_as_its_rank(tmp_path):
    base = layers_of((24, 30), dtype=torch.float64)
    deltas = {
        name: torch.outer(tensor[:, 0], tensor[0]) + torch.outer(tensor[:, 1], tensor[1])
        for name, tensor in layers_of((24, 30), dtype=torch.float64, seed=1).items()
    }
    model = save(tmp_path / "model", {name: base[name] + deltas[name] for name in base})
    spectra = layer_spectra(model, base=save(tmp_path / "base", base), num_values=6)
    assert spectra.base == str(tmp_path / "base")
    for delta, values in zip(deltas.values(), spectra.modules[0].singular_values, strict=True):
        expected = torch.linalg.svdvals(delta)[:2].tolist()
        assert values == (pytest.approx(expected[0]), pytest.approx(expected[1]), 0, 0, 0, 0)


def test_layers_are_in_order_of_depth_and_any_number_of_threads_finds_the_same(tmp_path):
    tensors = layers_of((20, 30), num_layers=12)
    folder = save(tmp_path / "m", dict(sorted(tensors.items())))
    before = torch.get_num_threads()
    found = layer_spectra(folder, threads=1)
    (module,) = found.modules
    assert module.layers == tuple(f"model.layers.{number}" for number in range(12))
    assert len(module.distances) == 66
    assert layer_spectra(folder, threads=4) == found
    assert torch.get_num_threads() == before


def test_progress_ends_at_what_was_announced(tmp_path):
    tensors = layers_of((20, 30)) | {"head.weight": torch.ones(5, 5)}
    folder, done = save(tmp_path / "m", tensors), []
    expected = []
    layer_spectra(folder, on_total=expected.append, on_progress=done.append)
    assert sum(done) == sum(expected) == 3 * 20 * 30 * 4


# Distances


def test_distances_are_those_of_each_two_layers():
    rows = np.abs(np.random.default_rng(0).normal(size=(5, 8)))
    expected = [
        1 - a @ b / math.sqrt((a @ a) * (b @ b)) for i, a in enumerate(rows) for b in rows[i + 1 :]
    ]
    assert cosine_distances(rows.tolist()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("angle", [1e-3, 1e-6, 1e-9])
def test_distances_of_nearly_equal_layers_keep_their_digits(angle):
    (distance,) = cosine_distances([(1.0, 0.0), (3 * math.cos(angle), 3 * math.sin(angle))])
    assert distance == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-6)


def test_layers_that_are_multiples_of_each_other_have_no_distance(tmp_path):
    tensor = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    tensors = {UP.format(number): tensor * 2.0**number for number in range(6)}
    spectra = layer_spectra(save(tmp_path / "m", tensors))
    assert max(spectra.modules[0].distances) < 1e-30
    assert spectra.modules[0].stds[1] == pytest.approx(2 * spectra.modules[0].stds[0])


def test_the_fit_of_all_types_is_of_their_distances_together(tmp_path):
    key = "model.layers.{}.self_attn.k_proj.weight"
    tensors = layers_of((20, 30), num_layers=6) | layers_of((8, 30), name=key, num_layers=6)
    spectra = layer_spectra(save(tmp_path / "m", tensors))
    assert [module.fit.num_distances for module in spectra.modules] == [15, 15]
    together = [distance for module in spectra.modules for distance in module.distances]
    assert spectra.fit == fit_power_law(together)
    assert spectra.fit.num_distances == 30
    assert set(spectra.short_names.values()) == {"mlp.up_proj", "self_attn.k_proj"}
    table = json.loads(json.dumps(spectra.as_dict(), allow_nan=False))
    assert table["fit"]["verdict"] == spectra.fit.verdict
    assert len(table["modules"][1]["singular_values"]) == 6
    assert set(table["fingerprint"]["profiles"]) == {"k", "up"}


# What is taken


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (layers_of((4, 4), name="model.layers.{}.short.weight", num_layers=2), "in 2 layer"),
        (layers_of((4, 4), name="model.layers.0.moe.experts.{}.w1.weight"), "several in a layer"),
        (layers_of((3, 4, 5), name="model.layers.{}.experts.up"), "has 3 dimensions"),
    ],
)
def test_what_is_left_out_is_told(tmp_path, others, told):
    spectra = layer_spectra(save(tmp_path / "m", layers_of((9, 9)) | others))
    assert [module.module for module in spectra.modules] == ["model.layers.*.mlp.up_proj"]
    (note,) = spectra.notes
    assert told in note


def test_vectors_and_what_is_outside_layers_are_not_taken(tmp_path):
    others = layers_of((9,), name="model.layers.{}.norm.weight") | {"head.weight": torch.ones(9, 9)}
    spectra = layer_spectra(save(tmp_path / "m", layers_of((9, 9)) | others))
    assert [module.module for module in spectra.modules] == ["model.layers.*.mlp.up_proj"]
    assert spectra.notes == ()


def test_matrices_of_one_type_and_two_shapes_are_two_tables(tmp_path):
    wide = {UP.format(number + 3): t for number, t in enumerate(layers_of((9, 12)).values())}
    spectra = layer_spectra(save(tmp_path / "m", layers_of((9, 9)) | wide))
    assert [module.shape for module in spectra.modules] == [(9, 9), (9, 12)]
    assert spectra.modules[1].layers[0] == "model.layers.3"


def test_layers_that_a_fine_tune_left_alone_are_left_out_and_told(tmp_path):
    base = layers_of((9, 9), num_layers=5)
    moved = {name: tensor + 0.1 * tensor.square() for name, tensor in base.items()}
    moved[UP.format(1)] = base[UP.format(1)]
    spectra = layer_spectra(save(tmp_path / "m", moved), base=save(tmp_path / "b", base))
    assert len(spectra.modules[0].layers) == 4
    (note,) = spectra.notes
    assert note == f"left out, since all its elements are equal: {UP.format(1)}"


@pytest.mark.parametrize(
    "tensors",
    [
        {"head.weight": torch.ones(4, 4)},
        layers_of((4, 4), num_layers=2),
        {UP.format(number): torch.ones(4, 4) for number in range(3)},
    ],
    ids=["no layers", "two layers", "constants"],
)
def test_a_model_without_such_layers_is_refused(tmp_path, tensors):
    folder = save(tmp_path / "m", tensors)
    with pytest.raises(OutlierMergeError, match="found no type of module") as caught:
        layer_spectra(folder)
    assert str(caught.value).startswith(folder)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_infinite_values_are_refused_with_the_tensors_name(tmp_path, bad):
    tensors = layers_of((9, 9))
    tensors[UP.format(2)][3, 4] = bad
    with pytest.raises(OutlierMergeError, match=r"layers\.2\.mlp.*found values that are infinite"):
        layer_spectra(save(tmp_path / "m", tensors))


def test_arguments_out_of_range_are_told(tmp_path):
    folder = save(tmp_path / "m", layers_of((9, 9)))
    with pytest.raises(ArgumentError, match="num_values: found 1, expected 2 or more"):
        layer_spectra(folder, num_values=1)
    with pytest.raises(ArgumentError, match="device: found 'tpu'"):
        layer_spectra(folder, device="tpu")


def test_a_missing_powerlaw_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "powerlaw", None)
    with pytest.raises(OutlierMergeError, match=r"pip install powerlaw"):
        fit_power_law(range(1, 50))


# The power law


def pareto(alpha, num, seed=0):
    return (1 - np.random.default_rng(seed).random(num)) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.3, 2.0, 2.5, 3.5, 5.0])
def test_a_planted_power_law_is_found(alpha):
    fit = fit_power_law(1e-4 * pareto(alpha, 600))
    assert abs(fit.alpha - alpha) < 3 * fit.standard_error
    assert fit.standard_error < 0.2 * alpha
    assert fit.exponential.ratio > 0
    assert fit.exponential.p < 0.1
    assert fit.verdict == "power law"


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_a_fit_does_not_depend_on_the_scale(scale):
    fit, scaled = fit_power_law(pareto(2.5, 100)), fit_power_law(scale * pareto(2.5, 100))
    assert scaled.alpha == pytest.approx(fit.alpha, rel=1e-6)
    assert scaled.xmin == pytest.approx(scale * fit.xmin, rel=1e-6)
    assert scaled.lognormal.ratio == pytest.approx(fit.lognormal.ratio, abs=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_an_exponential_is_not_called_a_power_law(seed):
    sample = np.random.default_rng(seed).exponential(1.0, 300)
    assert fit_power_law(sample).verdict != "power law"


def test_a_uniform_is_called_an_exponential_rather_than_a_power_law():
    assert fit_power_law(np.random.default_rng(1).random(500)).verdict == "exponential"


@pytest.mark.parametrize(
    ("exponential", "lognormal", "verdict"),
    [
        ((3.0, 0.01), (-0.1, 0.9), "power law"),
        ((3.0, 0.01), (0.1, 0.9), "power law"),
        ((1.0, 0.3), (0.1, 0.9), "undecided"),
        ((-1.0, 0.3), (-1.0, 0.3), "undecided"),
        ((3.0, 0.01), (-2.0, 0.05), "lognormal"),
        ((-3.0, 0.01), (-2.0, 0.05), "exponential"),
        ((-2.0, 0.05), (-3.0, 0.01), "lognormal"),
    ],
)
def test_the_verdict_follows_from_the_comparisons(exponential, lognormal, verdict):
    compared = {"exponential": FitComparison(*exponential), "lognormal": FitComparison(*lognormal)}
    assert replace(fit_power_law(pareto(2.5, 50)), **compared).verdict == verdict


@pytest.mark.parametrize("law", ["exponential", "lognormal"])
def test_figures_are_those_of_the_formulas(law):
    """Alpha, KS distance and the normalized likelihood ratio, written plainly from the paper."""
    sample = np.random.default_rng(3).lognormal(0, 1, 200)
    fit = fit_power_law(sample)
    tail = np.sort(sample[sample >= fit.xmin * (1 - 1e-12)]) / fit.xmin
    assert len(tail) == fit.num_tail
    alpha = 1 + len(tail) / np.log(tail).sum()
    assert fit.alpha == pytest.approx(alpha, rel=1e-3)
    assert fit.standard_error == pytest.approx((alpha - 1) / math.sqrt(len(tail)), rel=1e-3)
    fitted = 1 - tail ** (1 - alpha)
    gaps = np.arange(len(tail)) / len(tail) - fitted
    steps = np.arange(1, len(tail) + 1) / len(tail) - fitted
    largest = [abs(gaps).max(), max(abs(gaps).max(), abs(steps).max())]
    assert largest[0] - 1e-3 <= fit.ks_distance <= largest[1] + 1e-3
    power = np.log(alpha - 1) - alpha * np.log(tail)
    if law == "exponential":
        other = scipy.stats.expon(1, tail.mean() - 1).logpdf(tail)
    else:

        def densities(parameters):
            normal = scipy.stats.norm(parameters[0], math.exp(parameters[1]))
            return normal.logpdf(np.log(tail)) - np.log(tail) - normal.logsf(0)

        best = scipy.optimize.minimize(lambda p: -densities(p).sum(), [0, 0], method="Nelder-Mead")
        other = densities(best.x)
    gaps = power - other
    ratio = gaps.sum() / (gaps.std() * math.sqrt(len(tail)))
    found = getattr(fit, law)
    assert found.ratio == pytest.approx(ratio, abs=0.01)
    assert found.p == pytest.approx(math.erfc(abs(ratio) / math.sqrt(2)), abs=0.01)


@pytest.mark.parametrize(
    "distances",
    [[], [0.5] * 40, list(range(10)), [1 + 1e-6 * number for number in range(40)]],
    ids=["none", "equal", "nine above 0", "nearly equal"],
)
def test_too_few_or_too_similar_distances_are_not_fitted(distances):
    assert fit_power_law(distances) is None


def test_zeros_are_not_counted():
    sample = pareto(2.5, 50).tolist()
    assert fit_power_law([0.0] * 20 + sample) == fit_power_law(sample)


# Fingerprints


def fingerprint(profiles, *, stack="model.layers", model="m"):
    return make_fingerprint(
        model,
        [
            LayerStd(f"{stack}.*.{module}", (number,), 100, std)
            for module, stds in profiles.items()
            for number, std in enumerate(stds)
        ],
    )


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
            "mlp.gate_proj mlp.up_proj mlp.down_proj",
            "q k v o gate up down",
        ),
        (
            "attention.self.query attention.self.key attention.self.value attention.output.dense "
            "intermediate.dense output.dense",
            "q k v o up down",
        ),
        ("attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", "attn.c_attn o up down"),
        ("self_attn.out_proj fc1 fc2", "o up down"),
        ("self_attn.q_proj cross_attn.q_proj", "self_attn.q_proj cross_attn.q_proj"),
    ],
    ids=["llama", "bert", "gpt2", "clip", "two of a kind"],
)
def test_projections_have_common_names(modules, expected):
    found = fingerprint({module: [1.0, 2.0, 3.0] for module in modules.split()})
    assert list(found.profiles) == expected.split()


def test_a_profile_is_resampled_over_depth():
    found = fingerprint({"q_proj": [1.0, 4.0, 16.0]}).profiles["q"]
    assert len(found) == NUM_POINTS
    assert found[0] == pytest.approx(1)
    assert found[-1] == pytest.approx(16)
    assert found == pytest.approx([16 ** (n / (NUM_POINTS - 1)) for n in range(NUM_POINTS)])


def test_a_profile_is_in_order_of_depth():
    matrices = [LayerStd("l.*.q", (number,), 9, 1.0 + number) for number in (10, 2, 0, 1)]
    profile = make_fingerprint("m", matrices).profiles["q"]
    assert list(profile) == sorted(profile)


def test_models_of_different_depths_scales_and_stacks_can_be_equal():
    shallow = fingerprint({"q_proj": [1, 2, 4], "fc1": [3, 3, 3]})
    deep = fingerprint(
        {"wq": [5 * 2 ** (n / 3) for n in range(7)], "w3": [15] * 7}, stack="transformer.layers"
    )
    assert fingerprint_distance(shallow, deep) == pytest.approx(0, abs=1e-12)


def test_the_distance_is_the_deviation_of_the_logarithms():
    flat, rising = fingerprint({"q_proj": [1, 1, 1]}), fingerprint({"q_proj": [1, 3, 9]})
    expected = np.std([n / (NUM_POINTS - 1) * math.log(9) for n in range(NUM_POINTS)])
    assert fingerprint_distance(flat, rising) == pytest.approx(expected)
    assert fingerprint_distance(rising, flat) == pytest.approx(expected)


def test_only_common_projections_are_compared():
    a = fingerprint({"q_proj": [1, 2, 3], "gate_proj": [9, 1, 9]})
    b = fingerprint({"q_proj": [2, 4, 6], "up_proj": [1, 9, 1]})
    assert fingerprint_distance(a, b) == pytest.approx(0, abs=1e-12)
    assert math.isnan(fingerprint_distance(a, fingerprint({"k_proj": [1, 2, 3]})))


def test_a_fingerprint_is_of_the_largest_stack(tmp_path):
    vision = layers_of((8, 8), name="vision.encoder.layers.{}.fc1.weight")
    found = layer_spectra(save(tmp_path / "m", vision | layers_of((20, 20)))).fingerprint
    assert (found.stack, list(found.profiles)) == ("model.layers", ["up"])


def test_fine_tunes_are_nearer_to_each_other_than_to_another_architecture(tmp_path):
    """New weights have one σ everywhere: here only the same random values show the family."""
    for kind in ("llama", "bert"):
        save_model(kind, tmp_path / kind, dtype=torch.float32)
    for seed in (1, 2):
        fine_tune(tmp_path / "llama", tmp_path / f"task{seed}", seed=seed, scale=1e-4)
    folders = [tmp_path / name for name in ("llama", "task1", "task2", "bert")]
    prints = [layer_spectra(str(folder)).fingerprint for folder in folders]
    distances = [[fingerprint_distance(a, b) for b in prints] for a in prints]
    assert [row[number] for number, row in enumerate(distances)] == [0, 0, 0, 0]
    assert max(distances[1][2], distances[0][1]) < min(row[3] for row in distances[:3])


NAMES = {
    "llama": ("model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.down_proj.weight"),
    "bert": (
        "encoder.layer.{}.attention.self.query.weight",
        "encoder.layer.{}.output.dense.weight",
    ),
}


def planted(names, slopes, *, num_layers, side, seed):
    """Save weights whose σ grows over depth by e^slope, differently for each projection."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name.format(number): torch.randn(side, side, generator=generator)
        * math.exp(slope * number / (num_layers - 1))
        for name, slope in zip(NAMES[names], slopes, strict=True)
        for number in range(num_layers)
    }


def test_families_stand_out_whatever_their_sizes_and_names(tmp_path):
    models = {
        "rising, small": planted("llama", (0.5, 1.0), num_layers=4, side=30, seed=0),
        "rising, large": planted("llama", (0.5, 1.0), num_layers=9, side=50, seed=1),
        "rising, other names": planted("bert", (0.5, 1.0), num_layers=6, side=40, seed=2),
        "falling": planted("llama", (-0.5, 0.2), num_layers=4, side=30, seed=3),
        "falling, large": planted("bert", (-0.5, 0.2), num_layers=7, side=50, seed=4),
    }
    prints = {
        name: layer_spectra(save(tmp_path / name, tensors)).fingerprint
        for name, tensors in models.items()
    }
    within, between = [], []
    for a in prints:
        for b in prints:
            if a < b:
                same = a.split(",")[0] == b.split(",")[0]
                (within if same else between).append(fingerprint_distance(prints[a], prints[b]))
    assert (len(within), len(between)) == (4, 6)
    assert 5 * max(within) < min(between)


@pytest.mark.gpu
def test_a_gpu_finds_the_same(tmp_path):
    folder = save(tmp_path / "m", layers_of((40, 90), dtype=torch.bfloat16))
    on_cpu, on_gpu = (layer_spectra(folder, device=device).modules[0] for device in ("cpu", "cuda"))
    for expected, found in zip(on_cpu.singular_values, on_gpu.singular_values, strict=True):
        assert found == pytest.approx(expected, rel=1e-12)
    assert on_gpu.stds == pytest.approx(on_cpu.stds, rel=1e-12)
