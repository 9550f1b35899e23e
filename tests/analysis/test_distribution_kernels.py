"""The kernels that measure distributions: processors, forms of sources, and what is refused."""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from kernel_blocks import MODULES, block_of, draw, dtype_of, raw

from outliermerge.analysis.sums import (
    Limits,
    filtered_of_bytes,
    filtered_of_values,
    tally_of_bytes,
    tally_of_values,
)
from outliermerge.analysis.table import BINS

SMALL = 0.01
SIZES = [0, 1, 15, 17, 1024, 1025, 66_000]
LIMITS = Limits(mean=0.02, low=-1.2, high=1.3, std=0.6, small=SMALL)
NUM_COUNTS = 8 * (BINS + 2)
NUM_PATTERNS = 8 * 65_536


def _measure(module, block) -> tuple[bytes, bytes, bytes]:
    counts = bytearray(NUM_COUNTS)
    tally = module.tally(block, SMALL)
    return tally, module.filtered(block, tuple(LIMITS), counts), bytes(counts)


@pytest.mark.parametrize("num_elements", SIZES)
@pytest.mark.parametrize("codes", ["f", "b", "e", "ff", "bf", "eb"])
def test_all_processors_give_the_same_bits_and_torch_the_same_numbers(codes, num_elements):
    sources = draw(codes, num_elements)
    block = block_of(codes, sources, is_delta=len(codes) == 2)
    first, *others = [_measure(module, block) for module in MODULES]
    assert all(other == first for other in others)
    values = sources[-1].double() - (sources[0].double() if len(codes) == 2 else 0)
    tally, wanted = tally_of_bytes(first[0]), tally_of_values(values, SMALL)
    assert tally.all == pytest.approx(wanted.all, rel=1e-12, abs=1e-12)
    assert tally[1:] == pytest.approx(wanted[1:], rel=1e-14)
    filtered, (same, counts) = filtered_of_bytes(first[1]), filtered_of_values(values, LIMITS)
    assert filtered.kept == pytest.approx(same.kept, rel=1e-12, abs=1e-12)
    assert filtered.without_small == pytest.approx(same.without_small, rel=1e-12, abs=1e-12)
    assert filtered.outside == same.outside
    assert np.frombuffer(first[2], np.uint64).tolist() == counts


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("code", ["b", "e"])
def test_counted_patterns_tell_what_elements_tell(module, code):
    (values,) = draw(code, 66_003)
    values[[3, 40_000]] = torch.tensor([torch.inf, torch.nan], dtype=values.dtype)
    block = block_of(code, [values], is_delta=False)
    patterns, counts = bytearray(NUM_PATTERNS), bytearray(NUM_COUNTS)
    module.patterns(block, patterns)
    expected = np.bincount(values.view(torch.int16).numpy().view(np.uint16), minlength=65_536)
    assert np.array_equal(np.frombuffer(patterns, np.uint64), expected)
    tally, filtered, wanted_counts = _measure(module, block)
    found = tally_of_bytes(module.tally_patterns(code, patterns, SMALL))
    assert found.all == pytest.approx(tally_of_bytes(tally).all, rel=1e-12)
    assert found[1:] == pytest.approx(tally_of_bytes(tally)[1:], rel=1e-12)
    assert found.num_non_finite == 2
    same = filtered_of_bytes(module.filtered_patterns(code, patterns, tuple(LIMITS), counts))
    assert same.kept == pytest.approx(filtered_of_bytes(filtered).kept, rel=1e-12)
    assert same.outside == filtered_of_bytes(filtered).outside
    assert bytes(counts) == wanted_counts


@pytest.mark.parametrize("module", MODULES)
def test_files_and_memory_give_the_same_from_several_threads(module, tmp_path):
    sources = draw("bb", 300_000)
    files = []
    for number, source in enumerate(sources):
        path = tmp_path / str(number)
        path.write_bytes(b"12345" + bytes(raw(source)))
        files.append(os.open(path, os.O_RDONLY))
    spans = [(start, min(start + 70_000, 300_000)) for start in range(0, 300_000, 70_000)]
    shared, patterns = bytearray(NUM_COUNTS), bytearray(NUM_PATTERNS)

    def measure(span: tuple[int, int]) -> bytes:
        start, stop = span
        places = tuple((file, 5 + 2 * start) for file in files)
        module.patterns((b"b", places[:1], stop - start, False), patterns)
        return module.filtered((b"bb", places, stop - start, True), tuple(LIMITS), shared)

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(measure, spans))
    for (start, stop), one in zip(spans, told, strict=True):
        part = [source[start:stop] for source in sources]
        assert one == _measure(module, block_of("bb", part, is_delta=True))[1]
    assert bytes(shared) == _measure(module, block_of("bb", sources, is_delta=True))[2]
    assert np.frombuffer(patterns, np.uint64).sum() == 300_000
    for file in files:
        os.close(file)


def _block(code: str = "b", num_elements: int = 8):
    return block_of(code, [torch.zeros(num_elements, dtype=dtype_of(code))], is_delta=False)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("filtered", (_block(), tuple(LIMITS), bytearray(NUM_COUNTS - 1))),
        ("filtered", (_block(), tuple(LIMITS), bytearray(NUM_COUNTS + 8))),
        ("patterns", (_block(), bytearray(8))),
        ("patterns", (_block("f"), bytearray(NUM_PATTERNS))),
        ("patterns", ((b"bb", _block()[1] * 2, 8, True), bytearray(NUM_PATTERNS))),
        ("tally_patterns", ("f", bytes(NUM_PATTERNS), SMALL)),
        ("tally_patterns", ("x", bytes(NUM_PATTERNS), SMALL)),
        ("tally_patterns", ("b", bytes(16), SMALL)),
        ("filtered_patterns", ("b", bytes(16), tuple(LIMITS), bytearray(NUM_COUNTS))),
        ("filtered_patterns", ("b", bytes(NUM_PATTERNS), tuple(LIMITS), bytearray(8))),
        ("tally", ((b"b", (memoryview(b"12"),), 2, False), SMALL)),
    ],
)
def test_what_does_not_fit_is_refused(module, name, arguments):
    with pytest.raises(ValueError):
        getattr(module, name)(*arguments)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_that_ends_early_is_said(module, tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    with path.open("rb") as file:
        block = (b"b", ((file.fileno(), 0),), 51, False)
        counts, patterns = bytearray(NUM_COUNTS), bytearray(NUM_PATTERNS)
        for call in (
            lambda: module.tally(block, SMALL),
            lambda: module.filtered(block, tuple(LIMITS), counts),
            lambda: module.patterns(block, patterns),
        ):
            with pytest.raises(EOFError):
                call()
    assert not any(counts) and not any(patterns)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("deviation", [1e-320, 1e300])
@pytest.mark.parametrize("mean", [0.0, np.nan, -np.inf])
def test_limits_out_of_all_bounds_count_inside_the_histogram(module, mean, deviation):
    counts = bytearray(NUM_COUNTS)
    module.filtered(_block(num_elements=3000), (mean, -1.0, 1.0, deviation, SMALL), counts)
    assert np.frombuffer(counts, np.uint64).sum() == 3000


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("deviation", [0.0, np.inf, np.nan])
def test_a_deviation_that_is_none_counts_nothing(module, deviation):
    counts = bytearray(NUM_COUNTS)
    told = module.filtered(_block(num_elements=3000), (0.0, 0.0, 0.0, deviation, SMALL), counts)
    assert struct.unpack("17d", told)[0] == 3000
    assert not any(counts)
