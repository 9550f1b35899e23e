"""Methods on whole matrices, and others, beside FusionBench's own functions, on the same files.

Each tool reads the models, merges and writes in a process of its own, on the CPU, with as many
threads as torch takes (OMP_NUM_THREADS); what it imports is not timed. Runs alternate. FusionBench
is in an environment of its own:

    make bench-fusion-bench [ARGS="--size ViT-B/32 --layers 12 --runs 3 --only iso_c"]

Writes results/matrices.json after every case. A case that is there is measured anew. The memory of
one tool alone, by the number of layers:

    make bench-fusion-bench ARGS="--tool outliermerge --layers 12 --iterations 3 --results FILE"
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from build_checkpoints import tensor_shapes
from measure import alternate, progress, surroundings
from safetensors import safe_open
from safetensors.torch import save_file
from suite import opened, save

RESULT = Path(__file__).parent / "results" / "matrices.json"
WORKER = Path(__file__).with_name("matrices_worker.py")
TOOLS = ("outliermerge", "FusionBench")
METHODS = ("iso_c", "iso_cts", "tsv_m", "wudi", "regmean", "fisher", "task_arithmetic", "ties")
LAYERS = {"ViT-B/32": 12, "1.5B": 28}
WITH_DATA = {"regmean": "gram", "fisher": "fisher"}
PARAMETERS: dict[str, dict[str, Any]] = {  # as FusionBench has them
    "fisher": {"epsilon": 1e-6},
    "ties": {"density": 0.2, "trim": "model"},
}
RANK = 64
NOTE = (
    "float32 models of this shape, changes mostly of rank 64; reading, merging and writing in a "
    "process that has imported the tool, on the CPU; a round's runs follow each other"
)


def shapes(size: str, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model by name; of a layer all are alike, so some may be left out."""
    if size == "1.5B":
        every = tensor_shapes(size)
        number = {name: name.split(".")[2] for name in every if ".layers." in name}
        return {n: s for n, s in every.items() if int(number.get(n, 0)) < num_layers}
    found: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (768,),
        "embeddings.patch_embedding.weight": (768, 3, 32, 32),
        "embeddings.position_embedding.weight": (50, 768),
    }
    for layer in range(num_layers):
        start = f"encoder.layers.{layer}."
        for name, rows, columns in (
            *((f"self_attn.{part}_proj", 768, 768) for part in ("q", "k", "v", "out")),
            ("mlp.fc1", 3072, 768),
            ("mlp.fc2", 768, 3072),
        ):
            found[f"{start}{name}.weight"] = (rows, columns)
            found[f"{start}{name}.bias"] = (rows,)
        for norm in ("layer_norm1", "layer_norm2"):
            found |= {f"{start}{norm}.weight": (768,), f"{start}{norm}.bias": (768,)}
    return found | {
        f"{n}_layernorm.{p}": (768,) for n in ("pre", "post") for p in ("weight", "bias")
    }


def build(
    every: Mapping[str, tuple[int, ...]], num_models: int, folder: Path, kinds: set[str]
) -> None:
    """Write a base, models whose changes are mostly of low rank, and statistics of each."""
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn)

    def write(tensors: dict[str, torch.Tensor], name: str) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text("{}")

    base = {name: 0.02 * normal(*shape) for name, shape in every.items()}
    write(base, "base")
    for number in range(num_models):
        changed = {}
        for name, shape in every.items():
            delta = 0.25 * normal(*shape)
            if len(shape) == 2:
                delta += normal(shape[0], RANK) @ normal(RANK, shape[1]) / RANK**0.5
            changed[name] = base[name] + 1e-3 * delta
        write(changed, f"model-{number}")
        if "gram" in kinds:
            grams = {}
            for name, shape in every.items():
                if len(shape) == 2 and "embed" not in name:
                    inputs = normal(2 * shape[1], shape[1])
                    grams[name] = inputs.T @ inputs / len(inputs)
            write(grams, f"gram-{number}")
        if "fisher" in kinds:
            write(
                {n: normal(*shape).square() * 1e-6 for n, shape in every.items()},
                f"fisher-{number}",
            )


def spec(method: str, folder: Path, num_models: int) -> dict[str, Any]:
    """Return the merge as a spec of ours."""
    models = []
    for number in range(num_models):
        model: dict[str, Any] = {"model": str(folder / f"model-{number}")}
        if kind := WITH_DATA.get(method):
            model["auxiliary"] = {kind: str(folder / f"{kind}-{number}")}
        models.append(model)
    base = {} if method in WITH_DATA else {"base_model": str(folder / "base")}
    parameters = PARAMETERS.get(method, {})
    return {"merge_method": method, **base, "models": models, "parameters": parameters}


def described(
    method: str, size: str, num_layers: int, num_models: int, now: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a case is of, and when."""
    return {
        "name": f"{method}-{size}-{num_layers}-{num_models}",
        "method": method, "size": size, "layers": num_layers, "of_layers": LAYERS[size],
        "models": num_models, "load_before": now["load_before"], "date": now["date"],
    }  # fmt: skip


def distance(folder: Path, one: str, other: str) -> float:
    """Return how far two outputs are from each other, over how far the other is from the base."""
    with (
        safe_open(folder / one / "model.safetensors", "pt") as own,
        safe_open(folder / other / "model.safetensors", "pt") as theirs,
        safe_open(folder / "base" / "model.safetensors", "pt") as base,
    ):
        apart = change = 0.0
        for name in theirs.keys():
            wanted = theirs.get_tensor(name)
            apart += float((own.get_tensor(name) - wanted).double().square().sum())
            change += float((wanted - base.get_tensor(name)).double().square().sum())
    return float((apart / change) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--size", choices=LAYERS, default="ViT-B/32")
    parser.add_argument("--layers", type=int, help="so many of them (default: all)")
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], choices=METHODS, metavar="METHOD")
    parser.add_argument("--tool", action="append", default=[], choices=TOOLS, help="default: both")
    parser.add_argument("--iterations", type=int, default=300, help="of wudi (default: 300)")
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    parser.add_argument("--folder", type=Path, help="where to build (default: TMPDIR)")
    options = parser.parse_args()
    now = surroundings(options.runs, also=("fusion-bench", "torch"))
    now["hardware"] += f", {torch.get_num_threads()} thread(s) used"
    report = opened(options.results, now, go_on=True) | {"note": NOTE}
    num_layers = options.layers or LAYERS[options.size]
    methods, tools = options.only or METHODS, options.tool or TOOLS
    PARAMETERS["wudi"] = {"iterations": options.iterations}
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-bench-", dir=options.folder))

    try:
        kinds = {WITH_DATA[method] for method in methods if method in WITH_DATA}
        build(shapes(options.size, num_layers), options.models, folder, kinds)
        for method in methods:
            case = described(method, options.size, num_layers, options.models, now)
            for tool in tools:
                own = json.dumps(spec(method, folder, options.models))
                (folder / f"{tool}.json").write_text(own)
            runs, failed = alternate(
                {tool: [sys.executable, str(WORKER), tool, str(folder)] for tool in tools},
                options.runs,
                label=case["name"],
            )
            case |= {"runs": runs} | ({"failed": failed} if failed else {})
            if len(runs) == len(TOOLS):
                case["relative_distance"] = distance(folder, *TOOLS)
            save(report, case, options.results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress(f"wrote {options.results}")


if __name__ == "__main__":
    main()
