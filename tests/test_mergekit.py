"""The same specs through mergekit 0.1.5, in this process: the outputs must agree."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import family, load_folder
from parity.both import same_draws
from torch import Tensor

import outliermerge
from outliermerge.methods.table import METHODS
from outliermerge.output.mergekit_config import METHODS as SAID_ALIKE


@pytest.fixture(scope="module")
def merge_by_mergekit() -> Callable[[dict[str, Any], Path], dict[str, Tensor]]:
    with warnings.catch_warnings():
        # Its lazy_unpickle.py names a private module of numpy that has been renamed.
        warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

    def merge(spec: dict[str, Any], folder: Path) -> dict[str, Tensor]:
        options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(spec), str(folder), options)
        return load_folder(folder)

    return merge


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, tuple[Path, list[Path]]]:
    folder = tmp_path_factory.mktemp("families")
    return {
        "fp32": family("llama", folder / "fp32", num_models=3),
        "bf16": family(
            "llama", folder / "bf16", num_models=3, dtype=torch.bfloat16, shard_size="60KB"
        ),
    }


def filtered(attention: Any, mlp: Any, otherwise: Any) -> list[dict[str, Any]]:
    return [
        {"filter": "self_attn", "value": attention},
        {"filter": "mlp", "value": mlp},
        {"value": otherwise},
    ]


GRADIENT = [0.1, 0.9, 0.4, 0.7]
WEIGHTS = [{"weight": 0.3}, {"weight": 0.5}, {"weight": 0.2}]
SPECS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "own": WEIGHTS},
    "linear-sum": {
        "method": "linear",
        "parameters": {"normalize": False},
        "own": [{"weight": GRADIENT}, {"weight": 0.7}, {"weight": [0.2, -0.3]}],
    },
    "linear-filters": {
        "method": "linear",
        "own": [
            {"weight": filtered(0.2, GRADIENT, 0.6)},
            {"weight": filtered([1, 0.5], 0.3, 1)},
            {"weight": {"filter": "*", "value": 0.8}},
        ],
    },
    "linear-precedence": {
        "method": "linear",
        "parameters": {"weight": GRADIENT},
        "own": [{"weight": 0.9}, {}, {"weight": {"filter": "mlp", "value": 0.1}}],
    },
    "task_arithmetic": {"method": "task_arithmetic", "own": WEIGHTS},
    "task_arithmetic-normalize": {
        "method": "task_arithmetic",
        "parameters": {"normalize": True, "lambda": 0.7},
        "own": [{"weight": GRADIENT}, {"weight": 0.7}, {"weight": 1.5}],
    },
    "task_arithmetic-filters": {
        "method": "task_arithmetic",
        "parameters": {"lambda": filtered([0.5, 1.5], 0.8, 1), "weight": 0.6},
        "own": [
            {"weight": filtered(0.2, GRADIENT, 0.6)},
            {"weight": [{"filter": "q_proj", "value": 0.1}, {"filter": "attn", "value": 0.9}]},
            {},
        ],
    },
    "task_arithmetic-zero-sum": {
        "method": "task_arithmetic",
        "parameters": {"normalize": True},
        "own": [{"weight": 0.5}, {"weight": -0.75}, {"weight": 0.25}],
    },
    "ties": {"method": "ties", "parameters": {"density": 0.3}, "own": WEIGHTS},
    "ties-whole": {"method": "ties", "own": WEIGHTS},
    "ties-sum": {
        "method": "ties",
        "parameters": {"normalize": False, "density": GRADIENT, "lambda": 0.8},
        "own": WEIGHTS,
    },
    "ties-rescale": {
        "method": "ties",
        "parameters": {"rescale": True, "int8_mask": True, "density": 0.6, "weight": GRADIENT},
        "own": [
            {"density": 0.2},
            {"density": filtered(0.1, [0.3, 0.7], 0.9), "weight": 0.35},
            {},
        ],
    },
    "ties-nothing-kept": {
        "method": "ties",
        "parameters": {"density": {"filter": "mlp", "value": 0}, "weight": 1},
        "own": [{}, {}, {"weight": 0.4, "density": 0.5}],
    },
    "breadcrumbs": {"method": "breadcrumbs", "parameters": {"density": 0.6}, "own": WEIGHTS},
    "breadcrumbs-rescale": {
        "method": "breadcrumbs",
        "parameters": {"density": 0.4, "rescale": True, "gamma": GRADIENT, "normalize": True},
        "own": WEIGHTS,
    },
    "breadcrumbs-wide": {
        "method": "breadcrumbs",
        "parameters": {"density": 0.7, "gamma": 0.5, "lambda": -1.5},
        "own": WEIGHTS,
    },
    "breadcrumbs_ties": {
        "method": "breadcrumbs_ties",
        "parameters": {"weight": 0.5, "gamma": 0.05},
        "own": [{"density": 0.2}, {"density": filtered(0, 1, GRADIENT)}, {"gamma": 0.2}],
    },
    "dare_linear-whole": {"method": "dare_linear", "own": WEIGHTS},
    "dare_ties-whole": {"method": "dare_ties", "parameters": {"lambda": 1.2}, "own": WEIGHTS},
    "dare_linear-none": {"method": "dare_linear", "parameters": {"density": 0}, "own": WEIGHTS},
    "della-whole": {"method": "della", "own": WEIGHTS},
    "della_linear-whole": {
        "method": "della_linear",
        "parameters": {"epsilon": 0.3, "normalize": True},
        "own": WEIGHTS,
    },
    "sce": {"method": "sce", "own": [{}, {}, {}]},
    "sce-select": {"method": "sce", "parameters": {"select_topk": GRADIENT}, "own": [{}, {}, {}]},
    "sce-none": {"method": "sce", "parameters": {"select_topk": 0}, "own": [{}, {}, {}]},
    "ram": {"method": "ram", "own": [{}, {}, {}]},
    "ram-epsilon": {"method": "ram", "parameters": {"epsilon": 0.01}, "own": [{}, {}, {}]},
    "ramplus_tl": {"method": "ramplus_tl", "own": [{}, {}, {}]},
    "ramplus_tl-most": {
        "method": "ramplus_tl",
        "parameters": {"epsilon": 0.015, "r": 0.5, "alpha": [0.1, 3]},
        "own": [{}, {}, {}],
    },
    "passthrough": {"method": "passthrough", "own": [{}]},
    "passthrough-scale": {
        "method": "passthrough",
        "parameters": {"scale": filtered(GRADIENT, 0.5, 2)},
        "own": [{}],
    },
    "slerp": {"method": "slerp", "base": "base", "parameters": {"t": 0.3}, "own": [{}]},
    "slerp-of-two": {"method": "slerp", "base": 1, "parameters": {"t": 0.3}, "own": [{}, {}]},
    "slerp-of-two-first": {
        "method": "slerp",
        "base": 0,
        "parameters": {"t": filtered([0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0], 0.5)},
        "own": [{}, {}],
    },
    "nuslerp": {"method": "nuslerp", "own": WEIGHTS[:2]},
    "nuslerp-of-deltas": {
        "method": "nuslerp",
        "base": "base",
        "own": [{"weight": GRADIENT}, {"weight": filtered(0.2, GRADIENT, 0.6)}],
    },
    "nuslerp-by-vectors": {
        "method": "nuslerp",
        "base": "base",
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": filtered(True, False, False)},
        "own": WEIGHTS[:2],
    },
    "multislerp": {"method": "multislerp", "own": WEIGHTS},
    "multislerp-of-deltas": {
        "method": "multislerp",
        "base": "base",
        "parameters": {"normalize_weights": False},
        "own": [{"weight": GRADIENT}, {"weight": 0.7}, {"weight": [0.2, 0.3]}],
    },
    "karcher": {"method": "karcher", "own": [{}, {}, {}]},
    "karcher-with-base": {
        "method": "karcher",
        "base": "base",
        "parameters": {"max_iter": 4, "tol": 1e-4},
        "own": [{}, {}],
    },
    "karcher-base-among": {"method": "karcher", "base": 1, "own": [{}, {}]},
    "model_stock": {"method": "model_stock", "base": "base", "own": [{}, {}, {}]},
    "model_stock-filter-wise": {
        "method": "model_stock",
        "base": "base",
        "parameters": {"filter_wise": filtered(True, False, True)},
        "own": [{}, {}],
    },
    "model_stock-base-among": {"method": "model_stock", "base": 0, "own": [{}, {}, {}]},
    "nearswap": {
        "method": "nearswap",
        "base": "base",
        "parameters": {"t": filtered([1e-3, 1e-2], 1e-4, 0.1)},
        "own": [{}],
    },
    "nearswap-of-two": {
        "method": "nearswap",
        "base": 0,
        "parameters": {"t": 0.01},
        "own": [{}, {}],
    },
    "arcee_fusion": {
        "method": "arcee_fusion",
        "base": "base",
        "parameters": {"compat": "mergekit"},  # of small changes; it knows no such parameter
        "own": [{}],
    },
    "arcee_fusion-of-two": {
        "method": "arcee_fusion",
        "base": 1,
        "parameters": {"compat": "mergekit"},
        "own": [{}, {}],
    },
}


def spec_of(case: str, base: Path, models: list[Path]) -> dict[str, Any]:
    given = SPECS[case]
    own = given["own"]
    spec = {
        "merge_method": given["method"],
        "models": [
            {"model": str(model)} | ({"parameters": p} if p else {})
            for model, p in zip(models, own, strict=False)
        ],
        "parameters": given.get("parameters", {}),
        "dtype": "float32",
    }
    chosen = given.get("base", "base" if METHODS[given["method"]].needs_base else None)
    if chosen is not None:
        spec["base_model"] = str(base if chosen == "base" else models[chosen])
    return copy.deepcopy(spec)


def tied(case: str) -> bool:
    """Tell whether elements are ranked: of equal ones in bfloat16 we keep all, mergekit some."""
    method = SPECS[case]["method"]
    ranks = method in ("ties", "breadcrumbs", "breadcrumbs_ties") or case == "sce-select"
    return ranks and case != "ties-whole"


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for dtype in ("fp32", "bf16") for case in SPECS
     if dtype == "fp32" or not tied(case)],
)  # fmt: skip
@pytest.mark.sampled(3)
def test_output_agrees_with_mergekit(case, dtype, families, merge_by_mergekit, tmp_path):
    base, models = families[dtype]
    spec = spec_of(case, base, models)
    theirs = merge_by_mergekit(copy.deepcopy(spec), tmp_path / "theirs")
    ours = load_folder(outliermerge.run(spec, output=tmp_path / "ours").output)
    assert ours.keys() == theirs.keys()
    unmerged = load_folder(models[0])
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.float32
        scale = float(unmerged[name].float().abs().max())
        difference = float((tensor - theirs[name]).abs().max())
        assert difference <= 1e-6 * max(scale, float(theirs[name].abs().max())), name
    changed = [n for n, t in ours.items() if not torch.equal(t, unmerged[n].float())]
    assert bool(changed) == (case != "passthrough")


def test_parameters_change_what_both_give(families, merge_by_mergekit, tmp_path):
    base, models = families["fp32"]
    plain, filters = (
        merge_by_mergekit(spec_of(case, base, models), tmp_path / case)
        for case in ("task_arithmetic", "task_arithmetic-filters")
    )
    assert all(not torch.allclose(plain[n], filters[n], rtol=0, atol=1e-5) for n in plain)


def test_ties_of_bfloat16_keeps_what_mergekit_keeps_and_the_ties(
    families, merge_by_mergekit, tmp_path
):
    base, models = families["bf16"]
    spec = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(models[0])}],
        "parameters": {"density": 0.3, "weight": 1},
        "dtype": "float32",
    }
    theirs = merge_by_mergekit(copy.deepcopy(spec), tmp_path / "theirs")
    ours = load_folder(outliermerge.run(spec, output=tmp_path / "ours").output)
    before, after = load_folder(base), load_folder(models[0])
    more = 0
    for name, tensor in ours.items():
        start = before[name].float()
        delta = after[name].float() - start
        kept, kept_there = tensor != start, theirs[name] != start
        assert torch.equal(tensor[kept_there], theirs[name][kept_there]), name
        extra = kept & ~kept_there
        assert (delta[extra].abs() == delta[kept].abs().min()).all(), name
        more += int(extra.sum())
    assert more > 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", [case for case in SPECS if SPECS[case]["method"] in SAID_ALIKE])
def test_what_an_output_says_in_mergekits_form_gives_its_values(
    case, families, merge_by_mergekit, tmp_path
):
    base, models = families["fp32"]
    spec = spec_of(case, base, models)
    del spec["dtype"]  # the output's own is written out
    if "compat" in METHODS[spec["merge_method"]].parameters:
        spec["parameters"]["compat"] = "mergekit"

    output = outliermerge.run(spec, output=tmp_path / "ours", overwrite=True).output
    written = yaml.safe_load((output / "mergekit_config.yml").read_text("utf-8"))
    theirs = merge_by_mergekit(written, tmp_path / "theirs")

    ours = load_folder(output)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_drops_at_random_says_a_recipe_that_gives_its_values_from_the_same_draw(
    method, families, merge_by_mergekit, tmp_path
):
    base, models = families["fp32"]
    spec = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models[:2]],
        "parameters": {"density": 0.6, "weight": 0.5, "rescale_by": "l1"},
    }
    with same_draws():
        output = outliermerge.run(spec, output=tmp_path / "ours", kernels=False, threads=1).output
        written = (output / "mergekit_config.yml").read_text("utf-8")
        theirs = merge_by_mergekit(yaml.safe_load(written), tmp_path / "theirs")

    assert "other elements at random" in written and "rescale_by" not in written
    for name, tensor in load_folder(output).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    del spec["parameters"]["rescale_by"]
    output = outliermerge.run(spec, output=tmp_path / "by_default").output
    assert (output / "mergekit_config.yml").read_text("utf-8") == written


@pytest.mark.parametrize(
    "change",
    [
        {"merge_method": "min_sigma"},
        {"merge_method": "sce"},
        {"merge_method": "dare_ties", "parameters": {"consensus": "count"}},
        {"merge_method": "della", "parameters": {"rescale_by": "probability"}},
        {"models": [{"model": "{a}", "missing": "base"}]},
        {"extra": "drop"},
        {"unequal": "base"},
        {"rename": {"from": "^model", "to": "model"}},
        {"vocabulary": "common"},
        {"modifiers": [{"modifier": "test_open_contract:centred"}]},
    ],
    ids=str,
)
def test_what_mergekit_does_not_do_is_not_said_in_its_form(change, families, tmp_path):
    base, (a, b, _) = families["fp32"]
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(a)}, {"model": str(b)}],
    }
    spec |= yaml.safe_load(yaml.safe_dump(change).replace("{a}", str(a)))
    output = outliermerge.run(spec, output=tmp_path / "out").output
    assert not (output / "mergekit_config.yml").exists()
    assert (output / "recipe.yaml").exists()
