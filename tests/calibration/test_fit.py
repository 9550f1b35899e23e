"""Weights fitted by entropy, against Adam on a merge that the test makes in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from checkpoints import fine_tune, load_folder, save_tensors
from text_models import save_text_model
from torch import Tensor

import outliermerge
from outliermerge.cli.main import main

TEXTS = [f"number {n} is {n * n}." for n in range(6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    save_text_model(folder / "base", seed=0)
    for number in range(2):
        fine_tune(folder / "base", folder / f"m{number}", seed=number + 1, scale=0.1)
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"m{number}")} for number in range(2)],
        "parameters": {"weight": 0.3, "lambda": 0.8},
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(spec))
    return folder


def entropy(model: Any, state: dict[str, Tensor], ids: list[Tensor]) -> Tensor:
    total = 0
    for one in ids:
        logits = torch.func.functional_call(model, state, kwargs={"input_ids": one}).logits
        logs = logits.log_softmax(-1)
        total = total - (logs.exp() * logs).sum(-1).mean()
    return total / len(ids)


def ids_of(place: Path) -> list[Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]


def group_of(name: str, by: str) -> str:
    if by == "tensor":
        return name
    return ".".join(name.split(".")[:3]) if "layers" in name and by == "layer" else ""


def by_hand(place: Path, by: str, steps: int, rate: float) -> dict[str, Tensor]:
    """Return the weights (M,) of each group."""
    base, *models = (load_folder(place / name) for name in ("base", "m0", "m1"))
    base = {name: one.double() for name, one in base.items()}
    model = transformers.LlamaForCausalLM.from_pretrained(place / "base", dtype=torch.float64)
    groups = dict.fromkeys(group_of(name, by) for name in base)
    weights = {
        group: torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True) for group in groups
    }
    optimizer = torch.optim.Adam(list(weights.values()), lr=rate)
    ids = ids_of(place)
    for step in range(steps):
        state = {}
        for name, own in base.items():
            taus = torch.stack([one[name].double() - own for one in models])
            weight = weights[group_of(name, by)].view(2, *[1] * own.ndim)
            state[name] = own + 0.8 * (weight * taus).sum(0)
        optimizer.zero_grad()
        entropy(model, state, [ids[(2 * step + n) % len(ids)] for n in range(2)]).backward()
        optimizer.step()
    return {group: weight.detach() for group, weight in weights.items()}


@pytest.mark.parametrize("by", ["model", "layer", "tensor"])
def test_weights_are_those_of_adam_and_a_run_gives_what_was_fitted(by, place, tmp_path, capsys):
    fitted = tmp_path / "fitted.yaml"
    given = ["fit", str(place / "merge.yaml"), "--data", str(place / "data.jsonl"), "--by", by]
    given += ["-o", str(fitted), "--steps", "5", "--rate", "0.05", "--batch", "2", "--json"]
    assert main(given) == 0
    said = json.loads(capsys.readouterr().out)["entropy"]
    wanted = by_hand(place, by, 5, 0.05)
    plan = outliermerge.plan(str(fitted))
    for job in plan.jobs:
        found = torch.tensor(job.parameters["weight"], dtype=torch.float64)
        assert torch.allclose(found, wanted[group_of(job.name, by)], atol=2e-3), job.name
    moved = {job.parameters["weight"] for job in plan.jobs}
    assert len(moved) == len(wanted)
    outliermerge.run(str(fitted), output=tmp_path / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    with torch.no_grad():
        after = float(entropy(model, dict(model.named_parameters()), ids_of(place)))
    assert after == pytest.approx(said["after"], rel=1e-5)
    assert said["after"] < said["before"]


def test_what_cannot_be_fitted_is_told(place, tmp_path, capsys):
    spec = yaml.safe_load((place / "merge.yaml").read_text())
    data = ["--data", str(place / "data.jsonl"), "-o", str(tmp_path / "out.yaml")]

    def refused(code: int, *more: str, **changed: Any) -> str:
        path = tmp_path / "merge.yaml"
        path.write_text(yaml.safe_dump(spec | changed))
        assert main(["fit", str(path), *data, *more]) == code
        assert not (tmp_path / "out.yaml").exists()
        return capsys.readouterr().err

    assert "expected task_arithmetic" in refused(2, merge_method="ties", parameters={})
    assert "found filters or several values" in refused(2, parameters={"weight": [0.1, 0.4]})
    assert "normalize: true" in refused(2, parameters={"normalize": True})
    assert "modifiers: fit takes no" in refused(2, modifiers=[{"modifier": "lines"}])
    for rate in ("0", "nan", "inf"):
        assert "expected a number above 0" in refused(2, "--rate", rate)
    large = {"weight": 3e38, "lambda": 3e38}
    assert "infinite, NaN or too large for float32" in refused(1, parameters=large)
    for there, said in (("merge.yaml", "is the spec that is read"), ("no/x.yaml", "no folder"),
                        ("", "is a folder")):  # fmt: skip
        assert said in refused(1, "-o", str(tmp_path / there))
    other = {"models": [{"model": str(place / "m0")}, {"model": str(tmp_path / "other")}]}
    save_text_model(tmp_path / "other", seed=3)
    weights = load_folder(tmp_path / "other")
    del weights["model.norm.weight"]
    save_tensors(tmp_path / "other", weights)
    assert "model.norm.weight is not in it, expected [32]" in refused(1, **other)


def test_the_function_gives_a_spec_that_the_command_writes(place, tmp_path):
    more = ["--by", "model", "--steps", "2", "--quiet", "-o", str(tmp_path / "fitted.yaml")]
    assert main(["fit", str(place / "merge.yaml"), "--data", str(place / "data.jsonl"), *more]) == 0
    spec, data = yaml.safe_load((place / "merge.yaml").read_text()), place / "data.jsonl"
    found = outliermerge.fit(spec, data, by="model", steps=2)
    assert found.document == yaml.safe_load((tmp_path / "fitted.yaml").read_text())
    with pytest.raises(
        outliermerge.ArgumentError, match="rate: found 0, expected a number above 0"
    ):
        outliermerge.fit(spec, data, rate=0)
    with pytest.raises(outliermerge.ArgumentError, match="steps: found 0, expected a whole number"):
        outliermerge.fit(spec, data, steps=0)
    with pytest.raises(outliermerge.ArgumentError, match=r"rate: found 10.*, expected a number"):
        outliermerge.fit(spec, data, rate=10**400)
    with pytest.raises(outliermerge.ArgumentError, match="by: found 'x', expected model, layer or"):
        outliermerge.fit(spec, data, by="x")
    with pytest.raises(outliermerge.ArgumentError, match="data: none given, expected one or more"):
        outliermerge.fit(spec, [])
