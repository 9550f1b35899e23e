"""Adapters in one file: kohya's, LyCORIS's, diffusers' and ComfyUI's.

The oracles are diffusers, which merges such files into a pipeline, and the formulas of the kinds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import Layers
from checkpoints import load_folder, save_tensors
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge.checkpoint.adapters.single_file import is_single_file, open_single_file
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError

Stored = dict[str, torch.Tensor]


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * 7 + len(shape))
    return torch.randn(shape, generator=generator)


def read(lora: Path, base: Path) -> Stored:
    opened = open_checkpoint(lora)
    assert is_single_file(opened)
    merged = open_single_file(opened, open_checkpoint(base))
    with Reader() as reader:
        found = {name: reader.whole(source) for name, source in merged.tensors.items()}
        for name, source in merged.tensors.items():  # spans give what the whole gives
            middle = reader.values(source, 1, source.num_elements - 1)
            assert torch.equal(middle, found[name].flatten()[1:-1])
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = Layers().state_dict() | {"norm.weight": random(12), "norm.bias": random(12) * 2}
    return save_tensors(tmp_path_factory.mktemp("base"), state)


def tucker(core: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σ_ij T[i, j, …] · L[i, p] · R[j, q] as (p, q, …)."""
    return torch.einsum("ij...,ip,jq->pq...", core.double(), left.double(), right.double())


A = torch.tensor(3.0)
LINEAR = {"lora_down.weight": random(4, 12), "lora_up.weight": random(18, 4)}
CONV = {"lora_down.weight": random(4, 8, 3, 2), "lora_up.weight": random(12, 4, 1, 1)}
MID = {"lora_down.weight": random(4, 8, 1, 1), "lora_up.weight": random(12, 4, 1, 1),
       "lora_mid.weight": random(4, 4, 3, 2)}  # fmt: skip
LOHA = {"hada_w1_a": random(18, 4), "hada_w1_b": random(4, 12), "hada_w2_a": random(18, 4) * 2,
        "hada_w2_b": random(4, 12) + 1}  # fmt: skip
LOHA_MID = {"hada_w1_a": random(4, 12), "hada_w1_b": random(4, 8), "hada_w2_a": random(4, 12) * 2,
            "hada_w2_b": random(4, 8) - 1, "hada_t1": random(4, 4, 3, 2),
            "hada_t2": random(4, 4, 3, 2) + 1}  # fmt: skip
LOKR = {"lokr_w1": random(3, 4), "lokr_w2_a": random(6, 2), "lokr_w2_b": random(2, 3)}
LOKR_BOTH = {"lokr_w1_a": random(3, 2), "lokr_w1_b": random(2, 4), "lokr_w2": random(6, 3)}
LOKR_CONV = {"lokr_w1": random(3, 2), "lokr_w2": random(4, 4, 3, 2)}
LOKR_MID = {"lokr_w1": random(3, 2), "lokr_w2_a": random(2, 4), "lokr_w2_b": random(2, 4),
            "lokr_t2": random(2, 2, 3, 2)}  # fmt: skip


def lora(parts: Stored) -> torch.Tensor:
    up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"].flatten(1)
    return up.double() @ down.double()


def loha(parts: Stored) -> torch.Tensor:
    one, two = (parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in (1, 2))
    return one * two


def kron(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The blocks of a Kronecker product side by side, for matrices and for kernels."""
    rows = [torch.cat([value * other for value in row], 1) for row in one.double()]
    return torch.cat(rows, 0)


# Of each kind: the layer, its parts, and ΔW in float64.
KINDS: dict[str, tuple[str, Stored, torch.Tensor]] = {
    "LoRA": ("linear", LINEAR, lora(LINEAR)),
    "LoRA with alpha": ("linear", {**LINEAR, "alpha": A}, lora(LINEAR) * 3 / 4),
    "alpha is a whole number": (
        "linear", {**LINEAR, "alpha": torch.tensor([2])}, lora(LINEAR) / 2),
    "of a convolution": ("conv2", {**CONV, "alpha": A}, lora(CONV) * 3 / 4),
    "with a Tucker core": (
        "conv2", {**MID, "alpha": A},
        tucker(MID["lora_mid.weight"], MID["lora_up.weight"].flatten(1).T,
               MID["lora_down.weight"].flatten(1)) * 3 / 4),
    "LoHa": ("linear", {**LOHA, "alpha": A}, loha(LOHA) * 3 / 4),
    "LoHa with cores": (
        "conv2", {**LOHA_MID, "alpha": A},
        tucker(LOHA_MID["hada_t1"], LOHA_MID["hada_w1_a"], LOHA_MID["hada_w1_b"])
        * tucker(LOHA_MID["hada_t2"], LOHA_MID["hada_w2_a"], LOHA_MID["hada_w2_b"]) * 3 / 4),
    "LoKr": ("linear", {**LOKR, "alpha": A},
             kron(LOKR["lokr_w1"], LOKR["lokr_w2_a"] @ LOKR["lokr_w2_b"]) * 3 / 2),
    "LoKr, the other factored": (
        "linear", {**LOKR_BOTH, "alpha": A},
        kron(LOKR_BOTH["lokr_w1_a"] @ LOKR_BOTH["lokr_w1_b"], LOKR_BOTH["lokr_w2"]) * 3 / 2),
    "LoKr without a rank": (
        "conv2", {**LOKR_CONV, "alpha": A}, kron(LOKR_CONV["lokr_w1"], LOKR_CONV["lokr_w2"])),
    "LoKr with a core": (
        "conv2", {**LOKR_MID, "alpha": A},
        kron(LOKR_MID["lokr_w1"],
             tucker(LOKR_MID["lokr_t2"], LOKR_MID["lokr_w2_a"], LOKR_MID["lokr_w2_b"])) * 3 / 2),
    "full difference": ("conv3", {"diff": random(12, 8, 2, 3, 2)},
                        random(12, 8, 2, 3, 2).double()),
    "norm": ("norm", {"w_norm": random(12), "b_norm": random(12)}, random(12).double()),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_formula_of_its_kind(kind, prefix, base, tmp_path):
    layer, parts, change = KINDS[kind]
    save_file({f"{prefix}{layer}.{p}": t for p, t in parts.items()}, tmp_path / "x.safetensors")
    found, before = read(tmp_path / "x.safetensors", base), load_folder(base)
    expected = {f"{layer}.weight": before[f"{layer}.weight"].double() + change.reshape(
        before[f"{layer}.weight"].shape)}  # fmt: skip
    if "b_norm" in parts:
        expected["norm.bias"] = before["norm.bias"].double() + random(12)
    for name, tensor in before.items():
        wanted = expected.get(name, tensor).float()
        torch.testing.assert_close(found[name].float(), wanted, rtol=2e-6, atol=3e-5)


@pytest.mark.parametrize("of_inputs", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("layer", ["linear", "conv2"])
def test_dora_has_a_norm_for_each_output_or_input(layer, of_inputs, base, tmp_path):
    parts = LINEAR if layer == "linear" else CONV
    weight = load_folder(base)[f"{layer}.weight"].double()
    merged = weight + lora(parts).reshape(weight.shape)
    axis = 1 if of_inputs else 0
    shape = [weight.shape[axis] if n == axis else 1 for n in range(weight.ndim)]
    magnitude = random(*shape).abs() + 1
    norms = merged.transpose(0, axis).flatten(1).norm(dim=1).reshape(shape)
    stored = {f"lora_unet_{layer}.{p}": t for p, t in parts.items()}
    save_file(stored | {f"lora_unet_{layer}.dora_scale": magnitude}, tmp_path / "x.safetensors")
    found = read(tmp_path / "x.safetensors", base)[f"{layer}.weight"]
    expected = merged / norms * magnitude
    torch.testing.assert_close(found, expected.float(), rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("of_inputs", [False, True], ids=["outputs", "inputs"])
def test_lycoris_ia3_multiplies_by_one_more(of_inputs, base, tmp_path):
    weight = load_folder(base)["linear.weight"]
    vector = random(12 if of_inputs else 18)
    save_file(
        {"lycoris_linear.weight": vector, "lycoris_linear.on_input": torch.tensor(int(of_inputs))},
        tmp_path / "x.safetensors",
    )
    found = read(tmp_path / "x.safetensors", base)
    factor = vector + 1 if of_inputs else vector[:, None] + 1
    torch.testing.assert_close(found["linear.weight"], weight * factor)
    assert torch.equal(found["linear.bias"], load_folder(base)["linear.bias"])


def test_a_config_in_the_header_gives_the_scale(base, tmp_path):
    """As diffusers writes it since 0.34."""
    said = {"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"conv2": 4},
            "unet.alpha_pattern": {"conv2": 2}, "unet.target_modules": ["linear", "conv2"],
            "unet.lora_bias": True}  # fmt: skip
    stored = {
        "unet.linear.lora_A.weight": LINEAR["lora_down.weight"],
        "unet.linear.lora_B.weight": LINEAR["lora_up.weight"],
        "unet.linear.lora_B.bias": random(18),
        "unet.conv2.lora_A.weight": CONV["lora_down.weight"],
        "unet.conv2.lora_B.weight": CONV["lora_up.weight"],
    }
    path = tmp_path / "x.safetensors"
    save_file(stored, path, metadata={"lora_adapter_metadata": json.dumps(said)})
    found, before = read(path, base), load_folder(base)
    for layer, scale, parts in (("linear", 2, LINEAR), ("conv2", 0.5, CONV)):
        weight = before[f"{layer}.weight"]
        expected = weight.double() + lora(parts).reshape(weight.shape) * scale
        torch.testing.assert_close(found[f"{layer}.weight"], expected.float(), rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(found["linear.bias"], before["linear.bias"] + 2 * random(18))
    for wrong, message in (
        ("{", "is no JSON object"),
        (json.dumps(said | {"unet.r": 5}), "is not of rank 5"),
        (json.dumps(said | {"unet.lora_alpha": "8"}), "lora_alpha: found '8'"),
        (json.dumps(said | {"unet.init_lora_weights": "pissa"}), "'pissa' also changed"),
    ):
        save_file(stored, path, metadata={"lora_adapter_metadata": wrong})
        with pytest.raises(OutlierMergeError) as caught:
            read(path, base)
        assert message in str(caught.value)


# Names.


def named(folder: Path, names: list[str], *stored: str) -> dict[str, Any]:
    """Save a base with weights of these names, and a LoRA of these layers; return a spec."""
    save_file({f"{name}.weight": random(6, 5) for name in names}, folder / "base.safetensors")
    parts = {"lora_down.weight": random(2, 5), "lora_up.weight": random(6, 2)}
    save_file(
        {f"{layer}.{p}": tensor.clone() for layer in stored for p, tensor in parts.items()},
        folder / "lora.safetensors",
    )
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base.safetensors"),
        "models": [{"model": str(folder / "lora.safetensors")}],
    }


def changed(folder: Path, spec: dict[str, Any]) -> set[str]:
    """Return the layers that a merge changed."""
    output = outliermerge.run(spec, output=folder / "out.safetensors").output
    assert outliermerge.verify(output) == []
    found, before = load_file(output), load_file(folder / "base.safetensors")
    assert found.keys() == before.keys()
    return {n.removesuffix(".weight") for n in found if not torch.equal(found[n], before[n])}


UNET = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
FIRST = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1"
MEANT: dict[str, tuple[list[str], str, str]] = {
    "underscores in the name": ([UNET, f"{UNET}_x"],
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", UNET),
    "diffusers' names": ([UNET],
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", UNET),
    "with dots": ([UNET, FIRST], UNET.removeprefix("model."), UNET),
    "a text encoder": ([FIRST, UNET], "lora_te1_text_model_encoder_layers_0_mlp_fc1", FIRST),
    "the first of two": (
        [FIRST, FIRST.replace("0.transformer", "1.transformer")],
        "lora_te1_text_model_encoder_layers_0_mlp_fc1", FIRST),
    "a language model": (
        ["model.layers.0.self_attn.q_proj"], "lycoris_model_layers_0_self_attn_q_proj",
        "model.layers.0.self_attn.q_proj"),
    "of transformers 5": (
        ["encoder.layers.0.mlp.fc1"], "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "encoder.layers.0.mlp.fc1"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEANT)
def test_a_name_is_found_among_those_of_the_base(case, tmp_path):
    names, stored, meant = MEANT[case]
    assert changed(tmp_path, named(tmp_path, names, stored)) == {meant}


REFUSED: dict[str, tuple[list[str], list[str], str]] = {
    "two that are written alike": (
        ["a.b_c", "a_b.c"], ["lora_unet_a_b_c"], "could be several of the base's:\n  a.b_c.weight"),
    "two places": (
        ["x.a.b", "y.a.b"], ["lora_unet_a_b"], "could be in several places of the base: lora_"),
    "none": (["a.b"], ["lora_unet_a_b", "lora_unet_a_c"], "1 of its 2 layers lora_unet_… are none"),
    "no text encoder": (["a.b"], ["lora_unet_a_b", "lora_te_a_c"], "layers lora_te_… are none"),
    "another part": (["unet/a.b"], ["lora_te_a_b"], "1 of its 1 layers lora_te_… are none"),
    "one layer by two names": (
        ["a.b"], ["lora_unet_a_b", "diffusion_model.a.b"], "are both for 'a.b.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_mean_none_or_several_are_refused(case, tmp_path):
    names, stored, message = REFUSED[case]
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(named(tmp_path, names, *stored))
    assert message in str(caught.value)


def test_a_lora_after_a_plus_is_one_of_that_model(tmp_path):
    spec = named(tmp_path, ["a.b", "a.c"], "lora_unet_a_b")
    path = f"{tmp_path}/base.safetensors+{tmp_path}/lora.safetensors"
    alone = {"merge_method": "passthrough", "models": [{"model": path}]}
    assert changed(tmp_path, alone) == {"a.b"}
    assert f"{path}: LoRA of 1 layers, computed when it is read" in outliermerge.plan(alone).notes
    del spec["base_model"]
    with pytest.raises(OutlierMergeError, match="an adapter that names no base"):
        outliermerge.plan(spec | {"merge_method": "passthrough"})


def test_two_files_over_one_base_are_two_task_models(base, tmp_path):
    for name, parts in (("a", LINEAR), ("b", LOHA)):
        stored = {f"lycoris_linear.{p}": t for p, t in parts.items()}
        save_file(stored | {"lycoris_linear.alpha": A}, tmp_path / f"{name}.safetensors")
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(tmp_path / f"{name}.safetensors")} for name in "ab"],
        "parameters": {"weight": 0.5},
    }
    found = load_folder(outliermerge.run(spec, output=tmp_path / "out").output)
    before = load_folder(base)
    change = (lora(LINEAR) + loha(LOHA)) * 3 / 8
    expected = (before["linear.weight"].double() + change).float()
    torch.testing.assert_close(found["linear.weight"], expected, rtol=2e-6, atol=1e-5)
    assert torch.equal(found["conv2.weight"], before["conv2.weight"])
    twice = spec | {"models": [spec["models"][0]] * 2}
    with pytest.raises(OutlierMergeError, match="stands twice"):
        outliermerge.plan(twice)


U = "lora_unet_linear."
BROKEN: dict[str, tuple[Stored, str]] = {
    "a factor is missing": ({f"{U}lora_down.weight": random(4, 12)}, "it has no lora_up"),
    "no common rank": ({f"{U}lora_down.weight": random(3, 12),
                        f"{U}lora_up.weight": random(18, 4)}, "have no common rank"),
    "another size": ({f"{U}lora_down.weight": random(4, 11), f"{U}lora_up.weight": random(18, 4)},
                     "but the base's linear.weight is [18, 12]"),
    "a scalar": ({f"{U}lora_down.weight": torch.tensor(1.0),
                  f"{U}lora_up.weight": random(18, 4)}, "is a scalar"),
    "alpha is no number": ({**{U + p: t for p, t in LINEAR.items()}, f"{U}alpha": random(2)},
                           "alpha is [2], expected one number"),
    "integers": ({f"{U}lora_down.weight": torch.ones(4, 12, dtype=torch.int8),
                  f"{U}lora_up.weight": random(18, 4)}, "is int8, expected floats"),
    "two kinds": ({**{U + p: t for p, t in (LINEAR | LOHA).items()}}, "parts of LoHa and LoRA"),
    "a part without use": ({**{U + p: t for p, t in LOHA.items()}, f"{U}lora_mid.weight": A},
                           "parts of LoHa and LoRA"),
    "a kind that is not read": ({**{U + p: t for p, t in LINEAR.items()},
                                 f"{U}oft_blocks": random(3, 4, 4)}, "of a kind that is not read"),
    "alpha alone": ({**{U + p: t for p, t in LINEAR.items()}, "lora_unet_conv2.alpha": A},
                    "has alpha without factors"),
    "a bias that is not there": ({**{U + p: t for p, t in LINEAR.items()},
                                  "lora_unet_embedding.diff_b": random(12)},
                                 "of which the base has no such tensor"),
    "norms of another size": ({**{U + p: t for p, t in LINEAR.items()},
                               f"{U}dora_scale": random(17, 1)}, "does not fit the base's"),
    "a square weight": ({"lycoris_square.weight": random(12),
                         "lycoris_square.on_input": torch.tensor(1)}, "is square, so its shape"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_does_not_fit_is_refused(what, base, tmp_path):
    stored, message = BROKEN[what]
    save_file(stored, tmp_path / "x.safetensors")
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(tmp_path / "x.safetensors")}],
    }
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    assert message in str(caught.value)
