"""Kinds of PEFT adapters other than LoRA of linear layers, equal to what peft merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import Layers
from checkpoints import save_tensors
from peft.tuners.lokr import layer as lokr
from safetensors.torch import load_file, save_file
from torch import nn

from outliermerge.checkpoint.adapters.adapter import open_adapter
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fan_in_fan_out.*",
    "ignore:.*Could not find a config file.*",
    "ignore:.*groups > 1.*",
    "ignore:.*LoRA tensor.s. have invalid shape.*",
    "ignore:.*_pattern keys did not match.*",  # it says so of parameters, and takes them
)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


CASES: dict[str, peft.PeftConfig] = {
    "LoRA of convolutions": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["conv1", "conv2", "point", "conv3"]
    ),
    "DoRA of convolutions": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["conv1", "conv2", "point", "conv3"], use_dora=True
    ),
    "lora_bias of convolutions": peft.LoraConfig(
        r=4, target_modules=["conv1", "conv2", "linear"], lora_bias=True, use_rslora=True
    ),
    "LoHa": peft.LoHaConfig(
        r=3, alpha=5, target_modules=["linear", "conv1", "conv2", "point"],
        rank_pattern={"conv2": 2}, alpha_pattern={"linear": 7},
    ),
    "LoHa with Tucker factors": peft.LoHaConfig(
        r=3, alpha=5, target_modules=["conv1", "conv2", "point"], use_effective_conv2d=True
    ),
    "LoKr": peft.LoKrConfig(
        r=1, alpha=5, target_modules=["linear", "conv1", "conv2", "point"],
        decompose_both=True,
    ),
    "LoKr whole": peft.LoKrConfig(
        r=8, alpha=5, target_modules=["linear", "conv2"], decompose_factor=2
    ),
    "LoKr with Tucker factors": peft.LoKrConfig(
        r=1, alpha=5, target_modules=["conv1", "conv2", "point"], use_effective_conv2d=True
    ),
    "(IA)³": peft.IA3Config(
        target_modules=["linear", "square", "conv2", "conv3", "same", "grouped"],
        feedforward_modules=["square", "conv3", "grouped"],
    ),
    "(IA)³ of inputs": peft.IA3Config(
        target_modules=["linear", "conv2", "same"], feedforward_modules=r"linear|conv2|same"
    ),
    "(IA)³ stored (in, out)": peft.IA3Config(
        target_modules=["turned"], feedforward_modules=[], fan_in_fan_out=True
    ),
    "(IA)³ of inputs stored (in, out)": peft.IA3Config(
        target_modules=["turned"], feedforward_modules=["turned"], fan_in_fan_out=True
    ),
}  # fmt: skip


def adapt(folder: Path, config: peft.PeftConfig) -> dict[str, torch.Tensor]:
    """Save a base and an adapter of it that changes everything; return what peft merges."""
    model = Layers()
    save_tensors(folder / "base", model.state_dict())
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    return dict(adapted.merge_and_unload().state_dict())


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the base with the adapter."""
    opened = open_adapter(folder / "adapter", open_checkpoint(folder / "base"))
    with Reader() as reader:
        found = {n: reader.whole(source) for n, source in opened.tensors.items()}
        for name, source in opened.tensors.items():  # spans give what the whole gives
            middle = reader.values(source, 1, source.num_elements - 1)
            assert torch.equal(middle, found[name].flatten()[1:-1])
    return found


def edit(folder: Path, change: dict[str, torch.Tensor | None] | None = None, **keys: Any) -> None:
    """Change tensors of the adapter's file (None leaves one out), and keys of its config."""
    path = folder / "adapter"
    stored = load_file(path / WEIGHTS) | (change or {})
    save_file({name: t for name, t in stored.items() if t is not None}, path / WEIGHTS)
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | keys))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_what_peft_merges(case, tmp_path, monkeypatch):
    # Else peft cannot merge what it trained: torch.kron refuses the core's layout in memory.
    made, plain = lokr.make_weight_cp, torch.contiguous_format
    monkeypatch.setattr(
        lokr, "make_weight_cp", lambda *given: made(*given).clone(memory_format=plain)
    )
    expected, before = adapt(tmp_path, CASES[case]), Layers().state_dict()
    found = read(tmp_path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=4e-6, msg=name)
    targets = CASES[case].target_modules
    changed = {n.partition(".")[0] for n in found if not torch.equal(found[n], before[n])}
    assert changed == set(targets if not isinstance(targets, str) else targets.split("|"))


P = "base_model.model."
BROKEN: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "a factor is missing": (
        "LoHa", {f"{P}linear.hada_w1_b": None}, {}, "linear: it has no hada_w1_b"),
    "no common rank": (
        "LoHa", {f"{P}linear.hada_w1_b": torch.ones(2, 12)}, {}, "have no common rank"),
    "products of two sizes": (
        "LoHa", {f"{P}linear.hada_w2_b": torch.ones(3, 11)}, {}, "expected one"),
    "another rank": ("LoHa", {}, {"r": 4}, "is not of rank 4, as adapter_config.json says"),
    "one core of two": (
        "LoHa with Tucker factors", {f"{P}conv2.hada_t1": None}, {}, "have no common rank"),
    "a core of another rank": (
        "LoHa with Tucker factors", {f"{P}conv2.hada_t1": torch.ones(2, 2, 3, 2)}, {},
        "do not fit together"),
    "a factor that is no matrix": (
        "LoHa", {f"{P}linear.hada_w1_a": torch.ones(18)}, {}, "are no matrices"),
    "integers": (
        "LoHa", {f"{P}linear.hada_w1_a": torch.ones(18, 3, dtype=torch.int8)}, {},
        "is int8, expected floats"),
    "parts of two kinds": (
        "LoKr", {f"{P}linear.hada_w1_a": torch.ones(18, 3)}, {},
        "hada_w1_a' is not of an adapter of type LOKR"),
    "whole and factored": (
        "LoKr", {f"{P}linear.lokr_w1": torch.ones(3, 3)}, {}, "has lokr_w1 and also factors"),
    "another size": (
        "LoKr", {f"{P}linear.lokr_w2_b": torch.ones(1, 5)}, {}, "but the base's linear.weight is"),
    "no alpha": ("LoKr", {}, {"alpha": None}, "alpha None and r 1 give no scale"),
    "a convolution whose product peft orders in its own way": (
        "LoKr", {f"{P}conv1.lokr_w2_a": None, f"{P}conv1.lokr_w2_b": None,
                 f"{P}conv1.lokr_w2": torch.ones(4, 4, 3)}, {}, "lokr_w2 of a Conv1d"),
    "a number that is text": ("LoKr", {}, {"alpha": "8"}, "alpha: found '8', expected a number"),
    "a vector of another size": (
        "(IA)³", {f"{P}linear.ia3_l": torch.ones(17, 1)}, {}, "does not fit the base's [18, 12]"),
    "a vector without axes": (
        "(IA)³", {f"{P}linear.ia3_l": torch.ones(18)}, {}, "does not fit the base's [18, 12]"),
    "what is multiplied": (
        "(IA)³", {}, {"feedforward_modules": None}, "its inputs or its outputs, because"),
    "an expression that is none": (
        "(IA)³", {}, {"feedforward_modules": "("}, "feedforward_modules: '(' is not a regular"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_does_not_fit_is_refused(what, tmp_path):
    case, change, keys, message = BROKEN[what]
    adapt(tmp_path, CASES[case])
    edit(tmp_path, change, **keys)
    with pytest.raises(OutlierMergeError) as caught:
        open_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    assert message in str(caught.value)


# Packed experts.

EXPERTS, HIDDEN, INNER, RANK = 3, 8, 6, 2


class Experts(nn.Module):
    """Experts as transformers' classes have them in memory."""

    def __init__(self, inner: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = [(2 * inner, HIDDEN), (HIDDEN, inner)]
        turned = [shape[::-1] if is_transposed else shape for shape in shapes]
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.randn(EXPERTS, *shape)) for shape in turned
        )


class Mixture(nn.Module):
    """A model with experts, a router as a parameter, and one linear layer."""

    def __init__(self, inner: int = INNER, **keys: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.ModuleDict({"experts": Experts(inner, **keys)})
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
PACKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "both": (Mixture(), {"target_parameters": BOTH}),
    "one": (Mixture(), {"target_parameters": ["experts.down_proj"]}),
    "of a transposed class": (Mixture(is_transposed=True), {"target_parameters": BOTH}),
    "beside a layer": (
        Mixture(), {"target_parameters": BOTH, "target_modules": ["q_proj"], "use_rslora": True}),
    "ranks by pattern": (
        Mixture(),
        {"target_parameters": BOTH, "rank_pattern": {"experts.gate_up_proj": 3},
         "alpha_pattern": {"down_proj": 5}},
    ),
    "a matrix": (Mixture(), {"target_parameters": ["q_proj.weight"]}),
    "one of them square": (Mixture(HIDDEN), {"target_parameters": BOTH}),
    "the other square": (Mixture(HIDDEN // 2), {"target_parameters": BOTH}),
}  # fmt: skip


def pack(folder: Path, model: nn.Module, **keys: Any) -> dict[str, torch.Tensor]:
    """Save a mixture and an adapter of it; return what peft merges."""
    save_tensors(folder / "base", {name: t.clone() for name, t in model.state_dict().items()})
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": 3, "target_modules": []} | keys)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    return dict(adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize("case", PACKED)
def test_parameters_are_what_peft_merges(case, tmp_path):
    model, keys = PACKED[case]
    expected = pack(tmp_path, model, **keys)
    found, before = read(tmp_path), load_file(tmp_path / "base/model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=4e-6, msg=name)
    assert sum(not torch.equal(found[n], before[n]) for n in found) >= len(
        keys["target_parameters"]
    )


def old_layout(folder: Path) -> dict[str, torch.Tensor]:
    """Rewrite an adapter as peft before 0.19 trained them; return ΔW by its formula."""
    generator, changes, stored = torch.Generator().manual_seed(2), {}, {}
    base = load_file(folder / "base/model.safetensors")
    for level, name in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
        height, columns = base[f"mlp.experts.{name}"].shape[1:]
        a = torch.randn(RANK * EXPERTS, height, generator=generator)
        b = torch.randn(columns, RANK * EXPERTS, generator=generator)
        stored |= {f"{P}mlp.experts.{level}lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
        b_ore, a_eri = b.view(columns, RANK, EXPERTS), a.view(EXPERTS, RANK, height)
        changes[f"mlp.experts.{name}"] = torch.einsum("ore,eri->eio", b_ore, a_eri) * 3 / RANK
    save_file(stored, folder / "adapter" / WEIGHTS)
    return {name: base[name] + change for name, change in changes.items()}


@pytest.mark.parametrize("inner", [INNER, HIDDEN, HIDDEN // 2])
def test_the_layout_of_peft_before_0_19_is_known_by_its_shapes(inner, tmp_path):
    pack(tmp_path, Mixture(inner), target_parameters=BOTH)
    expected = old_layout(tmp_path)
    edit(tmp_path, peft_version=None)
    found = read(tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=4e-6, msg=name)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.1", None, "x"])
def test_square_experts_are_read_only_where_the_version_tells(version, tmp_path):
    pack(tmp_path, Mixture(HIDDEN), target_parameters=["experts.down_proj"])
    edit(tmp_path, peft_version=version)
    if version == "0.18.1":
        stored = load_file(tmp_path / "adapter" / WEIGHTS)
        a, b = (stored[f"{P}mlp.experts.lora_{x}.weight"] for x in "AB")
        b_ore, a_eri = b.view(HIDDEN, RANK, EXPERTS), a.view(EXPERTS, RANK, HIDDEN)
        change = torch.einsum("ore,eri->eio", b_ore, a_eri) * 3 / RANK
        name = "mlp.experts.down_proj"
        expected = load_file(tmp_path / "base/model.safetensors")[name] + change
        torch.testing.assert_close(read(tmp_path)[name], expected, rtol=2e-6, atol=4e-6)
        return
    with pytest.raises(OutlierMergeError, match="are square, so that their shapes do not tell"):
        read(tmp_path)


INSIDE = f"{P}mlp.experts.base_layer."
BROKEN_PACKED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a level is missing": (
        {f"{INSIDE}lora_A.weight": None, f"{INSIDE}lora_B.weight": None}, {},
        "factors at 1 level(s), for 2 parameter(s)"),
    "a factor is missing": ({f"{INSIDE}lora_A.weight": None}, {}, "expected lora_A.weight and"),
    "another rank": ({}, {"r": 5}, "do not make changes of"),
    "another shape": (
        {f"{INSIDE}lora_A.weight": torch.ones(6, 5)}, {}, "do not make changes of"),
    "a parameter that is not there": (
        {}, {"target_parameters": ["experts.up_proj"]}, "for 0 parameter(s)"),
    "integers": (
        {f"{INSIDE}lora_A.weight": torch.ones(6, 8, dtype=torch.int32)}, {}, "expected floats"),
    "no list": ({}, {"target_parameters": "experts"}, "target_parameters: found 'experts'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_PACKED)
def test_packed_factors_that_do_not_fit_are_refused(what, tmp_path):
    change, keys, message = BROKEN_PACKED[what]
    pack(tmp_path, Mixture(), target_parameters=BOTH)
    edit(tmp_path, change, **keys)
    with pytest.raises(OutlierMergeError) as caught:
        read(tmp_path)
    assert message in str(caught.value)
