"""The methods inside FusionBench: what it gives is what this package's own run writes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import family, load_folder
from documents import ROOT, blocks
from interop_cases import PARAMETERS, assert_same, every_method, models_of, run_here, with_base

import outliermerge
from outliermerge.errors import ArgumentError, OutlierMergeError

pytestmark = pytest.mark.interop
PAGE = ROOT / "docs" / "howto" / "other_tools.md"


@pytest.fixture(scope="module")
def tool() -> Any:
    """This package's module for FusionBench, which `make test-interop` installs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what FusionBench imports
        from outliermerge.interop import fusion_bench
    return fusion_bench


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> tuple[Path, list[Path]]:
    return family("llama", tmp_path_factory.mktemp("llamas"), num_models=3)


def loaded(folder: Path) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def pool_of(base: Path | None, models: list[Path]) -> dict[str, transformers.PreTrainedModel]:
    found = {} if base is None else {"_pretrained_": loaded(base)}
    return found | {model.name: loaded(model) for model in models}


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the algorithm for parameters and perhaps a seed."""
    rest = {name: value for name, value in parameters.items() if name != "seed"}
    return {"parameters": rest, "seed": parameters.get("seed", 0)}


@every_method
def test_the_algorithm_gives_what_a_run_writes(name, tool, llamas, tmp_path):
    base, models = llamas[0] if with_base(name) else None, models_of(name, llamas[1])
    parameters = PARAMETERS.get(name, {})
    algorithm = tool.OutlierMergeAlgorithm(name, **given(parameters))
    found = algorithm.run(pool_of(base, models))
    expected = run_here(name, base, models, tmp_path / "own", **parameters)
    assert_same(found.state_dict(), expected)


def test_models_of_the_pool_stay_as_they_are(tool, llamas):
    pool = pool_of(llamas[0], llamas[1])
    before = {name: deepcopy(model.state_dict()) for name, model in pool.items()}
    tool.OutlierMergeAlgorithm("ties", {"density": 0.5}).run(pool)
    for name, model in pool.items():
        assert_same(model.state_dict(), before[name])


def test_a_list_has_one_value_for_each_model(tool, llamas, tmp_path):
    base, models = llamas[0], llamas[1][:2]
    algorithm = tool.OutlierMergeAlgorithm("ties", {"weight": [0.3, 0.7], "density": 0.25})
    own = [{"weight": 0.3}, {"weight": 0.7}]
    expected = run_here("ties", base, models, tmp_path / "own", own=own, density=0.25)
    assert_same(algorithm.run(pool_of(base, models)).state_dict(), expected)


def test_lazily_loaded_pools_give_the_same(tool, llamas, tmp_path):
    from fusion_bench import CausalLMPool

    base, models = llamas[0], llamas[1][:2]
    paths = {"_pretrained_": str(base)} | {model.name: str(model) for model in models}
    pool = CausalLMPool(paths, tokenizer=None, enable_lazy_loading=True)
    found = tool.OutlierMergeAlgorithm("dare_ties", {"density": 0.5}, seed=3).run(pool)
    expected = run_here("dare_ties", base, models, tmp_path / "own", density=0.5, seed=3)
    assert_same(found.state_dict(), expected)
    # It is in no file: the model must not have been built without it.
    whole = loaded(base).model.rotary_emb.inv_freq
    assert found.model.rotary_emb.inv_freq.equal(whole)


def test_tied_tensors_are_merged_once(tool):
    def tied(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
            tie_word_embeddings=True,
        )
        return transformers.LlamaForCausalLM(config)

    pool = {"_pretrained_": tied(0), "a": tied(1), "b": tied(2)}
    found = tool.OutlierMergeAlgorithm("dare_linear", {"density": 0.5}).run(pool)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    names = [name for name in found.state_dict() if name != "lm_head.weight"]
    states = {key: model.state_dict() for key, model in pool.items()}
    expected = outliermerge.merge_state_dicts(
        [{name: states[key][name] for name in names} for key in ("a", "b")],
        base={name: states["_pretrained_"][name] for name in names},
        method="dare_linear",
        density=0.5,
    )
    assert_same({name: found.state_dict()[name] for name in names}, expected)


def test_only_target_modules_are_merged(tool, llamas, tmp_path):
    base, models = llamas[0], llamas[1][:2]
    pool = pool_of(base, models)
    for model in pool.values():
        model._fusion_bench_target_modules = ["model"]
    found = tool.OutlierMergeAlgorithm("min_sigma").run(pool).state_dict()
    expected = run_here("min_sigma", base, models, tmp_path / "own")
    expected["lm_head.weight"] = load_folder(base)["lm_head.weight"]
    assert_same(found, expected)


def test_the_algorithm_is_saved_and_read_as_yaml(tool, tmp_path):
    algorithm = tool.OutlierMergeAlgorithm("ties", {"density": 0.25}, seed=4)
    algorithm.to_yaml(tmp_path / "method.yaml")
    again = tool.OutlierMergeAlgorithm.from_yaml(tmp_path / "method.yaml")
    assert (again.name, again.parameters, again.seed) == ("ties", {"density": 0.25}, 4)


@pytest.mark.parametrize(
    "name, parameters, said",
    [
        ("min_sgma", {}, "unknown merge method 'min_sgma'. Did you mean 'min_sigma'?"),
        ("min_sigma", {"tt": 1}, "unknown parameter 'tt'. Did you mean 't'?"),
        ("min_sigma", {"t": -1}, "parameter 't': found -1, expected a number"),
        ("min_sigma", {"weight": [1, 2, 3]}, "'weight': found 3 values, expected 2"),
    ],
)
def test_what_is_wrong_is_told_by_the_method(name, parameters, said, tool, llamas):
    with pytest.raises(ArgumentError, match=said.replace("?", r"\?")):
        tool.OutlierMergeAlgorithm(name, parameters).run(pool_of(llamas[0], llamas[1][:2]))


def test_methods_on_task_vectors_need_a_pretrained_model(tool, llamas):
    with pytest.raises(OutlierMergeError, match="needs a base model"):
        tool.OutlierMergeAlgorithm().run(pool_of(None, llamas[1][:2]))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the models and the pool that the page names."""
    folder = tmp_path_factory.mktemp("place")
    base, models = family("llama", folder / "models")
    for model, name in zip(models, ("chat", "maths"), strict=True):
        model.rename(base.parent / name)
    (pool,) = (block.text for block in blocks(PAGE, "text"))
    name, _, text = pool.removeprefix("# ").partition("\n")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def page_expects(place) -> dict[str, torch.Tensor]:
    models = place / "models"
    own = [{"weight": 0.8}, {"weight": 1}]
    folders = [models / "chat", models / "maths"]
    return run_here("min_sigma", models / "base", folders, place / "own", own=own, t=2.5)


def test_the_program_finds_the_shipped_config(place, page_expects):
    (command,) = (block.text for block in blocks(PAGE, "bash"))
    program = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([program, os.environ["PATH"]]),
    }
    done = subprocess.run(
        command,
        shell=True,
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(load_folder(place / "merged" / "in_fusion_bench"), page_expects)


def test_the_python_of_the_page_gives_the_same(tool, place, page_expects, monkeypatch):
    monkeypatch.chdir(place)
    (text,) = (block.text for block in blocks(PAGE, "py"))
    space: dict[str, Any] = {}
    exec(compile(text, str(PAGE), "exec", dont_inherit=True), space)
    assert_same(space["model"].state_dict(), page_expects)
