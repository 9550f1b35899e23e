"""On a CUDA device: the CPU's results within float32 rounding, and the same decisions at ±tσ."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from checkpoints import family, load_folder
from every_method import SEVERAL
from gpu_oracles import work
from torch import Tensor

import outliermerge
from outliermerge.engines import triton as gpu_engine
from outliermerge.engines.torch import TorchEngine

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES: dict[str, dict[str, Any]] = {
    "min_sigma": {},
    "linear": {"weight": [1.0, 2.0, 0.5]},
    "task_arithmetic": {"weight": 0.4, "lambda": 0.8},
    "ties": {"density": 0.2, "rescale": True},
}


def tensors(*shape: int, dtype: torch.dtype, num_models: int = 3, seed: int = 0) -> list[Tensor]:
    """A base and models on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    base = torch.randn(shape, generator=generator, device="cuda")
    made = [base.to(dtype)]
    for _ in range(num_models):
        delta = torch.randn(shape, generator=generator, device="cuda")
        made.append((base + 0.01 * delta).to(dtype))
    return made


def on_cpu(method: str, sources: list[Tensor], **given: Any) -> Tensor:
    base, *models = (source.cpu() for source in sources)
    return outliermerge.merge_tensors(models, base=base, method=method, **given)


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """Statistics differ in the last bits of float64, and what is rounded to float32 hardly ever."""
    error = (found.cpu().double() - expected.double()).abs()
    assert (error <= torch.finfo(expected.dtype).eps * expected.double().abs() + 1e-7).all()
    assert (error > 0).double().mean() < 1e-3


@pytest.mark.parametrize("method", SEVERAL)
def test_cuda_agrees_with_the_cpu(method, tmp_path):
    base, models = family("llama", tmp_path)
    spec = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
    }
    on_host = outliermerge.run(spec, output=tmp_path / "cpu", device="cpu")
    on_gpu = outliermerge.run(spec, output=tmp_path / "cuda", device="cuda", threads=4)
    assert outliermerge.verify(on_gpu.output) == []
    expected, found = load_folder(on_host.output), load_folder(on_gpu.output)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    for name, entry in on_host.manifest["tensors"].items():
        statistics = on_gpu.manifest["tensors"][name].get("statistics", {})
        assert statistics.get("outliers") == entry.get("statistics", {}).get("outliers")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", CASES)
def test_tensors_on_the_device_are_merged_there_as_on_the_cpu(method, dtype):
    sources = tensors(300, 701, dtype=dtype)
    base, *models = sources
    assert gpu_engine.fits_gpu(_work(method, sources, **CASES[method]))
    merged = outliermerge.merge_tensors(models, base=base, method=method, **CASES[method])
    assert merged.device == base.device and merged.dtype == base.dtype
    assert_alike(merged, on_cpu(method, sources, **CASES[method]))


def test_decisions_differ_only_at_the_threshold():
    sources = tensors(4096, 4096, dtype=torch.float32, num_models=2)
    base, *models = (source.cpu() for source in sources)
    found = outliermerge.merge_tensors(sources[1:], base=sources[0]).cpu()
    expected = outliermerge.merge_tensors(models, base=base)
    differing = (found - expected).abs() > 1e-4  # half of what is kept there is 1e-2
    deltas = [model - base for model in models]
    threshold = 2 * min(float(delta.double().std(correction=0)) for delta in deltas)
    at_it = torch.zeros_like(differing)
    for delta in deltas:
        at_it |= (delta.abs() - threshold).abs() <= 1e-6 * threshold
    assert not (differing & ~at_it).any()
    assert int(differing.sum()) <= 2, "of 33 million decisions"


def test_the_same_bits_come_again():
    sources = tensors(2048, 1100, dtype=torch.bfloat16)
    for method, given in CASES.items():
        base, *models = sources
        first, again = (
            outliermerge.merge_tensors(models, base=base, method=method, **given) for _ in range(2)
        )
        assert torch.equal(first, again), method


def test_a_state_dict_is_merged_as_its_tensors_are():
    shapes = [(5,), (8,), (64, 64), (1000, 333), (70_000,), (3, 4, 5)]
    made = [tensors(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
    states = [{str(i): each[s] for i, each in enumerate(made)} for s in range(4)]
    base, *models = states
    merged = outliermerge.merge_state_dicts(models, base=base)
    for i, each in enumerate(made):
        assert_alike(merged[str(i)], on_cpu("min_sigma", each))


def test_threads_on_streams_of_their_own_do_not_disturb_each_other():
    made = [tensors(500, 700 + i, dtype=torch.bfloat16, seed=i) for i in range(8)]
    merges = [_work("ties", sources, density=0.3) for sources in made]
    torch.cuda.synchronize()

    def merge(own):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            gpu_engine.merge_on_gpu([own])
        stream.synchronize()

    threads = [threading.Thread(target=merge, args=(own,)) for own in merges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, sources in zip(merges, made, strict=True):
        assert_alike(own.result, on_cpu("ties", sources, density=0.3))


def test_buffers_that_a_device_reads_are_pinned():
    buffer = TorchEngine(["cuda:0"]).buffer("input", 1 << 20)
    assert torch.frombuffer(buffer, dtype=torch.uint8).is_pinned()


def test_every_device_merges_its_own_tensors():
    numbers = range(torch.cuda.device_count())
    sources = tensors(400, 500, dtype=torch.bfloat16)
    moved = [[tensor.to(f"cuda:{number}") for tensor in sources] for number in numbers]
    merges = [_work("min_sigma", each) for each in moved]
    gpu_engine.merge_on_gpu(merges)
    expected = on_cpu("min_sigma", sources)
    for number, merge in zip(numbers, merges, strict=True):
        assert merge.result.device.index == number
        assert_alike(merge.result, expected)


def _work(method: str, sources: list[Tensor], **given: Any) -> gpu_engine.TensorMerge:
    used = sources[method == "linear" :]
    made = work(method, used, used[0].dtype, **given)
    return gpu_engine.TensorMerge(made.task, made.sources, torch.empty_like(used[0]))
