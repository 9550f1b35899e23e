"""An output never replaces what its merge reads, in folders and in stores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_server import BucketServer
from kinds import ADDED, save_llama
from outputs_elsewhere import bucket_served, files_of
from safetensors.torch import save_file

import outliermerge
from outliermerge.errors import OutlierMergeError

pytest.importorskip("obstore")

NAMES = ("base", "one", "other")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three Llamas, and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        save_llama(folder / name, seed=seed, added=[ADDED])  # rows of another number than columns
    (folder / "adapter").mkdir()
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    low = {f"{start}.lora_A.weight": torch.ones(2, 8), f"{start}.lora_B.weight": torch.ones(8, 2)}
    save_file(low, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def server(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BucketServer]:
    with bucket_served(tmp_path / "served", monkeypatch) as served:
        yield served


def _run(spec: dict[str, Any], output: str) -> None:
    outliermerge.run(spec | {"dtype": "float32"}, output=output, overwrite=True)


def _model(at: str, models: Path, output: str) -> None:
    both = [{"model": f"{models}/one"}, {"model": f"{at}/other"}]
    _run({"merge_method": "linear", "models": both}, output)


def _base_of_an_adapter(at: str, models: Path, output: str) -> None:
    adapted = {"model": f"{at}/other+{models}/adapter"}
    _run({"merge_method": "linear", "models": [{"model": f"{models}/one"}, adapted]}, output)


def _tokenizer(at: str, models: Path, output: str) -> None:
    both = [{"model": f"{models}/{name}"} for name in ("base", "one")]
    tokenizer = {"source": f"{at}/other"}
    _run({"merge_method": "linear", "models": both, "tokenizer": tokenizer}, output)


def _tokens_of_a_row(at: str, models: Path, output: str) -> None:
    """A model of which one token's row is read, and a union's tokenizer."""
    both = [{"model": f"{models}/{name}"} for name in ("base", "one")]
    tokens = {"code": {"source": f"{at}/other"}}
    tokenizer = {"source": "union", "tokens": tokens}
    spec = {"merge_method": "linear", "models": [*both, {"model": f"{at}/other"}]}
    _run(spec | {"tokenizer": tokenizer}, output)


def _donor(at: str, models: Path, output: str) -> None:
    model = f"{models}/base"
    outliermerge.transplant(model, f"{at}/other", output=output, method="mean", overwrite=True)


def _expert(at: str, models: Path, output: str) -> None:
    experts = [{"source_model": f"{models}/one"}, {"source_model": f"{at}/other"}]
    spec = {"base_model": f"{models}/base", "gate_mode": "random", "experts": experts}
    outliermerge.moe(spec, output=output, overwrite=True)


READING = [_model, _base_of_an_adapter, _tokenizer, _tokens_of_a_row, _donor, _expert]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("read", READING)
@pytest.mark.parametrize("below", ["", "/deeper", "/.."])
def test_an_output_in_a_store_replaces_nothing_that_is_read(
    models: Path, server: BucketServer, read: Callable[[str, Path, str], None], below: str
) -> None:
    at = "s3://bucket/all"
    copy = {"merge_method": "passthrough", "models": [{"model": f"{models}/other"}]}
    outliermerge.run(copy, output=f"{at}/other")  # an output, so that it could be overwritten
    before, output = server.objects(), f"{at}/other{below}".replace("/other/..", "")
    with pytest.raises(OutlierMergeError, match="is, holds or is inside the model") as caught:
        read(at, models, output)
    assert str(caught.value).startswith(f"{output}: ") and f"{at}/other" in str(caught.value)
    assert server.objects() == before


@pytest.mark.parametrize("read", READING)
def test_an_output_in_a_folder_replaces_nothing_that_is_read(
    models: Path, tmp_path: Path, read: Callable[[str, Path, str], None]
) -> None:
    copy = {"merge_method": "passthrough", "models": [{"model": f"{models}/other"}]}
    outliermerge.run(copy, output=tmp_path / "all" / "other")
    before = files_of(tmp_path)
    for output in (f"{tmp_path}/all/other", f"{tmp_path}/all"):
        with pytest.raises(OutlierMergeError, match=r"is(,| or) holds"):
            read(f"{tmp_path}/all", models, output)
    assert files_of(tmp_path) == before


def test_a_tokenizer_is_found_behind_a_link(models: Path, tmp_path: Path) -> None:
    copy = {"merge_method": "passthrough", "models": [{"model": f"{models}/other"}]}
    outliermerge.run(copy, output=tmp_path / "real")
    (tmp_path / "other").symlink_to("real")
    with pytest.raises(OutlierMergeError, match="is or holds the file"):
        _tokenizer(str(tmp_path), models, f"{tmp_path}/real")
