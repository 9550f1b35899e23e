"""PEFT adapters as they are found: of old versions and other trainers, renamed, tied, resized.

The oracle is peft's merge_and_unload wherever peft can say what an adapter means.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
import yaml
from checkpoints import load_folder, save_model, save_tensors
from quantizing import dequantised, quantise
from safetensors.torch import load_file, save_file
from waiting import LIMIT_SECONDS, held, stopped

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.errors import OutlierMergeError

pytestmark = pytest.mark.filterwarnings(
    # peft warns of the very cases that are tested here.
    "ignore:.*embedding layer.*",
    "ignore:.*tie_word_embeddings.*",
    "ignore:.*tied.*",
    "ignore:.*weight tying.*",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # peft reads it, transformers renamed it
)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER_0, LAYER_1 = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))


def _llama(tie: bool = False) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=80,
        tie_word_embeddings=tie,
    )
    return transformers.LlamaForCausalLM(config)


def _adapt(
    base: Path,
    folder: Path,
    *,
    seed: int = 1,
    num_rows: int | None = None,
    kind: type = transformers.AutoModelForCausalLM,
    dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> dict[str, torch.Tensor]:
    """Save an adapter of a base, without zeros, and return what peft makes of the two."""
    model = kind.from_pretrained(base, dtype=dtype)
    if num_rows is not None:
        model.resize_token_embeddings(num_rows)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | keys)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.05 * noise).to(parameter.dtype)
    adapted.save_pretrained(folder)
    merged = folder.with_name(f"{folder.name}-merged")
    adapted.merge_and_unload().save_pretrained(merged)
    return load_folder(merged)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters (one, two), what peft merges of them, and a tied base."""
    folder = tmp_path_factory.mktemp("wild")
    _llama().save_pretrained(folder / "base")
    _llama(tie=True).save_pretrained(folder / "tied")
    _adapt(folder / "base", folder / "one", seed=1)
    _adapt(folder / "base", folder / "two", seed=2, target_modules=["q_proj", "v_proj"])
    return folder


def _spec(base: Path | str, *models: Path | str, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        **keys,
    }


def _alone(model: Path | str) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}]}


def _run(spec: Any, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    done = outliermerge.run(spec, output=output, **options).output
    assert outliermerge.verify(done) == []
    return load_folder(done)


def _assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2e-6
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def _copy(
    source: Path,
    target: Path,
    rename: Callable[[str], str] = lambda name: name,
    config: dict[str, Any] | None = None,
) -> Path:
    """Copy an adapter with its keys renamed, or with another config."""
    shutil.copytree(source, target)
    stored = {rename(name): tensor for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(stored, target / WEIGHTS)
    if config is not None:
        (target / CONFIG).write_text(json.dumps(config))
    return target


def _config(adapter: Path, **changes: Any) -> dict[str, Any]:
    return json.loads((adapter / CONFIG).read_text()) | changes


# Configs as versions and trainers wrote them.

_OLDEST = {
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 6.0,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}
_MIDDLE = {key: _OLDEST[key] for key in _OLDEST if key not in ("enable_lora", "merge_weights")} | {
    "auto_mapping": None,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "revision": None,
}
_LATER = _MIDDLE | {
    "alpha_pattern": {},
    "layer_replication": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}
_NEWER = _LATER | {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "lora_bias": False,
    "lora_ga_config": None,
    "peft_version": "0.19.1",
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
}
CONFIGS = {
    "peft 0.2": _OLDEST,
    "peft 0.5": _MIDDLE,
    "peft 0.10": _LATER,
    "peft 0.19": _NEWER,
    "only what it needs": {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q"]},
    "unsloth": _NEWER
    | {
        "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
        "base_model_name_or_path": "unsloth/base-bnb-4bit",
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?)",
        "lora_dropout": 0,
        "init_lora_weights": "gaussian",
    },
    "trained on a folder of its author": _NEWER
    | {"base_model_name_or_path": "C:\\models\\base", "modules_to_save": []},
    "eva": _NEWER | {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
    "loftq said, but not used": _NEWER | {"loftq_config": {"loftq_bits": 4}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_all_ages_are_read(name, home, tmp_path):
    adapter = _copy(home / "one", tmp_path / "adapter", config=CONFIGS[name])
    found = _run(_spec(home / "base", adapter), tmp_path / "out")
    _assert_same(found, load_folder(home / "one-merged"))


def test_merge_weights_was_a_setting_of_running_and_says_nothing_of_the_adapter(home, tmp_path):
    adapter = _copy(
        home / "one", tmp_path / "adapter", config=_OLDEST | {"merge_weights": True}
    )  # fmt: skip
    found = _run(_spec(home / "base", adapter), tmp_path / "out")
    _assert_same(found, load_folder(home / "one-merged"))


def test_lora_of_parts_of_a_layer_is_refused(home, tmp_path):
    config = _OLDEST | {"enable_lora": [True, False, True]}
    adapter = _copy(home / "one", tmp_path / "adapter", config=config)
    with pytest.raises(OutlierMergeError, match=r"  enable_lora: \[True, False, True\]"):
        outliermerge.plan(_spec(home / "base", adapter))


@pytest.mark.parametrize(("alpha", "factor"), [(0, 0.0), (-6, -1.0), (1.5, 0.25), (6e3, 1e3)])
def test_any_alpha_is_a_scale(alpha, factor, home, tmp_path):
    config = _config(home / "one", lora_alpha=alpha)
    adapter = _copy(home / "one", tmp_path / "adapter", config=config)
    base, merged = load_folder(home / "base"), load_folder(home / "one-merged")
    found = _run(_spec(home / "base", adapter), tmp_path / "out")
    expected = {name: base[name] + factor * (merged[name] - base[name]) for name in base}
    _assert_same(found, expected, tolerance=2e-6 * max(1, abs(factor)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "A [4, 32] is not of rank 0"),
        ({"r": 0}, "A [4, 32] is not of rank 0"),
        ({"lora_alpha": None}, "lora_alpha None and r 4 give no scale"),
    ],
)
def test_ranks_and_alphas_that_give_no_scale_are_refused(changes, message, home, tmp_path):
    config = _config(home / "one", **changes)
    adapter = _copy(home / "one", tmp_path / "adapter", config=config)
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(_spec(home / "base", adapter))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {r"^model\.layers\.0.*q_proj": 2, r"layers.\d+.mlp.(up|down)_proj": 3},
            "alpha_pattern": {r"model.layers.1.self_attn.(q|v)_proj": -5, r"up\w+": 100},
        },
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"], "use_rslora": True},
    ],
)
def test_layers_and_patterns_mean_what_peft_takes_them_for(keys, home, tmp_path):
    expected = _adapt(home / "base", tmp_path / "adapter", **keys)
    _assert_same(_run(_spec(home / "base", tmp_path / "adapter"), tmp_path / "out"), expected)


def test_an_adapter_saved_by_transformers_itself(home, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "base")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    reference = transformers.AutoModelForCausalLM.from_pretrained(home / "base")
    merged = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = _run(_spec(home / "base", tmp_path / "adapter"), tmp_path / "out")
    _assert_same(found, load_folder(tmp_path / "merged"))


# Names of keys.


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
    ],
    ids=["with the adapter's name", "without a prefix"],
)
def test_keys_that_say_more_or_less_are_known(rename, home, tmp_path):
    adapter = _copy(home / "one", tmp_path / "adapter", rename)
    found = _run(_spec(home / "base", adapter), tmp_path / "out")
    _assert_same(found, load_folder(home / "one-merged"))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace("model.model.", "model._orig_mod.model."),
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("model.model.layers", "model.layers"),
    ],
    ids=["module", "fsdp", "compiled", "adapter of an adapter", "of the inner model"],
)
def test_the_rename_that_an_error_suggests_works(rename, home, tmp_path):
    adapter = _copy(home / "one", tmp_path / "adapter", rename)
    found = _run(_suggested(_spec(home / "base", adapter)), tmp_path / "out")
    _assert_same(found, load_folder(home / "one-merged"))


def _suggested(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a spec with the rename that the error about it suggests."""
    with pytest.raises(OutlierMergeError, match="it changes tensors that") as caught:
        outliermerge.plan(spec)
    said = re.search(r"`rename: (.*)` on ", str(caught.value))
    assert said is not None, caught.value
    (model,) = spec["models"]
    return spec | {"models": [model | {"rename": yaml.safe_load(said[1])}]}


def test_wrappers_inside_the_names_are_renamed_away(home, tmp_path):
    adapter = _copy(
        home / "one",
        tmp_path / "adapter",
        lambda name: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", name),
    )
    spec = _spec(home / "base", adapter)
    with pytest.raises(OutlierMergeError, match=r"layers\.0\._fsdp_wrapped_module\.self_attn"):
        outliermerge.plan(spec)
    spec["models"][0]["rename"] = [{"from": r"_fsdp_wrapped_module\.", "to": ""}]
    _assert_same(_run(spec, tmp_path / "out"), load_folder(home / "one-merged"))


def test_another_adapters_name_in_the_keys_is_refused(home, tmp_path):
    adapter = _copy(
        home / "one", tmp_path / "adapter", lambda name: name.replace(".weight", ".sft.weight")
    )
    with pytest.raises(OutlierMergeError, match=r"lora_A\.sft\.weight' is of no known kind"):
        outliermerge.plan(_spec(home / "base", adapter))


@pytest.mark.parametrize(
    "wrapper",
    [
        "modules_to_save.",
        "modules_to_save.default.",
    ],
)
def test_modules_that_are_saved_in_their_wrapper(wrapper, home, tmp_path):
    expected = _adapt(home / "base", tmp_path / "made", modules_to_save=["embed_tokens", "lm_head"])
    adapter = _copy(
        tmp_path / "made",
        tmp_path / "adapter",
        lambda name: re.sub(r"(embed_tokens|lm_head)\.", rf"\1.{wrapper}", name),
    )
    _assert_same(_run(_spec(home / "base", adapter), tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [("lora_A.weight", "lora_A.default.weight"), ("base_model.model.", "")],
)
def test_two_keys_for_one_factor_are_refused(old, new, home, tmp_path):
    """Saved twice, by a trainer's own code and by peft's."""
    adapter = _copy(home / "one", tmp_path / "adapter")
    stored = load_file(adapter / WEIGHTS)
    key = next(name for name in stored if "lora_A" in name)
    save_file(stored | {key.replace(old, new): torch.ones(4, 32)}, adapter / WEIGHTS)
    with pytest.raises(OutlierMergeError, match="lora_A"):
        outliermerge.plan(_spec(home / "base", adapter))


def test_an_adapter_without_tensors_is_refused(home, tmp_path):
    """As a wrapped or sharded model gives that was saved with the wrong state dict."""
    adapter = _copy(home / "one", tmp_path / "adapter")
    save_file({}, adapter / WEIGHTS)
    with pytest.raises(OutlierMergeError, match=WEIGHTS):
        outliermerge.plan(_spec(home / "base", adapter))


def test_factors_that_zero_3_left_empty_are_refused(home, tmp_path):
    adapter = _copy(home / "one", tmp_path / "adapter")
    save_file({name: torch.zeros(0) for name in load_file(adapter / WEIGHTS)}, adapter / WEIGHTS)
    with pytest.raises(OutlierMergeError, match=r"are empty (.|\n)*q_proj\.lora_A"):
        outliermerge.plan(_spec(home / "base", adapter))


def test_an_adapter_of_transformers_5_fits_llava_as_it_is_published(tmp_path):
    """Published names have the level vision_model, which transformers 5 leaves out on saving."""
    base = tmp_path / "base"
    save_model("llava", base, dtype=torch.float32)
    kind = transformers.LlavaForConditionalGeneration
    merged = _adapt(base, tmp_path / "adapter", kind=kind,
                    modules_to_save=["multi_modal_projector"])  # fmt: skip

    def published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): tensor
            for name, tensor in tensors.items()
        }

    save_file(published(load_folder(base)), base / "model.safetensors", metadata={"format": "pt"})
    spec = _suggested(_spec(base, tmp_path / "adapter"))
    assert spec["models"][0]["rename"] == "transformers_v5_to_v4"
    _assert_same(_run(spec, tmp_path / "out"), published(merged))


QWEN = transformers.Qwen2VLForConditionalGeneration


@pytest.mark.parametrize("targets", [r".*language_model.*q_proj", ["q_proj", "qkv"]])
def test_an_adapter_of_transformers_5_fits_qwen_as_it_is_published(targets, tmp_path):
    save_model("qwen2_vl", tmp_path / "base", dtype=torch.float32)
    merged = _adapt(tmp_path / "base", tmp_path / "adapter", kind=QWEN, target_modules=targets)
    spec = _spec(tmp_path / "base", tmp_path / "adapter")
    spec["models"][0]["rename"] = [{"from": r"^model\.language_model\.", "to": "model."}]
    if isinstance(targets, list):
        spec["models"][0]["rename"] += [{"from": r"^model\.visual\.", "to": "visual."}]
    _assert_same(_run(spec, tmp_path / "out"), merged)


@pytest.mark.parametrize(
    "targets",
    [
        r".*language_model.*q_proj",
        ["q_proj", "qkv"],
    ],
)
def test_the_error_suggests_a_rename_for_qwen(targets, tmp_path):
    save_model("qwen2_vl", tmp_path / "base", dtype=torch.float32)
    merged = _adapt(tmp_path / "base", tmp_path / "adapter", kind=QWEN, target_modules=targets)
    spec = _suggested(_spec(tmp_path / "base", tmp_path / "adapter"))
    _assert_same(_run(spec, tmp_path / "out"), merged)


def test_attention_of_a_mixture_of_experts_is_adapted(tmp_path):
    save_model("mixtral", tmp_path / "base", dtype=torch.float32)
    expected = _adapt(tmp_path / "base", tmp_path / "adapter")
    _assert_same(_run(_spec(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out"), expected)


def test_an_expert_is_adapted_by_its_own_name(tmp_path):
    """As peft on transformers 4 saved adapters of Mixtral, whose file has each expert too."""
    before = save_model("mixtral", tmp_path / "base", dtype=torch.float32)
    module = "model.layers.1.block_sparse_moe.experts.2.w1"
    a, b = torch.rand(4, 32), torch.rand(48, 4)
    (tmp_path / "adapter").mkdir()
    prefix = f"base_model.model.{module}.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, tmp_path / "adapter" / WEIGHTS)
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(_MIDDLE | {"target_modules": ["w1"]}))
    found = _run(_spec(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out")
    change = (b.double() @ a.double()) * 6 / 4
    expected = before | {f"{module}.weight": (before[f"{module}.weight"] + change).float()}
    _assert_same(found, expected)


PACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("packed", [False, True], ids=["one by one", "packed"])
@pytest.mark.parametrize("targets", [PACKED, PACKED[1:]], ids=["both", "one"])
def test_packed_experts_are_adapted_in_either_layout_of_the_base(targets, packed, tmp_path):
    """Mixtral's files have each expert by itself, and its class all of them in one tensor."""
    save_model("mixtral", tmp_path / "base", dtype=torch.float32)
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "base", dtype=torch.float32)
    if packed:
        model.save_pretrained(tmp_path / "base", save_original_format=False)
    # With another layer that is adapted, where experts are its neighbours.
    _adapt(tmp_path / "base", tmp_path / "adapter", target_parameters=targets)
    reference = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    reference.save_pretrained(tmp_path / "merged", save_original_format=not packed)
    found = _run(_spec(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out")
    expected, before = load_folder(tmp_path / "merged"), load_folder(tmp_path / "base")
    _assert_same(found, expected)
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(changed) > len(PACKED) and all("expert" in n or "q_proj" in n for n in changed)


# Tied embeddings.

TIED: dict[str, dict[str, Any]] = {
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both saved as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 70]},
}


_PARTED = ("embeddings saved", "head saved", "both saved", "head")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(80)[None]).logits


@pytest.mark.parametrize("alone", [False, True], ids=["as a task model", "alone"])
@pytest.mark.parametrize(
    "case",
    list(TIED),
)
def test_a_tied_base_becomes_what_peft_makes_of_it_or_is_refused(case, alone, home, tmp_path):
    _adapt(home / "tied", tmp_path / "adapter", **TIED[case])
    spec = _alone(tmp_path / "adapter") if alone else _spec(home / "tied", tmp_path / "adapter")
    try:
        _run(spec, tmp_path / "out")
    except OutlierMergeError as error:
        assert "`tie_word_embeddings: false` in the spec gives the output a head" in str(error)
        assert case in _PARTED or (alone and case == "both saved as one")  # asks for equal data
        return
    found = _logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    folder = home / "tied" if case in _PARTED else tmp_path / "adapter-merged"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if case in _PARTED:  # as it was trained; merged, peft changes both ends with "head"
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(found, _logits(model), rtol=1e-4, atol=1e-4)


def test_one_adapter_on_both_ends_of_a_tied_tensor_is_added_once(home, tmp_path):
    """peft's merge_and_unload adds it twice: to the embeddings, and to the head that they are."""
    _adapt(home / "tied", tmp_path / "adapter", target_modules=["embed_tokens"],
           ensure_weight_tying=True)  # fmt: skip
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    change = (stored[f"{prefix}B"] @ stored[f"{prefix}A"]).T * 6 / 4
    assert change.abs().max() > 0.01
    before = load_folder(home / "tied")
    name = "model.embed_tokens.weight"
    found = _run(_spec(home / "tied", tmp_path / "adapter"), tmp_path / "out")
    _assert_same(found, before | {name: before[name] + change})


@pytest.mark.parametrize("case", ["head saved", "both saved", "both saved as one", "head"])
def test_a_head_that_the_config_ties_is_the_embeddings(case, home, tmp_path):
    """Else transformers before 5 overwrites it with the embeddings."""
    _adapt(home / "tied", tmp_path / "adapter", **TIED[case])
    try:
        found = _run(_alone(tmp_path / "adapter"), tmp_path / "out")
    except OutlierMergeError:
        return
    config = json.loads((tmp_path / "out/config.json").read_text())
    if "lm_head.weight" in found and config["tie_word_embeddings"]:
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


# Vocabularies.


def _save_tokenizer(folder: Path, num_tokens: int, added: list[str], template: str) -> None:
    model = tokenizers.models.WordLevel({f"w{n}": n for n in range(num_tokens)}, unk_token="w0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="w0"
    )
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)


ADDED = ["<a>", "<b>", "<c>", "<d>"]


@pytest.fixture(scope="module")
def grown(home, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with a base of 80 tokens, an adapter of 84; and what peft merges."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(home / "base", folder / "base")
    merged = _adapt(folder / "base", folder / "adapter", num_rows=84)
    _save_tokenizer(folder / "base", 80, [], "base's")
    _save_tokenizer(folder / "adapter", 80, ADDED, "adapter's")
    return folder, merged


@pytest.mark.parametrize(("vocabulary", "num_rows"), [("base", 80), ("common", 80), ("union", 84)])
def test_an_adapter_with_added_tokens(vocabulary, num_rows, grown, tmp_path):
    folder, merged = grown
    spec = _spec(folder / "base", folder / "adapter")
    with pytest.raises(OutlierMergeError, match="only it has 4 tokens") as caught:
        outliermerge.plan(spec)
    assert all(token in str(caught.value) for token in ADDED)
    found = _run(spec | {"vocabulary": vocabulary}, tmp_path / "out")
    cut = {name: t[:num_rows] if t.shape[0] == 84 else t for name, t in merged.items()}
    _assert_same(found, cut)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer) == num_rows
    if num_rows == 84:
        assert tokenizer.convert_tokens_to_ids(ADDED) == [80, 81, 82, 83]


def test_added_tokens_of_an_adapter_that_has_no_tokenizer(home, tmp_path):
    merged = _adapt(home / "base", tmp_path / "adapter", num_rows=84)
    spec = _spec(home / "base", tmp_path / "adapter", vocabulary="union")
    _assert_same(_run(spec, tmp_path / "out"), merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 84


@pytest.mark.parametrize("num_rows", [84, 72], ids=["grown", "cut"])
@pytest.mark.parametrize(
    ("base", "keys"),
    [
        ("base", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("base", {"trainable_token_indices": [3, 9]}),
        ("tied", {"trainable_token_indices": [3, 9]}),
    ],
    ids=["LoRA of both ends", "trained tokens", "trained tokens of a tied model"],
)
def test_adapters_of_a_resized_vocabulary(base, keys, num_rows, home, tmp_path):
    """peft saves the resized embeddings and head whole, beside their factors."""
    merged = _adapt(home / base, tmp_path / "adapter", num_rows=num_rows, **keys)
    _assert_same(_run(_alone(tmp_path / "adapter"), tmp_path / "out"), merged)
    assert merged["model.embed_tokens.weight"].shape[0] == num_rows


def test_trained_tokens_of_a_tied_model_that_differ_in_its_head_are_refused(home, tmp_path):
    _adapt(home / "tied", tmp_path / "adapter", num_rows=84, trainable_token_indices=[3, 9])
    weights = tmp_path / "adapter" / WEIGHTS
    stored = load_file(weights)
    stored["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] += 1
    save_file(stored, weights)
    with pytest.raises(OutlierMergeError, match=r"lm_head\.weight"):
        outliermerge.run(_alone(tmp_path / "adapter"), output=tmp_path / "out")


@pytest.mark.parametrize("reference", ["{run}", "{base}+{run}"])
def test_the_checkpoints_of_a_training_are_named(reference, home, tmp_path):
    """Trainers save an adapter into each folder `checkpoint-500`, and at the end beside them."""
    for step in (10, 20):
        shutil.copytree(home / "one", tmp_path / f"run/checkpoint-{step}")
    model = reference.format(run=tmp_path / "run", base=home / "base")
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(_spec(home / "base", model))
    assert all(f"{tmp_path}/run/checkpoint-{step}" in str(caught.value) for step in (10, 20))
    for name in (WEIGHTS, CONFIG):
        shutil.copy(home / "two" / name, tmp_path / "run")
    torch.save({}, tmp_path / "run/checkpoint-10/optimizer.pt")
    found = _run(_spec(home / "base", model), tmp_path / "out")
    _assert_same(found, load_folder(home / "two-merged"))


def test_an_adapter_with_added_tokens_alone_can_be_loaded(grown, tmp_path):
    folder, merged = grown
    _assert_same(_run(_alone(folder / "adapter"), tmp_path / "out"), merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer) == 84


def test_tokenizer_source_takes_the_tokenizer_beside_the_adapter(grown, tmp_path):
    folder, _ = grown
    adapter = str(folder / "adapter")
    spec = _spec(folder / "base", adapter, vocabulary="union", tokenizer_source=adapter)
    _run(spec, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "adapter's"


# Chains, copies, and the folders of adapters.


def test_a_chain_adds_every_change(home, tmp_path):
    before, one, two = (load_folder(home / name) for name in ("base", "one-merged", "two-merged"))
    chain = f"{home}/base+{home}/one+{home}/two"
    found = _run(_spec(home / "base", chain), tmp_path / "out")
    expected = {name: before[name] + (one[name] - before[name]) + (two[name] - before[name])
                for name in before}  # fmt: skip
    _assert_same(found, expected)
    inputs = json.loads((tmp_path / "out/outliermerge.json").read_text())["inputs"]
    assert [entry["role"] for entry in inputs] == ["base", "model"]
    assert inputs[1]["model"] == chain
    sizes = {str(home / name / file): (home / name / file).stat().st_size
             for name, file in (("base", "model.safetensors"), ("one", WEIGHTS))}  # fmt: skip
    assert inputs[1]["files"] == sizes | {WEIGHTS: (home / "two" / WEIGHTS).stat().st_size}


def test_chains_that_end_alike_are_not_the_same_model(home, tmp_path):
    before, one, two = (load_folder(home / name) for name in ("base", "one-merged", "two-merged"))
    spec = _spec(home / "base", f"{home}/base+{home}/two", f"{home}/base+{home}/one+{home}/two")
    found = _run(spec | {"merge_method": "linear"}, tmp_path / "out")
    both = {name: one[name] + two[name] - before[name] for name in before}
    _assert_same(found, {name: (two[name] + both[name]) / 2 for name in before})


def test_a_chain_is_not_the_base_that_it_ends_like(home, tmp_path):
    before, one, two = (load_folder(home / name) for name in ("base", "one-merged", "two-merged"))
    spec = _spec(f"{home}/base+{home}/two", f"{home}/base+{home}/one+{home}/two")
    found = _run(spec, tmp_path / "out")
    _assert_same(found, {name: one[name] + two[name] - before[name] for name in before})


def test_a_chain_over_a_chain_that_ends_like_the_base(home, tmp_path):
    before, one, two = (load_folder(home / name) for name in ("base", "one-merged", "two-merged"))
    chain = f"{home}/base+{home}/one+{home}/two+{home}/one"
    found = _run(_spec(f"{home}/base+{home}/two", chain), tmp_path / "out")
    _assert_same(found, {n: 2 * (one[n] - before[n]) + two[n] for n in before})


def test_an_adapter_as_the_base_model(home, tmp_path):
    before, one, two = (load_folder(home / name) for name in ("base", "one-merged", "two-merged"))
    found = _run(_spec(home / "one", home / "two-merged"), tmp_path / "out")
    _assert_same(found, two)
    found = _run(_spec(home / "one", home / "two"), tmp_path / "again")
    _assert_same(found, {name: one[name] + two[name] - before[name] for name in before})


def test_one_adapter_by_two_names_is_refused(home):
    spec = _spec(home / "base", home / "one", f"{home}/base+{home}/one")
    with pytest.raises(OutlierMergeError, match=r"models\[1\]\.model: .* is the same model as "):
        outliermerge.plan(spec)


@pytest.mark.parametrize(
    "model",
    [
        "{here}/my+adapter",
        "{here}/my+base+{home}/one",
        "{home}/base+{here}/my+adapter",
    ],
)
def test_a_plus_in_a_folders_name(model, home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "my+base")
    shutil.copytree(home / "one", tmp_path / "my+adapter")
    found = _run(_spec(home / "base", model.format(home=home, here=tmp_path)), tmp_path / "out")
    _assert_same(found, load_folder(home / "one-merged"))


def test_an_adapter_beside_a_whole_model_is_taken(home, tmp_path):
    """As transformers' from_pretrained does."""
    shutil.copytree(home / "two-merged", tmp_path / "both")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(home / "one" / name, tmp_path / "both")
    found = _run(_spec(home / "base", tmp_path / "both"), tmp_path / "out")
    _assert_same(found, load_folder(home / "one-merged"))


BESIDE = "non_lora_trainables.bin"


@pytest.mark.parametrize("start", ["base_model.model.", "", "model."])
@pytest.mark.parametrize("file", [BESIDE, "non_lora_state_dict.bin"])
def test_what_llava_trains_beside_its_adapter_is_read(file, start, home, tmp_path):
    """By the rules of LLaVA's load_pretrained_model."""
    adapter = _copy(home / "one", tmp_path / "adapter")
    norm, head = torch.rand(32), torch.rand(80, 32)
    trained = {f"{start}model.norm.weight": norm}
    trained |= {"base_model.model.lm_head.weight": head} if start else {}
    torch.save(trained, adapter / file)
    spec = _spec(home / "base", adapter)
    expected = load_folder(home / "one-merged") | {"model.norm.weight": norm}
    expected |= {"lm_head.weight": head} if start else {}
    _assert_same(_run(spec, tmp_path / "out"), expected)
    notes = "\n".join(outliermerge.plan(spec).notes)
    assert f"{len(trained)} tensors stored whole" in notes and "left out" not in notes


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def _beside(adapter: Path, content: Any, message: str, spec: dict[str, Any]) -> None:
    torch.save(content, adapter / BESIDE)
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    assert BESIDE in str(caught.value) and message in str(caught.value)


def test_what_does_not_fit_beside_an_adapter_is_refused(home, tmp_path):
    adapter = _copy(home / "one", tmp_path / "adapter")
    spec, prefix = _spec(home / "base", adapter), "base_model.model.model."
    projector = f"{prefix}mm_projector.0.weight"
    _beside(adapter, {projector: torch.ones(4, 4)}, "what was trained beside the LoRA", spec)
    both = {projector: torch.ones(4, 4), f"{prefix}norm.weight": torch.ones(32)}
    _beside(adapter, both, "take a base that has it", spec)
    _beside(adapter, {f"{prefix}norm.weight": torch.ones(0)}, "are empty", spec)
    _beside(adapter, {f"{prefix}norm.weight": _Command()}, "system", spec)
    factor = f"{prefix}layers.0.self_attn.q_proj.lora_A.weight"
    _beside(adapter, both | {factor: torch.ones(4, 32)}, "is of an adapter", spec)
    (adapter / BESIDE).unlink()
    (adapter / BESIDE).symlink_to("/etc/passwd")
    with pytest.raises(OutlierMergeError, match=BESIDE):
        outliermerge.plan(spec)


@pytest.mark.parametrize("inside", [False, True], ids=["the base itself", "inside the base"])
def test_an_output_does_not_replace_the_base_of_an_adapter(inside, home, tmp_path):
    base = tmp_path / "base"
    _run(_spec(home / "base", home / "one"), base)  # an output, which --overwrite may replace
    with pytest.raises(OutlierMergeError, match="is, holds or is inside the model"):
        target = base / "out" if inside else base
        outliermerge.run(_alone(f"{base}+{home}/two"), output=target, overwrite=True)


# Values.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_bases_dtype_and_one_rounding(dtype, adapter_dtype, home, tmp_path):
    base = {name: t.to(dtype) for name, t in load_folder(home / "base").items()}
    save_file(base, save_tensors(tmp_path / "base", base) / "model.safetensors")
    adapter = _copy(home / "two", tmp_path / "adapter")
    stored = {name: t.to(adapter_dtype) for name, t in load_file(adapter / WEIGHTS).items()}
    save_file(stored, adapter / WEIGHTS)
    found = _run(_spec(tmp_path / "base", adapter), tmp_path / "out")
    changed = 0
    for name, before in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" not in stored:
            assert torch.equal(found[name], before)
            continue
        a, b = (stored[f"{key}{part}.weight"].double() for part in "AB")
        exact = before.double() + (b @ a) * 6 / 4
        assert found[name].dtype == dtype
        # Half a unit in the last place, and what float32 may move across the middle.
        unit = torch.finfo(dtype).eps * exact.abs()
        assert (found[name].double() - exact).abs().le(0.5 * unit + 1e-6).all()
        changed += 1
    assert changed == 4


def test_an_adapter_without_an_effect_is_no_task_vector(home, tmp_path):
    """Saved before the first step: B is 0."""
    adapter = _copy(home / "one", tmp_path / "adapter")
    stored = load_file(adapter / WEIGHTS)
    save_file({n: t * 0 if "lora_B" in n else t for n, t in stored.items()}, adapter / WEIGHTS)
    for method in ("min_sigma", "ties", "linear"):
        spec = _spec(home / "base", adapter, home / "one") | {"merge_method": method}
        found, before = _run(spec, tmp_path / method), load_folder(home / "base")
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert torch.equal(found["lm_head.weight"], before["lm_head.weight"])
    alone = _run(_spec(home / "base", adapter), tmp_path / "alone")
    assert all(torch.equal(alone[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_reported(part, value, home, tmp_path):
    adapter = _copy(home / "one", tmp_path / "broken")
    stored = load_file(adapter / WEIGHTS)
    stored[f"base_model.model.{LAYER_1.removesuffix('.weight')}.{part}.weight"][0, 0] = value
    save_file(stored, adapter / WEIGHTS)
    for spec in (_spec(home / "base", home / "two", adapter), _alone(adapter)):
        with pytest.raises(OutlierMergeError) as caught:
            outliermerge.run(spec, output=tmp_path / "out", fresh=True)
        message = f"tensor {LAYER_1!r} has values that are infinite or NaN in {adapter}"
        assert message in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_quantised_base(home, tmp_path):
    """QLoRA: what peft merges into the base's dequantised self."""
    base = quantise(home / "base", tmp_path / "nf4", "nf4")
    plain = dequantised(base, tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    merged = peft.PeftModel.from_pretrained(model, home / "two").merge_and_unload().state_dict()
    for number, spec in enumerate((_spec(base, home / "two"), _alone(f"{base}+{home}/two"))):
        output = tmp_path / f"out{number}"
        found = _run(spec | {"out_dtype": "float32"}, output)
        _assert_same(found, {name: tensor.contiguous() for name, tensor in merged.items()})
        assert "quantization_config" not in json.loads((output / "config.json").read_text())


def test_weights_by_layer_scale_an_adapters_change(home, tmp_path):
    before, one = load_folder(home / "base"), load_folder(home / "one-merged")
    spec = _spec(home / "base", home / "one")
    spec["models"][0]["parameters"] = {"weight": [0.25, 2]}
    found = _run(spec, tmp_path / "out")
    expected = dict(before)
    for name, weight in ((LAYER_0, 0.25), (LAYER_1, 2)):
        expected[name] = before[name] + weight * (one[name] - before[name])
    _assert_same(found, expected)


@pytest.mark.parametrize("method", ["min_sigma", "ties"])
def test_wide_tensors_give_the_same_bytes_in_little_memory(method, tmp_path):
    shape, rank = (6, 150_001), 4
    generator = torch.Generator().manual_seed(0)
    base = save_tensors(tmp_path / "base", {"wide.weight": torch.randn(shape, generator=generator)})
    for number in (1, 2):
        adapter = tmp_path / f"adapter{number}"
        adapter.mkdir()
        stored = {
            "base_model.model.wide.lora_A.weight": torch.randn(rank, shape[1], generator=generator),
            "base_model.model.wide.lora_B.weight": torch.randn(shape[0], rank, generator=generator),
        }
        save_file(stored, adapter / WEIGHTS)
        (adapter / CONFIG).write_text(json.dumps(_MIDDLE))
    spec = _spec(base, tmp_path / "adapter1", tmp_path / "adapter2")
    spec["merge_method"] = method
    if method == "ties":
        spec["parameters"] = {"density": 0.3}
    much = _run(spec, tmp_path / "much", memory="1GiB", threads=1)
    little = _run(spec, tmp_path / "little", memory="20MB", threads=2)
    assert torch.equal(much["wide.weight"], little["wide.weight"])
    assert not torch.equal(much["wide.weight"], load_folder(base)["wide.weight"])


# The commands.


def test_the_plan_as_json(home, tmp_path, capsys):
    spec = tmp_path / "spec.yaml"
    chain = f"{home}/base+{home}/one"
    spec.write_text(json.dumps(_spec(home / "base", home / "two", chain)))  # JSON is YAML
    assert cli.main(["plan", str(spec), "--json", "--tensors"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [entry["path"] for entry in plan["inputs"]] == [
        str(home / name) for name in ("base", "two", "one")
    ]
    assert plan["inputs"][1]["num_tensors"] == len(load_folder(home / "base"))
    assert any(f"{home}/two: LoRA (r=4) of 4 layers" in note for note in plan["notes"])
    job = next(job for job in plan["tensors"] if job["name"] == LAYER_0)
    assert job["sources"] == [str(home / "base"), str(home / "two"), chain]


NUM_LAYERS = 30


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A merge of two adapters that takes a while."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    names = [f"model.layers.{number}.mlp" for number in range(NUM_LAYERS)]
    save_tensors(tmp_path / "base", {f"{name}.weight": random(320, 256) for name in names})
    for adapter in ("first", "second"):
        stored = {}
        for name in names:
            stored[f"base_model.model.{name}.lora_A.weight"] = random(4, 256)
            stored[f"base_model.model.{name}.lora_B.weight"] = random(320, 4)
        (tmp_path / adapter).mkdir()
        save_file(stored, tmp_path / adapter / WEIGHTS)
        (tmp_path / adapter / CONFIG).write_text(json.dumps(_MIDDLE))
    models = [tmp_path / "first", tmp_path / "second"]
    spec = _spec(tmp_path / "base", *models, parameters={"density": 0.4}) | {"merge_method": "ties"}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    return tmp_path


def test_a_killed_merge_goes_on_only_with_the_same_adapters(long):
    spec, output = long / "spec.yaml", long / "out"
    command = held(3, "after", "run", spec, "--output", output, "--threads", "1")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert stopped(process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=LIMIT_SECONDS) == -signal.SIGKILL

    config = long / "second" / CONFIG
    said = config.read_text()
    for changes in ({"lora_alpha": 7}, {"use_rslora": True}, {"alpha_pattern": {".*29.mlp": 1}}):
        config.write_text(json.dumps(_MIDDLE | changes))
        with pytest.raises(
            OutlierMergeError, match="how the models' tensors are paired and computed"
        ):
            outliermerge.run(spec, output=output)
    config.write_text(said)
    weights = long / "first" / WEIGHTS
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(OutlierMergeError, match=f"the files of {long}/first changed since"):
        outliermerge.run(spec, output=output)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))

    done = outliermerge.run(spec, output=output)
    assert 3 <= done.num_resumed < NUM_LAYERS
    _assert_same(load_folder(output), _run(spec, long / "undisturbed"), tolerance=0)
