"""What kernels keep at random: DELLA's choice by rank, and norms before and after dropping."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_blocks import MODULES, block_of, draw, raw, values_of
from torch import Tensor

from outliermerge.methods.context import Context
from outliermerge.methods.kernel_call import SPARE_BYTES, packed, packed_keys
from outliermerge.methods.sparsify import by_density, by_rank, drawn
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.methods.statistics.drawn import DrawnScale, ranked_rows

SHAPES = [
    (), (1,), (2,), (77,), (5, 1), (4, 2), (50, 17), (5, 1000), (1, CHUNK_ELEMENTS + 3),
    (3, 64, 9), (2, 300, 3, 3),
]  # fmt: skip
CHANCES = [(0.5, 0.15), (0.3, 0.29), (0.7, -0.2), (0.5, 0.0), (0.5, 0.4999), (0.0, 0.1), (1.0, 0.1)]


def of_kind(kind: str, num: int) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    values = torch.randn(num, generator=generator)
    if kind == "of bfloat16":  # few distinct magnitudes
        moved = (0.02 * values).bfloat16()
        return moved.float() - (0.02 * torch.randn(num, generator=generator)).bfloat16().float()
    if kind == "mostly zeros":
        return values * (torch.rand(num, generator=generator) < 0.1)
    if kind == "an outlier":  # all others are in one bin
        values[num // 2] = 1e9
    elif kind == "ties":
        values = (values * 2).round()
    elif kind == "all alike":
        values = torch.full((num,), -0.5)
    elif kind == "wide":
        values *= 10 ** (torch.randn(num, generator=generator) * 6)
    elif kind == "not finite":
        values[::7], values[::5] = math.nan, math.inf
        values[::11] *= -1
    return values


KINDS = [
    "normal", "of bfloat16", "mostly zeros", "an outlier", "ties", "all alike", "wide", "not finite"
]  # fmt: skip


def kept_by(module: Any, values: Tensor, context: Context, chance: tuple[float, float],
            divide: bool) -> Tensor:  # fmt: skip
    """Return what the kernel `della` keeps of one model, by a merge that only keeps."""
    out, base = torch.empty(len(values)), torch.zeros(len(values))
    scalars = packed([1.0, 0.0, 0.0, 1.0, float(divide)])
    vectors = packed([1.0, *chance, 1.0])
    where = packed_keys([context.keys(0)]), 0, *ranked_rows(context)
    block = block_of("ff", [base, values], is_delta=True)
    module.merge(block, (("della", scalars, vectors, "f", raw(out), *where),))
    return out


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.nan_to_num(7e7), wanted.nan_to_num(7e7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_kernel_keeps_what_a_stable_sort_tells(shape, kind):
    context = Context("w", shape, seed=3)
    values = of_kind(kind, math.prod(shape))
    rows_RC = values.view(1, -1, ranked_rows(context)[0])
    for chance, divide in [*itertools.product(CHANCES, (False,)), (CHANCES[1], True)]:
        numbers = (torch.tensor([number]) for number in chance)
        wanted = drawn(rows_RC, context, by_rank, *numbers, divide=divide).view(-1)
        for module in MODULES:
            found = kept_by(module, values, context, chance, divide)
            assert same(found, wanted), (chance, divide, module.__name__)


DENSITY, EPSILON = (0.4, 0.7, 1.0), (0.3, -0.1, 0.2)


def norms_by(module: Any, block: Any, start: int, context: Context, rows: tuple[int, ...]) -> bytes:
    keys = packed_keys([context.keys(model) for model in range(3)])
    found: bytes = module.drawn(block, start, packed(DENSITY), packed(EPSILON), keys, *rows)
    return found


@pytest.fixture(params=[(40, 3001), (7, CHUNK_ELEMENTS + 5), (23, 40, 3, 3)], ids=str)
def stored(request: Any, tmp_path: Path) -> Iterator[Any]:
    """A base and three models of a tensor, in memory and in files."""
    context = Context("w", request.param, seed=1)
    sources = draw("fbef", math.prod(request.param))
    files = []
    for number, source in enumerate(sources):
        (tmp_path / str(number)).write_bytes(b"x" * number + bytes(raw(source)))
        files.append(os.open(tmp_path / str(number), os.O_RDONLY))
    yield context, sources, files
    for file in files:
        os.close(file)


def span_of(sources: list[Tensor], files: list[int], start: int, stop: int) -> Any:
    places = [
        (file, number + start * source.element_size())
        for number, (file, source) in enumerate(zip(files, sources, strict=True))
    ]
    return b"fbef", tuple(places), stop - start, True


@pytest.mark.parametrize(
    "need", [DrawnScale(by_density), DrawnScale(by_rank, by_row=True)], ids=["density", "rank"]
)
def test_norms_are_those_of_torch_wherever_blocks_are_cut(need, stored):
    context, sources, files = stored
    parameters = {"density": DENSITY, "epsilon": EPSILON, "rescale": True, "rescale_by": "l1"}
    num = len(sources[0])
    state = need.start(3, num, parameters, context=context)
    state.add(state.measure(values_of(sources, is_delta=True)))
    wanted = state.finish()
    assert wanted[2] == 1
    for module in MODULES:
        for step in (num, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS):
            state = need.start(3, num, parameters, context=context)
            for start in range(0, num, step):
                block = span_of(sources, files, start, min(start + step, num))
                state.add(state.measure_raw(module, block, start=start))
            assert state.finish() == pytest.approx(wanted, rel=1e-12)


def test_norms_of_files_are_those_of_memory_and_of_any_processor(stored):
    context, sources, files = stored
    whole = span_of(sources, files, 0, len(sources[0]))
    memory = block_of("fbef", sources, is_delta=True)
    for rows in ((), ranked_rows(context)):
        found = {norms_by(m, b, 0, context, rows) for m in MODULES for b in (whole, memory)}
        assert len(found) == 1


def test_a_merge_of_pieces_is_that_of_the_whole(stored):
    context, sources, files = stored
    num = len(sources[0])
    scalars, vectors = packed([0.7, 1.0, 1.0, 1.0, 0.0]), packed([1, 2, 0.5, *DENSITY, *EPSILON])
    vectors += packed([1.5, 2, 0.5])
    keys, rows = packed_keys([context.keys(m) for m in range(3)]), ranked_rows(context)

    def merged(module: Any, block: Any, start: int) -> bytes:
        out = bytearray(4 * block[2])
        module.merge(block, (("della", scalars, vectors, "f", out, keys, start, *rows),))
        return bytes(out)

    wanted = merged(MODULES[0], block_of("fbef", sources, is_delta=True), 0)
    for module in MODULES:
        for step in (num, CHUNK_ELEMENTS):
            blocks = [
                (i, span_of(sources, files, i, min(i + step, num))) for i in range(0, num, step)
            ]
            assert b"".join(merged(module, block, start) for start, block in blocks) == wanted


@pytest.mark.parametrize("codes", ["fbef", "fbb", "bb"])
@pytest.mark.parametrize(("shape", "first"), [((9, 3001), 0), ((9, 3001), 1), ((40, 3000), 33)])
def test_a_merge_by_what_the_norms_kept_is_one_that_ranks_again(codes, shape, first):
    context, num = Context("w", shape, seed=2), math.prod(shape)
    sources = draw(codes, num)
    for source, values in zip(sources[1:], ((math.inf, math.nan), (0.0, -0.0)), strict=False):
        source[::97], source[::89] = values
    num_models = len(sources) - 1
    keys, rows = packed_keys([context.keys(m) for m in range(num_models)]), ranked_rows(context)
    numbers = [*[0.5] * num_models, *DENSITY[:num_models], *EPSILON[:num_models], 1.5, 2, 0.5]
    vectors = packed(numbers[: 4 * num_models])
    chances = packed(DENSITY[:num_models]), packed(EPSILON[:num_models])
    block = block_of(codes, sources, is_delta=True)
    start = first * shape[1]  # what is merged alone
    part = block_of(codes, [source[start:] for source in sources], is_delta=True)
    for module in MODULES:
        kept = bytearray(num_models * (-(-num // 8) + SPARE_BYTES))
        sums = module.drawn(block, 0, *chances, keys, *rows, kept)
        assert sums == module.drawn(block, 0, *chances, keys, *rows)
        for consensus, normalize in itertools.product((0, 1, 2), (0, 1)):
            scalars = packed([0.7, normalize, consensus, 0.9, 0.0])
            found = []
            for bits in ((), (kept,)):
                out = torch.empty(num - start)
                variant = "della", scalars, vectors, "f", raw(out), keys, start, *rows, *bits
                module.merge(part, (variant,))
                found.append(out.view(torch.int32))
            assert torch.equal(*found), (consensus, normalize, module.__name__)


def test_a_buffer_for_what_is_kept_that_does_not_fit_is_refused():
    context, sources = Context("w", (4, 8)), draw("fff", 32)
    keys, rows = packed_keys([context.keys(model) for model in range(2)]), ranked_rows(context)
    chances, block = (packed([0.5] * 2), packed([0.1] * 2)), block_of("fff", sources, is_delta=True)
    kept = bytearray(2 * (4 + SPARE_BYTES))
    variant = "della", packed([1.0] * 5), packed([0.5] * 8), "f", bytearray(128), keys, 0, *rows
    for module in MODULES:
        with pytest.raises(ValueError, match="too short"):
            module.drawn(block, 0, *chances, keys, *rows, kept[2:])
        with pytest.raises(ValueError, match="too short"):
            module.merge(block, ((*variant, kept[2:]),))
        with pytest.raises(ValueError, match="multiple of 8"):
            module.drawn(block, 4, *chances, keys, 4, 4, kept)


def test_a_file_that_ends_within_a_row_beyond_the_block_is_an_error(stored):
    context, sources, files = stored
    rows = ranked_rows(context)
    path = Path(f"/proc/self/fd/{files[2]}").readlink()
    stop = rows[0] * 3 // 2
    os.truncate(path, 2 + 2 * (stop + 1))
    for module in MODULES:
        block = span_of(sources, files, 0, stop)
        with pytest.raises(EOFError) as caught:
            norms_by(module, block, 0, context, rows)
        assert caught.value.args[1] == 2


def test_a_buffer_that_cuts_rows_and_rows_that_do_not_fit_are_refused():
    context = Context("w", (4, 6))
    sources = draw("fbef", 20)
    for module in MODULES:
        block = block_of("fbef", sources, is_delta=True)
        for start, rows, message in [
            (0, (6, 6), "does not hold whole rows"),
            (3, (5, 5), "does not hold whole rows"),
            (0, (5, 0), "no such number"),
            (0, (6, 4), "no such number"),
            (0, (-5, 5), "numbers and keys"),
        ]:
            with pytest.raises(ValueError, match=message):
                norms_by(module, block, start, context, rows)
        keys = packed_keys([(1, 2)] * 2)  # one is missing
        with pytest.raises(ValueError, match="for each model"):
            module.drawn(block, 0, packed(DENSITY), packed(EPSILON), keys)
        variant = ("della", packed([1.0] * 5), packed([1.0] * 12), "f", bytearray(80))
        with pytest.raises(ValueError, match="no such number"):
            module.merge(block, (variant,))
