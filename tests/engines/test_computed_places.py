"""Kernels compute adapted and quantised weights with the bits of torch's definition."""

import math
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_blocks import MODULES
from torch import Tensor

from outliermerge.checkpoint.adapters.tensors import InDType, LowRankSum, Rescaled
from outliermerge.checkpoint.computed import ComputedTensor
from outliermerge.checkpoint.quantized.packed import Unpacked, exponents
from outliermerge.checkpoint.quantized.tensors import CodeTensor, RowScaledTensor, ScaledTensor
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import DTYPES, TensorMeta
from outliermerge.errors import OutlierMergeError

SHAPE = (45, 100)
FLOATS = ("bfloat16", "float16", "float32")
CODES = ("float8_e4m3fn", "float8_e5m2", "int8", "uint8")


class Stored:
    """A file of tensors, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 24

    def __call__(self, values: Tensor) -> TensorMeta:
        meta = TensorMeta("stored", _dtype(values), tuple(values.shape), self.path, self.position)
        with self.path.open("ab") as file:
            file.truncate(self.position)
            file.seek(0, 2)
            file.write(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.position += meta.num_bytes
        return meta


def _dtype(values: Tensor) -> Any:
    return DTYPES[str(values.dtype).removeprefix("torch.")]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "file")


def random_codes(name: str, *shape: int) -> Tensor:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8).view(getattr(torch, name))
    return torch.where(codes.float().isfinite(), codes.float(), 1.0).to(codes.dtype)


def numbers(name: str, *shape: int) -> Tensor:
    return torch.randn(shape).to(getattr(torch, name))


def read(source: ComputedTensor, kernels: Any, start: int, stop: int) -> bytes:
    out = bytearray(4 * (stop - start))
    with Reader(kernels=kernels) as reader:
        source.read(reader, start, stop, memoryview(out))
    return bytes(out)


def check(source: ComputedTensor, seed: int) -> None:
    """Compare all elements, and some ranges of them, on every processor's kernels."""
    assert source.by_kernels
    whole = read(source, None, 0, source.num_elements)
    drawn = random.Random(seed)
    for kernels in MODULES:
        ends = [sorted(drawn.sample(range(source.num_elements), 2)) for _ in range(6)]
        for start, stop in [(0, source.num_elements), *ends]:
            assert read(source, kernels, start, stop) == whole[4 * start : 4 * stop], (start, stop)


def made(kind: type[ComputedTensor], shape: tuple[int, ...] = SHAPE, **parts: Any) -> Any:
    return kind(name="made", shape=shape, out_dtype=DTYPES["bfloat16"], **parts)


@pytest.mark.parametrize("name", CODES)
def test_every_code_is_the_number_that_torch_takes_it_for(name: str, stored: Stored) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    expected = codes.float()
    source = made(
        RowScaledTensor, (256,), weight=stored(codes), scale=stored(torch.ones(1)), num_groups=0
    )
    for kernels in MODULES:
        found = torch.frombuffer(bytearray(read(source, kernels, 0, 256)), dtype=torch.float32)
        assert torch.equal(found.nan_to_num(7.5), expected.nan_to_num(7.5))


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("block", [(1, 100), (45, 100), (16, 32), (7, 1)])
def test_codes_with_a_scale_for_each_block(
    name: str, block: tuple[int, int], stored: Stored
) -> None:
    grid = (2, *(-(-size // part) for size, part in zip(SHAPE, block, strict=True)))
    source = made(
        ScaledTensor, (2, *SHAPE), weight=stored(random_codes(name, 2, *SHAPE)),
        scale=stored(numbers(random.choice(FLOATS), *grid)), block=block,
        zero_point=stored(torch.randint(0, 9, grid, dtype=torch.uint8)),
        factor=7.874015718698502e-3, zero=8.0,
    )  # fmt: skip
    check(source, 0)
    check(replace(source, zero_point=None, zero=0.0, factor=1.0), 1)


@pytest.mark.parametrize("num_groups", [0, 1, 4])
def test_codes_with_scales_of_rows(num_groups: int, stored: Stored) -> None:
    shape = (SHAPE[0], num_groups, 1) if num_groups else ()
    source = made(
        RowScaledTensor, weight=stored(random_codes("int8", *SHAPE)),
        scale=stored(numbers("bfloat16", *shape)), num_groups=num_groups,
    )  # fmt: skip
    check(source, num_groups)


def test_packed_codes_and_exponents(stored: Stored) -> None:
    words = stored(torch.randint(0, 256, (45, 50), dtype=torch.uint8))
    codes = made(Unpacked, dtype=DTYPES["uint8"], bits=4, source=words)
    powers = stored(torch.randint(0, 255, (45, 4), dtype=torch.uint8))
    table = tuple(random.gauss(0, 1) for _ in range(16))
    table = struct.unpack("16f", struct.pack("16f", *table))
    source = made(ScaledTensor, weight=codes, scale=exponents(powers), block=(1, 25), values=table)
    check(source, 3)
    assert not replace(source, weight=replace(codes, order=(1, 0))).by_kernels


@pytest.mark.parametrize("name", ["uint8", "bfloat16"])
def test_codes_of_bitsandbytes(name: str, stored: Stored) -> None:
    num_blocks = -(-math.prod(SHAPE) // 64)
    absmax = made(
        CodeTensor, (num_blocks,), bits=8, weight=stored(random_codes("uint8", num_blocks)),
        values=stored(torch.randn(256)), absmax=stored(torch.randn(-(-num_blocks // 16))), block=16,
        offset=0.25,
    )  # fmt: skip
    weight = torch.randint(0, 256, (math.prod(SHAPE) // 2,), dtype=torch.uint8)
    source = made(
        CodeTensor, bits=4, weight=stored(weight.view(getattr(torch, name))),
        values=stored(torch.randn(16)), absmax=absmax, block=64,
    )  # fmt: skip
    check(source, 4)


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("name", FLOATS)
def test_sums_with_products_of_factors(rank: int, name: str, stored: Stored) -> None:
    source = made(
        LowRankSum, base=stored(numbers(name, *SHAPE)), lora_a=stored(numbers(name, rank, 100)),
        lora_b=stored(numbers("float32", 45, rank)), scale=0.3,
    )  # fmt: skip
    check(source, rank)
    magnitude = stored(numbers("float32", 45))
    check(made(Rescaled, direction=source, magnitude=magnitude, by_column=False), rank)
    a, b = stored(numbers("float32", rank, 45)), stored(numbers(name, 100, rank))
    check(replace(source, lora_a=a, lora_b=b, transposed=True), rank)
    scale = stored(numbers("float32", 1, 1))
    base = made(ScaledTensor, weight=stored(random_codes("int8", *SHAPE)), scale=scale, block=SHAPE)
    check(replace(source, base=base), rank)


def test_whole_tensors_of_an_adapter(stored: Stored) -> None:
    check(made(InDType, whole=stored(numbers("float32", *SHAPE))), 5)
    assert not made(
        InDType, dtype=DTYPES["bfloat16"], whole=stored(numbers("bfloat16", 3))
    ).by_kernels


def test_a_scale_that_is_not_finite_is_refused_as_by_torch(stored: Stored) -> None:
    powers = stored(torch.tensor([[3], [255], [4]], dtype=torch.uint8))
    codes = stored(random_codes("int8", 3, 8))
    for scale in (exponents(powers), stored(torch.tensor([[1.0], [math.inf], [1.0]]))):
        source = made(ScaledTensor, (3, 8), weight=codes, scale=scale, block=(1, 8))
        texts = []
        for kernels in (None, MODULES[0]):
            with pytest.raises(OutlierMergeError) as error:
                read(source, kernels, 0, 24)
            texts.append(str(error.value))
        assert texts[0] == texts[1]


def test_a_file_that_ends_early_is_named(stored: Stored) -> None:
    codes = stored(random_codes("int8", *SHAPE))
    source = made(RowScaledTensor, weight=codes, scale=stored(torch.ones(1)), num_groups=0)
    kept = stored.path.read_bytes()
    stored.path.write_bytes(kept[:200])
    source = replace(source, scale=replace(source.scale, offset=24))
    with pytest.raises(OutlierMergeError, match=f"{stored.path}: .*ends"):
        read(source, MODULES[0], 0, 4000)
