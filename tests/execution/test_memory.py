"""Memory follows the budget, not the model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors


def _family(folder: Path, num_elements: int) -> str:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(num_elements, generator=generator).bfloat16()
    save_tensors(folder / "base", {"w": base})
    for name in ("a", "b"):
        delta = torch.randn(num_elements, generator=generator).mul_(0.05).bfloat16()
        save_tensors(folder / name, {"w": base + delta})
    spec = folder / "spec.yaml"
    spec.write_text(
        f"base_model: {folder}/base\nmodels:\n- model: {folder}/a\n- model: {folder}/b\n"
    )
    return str(spec)


def _anonymous_bytes(process: subprocess.Popen) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.fixture(scope="module")
def interpreter_bytes() -> int:
    """The memory of a Python with torch."""
    code = "import torch; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()  # torch is there
        found = _anonymous_bytes(process)
        process.stdin.write(b"\n")
        process.stdin.flush()
    return found


def _peak_anonymous_bytes(arguments: list[str]) -> int:
    peak = 0
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process))
            time.sleep(0.002)
    assert process.returncode == 0
    return peak


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    return {
        num_elements: _family(tmp_path_factory.mktemp(str(num_elements)), num_elements)
        for num_elements in (5_000_000, 20_000_000)
    }


@pytest.mark.parametrize("method", ["linear", "min_sigma", "ties"])
def test_peak_memory_is_flat_in_the_models_size_and_within_the_budget(
    method, sizes, interpreter_bytes, tmp_path
):
    parameters = "parameters: {density: 0.2}\n" if method == "ties" else ""
    peaks = []
    for num_elements, spec in sizes.items():
        named = tmp_path / f"{num_elements}.yaml"
        named.write_text(f"merge_method: {method}\n{parameters}{Path(spec).read_text()}")
        out = str(tmp_path / f"out{num_elements}")
        arguments = ["-m", "outliermerge", "run", str(named), "--output", out]
        peaks.append(_peak_anonymous_bytes([*arguments, "--memory", "128MB", "--threads", "2"]))
    assert max(peaks) - interpreter_bytes < 128e6
    # The larger tensor alone is 40 MB in bfloat16 and 80 MB in float32.
    assert peaks[1] - peaks[0] < 20e6
