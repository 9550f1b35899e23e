"""The adapters of outliermerge.peft as models: equal to what merge_and_unload makes of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import ATTENTION, MODELS
from checkpoints import load_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge.checkpoint.adapters.adapter import open_adapter
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError
from outliermerge.peft import NoiseConfig, ScaledLoraConfig
from outliermerge.rng import standard_normal

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Could not find a config file.*",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # peft reads it, transformers renamed it
)

ALL = {"target_modules": "all-linear"}
HEAD = {"task_type": "SEQ_CLS"}
CASES: dict[str, tuple[str, type, dict[str, Any]]] = {
    "scaled": ("llama", ScaledLoraConfig, {"r": 4, "lora_alpha": 6}),
    "scaled, every layer": ("llama", ScaledLoraConfig, {**ALL, "r": 3, "lora_alpha": 1}),
    "scaled, without s": ("llama", ScaledLoraConfig, {**ALL, "train_scale": False}),
    "scaled, gp_pareto": ("llama", ScaledLoraConfig, {"init": "gp_pareto"}),
    "scaled, a new head": (
        "bert",
        ScaledLoraConfig,
        {**HEAD, "target_modules": ["query", "dense"]},
    ),
    "scaled, conv1d": ("gpt2", ScaledLoraConfig, {"target_modules": ["c_attn", "c_proj"]}),
    "scaled, modules to save": (
        "llama",
        ScaledLoraConfig,
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "noise": ("llama", NoiseConfig, {"seed": 5}),
    "noise, every layer": ("llama", NoiseConfig, {**ALL, "seed": -1}),
    "noise, a new head": ("bert", NoiseConfig, {**HEAD, **ALL}),
    "noise, conv1d": ("gpt2", NoiseConfig, {"target_modules": ["c_attn", "c_proj"]}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _adapt(
    case: str, folder: Path, *, dtype: torch.dtype = torch.float32, draw: int = 1, **more: Any
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Save a base and an adapter of it without zeros; return them and what peft merges."""
    kind, config, keys = CASES[case]
    base, adapter, merged = folder / "base", folder / f"adapter{draw}", folder / f"merged{draw}"
    if not base.exists():
        MODELS[kind]().to(dtype).save_pretrained(base)
    model = type(MODELS[kind]()).from_pretrained(base, dtype=dtype)
    adapted = peft.get_peft_model(model, config(**keys | more))
    generator = torch.Generator().manual_seed(draw)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.05 * noise).to(parameter.dtype)
    adapted.save_pretrained(adapter)
    adapted.merge_and_unload().save_pretrained(merged)
    return base, adapter, load_folder(merged)


def _read(checkpoint: Any) -> dict[str, torch.Tensor]:
    with Reader() as reader:
        return {
            name: reader.values(source, 0, source.num_elements).view(source.shape)
            for name, source in checkpoint.tensors.items()
        }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_what_peft_merges_to_the_bit(case, dtype, tmp_path):
    base, adapter, expected = _adapt(case, tmp_path, dtype=DTYPES[dtype])
    before, opened = load_folder(base), open_adapter(adapter, open_checkpoint(base))
    found = _read(opened)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, before[name])]
    assert len(changed) >= 2
    linear = [name for name in changed if opened.tensors[name].stored[0].name == name]
    assert all(found[name].dtype == torch.float32 for name in linear)


@pytest.mark.parametrize("case", [case for case in CASES if "save" not in case])
def test_float64_tells_the_same(case, tmp_path):
    """Independent of peft and of the layers: the formulas from what is in the files."""
    base, adapter, _ = _adapt(case, tmp_path)
    found, before = _read(open_adapter(adapter, open_checkpoint(base))), load_folder(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    stored = load_file(adapter / "adapter_model.safetensors")
    modules = {
        key.removeprefix("base_model.model.").rpartition(".")[0]
        for key in stored
        if "scaled" in key
    }
    for module in modules:
        weight = before[f"{module}.weight"].double()
        part = {
            end: stored[key].double()
            for end in ("scaled_lora_A", "scaled_lora_B", "scaled_lora_s", "scaled_noise_s")
            if (key := f"base_model.model.{module}.{end}") in stored
        }
        if "scaled_noise_s" in part:
            noise = standard_normal(config["seed"], module, 0, weight.numel())
            expected = weight + part["scaled_noise_s"] * noise.double().view(weight.shape)
        else:
            change = (
                part["scaled_lora_B"] @ part["scaled_lora_A"] * config["lora_alpha"] / config["r"]
            )
            s = part.get("scaled_lora_s", torch.zeros(1))
            expected = (1 + s) * weight + (change.T if "conv1d" in case else change)
        torch.testing.assert_close(
            found[f"{module}.weight"].double(), expected, rtol=1e-7, atol=1e-9
        )
    assert len(modules) >= 4


def test_noise_is_not_in_the_file(tmp_path):
    _, adapter, _ = _adapt("noise, every layer", tmp_path)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(stored) == 14
    assert {tensor.shape for tensor in stored.values()} == {(1,)}


SPAN_CASES = ["scaled, every layer", "scaled, conv1d", "noise", "noise, conv1d"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {case: _adapt(case, tmp_path_factory.mktemp("shared"))[:2] for case in SPAN_CASES}


@pytest.mark.parametrize("case", SPAN_CASES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_values_do_not_depend_on_the_span(case, shared, data):
    base, adapter = shared[case]
    checkpoint = open_adapter(adapter, open_checkpoint(base))
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint
    source = data.draw(
        st.sampled_from([s for s in checkpoint.tensors.values() if s.stored != (s,)])
    )
    start = data.draw(st.integers(0, source.num_elements))
    stop = data.draw(st.integers(start, source.num_elements))
    with Reader() as reader:
        whole = reader.values(source, 0, source.num_elements)
        assert torch.equal(reader.values(source, start, stop), whole[start:stop])


def test_noise_has_the_adapters_names_where_the_base_has_others(shared, tmp_path):
    base, adapter = shared["noise"]
    tensors = load_folder(base)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    save_file(
        {name.replace("model.layers", "blocks"): tensor for name, tensor in tensors.items()},
        renamed / "model.safetensors",
    )
    expected = _read(open_adapter(adapter, open_checkpoint(base)))
    found = _read(
        open_adapter(
            adapter, open_checkpoint(renamed), lambda name: name.replace("model.layers", "blocks")
        )
    )
    for name, tensor in expected.items():
        assert torch.equal(found[name.replace("model.layers", "blocks")], tensor)


# As a model of a spec.


def _trained(config: Any, base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Save an adapter of 20 steps on random tokens; return what peft merges."""
    model = type(MODELS["llama"]()).from_pretrained(base)
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.arange(64).view(4, 16)
    losses = []
    for _ in range(20):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(folder)
    return dict(adapted.merge_and_unload().state_dict())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, an adapter of each kind of it, and what peft merges of them."""
    folder = tmp_path_factory.mktemp("trained")
    MODELS["llama"]().save_pretrained(folder / "base")
    found: dict[str, Any] = {"base": folder / "base"}
    for name, config in (
        ("lora", ScaledLoraConfig(r=4, **ALL)),
        ("gp", ScaledLoraConfig(r=4, init="gp_pareto", target_modules=ATTENTION)),
        ("noise", NoiseConfig(**ALL)),
    ):
        merged = _trained(config, folder / "base", folder / name)
        found[name] = (folder / name, merged)
    return found


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "min_sigma"])
@pytest.mark.parametrize("name", ["lora", "gp", "noise"])
def test_one_adapter_comes_out_as_peft_merges_it(name, method, trained, tmp_path):
    adapter, expected = trained[name]
    spec = {"merge_method": method, "models": [{"model": str(adapter)}]}
    if method != "linear":
        spec["base_model"] = str(trained["base"])
    output = outliermerge.run(spec, output=tmp_path / "out").output
    assert outliermerge.verify(output) == []
    found = load_folder(output)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].numpy().tobytes() == tensor.numpy().tobytes(), key


def test_adapters_of_both_kinds_merge_as_their_models(trained, tmp_path):
    def run(kind: str, models: list[Path]) -> dict[str, torch.Tensor]:
        spec = {
            "merge_method": "min_sigma",
            "base_model": str(trained["base"]),
            "models": [{"model": str(model)} for model in models],
        }
        return load_folder(outliermerge.run(spec, output=tmp_path / kind).output)

    names = ("lora", "noise", "gp")
    for name in names:
        model = type(MODELS["llama"]()).from_pretrained(trained["base"])
        model.load_state_dict(trained[name][1])
        model.save_pretrained(tmp_path / name)
    found = run("adapters", [trained[name][0] for name in names])
    expected = run("models", [tmp_path / name for name in names])
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_the_plan_tells_of_the_kinds(trained):
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(trained["base"]),
        "models": [{"model": str(trained["lora"][0])}, {"model": str(trained["noise"][0])}],
    }
    notes = "\n".join(outliermerge.plan(spec).notes)
    assert "scaled LoRA (r=4) of 14 layers, computed when it is read" in notes
    assert "scaled noise of 14 layers, computed when it is read" in notes


# What is refused.


def _edited(adapter: Path, folder: Path, tensors: Any = None, **config: Any) -> Path:
    copy = folder / "edited"
    copy.mkdir()
    said = json.loads((adapter / "adapter_config.json").read_text()) | config
    (copy / "adapter_config.json").write_text(json.dumps(said))
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors(stored) if tensors else stored, copy / "adapter_model.safetensors")
    return copy


def _without(end: str) -> Any:
    return lambda stored: {k: v for k, v in stored.items() if not k.endswith(end)}


def _shaped(end: str, *shape: int) -> Any:
    return lambda stored: {
        k: torch.zeros(shape) if k.endswith(end) else v for k, v in stored.items()
    }


def _integers(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.int() for key, tensor in stored.items()}


EVERY = "scaled, every layer"
LORA_PAIR = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
BAD: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "no s": (EVERY, _without("_s"), {}, "has no scaled_lora_s, but"),
    "an s too many": (EVERY, None, {"train_scale": False}, "has a scaled_lora_s, but"),
    "no B": (EVERY, _without("_B"), {}, "has no scaled_lora_B"),
    "long s": (EVERY, _shaped("_s", 2), {}, r"float32 \[2\].*expected one float"),
    "long noise s": ("noise", _shaped("_s", 2), {}, r"float32 \[2\].*expected one float"),
    "whole noise s": ("noise", _integers, {}, r"int32 \[1\].*expected one float"),
    "another rank": (EVERY, None, {"r": 5}, "is not of rank 5"),
    "another shape": (EVERY, _shaped("_B", 7, 3), {}, "do not make a change of"),
    "no seed": ("noise", None, {"seed": None}, "seed: found None, expected the integer"),
    "a seed of words": ("noise", None, {"seed": "1"}, "seed: found '1', expected the integer"),
    "a setting of a later version": ("noise", None, {"per_row": True}, "per_row: True"),
    "a setting of LoRA": (EVERY, None, {"use_dora": True}, "use_dora: True"),
    "noise in LoRA": ("noise", None, {"peft_type": "LORA"}, "is not of an adapter of type LORA"),
    "LoRA in noise": (
        "noise",
        lambda stored: stored | {f"{LORA_PAIR}A.weight": torch.zeros(4, 32)},
        {},
        "is not of an adapter of type SCALED_NOISE",
    ),
    "another kind": ("noise", None, {"peft_type": "VERA"}, "type VERA; only LORA"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_told(fault, shared, tmp_path):
    case, tensors, config, message = BAD[fault]
    base, adapter = shared[case]
    edited = _edited(adapter, tmp_path, tensors, **config)
    with pytest.raises(OutlierMergeError, match=message) as error:
        open_adapter(edited, open_checkpoint(base))
    assert str(edited) in str(error.value)
