"""What it costs to read task models as adapters or quantised: whole processes, alternating.

Merges two task models of 0.5B parameters by min_sigma: as plain bfloat16, as LoRA adapters, as
DoRA adapters, as fp8, and as bitsandbytes int8 and nf4 (7 GB of disk, removed at the end). Beside
it the other way to merge two adapters: peft's merge_and_unload of each to disk, then the merge.

    python benchmarks/inputs.py [--runs 3] [--size 0.5B]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from build_checkpoints import SHAPES, build
from measure import alternate, medians, progress, script, surroundings
from safetensors.torch import load_file, save_file

RESULT = Path(__file__).parent / "results" / "inputs.json"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
MERGE_BY_PEFT = """
import sys, torch, transformers, peft
base, out, *adapters = sys.argv[1:]
for number, adapter in enumerate(adapters):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(f"{out}{number}")
"""


def adapter(base: Path, folder: Path, *, dora: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not any(f"{part}.weight" in name for part in LINEAR):
            continue
        key = f"base_model.model.{name.removesuffix('.weight')}"
        rows, columns = weight.shape
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.02
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.02
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = weight.float().norm(dim=1)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "use_dora": dora,
        "target_modules": list(LINEAR),
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def quantised(source: Path, folder: Path, kind: str) -> None:
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not any(f"{part}.weight" in name for part in LINEAR):
            tensors[name] = weight
        elif kind == "nf4":
            codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            parts = state.as_dict(packed=True)
            tensors |= {name: codes, **{f"{name}.{part}": value for part, value in parts.items()}}
        elif kind == "int8":
            most = weight.float().abs().amax(1)
            tensors[name] = (weight.float() * (127 / most)[:, None]).round().to(torch.int8)
            tensors[f"{name.removesuffix('weight')}SCB"] = most
        else:
            rows, columns = (-(-size // 128) for size in weight.shape)
            tensors[name] = (weight.float() * 1000).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((rows, columns), 1e-3)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }[kind]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--size", default="0.5B", choices=SHAPES, help="default 0.5B")
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-bench-"))
    out = folder / "out"
    try:
        base, *models = build(options.size, folder / "plain")
        kinds: dict[str, list[Path]] = {"plain": models}
        for kind in ("lora", "dora", "fp8", "int8", "nf4"):
            kinds[kind] = [folder / f"{kind}{number}" for number in range(2)]
            for number, path in enumerate(kinds[kind]):
                if kind in ("lora", "dora"):
                    adapter(base, path, dora=kind == "dora", seed=number)
                else:
                    quantised(models[number], path, kind)
        kinds["merged by peft"] = [folder / "peft0", folder / "peft1"]
        commands = {
            "merge_and_unload of both": [
                sys.executable, "-c", MERGE_BY_PEFT, str(base), str(folder / "peft"),
                *map(str, kinds["lora"]),
            ]
        }  # fmt: skip
        for kind, paths in kinds.items():
            spec = {
                "merge_method": "min_sigma",
                "base_model": str(base),
                "models": [{"model": str(path)} for path in paths],
            }
            path = folder / f"{kind}.yaml"
            path.write_text(json.dumps(spec))
            commands[kind] = [
                script("outliermerge"),
                "run",
                str(path),
                "--output",
                str(out),
                "--no-load-check",
            ]

        def clear() -> None:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()

        runs, failed = alternate(commands, options.runs, before=clear, label="inputs")
        if failed:
            raise SystemExit("\n".join(failed.values()))
        report = surroundings(options.runs, also=("peft", "transformers", "bitsandbytes")) | {
            "size": options.size,
            "note": "medians of alternating runs, whole process, warm cache; two task models, "
            "min_sigma; rank 16 on all linear layers",
            "cases": {kind: medians(measured) for kind, measured in runs.items()},
        }
        plain = report["cases"]["plain"]["wall_seconds"]
        for case in report["cases"].values():
            case["wall_over_plain"] = round(case["wall_seconds"] / plain, 2)
        options.results.write_text(json.dumps(report, indent=1) + "\n")
        progress(f"wrote {options.results}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
