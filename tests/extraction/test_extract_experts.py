"""Adapters of mixtures whose class packs its experts: peft and a merge give the model's answers."""

from __future__ import annotations

import json
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge.checkpoint.adapters.packed import TURNED_TYPES
from outliermerge.errors import ArgumentError, OutlierMergeError
from outliermerge.extraction import class_worker
from outliermerge.extraction.report import Extraction

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing",
    # peft looks for these among modules alone, and uses them for parameters.
    r"ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
)
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}
FEW = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
Model = transformers.PreTrainedModel


def mixtral(**more: Any) -> Model:
    config = transformers.MixtralConfig(**SIZES | {"num_local_experts": 3} | more)
    return transformers.MixtralForCausalLM(config)


def qwen2_moe() -> Model:
    """With a layer that is no mixture, and an expert that all tokens have."""
    more = {"shared_expert_intermediate_size": 16, "mlp_only_layers": [0]}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES | FEW | more))


def gpt_oss() -> Model:
    """Experts are stored (in, out), and have biases; `down_proj` is square."""
    more = {"intermediate_size": 24, "head_dim": 12, "num_local_experts": 3}
    config = transformers.GptOssConfig(**SIZES | more, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config)


def llama4() -> Model:
    """Experts are stored (in, out), but peft takes them as (out, in)."""
    more = {"head_dim": 12, "num_local_experts": 3, "intermediate_size_mlp": 20}
    config = transformers.Llama4TextConfig(**SIZES | more, pad_token_id=0)
    return transformers.Llama4ForCausalLM(config)


def granite() -> Model:
    """Packed in files, too, under other names."""
    config = transformers.GraniteMoeConfig(**SIZES, num_local_experts=3)
    return transformers.GraniteMoeForCausalLM(config)


KINDS: dict[str, Callable[..., Model]] = {
    "mixtral": mixtral, "qwen2_moe": qwen2_moe, "gpt_oss": gpt_oss, "llama4": llama4,
    "granite": granite,
}  # fmt: skip


def drawn(kind: str) -> Model:
    model = KINDS[kind]()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def train(model: Model, part: str = "", seed: int = 2) -> None:
    """Change tensors with a part in their name: matrices by low rank and some noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for name, parameter in model.named_parameters():
        if part not in name or name.endswith("sinks"):  # peft has no place for these
            continue
        shape = parameter.shape
        if len(shape) > 1:
            parameter.data += 0.1 * draw(*shape[:-1], 3) @ draw(*shape[:-2], 3, shape[-1])
        parameter.data += 1e-3 * draw(*shape)


def save(model: Model, folder: Path, *, packed: bool = False) -> None:
    model.save_pretrained(folder, save_original_format=not packed)


def answers(model: Any) -> torch.Tensor:
    given = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(given).logits
    return logits


def in_peft(model: Model, folder: Path) -> Any:
    """Load the base with the adapter; a missing or superfluous tensor is an error."""
    base = type(model).from_pretrained(folder / "base")
    loaded = peft.PeftModel.from_pretrained(base, folder / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`|Adapter .* was active")
        found = loaded.load_adapter(folder / "adapter", "default")
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "lora_" in key or "modules_to_save" in key]
    return loaded


def check_merged(made: Extraction, model: Model, folder: Path) -> None:
    """Merge the adapter into files, and compare what transformers reads, within the errors."""
    spec = {"merge_method": "passthrough", "models": [{"model": str(made.output)}]}
    outliermerge.run(spec | {"base_model": str(folder / "base")}, output=folder / "merged")
    merged = type(model).from_pretrained(folder / "merged").state_dict()
    stated = {tensor.name: tensor for tensor in made.tensors}
    for name, expected in model.state_dict().items():
        lost = float((merged[name].double() - expected.double()).norm())
        allowed = stated[name].norm * stated[name].error if name in stated else 0.0
        assert lost <= allowed + 1e-6 * float(expected.norm()), name


@pytest.fixture
def asked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the class in this process, which has imported transformers."""

    def run(command: object, input: bytes, **more: object) -> Any:
        return types.SimpleNamespace(stdout=json.dumps(class_worker.asked(json.loads(input))))

    monkeypatch.setattr("outliermerge.extraction.classes.subprocess.run", run)


def extract(folder: Path, **settings: Any) -> Extraction:
    return outliermerge.extract(
        folder / "tuned", base=folder / "base", output=folder / "adapter", **settings
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("load_check", [True, False], ids=["by class", "by names"])
def test_peft_and_a_merge_give_the_answers_of_the_model(
    kind: str, load_check: bool, tmp_path: Path, asked_here: None
) -> None:
    model = drawn(kind)
    save(model, tmp_path / "base", packed=not load_check)
    before = answers(model)
    train(model)
    save(model, tmp_path / "tuned", packed=kind != "mixtral" and not load_check)
    made = extract(tmp_path, rank=40, load_check=load_check)
    assert made.error < 1e-6 and not made.left_out
    hows = {
        t.how for t in made.tensors if "experts.gate_up_proj" in t.name and "bias" not in t.name
    }
    assert hows == {"turned experts" if kind == "gpt_oss" else "experts"}
    expected = answers(model)
    assert float((before - expected).abs().max()) > 0.05
    torch.testing.assert_close(answers(in_peft(model, tmp_path)), expected, rtol=0, atol=5e-5)
    check_merged(made, model, tmp_path)


@pytest.mark.parametrize(
    "asked",
    [{"rank": 2}, {"rank": 2, "randomized": True, "dtype": "bfloat16"}, {"error": 0.2},
     {"energy": 0.9}, {"energy": 0.999, "rank": 4}],
    ids=str,
)  # fmt: skip
def test_experts_share_the_rank_of_the_one_that_needs_most(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    model = drawn("mixtral")
    save(model, tmp_path / "base")
    base = {name: tensor.double() for name, tensor in model.state_dict().items()}
    base = {name: tensor.clone() for name, tensor in base.items()}
    train(model, "layers.0.mlp.experts")
    experts = model.model.layers[0].mlp.experts
    name = "model.layers.0.mlp.experts.down_proj"
    experts.down_proj.data[0] = base[name][0].float()  # one has seen no token,
    experts.down_proj.data[1] = base[name][1].float() + 0.01  # one has learnt little
    save(model, tmp_path / "tuned")
    made = extract(tmp_path, **asked)
    in_peft(model, tmp_path)
    check_merged(made, model, tmp_path)
    assert {tensor.name for tensor in made.tensors} == {
        name, "model.layers.0.mlp.experts.gate_up_proj"
    }  # fmt: skip
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for tensor in made.tensors:
        change = model.state_dict()[tensor.name].double() - base[tensor.name]
        level = ".base_layer" if "gate_up" in tensor.name else ""
        stem = f"base_model.model.model.layers.0.mlp.experts{level}.lora_"
        a, b = (stored[f"{stem}{part}.weight"].double() for part in "AB")
        a_ErC, b_RrE = a.view(3, -1, a.shape[1]), b.view(b.shape[0], -1, 3)
        assert a_ErC.shape[1] == tensor.rank
        lost = change - torch.einsum("rke,ekc->erc", b_RrE, a_ErC)
        norms, left = change.flatten(1).norm(dim=1), lost.flatten(1).norm(dim=1)
        errors = [float(e) for e in left / norms if e == e]
        rounding = 1e-2 if "dtype" in asked else 1e-6
        assert tensor.worst == pytest.approx(max(errors), rel=1e-6)
        assert tensor.error == pytest.approx(float(left.norm() / norms.norm()), rel=1e-6)
        tails = []
        for matrix in change:
            squares = torch.linalg.svdvals(matrix).square()
            tail = squares.flip(0).cumsum(0).flip(0) / squares.sum()
            tails.append([*tail.clamp(min=0).sqrt().tolist(), 0.0])
        best = [tail[tensor.rank] for tail, norm in zip(tails, norms, strict=True) if norm]
        for found, least in zip(errors, best, strict=True):
            assert least * (1 - 1e-6) - 1e-7 <= found <= least * 1.05 + rounding
        if "randomized" not in asked and asked.get("rank") != tensor.rank:
            bound = asked.get("error") or (1 - asked["energy"]) ** 0.5
            needs = max(tail[tensor.rank - 1] for tail in tails if tail[0] == tail[0])
            assert max(errors) <= bound < needs


def test_experts_whose_factors_would_be_larger_are_saved_whole(
    tmp_path: Path, asked_here: None
) -> None:
    model = drawn("qwen2_moe")
    save(model, tmp_path / "base")
    train(model, "experts.gate_up")
    noisy = model.model.layers[1].mlp.experts.down_proj
    noisy.data += torch.randn(noisy.shape, generator=torch.Generator().manual_seed(9))
    save(model, tmp_path / "tuned")
    made = extract(tmp_path, error=0.01, load_check=True)
    assert {tensor.name.rpartition(".")[2]: tensor.how for tensor in made.tensors} == {
        "gate_up_proj": "whole", "down_proj": "whole"
    }  # fmt: skip
    assert torch.equal(answers(in_peft(model, tmp_path)), answers(model))
    check_merged(made, model, tmp_path)


@pytest.mark.parametrize("part", ["mlp.gate", "q_proj", "down_proj"])
def test_a_mixture_that_was_trained_in_one_part_alone(
    part: str, tmp_path: Path, asked_here: None
) -> None:
    """Of a router alone nothing but its name in memory shows that the class has other names."""
    model = drawn("mixtral")
    save(model, tmp_path / "base")
    train(model, part)
    save(model, tmp_path / "tuned")
    made = extract(tmp_path, rank=24, load_check=True)
    assert {part in tensor.name for tensor in made.tensors} == {True}
    torch.testing.assert_close(answers(in_peft(model, tmp_path)), answers(model), rtol=0, atol=5e-5)
    check_merged(made, model, tmp_path)


def test_square_experts_are_read_back_by_the_type_of_the_model(tmp_path: Path) -> None:
    model = mixtral(intermediate_size=12)
    save(model, tmp_path / "base")
    train(model, "gate_up_proj")
    save(model, tmp_path / "tuned")
    made = extract(tmp_path, rank=24)
    assert {tensor.shape[1:] for tensor in made.tensors} == {(24, 24)}
    torch.testing.assert_close(answers(in_peft(model, tmp_path)), answers(model), rtol=0, atol=5e-5)
    check_merged(made, model, tmp_path)


def test_the_types_whose_classes_multiply_by_experts_as_they_are_stored() -> None:
    folder = Path(transformers.__file__).parent / "models"
    found = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if "use_experts_implementation(" in (text := path.read_text())
        and "is_transposed=True" in text
    }
    assert found == {name.removesuffix("_text") for name in TURNED_TYPES}


def test_a_merge_of_mixtures(tmp_path: Path) -> None:
    model = drawn("mixtral")
    save(model, tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, "experts")
    save(model, tmp_path / "tuned")
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "tuned"), "parameters": {"weight": 0.5}}],
    }
    with pytest.raises(ArgumentError, match="no weighted sum of LoRAs"):
        outliermerge.extract(spec, output=tmp_path / "adapter")
    made = outliermerge.extract(spec, output=tmp_path / "adapter", rank=24)
    for name, tensor in model.state_dict().items():
        tensor.copy_((tensor + before[name]) / 2)
    torch.testing.assert_close(answers(in_peft(model, tmp_path)), answers(model), rtol=0, atol=5e-5)
    assert {tensor.how for tensor in made.tensors} == {"experts"}


def test_what_experts_need_of_memory_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    model = drawn("mixtral")
    save(model, tmp_path / "base")
    save(model, tmp_path / "tuned")
    with pytest.raises(ArgumentError, match=r"memory: 1,024 B is too little for .*experts"):
        extract(tmp_path, rank=24, memory="1KiB", include=["experts"])
    model.model.layers[0].mlp.experts.down_proj.data[1, 0, 0] = torch.nan
    save(model, tmp_path / "tuned")
    with pytest.raises(OutlierMergeError, match=r"down_proj\[1\]: found values that are infinite"):
        extract(tmp_path, rank=24)


@pytest.mark.parametrize("lacking", ["base", "tuned"])
@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("experts.2.", {"gate_up_proj": (2, 6, "2.w1"), "down_proj": (1, 3, "2.w2")}),
        ("experts.1.w3.", {"gate_up_proj": (1, 6, "1.w3")}),
    ],
    ids=["an expert", "a matrix of one"],
)
def test_what_one_model_lacks_of_experts_is_named(
    lacking: str, part: str, told: dict[str, tuple[int, int, str]], tmp_path: Path
) -> None:
    model = drawn("mixtral")
    save(model, tmp_path / "base")
    train(model)
    save(model, tmp_path / "tuned")
    file = tmp_path / lacking / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if f"layers.1.block_sparse_moe.{part}" not in n},
              file, {"format": "pt"})  # fmt: skip
    rows = [
        f"  model.layers.1.mlp.experts.{name}: {tmp_path / lacking} lacks {num} of the {of} "
        f"tensors that it is made of, such as model.layers.1.block_sparse_moe.experts.{one}.weight"
        for name, (num, of, one) in told.items()
    ]
    with pytest.raises(OutlierMergeError) as raised:
        extract(tmp_path, rank=4)
    assert str(raised.value).splitlines()[1:-1] == rows
    made = extract(tmp_path, rank=4, partial=True)
    assert len(made.left_out) == len(rows)
