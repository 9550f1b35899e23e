"""RegMean++ against a merge layer by layer in float64 that the test makes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load_folder
from text_models import save_text_model
from torch import Tensor

import outliermerge
from outliermerge.cli.main import main

TEXTS = [
    [f"number {n} is {n * n}." for n in range(5)],
    [f"{n} and {n} are {n + n}" for n in range(6)],
]
WEIGHTS = [1.0, 2.0]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alternating")
    for number, texts in enumerate(TEXTS):
        save_text_model(folder / f"m{number}", seed=number)
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"d{number}.jsonl").write_text("".join(lines))
    return folder


def spec_of(place: Path, folder: Path, **more: Any) -> Path:
    entries = [
        {
            "model": str(place / f"m{number}"),
            "statistics": str(folder / f"s{number}"),
            "parameters": {"weight": weight},
        }
        for number, weight in enumerate(WEIGHTS)
    ]
    spec = {"merge_method": "regmean", "models": entries, "parameters": {"reduce": 0.5}} | more
    path = folder / "merge.yaml"
    path.write_text(json.dumps(spec))
    return path


def command_of(place: Path, spec: Path) -> list[str]:
    data = [part for n in range(2) for part in ("--data", str(place / f"d{n}.jsonl"))]
    return ["measure", str(spec), *data, "-q"]


def layer_by_layer(place: Path) -> dict[str, Tensor]:
    models = [load_folder(place / f"m{number}") for number in range(2)]
    models = [{name: one.double() for name, one in model.items()} for model in models]
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    state = {
        name: sum(share * model[name] for share, model in zip(shares, models, strict=True))
        for name in models[0]
    }
    run = transformers.LlamaForCausalLM.from_pretrained(place / "m0", dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "m0")

    def gram_of(name: str, number: int, prefix: str) -> Tensor:
        own = {n: one for n, one in models[number].items() if prefix and n.startswith(prefix)}
        run.load_state_dict(state | own)
        rows = []
        module = run.get_submodule(name.removesuffix(".weight"))
        hook = module.register_forward_pre_hook(lambda module, given: rows.append(given[0][0]))
        with torch.no_grad():
            for text in TEXTS[number]:
                run(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
        hook.remove()
        x = torch.cat(rows)
        return x.T @ x / len(x)

    for prefix in ("model.layers.0.", "model.layers.1.", "lm_head."):
        merged = {}
        for name in (n for n in state if n.startswith(prefix) and state[n].ndim == 2):
            grams = [gram_of(name, n, prefix * (prefix != "lm_head.")) for n in range(2)]
            grams = [
                weight * torch.where(torch.eye(len(gram)) > 0, gram, gram * 0.5)
                for weight, gram in zip(WEIGHTS, grams, strict=True)
            ]
            right = sum(model[name] @ gram for model, gram in zip(models, grams, strict=True))
            merged[name] = torch.linalg.solve(sum(grams), right, left=False)
        state |= merged
    return state


def test_a_merge_by_what_is_measured_is_the_merge_layer_by_layer(place, tmp_path):
    spec = spec_of(place, tmp_path)
    assert main(command_of(place, spec)) == 0
    outliermerge.run(str(spec), output=tmp_path / "out")
    found, wanted = load_folder(tmp_path / "out"), layer_by_layer(place)
    for name, tensor in found.items():
        largest = float(wanted[name].abs().max())
        assert torch.allclose(tensor.double(), wanted[name], rtol=1e-3, atol=1e-4 * largest), name
    # It is not the plain RegMean: the second layer's inputs are others.
    for number in range(2):
        given = ["measure", str(place / f"m{number}"), "--data", str(place / f"d{number}.jsonl")]
        assert main([*given, "-q", "--statistics", "gram", "-o", str(tmp_path / f"p{number}")]) == 0
    name = "model.layers.1.mlp.down_proj.weight"
    plain, other = (load_folder(tmp_path / f"{kind}1/gram")[name] for kind in "ps")
    assert (plain - other).norm() > 0.01 * plain.norm()
    manifest = json.loads((tmp_path / "s1/statistics.json").read_text())
    assert manifest["settings"]["merged"]["reduce"] == 0.5


def test_what_was_interrupted_goes_on(place, tmp_path, monkeypatch):
    from outliermerge.calibration import sums

    folders = [tmp_path / name for name in ("whole", "stopped")]
    specs = []
    for folder in folders:
        folder.mkdir()
        specs.append(spec_of(place, folder))
    assert main(command_of(place, specs[0])) == 0
    added, calls = sums.Summing.add, []

    def add(self: Any, *given: Any) -> None:
        calls.append(given)
        if len(calls) == 14:  # in the second layer
            raise KeyboardInterrupt
        added(self, *given)

    monkeypatch.setattr(sums.Summing, "add", add)
    assert main(command_of(place, specs[1])) == 130
    assert not (folders[1] / "s0").exists()
    assert main(command_of(place, specs[1])) == 0
    assert len(calls) < 14 + 33 - 11 + 1
    for number in range(2):
        pair = [load_folder(folder / f"s{number}/gram") for folder in folders]
        assert all(pair[0][name].equal(pair[1][name]) for name in pair[0])


def test_what_cannot_be_merged_layer_by_layer_is_told(place, tmp_path, capsys):
    def refused(code: int, *more: str, **changed: Any) -> str:
        spec = spec_of(place, tmp_path, **changed)
        assert main([*command_of(place, spec), *more]) == code
        return capsys.readouterr().err

    assert "expected regmean: a spec is measured" in refused(
        2, merge_method="fisher", parameters={}
    )
    filtered = {"reduce": [{"filter": "mlp", "value": 0.5}, {"value": 0.9}]}
    assert "reduce: found filters or several values" in refused(2, parameters=filtered)
    assert "given 3 time(s), expected 2" in refused(2, "--data", str(place / "d0.jsonl"))
    assert "the spec names the folders" in refused(2, "-o", str(tmp_path / "x"))
    model = ["measure", str(place / "m0"), *["--data", str(place / "d0.jsonl")] * 2]
    assert main(model) == 2
    assert "given 2, expected one for a model" in capsys.readouterr().err
