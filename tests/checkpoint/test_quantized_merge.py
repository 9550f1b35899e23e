"""Merges of quantised checkpoints: the same as of the models that the libraries dequantise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import as_many_as, family, load_folder
from quantizing import METHODS_OF_QUANTISING, PACKED, dequantised, quantise
from stopping import stopping_after

import outliermerge
from outliermerge.cli.main import main
from outliermerge.methods.table import METHODS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    base, tuned = family("llama", folder, num_models=3, dtype=torch.float32)
    paths = {"base": base}
    for kind, path in zip(METHODS_OF_QUANTISING, tuned, strict=True):
        paths[kind] = quantise(path, folder / kind, kind)
        paths[f"{kind} dequantised"] = dequantised(paths[kind], folder / f"{kind}-plain")
    return paths


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "passthrough"])
def test_quantised_task_models_merge_as_their_dequantised_selves(method, models, tmp_path):
    def run(suffix: str) -> dict[str, torch.Tensor]:
        names = [f"{kind}{suffix}" for kind in METHODS_OF_QUANTISING]
        spec = {
            "merge_method": method,
            "base_model": str(models["base"]),
            "models": [{"model": str(models[name])} for name in as_many_as(method, names)],
        }
        output = outliermerge.run(spec, output=tmp_path / f"out{suffix}").output
        assert outliermerge.verify(output) == []
        return load_folder(output)

    found, expected = run(""), run(" dequantised")
    assert found.keys() == expected.keys() == load_folder(models["base"]).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", METHODS_OF_QUANTISING)
def test_the_output_of_a_quantised_base_is_not_quantised(kind, models, tmp_path):
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(models[kind]),
        "models": [{"model": str(models["nf4" if kind != "nf4" else "int8"])}],
        "out_dtype": "float32",
    }
    plan = outliermerge.plan(spec)
    assert any("quantised with" in note for note in plan.notes)
    output = outliermerge.run(plan, output=tmp_path / "out").output
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        output, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32


def test_the_bytes_do_not_depend_on_memory_or_threads(models, tmp_path):
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(models["base"]),
        "models": [{"model": str(models[kind])} for kind in METHODS_OF_QUANTISING],
    }
    one = outliermerge.run(spec, output=tmp_path / "one", threads=1).output
    two = outliermerge.run(spec, output=tmp_path / "two", threads=2, memory="8MB").output
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", PACKED)
def test_packed_models_merge_by_the_command_line_and_go_on(kind, models, tmp_path, monkeypatch):
    task = quantise(models["fp8 dequantised"], tmp_path / "task", kind)
    plain = dequantised(task, tmp_path / "plain")
    original, found = load_folder(models["fp8 dequantised"]), load_folder(plain)
    for name, value in original.items():  # a code's step is a fifteenth of a group's range
        torch.testing.assert_close(found[name], value, rtol=0, atol=float(value.abs().max()) / 3)

    def spec(model: Path) -> str:
        path = tmp_path / f"{model.name}.yaml"
        path.write_text(
            f"merge_method: task_arithmetic\nbase_model: {models['base']}\n"
            f"models:\n  - model: {model}\nparameters:\n  weight: 0.5\n"
        )
        return str(path)

    def run(model: Path, output: str, *more: str) -> int:
        return main(["run", spec(model), "--output", str(tmp_path / output), "--threads=1", *more])

    assert run(plain, "expected") == 0
    with stopping_after(monkeypatch, 5):
        assert run(task, "out", "--memory=1MB") != 0
    assert run(task, "out", "--memory=1MB") == 0
    ours = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "expected" / "model.safetensors").read_bytes()
    assert outliermerge.verify(tmp_path / "out") == []
