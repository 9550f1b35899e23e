"""The rows of a plan's parameters: one for each model and filter."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.cli.main import main
from outliermerge.planning.settings_used import UsedSetting, used_settings

NUM_LAYERS = 4


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            f"layers.{layer}.{part}.weight": torch.randn(6, 5, generator=generator)
            for layer in range(NUM_LAYERS)
            for part in ("attn", "mlp")
        }
        save_tensors(tmp_path / name, tensors | {"head.weight": torch.ones(2, 3) * number})
    return tmp_path


def _rows(a=None, b=None, method="ties", **parameters):
    spec = {
        "merge_method": method,
        "base_model": "base",
        "models": [
            {"model": name} | ({"parameters": own} if own else {})
            for name, own in (("a", a), ("b", b))
        ],
        "parameters": parameters,
    }
    return [
        (row.parameter, row.models, row.filter, row.text, row.num_tensors)
        for row in used_settings(outliermerge.plan(spec))
    ]


def _of(name, rows):
    return [row[1:] for row in rows if row[0] == name]


FILTERS = [{"filter": "attn", "value": [0.2, 0.5]}, {"filter": "mlp", "value": 0.3}]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [(("a", "b"), None, "1", 9)]),
        ({"weight": 0.5}, [(("a", "b"), None, "0.5", 9)]),
        ({"weight": [0.2, 0.5]}, [(("a", "b"), None, "0.2→0.5", 9)]),
        ({"weight": [0.2, 0.5, 0.1]}, [(("a", "b"), None, "0.2→0.5→0.1", 9)]),
        ({"a": {"weight": 0.3}}, [(("a",), None, "0.3", 9), (("b",), None, "1", 9)]),
        (
            {"a": {"weight": FILTERS}, "weight": 0.7},
            [
                (("a",), "attn", "0.2→0.5", 4),
                (("a",), "mlp", "0.3", 4),
                (("a",), None, "0.7", 1),
                (("b",), None, "0.7", 9),
            ],
        ),
        (
            {"weight": [*FILTERS, {"value": 2}]},
            [
                (("a", "b"), "attn", "0.2→0.5", 4),
                (("a", "b"), "mlp", "0.3", 4),
                (("a", "b"), None, "2", 1),
            ],
        ),
    ],
)
def test_each_model_and_filter_has_a_row_with_its_tensors(place, settings, wanted):
    assert _of("weight", _rows(**settings)) == wanted


def test_parameters_of_the_merge_have_no_model(place):
    rows = _rows(normalize=False, int8_mask=True, **{"lambda": [0.5, 1.5]})
    assert _of("normalize", rows) == [((), None, "false", 9)]
    assert _of("lambda", rows) == [((), None, "0.5→1.5", 9)]
    assert _of("int8_mask", rows) == []


def test_methods_on_weights_have_rows_too(place):
    rows = _rows(a={"weight": 0.3}, method="linear")
    assert _of("weight", rows) == [(("a",), None, "0.3", 9), (("b",), None, "1", 9)]


def test_the_command_prints_them(place, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    (place / "spec.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "- {model: a, parameters: {weight: [{filter: attn, value: [0.2, 0.5]}]}}\n"
        "- {model: b}\n"
    )
    assert main(["plan", "spec.yaml", "--no-load-check"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["weight", "0.2→0.5", "over", "the", "layers", "4", "a", "attn"] in lines
    assert ["weight", "1", "5", "a", "all", "others"] in lines
    assert ["weight", "1", "9", "b", "none"] in lines


def test_a_setting_as_json_keeps_its_values():
    row = UsedSetting("weight", ("a",), None, (0.2, 0.5), 3)
    assert row.as_dict()["values"] == [0.2, 0.5]


@pytest.mark.parametrize(
    ("method", "own", "parameters", "is_noted"),
    [
        ("ties", {}, {"weight": [0.3, 0.7]}, True),
        ("ties", {}, {"density": [{"filter": "mlp", "value": [0.3, 0.7]}]}, True),
        ("ties", {}, {"weight": [0.3, 0.5, 0.7]}, False),
        ("ties", {}, {"lambda": [0.3, 0.7]}, False),
        ("ties", {"parameters": {"weight": [0.3, 0.7]}}, {}, False),
    ],
)
def test_a_list_as_long_as_the_models_is_noted_as_a_gradient(
    place, method, own, parameters, is_noted
):
    models = [{"model": name} | own for name in ("a", "b")]
    spec = {"merge_method": method, "base_model": "base", "models": models}
    notes = outliermerge.plan(spec | {"parameters": parameters}).notes
    (name,) = parameters or ["weight"]
    said = f"`{name}: [0.3, 0.7]` is a gradient over the layers, the same for every model"
    assert any(note.startswith(said) for note in notes) == is_noted


def test_long_names_of_models_break_no_row_of_the_layers(place, monkeypatch, capsys):
    folder = place / ("a-folder-of-models" * 4)
    folder.mkdir()
    for name in ("a", "b"):
        (place / name).rename(folder / name)
    sources = [
        {"sources": [{"model": str(folder / name), "layer_range": [0, 2]}]} for name in ("a", "b")
    ]
    (place / "spec.yaml").write_text(
        json.dumps({"merge_method": "passthrough", "slices": sources, "stack": "layers"})
    )
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "spec.yaml", "--no-load-check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("layers of")]
    assert [line.split()[-2] for line in lines[at + 1 : at + 3]] == ["a", "b"]
    assert all(len(line) <= 80 for line in lines[at : at + 3])
