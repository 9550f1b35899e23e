"""The methods inside sd-mecha: what a recipe gives is what this package's own run writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sd_mecha
import torch
from checkpoints import family, load_folder
from interop_cases import PARAMETERS, assert_same, every_method, models_of, run_here
from safetensors import safe_open
from safetensors.torch import load
from sd_mecha.extensions import merge_methods
from torch import Tensor

from outliermerge.errors import ArgumentError, OutlierMergeError
from outliermerge.interop.sd_mecha import PREFIX, WITH_BASE, register
from outliermerge.methods.table import METHODS


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> tuple[Path, list[Path]]:
    return family("llama", tmp_path_factory.mktemp("llamas"), num_models=3)


def nodes(folders: Sequence[Path]) -> list[Any]:
    return [sd_mecha.model(folder / "model.safetensors") for folder in folders]


def python_names(parameters: dict[str, Any]) -> dict[str, Any]:
    return {{"lambda": "lambda_"}.get(name, name): value for name, value in parameters.items()}


def merged(recipe: Any, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Let sd-mecha write the output of a recipe, and return its tensors."""
    path = folder / "out.safetensors"
    sd_mecha.merge(recipe, output=path, output_dtype=dtype, tqdm=_Quiet)
    return load(path.read_bytes())  # the next call overwrites the file


class _Quiet:
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **others: Any) -> None:
        pass

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_postfix(self, *args: Any) -> None:
        pass

    def update(self) -> None:
        pass


@pytest.mark.sampled(2)
@every_method
def test_a_recipe_gives_what_a_run_writes(name, llamas, tmp_path):
    needs_base = METHODS[name].needs_base
    base, models = llamas[0] if needs_base else None, models_of(name, llamas[1])
    parameters = PARAMETERS.get(name, {})
    inputs = nodes([base, *models] if base else models)
    recipe = register()[name](*inputs, **python_names(parameters))
    expected = run_here(name, base, models, tmp_path / "own", **parameters)
    assert_same(merged(recipe, tmp_path), expected)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].with_base])
def test_methods_with_an_optional_base_are_there_with_one(name, llamas, tmp_path):
    base, models = llamas[0], llamas[1][:2]
    parameters = PARAMETERS.get(name, {})
    recipe = register()[name + WITH_BASE](*nodes([base, *models]), **parameters)
    expected = run_here(name, base, models, tmp_path / "own", **parameters)
    assert_same(merged(recipe, tmp_path), expected)


def test_a_text_has_one_number_for_each_model(llamas, tmp_path):
    base, models = llamas[0], llamas[1][:2]
    recipe = register()["ties"](*nodes([base, *models]), weight="0.3, 7e-1", density=0.25)
    own = [{"weight": 0.3}, {"weight": 0.7}]
    expected = run_here("ties", base, models, tmp_path / "own", own=own, density=0.25)
    assert_same(merged(recipe, tmp_path), expected)


def by_filter(first: Any, second: Any) -> list[dict[str, Any]]:
    return [{"filter": "mlp", "value": first}, {"value": second}]


def test_a_parameter_may_differ_from_key_to_key(llamas, tmp_path):
    base, models = llamas[0], llamas[1][:2]
    names = load_folder(base)
    recipe = register()["min_sigma"](
        *nodes([base, *models]),
        t={name: 1.5 if "mlp" in name else 3.0 for name in names},
        weight={name: "0.5, 2" if "mlp" in name else "1, 0.75" for name in names},
    )
    own = [{"weight": by_filter(0.5, 1)}, {"weight": by_filter(2, 0.75)}]
    folder = tmp_path / "own"
    expected = run_here("min_sigma", base, models, folder, own=own, t=by_filter(1.5, 3))
    assert_same(merged(recipe, tmp_path), expected)


def test_bfloat16_is_rounded_once(tmp_path):
    base, models = family("llama", tmp_path / "models", dtype=torch.bfloat16)
    recipe = register()["min_sigma"](*nodes([base, *models]), t=1.5)
    expected = run_here("min_sigma", base, models, tmp_path / "own", t=1.5, out_dtype="bfloat16")
    assert_same(merged(recipe, tmp_path, torch.bfloat16), expected)


def test_methods_stand_among_those_of_sd_mecha(llamas, tmp_path):
    base, *models = nodes([llamas[0], *llamas[1][:2]])
    inner = register()["min_sigma"](base, *models, t=1.5)
    found = merged(base + (inner - base) * 0.5, tmp_path)
    whole, start = merged(inner, tmp_path), load_folder(llamas[0])
    assert_same(found, {n: start[n] + (whole[n] - start[n]) * 0.5 for n in start})


def test_a_recipe_is_stored_and_can_be_read_again(llamas, tmp_path):
    base, models = llamas[0], llamas[1][:2]
    recipe = register()["dare_ties"](
        *nodes([base, *models]), weight="0.3, 0.7", density=0.5, seed=3
    )
    first = merged(recipe, tmp_path)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert f'merge "{PREFIX}dare_ties"' in file.metadata()["mecha_recipe"]
    text = sd_mecha.serialize(recipe, finalize=False)
    assert_same(merged(sd_mecha.deserialize(text), tmp_path), first)


def test_registering_again_changes_nothing():
    found = register()
    again = register()
    assert found.keys() == again.keys() and all(found[name] is again[name] for name in found)
    assert all(merge_methods.resolve(PREFIX + name) is method for name, method in found.items())


@pytest.mark.parametrize(
    "name, given, said",
    [
        ("min_sigma", {"t": -1.0}, "parameter 't': found -1.0, expected a number ≥ 0"),
        ("min_sigma", {"weight": "0.3, x"}, "parameter 'weight': found ' x', expected a number"),
        ("min_sigma", {"weight": "1, 2, 3"}, "parameter 'weight': found 3 values, expected 2"),
        ("ties", {"trim": "model"}, "ties measures whole models"),
        ("slerp", {}, "slerp does not take 3 models"),
    ],
)
def test_what_is_wrong_is_told_by_the_method(name, given, said, llamas, tmp_path):
    recipe = register()[name](*nodes([llamas[0], *llamas[1][:2]]), **given)
    with pytest.raises(ArgumentError, match=said):
        merged(recipe, tmp_path)


def test_a_wrong_shape_is_told_with_the_tensors_name():
    models = [sd_mecha.model({"a.w": torch.zeros(length)}) for length in (3, 4)]
    recipe = register()["linear"](*models)
    with pytest.raises(OutlierMergeError, match=r"tensor 'a\.w': models\[1\] is .* \[4\]"):
        sd_mecha.merge(recipe, output_dtype=torch.float32, tqdm=_Quiet)
