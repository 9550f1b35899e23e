"""Kernels that look at all models of an element together: SCE, RAM, and NearSwap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kernel_blocks import MODULES, NAMES, block_of, draw, dtype_of, raw, values_of
from torch import Tensor

from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines.torch import keywords, merge_block
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.methods.statistics.overlap import Overlap
from outliermerge.methods.statistics.spread import Spread, variance
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [1, 15, 17, 1023, 1025, CHUNK_ELEMENTS + 77]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sce": ("sce", {}),
    "sce some": ("sce", {"select_topk": 0.3}),
    "sce none": ("sce", {"select_topk": 0}),
    "sce of mergekit": ("sce", {"select_topk": 0.6, "compat": "mergekit"}),
    "ram": ("ram", {"epsilon": 0.02}),
    "ram all": ("ram", {"epsilon": 0}),
    "ram none": ("ram", {"epsilon": 1e38}),
    "ramplus_tl": ("ramplus_tl", {"epsilon": 0.03, "r": 0.7, "alpha": 0.9}),
    "ramplus_tl less": ("ramplus_tl", {"epsilon": 0.03, "r": -0.3}),
    "consensus_ta": ("consensus_ta", {"consensus": 1, "weight": 0.6, "lambda": 1.2}),
    "consensus_ta of few": ("consensus_ta", {"consensus": 1, "tall_mask_lambda": 3}),
    "nearswap": ("nearswap", {}),
    "nearswap far": ("nearswap", {"t": 0.02}),
}


def measured(
    need: Any,
    parameters: Any,
    sources: list[Tensor],
    codes: str,
    module: Any,
    kernels: list[str] | None = None,
) -> Any:
    """Return a statistic that a module measures, or torch where there is none, chunk by chunk.

    The names of the passes' kernels are appended to `kernels`.
    """
    num = len(sources[0])
    state = need.start(len(sources) - 1, num, parameters)
    while not isinstance(state, list):
        if kernels is not None:
            kernels.append(state.kernel)
        chunks = range(-(-num // CHUNK_ELEMENTS)) if state.chunks is None else state.chunks
        for chunk in chunks:
            part = slice(chunk * CHUNK_ELEMENTS, (chunk + 1) * CHUNK_ELEMENTS)
            some = [source[part] for source in sources]
            if module is None:
                state.add(state.measure(values_of(some, is_delta=True)))
            else:
                state.add(state.measure_raw(module, block_of(codes, some, is_delta=True)))
        state = state.finish()
    return state


def apart(found: Tensor, wanted: Tensor) -> float:
    assert found.isnan().equal(wanted.isnan())
    return float((found - wanted).nan_to_num(0, 0, 0).abs().max())


@pytest.mark.parametrize("num_models", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_that_of_torch(case, num_models):
    name, given = CASES[case]
    method = find_method(name)
    num_models = min(num_models, method.max_models or num_models)
    parameters = method.resolve(num_models, given)
    for num in SIZES:
        for codes in {("fbe" * 2)[: 1 + num_models], "b" * (1 + num_models)}:
            sources = draw(codes, num)
            for source in sources[1:]:
                source[::5] = sources[0][::5].to(source.dtype)  # some do not move
            task = Task(
                method=method, parameters=parameters, out_dtype=DTYPES["float32"],
                dtypes=tuple(DTYPES[NAMES[code]] for code in codes),
                compute_dtype="float32", shape=(num,),
            )  # fmt: skip
            needs = {
                key: measured(need, parameters, sources, codes, None)
                for key, need in method.needs.items()
            }
            block_SE = torch.stack([source.float() for source in sources])
            wanted, _ = merge_block(task, block_SE, keywords(task, needs, block_SE))
            call = method.kernel(parameters, needs)
            for module in MODULES:
                for out_code in "fbe":
                    out = torch.empty(num, dtype=dtype_of(out_code))
                    variant = (*call.arguments(), out_code, raw(out))
                    block = block_of(codes, sources, is_delta=True)
                    _, ((is_finite, _, _),) = module.merge(block, (variant,))
                    assert is_finite
                    # torch adds more than three numbers in another order.
                    if num_models <= 3:
                        assert torch.equal(out, wanted.to(out.dtype)), (num, codes, out_code)
                    elif out_code == "f":
                        assert apart(out, wanted) < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_finite_is_seen_in_any_source(case, value):
    name, given = CASES[case]
    method = find_method(name)
    num_models = method.max_models or 3
    parameters = method.resolve(num_models, given)
    for row in range(1 + num_models):
        sources = draw("f" * (1 + num_models), 1030)
        needs = {
            key: measured(need, parameters, sources, "f" * (1 + num_models), None)
            for key, need in method.needs.items()
        }
        sources[row][1027] = value
        call = method.kernel(parameters, needs)
        for module in MODULES:
            block = block_of("f" * (1 + num_models), sources, is_delta=True)
            variant = (*call.arguments(), "f", bytearray(4 * 1030))
            _, ((is_finite, _, _),) = module.merge(block, (variant,))
            assert not is_finite


SAMPLED = 32 * CHUNK_ELEMENTS + 77  # of so many elements some are looked at first


def large_sources(kind: str) -> list[Tensor]:
    sources = draw("fbef", SAMPLED if "sample" in kind else 2 * CHUNK_ELEMENTS + 1001)
    if kind == "a misleading sample":
        seen = torch.arange(SAMPLED).div(CHUNK_ELEMENTS, rounding_mode="floor") % 4 == 0
        for source in sources[1:]:
            moved = sources[0] + 0.001 * (source.float() - sources[0])
            source[seen] = moved[seen].to(source.dtype)
    elif kind == "a sample alike":
        for source in sources[1:]:
            source[: 29 * CHUNK_ELEMENTS] = 1
    elif kind == "near one another":
        near = 1 + torch.rand(len(sources[0]), generator=torch.Generator().manual_seed(0)) / 1000
        sources[1:] = [sources[0].bfloat16(), sources[0].half(), sources[0] + near]
    if kind == "alike":
        sources[2:] = [sources[1].clone() for _ in sources[2:]]
    elif kind == "ties":
        sources = [(source * 8).round() / 8 for source in sources]
    return sources


@pytest.mark.parametrize(
    "kind", ["drawn", "ties", "alike", "a fair sample", "a misleading sample", "a sample alike"]
)
@pytest.mark.parametrize(
    ("select_topk", "compat"),
    [(0.0, "none"), (1e-9, "none"), (0.1, "none"), (0.1, "mergekit"), (0.9, "none"), (1.0, "none")],
)
@pytest.mark.sampled(2)
def test_sce_selects_and_weighs_the_same_by_kernels_as_by_torch(compat, select_topk, kind):
    sources = large_sources(kind)
    codes = "fbef" if kind != "alike" else "fbbb"
    parameters = {"select_topk": select_topk, "compat": compat}
    least, *weights = measured(Spread(), parameters, sources, codes, None)
    spread = np.sort(variance(values_of(sources, is_delta=True)).numpy())
    wanted = int(select_topk * np.count_nonzero(spread))
    if 0 < select_topk < 1:
        assert least == (spread[len(spread) - wanted] if wanted else math.inf)
    found = [measured(Spread(), parameters, sources, codes, module) for module in MODULES]
    assert found == found[:1] * len(found)
    assert found[0] == pytest.approx([least, *weights], rel=1e-12, abs=0)
    assert found[0][0] == least


@pytest.mark.parametrize("codes", ["bbb", "fbef", "eeee", "bbfbfb"])
def test_squares_of_each_variance_in_a_window_are_found_with_it(codes):
    num, num_bins = CHUNK_ELEMENTS + 1001, 1 << 16
    sources = draw(codes, num)
    values_ME = values_of(sources, is_delta=True)
    spread = variance(values_ME).numpy()
    squares_ME = values_ME.double().square().numpy()
    bits = spread.view(np.uint32).astype(np.int64)
    low = int(np.sort(bits)[num * 3 // 5])
    inside, above = (bits >= low) & (bits < low + num_bins), bits >= low + num_bins
    expected = np.bincount(bits[inside] - low, minlength=num_bins + 1)
    expected[-1] = above.sum()
    pieces = [slice(0, CHUNK_ELEMENTS), slice(CHUNK_ELEMENTS, num)]
    keys = [np.unique(spread[piece][inside[piece]]) for piece in pieces]
    results = set()
    for module in MODULES:
        counts = np.zeros(num_bins + 1, np.uint64)
        block = block_of(codes, sources, is_delta=True)
        num_nonzero, squares, levels = module.variances(block, low, 0, counts)
        results.add((num_nonzero, squares, levels))
        assert num_nonzero == np.count_nonzero(spread)
        assert np.array_equal(counts, expected)
        found = np.frombuffer(levels).reshape(-1, len(codes))
        assert len(found) == sum(map(len, keys))
        sums_PM, of_pieces = np.frombuffer(squares).reshape(2, -1), np.split(found, [len(keys[0])])
        for piece, sums, own in zip(pieces, sums_PM, of_pieces, strict=True):
            assert sums == pytest.approx((squares_ME * above)[:, piece].sum(1), rel=1e-12)
            for variance_, *of_level in own:
                alike = spread[piece] == variance_
                assert alike.any()
                assert of_level == pytest.approx(squares_ME[:, piece][:, alike].sum(1), rel=1e-12)
    assert len(results) == 1
    assert module.variances(block, 0, 16, np.zeros((1 << 15) + 1, np.uint64))[1:] == (None, None)


@pytest.mark.parametrize(
    ("kind", "most", "kernels"),
    [
        ("drawn", None, ["variances"] * 2),
        ("ties", None, ["variances"] * 2),
        ("ties", 100, ["variances"] * 2 + ["squares"]),
        ("near one another", None, ["variances"] * 2 + ["squares"]),
        ("a fair sample", None, ["variances"] * 2),
        ("a misleading sample", None, ["variances"] * 4),
    ],
)
def test_sce_reads_once_more_where_a_window_has_too_many_variances(
    kind, most, kernels, monkeypatch
):
    if most is not None:
        monkeypatch.setattr("outliermerge.methods.statistics.spread._LISTED_BYTES", most)
    sources = large_sources(kind)
    parameters = {"select_topk": 0.3, "compat": "none"}
    by_torch = measured(Spread(), parameters, sources, "fbef", None)
    for module in MODULES:
        called: list[str] = []
        found = measured(Spread(), parameters, sources, "fbef", module, called)
        assert called == kernels
        assert found == pytest.approx(by_torch, rel=1e-12, abs=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_models_weigh_the_same_where_one_has_what_is_not_finite(value):
    sources = draw("fff", 3000)
    sources[2][1027] = value
    for module in [None, *MODULES]:
        parameters = {"select_topk": 0.3, "compat": "none"}
        _, *weights = measured(Spread(), parameters, sources, "fff", module)
        assert weights == [0.5, 0.5]


@pytest.mark.parametrize("num_models", [1, 2, 3, 7])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.03, 1e-5, 1e39])
def test_ram_counts_the_same_by_kernels_as_by_torch(epsilon, num_models):
    codes = ("fbe" * 3)[: 1 + num_models]
    for num in SIZES:
        sources = draw(codes, num)
        parameters = {"epsilon": epsilon}
        wanted = measured(Overlap(), parameters, sources, codes, None)
        for module in MODULES:
            assert measured(Overlap(), parameters, sources, codes, module) == wanted


def test_wrong_arguments_of_variances_are_refused():
    block = block_of("fff", draw("fff", 40), is_delta=True)
    for module in MODULES:
        for low, shift, counts in [
            (2**64 - 1, 0, bytearray(24)),
            (0, 17, bytearray(24)),
            (0, 0, b""),
        ]:
            with pytest.raises((ValueError, BufferError, OverflowError)):
                module.variances(block, low, shift, counts)
        with pytest.raises(TypeError):
            module.squares(block, "1")
