"""Sweeps: each output is what a run of its own gives, from one reading of the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import family, save_tensors
from stopping import stopping_after

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.output.manifest_file import read_manifest
from outliermerge.search.sweeps import parse_values


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict[str, Any]:
    base, models = family("llama", tmp_path_factory.mktemp("sweep"), dtype=torch.bfloat16)
    return {
        "merge_method": "min_sigma",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of an output's files; of the manifest what was merged and how."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("outliermerge.json"))
    return files | {"tensors": json.dumps(manifest["tensors"]).encode()}


def num_read_bytes() -> int:
    """Return the bytes that this process has asked files for."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"t": [2, 2.5, 3]}, ["t=2", "t=2.5", "t=3"]),
        ({"merge_method": ["linear", "task_arithmetic"]},
         ["merge_method=linear", "merge_method=task_arithmetic"]),
        ({"merge_method": ["ties"], "density": [0.2, [0.2, 0.5]]},
         ["merge_method=ties,density=0.2", "merge_method=ties,density=0.2_0.5"]),
        ({"dtype": ["float64", "bfloat16"]}, ["dtype=float64", "dtype=bfloat16"]),
        ({"lambda": [0.5, 1.0], "t": [1, 2]},
         ["lambda=0.5,t=1", "lambda=0.5,t=2", "lambda=1.0,t=1", "lambda=1.0,t=2"]),
    ],
    ids=["t", "method", "gradient", "dtype", "two"],
)  # fmt: skip
@pytest.mark.sampled(2)
def test_each_output_is_what_its_own_run_gives(settings, names, kernels, spec, tmp_path):
    results = outliermerge.sweep(spec, settings, output=tmp_path / "all", kernels=kernels)
    assert [result.output.name for result in results] == names
    for result in results:
        assert outliermerge.verify(result.output) == []
        own = outliermerge.run(
            dict(result.manifest["spec"]), output=tmp_path / "own" / result.output.name,
            kernels=kernels,
        )  # fmt: skip
        assert files_of(own.output) == files_of(result.output)


def test_methods_on_weights_and_on_task_vectors_are_kept_apart(spec, tmp_path):
    # With the base among the models, a mean and a sum of task vectors read the same tensors.
    models = [{"model": spec["base_model"]}, *spec["models"]]
    own = spec | {"models": models}
    methods = ["task_arithmetic", "linear"]
    for result in outliermerge.sweep(own, {"merge_method": methods}, output=tmp_path / "all"):
        alone = outliermerge.run(
            dict(result.manifest["spec"]), output=tmp_path / "own" / result.output.name
        )
        assert files_of(alone.output) == files_of(result.output)


def test_a_model_can_have_its_own_values(spec, tmp_path):
    first, second = outliermerge.sweep(
        spec, {"models.2.weight": [0.25, 0.75]}, output=tmp_path / "out"
    )
    assert [m.get("parameters") for m in first.manifest["spec"]["models"]] == [
        None,
        {"weight": 0.25},
    ]
    assert first.output.name == "models.2.weight=0.25"
    assert files_of(first.output) != files_of(second.output)


def test_the_models_are_read_once_and_statistics_shared(tmp_path):
    generator = torch.Generator().manual_seed(3)
    tensors = {"w": torch.randn(1500, 1000, generator=generator)}
    folders = [
        save_tensors(tmp_path / name, {"w": tensors["w"] + scale * tensors["w"].flip(0)})
        for name, scale in (("base", 0), ("a", 0.01), ("b", 0.02))
    ]
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders[1:]],
    }
    before = num_read_bytes()
    outliermerge.run(spec, output=tmp_path / "one")
    between = num_read_bytes()
    results = outliermerge.sweep(spec, {"t": [1, 2, 2.5, 3]}, output=tmp_path / "four")
    one, four = between - before, num_read_bytes() - between
    assert one > 2 * 3 * 6_000_000  # σ is measured in one pass, the merge is another
    assert four < 1.1 * one
    sigmas = [result.manifest["tensors"]["w"]["statistics"]["sigma"] for result in results]
    assert sigmas == sigmas[:1] * 4


def test_equal_tensors_are_copied_where_the_method_keeps_them(tmp_path):
    tensors = {"w": torch.tensor([1.0, -2.0]), "v": torch.tensor([1.0, 0.0])}
    moved = tensors | {"v": torch.tensor([0.0, 1.0])}
    models = [save_tensors(tmp_path / "a", tensors), save_tensors(tmp_path / "b", moved)]
    spec = {"merge_method": "linear", "models": [{"model": str(model)} for model in models]}
    kept, summed = outliermerge.sweep(spec, {"normalize": [True, False]}, output=tmp_path / "out")
    assert kept.manifest["tensors"]["w"]["action"] == "copy"
    assert summed.manifest["tensors"]["w"]["action"] == "merge"
    assert kept.manifest["tensors"]["v"]["action"] == "merge"


def test_an_interrupted_sweep_goes_on(spec, tmp_path):
    settings = {"t": [1.0, 2.0]}
    whole = outliermerge.sweep(spec, settings, output=tmp_path / "whole")
    worked = 0

    def interrupt(num_bytes: int) -> None:
        nonlocal worked
        worked += num_bytes
        if worked > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outliermerge.sweep(spec, settings, output=tmp_path / "out", on_progress=interrupt)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "t=1.0.partial",
        "t=1.0.partial.journal",
        "t=2.0.partial",
        "t=2.0.partial.journal",
    }
    again = outliermerge.sweep(spec, settings, output=tmp_path / "out")
    assert all(result.num_resumed > 0 for result in again)
    for left, right in zip(whole, again, strict=True):
        assert files_of(left.output) == files_of(right.output)


def test_one_file_outputs_have_the_suffix(tmp_path):
    files = []
    for number in range(3):
        folder = save_tensors(tmp_path / f"m{number}", {"w": torch.arange(6.0) * number})
        files.append((folder / "model.safetensors").rename(tmp_path / f"{number}.safetensors"))
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(files[0]),
        "models": [{"model": str(file)} for file in files[1:]],
    }
    results = outliermerge.sweep(spec, {"lambda": [0.5, 1]}, output=tmp_path / "out")
    assert [result.output.name for result in results] == [
        "lambda=0.5.safetensors",
        "lambda=1.safetensors",
    ]
    assert all(result.output.is_file() for result in results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a sweep needs some"),
        ({"tt": [1]}, r"^settings tt=1: .*min_sigma has no parameter 'tt'.*Did you mean 't'"),
        ({"t": [1, -1]}, r"t=-1: .*expected a number ≥ 0"),
        ({"t": [1, 1]}, "t=1 is there twice"),
        ({"models.3.weight": [1]}, "there is no model 3: the spec has models 1 to 2"),
        ({"models.0.weight": [1]}, "there is no model 0"),
        ({"models.1": [1]}, "is no setting of a spec"),
        ({"merge_method": ["min_sigma", "tie"]}, r"merge_method=tie: .*Did you mean 'ties'"),
        ({"weight": [1]}, r"model 1 has a weight of its own.*models\.1\.weight"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value) or "none",
)
def test_wrong_settings_are_refused_by_name(settings, message, spec, tmp_path):
    own = dict(spec)
    if "weight" in settings:
        own["models"] = [m | {"parameters": {"weight": 0.5}} for m in spec["models"]]
    with pytest.raises((outliermerge.SpecError, outliermerge.ArgumentError), match=message):
        outliermerge.sweep(own, settings, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["t", "t=", "=1", "t=[1", "t=1,,2", ""])
def test_an_option_of_another_form_is_refused(option):
    with pytest.raises(outliermerge.ArgumentError, match="write KEY=VALUE"):
        parse_values(option)


def test_a_space_in_place_of_an_equals_sign_is_told_as_such(spec, tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    command = ["sweep", str(tmp_path / "spec.yaml"), "--output", "out", "--set", "weight", "0.3"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --set weight: no values: write KEY=VALUE,VALUE,… such as weight")


def test_what_keeps_the_drift_from_being_measured_is_said(spec, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = [model["model"] for model in spec["models"]]
    start = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}}
                                                  for m in models]}  # fmt: skip
    of_stage = {**spec, "stages": [{"name": "start", **start}], "base_model": "start"}
    for name, document in (("stage", of_stage), ("linear", start)):
        Path(f"{name}.yaml").write_text(json.dumps(document))
        key = "t=2,3" if name == "stage" else "models.1.weight=1,2"
        assert cli.main(["sweep", f"{name}.yaml", "--output", name, "--set", key]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "How far each moved is not measured: that takes a method with a base model" in said
        assert "not stages" in said


def test_the_command_prints_what_was_written(spec, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(spec))
    named = [[Path(model["model"]).name] for model in spec["models"]]
    command = ["sweep", str(path), "--output", "out", "--set", "t=2,3"]
    assert cli.main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [entry["settings"] for entry in printed["outputs"]] == [{"t": 2}, {"t": 3}]
    for entry in printed["outputs"]:
        assert outliermerge.verify(entry["output"]) == []
    assert cli.main(command) == 1
    assert "exists already. Use --overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    place, heads, *rows = capsys.readouterr().out.splitlines()
    assert place == "in out:"
    assert heads.split() == ["output", "change", "%", "cosine", *named[0], "cosine", *named[1],
                             "length", "kept", "%", *named[0], "kept", "%", *named[1]]  # fmt: skip
    drifts = [read_manifest(entry["output"])["drift"] for entry in printed["outputs"]]
    for row, entry, drift in zip(rows, printed["outputs"], drifts, strict=False):
        where, change, first, second, length, *kept = row.split()
        assert f"out/{where}" == entry["output"] and float(change) == pytest.approx(
            100 * drift["relative_size"], rel=1e-2
        )
        assert [float(first), float(second)] == list(drift["cosines"].values())
        assert float(length) == drift["length"]
        shares = [100 * share for share in drift["outliers_kept"].values()]
        assert [float(share) for share in kept] == pytest.approx(shares, rel=1e-2)
    assert rows[-1].startswith("wrote 2 outputs: 30 tensors, ")
    assert cli.main(["sweep", str(path), "--set", "t=2,3"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: no output: give --output or")
    assert cli.main([*command, "--set", "t=4"]) == 2
    assert "--set t: is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("num_lines", range(1, 6))
def test_a_sweep_killed_between_two_lines_says_the_same_of_what_was_read(
    spec, tmp_path, monkeypatch, num_lines
):
    settings = {"density": [0.5, 1.0]}  # which read a tensor in two passes, and in one
    spec = spec | {"merge_method": "ties"}
    outliermerge.sweep(spec, settings, output=tmp_path / "whole")
    with stopping_after(monkeypatch, num_lines), pytest.raises(KeyboardInterrupt):
        outliermerge.sweep(spec, settings, output=tmp_path / "out")
    outliermerge.sweep(spec, settings, output=tmp_path / "out")

    for name in ("density=0.5", "density=1.0"):
        found, expected = (tmp_path / place / name for place in ("out", "whole"))
        manifest = "outliermerge.json"
        assert (found / manifest).read_bytes() == (expected / manifest).read_bytes()
