"""PEFT adapters as models: equal to what peft's merge_and_unload makes of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import ATTENTION, MODELS, llama
from checkpoints import as_many_as, load_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge.checkpoint.adapters.adapter import open_adapter
from outliermerge.checkpoint.adapters.config import base_of_adapter, is_adapter
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.methods.table import METHODS

pytestmark = pytest.mark.filterwarnings(
    # peft warns of the very cases that are tested here.
    "ignore:.*embedding layers.*",
    "ignore:.*fan_in_fan_out.*",
    "ignore:.*tie_word_embeddings.*",
    "ignore:.*tied.*",
    "ignore:.*Could not find a config file.*",
    "ignore:.*LoRA tensor.s. have invalid shape.*",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # peft reads it, transformers renamed it
)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ATTENTION}),
    "rank and alpha by pattern": (
        "llama",
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {r"layers.0.self_attn.q_proj": 2, "up_proj": 8},
            "alpha_pattern": {r"layers\.1\..*v_proj": 3},
        },
    ),
    "target by regex": ("llama", {"target_modules": r".*layers\.1.*\.(down|gate)_proj"}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True}),
    "rslora and dora": (
        "llama",
        {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True},
    ),
    "lora_bias": ("llama", {"target_modules": ATTENTION, "lora_bias": True}),
    "bias lora_only": ("llama", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "bias all": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "bias all with a new head": (
        "bert",
        {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
    ),
    "modules to save": (
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "a new head": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "embeddings": ("llama", {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "embeddings with dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "new rows": (
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": [3, 70, 5]},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d with dora": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "conv2d": ("resnet", {"target_modules": ["convolution"]}),
    "conv2d with dora": ("resnet", {"target_modules": ["convolution"], "use_dora": True}),
}  # fmt: skip


def _adapt(
    kind: str, folder: Path, *, seed: int = 1, dtype: torch.dtype = torch.float32, **keys: Any
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Save a base and an adapter of it without zeros; return them and what peft merges."""
    model = MODELS[kind]().to(dtype)
    base = folder / "base"
    if not base.exists():
        model.save_pretrained(base)
    model = type(model).from_pretrained(base, dtype=dtype)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | keys)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.05 * noise).to(parameter.dtype)
    adapter = folder / f"adapter{seed}"
    adapted.save_pretrained(adapter)
    merged = adapted.merge_and_unload()
    path = folder / f"merged{seed}"
    merged.save_pretrained(path)
    return base, adapter, load_folder(path)


def _read(checkpoint: Any) -> dict[str, torch.Tensor]:
    with Reader() as reader:
        return {
            name: reader.values(source, 0, source.num_elements).view(source.shape)
            for name, source in checkpoint.tensors.items()
        }


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_what_peft_merges(case, tmp_path):
    kind, keys = CASES[case]
    base, adapter, expected = _adapt(kind, tmp_path, **keys)
    assert is_adapter(adapter)
    assert base_of_adapter(adapter) == str(base)
    opened = open_adapter(adapter, open_checkpoint(base))
    found, before = _read(opened), load_folder(base)
    assert found.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=2e-6, msg=name)
        changed += not torch.equal(tensor, before[name])
    assert changed >= 2 or case == "embeddings with dora"


@pytest.mark.parametrize("case", ["lora", "dora", "conv1d with dora", "embeddings", "conv2d"])
def test_float64_tells_the_same(case, tmp_path):
    """Independent of peft: the formulas of the papers in float64."""
    kind, keys = CASES[case]
    base, adapter, _ = _adapt(kind, tmp_path, **keys)
    found, before = _read(open_adapter(adapter, open_checkpoint(base))), load_folder(base)
    stored = {
        key.removeprefix("base_model.model."): tensor.double()
        for key, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    num_checked = 0
    for key, a in stored.items():
        for end, transposed in ((".lora_A.weight", kind == "gpt2"), (".lora_embedding_A", True)):
            if not key.endswith(end):
                continue
            module = key.removesuffix(end)
            b = stored[key.replace("_A", "_B")]
            weight = before[f"{module}.weight"].double()
            if f"{module}.base_layer.weight" in stored:
                weight = stored[f"{module}.base_layer.weight"]
            change = (b.flatten(1) @ a.flatten(1)) * (6 / 4)
            merged = weight + (change.T if transposed else change).reshape(weight.shape)
            if (m := stored.get(f"{module}.lora_magnitude_vector")) is not None:
                outputs = merged.T if transposed else merged
                outputs = m.flatten()[:, None] * outputs / outputs.norm(dim=1, keepdim=True)
                merged = outputs.T if transposed else outputs
            torch.testing.assert_close(
                found[f"{module}.weight"].double(), merged, rtol=1e-6, atol=1e-6
            )
            num_checked += 1
    assert num_checked


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    built = {}
    for case in ("dora", "conv1d with dora", "conv2d with dora", "new rows", "lora_bias"):
        kind, keys = CASES[case]
        base, adapter, _ = _adapt(kind, tmp_path_factory.mktemp("shared"), **keys)
        built[case] = (base, adapter)
    return built


@pytest.mark.parametrize(
    "case", ["dora", "conv1d with dora", "conv2d with dora", "new rows", "lora_bias"]
)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_values_do_not_depend_on_the_span(case, shared, data):
    base, adapter = shared[case]
    checkpoint = open_adapter(adapter, open_checkpoint(base))
    sources = [s for s in checkpoint.tensors.values() if s.stored != (s,)]
    source = data.draw(st.sampled_from(sources))
    start = data.draw(st.integers(0, source.num_elements))
    stop = data.draw(st.integers(start, source.num_elements))
    with Reader() as reader:
        whole = reader.values(source, 0, source.num_elements)
        assert torch.equal(reader.values(source, start, stop), whole[start:stop])


def test_the_virtual_model_can_be_pickled(shared):
    checkpoint = open_adapter(shared["dora"][1], open_checkpoint(shared["dora"][0]))
    again = pickle.loads(pickle.dumps(checkpoint))
    assert again == checkpoint
    assert all(torch.equal(a, b) for a, b in zip(_read(again).values(), _read(checkpoint).values(),
                                                 strict=True))  # fmt: skip


def test_a_bfloat16_base_is_changed_in_float32(tmp_path):
    base, adapter, merged = _adapt(
        "llama", tmp_path, dtype=torch.bfloat16, target_modules=ATTENTION
    )
    found = _read(open_adapter(adapter, open_checkpoint(base)))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert found[name].dtype == torch.float32
    # peft rounds ΔW, and then the sum, to bfloat16.
    torch.testing.assert_close(found[name], merged[name].float(), rtol=2**-7, atol=1e-3)


def test_an_adapter_saved_as_a_pickle_is_read_too(tmp_path):
    base, adapter, expected = _adapt("llama", tmp_path, target_modules=ATTENTION)
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    found = _read(open_adapter(adapter, open_checkpoint(base)))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=2e-6)


# As a model of a spec.


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with two adapters of it, a DoRA and a LoRA, also merged by peft."""
    folder = tmp_path_factory.mktemp("two")
    _adapt("llama", folder, seed=1, target_modules=[*ATTENTION, "down_proj"], use_dora=True)
    _adapt("llama", folder, seed=2, target_modules=["q_proj", "up_proj", "lm_head"])
    names = ("base", "adapter1", "adapter2", "merged1", "merged2")
    return {name: folder / name for name in names}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "passthrough"])
@pytest.mark.sampled(2)
def test_adapters_merge_as_the_models_that_peft_makes_of_them(method, two, tmp_path):
    def run(kind: str) -> dict[str, torch.Tensor]:
        spec = {
            "merge_method": method,
            "base_model": str(two["base"]),
            "models": [{"model": str(two[f"{kind}{n}"])} for n in as_many_as(method, [1, 2])],
        }
        if method == "ties":  # ranks of equal magnitudes would turn on the last bit
            spec["parameters"] = {"density": 1.0}
        if method == "pcb":  # of a model, only tensors that an adapter changes are ranked
            spec["parameters"] = {"trim": "tensor"}
        if method == "iso_cts":  # what is left of low ranks is rounding, which has directions, too
            spec["parameters"] = {"common_space_fraction": 1.0}
        if (
            method == "wudi"
        ):  # a step has the rate's size: rounding decides its sign near slopes of 0
            spec["parameters"] = {"learning_rate": 1e-8}
        output = outliermerge.run(spec, output=tmp_path / kind).output
        assert outliermerge.verify(output) == []
        return load_folder(output)

    found, expected = run("adapter"), run("merged")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        differing = (found[name] - tensor).abs() > 2e-6
        # An element within a rounding error of the threshold may fall on its other side.
        assert differing.float().mean() <= 2e-3, name


def test_an_adapter_alone_is_one_of_its_own_base(two, tmp_path):
    spec = {"merge_method": "passthrough", "models": [{"model": str(two["adapter1"])}]}
    output = outliermerge.run(spec, output=tmp_path / "out").output
    found, expected = load_folder(output), load_folder(two["merged1"])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=2e-6)
    assert (output / "config.json").read_bytes() == (two["base"] / "config.json").read_bytes()
    transformers.AutoModelForCausalLM.from_pretrained(output)


def test_base_plus_adapter_names_the_base(two, tmp_path):
    """Of another base than the merge's; mergekit writes it so."""
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(two["base"]),
        "models": [{"model": f"{two['merged2']}+{two['adapter1']}"}],
    }
    output = outliermerge.run(spec, output=tmp_path / "out").output
    expected = _read(open_adapter(two["adapter1"], open_checkpoint(two["merged2"])))
    for name, tensor in load_folder(output).items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6)


def test_the_plan_tells_of_adapters(two):
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(two["base"]),
        "models": [{"model": str(two["adapter1"])}, {"model": str(two["adapter2"])}],
    }
    plan = outliermerge.plan(spec)
    first = f"{two['adapter1']}: DoRA (r=4) of 6 layers, computed when it is read"
    assert first in plan.notes
    job = next(job for job in plan.jobs if job.name == "model.layers.0.self_attn.q_proj.weight")
    assert {len(source.stored) for _, source in job.sources} == {1, 3, 4}


def test_an_adapter_of_another_model_is_told(two, tmp_path):
    adapter = _copy(two["adapter1"], tmp_path / "adapter", base_model_name_or_path="org/other")
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(two["base"]),
        "models": [{"model": str(adapter)}],
    }
    note = next(n for n in outliermerge.plan(spec).notes if "was trained on" in n)
    assert f"{adapter} was trained on org/other, and is taken as a change of {two['base']}" in note
    assert f"`org/other+{adapter}` takes it as a change of the former" in note


def test_rename_maps_the_adapters_names(two, tmp_path):
    adapter = _copy(two["adapter1"], tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    moved = {
        key.replace("model.layers", "model.language_model.layers"): tensor
        for key, tensor in load_file(weights).items()
    }
    save_file(moved, weights)
    spec: dict[str, Any] = {
        "merge_method": "min_sigma",
        "base_model": str(two["base"]),
        "models": [{"model": str(adapter)}],
    }
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    message = str(caught.value)
    assert "it changes tensors that" in message
    assert "  model.language_model.layers.0.mlp.down_proj.weight" in message
    assert "`rename` on this model maps the adapter's names to those" in message
    spec["models"][0]["rename"] = [{"from": r"language_model\.", "to": ""}]
    plan = outliermerge.plan(spec)
    assert plan.inputs[1].renamed[r"language_model\."][0] == 6
    spec["models"][0]["rename"] = [{"from": "absent", "to": ""}, *spec["models"][0]["rename"]]
    with pytest.raises(SpecError, match="'absent' matches no tensor"):
        outliermerge.plan(spec)


# What is refused.


def _copy(source: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "adapter_config.json").read_text()) | changes
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "VERA"}, "adapter_config.json: a PEFT adapter of type VERA; only LORA"),
        ({"peft_type": None}, "a PEFT adapter of type None"),
        *(
            ({"init_lora_weights": name}, f"init_lora_weights {name!r} also changed the base's")
            for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ),
        ({"use_qalora": True}, "cannot be computed with the settings:\n  use_qalora: True"),
        ({"layer_replication": [[0, 2]]}, "  layer_replication: [[0, 2]]"),
        ({"alora_invocation_tokens": [1]}, "  alora_invocation_tokens: [1]"),
        ({"use_qalora": True}, "  use_qalora: True"),
        ({"a_key_of_tomorrow": 1}, "  a_key_of_tomorrow: 1"),
        ({"init_lora_weights": "of_tomorrow"}, "'of_tomorrow' also changed the base's weights, or"),
        ({"init_lora_weights": "loftq"}, "Merge it with peft's merge_and_unload() where it was"),
        ({"rank_pattern": {"q_proj(": 4}}, "rank_pattern: 'q_proj(' is not a regular expression"),
        ({"r": 8}, "is not of rank 8, as adapter_config.json says"),
        ({"rank_pattern": {"q_proj": 3}}, "A [4, 32] is not of rank 3"),
        ({"lora_alpha": "much"}, "lora_alpha: found 'much', expected a number"),
        ({"use_dora": False}, "has a lora_magnitude_vector, but use_dora is False"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(two, tmp_path, changes, message):
    adapter = _copy(two["adapter1"], tmp_path / "adapter", **changes)
    with pytest.raises(OutlierMergeError) as caught:
        open_adapter(adapter, open_checkpoint(two["base"]))
    assert message in str(caught.value)


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{PREFIX}.lora_B.weight", None, "self_attn.q_proj: has no lora_B.weight"),
        (f"{PREFIX}.lora_A.weight", None, "self_attn.q_proj: has no lora_A.weight"),
        (f"{PREFIX}.lora_magnitude_vector", None, "has no lora_magnitude_vector, but use_dora is"),
        (f"{PREFIX}.lora_magnitude_vector", torch.ones(31),
         "lora_magnitude_vector has 31 values, expected 32"),
        (f"{PREFIX}.lora_B.weight", torch.ones(31, 4),
         "A [4, 32] and B [31, 4] do not make a change of [32, 32]: is it an adapter of"),
        (f"{PREFIX}.lora_B.weight", torch.ones(4), "do not make a change of"),
        (f"{PREFIX}.lora_B.weight", torch.ones(32, 4, dtype=torch.int8), "is int8, expected"),
        (f"{PREFIX}.ia3_l", torch.ones(32, 1), ".ia3_l' is not of an adapter of type LORA"),
        (f"{PREFIX}.hra_u", torch.ones(32, 1), "neither LoRA's nor the base's:\n  " + PREFIX),
        (f"{PREFIX}.lora_C.weight", torch.ones(4), ".lora_C.weight' is of no known kind"),
        (f"{PREFIX}.lora_embedding_A", torch.ones(4, 32), "lora_embedding_A has no use"),
        (f"{PREFIX}.lora_B.bias", torch.ones(31), "lora_bias needs a bias [31] in the base"),
        (f"{PREFIX}.token_adapter.trainable_tokens_delta", torch.ones(2, 32),
         "LoRA and trainable tokens in one layer"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
         torch.ones(2, 32), "[2, 32] rows do not fit trainable_token_indices (0)"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(two, tmp_path, name, change, message):
    adapter = _copy(two["adapter1"], tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(name, None)
    save_file(tensors | ({} if change is None else {name: change}), weights)
    with pytest.raises(OutlierMergeError) as caught:
        open_adapter(adapter, open_checkpoint(two["base"]))
    assert message in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_a_head_that_the_base_ties_is_refused(tmp_path):
    base = tmp_path / "base"
    llama(tie=True).save_pretrained(base)
    _, adapter, _ = _adapt("llama", tmp_path / "untied", target_modules=["lm_head"])
    weights = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "lora_" in k}, weights)
    with pytest.raises(OutlierMergeError) as caught:
        open_adapter(adapter, open_checkpoint(base))
    assert f"it changes lm_head.weight, which {base} ties to its embeddings" in str(caught.value)


def test_a_square_weight_stored_either_way_is_refused_where_the_config_is_wrong(tmp_path):
    kind, keys = CASES["conv1d"]
    base, adapter, _ = _adapt(kind, tmp_path, **keys)
    wrong = _copy(adapter, tmp_path / "wrong", fan_in_fan_out=False)
    with pytest.raises(OutlierMergeError, match=r"is square, so its shape does not tell"):
        open_adapter(wrong, open_checkpoint(base))


def test_what_stands_behind_a_plus_must_be_an_adapter(two):
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(two["base"]),
        "models": [{"model": f"{two['base']}+{two['merged1']}"}],
    }
    with pytest.raises(OutlierMergeError, match=r"stands after a `\+` but is not an adapter"):
        outliermerge.plan(spec)


def test_an_adapter_that_names_no_base_is_refused(two, tmp_path):
    adapter = _copy(two["adapter1"], tmp_path / "adapter", base_model_name_or_path=None)
    spec = {"merge_method": "passthrough", "models": [{"model": str(adapter)}]}
    with pytest.raises(OutlierMergeError, match="an adapter that names no base"):
        outliermerge.plan(spec)


def _gpt2_classifier() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=80, n_positions=32, num_labels=3, pad_token_id=0
    )
    return transformers.GPT2ForSequenceClassification(config)


def test_a_square_weight_between_both_layouts_is_refused(tmp_path, monkeypatch):
    """The saved fan_in_fan_out is of the last layer, here the linear one."""
    monkeypatch.setitem(MODELS, "gpt2_classifier", _gpt2_classifier)
    targets = ["c_attn", "c_proj", "score"]
    base, adapter, _ = _adapt("gpt2_classifier", tmp_path, target_modules=targets)
    assert not json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"]
    with pytest.raises(OutlierMergeError, match=r"attn.c_proj: its weight \[32, 32\] is square"):
        open_adapter(adapter, open_checkpoint(base))


def test_trained_tokens_of_embeddings_that_are_saved_whole(tmp_path):
    base, adapter, expected = _adapt(
        "llama", tmp_path, target_modules=ATTENTION, trainable_token_indices=[3, 70]
    )
    weights = adapter / "adapter_model.safetensors"
    name = "model.embed_tokens.weight"
    whole = torch.cat((load_folder(base)[name], torch.ones(4, 32)))  # as after new tokens
    key = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    save_file(load_file(weights) | {key: whole}, weights)
    found = _read(open_adapter(adapter, open_checkpoint(base)))
    assert torch.equal(found[name], torch.cat((expected[name], torch.ones(4, 32))))


def test_tensors_stored_whole_keep_the_bases_dtype_in_an_output(tmp_path):
    base, adapter, _ = _adapt(
        "llama", tmp_path, dtype=torch.bfloat16, target_modules=ATTENTION,
        modules_to_save=["lm_head"],
    )  # fmt: skip
    weights = adapter / "adapter_model.safetensors"
    stored = load_file(weights)
    stored["base_model.model.lm_head.weight"] = torch.rand(80, 32)
    save_file(stored, weights)
    opened = open_adapter(adapter, open_checkpoint(base))
    assert {source.out_dtype.name for source in opened.tensors.values()} == {"bfloat16"}
    found = _read(opened)["lm_head.weight"]
    assert torch.equal(found, stored["base_model.model.lm_head.weight"])


@pytest.mark.parametrize("case", ["head", "embeddings", "conv1d"])
def test_factors_too_large_for_the_cache_give_the_same(case, tmp_path, monkeypatch):
    kind, keys = CASES[case]
    base, adapter, expected = _adapt(kind, tmp_path, **keys)
    monkeypatch.setattr("outliermerge.checkpoint.adapters.tensors._MAX_WHOLE_BYTES", 0)
    found = _read(open_adapter(adapter, open_checkpoint(base)))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=2e-6, msg=name)


def test_two_targets_of_one_name_are_refused(two):
    with pytest.raises(OutlierMergeError, match="both become"):
        open_adapter(two["adapter1"], open_checkpoint(two["base"]), lambda name: name.replace(
            "layers.1", "layers.0"))  # fmt: skip


def test_a_config_that_is_no_json_is_refused(two, tmp_path):
    adapter = _copy(two["adapter1"], tmp_path / "adapter")
    for text, found in (("{", "line 1 column 2 within a value: it is cut off"),
                        ("{}", "no JSON object with settings")):  # fmt: skip
        (adapter / "adapter_config.json").write_text(text)
        with pytest.raises(OutlierMergeError, match=found):
            open_adapter(adapter, open_checkpoint(two["base"]))


def test_an_adapter_of_tied_embeddings_is_told(tmp_path):
    base = tmp_path / "base"
    model = llama(tie=True)
    model.save_pretrained(base)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["embed_tokens"]), autocast_adapter_dtype=False
    )
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(base),
        "models": [{"model": str(tmp_path / "adapter")}],
    }
    notes = "\n".join(outliermerge.plan(spec).notes)
    assert f"it changes model.embed_tokens.weight, to which {base} ties its head" in notes
