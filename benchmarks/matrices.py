"""Methods on whole matrices beside FusionBench's own functions, on tensors of ViT-B/32's shapes.

Both merge the same float32 tensors of one vision tower in memory, on the CPU, with all its threads;
runs alternate. FusionBench is in an environment of its own (`make test-interop` makes it):

    .venv-interop/bin/python benchmarks/matrices.py [--runs 3] [--models 8] [--layers 12]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import progress, surroundings
from torch import Tensor

import outliermerge

RESULT = Path(__file__).parent / "results" / "matrices.json"
METHODS = ("iso_c", "iso_cts", "tsv_m")
LAYER = {
    **{f"self_attn.{part}_proj": (768, 768) for part in ("q", "k", "v", "out")},
    "mlp.fc1": (3072, 768),
    "mlp.fc2": (768, 3072),
}


def drawn(num_layers: int, seed: int) -> dict[str, Tensor]:
    """Return tensors of the encoder's layers; task vectors of low rank, as of trained models."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(num_layers):
        for name, (rows, columns) in LAYER.items():
            small = torch.randn(rows, 64, generator=generator) @ torch.randn(
                64, columns, generator=generator
            )
            noise = torch.randn(rows, columns, generator=generator)
            found[f"encoder.layers.{layer}.{name}.weight"] = 1e-4 * (small / 8 + noise / 4)
            found[f"encoder.layers.{layer}.{name}.bias"] = 1e-4 * torch.randn(rows)
    return found


def theirs(method: str, deltas: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what FusionBench merges task vectors to."""
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    with contextlib.redirect_stdout(io.StringIO()):
        if method == "iso_c":
            return iso_c(deltas, accelerator="cpu")
        if method == "iso_cts":
            return iso_cts(deltas, 0.8, accelerator="cpu")
        return TSVM_utils.compute_and_sum_svd_mem_reduction(deltas, accelerator="cpu")


def timed(function: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, float], dict[str, Tensor]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return {
        "wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu
    }, result  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    options = parser.parse_args()
    report = surroundings(options.runs, also=("fusion-bench", "torch"))
    report |= {"num_models": options.models, "num_layers": options.layers, "cases": []}
    base = {name: torch.zeros_like(tensor) for name, tensor in drawn(options.layers, 0).items()}
    deltas = [drawn(options.layers, 1 + number) for number in range(options.models)]
    for method in METHODS:
        runs: dict[str, list[dict[str, float]]] = {"outliermerge": [], "FusionBench": []}
        for _ in range(options.runs):
            own, merged = timed(
                lambda m=method: outliermerge.merge_state_dicts(deltas, base=base, method=m)
            )
            other, wanted = timed(lambda m=method: theirs(m, deltas))
            runs["outliermerge"].append(own)
            runs["FusionBench"].append(other)
        far = max(
            float((merged[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted
        )
        report["cases"].append({"method": method, "runs": runs, "relative_distance": far})
        ratios = {
            key: statistics.median(one[key] for one in runs["FusionBench"])
            / statistics.median(one[key] for one in runs["outliermerge"])
            for key in ("wall_seconds", "cpu_seconds")
        }
        progress(f"{method}: {ratios}, relative distance {far:.1e}")
    report["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
