"""The sentence that a comparison of weights ends with."""

from __future__ import annotations

import json
import re

import pytest
import torch
from checkpoints import save_tensors

from outliermerge.analysis.compare import compare_weights
from outliermerge.cli.main import main

SHAPE, NUM_LAYERS = (40, 50), 3


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Save a model whose change of the base is given tensor by tensor."""
    monkeypatch.chdir(tmp_path)

    def write(name, change):
        generator = torch.Generator().manual_seed(5)
        tensors = {
            f"layers.{layer}.{part}.weight": torch.randn(SHAPE, generator=generator)
            for layer in range(NUM_LAYERS)
            for part in ("attn", "mlp")
        }
        save_tensors(tmp_path / name, {key: value + change(key) for key, value in tensors.items()})
        return name

    write("base", lambda name: 0)
    return write


def _noise(seed):
    def change(name):
        generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
        return torch.randn(SHAPE, generator=generator)

    return change


def _verdict(*models, base="base", **more):
    return compare_weights(models, base=base, **more).verdict


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.9, "largely in the same direction"),
        (0.3, "partly in the same direction"),
        (0.0, "in unrelated directions"),
        (-0.6, "in opposite directions, so that a merge undoes a part of each"),
    ],
)
def test_it_tells_how_the_changes_lie(save, share, words):
    one, other = _noise(1), _noise(2)
    a = save("a", one)
    b = save("b", lambda name: share * one(name) + (1 - share**2) ** 0.5 * other(name))
    said = _verdict(a, b)
    assert words in said
    assert said.startswith("a and b changed the base ") and said.endswith(".")


def test_it_tells_where_the_conflicts_are(save):
    one, other = _noise(1), _noise(2)
    a = save("a", one)
    conflicting = "layers.1.mlp.weight"
    b = save("b", lambda name: -one(name) if name == conflicting else one(name) + other(name) / 9)
    said = _verdict(a, b)
    assert re.search(
        r"largest share of them in mlp \(\d+%\), and by layer in layers\.1 \(\d+%\)", said
    )
    found = compare_weights([a, b], base="base")
    (whole,) = found.pairs
    assert f"{whole.conflict_ratio:.2%} of all elements" in said
    share = whole.conflict_ratio / whole.both_outliers_ratio
    assert f"{share:.0%} have opposite signs" in said


def test_of_several_pairs_it_names_the_worst(save):
    one = _noise(1)
    models = [save("a", one), save("b", lambda name: one(name) * 0.9)]
    models.append(save("c", lambda name: -one(name)))
    assert re.match("Of 3 pairs, [ab] and c conflict most", _verdict(*models))


def test_without_conflicts_it_says_so(save):
    one = _noise(1)
    said = _verdict(save("a", one), save("b", lambda name: 0.5 * one(name)))
    assert "nothing that min-σ keeps whole of both will cancel" in said


def test_without_a_base_it_asks_for_one(save):
    said = _verdict(save("a", _noise(1)), save("b", _noise(2)), base=None)
    assert "name the base model" in said and "a and b are the least alike" in said


def test_of_unchanged_models_nothing_is_said(save):
    models = [save("a", lambda name: 0), save("b", lambda name: 0)]
    assert _verdict(*models).startswith("Nothing can be said")


def test_the_command_ends_with_it_and_its_json_has_it(save, capsys):
    models = [save("a", _noise(1)), save("b", _noise(2))]
    words = ["compare-weights", *models, "--base", "base"]
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    verdict = _verdict(*models)
    assert printed.endswith(verdict)
    assert main([*words, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict
