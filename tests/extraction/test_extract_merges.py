"""Merges of adapters into an adapter, against peft's own combinations and what `run` makes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import gpt2, llama
from checkpoints import load_folder, save_lora, save_tensors
from safetensors.torch import load_file

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import ArgumentError, OutlierMergeError, SpecError
from outliermerge.extraction.report import Extraction

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
SETTINGS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "rank_pattern": {"1.self_attn.q_proj": 1},
    },
]  # fmt: skip
WEIGHTS = [0.5, -0.25, 2.0]
LINEAR = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.8}}


def trained(folder: Path, name: str, seed: int, make: Any = llama, **settings: Any) -> str:
    """Save an adapter of the base with random weights, as peft does."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(make(), peft.LoraConfig(**settings))
    for key, parameter in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            parameter.data.copy_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings(action="ignore"):
        # Else peft saves the embeddings of the base, too, where they are adapted.
        model.save_pretrained(folder / name, save_embedding_layers=False)
    return str(folder / name)


def spec_of(folder: Path, **keys: Any) -> dict[str, Any]:
    """Save a base and adapters, and return a spec that merges them."""
    llama().save_pretrained(folder / "base")
    names = [trained(folder, f"adapter{n}", n, **each) for n, each in enumerate(SETTINGS)]
    models = [
        {"model": name, "parameters": {"weight": weight}}
        for name, weight in zip(names, WEIGHTS, strict=True)
    ]
    return {"base_model": str(folder / "base"), "models": models, **LINEAR, **keys}


def changes(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return what an adapter of ours changes, B·A from its file in float64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            found[name] = tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
    return found


def merged(spec: Mapping[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Return what `run` changes of the base in the same merge."""
    outliermerge.run(dict(spec), output=folder / "whole")
    base, model = load_folder(folder / "base"), load_folder(folder / "whole")
    found = {name: model[name].double() - base[name].double() for name in base}
    return {name: change for name, change in found.items() if change.any()}


def check(made: Extraction, spec: Mapping[str, Any], folder: Path) -> None:
    """Compare an adapter with the merge as a model, tensor by tensor within the stated error."""
    expected, found = merged(spec, folder), changes(folder, made.output)
    stated = {tensor.name: tensor for tensor in made.tensors}
    assert expected.keys() == found.keys() == stated.keys()
    for name, change in expected.items():
        lost = float((change - found[name]).norm())
        assert lost <= stated[name].error * stated[name].norm + 2e-6, name
        assert stated[name].norm == pytest.approx(float(change.norm()), rel=1e-4)


def test_a_weighted_sum_is_exact_and_what_peft_combines(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    made = outliermerge.extract(spec, output=tmp_path / "sum")
    assert made.error < 1e-6
    ranks = {tensor.name: tensor.rank for tensor in made.tensors}
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == 9
    assert ranks["model.layers.1.self_attn.q_proj.weight"] == 6
    assert ranks["model.layers.0.mlp.down_proj.weight"] == 2
    check(made, spec, tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter0", "0")
    for number in (1, 2):
        model.load_adapter(tmp_path / f"adapter{number}", str(number))
    model.add_weighted_adapter(["0", "1", "2"], [0.8 * w for w in WEIGHTS], "cat", "cat")
    model.set_adapter("cat")
    ours = peft.PeftModel.from_pretrained(llama(), tmp_path / "sum")
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
        assert float((ours(ids).logits - llama()(ids).logits).abs().max()) > 1e-3


@pytest.mark.parametrize("asked", [{"rank": 3}, {"energy": 0.9}, {"error": 0.4}], ids=str)
def test_a_sum_of_lower_rank_loses_the_smallest_singular_values(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    spec = spec_of(tmp_path)
    made = outliermerge.extract(spec, output=tmp_path / "sum", **asked)
    check(made, spec, tmp_path)
    whole = changes(tmp_path, outliermerge.extract(spec, output=tmp_path / "all").output)
    for tensor in made.tensors:
        values = torch.linalg.svdvals(whole[tensor.name])
        tail = (values.square().flip(0).cumsum(0).flip(0) / values.square().sum()).sqrt().tolist()
        assert tensor.error == pytest.approx(tail[tensor.rank], abs=1e-6)
        assert tensor.rank <= asked.get("rank", 9)
        assert tensor.error <= asked.get("error", 1.0)
        assert tensor.error**2 <= 1 - asked.get("energy", 0.0)


@pytest.mark.parametrize("method", ["ties", "min_sigma", "dare_linear"])
def test_other_methods_give_the_nearest_adapter_of_a_rank(method: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, merge_method=method, parameters={})
    for model in spec["models"]:
        model.pop("parameters")
    with pytest.raises(ArgumentError, match="no weighted sum of LoRAs"):
        outliermerge.extract(spec, output=tmp_path / "sum")
    made = outliermerge.extract(spec, output=tmp_path / "sum", rank=5)
    check(made, spec, tmp_path)
    q_proj = next(t for t in made.tensors if t.name.endswith("0.self_attn.q_proj.weight"))
    assert 0.01 < q_proj.error < 0.9 or method == "dare_linear"


def in_core(adapters: list[Path], name: str, method: str, **parameters: Any) -> torch.Tensor:
    """Merge by Core Space as its paper has it, in plain torch: bases, cores, merge, back."""
    key = "base_model.model." + name.removesuffix(".weight")
    pairs, scales = [], []
    for path, settings in zip(adapters, SETTINGS, strict=True):
        tensors = load_file(path / "adapter_model.safetensors")
        if f"{key}.lora_A.weight" in tensors:
            a, b = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
            rank = len(a)
            scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
            pairs.append((b, a))
            scales.append(scale)
        else:
            pairs.append(None)
            scales.append(0.0)
    held = [(s * pair[0], pair[1]) for s, pair in zip(scales, pairs, strict=True) if pair]
    u = torch.linalg.svd(torch.cat([b for b, _ in held], 1), full_matrices=False)[0]
    vh = torch.linalg.svd(torch.cat([a for _, a in held]), full_matrices=False)[2]
    zero = torch.zeros(u.shape[1], len(vh), dtype=torch.float64)
    cores = [
        {name: u.T @ (s * pair[0]) @ pair[1] @ vh.T if pair else zero}
        for s, pair in zip(scales, pairs, strict=True)
    ]
    small = outliermerge.merge_state_dicts(cores, base={name: zero}, method=method, **parameters)
    return u @ small[name] @ vh


def test_core_space_merges_by_any_method(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, merge_method="ties", parameters={"density": 0.5})
    made = outliermerge.extract(spec, output=tmp_path / "core", core=True)
    found = changes(tmp_path, tmp_path / "core")
    adapters = [tmp_path / f"adapter{number}" for number in range(3)]
    for tensor in made.tensors:
        expected = in_core(adapters, tensor.name, "ties", density=0.5, weight=WEIGHTS)
        torch.testing.assert_close(found[tensor.name], expected, rtol=0, atol=1e-6)
        assert tensor.error < 1e-6 and tensor.rank <= 9
    smaller = outliermerge.extract(spec, output=tmp_path / "small", core=True, rank=2)
    assert max(tensor.rank for tensor in smaller.tensors) == 2


def test_core_space_of_a_weighted_sum_is_the_sum(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    check(outliermerge.extract(spec, output=tmp_path / "core", core=True), spec, tmp_path)


def test_layers_that_are_stored_transposed_and_embeddings(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    names = [
        trained(tmp_path, f"adapter{n}", n, gpt2, r=2, target_modules=["c_attn", "c_proj"])
        for n in range(2)
    ]
    spec = LINEAR | {"base_model": str(tmp_path / "base"), "models": [{"model": n} for n in names]}
    outliermerge.extract(spec, output=tmp_path / "sum")
    model = peft.PeftModel.from_pretrained(gpt2(), names[0], "0")
    model.load_adapter(names[1], "1")
    model.add_weighted_adapter(["0", "1"], [0.8, 0.8], "cat", "cat")
    model.set_adapter("cat")
    ours = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "sum")
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval()(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-5
        )


def test_what_is_beside_the_factors_is_merged_and_saved_whole(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    names = [
        trained(
            tmp_path, f"adapter{n}", n, r=2, target_modules=["q_proj", "embed_tokens"],
            modules_to_save=["norm"],
        )
        for n in range(2)
    ]  # fmt: skip
    spec = LINEAR | {"base_model": str(tmp_path / "base"), "models": [{"model": n} for n in names]}
    made = outliermerge.extract(spec, output=tmp_path / "sum")
    hows = {tensor.name: tensor.how for tensor in made.tensors}
    assert hows["model.norm.weight"] == "whole" and hows["model.embed_tokens.weight"] == "embedding"
    again = {"merge_method": "passthrough", "base_model": spec["base_model"]}
    again["models"] = [{"model": str(tmp_path / "sum")}]
    outliermerge.run(again, output=tmp_path / "read")
    outliermerge.run(spec, output=tmp_path / "whole")
    read, whole = load_folder(tmp_path / "read"), load_folder(tmp_path / "whole")
    for name, expected in whole.items():
        torch.testing.assert_close(read[name], expected, rtol=0, atol=2e-6, msg=name)


def test_merges_of_which_no_adapter_can_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(tmp_path)
    with pytest.raises(ArgumentError, match="base: the spec says it"):
        outliermerge.extract(spec, base="base", output=tmp_path / "a")
    with pytest.raises(ArgumentError, match="core: is for merges"):
        outliermerge.extract("m", base="base", output=tmp_path / "a", rank=2, core=True)
    alone = spec | {"merge_method": "linear", "parameters": {}}
    del alone["base_model"]
    alone["models"] = [{"model": f"{tmp_path / 'base'}+{each['model']}"} for each in spec["models"]]
    with pytest.raises(SpecError, match="no base_model"):
        outliermerge.extract(alone, output=tmp_path / "a")
    full = spec | {"models": [{"model": str(tmp_path / "tuned")}, *spec["models"]]}
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data += 1
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(OutlierMergeError, match=r"core space merges LoRAs(.|\n)*up_proj"):
        outliermerge.extract(full, output=tmp_path / "a", core=True)
    check(outliermerge.extract(full, output=tmp_path / "a", rank=32), full, tmp_path)


def test_infinite_factors_and_a_spec_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tensors(tmp_path / "base", {"l.weight": torch.zeros(4, 6), "n.weight": torch.ones(4)})
    for number, value in enumerate((1.0, torch.inf)):
        tensors = {
            "l.lora_A.weight": torch.ones(1, 6),
            "l.lora_B.weight": torch.full((4, 1), value),
        }
        save_lora(tmp_path / f"adapter{number}", tensors)
    spec = tmp_path / "merge.yaml"
    text = "merge_method: task_arithmetic\nbase_model: BASE\nmodels:\n- model: ONE\n- model: TWO\n"
    names = {"BASE": "base", "ONE": "adapter0", "TWO": "adapter1"}
    for word, name in names.items():
        text = text.replace(word, str(tmp_path / name))
    spec.write_text(text)
    command = ["extract", str(spec), "-o", str(tmp_path / "out")]
    assert main(command) == 1
    assert "l.weight: the adapters hold values that are infinite" in capsys.readouterr().err
    spec.write_text(text.replace(f"- model: {tmp_path / 'adapter1'}\n", ""))
    assert main(command) == 0
    assert "1 tensors differ, 1 do not" in capsys.readouterr().out
