"""Models of some layers, and a bucket for their merges, for the tests of outputs in stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_server import BucketServer
from safetensors.torch import save_file

from outliermerge.output import bucket_writer
from outliermerge.storage import bucket as buckets
from outliermerge.storage import ranges

NAMES, NUM_LAYERS = ("base", "a", "b"), 6


def save_layers(folder: Path, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for number in range(NUM_LAYERS):
        start = f"model.layers.{number}"
        tensors[f"{start}.mlp.weight"] = (torch.randn(300, 257, generator=draw) / 50).half()
        tensors[f"{start}.norm.weight"] = torch.randn(257, generator=draw).half()
        tensors[f"{start}.steps"] = torch.arange(5) + number
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "test", "num_hidden_layers": NUM_LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


def spec_of(at: Path | str, method: str = "ties", **more: Any) -> dict[str, Any]:
    base = {} if method == "linear" else {"base_model": f"{at}/base"}
    density = {"parameters": {"density": 0.3}} if method in ("ties", "della") else {}
    models = [{"model": f"{at}/a"}, {"model": f"{at}/b"}]
    return {"merge_method": method, "models": models, "dtype": "float16"} | base | density | more


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def weights_in(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith("model")}


@contextmanager
def bucket_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """Serve a bucket; parts of uploads are small, and a tensor is larger than the window."""
    monkeypatch.setattr(ranges, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(ranges, "LONGEST_WAIT_SECONDS", 0.005)
    monkeypatch.setattr(buckets, "PART_BYTES", 50_000)
    monkeypatch.setattr(bucket_writer, "WINDOW_BYTES", 100_000)
    with BucketServer(folder) as served:
        for name, value in served.s3().items():
            monkeypatch.setenv(name, value)
        yield served
