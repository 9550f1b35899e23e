"""Kernels of PCB: scores of competing models, and what the winners give."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy
import pytest
import torch
from kernel_blocks import MODULES, block_of, draw, values_of
from torch import Tensor

from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines.torch import keywords, merge_block
from outliermerge.methods.kernel_call import CODES
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.methods.statistics.competition import Competition
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")

PCB = find_method("pcb")
NAMES = {code: name for name, code in CODES.items()}
CODES_OF = ["bbb", "fff", "efb", "ff", "b" * 6, "f" * 91]


def limits_of(module: Any, sources: list[Tensor], codes: str, *, step: int) -> list[Any]:
    """Measure bounds by a module's kernels, in blocks of so many elements."""
    num = len(sources[0])
    state: Any = Competition().start(len(sources) - 1, num, {"density": 0.2, "trim": "tensor"})
    while not isinstance(state, list):
        for start in reversed(range(0, num, step)):
            some = [source[start : start + step] for source in sources]
            state.add(state.measure_raw(module, block_of(codes, some, is_delta=True)))
        state = state.finish()
    return state


def limits_by_torch(values_ME: Tensor) -> list[Any]:
    num_models, num = values_ME.shape
    state: Any = Competition().start(num_models, num, {"density": 0.2, "trim": "tensor"})
    while not isinstance(state, list):
        state.add(state.measure(values_ME))
        state = state.finish()
    return state


def merged(module: Any, sources: list[Tensor], codes: str, limits: list[Any]) -> Tensor:
    parameters = PCB.resolve(len(sources) - 1, {"weight": 0.7, "lambda": 1.3})
    assert PCB.kernel is not None
    name, scalars, vectors = PCB.kernel(parameters, {"limits": limits}).arguments()
    out = torch.empty(len(sources[0]))
    target = memoryview(out.view(torch.uint8).numpy())
    module.merge(block_of(codes, sources, is_delta=True), ((name, scalars, vectors, "f", target),))
    return out


@pytest.mark.parametrize("codes", CODES_OF)
@pytest.mark.parametrize("num", [1, 15, 1023, 1025, CHUNK_ELEMENTS + 77])
def test_all_modules_give_the_same_bits_and_what_torch_gives(codes, num):
    num = min(num, 5000) if len(codes) > 50 else num
    sources = draw(codes, num)
    values_ME = values_of(sources, is_delta=True)
    limits = limits_of(MODULES[0], sources, codes, step=num)
    first = merged(MODULES[0], sources, codes, limits)
    for module in MODULES:
        for step in {num, CHUNK_ELEMENTS, 700 if num < 5000 else num}:
            assert limits_of(module, sources, codes, step=step) == limits
        assert torch.equal(merged(module, sources, codes, limits), first)
    wanted = limits_by_torch(values_ME)
    assert limits[:2] == wanted[:2]  # magnitudes are exact
    for found, expected in zip(limits[2:], wanted[2:], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    dtypes = tuple(DTYPES[NAMES[code]] for code in codes)
    parameters = PCB.resolve(len(codes) - 1, {"weight": 0.7, "lambda": 1.3})
    task = Task(
        method=PCB, parameters=parameters, dtypes=dtypes, out_dtype=DTYPES["float32"],
        compute_dtype="float32", shape=(num,),
    )  # fmt: skip
    block_SE = torch.stack([source.float() for source in sources])
    by_torch, _ = merge_block(task, block_SE, keywords(task, {"limits": wanted}, block_SE))
    # What is just above the least score is kept whole, so that rounding decides about a few.
    off = (first - by_torch).abs() > 1e-4 * values_ME.abs().max()
    assert off.sum() <= num // 10_000


def test_values_that_are_not_finite_are_seen_in_the_result():
    sources = [torch.zeros(8) for _ in range(3)]
    sources[1][:4] = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    limits = [[0.0, 0.0], [1.0, 1.0], [0.1, 0.1], [1.0, 1.0]]
    for module in MODULES:
        out = merged(module, sources, "fff", limits)
        assert out[:3].isnan().all()
        assert out[3:].isfinite().all()


@pytest.mark.parametrize("unknown", [0, 1])
def test_bounds_that_are_nan_make_all_of_it_nan_as_torch_does(unknown):
    limits = [[0.0, 0.0], [1.0, 1.0], [0.1, 0.1], [1.0, 1.0]]
    limits[unknown] = [0.0, math.nan]  # where more than 0.01% of a model are NaN
    sources = [torch.zeros(8), torch.ones(8), torch.full((8,), 1e30)]
    bounds = b"".join(struct.pack("2f", *row) for row in limits[:2])
    for module in MODULES:
        assert merged(module, sources, "fff", limits).isnan().all()
        counts = tuple(numpy.zeros(2, numpy.uint64) for _ in range(2))
        block = block_of("fff", sources, is_delta=True)
        module.scores(block, bounds, (0, 0x7F800001), 0, counts)
        assert counts[1].sum() == 8  # the second model's scores are NaN, too


def test_wrong_arguments_of_scores_are_refused():
    block = block_of("fff", draw("fff", 40), is_delta=True)
    bins, bounds = bytearray(24), bytes(16)
    for module in MODULES:
        for other, given, lows, shift, counts, message in [
            (block, bounds, (0,), 0, (bins,), "for each model"),
            (block, bounds, (0, 0), 0, (bins,), "for each model"),
            (block, bytes(12), (0, 0), 0, (bins, bins), "for each model"),
            (block, bounds, (0, 0), 17, (bins, bytearray(24)), "no such window"),
        ]:
            with pytest.raises(ValueError, match=message):
                module.scores(other, given, lows, shift, counts)
        with pytest.raises(OverflowError):
            module.scores(block, bounds, (0, -1), 0, (bins, bytearray(24)))
        with pytest.raises(TypeError):
            module.scores(block, bounds, (0, 0), 0, (bins, None))
