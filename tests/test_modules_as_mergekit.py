"""Specs with modules through mergekit 0.1.5, in this process: the outputs must agree."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder
from parity.both import PLACED_OTHERWISE, by_mergekit
from parity.models import family_of
from stacks import save

import outliermerge

PARTS = ("text_decoder", "vision_tower", "multi_modal_projector")


def of(*models: tuple[str, float], **parameters: Any) -> dict[str, Any]:
    entries = [{"model": model, "parameters": {"weight": weight}} for model, weight in models]
    return {"models": entries} | ({"parameters": parameters} if parameters else {})


def sliced(*ranges: tuple[str, int, int]) -> dict[str, Any]:
    return {
        "slices": [
            {"sources": [{"model": model, "layer_range": [start, stop]}]}
            for model, start, stop in ranges
        ]
    }


ONE = of(("base", 1))
SPECS: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "modules": {
            "text_decoder": of(("base", 0.6), ("m0", 0.4)),
            "vision_tower": of(("base", 0.2), ("m0", 0.3), ("m1", 0.5)),
            "multi_modal_projector": of(("base", 0), ("m1", 1)),
        },
    },
    "gradients": {
        "merge_method": "task_arithmetic",
        "parameters": {"lambda": 0.7},
        "modules": {
            "text_decoder": {
                "models": [{"model": "m0", "parameters": {"weight": [0, 0.5, 1]}}],
            },
            "vision_tower": of(("m1", 0.4), **{"lambda": [0.2, 1.4]}),
            "multi_modal_projector": of(("m0", 0.5), ("m1", 0.25)),
        },
    },
    "slices": {
        "merge_method": "passthrough",
        "modules": {
            "text_decoder": sliced(("base", 0, 2), ("m0", 1, 2)),
            "vision_tower": sliced(("base", 0, 1), ("m1", 1, 2)),
            "multi_modal_projector": {"models": [{"model": "m0"}]},
        },
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return family_of("qwen2_vl", "bfloat16", folder)


@pytest.mark.parametrize("name", SPECS)
def test_modules_agree_with_mergekit(name, models, tmp_path):
    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: str(models / v) if k == "model" else placed(v) for k, v in value.items()}
        return [placed(each) for each in value] if isinstance(value, list) else value

    spec = placed(SPECS[name]) | {"dtype": "float32"}
    if name != "slices":
        spec["base_model"] = str(models / "base")
    theirs = by_mergekit(copy.deepcopy(spec), tmp_path / "theirs")
    spec["base_model"] = str(models / "base")
    ours = load_folder(outliermerge.run(spec, output=tmp_path / "ours", load_check=False).output)
    assert ours.keys() == theirs.keys()
    skipped = PLACED_OTHERWISE["qwen2_vl"] if name == "gradients" else ()
    for tensor, mine in ours.items():
        other = theirs[tensor]
        assert mine.shape == other.shape, tensor
        if not tensor.startswith(skipped):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6, msg=tensor)


OF_T5: dict[str, dict[str, Any]] = {
    "gradients": {
        "merge_method": "linear",
        "modules": {
            "encoder": {
                "models": [
                    {"model": "base", "parameters": {"weight": [0.2, 0.9]}},
                    {"model": "m0", "parameters": {"weight": 0.4}},
                ]
            },
            "decoder": of(("base", 0.5), ("m1", 0.25)),
        },
    },
    "slices": {
        "merge_method": "passthrough",
        "modules": {
            "encoder": {"models": [{"model": "m0"}]},
            "decoder": sliced(("base", 0, 2), ("m0", 1, 3)),
        },
    },
}


@pytest.mark.parametrize("name", OF_T5)
def test_encoders_and_decoders_agree_with_mergekit(name, tmp_path):
    family = save("t5-gated", tmp_path, num_layers=3, num_models=2)

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: str(family[v]) if k == "model" else placed(v) for k, v in value.items()}
        return [placed(each) for each in value] if isinstance(value, list) else value

    spec = placed(OF_T5[name]) | {"dtype": "float32"}
    theirs = by_mergekit(copy.deepcopy(spec), tmp_path / "theirs")
    spec["base_model"] = str(family["base"])
    ours = load_folder(outliermerge.run(spec, output=tmp_path / "ours").output)
    assert ours.keys() - theirs.keys() == {"shared.weight"}  # mergekit leaves it out
    assert ours.pop("shared.weight").equal(load_folder(family["base"])["shared.weight"])
    for tensor, mine in ours.items():
        torch.testing.assert_close(mine, theirs[tensor], rtol=1e-6, atol=1e-6, msg=tensor)
