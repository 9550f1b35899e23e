"""The fused CPU kernels against the torch definitions, plain float64 and each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from kernel_blocks import MODULES, NAMES, block_of, by_torch, draw, dtype_of, raw, values_of
from torch import Tensor

from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines.torch import keywords, merge_block
from outliermerge.methods.averaging import weighted_sum
from outliermerge.methods.kernel_call import KernelCall
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass, StandardDeviation
from outliermerge.methods.statistics.trim import Trim
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")

ULP = 2.0**-24  # most that rounding to float32 changes, of 1

WEIGHTS = [0.7, -0.3, 0.0, 1.1, -0.25, 0.4, 0.45, 0.61, 0.93]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "min_sigma": ("min_sigma", {}),
    "min_sigma weighted": ("min_sigma", {"t": 1.3, "weight": WEIGHTS, "lambda": -0.7}),
    "min_sigma whole": ("min_sigma", {"t": 0.0, "lambda": 0.0}),
    "linear": ("linear", {}),
    "linear weighted": ("linear", {"weight": WEIGHTS}),
    "linear sum": ("linear", {"weight": WEIGHTS, "normalize": False}),
    "passthrough": ("passthrough", {"scale": -1.7}),
    "task_arithmetic": ("task_arithmetic", {"weight": WEIGHTS, "lambda": 0.9}),
    "task_arithmetic mean": ("task_arithmetic", {"weight": WEIGHTS, "normalize": True}),
    "ties": ("ties", {}),
    "ties trimmed": ("ties", {"density": 0.3, "rescale": True, "lambda": 0.7}),
    "ties weighted": ("ties", {"density": 0.4, "weight": WEIGHTS, "rescale": True}),
    "ties sum": ("ties", {"density": 0.6, "weight": WEIGHTS, "normalize": False}),
    "ties none": ("ties", {"density": 0.0}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.4, "gamma": 0.1}),
    "breadcrumbs weighted": (
        "breadcrumbs",
        {"density": 0.6, "weight": WEIGHTS, "rescale": True, "normalize": True, "lambda": -0.7},
    ),
    "breadcrumbs elected": ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.2, "rescale": True}),
    "breadcrumbs counted": (
        "breadcrumbs_ties",
        {"density": 0.5, "weight": WEIGHTS, "normalize": True, "consensus": "count"},
    ),
}
SIZES = [1, 15, 16, 17, 1023, 1025, CHUNK_ELEMENTS + 77]


def measured(
    need: Any, parameters: dict[str, Any], shape: tuple[int, ...], share: Callable[..., Any]
) -> tuple[list[Any], int]:
    """Return a statistic measured chunk by chunk, and the number of passes."""
    state: Pass | list[Any] = need.start(*shape, parameters)
    passes = 0
    while not isinstance(state, list):
        chunks = range(-(-shape[1] // CHUNK_ELEMENTS)) if state.chunks is None else state.chunks
        for chunk in chunks:
            state.add(share(state, slice(chunk * CHUNK_ELEMENTS, (chunk + 1) * CHUNK_ELEMENTS)))
        state, passes = state.finish(), passes + 1
    return state, passes


def by_kernels(module: Any, codes: str, sources: list[Tensor]) -> Callable[..., Any]:
    return lambda state, part: state.measure_raw(
        module, block_of(codes, [source[part] for source in sources], is_delta=True)
    )


def merged_by(module: Any, call: KernelCall, block: Any, out_code: str) -> tuple[Tensor, Any, Any]:
    """Return the output, and whether it is finite, counts and digests; and the sources' digests."""
    out = torch.empty(block[2], dtype=dtype_of(out_code))
    digests, (result,) = module.merge(block, ((*call.arguments(), out_code, raw(out)),))
    return out, result, digests


def exact_merge(
    method: str, parameters: dict[str, Any], needs: dict[str, Any], values_ME: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the merge in float64, and in what size of numbers float32 rounds on the way.

    The merge is NaN where the votes for a sign are even but for rounding.
    """
    weight_M1 = np.array(parameters.get("weight", parameters.get("scale")))[:, None]
    lambda_, kept_ME, divisor_E = parameters.get("lambda", 1.0), values_ME, np.array(1.0)
    loss = 1.0
    if method == "min_sigma":
        threshold = np.float32(parameters["t"] * min(needs["sigma"]))
        kept_ME = np.where(abs(values_ME) > threshold, values_ME, values_ME / len(values_ME))
    elif method == "breadcrumbs":
        least_M1, most_M1, scale_M1 = (np.array(row)[:, None] for row in needs["limits"])
        is_kept_ME = (abs(values_ME) >= least_M1) & (abs(values_ME) <= most_M1)
        kept_ME = np.where(is_kept_ME, values_ME * scale_M1, 0)
        if parameters["normalize"]:
            divisor_E = weight_M1.sum(0)
            loss = abs(weight_M1).sum() / abs(weight_M1.sum())
    elif method in ("ties", "breadcrumbs_ties"):
        least_M1, *most, scale_M1 = (np.array(row)[:, None] for row in needs["limits"])
        is_kept_ME = abs(values_ME) >= least_M1
        for most_M1 in most:
            is_kept_ME &= abs(values_ME) <= most_M1
        voting_ME = np.where(is_kept_ME, values_ME * scale_M1, 0) * weight_M1
        votes_E = voting_ME.sum(0)
        is_open_E = abs(votes_E) < 2 * len(values_ME) * ULP * abs(voting_ME).sum(0)
        is_open_E &= (votes_E != 0) | (weight_M1 != weight_M1[0]).any()
        if parameters.get("consensus") == "count":  # these votes are exact
            votes_E, is_open_E = np.sign(voting_ME).sum(0), np.zeros_like(is_open_E)
        agrees_ME = np.sign(voting_ME) == np.where(votes_E >= 0, 1, -1)
        kept_ME = np.where(agrees_ME, np.where(is_open_E, np.nan, scale_M1), 0) * values_ME
        if parameters["normalize"]:
            divisor_E = np.where(agrees_ME.any(0), (agrees_ME * weight_M1).sum(0), 1)
    elif parameters.get("normalize"):
        divisor_E = weight_M1.sum(0)
        loss = abs(weight_M1).sum() / abs(weight_M1.sum())  # of the sum of the weights itself
    size_E = abs(kept_ME * weight_M1 * lambda_).sum(0) / abs(divisor_E) * loss
    return (kept_ME * weight_M1).sum(0) * lambda_ / divisor_E, size_E


@pytest.mark.parametrize("num_models", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("case", [case for case in CASES if case != "passthrough"])
def test_a_merge_is_that_of_torch_and_of_plain_arithmetic(case, num_models):
    check_merges(*CASES[case], num_models)


def test_passthrough_is_that_of_torch_and_of_plain_arithmetic():
    check_merges(*CASES["passthrough"], 1)


def check_merges(name: str, given: dict[str, Any], num_models: int) -> None:
    method = find_method(name)
    given = given | ({"weight": WEIGHTS[:num_models]} if "weight" in given else {})
    parameters = method.resolve(num_models, given)
    is_delta = method.space == "delta"
    for num_elements in SIZES:
        for kind in ("b", "e", "f", "fbe") if num_elements in (17, 1025) else ("fbe",):
            codes = (kind * 10)[: num_models + is_delta]
            sources = draw(codes, num_elements)
            values_ME = values_of(sources, is_delta=is_delta)
            needs = {
                key: measured(need, parameters, values_ME.shape, by_torch(values_ME))[0]
                for key, need in method.needs.items()
            }
            exact_E, size_E = exact_merge(name, parameters, needs, values_ME.double().numpy())
            if is_delta:
                base_E = sources[0].double().numpy()
                exact_E, size_E = exact_E + base_E, size_E + abs(base_E)
            call = method.kernel(parameters, needs)
            block = block_of(codes, sources, is_delta=is_delta)

            found_E, (is_finite, counts, _), _ = merged_by(MODULES[-1], call, block, "f")

            assert is_finite
            known_E = ~np.isnan(exact_E)
            assert known_E.mean() > 0.98
            away_E = abs(found_E.double().numpy() - exact_E)[known_E]
            assert (away_E <= (num_models + 4) * ULP * size_E[known_E]).all()

            task = Task(
                method=method, parameters=parameters, out_dtype=DTYPES["float32"],
                dtypes=tuple(DTYPES[NAMES[code]] for code in codes),
                compute_dtype="float32", shape=(num_elements,),
            )  # fmt: skip
            block_SE = torch.stack([source.float() for source in sources])
            defined_E, report = merge_block(task, block_SE, keywords(task, needs, block_SE))
            # torch adds more than three numbers in another order, where a vector does not fill up.
            apart_E = (found_E - defined_E).abs().double().numpy()[known_E]
            assert (apart_E <= (num_models + 2) * ULP * size_E[known_E]).all()
            assert num_models > 3 or torch.equal(found_E, defined_E)
            assert list(counts) == report.get("outliers", torch.zeros(num_models)).tolist()
            for out_code in "bef":
                rounded = raw(found_E.to(dtype_of(out_code)))
                for module in MODULES:
                    out_E, (is_finite, same_counts, _), _ = merged_by(module, call, block, out_code)
                    assert is_finite
                    assert raw(out_E) == rounded
                    assert same_counts == counts


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_several_merges_of_a_block_are_what_each_is_alone(module):
    sources = draw("bfe", CHUNK_ELEMENTS + 1500)
    block = block_of("bfe", sources, is_delta=True)
    calls = [
        KernelCall("ties", (1.0, 0.0), ([0.3, 0.6], [0.01, 0.02], [0.4, 0.7])),
        KernelCall("min_sigma", (0.03, 0.5), ([1, -2],)),
        KernelCall("min_sigma", (math.inf, 1.0), ([1, 1],)),
        weighted_sum([0, 0]),
    ]
    outs = [torch.empty(block[2], dtype=dtype_of(code)) for code in "befb"]
    variants = [
        (*call.arguments(), code, raw(out))
        for call, code, out in zip(calls, "befb", outs, strict=True)
    ]
    digests, results = module.merge(block, tuple(variants))
    for call, code, out, result in zip(calls, "befb", outs, results, strict=True):
        alone, own, same = merged_by(module, call, block, code)
        assert (raw(out), result, digests) == (raw(alone), own, same)
    assert results[2][1] == (0, 0)  # nothing is above infinity
    assert raw(outs[3]) == raw(sources[0].to(torch.bfloat16))


@pytest.mark.parametrize("threshold", [1.0, 0.01, 1e-45, 3e38])
def test_ties_keeps_what_is_at_the_threshold_and_trims_the_next_float_below(threshold):
    at = torch.tensor([threshold, -threshold])
    below = at.nextafter(torch.zeros(2))
    sources = [torch.zeros(4), torch.cat([at, below])]
    method = find_method("ties")
    needs = {"limits": [[at[0].item()], [1.0]]}
    call = method.kernel(method.resolve(1, {"density": 0.5}), needs)
    for module in MODULES:
        out, _, _ = merged_by(module, call, block_of("ff", sources, is_delta=True), "f")
        assert out.tolist() == [*at.tolist(), 0, 0]


# Conversions.


def converted(module: Any, code: str, tensor: Tensor, out_code: str) -> tuple[Tensor, bool]:
    call = weighted_sum([1.0])
    block = block_of(code, [tensor], is_delta=False)
    out, (is_finite, _, _), _ = merged_by(module, call, block, out_code)
    return out, is_finite


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("code", "be")
def test_every_half_loads_exactly_and_stores_back(code, module):
    bits = torch.arange(65536).to(torch.uint16)
    halves = bits.view(dtype_of(code))
    wide, is_finite = converted(module, code, halves, "f")
    assert not is_finite
    is_nan = halves.isnan()
    assert torch.equal(wide.isnan(), is_nan)
    assert torch.equal(wide[~is_nan].view(torch.int32), halves[~is_nan].float().view(torch.int32))
    for source, source_code in ((wide, "f"), (halves, code)):
        back, _ = converted(module, source_code, source, code)
        assert torch.equal(back[~is_nan].view(torch.int16), halves[~is_nan].view(torch.int16))
        assert set(back[is_nan].view(torch.int16).abs().tolist()) <= {
            "b": {0x7FC0}, "e": {0x7E00, 0x8000 - 0x7E00}
        }[code]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("code", "be")
def test_float32_is_rounded_to_the_nearest_half_ties_to_even(code, module):
    halves = torch.arange(0x10000).to(torch.uint16).view(dtype_of(code)).double()
    finite = halves[halves.isfinite()].sort().values
    ties = ((finite[1:] + finite[:-1]) / 2).float()
    top = torch.tensor([torch.finfo(torch.float32).max, 65519.996, 65520.0, 65536.0, math.inf])
    low = torch.tensor([0.0, 1e-45, 2.0**-25, 2.0**-26, 1.17e-38])
    given = torch.cat([ties, top, -top, low, -low])
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    given = torch.cat([given, given.nextafter(up), given.nextafter(down)])
    stored, _ = converted(module, "f", given, code)
    assert torch.equal(stored.view(torch.int16), given.to(dtype_of(code)).view(torch.int16))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("code", "value", "out_code", "fits"),
    [
        ("f", 65519.0, "e", True),
        ("f", 65520.0, "e", False),
        ("b", -1e38, "e", False),
        ("f", 3.4e38, "b", False),
        ("f", 3.38e38, "b", True),
        ("f", 3.4e38, "f", True),
        ("f", math.inf, "f", False),
        ("b", math.nan, "b", False),
        ("e", -math.inf, "f", False),
    ],
)
@pytest.mark.parametrize("place", [0, 1500, CHUNK_ELEMENTS + 76])
def test_one_value_that_does_not_fit_is_seen(place, code, value, out_code, fits, module):
    tensor = torch.ones(CHUNK_ELEMENTS + 77, dtype=dtype_of(code))
    tensor[place] = value
    assert converted(module, code, tensor, out_code)[1] is fits
    is_finite = math.isfinite(value)
    assert module.all_finite(code, raw(tensor), len(tensor)) is is_finite
    assert module.copy(code, raw(tensor), len(tensor), raw(tensor.clone()))[0] is is_finite


# Statistics.

NORMAL = np.random.default_rng(0).standard_normal(3 * CHUNK_ELEMENTS + 1001)


def with_outlier(at: int) -> np.ndarray:
    values = NORMAL.copy()
    values[at::CHUNK_ELEMENTS] = 1e6
    return values


@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        pytest.param(0.01 * NORMAL, 1e-13, id="near 0"),
        pytest.param(1e6 + NORMAL, 1e-13, id="far from 0"),
        pytest.param(np.full(70_000, 0.1), 0.0, id="constant"),
        pytest.param(with_outlier(3), 1e-11, id="an outlier first"),
        pytest.param(with_outlier(30), 1e-13, id="an outlier later"),
        pytest.param(NORMAL[:15], 1e-13, id="few"),
        pytest.param(NORMAL[:1], 0.0, id="one"),
        pytest.param(1e-40 * NORMAL, 1e-13, id="tiny"),
        pytest.param(1e37 * NORMAL, 1e-13, id="huge"),
    ],
)
def test_deviations_are_those_of_longer_floats(values, tolerance):
    tensor = torch.from_numpy(values.astype(np.float32))
    base, wide = torch.zeros_like(tensor), tensor.numpy().astype(np.longdouble)
    shape = (1, len(tensor))
    found = [
        measured(StandardDeviation(), {}, shape, by_kernels(module, "ff", [base, tensor]))[0]
        for module in MODULES
    ]
    assert found == found[:1] * len(found)
    assert found[0][0] == pytest.approx(float(wide.std()), rel=tolerance, abs=0)
    by_definition, _ = measured(StandardDeviation(), {}, shape, by_torch(tensor[None]))
    assert by_definition == pytest.approx(found[0], rel=tolerance, abs=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 20, 100_000])
def test_the_deviation_of_what_is_not_finite_is_nan(place, value):
    sources = [torch.zeros(100_001), torch.ones(100_001)]
    sources[1][place] = value
    for module in MODULES:
        (sigma,), _ = measured(
            StandardDeviation(), {}, (1, 100_001), by_kernels(module, "ff", sources)
        )
        assert math.isnan(sigma)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("low", "shift", "num_bins"),
    [(0, 16, 1 << 15), (0x3C000000, 0, 3 << 16), (0x3C230000, 0, 1), (0x3C000000, 3, 1 << 16),
     (0, 0, 1), (0x7FFF0000, 0, 1 << 16), (0x3C000001, 16, 2)],
)  # fmt: skip
def test_histograms_count_bits_in_a_window_from_several_threads(low, shift, num_bins, module):
    base, model, other = draw("bff", CHUNK_ELEMENTS + 1003)
    model[::7] = base[::7]
    model[-1] = base[-1]
    block = block_of("bff", [base, model, other], is_delta=True)
    counts = np.zeros(num_bins + 1, np.uint64)
    with ThreadPoolExecutor(4) as pool:
        for done in [
            pool.submit(module.histogram, block, (low, 0), shift, (counts, None)) for _ in range(8)
        ]:
            done.result()
    bits = (model - base.float()).abs().numpy().view(np.uint32).astype(np.int64) - low
    bins = np.minimum(bits[bits >= 0] >> shift, num_bins)
    assert counts.tolist() == (8 * np.bincount(bins, minlength=num_bins + 1)).tolist()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_several_windows_of_each_model_are_counted_in_one_reading(module):
    sources = draw("bff", CHUNK_ELEMENTS + 1003)
    block = block_of("bff", sources, is_delta=True)
    lows, shift = (0x3C000000, 0x3B000000, 0x3D000000, 0), 4
    together = np.zeros((4, 1 << 15), np.uint64)
    module.histogram(block, lows, shift, (together[0], None, *together[2:]))
    apart = np.zeros_like(together)
    module.histogram(block, lows[:2], shift, (apart[0], None))
    module.histogram(block, lows[2:], shift, tuple(apart[2:]))
    assert together.any(axis=1).tolist() == [True, False, True, True]
    assert (together == apart).all()
    for wrong in (3, 0):
        with pytest.raises(ValueError, match="counts for each model"):
            module.histogram(block, lows[:wrong], shift, tuple(together[:wrong]))


LARGE = 32 * CHUNK_ELEMENTS + 77
SAMPLED = torch.arange(LARGE).div(CHUNK_ELEMENTS, rounding_mode="floor") % 4 == 0


def large_deltas(kind: str) -> Tensor:
    deltas = torch.randn(LARGE, generator=torch.Generator().manual_seed(1)) * 0.01
    if kind == "sampled chunks are smaller":
        deltas[SAMPLED] *= 1e-6
    elif kind == "sampled chunks are larger":
        deltas[SAMPLED] *= 1e6
    elif kind == "ties":
        deltas = (deltas * 300).round() / 300
    elif kind == "zeros":
        deltas[:] = 0
    return deltas


@pytest.mark.parametrize("density", [1e-9, 0.2, 0.9999999])
@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("drawn alike", 2),
        ("sampled chunks are smaller", 4),
        ("sampled chunks are larger", 4),
        ("ties", 2),
        ("zeros", 2),
    ],
)
def test_trim_finds_the_same_magnitude_by_kernels_as_by_torch(kind, passes, density):
    deltas = large_deltas(kind)
    parameters = {"density": (density,), "rescale": True}
    sources = [torch.zeros(LARGE), deltas]
    magnitudes = np.sort(deltas.abs().numpy()).astype(float)
    kth = magnitudes[LARGE - max(1, int(density * LARGE))]
    kept = magnitudes[magnitudes >= kth].sum()
    scale = magnitudes.sum() / kept if kept >= 1e-7 else 1.0

    ((threshold,), (found_scale,)), num_passes = measured(
        Trim(), parameters, (1, LARGE), by_kernels(MODULES[-1], "ff", sources)
    )

    assert threshold == kth
    assert found_scale == pytest.approx(scale, rel=1e-12)
    # One more for the sums. The ends of a distribution may be outside the window.
    assert num_passes == passes + 1 or density != 0.2
    (by_definition, scales), _ = measured(Trim(), parameters, (1, LARGE), by_torch(deltas[None]))
    assert by_definition == [kth]
    assert scales == pytest.approx([scale], rel=1e-12)


@pytest.mark.parametrize("codes", ["bbbb", "eeee", "fbef"])
@pytest.mark.parametrize("num_elements", [1, 17, CHUNK_ELEMENTS + 1003])
def test_trim_of_several_models_is_the_same_bits_by_every_engine(num_elements, codes):
    sources = draw(codes, num_elements)
    parameters = {"density": (0.0, 0.37, 1.0), "rescale": True}
    values_ME = values_of(sources, is_delta=True)
    (expected, scales), _ = measured(Trim(), parameters, values_ME.shape, by_torch(values_ME))
    results = [
        measured(Trim(), parameters, values_ME.shape, by_kernels(module, codes, sources))[0]
        for module in MODULES
    ]
    assert results == results[:1] * len(results)
    assert results[0][0] == expected
    assert results[0][1] == pytest.approx(scales, rel=1e-14)


# Digests.


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_digests_are_those_of_xxhash(module):
    data = np.random.default_rng(0).bytes(4 * (2 * CHUNK_ELEMENTS + 400))
    sizes = [*range(121, 700), 1023, 1024, 1025, *range(CHUNK_ELEMENTS - 9, CHUNK_ELEMENTS + 1)]
    sizes += [CHUNK_ELEMENTS + 121, 2 * CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS + 333]
    for num_elements in sizes:
        for code, item in (("b", 2), ("e", 2), ("f", 4)):
            source = data[: num_elements * item]
            step = CHUNK_ELEMENTS * item
            pieces = [source[start : start + step] for start in range(0, len(source), step)]
            expected = b"".join(map(xxhash.xxh3_128_digest, pieces))
            out = bytearray(len(source))
            assert module.copy(code, source, num_elements, out)[1] == expected
            assert out == source


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_merge_digests_what_it_reads_and_writes(module):
    sources = draw("fbe", CHUNK_ELEMENTS + 121)
    call = weighted_sum([0.5, 0.5])
    out, (_, _, written), read = merged_by(
        module, call, block_of("fbe", sources, is_delta=True), "b"
    )
    for tensor, digests in zip([*sources, out], [*read, written], strict=True):
        parts = tensor.split(CHUNK_ELEMENTS)
        assert digests == b"".join(xxhash.xxh3_128_digest(raw(part)) for part in parts)
