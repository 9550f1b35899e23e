"""The GPU kernels without a GPU: in Triton's interpreter, and compiled for devices.

They give the CPU kernels' bytes, which test_methods.py holds against the formulas.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import gpu_oracles
import numpy as np
import pytest
import torch
from gpu_oracles import DTYPE_CODES, PART_ELEMENTS, bytes_of
from torch import Tensor

import outliermerge
from outliermerge.engines import triton as gpu_engine

CASES = {
    "min_sigma": {"weight": 0.75, "lambda": 1.5},
    "linear": {},
    "task_arithmetic": {"weight": 0.3, "lambda": 0.7},
    "ties": {"density": 0.3, "rescale": True},
}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process where kernels are interpreted."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=gpu_oracles.interpret) as pool:
        yield lambda function, *args, **more: pool.submit(function, *args, **more).result()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Compiles a kernel in a process where they are not interpreted."""
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            yield lambda *args, **more: pool.submit(gpu_oracles.compiled, *args, **more).result()


def family(num_models: int, *shape: int, base: str, model: str) -> list[Tensor]:
    """A base and models that are some noise and a few outliers away from it."""
    generator = torch.Generator().manual_seed(math.prod(shape) + num_models)
    first = torch.randn(shape, generator=generator).to(DTYPE_CODES[base])
    tensors = [first]
    for _ in range(num_models):
        noise = 0.01 * torch.randn(shape, generator=generator)
        outliers = torch.randn(shape, generator=generator) * (
            torch.rand(shape, generator=generator) < 0.01
        )
        tensors.append((first.float() + noise + outliers).to(DTYPE_CODES[model]))
    return tensors


def on_cpu(method: str, tensors: list[Tensor], **given: Any) -> bytes:
    return bytes_of(
        outliermerge.merge_tensors(tensors[1:], base=tensors[0], method=method, **given)
    )


@pytest.mark.parametrize("code", DTYPE_CODES)
@pytest.mark.parametrize("method", CASES)
def test_bytes_are_those_of_the_cpu(
    method: str, code: str, interpreted: Callable[..., Any]
) -> None:
    for num_models in (2, 3):
        tensors = family(num_models, 150, 131, base=code, model=code)
        sources = tensors[1:] if method == "linear" else tensors
        (found,) = interpreted(
            gpu_oracles.merged, method, [sources], DTYPE_CODES[code], **CASES[method]
        )
        assert found == on_cpu(method, tensors, **CASES[method]), num_models


@pytest.mark.parametrize(("base", "model"), [("f", "b"), ("b", "f"), ("e", "b")])
def test_a_base_may_be_of_another_dtype(
    base: str, model: str, interpreted: Callable[..., Any]
) -> None:
    tensors = family(2, 33, 41, base=base, model=model)
    (found,) = interpreted(gpu_oracles.merged, "min_sigma", [tensors], DTYPE_CODES[base])
    assert found == on_cpu("min_sigma", tensors)


@pytest.mark.parametrize("method", CASES)
def test_many_tensors_at_once_are_each_as_alone(
    method: str, interpreted: Callable[..., Any]
) -> None:
    # Of one element, of no element, odd, of whole parts, and of several pieces.
    shapes = [(1,), (0, 3), (PART_ELEMENTS,), (3, 5, 7), (65_537,), (128,)]
    tensors = [family(2, *shape, base="b", model="b") for shape in shapes]
    tensors.append([tensor[1:] for tensor in family(2, 9, base="b", model="b")])  # not aligned
    sources = [each[method == "linear" :] for each in tensors]
    found = interpreted(gpu_oracles.merged, method, sources, torch.bfloat16, **CASES[method])
    assert found == [on_cpu(method, each, **CASES[method]) for each in tensors]


@pytest.mark.parametrize("mean", [0.0, 400.0])
def test_deviations_are_float64s(mean: float, interpreted: Callable[..., Any]) -> None:
    values = mean + torch.randn(150_001, generator=torch.Generator().manual_seed(0))
    (found,) = interpreted(gpu_oracles.deviations, [torch.zeros_like(values), values])
    assert found == pytest.approx(float(np.std(values.double().numpy())), rel=1e-13)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_deviation_of_what_is_not_finite_is_none(
    value: float, interpreted: Callable[..., Any]
) -> None:
    values = torch.ones(5000)
    values[4500] = value
    found = interpreted(gpu_oracles.deviations, [torch.zeros(5000), values, torch.ones(5000)])
    assert math.isnan(found[0]) and found[1] == 0


def test_an_element_at_the_threshold_is_noise(interpreted: Callable[..., Any]) -> None:
    # Half are 1 and half -1, so sigma is 1, and with t = 1 all are at the threshold exactly.
    model = torch.tensor([1.0, -1.0] * 2500)
    sources = [torch.zeros(5000), model, model]
    (found,) = interpreted(gpu_oracles.merged, "min_sigma", [sources], torch.float32, t=1.0)
    assert found == bytes_of(model)
    (found,) = interpreted(gpu_oracles.merged, "min_sigma", [sources], torch.float32, t=0.999)
    assert found == bytes_of(2 * model)


@pytest.mark.parametrize("code", ["b", "e"])
def test_results_are_rounded_to_even_and_overflow_to_infinity(
    code: str, interpreted: Callable[..., Any]
) -> None:
    dtype = DTYPE_CODES[code]
    bits = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)  # infinities and NaN among them
    sums = every.float() * 1.5
    (found,) = interpreted(gpu_oracles.merged, "linear", [[every]], dtype, weight=1.5,
                           normalize=False)  # fmt: skip
    stored = torch.frombuffer(bytearray(found), dtype=dtype)
    torch.testing.assert_close(stored, sums.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_large_tensor_is_trimmed_by_a_window_found_in_a_sample(
    interpreted: Callable[..., Any],
) -> None:
    tensors = family(2, 33, 65_536, base="f", model="b")
    given = {"density": [0.2, 1.0]}  # the second model is left out of the search
    found = interpreted(gpu_oracles.merged_in_large_parts, "ties", tensors, **given)
    assert found == on_cpu("ties", tensors, **given)


def test_tensors_that_differ_at_their_start_are_told(interpreted: Callable[..., Any]) -> None:
    base = torch.zeros(PART_ELEMENTS + 100)
    early, late, negative_zero = base.clone(), base.clone(), -base
    early[PART_ELEMENTS - 1] = late[PART_ELEMENTS] = 1
    pairs = [[base, base], [base, early], [base, late], [base, negative_zero], [base[:0]] * 2]
    found = interpreted(gpu_oracles.differ_early, pairs)
    assert found == [False, True, False, False, False]


KERNELS = ("moments", "magnitudes", "histogram", "weighted_sum", "min_sigma", "ties")


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_to_wide_accesses_without_contraction(
    capability: int, compiled: Callable[..., Any]
) -> None:
    assert compiled("combine_moments", capability, M=2)["cubin"] > 0
    for kernel in KERNELS:
        made = compiled(kernel, capability, M=2, BASE="b", MODEL="b", OUT="b", ALIGN=8)
        merges = kernel in gpu_engine.KERNELS
        assert made["wide_loads"] == 6, kernel  # of 16 elements a thread, of three sources
        assert made["wide_stores"] == 2 * merges, kernel
        assert made["contractions"] == made["flushes"] == 0, kernel
        assert set(made["divisions"]) <= {"div.rn.f32"}, kernel


@pytest.mark.parametrize("kernel", ["heads_differ", *KERNELS])
def test_kernels_compile_for_other_dtypes(kernel: str, compiled: Callable[..., Any]) -> None:
    mixed = compiled(kernel, 90, M=3, BASE="f", MODEL="e", OUT="f", ALIGN=1)
    alone = compiled(kernel, 90, M=1, BASE="", MODEL="e", OUT="e", ALIGN=8)
    assert mixed["cubin"] > 0 and mixed["contractions"] == 0
    assert alone["wide_loads"] == 2


def test_tensors_on_the_cpu_are_not_for_the_gpu() -> None:
    merge = gpu_oracles.work("min_sigma", family(2, 8, base="b", model="b"), torch.bfloat16)
    assert not gpu_engine.fits_gpu(merge)


def test_without_triton_the_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.find_spec("outliermerge.engines.triton_kernels")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.is_installed


def test_where_triton_cannot_build_kernels_torch_computes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not gpu_engine._work_on(torch.device("cpu"))  # which no kernel can be built for
    (record,) = caplog.records
    assert "so torch computes" in record.message


def test_triton_is_not_imported_by_a_merge_on_the_cpu() -> None:
    code = """
import sys, torch, outliermerge
outliermerge.merge_tensors([torch.ones(2)], base=torch.zeros(2))
sys.exit("triton" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
