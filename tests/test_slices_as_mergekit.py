"""Specs with slices through mergekit 0.1.5, in this process: the outputs must agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from checkpoints import load_folder
from parity.both import assert_same_answers, by_mergekit, logits_of
from stacks import Models, save

import outliermerge
from outliermerge.methods.table import METHODS

NUM_LAYERS = 6


def by(filters: dict[str, Any], otherwise: Any) -> list[dict[str, Any]]:
    entries = [{"filter": name, "value": value} for name, value in filters.items()]
    return [*entries, {"value": otherwise}]


def source(model: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": model, "layer_range": [start, stop]}
    return entry | ({"parameters": parameters} if parameters else {})


def stack(*sources: dict[str, Any]) -> dict[str, Any]:
    return {"merge_method": "passthrough", "slices": [{"sources": [each]} for each in sources]}


WHOLE = [source(model, 0, NUM_LAYERS) for model in ("base", "m0", "m1")]
SPECS: dict[str, dict[str, Any]] = {
    "one-model-twice": stack(source("m0", 0, 4), source("m0", 2, 6)),
    "two-models": stack(source("m0", 0, 4), source("m1", 2, 6)),
    "a-layer-repeated": stack(*(source("m0", n, n + 1) for n in (0, 1, 1, 1, 2, 5, 3, 4))),
    "scaled": stack(
        source("m0", 0, 4, scale=by({"mlp": [0.5, 2]}, 1)),
        source("m1", 3, 6, scale=0.25),
        source("m0", 5, 6, scale=[3, 4]),
    ),
    "only-the-end-scaled": stack(source("m0", 2, 4), source("m1", 4, 6, scale=2.0)),
    "slerp-whole": {
        "merge_method": "slerp",
        "base_model": "base",
        "slices": [{"sources": WHOLE[:2]}],
        "parameters": {"t": by({"attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0]}, 0.4)},
    },
    "slerp-of-shifted-layers": {
        "merge_method": "slerp",
        "base_model": "base",
        "slices": [
            {"sources": [source("base", 0, 3), source("m0", 1, 4)]},
            {
                "sources": [source("m0", 2, 6), source("base", 1, 5)],
                "parameters": {"t": [0.2, 0.9]},
            },
        ],
        "parameters": {"t": [0.8, 0.1, 0.4]},
    },
    "linear-in-three": {
        "merge_method": "linear",
        "slices": [
            {"sources": [source("m0", 0, 2, weight=0.3), source("m1", 0, 2, weight=0.7)]},
            {"sources": [source("m1", 1, 5, weight=[0, 1]), source("m2", 2, 6, weight=[3, 1, 1])]},
            {"sources": [source("m2", 4, 6, weight=1), source("m0", 4, 6, weight=2)]},
        ],
    },
    "linear-of-own-names": {  # a filter of one model sees the layer's number in that model
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    source("m0", 0, 3, weight=by({".1.": 0.9}, 0.2)),
                    source("m1", 3, 6, weight=by({".4.": 0.5}, 0.4)),
                ]
            },
            {"sources": [source("m0", 3, 5, weight=1), source("m1", 3, 5, weight=0.5)]},
        ],
        "parameters": {"normalize": by({".1.": False}, True)},
    },
    "of-the-slice-and-of-all": {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [source("m0", 0, 3), source("m1", 0, 3, weight=by({"mlp": 0.9}, 0.1))],
                "parameters": {"weight": {"filter": "attn", "value": [0.3, 0.6]}},
            },
            {"sources": [source("m0", 3, 6), source("m1", 3, 6)], "parameters": {"weight": 2}},
        ],
        "parameters": {"weight": [0.5, 0.7]},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [
            {"sources": [source("m0", 0, 2, weight=0.5), source("base", 0, 2)]},
            {
                "sources": [
                    source("base", 2, 5),
                    source("m1", 2, 5, weight=[0.2, 1.2]),
                    source("m0", 2, 5, weight=0.3),
                ]
            },
            # mergekit takes as many models for what is behind the layers as for what is before.
            {"sources": [source("base", 5, 6), source("m1", 5, 6, weight=0.7)]},
        ],
        "parameters": {"lambda": [0.5, 1.5]},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {
                "sources": [source(m, 3 * n, 3 * n + 3) for m in ("base", "m0", "m1", "m2")],
                "parameters": {"density": [0.3, 0.9], "weight": 0.6 + n},
            }
            for n in range(2)
        ],
        "parameters": {"normalize": True},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "slices": [{"sources": [source("base", 1, 4), source("m0", 2, 5, weight=1)]}],
        "parameters": {"density": 0.8, "gamma": 0.05},
    },
    "nuslerp": {
        "merge_method": "nuslerp",
        "slices": [
            {"sources": [source("m0", 0, 1, weight=0.5), source("m1", 5, 6, weight=1)]},
            {"sources": [source("m2", 0, 5, weight=[1, 0.5]), source("m1", 1, 6, weight=1)]},
        ],
    },
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "slices": [{"sources": [*WHOLE, source("m2", 0, NUM_LAYERS)]}],
    },
    "base-of-the-slice": {
        "merge_method": "slerp",
        "slices": [{"sources": WHOLE[:2], "base_model": "base", "parameters": {"t": 0.3}}],
    },
}


ALL = ("llama", "gpt2")
# Stacks and gradients of other families. Where a config lists the layers' kinds, mergekit cannot
# change their number; of Mixtral and Qwen2-MoE it leaves out experts as transformers 5 saves them.
SOME = ("mistral", "gemma")
IN_SOME = ("two-models", "slerp-of-shifted-layers", "linear-of-own-names", "ties")
AS_DEEP = ("slerp-whole", "ties")


@pytest.fixture(scope="module")
def family_of(tmp_path_factory) -> Callable[[str], Models]:
    folder = tmp_path_factory.mktemp("models")
    saved: dict[str, Models] = {}

    def family(kind: str) -> Models:
        if kind not in saved:
            saved[kind] = save(kind, folder / kind, num_layers=NUM_LAYERS, num_models=3)
        return saved[kind]

    return family


def placed(value: Any, family: Models) -> Any:
    """Return a spec with the models' folders in place of their names."""
    if isinstance(value, dict):
        return {key: str(family[v]) if key in ("model", "base_model") else placed(v, family)
                for key, v in value.items()}  # fmt: skip
    return [placed(each, family) for each in value] if isinstance(value, list) else value


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ALL for name in SPECS]
    + [(kind, name) for kind in SOME for name in IN_SOME]
    + [(kind, name) for kind in ("gemma2", "qwen2") for name in AS_DEEP],
)
def test_slices_agree_with_mergekit(name, kind, family_of, tmp_path):
    family = family_of(kind)
    spec = placed(SPECS[name], family) | {"dtype": "float32"}
    theirs = by_mergekit(copy.deepcopy(spec), tmp_path / "theirs")
    ours = load_folder(outliermerge.run(spec, output=tmp_path / "ours", load_check=False).output)

    assert ours.keys() == theirs.keys()
    sizes = [load_folder(family[model]) for model in family]
    largest = max(float(t.abs().max()) for tensors in sizes for t in tensors.values())
    for tensor, mine in ours.items():
        other = theirs[tensor]
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype), tensor
        limit = 16 * torch.finfo(torch.float32).eps * max(float(other.abs().max()), largest / 16)
        assert float((mine - other).abs().max()) <= limit, tensor
    key = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    configs = [
        json.loads((tmp_path / tool / "config.json").read_text()) for tool in ("ours", "theirs")
    ]
    assert configs[0][key] == configs[1][key]
    tokens = [1, 5, 9, 3, 7, 11]
    assert_same_answers(*(logits_of(tmp_path / tool, tokens) for tool in ("ours", "theirs")))


@pytest.mark.parametrize("name", SPECS)
def test_what_an_output_says_in_mergekits_form_gives_its_values(name, family_of, tmp_path):
    spec = placed(SPECS[name], family_of("llama"))
    if "compat" in METHODS[spec["merge_method"]].parameters:
        spec["parameters"] = spec.get("parameters", {}) | {"compat": "mergekit"}
    output = outliermerge.run(spec, output=tmp_path / "ours", load_check=False).output

    written = yaml.safe_load((output / "mergekit_config.yml").read_text("utf-8"))
    theirs = by_mergekit(written, tmp_path / "theirs")

    ours = load_folder(output)
    assert ours.keys() == theirs.keys()
    for tensor, mine in ours.items():
        torch.testing.assert_close(mine, theirs[tensor], rtol=1e-5, atol=1e-6)


def test_a_base_that_slices_leave_out_is_named_for_mergekit(family_of, tmp_path):
    spec = copy.deepcopy(SPECS["ties"])
    for one in spec["slices"]:
        del one["sources"][0]
    spec = placed(spec, family_of("llama"))
    output = outliermerge.run(spec, output=tmp_path / "ours", load_check=False).output

    written = yaml.safe_load((output / "mergekit_config.yml").read_text("utf-8"))
    theirs = by_mergekit(written, tmp_path / "theirs")

    assert [len(one["sources"]) for one in written["slices"]] == [4, 4]
    for tensor, mine in load_folder(output).items():
        torch.testing.assert_close(mine, theirs[tensor], rtol=1e-5, atol=1e-6)


def test_slices_that_mergekit_reads_otherwise_are_not_said_in_its_form(family_of, tmp_path):
    spec = copy.deepcopy(SPECS["linear-in-three"])
    del spec["slices"][2]["sources"][1]
    spec = placed(spec, family_of("llama"))
    output = outliermerge.run(spec, output=tmp_path / "ours", load_check=False).output
    assert not (output / "mergekit_config.yml").exists()
