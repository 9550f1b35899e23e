"""Rounding at random: unbiased, the same bytes on every way, and by kernels as by torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors
from kernel_blocks import raw

import outliermerge
from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines.cpu import KernelEngine
from outliermerge.engines.kernels import find_kernels
from outliermerge.engines.rounding import rounded
from outliermerge.engines.torch import TorchEngine
from outliermerge.output.parts import join, run_part

KEYS = (0x1234_5678_9ABC, -99)


def _values(num: int) -> torch.Tensor:
    """Return values of all sizes, with the ends of what the dtypes hold."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(num, generator=generator)
    values *= 2.0 ** torch.randint(-40, 20, (num,), generator=generator)
    ends = [0.0, -0.0, 65504.0, 65519.9, -65504.0, 3.38e38, -3.4e38, 2.0**-14, 2.0**-24, 1e-45]
    ends += [math.inf, -math.inf, math.nan]
    values[: len(ends)] = torch.tensor(ends)
    return values


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_round_as_torch_does_at_any_place(dtype: str) -> None:
    values = _values(70_001)
    for start in (0, 5, 2**33 + 1):
        found = []
        for engine in (KernelEngine(find_kernels()), TorchEngine(["cpu"])):
            out = torch.empty(len(values), dtype=getattr(torch, dtype))
            made: Any = raw(out)
            engine.convert(DTYPES["float32"], raw(values), DTYPES[dtype], made, KEYS, start)
            found.append(out.view(torch.int16))
        is_nan = values.isnan()
        assert found[0][~is_nan].equal(found[1][~is_nan])
        assert found[0].view(getattr(torch, dtype))[is_nan].isnan().all()
        ordered = rounded(values, dtype, KEYS, start).to(getattr(torch, dtype))
        assert found[0][~is_nan].equal(ordered.view(torch.int16)[~is_nan])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_value_goes_to_a_neighbour_and_is_right_in_the_mean(dtype: str) -> None:
    values = _values(400).nan_to_num(0, 0, 0)
    values = values[(values.abs() < 60_000) & (values.abs() > 1e-6)]
    num = 2000
    wide = values.repeat_interleave(num)
    found = rounded(wide, dtype, KEYS, 0).view(-1, num)
    stored = found.to(getattr(torch, dtype))
    assert stored.float().equal(found)  # the dtype holds them exactly
    nearest = values.to(getattr(torch, dtype)).float()
    low, high = found.amin(1), found.amax(1)
    is_between = (low <= values) & (values <= high)
    assert (is_between | ((low == high) & (low == nearest))).all()  # too near to one of them
    assert ((low == nearest) | (high == nearest)).all()
    differ = low < high
    assert differ.double().mean() > 0.9
    off = ((found.double().mean(1) - values.double()).abs() / (high - low).double())[differ]
    assert (off * math.sqrt(4 * num)).max() < 5  # standard errors, at most


def _merge(folder: Path, name: str, **more: Any) -> dict[str, torch.Tensor]:
    options = more.pop("options", outliermerge.RunOptions())
    spec = {
        "merge_method": more.pop("method", "task_arithmetic"),
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "a")}, {"model": str(folder / "b")}],
        "parameters": {"weight": 0.5},
        **more,
    }
    outliermerge.run(spec, output=folder / name, options=options)
    return load_folder(folder / name)


def _family(folder: Path, dtype: torch.dtype, num: int = 300) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "l.weight": torch.randn(num, 300, generator=generator) * 0.02,
        "l.bias": torch.randn(300, generator=generator),
        "same": torch.randn(9, 9, generator=generator),
    }
    save_tensors(folder / "base", {n: t.to(dtype) for n, t in base.items()})
    for name in "ab":
        task = {
            n: t.to(dtype).float() + 5e-5 * torch.randn(t.shape, generator=generator)
            for n, t in base.items()
            if n != "same"
        }
        save_tensors(folder / name, {**task, "same": base["same"].to(dtype)})


def test_the_mean_over_seeds_is_the_merge_and_nearest_loses_a_part(tmp_path: Path) -> None:
    _family(tmp_path, torch.bfloat16, num=256)
    base = load_folder(tmp_path / "base")["l.weight"].double()
    exact = _merge(tmp_path, "exact", out_dtype="float32")["l.weight"].double() - base
    nearest = _merge(tmp_path, "nearest")["l.weight"].double() - base
    drawn = torch.stack(
        [
            _merge(tmp_path, f"out{seed}", rounding="stochastic", seed=seed)["l.weight"].double()
            for seed in range(6)
        ]
    )
    task = exact.flatten()

    def kept(delta: torch.Tensor) -> float:
        return float(delta.flatten() @ task / (task @ task))

    shares = torch.tensor([kept(each - base) for each in drawn], dtype=torch.float64)
    error = float(shares.std()) / math.sqrt(len(shares))
    assert abs(float(shares.mean()) - 1) < 4 * error < 0.02
    assert kept(nearest) < 0.85  # of so small a task vector
    assert len({each.numpy().tobytes() for each in drawn}) == len(drawn)


def test_the_bytes_are_the_same_on_all_ways(tmp_path: Path) -> None:
    _family(tmp_path, torch.bfloat16)
    more = {"rounding": "stochastic", "seed": 7}
    first = _merge(tmp_path, "out", **more)
    for number, options in enumerate(
        [
            outliermerge.RunOptions(threads=3, memory="3MiB"),
            outliermerge.RunOptions(kernels=False),
        ]
    ):
        again = _merge(tmp_path, f"out{number}", options=options, **more)
        assert all(first[name].equal(again[name]) for name in first)
    spec = tmp_path / "out" / "outliermerge.json"
    for part in (2, 1):
        run_part(outliermerge.plan(spec), tmp_path / "parts", part, 2)
    join(outliermerge.plan(spec), tmp_path / "parts")
    parts = load_folder(tmp_path / "parts")
    assert all(first[name].equal(parts[name]) for name in first)
    assert first["same"].equal(load_folder(tmp_path / "base")["same"])


def test_copies_into_a_smaller_dtype_are_rounded_at_random_too(tmp_path: Path) -> None:
    _family(tmp_path, torch.float32, num=32)
    same = load_folder(tmp_path / "base")["same"]
    for kernels in (True, False):
        options = outliermerge.RunOptions(kernels=kernels)
        out = _merge(
            tmp_path, f"out{kernels}", out_dtype="float16", rounding="stochastic", options=options
        )
        assert not out["same"].equal(same.half())
        assert (out["same"].float() - same).abs().max() < 2.0**-9
    assert load_folder(tmp_path / "outTrue")["same"].equal(out["same"])


def test_the_words_are_checked(tmp_path: Path) -> None:
    spec = "merge_method: linear\nmodels:\n- model: a\nrounding: random\n"
    with pytest.raises(outliermerge.SpecError, match=r":4:\d+: rounding: .*nearest.*stochastic"):
        outliermerge.load_spec(_written(tmp_path, spec))
    spec = "name: s\nmerge_method: linear\nrounding: stochastic\nmodels:\n- model: a\n---\n"
    spec += "merge_method: linear\nmodels:\n- model: s\n"
    with pytest.raises(outliermerge.SpecError, match=r":3:1: .*stage has no `rounding`"):
        outliermerge.load_spec(_written(tmp_path, spec))


def _written(folder: Path, text: str) -> Path:
    (folder / "spec.yaml").write_text(text)
    return folder / "spec.yaml"
