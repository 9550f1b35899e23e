"""The methods inside mergekit 0.1.5: what comes out is what this package's own run writes."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import family, load_folder
from interop_cases import (
    PARAMETERS,
    assert_same,
    every_method,
    models_of,
    run_here,
    with_base,
)

from outliermerge.interop import mergekit_yaml
from outliermerge.methods.table import METHODS

with warnings.catch_warnings():
    # Its lazy_unpickle.py names a private module of numpy that has been renamed.
    warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
    importlib.import_module("mergekit.scripts.run_yaml")
    from mergekit.merge_methods import registry

    from outliermerge.interop import mergekit as in_mergekit

FLAGS = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> tuple[Path, list[Path]]:
    return family("llama", tmp_path_factory.mktemp("llamas"), num_models=3)


@pytest.fixture(scope="module")
def bfloat16_llamas(tmp_path_factory) -> tuple[Path, list[Path]]:
    return family("llama", tmp_path_factory.mktemp("bf16"), num_models=2, dtype=torch.bfloat16)


def config(
    name: str,
    base: Path | None,
    models: list[Path],
    *,
    own: list[dict[str, Any]] | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    entries = [
        {"model": str(model), "parameters": given}
        for model, given in zip(models, own or [{} for _ in models], strict=True)
    ]
    found = {"merge_method": name, "models": entries, "parameters": parameters}
    return found if base is None else found | {"base_model": str(base)}


def run_mergekit(document: dict[str, Any], folder: Path) -> int:
    """Run the command in this process; return its exit code."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    try:
        return mergekit_yaml.main([str(path), str(folder / "out"), *FLAGS])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


@every_method
@pytest.mark.sampled(3)
def test_mergekit_writes_what_a_run_writes(name, llamas, tmp_path):
    base, models = llamas[0] if with_base(name) else None, models_of(name, llamas[1])
    parameters = PARAMETERS.get(name, {})
    document = config(f"outliermerge_{name}", base, models, **parameters)
    assert run_mergekit(document, tmp_path) == 0
    expected = run_here(name, base, models, tmp_path / "own", **parameters)
    assert_same(load_folder(tmp_path / "out"), expected)


SETTINGS: dict[str, dict[str, Any]] = {
    "gradient": {"t": [0.5, 3, 1.5]},
    "filters": {"t": [{"filter": "self_attn", "value": [1, 2]}, {"value": 3}]},
    "of each model": {"own": [{"weight": 0.25}, {"weight": [{"filter": "mlp", "value": 2}]}]},
    "text": {"t": "1.5e0", "lambda": 1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_parameters_arrive_as_mergekit_resolves_them(setting, llamas, tmp_path):
    base, models = llamas[0], llamas[1][:2]
    assert run_mergekit(config("min_sigma", base, models, **SETTINGS[setting]), tmp_path) == 0
    expected = run_here("min_sigma", base, models, tmp_path / "own", **SETTINGS[setting])
    assert_same(load_folder(tmp_path / "out"), expected)


def test_the_base_may_be_among_the_models(llamas, tmp_path):
    base, models = llamas[0], llamas[1][:2]
    document = config("min_sigma", base, [models[0], base, models[1]])
    assert run_mergekit(document, tmp_path) == 0
    expected = run_here("min_sigma", base, models, tmp_path / "own")
    assert_same(load_folder(tmp_path / "out"), expected)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_bfloat16_is_rounded_once(dtype, bfloat16_llamas, tmp_path):
    base, models = bfloat16_llamas
    document = config("min_sigma", base, models, t=1.5) | {"out_dtype": "bfloat16"}
    assert run_mergekit(document | ({"dtype": dtype} if dtype else {}), tmp_path) == 0
    expected = run_here("min_sigma", base, models, tmp_path / "own", t=1.5, out_dtype="bfloat16")
    assert_same(load_folder(tmp_path / "out"), expected)


def test_a_method_of_ones_own_is_named_by_its_path(llamas, tmp_path, monkeypatch):
    base, models = llamas[0], llamas[1][:2]
    (tmp_path / "interop_own.py").write_text(
        "import outliermerge\n\n"
        "@outliermerge.merge_method(space='delta')\n"
        "def part(deltas, *, scale: float = 0.5):\n"
        "    return deltas.sum(0) * scale\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "interop_own:part"
    assert run_mergekit(config(name, base, models, scale=0.25), tmp_path) == 0
    expected = run_here(name, base, models, tmp_path / "own", scale=0.25)
    assert_same(load_folder(tmp_path / "out"), expected)


def test_names_of_mergekit_stay_mergekits():
    in_mergekit.register()
    in_mergekit.register()
    ours = {
        name
        for name in in_mergekit.names()
        if isinstance(registry.get(name), in_mergekit.MethodInMergekit) and ":" not in name
    }
    not_mergekits = {
        "min_sigma", "aswudi", "consensus_ta", "iso_c", "iso_cts", "metagpt", "pcb", "resmerge",
        "swudi", "tsv_m", "wudi",
    }  # fmt: skip
    assert ours == not_mergekits | {f"outliermerge_{name}" for name in METHODS}


def refused(document: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of a refusal, which leaves no output behind."""
    capsys.readouterr()
    assert run_mergekit(document, folder) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert lines[-1] == line and not any("Traceback" in one for one in lines)
    assert not (folder / "out").exists()
    return line


@pytest.mark.parametrize(
    "parameters, said",
    [
        ({"t": -1}, "min_sigma: parameter 't': found -1, expected a number ≥ 0"),
        ({"t": [1, -1]}, "min_sigma: parameter 't': found -1, expected a number ≥ 0"),
        ({"t": [{"filter": "mlp", "value": "x"}]}, "parameter 't': found 'x', expected a number"),
        ({"own": [{"weight": True}, {}]}, "parameter 'weight': found True, expected a number"),
        ({"tt": 1}, "min_sigma has no parameter 'tt'. Did you mean 't'?"),
        ({"own": [{}, {"wieght": 1}]}, "has no parameter 'wieght'. Did you mean 'weight'?"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_read(
    parameters, said, llamas, tmp_path, capsys
):
    document = config("min_sigma", llamas[0], llamas[1][:2], **parameters)
    assert said in refused(document, tmp_path, capsys)


@pytest.mark.parametrize(
    "name, num_models, has_base, said",
    [
        ("min_sgma", 2, True, "unknown merge method 'min_sgma'. Did you mean 'min_sigma'?"),
        ("no_module_of_mine:half", 2, True, "no module 'no_module_of_mine' can be imported"),
        ("min_sigma", 2, False, "min_sigma: Merge method requires a base input"),
        ("outliermerge_linear", 2, True, "takes no base model, and mergekit would merge it"),
        ("outliermerge_slerp", 2, True, "outliermerge_slerp: Merge method requires exactly 2"),
        ("outliermerge_nuslerp", 3, True, "outliermerge_nuslerp: Merge method requires exactly 2"),
        ("outliermerge_passthrough", 2, False, "outliermerge_passthrough: Merge method requires"),
    ],
)
def test_wrong_models_are_refused_before_anything_is_read(
    name, num_models, has_base, said, llamas, tmp_path, capsys
):
    base = llamas[0] if has_base else None
    assert said in refused(config(name, base, llamas[1][:num_models]), tmp_path, capsys)


@pytest.mark.parametrize(
    "name, parameters, said",
    [
        ("outliermerge_ties", {"trim": "model"}, "ties measures whole models"),
        ("outliermerge_della", {"density": 0.5, "epsilon": 0.6}, "Choose a smaller epsilon"),
    ],
)
def test_what_only_resolved_parameters_tell_is_one_message(
    name, parameters, said, llamas, tmp_path, capsys
):
    document = config(name, llamas[0], llamas[1][:2], **parameters)
    assert run_mergekit(document, tmp_path) in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not list((tmp_path / "out").glob("*"))


def test_a_parameter_that_has_no_effect_in_mergekit_is_let_through(llamas, tmp_path):
    document = config("min_sigma", llamas[0], llamas[1][:2], int8_mask=True)
    assert run_mergekit(document, tmp_path) == 0


@pytest.mark.parametrize("text", [None, b"\xff", b"{"], ids=["absent", "bytes", "yaml"])
def test_a_file_that_is_no_config_is_one_message(text, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_bytes(text)
    assert mergekit_yaml.main([str(path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_mergekits_own_usage_and_exit_codes_stay(capsys):
    with pytest.raises(SystemExit) as stop:
        mergekit_yaml.main(["--help"])
    assert stop.value.code == 0
    assert "Usage: outliermerge-mergekit [OPTIONS] CONFIG_FILE OUT_PATH" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        mergekit_yaml.main([])
    assert stop.value.code == 2


def test_an_absent_mergekit_is_one_message(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mergekit.scripts", None)
    assert mergekit_yaml.main([]) == 1
    assert "Install it: pip install 'mergekit>=0.1.5'" in capsys.readouterr().err
