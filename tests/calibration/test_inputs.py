"""Inputs of GPT-2's kind of layers, and of experts that are one tensor, and merges by them.

Oracles compute in float64 what each matrix is given, from what the module of the experts is given.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load_folder
from safetensors.torch import save_file
from text_models import save_text_model
from torch import Tensor

import outliermerge
from outliermerge import OutlierMergeError

TEXTS = [f"number {n} is {n * n}." for n in range(4)]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,  # so that shapes do not tell inputs from outputs
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_local_experts": 24, "num_experts_per_tok": 1}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=16, n_inner=16, n_layer=2, n_head=2),
    "mixtral": transformers.MixtralConfig(**SMALL, **EXPERTS),
    "gpt_oss": transformers.GptOssConfig(
        **SMALL, **EXPERTS, head_dim=8, layer_types=["full_attention"] * 2
    ),
    "llama4": transformers.Llama4TextConfig(
        **SMALL, **EXPERTS, head_dim=8, intermediate_size_mlp=16, moe_layers=[0, 1]
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_text_model(folder / "text", seed=0)
    for name, config in CONFIGS.items():
        for seed, own in enumerate("ab"):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data.normal_(std=0.2)
            model.save_pretrained(folder / name / own)
            if name == "mixtral":  # as they are in memory
                for path in (folder / name / own).glob("*.safetensors"):
                    path.unlink()
                tensors = {n: one.detach().clone() for n, one in model.named_parameters()}
                save_file(tensors, folder / name / own / "model.safetensors", {"format": "pt"})
            for file in (folder / "text").glob("tokenizer*"):
                (folder / name / own / file.name).write_bytes(file.read_bytes())
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "b.jsonl").write_text("".join(lines[:1]))
    return folder


@pytest.fixture(scope="module")
def measured(place) -> Path:
    for name in CONFIGS:
        for own in "ab":
            for by_layer in (False, True):
                outliermerge.measure(
                    place / name / own, place / f"{own}.jsonl",
                    output=place / name / f"{own}-{'layers' if by_layer else 'whole'}",
                    statistics=["gram", "mean"], by_layer=by_layer,
                )  # fmt: skip
    return place


def inputs_of(folder: Path, texts: list[str]) -> dict[str, list[Tensor]]:
    """Return what each matrix is given: one for a layer's, or one for each expert."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if "gpt2" not in str(folder):
        model.set_experts_implementation("eager")
    seen: dict[str, list[list[Tensor]]] = {}

    def note(name: str, expert: int, x: Tensor, num: int) -> None:
        seen.setdefault(name, [[] for _ in range(num)])[expert].append(x)

    def of_experts(module: Any, given: Any, name: str) -> None:
        x, *routed = (one.detach() for one in given)
        num = len(module.down_proj)
        for expert in range(num):
            if not routed:  # Llama 4 gives each expert all tokens, times a score that is mostly 0
                own = x.view(num, -1, x.shape[-1])[expert]
                own = own[own.abs().sum(-1) > 0]
            else:
                own = x[(routed[0] == expert).any(-1)]
            up = module.gate_up_proj[expert].detach()
            gated = own @ (up if up_first(module) else up.T)
            if hasattr(module, "gate_up_proj_bias"):
                made = module._apply_gate(gated + module.gate_up_proj_bias[expert].detach())
            else:
                gate, up = gated.chunk(2, dim=-1)
                made = torch.nn.functional.silu(gate) * up
            note(f"{name}.gate_up_proj", expert, own, num)
            note(f"{name}.down_proj", expert, made, num)

    def up_first(module: Any) -> bool:
        return "Mixtral" not in type(module).__name__

    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
            module.register_forward_pre_hook(
                lambda module, given, name=name: of_experts(module, given, name)
            )
        elif type(module).__name__ in ("Conv1D", "Linear") and "head" not in name:
            module.register_forward_pre_hook(
                lambda module, given, name=name: note(
                    f"{name}.weight", 0, given[0].detach().flatten(0, -2), 1
                )
            )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    width = 16
    empty = torch.zeros(0, width, dtype=torch.float64)
    return {name: [torch.cat([empty, *own]) for own in each] for name, each in seen.items()}


@pytest.fixture(scope="module")
def expected(measured) -> dict[str, list[dict[str, list[Tensor]]]]:
    return {
        name: [inputs_of(measured / name / "a", TEXTS), inputs_of(measured / name / "b", TEXTS[:1])]
        for name in CONFIGS
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_are_those_of_inputs_in_float64(name, measured, expected):
    for own, inputs in zip("ab", expected[name], strict=True):
        folder = measured / name / f"{own}-whole"
        grams, means = load_folder(folder / "gram"), load_folder(folder / "mean")
        assert grams.keys() - {"lm_head.weight"} == inputs.keys()
        for tensor, each in inputs.items():
            wanted = torch.stack([x.T @ x / max(1, len(x)) for x in each])
            mean = torch.stack([x.sum(0) / max(1, len(x)) for x in each])
            shape = grams[tensor].shape
            scale = float(wanted.abs().max())
            assert torch.allclose(
                grams[tensor].double(), wanted.view(shape), rtol=1e-4, atol=1e-5 * scale
            ), tensor
            assert torch.allclose(
                means[tensor].double(), mean.view(shape[:-1]), rtol=1e-4, atol=1e-5 * scale**0.5
            )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_manifest_says_which_are_turned_and_which_had_no_tokens(name, measured, expected):
    for own, inputs in zip("ab", expected[name], strict=True):
        manifest = json.loads((measured / name / f"{own}-whole/statistics.json").read_text())
        is_packed = {tensor for tensor, each in inputs.items() if len(each) > 1}
        turned = {"gpt2": set(inputs), "mixtral": set()}.get(name, is_packed)
        assert set(manifest.get("turned", [])) == turned
        without = {
            tensor: [n for n, x in enumerate(each) if not len(x)] for tensor, each in inputs.items()
        }
        assert manifest.get("no_tokens", {}) == {t: each for t, each in without.items() if each}
    assert ("no_tokens" in manifest) == (name != "gpt2")  # a few tokens do not reach all experts


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_at_a_time_gives_the_same_to_the_bit(name, measured):
    for kind in ("gram", "mean"):
        whole, layers = (
            load_folder(measured / name / f"a-{way}" / kind) for way in ("whole", "layers")
        )
        assert whole.keys() == layers.keys() and len(whole) >= 8
        assert all(whole[tensor].equal(layers[tensor]) for tensor in whole)
    whole, layers = (
        json.loads((measured / name / f"a-{way}/statistics.json").read_text())
        for way in ("whole", "layers")
    )
    assert whole.get("turned") == layers.get("turned")
    assert whole.get("no_tokens") == layers.get("no_tokens")


def spec_of(measured: Path, name: str, method: str, **parameters: Any) -> dict[str, Any]:
    folder = measured / name
    models = [
        {"model": str(folder / own), "statistics": str(folder / f"{own}-whole")} for own in "ab"
    ]
    return {"merge_method": method, "models": models, "parameters": parameters}


def solved(
    weights: list[Tensor], inputs: list[Tensor], method: str, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the loss at a start, and its Gram matrix; W is (outputs, inputs)."""
    grams = [x.T @ x / max(1, len(x)) for x in inputs]
    if method == "regmean":
        grams = [torch.where(torch.eye(len(g)) > 0, g, g * 0.9) for g in grams]
    total = grams[0] + grams[1]
    return (start - weights[0]) @ grams[0] + (start - weights[1]) @ grams[1], total


@pytest.mark.parametrize("method", ["regmean", "mats"])
@pytest.mark.parametrize("name", CONFIGS)
def test_merges_are_least_squares_of_each_matrix(method, name, measured, expected, tmp_path):
    """The loss has no slope at the merge; the mean's is large. Without tokens it is the mean."""
    more = {} if method == "regmean" else {"iterations": 400, "tolerance": 1e-12}
    outliermerge.run(spec_of(measured, name, method, **more), output=tmp_path / "out")
    merged = load_folder(tmp_path / "out")
    models = [load_folder(measured / name / own) for own in "ab"]
    turned = json.loads((measured / name / "a-whole/statistics.json").read_text()).get("turned", ())
    is_mean = 0
    for tensor in expected[name][0]:
        found, *weights = (
            (one[tensor].double().mT if tensor in turned else one[tensor].double()).reshape(
                -1, *one[tensor].shape[-2:][:: -1 if tensor in turned else 1]
            )
            for one in (merged, *models)
        )
        for expert in range(len(found)):
            own = [one[expert] for one in weights]
            inputs = [each[tensor][expert] for each in expected[name]]
            mean = (own[0] + own[1]) / 2
            if not sum(map(len, inputs)):
                assert torch.allclose(found[expert], mean, atol=1e-6)
                is_mean += 1
                continue
            slope, total = solved(own, inputs, method, found[expert])
            of_mean, _ = solved(own, inputs, method, mean)
            limit = 1e-3 if method == "regmean" else 1e-2
            largest = float(total.norm() * mean.norm())
            assert float(slope.norm()) < 1e-5 * largest + limit * float(of_mean.norm()), tensor
            assert float((found[expert] - mean).norm()) > 1e-3 * float(mean.norm())
    assert bool(is_mean) == (name != "gpt2")


def test_a_plan_says_which_are_averaged(measured):
    plan = outliermerge.plan(spec_of(measured, "mixtral", "regmean"))
    said = "or some of their experts, had no tokens in any model's data, and are averaged there"
    assert any(said in note for note in plan.notes)


def test_statistics_that_differ_in_what_is_an_input_are_refused(measured, tmp_path):
    spec = spec_of(measured, "gpt2", "regmean")
    path = measured / "gpt2/b-whole/statistics.json"
    text = path.read_text()
    manifest = json.loads(text)
    name = manifest["turned"].pop()
    path.write_text(json.dumps(manifest))
    try:
        with pytest.raises(OutlierMergeError, match=f"the inputs of {name} are its rows, and in"):
            outliermerge.plan(spec)
    finally:
        path.write_text(text)


def test_experts_whose_products_are_not_seen_are_not_measured(measured, tmp_path, monkeypatch):
    from outliermerge.calibration import experts

    monkeypatch.setattr(experts, "_PRODUCTS", ())
    outliermerge.measure(
        measured / "mixtral/a", measured / "b.jsonl", output=tmp_path / "out", statistics="gram"
    )
    manifest = json.loads((tmp_path / "out/statistics.json").read_text())
    names = [
        f"model.layers.{n}.mlp.experts.{p}_proj" for n in range(2) for p in ("gate_up", "down")
    ]
    assert manifest["not_measured"] == names and "no_tokens" not in manifest
    assert load_folder(tmp_path / "out/gram").keys().isdisjoint(names)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_layers_that_are_merged_in_turn_give_what_their_statistics_give(name, measured, tmp_path):
    """RegMean++ puts what it merges into the module, and a merge by what it writes is the same."""
    spec = spec_of(measured, name, "regmean")
    for own, model in zip("ab", spec["models"], strict=True):
        model["statistics"] = str(tmp_path / own)
    data = [str(measured / f"{own}.jsonl") for own in "ab"]
    outliermerge.measure(spec, data)
    outliermerge.run(spec, output=tmp_path / "out")
    grams = [load_folder(tmp_path / own / "gram") for own in "ab"]
    first = next(name for name in grams[0] if ".0." in name)
    plain = load_folder(measured / name / "a-whole/gram")
    assert len(grams[0]) == len(plain)
    assert torch.allclose(grams[0][first], plain[first]) is False  # embeddings are averaged before


def test_more_tokens_than_a_model_has_positions_are_told(place, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(place / "gpt2/a", folder)
    config = transformers.GPT2Config.from_pretrained(folder, n_positions=3)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    with pytest.raises(OutlierMergeError, match="is made for 3: give max_tokens=3"):
        outliermerge.measure(folder, place / "a.jsonl", output=tmp_path / "out")
    again = {"max_tokens": 3, "fresh": True}
    outliermerge.measure(folder, place / "a.jsonl", output=tmp_path / "out", **again)
