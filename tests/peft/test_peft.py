"""Algorithm 1 of arXiv 2501.10661 as adapters of peft."""

from __future__ import annotations

import copy
import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import MODELS
from torch import nn
from transformers.pytorch_utils import Conv1D

import outliermerge.peft
from outliermerge.errors import OutlierMergeError
from outliermerge.peft import NoiseConfig, NoiseModel, ScaledLoraConfig, ScaledLoraModel, gp_pareto
from outliermerge.peft.initial import INITIAL, gaussian, kaiming
from outliermerge.rng import standard_normal

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Could not find a config file.*",
    "ignore:.*tie_word_embeddings=True.*",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # peft reads it, transformers renamed it
)

CONFIGS = {
    "lora": lambda **keys: ScaledLoraConfig(**{"r": 4, "lora_alpha": 6} | keys),
    "without s": lambda **keys: ScaledLoraConfig(**{"r": 4, "train_scale": False} | keys),
    "gp_pareto": lambda **keys: ScaledLoraConfig(**{"r": 4, "init": "gp_pareto"} | keys),
    "noise": lambda **keys: NoiseConfig(**keys),
}
IDS = torch.arange(24).view(2, 12)


def _adapted(name: str, kind: str = "llama", dtype: Any = torch.float32, **keys: Any) -> Any:
    model = MODELS[kind]().to(dtype).eval()
    return peft.get_peft_model(model, CONFIGS[name](**keys)).eval()


def _train(adapted: nn.Module, seed: int = 0) -> None:
    """Move what is trained to where no value is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.05 * noise).to(parameter.dtype)


def _layers(model: nn.Module) -> dict[str, Any]:
    kind = outliermerge.peft.layer.ScaledLayer
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}
    assert found
    return found


# Training.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_outputs_are_the_bases_to_the_bit(name, kind, dtype):
    with torch.inference_mode():
        before = MODELS[kind]().to(dtype).eval()(IDS).logits
        adapted = _adapted(name, kind, dtype)
        assert torch.equal(adapted(IDS).logits, before)
        _train(adapted)
        assert not torch.equal(adapted(IDS).logits, before)
        with adapted.disable_adapter():
            assert torch.equal(adapted(IDS).logits, before)


@pytest.mark.parametrize(("name", "num_extra"), [("lora", 1), ("without s", 0), ("noise", None)])
def test_only_the_adapter_is_trained(name, num_extra):
    adapted = _adapted(name, target_modules="all-linear")
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    assert all("scaled_" in key for key in trained)
    assert all((p.grad is None) != (key in trained) for key, p in adapted.named_parameters())
    layers = _layers(adapted).values()
    low_rank = 0
    if num_extra is not None:
        low_rank = sum(4 * sum(layer.base_layer.weight.shape) + num_extra for layer in layers)
    assert sum(p.numel() for p in trained.values()) == (low_rank or len(layers))


def _oracle(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The formula of a layer in float64, of its parameters."""
    weight = layer.base_layer.weight
    if hasattr(layer, "scaled_noise_s"):
        noise = standard_normal(0, layer.name, 0, weight.numel()).view(weight.shape).to(x)
        changed = weight + layer.scaled_noise_s["default"] * noise
    else:
        a, b = layer.scaled_lora_A["default"], layer.scaled_lora_B["default"]
        change = b @ a * layer.scaling["default"]
        changed = (1 + layer.scaled_lora_s["default"]) * weight
        changed = changed + (change.T if isinstance(layer.base_layer, Conv1D) else change)
    outputs = x @ (changed if isinstance(layer.base_layer, Conv1D) else changed.T)
    bias = layer.base_layer.bias
    return outputs if bias is None else outputs + bias


@pytest.mark.parametrize("base", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("name", ["lora", "noise"])
def test_outputs_and_gradients_are_those_of_the_formula(name, base):
    """By autograd through the changed weight, which the layer never makes."""
    torch.manual_seed(0)
    inner = Conv1D(7, 5) if base == "conv1d" else nn.Linear(5, 7, bias=base == "linear")
    adapted = peft.get_peft_model(
        nn.Sequential(inner), CONFIGS[name](target_modules=["0"])
    ).double()
    _train(adapted)
    (layer,) = _layers(adapted).values()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == (3 if name == "lora" else 1)
    found, expected = layer(x), _oracle(layer, x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weights).sum(), [x, *trained])
    by_formula = torch.autograd.grad((expected * weights).sum(), [x, *trained])
    for one, other in zip(gradients, by_formula, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda *_: layer(x), trained)


def test_dropout_is_of_the_low_rank_path_alone():
    adapted = _adapted("lora", lora_dropout=0.999999).train()
    _train(adapted)
    layer = next(iter(_layers(adapted).values()))
    x = torch.randn(4, 32)
    s = layer.scaled_lora_s["default"]
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    torch.testing.assert_close(layer(x), (1 + s) * (x @ weight.T) + bias)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_a_function_of_the_seed(name):
    def outputs(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        adapted = _adapted(name, seed=seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.data += 0.05
        return adapted(IDS).logits

    assert torch.equal(outputs(1, 0), outputs(1, 1))
    assert not torch.equal(outputs(1, 0), outputs(2, 0))


def test_noise_survives_a_cast_and_back():
    adapted = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 32)), CONFIGS["noise"](target_modules=["0"])
    )
    _train(adapted)
    parameters = {key: p.data.clone() for key, p in adapted.named_parameters()}
    x = torch.randn(4, 32)
    before = adapted(x)
    adapted.bfloat16()(x.bfloat16())
    for key, parameter in adapted.float().named_parameters():
        parameter.data = parameters[key]
    assert torch.equal(adapted(x), before)


# Saving and loading.


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_adapter_loads(name, kind, low_cpu_mem_usage, tmp_path):
    MODELS[kind]().bfloat16().save_pretrained(tmp_path / "base")
    base = type(MODELS[kind]()).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    keys = {"task_type": "SEQ_CLS"} if kind == "bert" else {}
    adapted = peft.get_peft_model(copy.deepcopy(base), CONFIGS[name](seed=9, **keys)).eval()
    _train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        base, tmp_path / "adapter", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(again(IDS).logits, adapted(IDS).logits)
    assert again.get_nb_trainable_parameters() == adapted.get_nb_trainable_parameters()
    found = {key: p for key, p in again.named_parameters() if p.requires_grad}
    for key, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(found[key], parameter), key
    frozen = peft.PeftModel.from_pretrained(again.unload(), tmp_path / "adapter")
    assert not any(p.requires_grad for key, p in frozen.named_parameters() if "scaled_" in key)


def test_the_auto_class_finds_base_and_adapter(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, CONFIGS["lora"](task_type="CAUSAL_LM")).eval()
    _train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, adapted(IDS).logits)


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "noise"])
def test_merged_weights_are_the_formula_rounded_once(name, kind, dtype):
    adapted = _adapted(name, kind, dtype)
    _train(adapted)
    eye = {key: torch.eye(max(layer.weight.shape)) for key, layer in _layers(adapted).items()}
    expected = {}
    for key, layer in _layers(adapted).items():
        double = copy.deepcopy(layer).double()
        inputs = layer.weight.shape[0 if layer.transposed else 1]
        outputs = _oracle(double, eye[key][:inputs, :inputs].double())
        if layer.bias is not None:
            outputs = outputs - layer.bias.double()
        exact = outputs if layer.transposed else outputs.T
        expected[key.removeprefix("base_model.model.")] = exact.detach()
    merged = adapted.merge_and_unload()
    assert type(merged) is type(MODELS[kind]())
    assert merged.state_dict().keys() == MODELS[kind]().state_dict().keys()
    for key, exact in expected.items():
        weight = merged.get_submodule(key).weight
        assert weight.dtype == dtype and type(weight) is nn.Parameter
        # The oracle's own float64 sums may fall on the other side of a tie.
        spacing = torch.finfo(dtype).eps * exact.abs()
        assert ((weight.double() - exact).abs() <= 0.5001 * spacing + 1e-15).all(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_unmerging_gives_back_every_bit(name, dtype):
    adapted = _adapted(name, dtype=dtype)
    weights = {key: layer.weight.clone() for key, layer in _layers(adapted).items()}
    base = adapted(IDS).logits
    _train(adapted)
    before = adapted(IDS).logits
    adapted.merge_adapter()
    merged = adapted(IDS).logits
    assert any(not torch.equal(layer.weight, weights[k]) for k, layer in _layers(adapted).items())
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(merged, before, rtol=tolerance, atol=tolerance)
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, base)
    assert torch.equal(adapted(IDS).logits, before)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert all(torch.equal(layer.weight, weights[key]) for key, layer in _layers(adapted).items())
    assert torch.equal(adapted(IDS).logits, before)


def test_a_safe_merge_changes_nothing_where_it_fails():
    adapted = _adapted("lora")
    layer = next(iter(_layers(adapted).values()))
    layer.scaled_lora_s["default"].data.fill_(math.inf)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="q_proj: the merged weight is not finite"):
        adapted.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before)


# How A starts.


@pytest.mark.parametrize("init", INITIAL)
def test_initial_factors_have_the_variance_that_is_said(init):
    shape = (64, 1024)
    values = INITIAL[init](shape, seed=0, name="a")
    assert values.shape == shape and values.dtype == torch.float32
    expected = 1 / 64 if init == "gaussian" else 1 / math.sqrt(3 * 1024)
    assert values.double().square().mean().sqrt().item() == pytest.approx(expected, rel=0.02)
    assert not torch.equal(values, INITIAL[init](shape, seed=0, name="b"))
    assert not torch.equal(values, INITIAL[init](shape, seed=1, name="a"))


def test_kaiming_has_the_bounds_of_pefts():
    values = kaiming((8, 400), seed=0, name="a")
    theirs = nn.init.kaiming_uniform_(torch.empty(8, 400), a=math.sqrt(5))
    assert values.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)
    assert values.abs().max() <= 1 / 20


def test_rows_of_gp_pareto_have_the_covariance_of_a_gaussian_process():
    values = gp_pareto((2000, 256), seed=0, name="a", length_scale=6.0, alpha=50.0).double()
    rows = values / values.square().mean(1, keepdim=True).sqrt()
    for distance in (0, 3, 6, 12, 40):
        found = (rows[:, : 256 - distance] * rows[:, distance:]).mean().item()
        # Rows of 256 columns hold few independent pieces, so their own scale is taken out above.
        assert found == pytest.approx(math.exp(-((distance / 6) ** 2) / 2), abs=0.05), distance
    white = gaussian((2000, 256), seed=0, name="a")
    assert abs((white[:, :-3] * white[:, 3:]).mean().item()) < 0.01 * white.square().mean().item()


@pytest.mark.parametrize("alpha", [1.5, 3.0])
def test_scales_of_the_rows_of_gp_pareto_have_its_tail(alpha):
    """Short correlations in long rows: a row's root mean square is then its scale."""
    values = gp_pareto((4000, 512), seed=1, name="a", length_scale=1.0, alpha=alpha).double()
    scales = values.square().mean(1).sqrt()
    ratios = (scales / scales.median()).log()
    tail = ratios[ratios > 0]
    # Beyond its median a Pareto distribution is one again (Hill's estimate of its index).
    assert 1 / tail.mean().item() == pytest.approx(alpha, rel=0.1)


@pytest.mark.parametrize("keys", [{"length_scale": 0.0}, {"alpha": -1.0}, {"alpha": math.nan}])
def test_gp_pareto_wants_positive_numbers(keys):
    with pytest.raises(OutlierMergeError, match=r"expected > 0, >= 0\.1"):
        gp_pareto((2, 8), seed=0, name="a", **keys)


# What is refused.


class _Packed(nn.Linear):
    """As quantised layers are: a subclass of nn.Linear."""


def _packed() -> nn.Module:
    return nn.Sequential(_Packed(4, 4))


def _integer() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer)


REFUSED = {
    "a subclass": (_packed, "0 is a .*_Packed, expected torch.nn.Linear or transformers' Conv1D"),
    "integers": (
        _integer,
        "0 has a weight of Parameter and torch.int8, expected a plain",
    ),
    "an embedding": (lambda: nn.Sequential(nn.Embedding(4, 4)), "0 is a torch.nn.*Embedding"),
    "a convolution": (lambda: nn.Sequential(nn.Conv2d(1, 1, 1)), "0 is a torch.nn.*Conv2d"),
    "another adapter": (
        lambda: peft.inject_adapter_in_model(
            peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4))
        ),
        "expected torch.nn.Linear .* without another adapter",
    ),
}


@pytest.mark.filterwarnings("ignore:.*for a second time.*", "ignore:.*Already found a `peft_.*")
@pytest.mark.parametrize("name", ["lora", "noise"])
@pytest.mark.parametrize("case", REFUSED)
def test_layers_of_other_kinds_are_refused(case, name):
    make, message = REFUSED[case]
    with pytest.raises(OutlierMergeError, match=message):
        peft.get_peft_model(make(), CONFIGS[name](target_modules=["0"]))


@pytest.mark.parametrize("name", ["lora", "noise"])
def test_a_second_adapter_is_refused_and_leaves_the_first(name):
    adapted = _adapted(name)
    _train(adapted)
    before = adapted(IDS).logits
    with pytest.raises(OutlierMergeError, match=r"takes one adapter .* default, second"):
        adapted.add_adapter("second", CONFIGS[name]())
    assert torch.equal(adapted(IDS).logits, before)


def test_layers_stored_both_ways_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4))
    with pytest.raises(OutlierMergeError, match="fan_in_fan_out: found False, expected True, as 1"):
        peft.get_peft_model(model, CONFIGS["lora"](target_modules=["0", "1"]))
    peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4)), CONFIGS["noise"](target_modules=["0", "1"])
    )


def test_a_tied_weight_is_not_merged():
    model = MODELS["llama"](True)
    adapted = peft.get_peft_model(model, CONFIGS["lora"](target_modules=["lm_head"]))
    with pytest.raises(OutlierMergeError, match="lm_head: shares its weight with another layer"):
        adapted.merge_and_unload()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 0}, "r: found 0, expected a positive integer"),
        ({"r": 2.5}, "r: found 2.5"),
        ({"init": "kaimming"}, "init: found 'kaimming'. Did you mean 'kaiming'?"),
        ({"lora_dropout": 1.0}, "lora_dropout: found 1.0"),
        ({"seed": "1"}, "seed: found '1', expected an integer"),
    ],
    ids=str,
)
def test_a_bad_setting_is_told(keys, message):
    with pytest.raises(OutlierMergeError, match=message.replace("?", r"\?")):
        ScaledLoraConfig(**keys)


# The tables of peft.


def test_importing_again_does_no_harm():
    outliermerge.peft.model.register()
    importlib.reload(outliermerge.peft)
    tables = peft.mapping
    for config, tuner in ((ScaledLoraConfig, ScaledLoraModel), (NoiseConfig, NoiseModel)):
        kind = config().peft_type
        assert tables.PEFT_TYPE_TO_CONFIG_MAPPING[kind] is config
        assert tables.PEFT_TYPE_TO_TUNER_MAPPING[kind] is tuner
        assert tables.PEFT_TYPE_TO_PREFIX_MAPPING[kind] == tuner.prefix


def test_a_name_that_is_taken_is_told(monkeypatch):
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "SCALED_NOISE", peft.LoraConfig)
    with pytest.raises(OutlierMergeError, match="already has adapters of type SCALED_NOISE"):
        outliermerge.peft.model.register()


def test_a_missing_peft_is_told():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from outliermerge.errors import OutlierMergeError\n"
        "try:\n    import outliermerge.peft\n"
        "except OutlierMergeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs peft" in done.stdout and "pip install peft" in done.stdout


def test_merging_adapters_needs_no_peft():
    module = "outliermerge.checkpoint.adapters.adapter"
    code = f"import sys, outliermerge, {module}; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The study.


def test_the_study_runs_on_a_small_encoder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from evals.peft import study

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=80,
    )
    encoder = transformers.BertModel(config)
    settings = study.Settings(48, 24, 24, batch=8, seeds=(1, 2))
    rows = [(n % 7 - 3.0, " ".join(str(n * k % 79) for k in range(n % 5 + 2))) for n in range(120)]

    def tokenizer(texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) + 1 for word in text.split()] for text in texts]}

    parts = study.split(rows, tokenizer, settings)
    assert [len(part.tokens) for part in parts] == [48, 24, 24]
    threads = torch.get_num_threads()
    try:
        arms = {name: study.one_arm(name, encoder, parts, settings, 1e-3) for name in study.ARMS}
    finally:
        torch.set_num_threads(threads)
    trained = {name: arm["runs"][0]["num_trained"] for name, arm in arms.items()}
    assert trained["noise"] == 6  # Q, K, V, O, up and down of the one layer
    assert trained["lora_s"] == trained["lora"] + 6
    assert trained["head"] == 0 and trained["full"] == sum(p.numel() for p in encoder.parameters())
    results = {"arms": arms, "settings": {"seeds": [1, 2], "num_train": 48, "num_test": 24}}
    text = study.report(results | {"date": "today", "machine": "this"})
    assert text.count("\n| ") == len(study.ARMS) and "nan" not in text
