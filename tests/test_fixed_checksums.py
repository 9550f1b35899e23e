"""Outputs keep their bytes: specs over fixed inputs, against the checksums that were once written.

The inputs are made of integers, so that they are the same on every machine. Where a change is
meant to alter bytes, `python tests/test_fixed_checksums.py` writes the checksums anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import outliermerge

FIXED = Path(__file__).with_suffix(".json")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = {
    "model.embed_tokens.weight": (40, 32),
    "model.layers.0.self_attn.q_proj.weight": (96, 64),
    "model.layers.0.mlp.up_proj.weight": (160, 96),
    "model.layers.1.self_attn.q_proj.weight": (96, 64),
    "model.layers.1.mlp.up_proj.weight": (160, 96),
    "model.layers.2.self_attn.q_proj.weight": (96, 64),
    "model.layers.2.mlp.up_proj.weight": (160, 96),
    "model.norm.weight": (37,),
    "long.bias": (70_001,),  # more than a chunk
    "conv.weight": (6, 3, 5, 5),
    "scalar": (),
    "empty": (0, 4),
    "steps": (3,),  # of integers
}


def _normal(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return values that are about normal, and exact in float32: sums of twelve small integers."""
    drawn = np.random.Generator(np.random.PCG64(seed)).integers(-512, 513, (12, *shape))
    return torch.from_numpy(np.asarray(drawn.sum(0))).float() / 1024


def _states(dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("base", "a", "b", "c")}
    for number, (name, shape) in enumerate(SHAPES.items()):
        drawn = _normal(1000 + number, shape)
        for place, state in enumerate(states.values()):
            if name == "steps":
                state[name] = torch.tensor([1, 2, 3])
                continue
            moved = _normal(10 * number + place, shape) / 16 if place else 0
            state[name] = (drawn + moved).to(dtype)
    return states


def _adapter(folder: Path) -> None:
    """Write a LoRA of rank 4 on the attention of all layers."""
    folder.mkdir()
    names = [name for name in SHAPES if name.endswith("q_proj.weight")]
    state = {}
    for number, name in enumerate(names):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        state[f"{key}.lora_A.weight"] = _normal(5000 + number, (4, 64)) / 8
        state[f"{key}.lora_B.weight"] = _normal(6000 + number, (96, 4)) / 8
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_inputs(folder: Path) -> None:
    for label, dtype in DTYPES.items():
        for name, state in _states(dtype).items():
            (folder / f"{label}-{name}").mkdir()
            save_file(
                state, folder / f"{label}-{name}/model.safetensors", metadata={"format": "pt"}
            )
    save_file(_states(torch.float32)["a"], folder / "single.safetensors")
    pickled = folder / "f32-bin"
    pickled.mkdir()
    torch.save(_states(torch.float32)["a"], pickled / "pytorch_model.bin")
    renamed = folder / "f32-renamed"
    renamed.mkdir()
    state = {f"wrapped.{name}": value for name, value in _states(torch.float32)["b"].items()}
    save_file(state, renamed / "model.safetensors", metadata={"format": "pt"})
    _adapter(folder / "lora")


def _spec(method: str, label: str, *models: Any, base: bool = True, **more: Any) -> dict[str, Any]:
    listed = [m if isinstance(m, dict) else {"model": m} for m in models or ("a", "b", "c")]
    for entry in listed:
        if entry["model"] in "abc":
            entry["model"] = f"{label}-{entry['model']}"
    spec = {"merge_method": method, "models": listed, **more}
    return ({"base_model": f"{label}-base"} if base else {}) | spec


def make_specs() -> dict[str, dict[str, Any]]:
    specs: dict[str, dict[str, Any]] = {}
    for label in DTYPES:
        specs |= {
            f"{label}: linear": _spec("linear", label, base=False),
            f"{label}: linear, weights": _spec(
                "linear",
                label,
                {"model": "a", "parameters": {"weight": 0.3}},
                {"model": "b", "parameters": {"weight": 0.9}},
                base=False,
                parameters={"normalize": False},
            ),
            f"{label}: task_arithmetic": _spec(
                "task_arithmetic", label, parameters={"lambda": 0.7, "weight": 0.4}
            ),
            f"{label}: ties": _spec("ties", label, parameters={"density": 0.3}),
            f"{label}: ties, all": _spec(
                "ties", label, parameters={"density": 0.55, "normalize": False, "lambda": 1.2}
            ),
            f"{label}: min_sigma": _spec("min_sigma", label),
            f"{label}: min_sigma, t": _spec("min_sigma", label, parameters={"t": 1.25}),
            f"{label}: passthrough": _spec("passthrough", label, "a", base=False),
        }
    layers = [0.1, 0.5, 0.9]
    specs |= {
        "by filters": _spec(
            "task_arithmetic",
            "f32",
            parameters={"weight": [{"filter": "mlp", "value": 0.2}, {"value": 0.8}]},
        ),
        "by depth": _spec("task_arithmetic", "f32", parameters={"weight": layers}),
        "out_dtype": _spec("min_sigma", "f32", out_dtype="bfloat16"),
        "float64": _spec("ties", "f32", parameters={"density": 0.4}, dtype="float64"),
        "one file": _spec("min_sigma", "f32", "single.safetensors", "b"),
        "pickle": _spec("min_sigma", "f32", "f32-bin", "b"),
        "rename": _spec(
            "ties",
            "f32",
            "a",
            {"model": "f32-renamed", "rename": {"from": "^wrapped[.]", "to": ""}},
            parameters={"density": 0.5},
        ),
        "adapter": _spec("min_sigma", "f32", "f32-base+lora", "b"),
        "mixed": _spec("min_sigma", "f32", "bf16-a", "f16-b", "c"),
    }
    return specs


def checksums(spec: dict[str, Any], output: Path, **options: Any) -> dict[str, str]:
    """Run a spec; return a checksum of each file with weights."""
    outliermerge.run(spec, output=output, load_check=False, **options)
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:24]
        for path in sorted(output.glob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fixed")
    make_inputs(folder)
    return folder


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("name", make_specs())
def test_bytes_are_those_of_the_fixed_checksums(name, kernels, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    found = checksums(make_specs()[name], tmp_path / "out", kernels=kernels)
    assert found == json.loads(FIXED.read_text())[name]


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_inputs(folder)
        os.chdir(folder)
        fixed = {
            name: checksums(spec, folder / f"out{number}")
            for number, (name, spec) in enumerate(make_specs().items())
        }
    FIXED.write_text(json.dumps(fixed, indent=1) + "\n")
    print(f"wrote {FIXED}: {len(fixed)} specs")


if __name__ == "__main__":
    sys.exit(main())
