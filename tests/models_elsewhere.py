"""Three small models on a server of ranges, for the tests of models elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from range_server import RangeServer
from safetensors.torch import save_file

from outliermerge.storage import ranges

NAMES = ("base", "a", "b")
INDEX = "model.safetensors.index.json"


def save_model(folder: Path, seed: int) -> Path:
    """Save a model of two shards, a norm among them, and files beside."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    weight_map = {}
    for number in range(2):
        tensors = {
            f"model.layers.{number}.w": torch.randn(300, 257, generator=generator) / 50,
            f"model.layers.{number}.norm": torch.randn(257, generator=generator),
        }
        file = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({k: v.half() for k, v in tensors.items()}, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@contextmanager
def models_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """Save the models in a folder, and serve them."""
    for seed, name in enumerate(NAMES):
        save_model(folder / "bucket" / name, seed)
    monkeypatch.setattr(ranges, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(ranges, "LONGEST_WAIT_SECONDS", 0.01)
    with RangeServer(folder) as server:
        for name, value in server.s3().items():
            monkeypatch.setenv(name, value)
        yield server


def spec_of(at: str, method: str = "ties") -> dict[str, Any]:
    density = {"parameters": {"density": 0.3}} if method in ("ties", "della") else {}
    return {
        "merge_method": method,
        "base_model": f"{at}/base",
        "models": [{"model": f"{at}/a"}, {"model": f"{at}/b"}],
        "dtype": "float16",
        **density,
    }


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}
