"""Makes Tables 1, 5, 6, 7 and Fig. 6b of arXiv 2501.10661 of real weights, beside the paper's.

    python evals/weights/tables.py

Fetches the models, trains the adapters that are not there yet (12 minutes of one processor), asks
`outliermerge stats` for every figure, and writes results.json and the tables of README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evals.weights.render import correlations, fill  # noqa: E402 # after the path that has it

RESULTS, README = Path(__file__).with_name("results.json"), Path(__file__).with_name("README.md")

MODELS = {
    "all-MiniLM-L6-v2": "all-MiniLM-L6-v2",
    "sre-embedding-model": "its fine-tune sre-embedding-model",
    "chgnet-0.2.0.pth": "CHGNet 0.2.0",
    "chgnet-0.3.0.pth": "CHGNet 0.3.0",
    "chgnet-r2scan.pth": "CHGNet r2SCAN, from 0.3.0",
    "sevennet-0-22May2024": "SevenNet-0, 22 May 2024",
    "sevennet-0-11Jul2024": "SevenNet-0, 11 July 2024",
    "sevennet-mf-0": "SevenNet-MF-0",
    "sevennet-l3i5": "SevenNet-l3i5",
    "crepe-full.pth": "CREPE full",
    "crepe-tiny.pth": "CREPE tiny",
    "resemblyzer": "Resemblyzer",
}
FINE_TUNES = {
    ("sre-embedding-model", "all-MiniLM-L6-v2"): "sre-embedding-model - MiniLM",
    ("chgnet-r2scan.pth", "chgnet-0.3.0.pth"): "CHGNet r2SCAN - 0.3.0",
    ("chgnet-0.3.0.pth", "chgnet-0.2.0.pth"): "CHGNet 0.3.0 - 0.2.0",
    ("sevennet-0-11Jul2024", "sevennet-0-22May2024"): "SevenNet-0 11 July - 22 May",
}
MINILM = "all-MiniLM-L6-v2"
SPIKES = ("sharp", "inverted T", "line")
FEWEST_LAYERS = 5
"""With four, even a perfect order has p = 0.08."""


def measure(model: Path, base: Path | None = None) -> dict[str, Any]:
    """Return what `outliermerge stats MODEL [--base BASE] --json FILE` writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stats.json"
        command = [sys.executable, "-m", "outliermerge", "stats", str(model), "--json", str(file)]
        command += ["--base", str(base)] if base is not None else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def matrices(stats: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the tensors that the row of the model counts."""
    return [
        tensor
        for tensor in stats["tensors"]
        if sum(length > 1 for length in tensor["shape"]) > 1 and tensor["std"] > 0
    ]


def row(stats: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a row of Table 1, or with the base's statistics of Table 6."""
    counted, whole = matrices(stats), stats["groups"]["model"]
    assert len(counted) == whole["num_tensors"]
    columns = ("std", "kept_ratio", "skewness", "kurtosis", "small_ratio", "kurtosis_without_small")
    found = {f"{name}_{of}": whole[f"{name}_{of}"] for name in columns for of in ("mean", "std")}
    found |= {
        "num_tensors": whole["num_tensors"],
        "labels": whole["labels"],
        "kurtosis_median": statistics.median(t["kurtosis"] for t in counted),
    }
    if base is not None:
        before = {tensor["name"]: tensor["l2_norm"] for tensor in base["tensors"]}
        norm = math.hypot(*(before[tensor["name"]] for tensor in counted))
        found["relative_norm"] = math.hypot(*(tensor["l2_norm"] for tensor in counted)) / norm
    return found


def spikes(stats: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what Table 5 says of a model's matrices that are sharp, inverted T or line."""
    columns = ("name", "label", "std", "small_ratio", "kurtosis", "kurtosis_without_small")
    return [
        {column: tensor[column] for column in columns}
        for tensor in matrices(stats)
        if tensor["label"] in SPIKES
    ]


def depth(stats: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return how σ goes with depth, by type of module of FEWEST_LAYERS or more."""
    found: dict[str, list[tuple[list[int], float]]] = {}
    for tensor in matrices(stats):
        if tensor["layer"] is not None:
            number = [int(digits) for digits in re.findall(r"\d+", tensor["layer"])]
            found.setdefault(tensor["module"], []).append((number, tensor["std"]))
    rows = {}
    for module, places in found.items():
        stds = [std for _, std in sorted(places)]
        if len(stds) >= FEWEST_LAYERS:
            rho = correlations(enumerate(stds))["spearman"]
            rows[module] = {
                "layers": len(stds), "first": stds[0], "last": stds[-1], "spearman": rho
            }  # fmt: skip
    return rows


def noise_products(file: Path, rank: int) -> None:
    """Write products of two Gaussian matrices, which LoRA's ΔW would be if nothing were learned."""
    from safetensors.torch import save_file

    from outliermerge import rng

    width = 384
    tensors = {}
    for number in range(8):
        a, b = (
            rng.standard_normal(rank, f"{side}{number}", 0, width * rank).view(width, rank)
            for side in "ab"
        )
        tensors[f"layers.{number}.weight"] = b @ a.T
    save_file(tensors, file)


def collect(models: Path) -> dict[str, Any]:
    """Fetch, train and measure all; every figure but the scores comes from the command's JSON."""
    from evals.weights.adapters import RANKS, train_all
    from evals.weights.fetch import fetch_all

    paths = fetch_all(models)
    weights = {name: measure(paths[name]) for name in MODELS}
    deltas = {
        title: (measure(paths[name], paths[base]), weights[base])
        for (name, base), title in FINE_TUNES.items()
    }
    adapters = {}
    for adapter, folder in train_all(paths[MINILM], models / "adapters"):
        stats = measure(folder, paths[MINILM])
        deltas[adapter.title] = (stats, weights[MINILM])
        adapters[adapter.title] = {
            "score": json.loads((folder / "score.json").read_text()),
            "stds": {tensor["name"]: tensor["std"] for tensor in matrices(stats)},
        }
    noise = {}
    with tempfile.TemporaryDirectory() as made:
        for rank in RANKS:
            noise_products(file := Path(made) / f"{rank}.safetensors", rank)
            noise[f"noise B·A, r={rank}"] = row(measure(file))
    titled = {MODELS[name]: stats for name, stats in weights.items()}
    changes = {title: stats for title, (stats, _) in deltas.items()}
    return {
        "weights": {title: row(stats) for title, stats in titled.items()},
        "deltas": {title: row(*pair) for title, pair in deltas.items()},
        "noise": noise,
        "spikes": {title: found for title, stats in titled.items() if (found := spikes(stats))},
        "adapters": adapters,
        "depth": {
            kind: {title: rows for title, stats in each.items() if (rows := depth(stats))}
            for kind, each in (("weights", titled), ("deltas", changes))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    options = parser.parse_args()
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)  # or the scores would depend on the number of processors
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        **collect(options.models.resolve()),
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    README.write_text(fill(README.read_text(), results))


if __name__ == "__main__":
    main()
