"""Adapters of a model: `outliermerge extract` beside mergekit-extract-lora, in turn.

    python benchmarks/extract.py [--runs 3] [--size 0.1B] [--rank 16]

Errors are computed here, of both, from the files that they have written: ‖W' − W − s·BA‖ over
‖W' − W‖, of all matrices that both have factored.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from build_checkpoints import SHAPES, build
from measure import alternate, progress, script, surroundings
from safetensors import safe_open
from safetensors.torch import load_file

RESULT = Path(__file__).parent / "results" / "extract.json"
PREFIX = "base_model.model."


def errors(adapter: Path, base: Path, model: Path) -> dict[str, float]:
    """Return by tensor the relative error of an adapter's factors."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(model / "model.safetensors", "pt") as after,
    ):
        for key in tensors:
            if not key.endswith(".lora_A.weight"):
                continue
            name = key.removeprefix(PREFIX).replace(".lora_A", "")
            a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            module = name.removesuffix(".weight")
            rank = config["rank_pattern"].get(module, config["r"])
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            change = after.get_tensor(name).double() - before.get_tensor(name).double()
            found[name] = float((change - alpha / rank * (b @ a)).norm() / change.norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", choices=SHAPES, default="0.1B")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where models are written for a while")
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    options = parser.parse_args()
    report = surroundings(options.runs, also=("mergekit",))
    report |= {"size": options.size, "rank": options.rank}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        base, model = build(options.size, folder, num_models=1)
        outputs = {kind: folder / kind for kind in ("outliermerge", "randomized", "mergekit")}
        rank = str(options.rank)
        ours = [script("outliermerge"), "extract", str(model), "--base", str(base), "-q"]
        ours += ["--rank", rank, "-o"]
        theirs = [script("mergekit-extract-lora"), "--model", str(model), "--base-model", str(base)]
        theirs += ["--max-rank", rank, "--quiet", "--out-path"]
        commands = {
            "outliermerge": [*ours, str(outputs["outliermerge"])],
            "randomized": [*ours, str(outputs["randomized"]), "--randomized"],
            "mergekit": [*theirs, str(outputs["mergekit"])],
        }

        def clear() -> None:
            for kind, path in outputs.items():
                if path.exists():
                    shutil.rmtree(folder / f"{kind}-kept", ignore_errors=True)
                    path.rename(folder / f"{kind}-kept")

        runs, failed = alternate(commands, options.runs, before=clear, label=options.size)
        clear()
        report |= {"runs_of": runs, "failed": failed}
        lost = {kind: errors(folder / f"{kind}-kept", base, model) for kind in runs}
        common = set.intersection(*map(set, lost.values()))
        report["num_matrices"] = len(common)
        report["errors"] = {
            kind: {
                "rms": math.sqrt(statistics.fmean(found[name] ** 2 for name in common)),
                "largest": max(found[name] for name in common),
            }
            for kind, found in lost.items()
        }
        report["adapter_megabytes"] = {
            kind: sum(p.stat().st_size for p in (folder / f"{kind}-kept").rglob("*")) / 1e6
            for kind in runs
        }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")
    for kind in runs:
        times = statistics.median(run["wall_seconds"] for run in runs[kind])
        peak = max(run["peak_anonymous_megabytes"] for run in runs[kind])
        progress(f"{kind}: {times:.1f} s, {peak:.0f} MB, error {report['errors'][kind]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
