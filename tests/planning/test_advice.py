"""What an error advises loses nothing that was trained, and works as it is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.utils.prune
import transformers
import yaml
from advice import LOSING, advised, spec_of
from checkpoints import load_folder, save_tensors
from families import refusal
from safetensors.torch import save_file

import outliermerge
from outliermerge.checkpoint.adapters.config import _NEVER_MERGED
from outliermerge.errors import OutlierMergeError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*torch.nn.utils.weight_norm.*:FutureWarning",
)
Tensors = dict[str, torch.Tensor]


def weights(seed: int) -> Tensors:
    """A decoder of two layers, with a head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (8, 8),
            f"model.layers.{layer}.self_attn.q_proj.bias": (8,),
            f"model.layers.{layer}.mlp.up_proj.weight": (12, 8),
            f"model.layers.{layer}.input_layernorm.weight": (8,),
            f"model.layers.{layer}.input_layernorm.bias": (8,),
        }
    shapes["lm_head.weight"] = (11, 8)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): tensor for name, tensor in tensors.items()}


# Names that wrappers and other layouts change.

FLAVOURS: dict[str, Callable[[str], str]] = {
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "peft, merged in place": lambda name: f"base_model.model.{name}",
    "base_layer": lambda name: name.replace("q_proj.", "q_proj.base_layer."),
    "peft and base_layer": lambda name: (
        "base_model.model." + name.replace("q_proj.", "q_proj.base_layer.")
    ),
    "fsdp": lambda name: re.sub(
        r"(layers\.\d+)", r"\1._fsdp_wrapped_module", f"_fsdp_wrapped_module.{name}"
    ),
    "checkpointed": lambda name: re.sub(r"(layers\.\d+)", r"\1._checkpoint_wrapped_module", name),
    "compiled layers": lambda name: re.sub(r"(layers\.\d+)", r"\1._orig_mod", name),
    "a level less": lambda name: name.removeprefix("model."),
    "a level more": lambda name: f"transformer.{name}" if "head" in name else f"language.{name}",
    "gamma and beta": lambda name: re.sub(
        r"layernorm\.(weight|bias)$",
        lambda m: "layernorm." + {"weight": "gamma", "bias": "beta"}[m[1]],
        name,
    ),
    "another layout": lambda name: (
        name.replace("model.layers", "transformer.h")
        .replace("self_attn", "attn")
        .replace("up_proj", "fc_in")
    ),
}  # fmt: skip


@pytest.mark.parametrize("in_base", [False, True], ids=["task", "base"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_names_that_differ_throughout_get_the_rename_that_pairs_them(flavour, in_base, tmp_path):
    base, task = weights(0), weights(1)
    change = FLAVOURS[flavour]
    stored_base = renamed(base, change) if in_base else base
    save_tensors(tmp_path / "base", stored_base)
    save_tensors(tmp_path / "task", task if in_base else renamed(task, change))
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    for losing in LOSING:
        assert losing not in message
    entry = advised(message, tmp_path / "task")
    found = outliermerge.run(spec_of(tmp_path / "base", entry), output=tmp_path / "out").output
    merged = load_folder(found)
    assert merged.keys() == stored_base.keys()
    for name, tensor in base.items():
        expected = 0.5 * tensor.double() + 0.5 * task[name].double()
        stored = merged[change(name) if in_base else name].double()
        torch.testing.assert_close(stored, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policies", [{}, {"extra": "drop", "missing": "base"}], ids=str)
@pytest.mark.parametrize("flavour", ["ddp", "peft and base_layer", "fsdp"])
def test_a_model_of_which_nothing_would_be_used_is_refused(flavour, policies, tmp_path):
    save_tensors(tmp_path / "base", weights(0))
    tensors = renamed(weights(1), FLAVOURS[flavour])
    tensors = {name: tensor for name, tensor in tensors.items() if name not in weights(0)}
    save_tensors(tmp_path / "task", tensors)
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task", **policies))
    assert "`rename: " in message
    assert not any(losing in message for losing in LOSING)


def test_a_rename_that_policies_hide_is_noted(tmp_path):
    save_tensors(tmp_path / "base", weights(0))
    save_tensors(tmp_path / "task", renamed(weights(1), FLAVOURS["gamma and beta"]))
    spec = spec_of(tmp_path / "base", tmp_path / "task", extra="drop", missing="base")
    notes = outliermerge.plan(spec).notes
    assert any("`rename: gamma_beta_to_weight_bias`" in note for note in notes)


def test_only_what_has_no_counterpart_gets_a_policy(tmp_path):
    base = weights(0) | {"model.rotary.table": torch.ones(4)}
    extra = {"score.weight": torch.ones(3, 8), "model.num_seen": torch.arange(5)}
    save_tensors(tmp_path / "base", base)
    save_tensors(tmp_path / "task", renamed(weights(1), FLAVOURS["ddp"]) | extra)
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    entry = advised(message, tmp_path / "task")
    missing = yaml.safe_load(re.search(r"`missing: (.*?)`", message)[1])
    copied = yaml.safe_load(re.search(r"`extra: (.*?)` copies", message)[1])
    assert [one["filter"] for one in missing] == ["model.rotary."]
    assert {one["filter"] for one in copied} == {"score.", "model.num_seen"}
    assert "will then not be in the output" in message
    spec = spec_of(tmp_path / "base", entry, missing=missing, extra=copied)
    merged = load_folder(outliermerge.run(spec, output=tmp_path / "out").output)
    assert merged.keys() == base.keys() | extra.keys()
    expected = 0.5 * base["model.norm.weight"] + 0.5 * weights(1)["model.norm.weight"]
    torch.testing.assert_close(merged["model.norm.weight"], expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"mlp.one.weight": (6, 4)}, {"mlp.two.weight": (6, 4)}),
        (
            {"layers.0.attn.qkv_proj.weight": (12, 4)},
            {f"layers.0.attn.{part}_proj.weight": (4, 4) for part in "qkv"},
        ),
        (
            {f"blocks.{n}.kernel": (4, 2) for n in range(9)},
            {f"layers.{n}.weight": (2, 4) for n in range(9)},
        ),
    ],
    ids=["one name", "fused", "transposed"],
)
def test_what_may_be_the_same_in_another_form_gets_no_policy(ours, theirs, tmp_path):
    shared = {"norm.weight": torch.ones(3)}
    save_tensors(tmp_path / "base", shared | {k: torch.ones(s) for k, s in theirs.items()})
    save_tensors(tmp_path / "task", shared | {k: torch.ones(s) for k, s in ours.items()})
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert "may be the same weights under another name or in another form" in message
    assert not any(losing in message for losing in LOSING)
    for name in (*ours, *theirs):
        assert f"{name} (has)" in message or f"{name} (lacks)" in message


def test_a_new_head_is_not_taken_for_an_old_one_of_its_shape(tmp_path):
    shared = {f"layers.{n}.weight": torch.ones(4, 4) for n in range(3)}
    head = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}
    save_tensors(tmp_path / "base", shared | {f"cls.nsp.{k}": t for k, t in head.items()})
    save_tensors(tmp_path / "task", shared | {f"classifier.{k}": t for k, t in head.items()})
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert "`rename: " not in message


KINDS_OF_ONE_SHAPE = {
    "norm's bias": ("head.LayerNorm.bias", "pooler.dense.bias"),
    "norm's weight": ("head.ln_1.weight", "pooler.proj.bias"),
    "two norms": ("head.norm.weight", "pooler.layer_norm.bias"),
    "gamma": ("head.LayerNorm.gamma", "pooler.LayerNorm.bias"),
    "batch norm": ("head.bn1.weight", "pooler.fc.weight"),
    "one layer": ("layers.0.mlp.norm.bias", "layers.0.attn.q_proj.bias"),
    "embeddings": ("head.pos_embed.weight", "pooler.dense.weight"),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", KINDS_OF_ONE_SHAPE)
def test_tensors_of_other_kinds_are_not_taken_for_the_same(kind, swapped, tmp_path):
    names = KINDS_OF_ONE_SHAPE[kind]
    shape = (4, 4) if kind == "embeddings" else (4,)
    shared = {f"shared.{n}.weight": torch.ones(4, 4) for n in range(3)}
    for folder, name in zip(("base", "task"), names[::-1] if swapped else names, strict=True):
        save_tensors(tmp_path / folder, shared | {name: torch.ones(shape)})
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert "`rename: " not in message
    assert not any(f"{a} (has) ~ {b} (lacks)" in message for a, b in (names, names[::-1]))


@pytest.mark.parametrize(
    "names",
    [("a.LayerNorm.bias", "b.ln_f.beta"), ("a.gate.bias", "b.dense.bias"), ("a.1", "b.norm.bias")],
)
def test_vectors_that_may_be_the_same_are_told(names, tmp_path):
    shared = {f"shared.{n}.weight": torch.ones(4, 4) for n in range(3)}
    for folder, name in zip(("base", "task"), names, strict=True):
        save_tensors(tmp_path / folder, shared | {name: torch.ones(5)})
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert " ~ " in message or "`rename: " in message


def test_bert_of_before_and_its_fine_tune(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    old = transformers.BertForPreTraining(config)
    new = transformers.BertForSequenceClassification(config)
    old.save_pretrained(tmp_path / "base")
    new.save_pretrained(tmp_path / "task")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    stored = load_folder(tmp_path / "base")
    for ours, theirs in names.items():
        stored = renamed(stored, lambda name, a=ours, b=theirs: name.replace(a, b))
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    entry = advised(message, tmp_path / "task")
    assert entry["rename"] == "weight_bias_to_gamma_beta"
    policies = {
        key: yaml.safe_load(re.search(rf"`{key}: (\[.*?\])`", message)[1])
        for key in ("missing", "extra")
    }
    assert {one["filter"] for one in policies["missing"]} == {"cls."}
    assert {one["filter"] for one in policies["extra"]} == {"classifier."}
    # Its inverse on the base writes the names of today.
    base = {"model": str(tmp_path / "base"), "rename": "gamma_beta_to_weight_bias"}
    spec = spec_of(tmp_path / "base", tmp_path / "task", **policies) | {"base_model": base}
    merged = load_folder(outliermerge.run(spec, output=tmp_path / "out").output)
    start, end = old.state_dict(), new.state_dict()
    for name in end:
        if name.startswith("bert.") and end[name].is_floating_point():
            expected = 0.5 * start[name].double() + 0.5 * end[name].double()
            torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(merged["classifier.weight"], end["classifier.weight"])


# Adapters in state dicts.

Q = "model.layers.{}.self_attn.q_proj"


def lora(kind: str, *, prefix: str = "", name: str = ".default") -> Tensors:
    """The tensors that an adapter of a kind adds to layers, with a base's in its wrapper."""
    parts = {
        "LoRA": {f"lora_A{name}.weight": (2, 8), f"lora_B{name}.weight": (8, 2)},
        "DoRA": {
            f"lora_A{name}.weight": (2, 8),
            f"lora_B{name}.weight": (8, 2),
            f"lora_magnitude_vector{name}.weight": (8,),
        },
        "IA3": {f"ia3_l{name}": (8, 1)},
        "LoHa": {f"hada_w{n}_{x}{name}": (8, 2) for n in (1, 2) for x in "ab"},
        "LoKr": {f"lokr_w1{name}": (2, 2), f"lokr_w2{name}": (4, 4)},
        "OFT": {f"oft_R{name}.weight": (1, 28)},
        "VeRA": {f"vera_lambda_b{name}": (8,), f"vera_lambda_d{name}": (2,)},
        "torchtune": {"lora_a.weight": (2, 8), "lora_b.weight": (8, 2)},
        "a new kind": {f"something{name}": (8, 3)},
    }[kind]
    return {
        f"{prefix}{Q.format(layer)}.{part}": torch.ones(shape)
        for layer in range(2)
        for part, shape in parts.items()
    }


KINDS = ("LoRA", "DoRA", "IA3", "LoHa", "LoKr", "OFT", "VeRA", "torchtune", "a new kind")


@pytest.mark.parametrize("policies", [{}, {"extra": "drop", "missing": "base"}], ids=str)
@pytest.mark.parametrize("prefix", ["base_model.model.", "", "module.base_model.model."])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unmerged_adapter_in_a_state_dict_is_refused(kind, prefix, policies, tmp_path):
    save_tensors(tmp_path / "base", weights(0))
    wrapped = renamed(weights(1), lambda n: prefix + n.replace("q_proj.", "q_proj.base_layer."))
    save_tensors(tmp_path / "task", wrapped | lora(kind, prefix=prefix))
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task", **policies))
    assert "unmerged adapter" in message and "merge_and_unload()" in message
    assert not any(losing in message for losing in LOSING)


@pytest.mark.parametrize("where", ["base", "task", "both"])
def test_an_unmerged_adapter_is_refused_wherever_it_is(where, tmp_path):
    for number, name in enumerate(("base", "task")):
        own = lora("LoRA") if where in (name, "both") else {}
        save_tensors(tmp_path / name, weights(number) | own)
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert f"{tmp_path / ('task' if where == 'task' else 'base')}: it holds an" in message


def test_modules_that_were_saved_in_a_state_dict_are_not_lost(tmp_path):
    save_tensors(tmp_path / "base", weights(0))
    task = weights(1)
    task["lm_head.original_module.weight"] = task.pop("lm_head.weight")
    task["lm_head.modules_to_save.default.weight"] = torch.ones(11, 8)
    save_tensors(tmp_path / "task", task)
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert "lm_head.modules_to_save.default.weight" in message and "unmerged adapter" in message


def test_adapters_that_are_a_part_of_every_model_are_merged_and_noted(tmp_path):
    """As Phi-4-multimodal's, whose published weights have LoRA for speech and for vision."""
    for number, name in enumerate(("base", "task")):
        save_tensors(tmp_path / name, weights(number) | lora("LoRA", name=".vision"))
    plan = outliermerge.plan(spec_of(tmp_path / "base", tmp_path / "task"))
    assert any("which is not the merge of the weights that they make" in n for n in plan.notes)


def test_a_state_dict_of_a_peft_model_itself(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    save_tensors(tmp_path / "task", state)
    assert "unmerged adapter" in refusal(spec_of(tmp_path / "base", tmp_path / "task"))


SINGLE_FILES = {
    "OFT": ("oft_unet_blocks_{}_proj", ("oft_blocks", "alpha")),
    "XLabs": ("blocks.{}.processor.qkv_lora1", ("down.weight", "up.weight")),
    "no alpha, and no part": ("blocks.{}.proj", ("lora_A.weight", "lora_B.weight")),
}


@pytest.mark.parametrize("policies", [{}, {"extra": "drop", "missing": "base"}], ids=str)
@pytest.mark.parametrize("name", SINGLE_FILES)
def test_files_of_adapters_that_do_not_tell_what_they_add_are_refused(name, policies, tmp_path):
    module, parts = SINGLE_FILES[name]
    stored = {f"{module.format(n)}.{part}": torch.ones(4, 4) for n in range(3) for part in parts}
    base = {f"model.diffusion_model.blocks.{n}.proj.weight": torch.ones(4, 4) for n in range(3)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(stored, tmp_path / "style.safetensors")
    spec = spec_of(tmp_path / "base.safetensors", tmp_path / "style.safetensors", **policies)
    message = refusal(spec)
    assert ("LyCORIS" in message and "Merge it into its" in message) or "merges it into" in message
    assert not any(losing in message for losing in LOSING)


def test_two_loras_are_not_averaged_factor_by_factor(tmp_path):
    for name in ("a", "b"):
        stored = {"lora_unet_x.lora_up.weight": torch.ones(4, 2)}
        stored |= {"lora_unet_x.lora_down.weight": torch.ones(2, 4)}
        save_file(stored, tmp_path / f"{name}.safetensors")
    models = [{"model": str(tmp_path / f"{name}.safetensors")} for name in ("a", "b")]
    assert "an adapter that names no base" in refusal({"merge_method": "linear", "models": models})


# Weights that torch makes of others.


def conv(kind: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    module = torch.nn.Conv1d(4, 6, 3)
    wrap = {
        "plain": lambda m: m,
        "weight_norm": lambda m: torch.nn.utils.weight_norm(m, dim=2),
        "parametrized": lambda m: torch.nn.utils.parametrizations.weight_norm(m, dim=2),
        "spectral": torch.nn.utils.parametrizations.spectral_norm,
        "old spectral": torch.nn.utils.spectral_norm,
        "pruned": lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", amount=2),
    }[kind]
    return wrap(module)


def save_conv(folder: Path, kind: str, seed: int) -> torch.nn.Module:
    module = torch.nn.Sequential(conv(kind, seed), torch.nn.LayerNorm(5))
    save_tensors(folder, {name: tensor.clone() for name, tensor in module.state_dict().items()})
    return module


COMPOSED = ("weight_norm", "parametrized", "spectral", "old spectral", "pruned")


@pytest.mark.parametrize("in_base", [False, True], ids=["task", "base"])
@pytest.mark.parametrize("kind", COMPOSED)
def test_a_weight_that_is_made_of_others_is_told(kind, in_base, tmp_path):
    save_conv(tmp_path / "base", kind if in_base else "plain", 0)
    save_conv(tmp_path / "task", "plain" if in_base else kind, 1)
    for policies in ({}, {"extra": "drop", "missing": "base"}):
        message = refusal(spec_of(tmp_path / "base", tmp_path / "task", **policies))
        assert "make them plain weights" in message
        assert f"{tmp_path / ('base' if in_base else 'task')}: it keeps" in message
        assert not any(losing in message for losing in LOSING)


@pytest.mark.parametrize(
    "kinds", [("weight_norm", "parametrized"), ("parametrized", "weight_norm")]
)
def test_both_forms_of_weight_norm_are_paired_by_a_map(kinds, tmp_path):
    start = save_conv(tmp_path / "base", kinds[0], 0).state_dict()
    end = save_conv(tmp_path / "task", kinds[1], 1).state_dict()
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert not any(losing in message for losing in LOSING)
    entry = advised(message, tmp_path / "task")
    spec = spec_of(tmp_path / "base", entry)
    plan = outliermerge.plan(spec)
    assert any("which is not the merge of the weights that they make" in n for n in plan.notes)
    merged = load_folder(outliermerge.run(plan, output=tmp_path / "out").output)
    both = {"weight_g": "original0", "weight_v": "original1"}
    for old, new in both.items():
        names = [f"0.{old}", f"0.parametrizations.weight.{new}"]
        ours, theirs = names if kinds[0] == "weight_norm" else names[::-1]
        expected = 0.5 * start[ours].double() + 0.5 * end[theirs].double()
        torch.testing.assert_close(merged[ours].double(), expected, rtol=0, atol=1e-6)


# Adapters that are no LoRA.


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType])
def test_a_merge_by_peft_is_advised_only_where_peft_can(kind, tmp_path):
    if kind in ("LORA", "LOHA", "LOKR", "IA3"):  # these are read
        return
    save_tensors(tmp_path / "base", weights(0))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"peft_type": "{kind}"}}')
    save_file({"x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec_of(tmp_path / "base", adapter))
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(kind)]
    can = hasattr(tuner, "merge_and_unload") and kind not in ("XLORA", "POLY", "LILY", "SHADOW")
    assert ("merge_and_unload" in str(caught.value)) == can
    assert (kind in _NEVER_MERGED) != can


@pytest.mark.parametrize("is_lora", [True, False])
def test_a_head_by_its_new_name_is_paired_with_the_old_one(is_lora, tmp_path):
    """GPT-NeoX's head is `embed_out` in its files, and `lm_head` where transformers 5 trains it."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(vocab_size=24, hidden_size=8, intermediate_size=8,
                                        num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["dense", *(["lm_head"] if is_lora else [])]}
    saved = {} if is_lora else {"modules_to_save": ["lm_head"]}
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, init_lora_weights=False, **targets, **saved)
    )
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = tuned.merge_and_unload().lm_head.weight
    spec = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    plain = {"model": str(tmp_path / "adapter")}
    renamed = plain | {"rename": {"from": r"^lm_head\.", "to": "embed_out."}}
    if is_lora:
        with pytest.raises(OutlierMergeError) as caught:
            outliermerge.plan(spec | {"models": [plain]})
        assert "`rename" in str(caught.value) and "drop" not in str(caught.value)
        assert "untie" not in str(caught.value)
    # A head that is saved whole is found by transformers' own names, too.
    for number, model in enumerate([renamed] if is_lora else [renamed, plain]):
        out = outliermerge.run(spec | {"models": [model]}, output=tmp_path / f"out{number}").output
        merged = transformers.GPTNeoXForCausalLM.from_pretrained(out).lm_head.weight
        torch.testing.assert_close(merged, expected)
