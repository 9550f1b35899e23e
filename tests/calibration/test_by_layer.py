"""A model that is measured one layer at a time gives what a whole one gives, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load_folder
from documents import ROOT
from PIL import Image
from text_models import save_text_model

import outliermerge
from outliermerge import OutlierMergeError
from outliermerge.calibration import by_layer
from outliermerge.cli.main import main

TEXTS = [f"number {n} is {n * n}." * (1 + n % 3) for n in range(5)]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "sliding": transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "tied": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "experts": transformers.MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("by_layer")
    save_text_model(folder / "plain", seed=0)
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name, max_shard_size="20kB")
        for file in (folder / "plain").glob("tokenizer*"):
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return folder


def both(model: Path, data: Path, folder: Path, **more: Any) -> list[Path]:
    for name, own in (("whole", False), ("layers", True)):
        outliermerge.measure(
            model, data, output=folder / name, statistics=["gram", "mean"], by_layer=own, **more
        )
    return [folder / "whole", folder / "layers"]


def assert_equal(folders: list[Path], *, least: int) -> None:
    for kind in ("gram", "mean"):
        whole, layers = (load_folder(folder / kind) for folder in folders)
        assert whole.keys() == layers.keys() and len(whole) >= least
        assert all(whole[name].equal(layers[name]) for name in whole)
    whole, layers = (json.loads((f / "statistics.json").read_text()) for f in folders)
    assert whole["tensors"] == layers["tensors"] and whole["data"] == layers["data"]
    assert whole["settings"] == layers["settings"]


@pytest.mark.parametrize("name", ["plain", "sliding", "tied"])
def test_sums_are_those_of_a_whole_model(name, place, tmp_path, monkeypatch):
    seen = []
    go_through = by_layer._Passes.go_through

    def looking(self: Any, name: str) -> None:
        there = {n for n, one in self.modules.items() if not next(one.module.parameters()).is_meta}
        seen.append((name, there))
        go_through(self, name)

    monkeypatch.setattr(by_layer._Passes, "go_through", looking)
    folders = both(place / name, place / "data.jsonl", tmp_path)
    assert seen == [(layer, {layer}) for layer, _ in seen]
    num = json.loads((place / name / "config.json").read_text())["num_hidden_layers"]
    assert [layer for layer, _ in seen] == [f"model.layers.{n}" for n in range(num)]
    assert_equal(folders, least=7 * num)


def test_the_layers_of_a_model_that_sees_are_run_in_turn_for_texts_too(place, tmp_path):
    Image.new("RGB", (32, 32), (90, 20, 200)).save(tmp_path / "a.png")
    lines = [
        {"prompt": "<image>what colour?", "completion": " red", "images": ["a.png"]},
        {"text": "two and two"},
        {"prompt": "<image>which?", "completion": " that one", "images": ["a.png"]},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = both(ROOT / "evals/family/models/base", tmp_path / "data.jsonl", tmp_path)
    assert_equal(folders, least=14)


def test_a_killed_measurement_goes_on(place, tmp_path, monkeypatch):
    written = by_layer.Partial.write_group

    def stopping(self: Any, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        written(self, number, *rest)

    options = {"output": tmp_path / "out", "statistics": "gram", "by_layer": True}
    with monkeypatch.context() as patch:
        patch.setattr(by_layer.Partial, "write_group", stopping)
        with pytest.raises(KeyboardInterrupt):
            outliermerge.measure(place / "plain", place / "data.jsonl", **options)
    assert not (tmp_path / "out").exists()
    again = []
    monkeypatch.setattr(
        by_layer.Partial, "write_group",
        lambda self, number, *rest: (again.append(number), written(self, number, *rest)),
    )  # fmt: skip
    outliermerge.measure(place / "plain", place / "data.jsonl", **options)
    assert again[0] == 2
    options["output"] = tmp_path / "wanted"
    outliermerge.measure(place / "plain", place / "data.jsonl", **options)
    found, wanted = (load_folder(tmp_path / name / "gram") for name in ("out", "wanted"))
    assert found.keys() == wanted.keys() and all(found[n].equal(wanted[n]) for n in wanted)


def test_a_model_that_does_not_fit_is_measured_by_layer(place, tmp_path, monkeypatch):
    monkeypatch.setattr(by_layer, "free_memory_bytes", lambda: 50_000)
    given = ["measure", str(place / "plain"), "--data", str(place / "data.jsonl"), "-q"]
    given += ["-o", str(tmp_path / "out"), "--max-tokens", "8"]
    assert main([*given, "--statistics", "gram"]) == 0
    assert load_folder(tmp_path / "out/gram")


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("plain", {"statistics": ["fisher"]}, "Fisher information needs the whole model in memory"),
        ("experts", {"statistics": ["gram"]}, "is no tensor of its files as it is, so that the"),
    ],
)
def test_what_cannot_be_measured_by_layer_is_told(name, more, said, place, tmp_path):
    with pytest.raises(OutlierMergeError, match=said):
        outliermerge.measure(
            place / name, place / "data.jsonl", output=tmp_path / "x", by_layer=True, **more
        )
    assert not (tmp_path / "x").exists()


def test_too_many_samples_are_refused_before_a_pass(place, tmp_path, monkeypatch):
    monkeypatch.setattr(by_layer, "free_memory_bytes", lambda: 5_000)
    with pytest.raises(OutlierMergeError, match=r"5 samples hold up to .* take fewer samples"):
        outliermerge.measure(
            place / "plain", place / "data.jsonl", output=tmp_path / "x", statistics="gram"
        )


def test_a_layer_that_is_called_twice_is_refused(place, tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(
        modeling_llama.LlamaModel, "forward", _twice(modeling_llama.LlamaModel.forward)
    )
    with pytest.raises(OutlierMergeError, match="is called more than once in a pass"):
        outliermerge.measure(
            place / "plain", place / "data.jsonl", output=tmp_path / "x", statistics="gram",
            by_layer=True,
        )  # fmt: skip


def _twice(forward: Any) -> Any:
    def called(self: Any, *given: Any, **named: Any) -> Any:
        forward(self, *given, **named)
        return forward(self, *given, **named)

    return called
