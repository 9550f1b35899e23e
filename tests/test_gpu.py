"""On a CUDA device: the CPU's results within float32 rounding, and the same decisions at ±tσ."""

from __future__ import annotations

import pytest
import torch
from checkpoints import family, load_folder

import outliermerge

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", ["min_sigma", "linear", "task_arithmetic", "ties"])
def test_cuda_agrees_with_the_cpu(method, tmp_path):
    base, models = family("llama", tmp_path)
    spec = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
    }
    on_cpu = outliermerge.run(spec, output=tmp_path / "cpu", device="cpu")
    on_gpu = outliermerge.run(spec, output=tmp_path / "cuda", device="cuda")
    assert outliermerge.verify(on_gpu.output) == []
    expected, found = load_folder(on_cpu.output), load_folder(on_gpu.output)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    for name, entry in on_cpu.manifest["tensors"].items():
        statistics = on_gpu.manifest["tensors"][name].get("statistics", {})
        assert statistics.get("outliers") == entry.get("statistics", {}).get("outliers")


def test_tensors_on_the_device_stay_there(tmp_path):
    base = torch.randn(300, 700, device="cuda", dtype=torch.bfloat16)
    models = [base + 0.01 * torch.randn_like(base) for _ in range(2)]
    merged = outliermerge.merge_tensors(models, base=base)
    expected = outliermerge.merge_tensors([m.cpu() for m in models], base=base.cpu())
    assert merged.device == base.device and merged.dtype == base.dtype
    torch.testing.assert_close(merged.cpu(), expected)
