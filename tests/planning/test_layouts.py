"""Two layouts of the same weights: no advice loses what was trained or pairs what is not one."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from advice import LOSING, advised, spec_of
from checkpoints import load_folder, save_tensors
from families import refusal
from layouts import LAYOUTS, PAIRS, Shapes
from safetensors.torch import save_file

import outliermerge


def save(folder: Path, shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_tensors(folder, tensors)
    return tensors


def both_ways(pairs):
    return [pair for one, other in pairs for pair in ((one, other), (other, one))]


@pytest.mark.parametrize(("ours", "theirs"), both_ways(PAIRS))
def test_no_advice_between_two_layouts_loses_weights_or_guesses(ours, theirs, tmp_path):
    save(tmp_path / "base", LAYOUTS[theirs], 0)
    save(tmp_path / "task", LAYOUTS[ours], 1)
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert not any(losing in message for losing in LOSING)
    assert "`missing:" not in message and "`extra:" not in message
    # Which of several tensors of one shape is meant, names alone do not tell.
    assert "`rename: " not in message
    assert "Convert" in message or "Load" in message


@pytest.mark.parametrize("policies", [{}, {"extra": "drop", "missing": "base"}], ids=str)
@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ("experts fused", "experts apart", "save_original_format=False"),
        ("experts fused", "mixtral", "save_original_format=False"),
        ("hf", "meta", "convert_llama_weights_to_hf.py"),
        ("hf", "torchtune", "FullModelHFCheckpointer"),
    ],
)
def test_what_converts_two_known_layouts_is_named(one, other, says, policies, tmp_path):
    for ours, theirs in both_ways([(one, other)]):
        save(tmp_path / "base", LAYOUTS[theirs], 0)
        save(tmp_path / "task", LAYOUTS[ours], 1)
        spec = spec_of(tmp_path / "base", tmp_path / "task", **policies)
        try:
            said = "\n".join(outliermerge.plan(spec).notes)
        except outliermerge.OutlierMergeError as error:
            said = str(error)
        assert says in said


def test_the_conversion_of_experts_works_as_it_is_named(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        moe_intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_experts=2,
        num_experts_per_tok=1,
    )
    base, task = (transformers.Qwen3MoeForCausalLM(config) for _ in range(2))
    base.save_pretrained(tmp_path / "apart")
    task.config.save_pretrained(tmp_path / "fused")
    fused = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    save_file(fused, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fused" / "config.json").unlink()  # else the type is known, and needs no advice
    (tmp_path / "apart" / "config.json").rename(tmp_path / "config.json")
    message = refusal(spec_of(tmp_path / "apart", tmp_path / "fused"))
    assert f"load {tmp_path / 'apart'} with transformers 5" in message
    (tmp_path / "config.json").rename(tmp_path / "apart" / "config.json")
    again = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "apart")
    again.save_pretrained(tmp_path / "converted", save_original_format=False)
    spec = spec_of(tmp_path / "converted", tmp_path / "fused")
    merged = load_folder(outliermerge.run(spec, output=tmp_path / "out").output)
    for name, tensor in task.state_dict().items():
        expected = 0.5 * base.state_dict()[name].double() + 0.5 * tensor.double()
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)


ORIGINAL = {
    "unet": {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 8, 3, 3),
    },
    "flux": {
        "double_blocks.0.img_attn.qkv.weight": (24, 8),
        "single_blocks.0.linear1.weight": (56, 8),
    },
    "vae": {"encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3)},
}
DIFFUSERS = {
    "unet": {
        "conv_in.weight": (8, 4, 3, 3),
        "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
        "conv_out.weight": (4, 8, 3, 3),
    },
    "flux": {
        **{f"transformer_blocks.0.attn.to_{x}.weight": (8, 8) for x in "qkv"},
        "single_transformer_blocks.0.proj_mlp.weight": (32, 8),
    },
    "vae": {"encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)},
}


@pytest.mark.parametrize("kind", ORIGINAL)
def test_diffusers_layout_and_the_original_one_are_named(kind, tmp_path):
    for ours, theirs in both_ways([(ORIGINAL[kind], DIFFUSERS[kind])]):
        save(tmp_path / "base", theirs, 0)
        save(tmp_path / "task", ours, 1)
        message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
        original = "task" if ours is ORIGINAL[kind] else "base"
        assert f"{tmp_path / original} in the original layout of one file" in message
        assert "from_single_file()" in message
        assert not any(losing in message for losing in LOSING)
        assert "`rename: " not in message


# A part that is wrapped, as torch.compile, DDP, DeepSpeed and FSDP leave it in a state dict.


WRAPPERS = {
    "a compiled part": lambda name: name.replace("net.", "net._orig_mod.", 1),
    "a part in DDP": lambda name: name.replace("net.", "net.module.", 1),
    "both": lambda name: name.replace("net.", "net.module._orig_mod.", 1),
    "DeepSpeed": lambda name: f"_forward_module.{name}",
    "the whole and a part": lambda name: "_orig_mod." + name.replace("net.", "net._orig_mod.", 1),
    "a part and layers": lambda name: re.sub(
        r"(layers\.\d+)", r"\1._orig_mod", name.replace("net.", "net._orig_mod.", 1)
    ),
    "attention alone": lambda name: name.replace("self_attn.", "self_attn._orig_mod."),
    "checkpointed mlp": lambda name: name.replace("mlp.", "mlp._checkpoint_wrapped_module."),
    "fsdp in a part": lambda name: re.sub(
        r"(layers\.\d+)",
        r"\1._fsdp_wrapped_module",
        name.replace("net.", "net._fsdp_wrapped_module.", 1),
    ),
}


@pytest.mark.parametrize("in_base", [False, True], ids=["task", "base"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_in_the_middle_of_names_are_paired_by_the_rename(wrapper, in_base, tmp_path):
    plain = {f"net.{name}": shape for name, shape in LAYOUTS["hf"].items()}
    wrapped = {WRAPPERS[wrapper](name): shape for name, shape in plain.items()}
    base = save(tmp_path / "base", wrapped if in_base else plain, 0)
    task = save(tmp_path / "task", plain if in_base else wrapped, 1)
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert not any(losing in message for losing in LOSING)
    entry = advised(message, tmp_path / "task")
    found = outliermerge.run(spec_of(tmp_path / "base", entry), output=tmp_path / "out").output
    merged = load_folder(found)
    for (name, start), end in zip(base.items(), task.values(), strict=True):
        expected = 0.5 * start.double() + 0.5 * end.double()
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)


# Gemma 3: as published, as transformers 5 saves it afresh, and with the names that it has inside.

TEXT = {f"model.layers.{n}.{k}": v for n in range(2) for k, v in (
    *((f"self_attn.{x}_proj.weight", (8, 8)) for x in "qkvo"),
    ("mlp.gate_proj.weight", (12, 8)),
    ("mlp.up_proj.weight", (12, 8)),
    ("mlp.down_proj.weight", (8, 12)),
    ("input_layernorm.weight", (8,)),
    ("pre_feedforward_layernorm.weight", (8,)),
)} | {"model.embed_tokens.weight": (22, 8), "model.norm.weight": (8,)}  # fmt: skip
VISION = {f"encoder.layers.{n}.{k}": v for n in range(2) for k, v in (
    *((f"self_attn.{x}_proj.weight", (8, 8)) for x in ("q", "k", "v", "out")),
    ("mlp.fc1.weight", (12, 8)),
    ("mlp.fc2.weight", (8, 12)),
    ("layer_norm1.weight", (8,)),
    ("layer_norm2.weight", (8,)),
)} | {"embeddings.patch_embedding.weight": (8, 3, 2, 2), "post_layernorm.weight": (8,)}  # fmt: skip
PROJECTOR = {"multi_modal_projector.mm_input_projection_weight": (8, 8)}


def gemma(text: str, vision: str, projector: str = "") -> Shapes:
    return {
        **{text + name.removeprefix("model."): shape for name, shape in TEXT.items()},
        **{vision + name: shape for name, shape in VISION.items()},
        **{projector + name: shape for name, shape in PROJECTOR.items()},
    }


GEMMA = {
    "published": gemma("language_model.model.", "vision_tower.vision_model."),
    "saved by 5": gemma("language_model.model.", "vision_tower."),
    "inside 4": gemma("model.language_model.", "model.vision_tower.vision_model.", "model."),
    "inside 5": gemma("model.language_model.", "model.vision_tower.", "model."),
}


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.permutations(GEMMA, 2)))
def test_the_rename_between_two_layouts_of_gemma_pairs_each_tensor_with_itself(
    ours, theirs, tmp_path
):
    base = save(tmp_path / "base", GEMMA[theirs], 0)
    task = save(tmp_path / "task", GEMMA[ours], 1)
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    assert not any(losing in message for losing in LOSING)
    entry = advised(message, tmp_path / "task")
    found = outliermerge.run(spec_of(tmp_path / "base", entry), output=tmp_path / "out").output
    merged = load_folder(found)
    assert merged.keys() == base.keys()
    for (name, start), end in zip(base.items(), task.values(), strict=True):
        expected = 0.5 * start.double() + 0.5 * end.double()
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", GEMMA)
def test_a_fine_tune_of_the_text_part_takes_the_rest_from_the_base(layout, tmp_path):
    base = save(tmp_path / "base", GEMMA[layout], 0)
    task = save(tmp_path / "task", TEXT, 1)
    message = refusal(spec_of(tmp_path / "base", tmp_path / "task"))
    missing = yaml.safe_load(re.search(r"`missing: (\[.*?\])`", message)[1])
    spec = spec_of(tmp_path / "base", advised(message, tmp_path / "task"), missing=missing)
    merged = load_folder(outliermerge.run(spec, output=tmp_path / "out").output)
    for number, (name, start) in enumerate(base.items()):
        end = list(task.values())[number] if number < len(TEXT) else start
        expected = 0.5 * start.double() + 0.5 * end.double()
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)
