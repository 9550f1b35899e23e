"""What transformers makes of an output: it loads whole, and computes what it should."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import KINDS, family, load_folder
from safetensors.torch import save_file
from torch import Tensor

import outliermerge


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    @cache
    def build(kind: str, dtype: torch.dtype = torch.float32, shard_size: str = "50KB"):
        return family(kind, tmp_path_factory.mktemp(kind), dtype=dtype, shard_size=shard_size)

    return build


def spec_of(method: str, base: Path, models: list[Path], **more: Any) -> dict[str, Any]:
    if method == "passthrough":
        models = models[:1]
    spec = {"merge_method": method, "models": [{"model": str(m)} for m in models]} | more
    return spec if method in ("linear", "passthrough") else spec | {"base_model": str(base)}


def load(folder: Path) -> transformers.PreTrainedModel:
    """Load as the architecture that config.json names; nothing may be missing or left over."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], (problem, info[problem])
    return model.eval()


def logits(kind: str, model: transformers.PreTrainedModel) -> Tensor:
    tokens = torch.tensor([[1, 5, 90, 90, 90, 90, 7, 3]])
    inputs: dict[str, Tensor] = {"input_ids": tokens}
    if kind == "llava":
        generator = torch.Generator().manual_seed(9)
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=generator).to(model.dtype)
    with torch.no_grad():
        return model(**inputs).logits.double()


@pytest.mark.parametrize("method", ["min_sigma", "linear", "ties", "passthrough"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_loads_in_its_architecture(kind, method, families, tmp_path):
    base, models = families(kind, torch.bfloat16)
    output = outliermerge.run(
        spec_of(method, base, models), output=tmp_path / "out", shard_size="40KB"
    ).output
    model = load(output)
    assert model.dtype == torch.bfloat16
    assert len(list(output.glob("*.safetensors"))) > 1
    original = load(base)
    merged, before = model.state_dict(), original.state_dict()
    assert merged.keys() == before.keys()
    changed = [n for n, t in merged.items() if not torch.equal(t, before[n])]
    floats = [n for n, t in merged.items() if t.is_floating_point()]
    assert len(changed) > 0.9 * len(floats)


def test_a_key_that_is_left_out_is_noticed(families, tmp_path):
    base, _ = families("llama", torch.float32, "5GB")
    folder = tmp_path / "short"
    shutil.copytree(base, folder)
    tensors = load_folder(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="missing_keys"):
        load(folder)


def merged_by_hand(base: Path, models: list[Path]) -> dict[str, Tensor]:
    """The min-σ rule of two models in float64."""
    weights, inputs = load_folder(base), [load_folder(model) for model in models]
    merged = {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            merged[name] = tensor
            continue
        deltas = torch.stack([model[name].double() - tensor.double() for model in inputs])
        sigma = deltas.flatten(1).std(1, correction=0).min()
        kept = torch.where(deltas.abs() > 2 * sigma, deltas, deltas / 2)
        merged[name] = (tensor.double() + kept.sum(0)).float()
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_merge_by_hand(kind, families, tmp_path):
    base, models = families(kind)
    output = outliermerge.run(spec_of("min_sigma", base, models), output=tmp_path / "out").output
    by_hand = tmp_path / "hand"
    by_hand.mkdir()
    shutil.copy(base / "config.json", by_hand)
    save_file(merged_by_hand(base, models), by_hand / "model.safetensors", {"format": "pt"})
    found, expected, untuned = (logits(kind, load(folder)) for folder in (output, by_hand, base))
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * scale
    assert (found - untuned).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("key", ["out_dtype", "dtype"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_dtype_is_in_the_config_too(kind, key, families, tmp_path):
    base, models = families(kind)
    spec = spec_of("task_arithmetic", base, models, **{key: "bfloat16"})
    output = outliermerge.run(spec, output=tmp_path / "out").output
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, output))
    assert before["dtype"] == "float32" and after["dtype"] == "bfloat16"
    assert '"float32"' not in (output / "config.json").read_text()
    tensors = load_folder(output)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    assert {p.dtype for p in load(output).parameters()} == {torch.bfloat16}
    same = outliermerge.run(
        spec_of("task_arithmetic", base, models), output=tmp_path / "same"
    ).output
    rounded = {name: tensor.to(tensors[name].dtype) for name, tensor in load_folder(same).items()}
    assert all(torch.equal(rounded[name], tensor) for name, tensor in tensors.items())
    assert (same / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_change_of_dtype_reaches_nested_configs(families, tmp_path):
    base, models = families("llava")
    base = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["torch_dtype"] = config["vision_config"]["dtype"] = "float32"
    (base / "config.json").write_text(json.dumps(config))
    spec = spec_of("task_arithmetic", base, models, out_dtype="float16")
    output = outliermerge.run(spec, output=tmp_path / "out").output
    config["text_config"]["torch_dtype"] = config["vision_config"]["dtype"] = "float16"
    config["dtype"] = "float16"
    assert json.loads((output / "config.json").read_text()) == config
    assert load(output).dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_base_are_carried_byte_for_byte(kind, families, tmp_path):
    base, *models = (
        Path(shutil.copytree(path, tmp_path / path.name))
        for path in (families(kind)[0], *families(kind)[1])
    )
    for model in models:
        (model / "chat_template.jinja").write_text("{{ of another model }}")
    (base / "special_tokens_map.json").write_bytes('{"v":  "é"}\r\n'.encode())
    output = outliermerge.run(
        spec_of("min_sigma", base, models), output=tmp_path / "out", shard_size="5GB"
    ).output
    weights = {path.name for path in base.glob("*.safetensors*")}
    carried = {path.name for path in base.iterdir()} - weights
    assert {"chat_template.jinja", "tokenizer.json", "config.json"} <= carried
    for name in carried:
        assert (output / name).read_bytes() == (base / name).read_bytes(), name
    own = {"model.safetensors", "outliermerge.json", "README.md", "recipe.yaml"}
    assert {path.name for path in output.iterdir()} == carried | own


def to_bin(source: Path, target: Path, *, num_shards: int) -> Path:
    """Copy a checkpoint as torch.save stores it."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if ".safetensors" not in path.name:
            shutil.copy(path, target)
    tensors = load_folder(source)
    if num_shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    weight_map = {}
    for number in range(num_shards):
        file = f"pytorch_model-{number + 1:05d}-of-{num_shards:05d}.bin"
        part = dict(list(tensors.items())[number::num_shards])
        torch.save(part, target / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["min_sigma", "ties"])
def test_pytorch_files_give_the_same_bytes(method, dtype, num_shards, families, tmp_path):
    base, models = families("llama", dtype)
    bins = [to_bin(p, tmp_path / p.name, num_shards=num_shards) for p in (base, *models)]
    outputs = [
        outliermerge.run(
            spec_of(method, inputs[0], list(inputs[1:])), output=tmp_path / name
        ).output
        for name, inputs in (("safetensors", [base, *models]), ("bin", bins))
    ]
    left, right = (load_folder(output) for output in outputs)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name
    assert outliermerge.verify(outputs[1]) == []
    assert not list(outputs[1].glob("*.bin*"))
    load(outputs[1])


def test_pytorch_and_safetensors_models_go_together(families, tmp_path):
    base, models = families("bert")
    mixed = to_bin(models[1], tmp_path / "bin", num_shards=2)
    left, right = (
        load_folder(
            outliermerge.run(
                spec_of("min_sigma", base, [models[0], second]), output=tmp_path / name
            ).output
        )
        for name, second in (("left", models[1]), ("right", mixed))
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
