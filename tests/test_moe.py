"""Mixtures of experts: against mergekit-moe, in transformers, killed and continued."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from checkpoints import load_folder, save_lora
from moe_models import (
    deepseek,
    dense_family,
    load,
    mixture_by_mergekit,
    save_dense,
    save_words,
)
from stopping import stopping_after

import outliermerge
from outliermerge.checkpoint.reader import Reader
from outliermerge.cli.main import main as cli
from outliermerge.execution.layerwise import forward
from outliermerge.planning.moe import plan_mixture
from outliermerge.spec.moe import load_moe_spec

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = (["code python", "python loop loop"], ["math sum", "prime"])
AWAY = (["story"], ["chat hello", "poem"])


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Callable[[str], tuple[Path, Path, Path]]:
    made: dict[str, tuple[Path, Path, Path]] = {}

    def of(kind: str) -> tuple[Path, Path, Path]:
        if kind not in made:
            made[kind] = dense_family(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def mixture(models: tuple[Path, Path, Path], **more: Any) -> dict[str, Any]:
    """Return a mixture of two fine-tunes with prompts."""
    base, *experts = map(str, models)
    return {
        "base_model": base,
        "dtype": "float32",
        "experts": [
            {"source_model": m, "positive_prompts": p, "negative_prompts": n}
            for m, p, n in zip(experts, PROMPTS, AWAY, strict=True)
        ],
        **more,
    }


def shared(models: tuple[Path, Path, Path], *, prompts: bool, **more: Any) -> dict[str, Any]:
    entry = {"source_model": str(models[2]), **more}
    return {"shared_experts": [entry | ({"positive_prompts": ["chat"]} if prompts else {})]}


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(24).reshape(2, 12) % 13
    with torch.no_grad():
        return model(tokens).logits


# Against mergekit


@pytest.mark.parametrize("gate_mode", ["hidden", "cheap_embed"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_mixture_is_mergekits(kind, gate_mode, families, tmp_path):
    models = families(kind)
    spec = mixture(models, gate_mode=gate_mode)
    spec |= shared(models, prompts=True, residual_scale=0.5) if kind == "qwen2" else {}
    spec["experts"][0]["residual_scale"] = 0.25
    outliermerge.moe(spec, output=tmp_path / "ours", routing=False)
    mixture_by_mergekit(spec, tmp_path / "theirs")
    ours, theirs = (load(tmp_path / name).state_dict() for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    routers = [name for name in ours if name.endswith("gate.weight")]
    assert len(routers) == 3 * (2 if kind == "qwen2" else 1)
    for name in ours:
        if name in routers:
            assert torch.allclose(ours[name], theirs[name], atol=2e-5), name
            assert theirs[name].norm() > 0.9
        else:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_mixture_in_deepseeks_form_is_mergekits(families, tmp_path):
    models = families("llama")
    spec = mixture(models, architecture="deepseek", gate_mode="hidden")
    spec |= shared(models, prompts=False, residual_scale=0.5)
    outliermerge.moe(spec, output=tmp_path / "ours", routing=False)
    mixture_by_mergekit(spec, tmp_path / "theirs")
    ours, theirs = (load_folder(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        atol = 2e-5 if name.endswith("gate.weight") else 0
        assert torch.allclose(ours[name], theirs[name], atol=atol, rtol=0), name
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("ours", "theirs")]
    kept = {"n_routed_experts", "n_shared_experts", "num_experts_per_tok", "norm_topk_prob",
            "moe_intermediate_size", "moe_layer_freq", "first_k_dense_replace", "scoring_func",
            "auto_map", "architectures", "model_type", "rms_norm_eps", "rope_parameters",
            "hidden_act", "num_key_value_heads", "tie_word_embeddings"}  # fmt: skip
    assert {k: configs[0][k] for k in kept} == {k: configs[1][k] for k in kept}


def test_of_a_llama_qwens_form_has_no_biases_where_mergekit_writes_zeros(families, tmp_path):
    models = families("llama")
    spec = mixture(models, architecture="qwen") | shared(models, prompts=True)
    outliermerge.moe(spec, output=tmp_path / "ours", routing=False)
    mixture_by_mergekit(spec, tmp_path / "theirs")
    ours, theirs = load(tmp_path / "ours"), load(tmp_path / "theirs")
    more = theirs.state_dict().keys() - ours.state_dict().keys()
    assert len(more) == 9 and not any(theirs.state_dict()[name].any() for name in more)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)


# In transformers


@pytest.mark.parametrize("kind", ["llama", "tied", "mistral", "qwen3"])
def test_a_mixture_of_one_model_is_that_model(kind, in_process, tmp_path):
    base = save_dense(kind, tmp_path / "base")
    experts = [{"source_model": str(base)}] * 4
    spec = {"base_model": str(base), "gate_mode": "random", "experts": experts}
    result = outliermerge.moe(spec, output=tmp_path / "mixed", load_check=kind == "tied")
    assert result.run.load_check is None or result.run.load_check.status == "loads"
    assert any("all experts are the same model" in note for note in result.notes)
    dense = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    assert torch.allclose(logits(load(tmp_path / "mixed")), logits(dense), atol=1e-4)


def test_with_qwens_shared_expert_at_zero_a_mixture_of_one_model_is_that_model(tmp_path):
    base = save_dense("qwen2", tmp_path / "base")
    expert = {"source_model": str(base)}
    spec = {
        "base_model": str(base),
        "gate_mode": "uniform_random",
        "experts": [expert] * 2,
        "shared_experts": [expert | {"residual_scale": 0.0}],
    }
    outliermerge.moe(spec, output=tmp_path / "mixed")
    dense = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    assert torch.allclose(logits(load(tmp_path / "mixed")), logits(dense), atol=1e-4)
    bound = load_folder(tmp_path / "mixed")["model.layers.1.mlp.gate.weight"].abs().max()
    assert 0.15 < bound <= 32**-0.5


@pytest.mark.parametrize("with_shared", [False, True])
def test_a_mixture_of_one_model_in_deepseeks_form_is_that_model(with_shared, tmp_path):
    base = save_dense("llama", tmp_path / "base")
    scale = {"residual_scale": 0.5} if with_shared else {}
    expert = {"source_model": str(base)} | scale
    spec = {
        "base_model": str(base),
        "gate_mode": "random",
        "architecture": "deepseek",
        "experts": [expert] * 3,
        **({"shared_experts": [expert]} if with_shared else {}),
    }
    outliermerge.moe(spec, output=tmp_path / "mixed")
    dense = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    assert torch.allclose(logits(deepseek(tmp_path / "mixed")), logits(dense), atol=1e-4)


def test_a_mistral_is_in_deepseeks_form_only_where_its_class_computes_the_same(tmp_path):
    def of(name: str, **more: Any) -> dict[str, Any]:
        transformers.MistralForCausalLM(
            transformers.MistralConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **more,
            )
        ).save_pretrained(tmp_path / name)  # fmt: skip
        save_words(tmp_path / name)
        model = str(tmp_path / name)
        return {"base_model": model, "gate_mode": "random", "architecture": "deepseek",
                "experts": [{"source_model": model}] * 2}  # fmt: skip

    for more, said in (
        ({"sliding_window": 4}, "it has no sliding window, the base has one of 4 tokens"),
        (
            {"sliding_window": None, "head_dim": 16},
            "head_dim is hidden_size / .*, the base's is 16",
        ),
    ):
        with pytest.raises(outliermerge.OutlierMergeError, match=said):
            outliermerge.moe(of(f"bad{len(more)}", **more), output=tmp_path / "none")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    spec = of("good", sliding_window=64, rope_parameters=rope)
    outliermerge.moe(spec, output=tmp_path / "mixed")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "good").eval()
    assert torch.allclose(logits(deepseek(tmp_path / "mixed")), logits(dense), atol=1e-4)
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert (config["rope_theta"], config["sliding_window"]) == (500.0, None)


def test_routers_and_noise_are_drawn_by_the_seed(families, tmp_path):
    models = families("llama")
    spec = mixture(models, gate_mode="random")
    spec["experts"][1]["noise_scale"] = 0.5
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        outliermerge.moe(spec | {"seed": seed}, output=tmp_path / name, routing=False)
    a, b, c = (load_folder(tmp_path / name) for name in "abc")
    expert = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a[router], c[router]) and 0.7 < a[router].std() < 1.3
    stored = load_folder(models[2])["model.layers.2.mlp.gate_proj.weight"]
    noise = a[expert.format(2, 1)] - stored
    assert 0.45 < noise.std() < 0.55 and abs(noise.mean()) < 0.05
    assert not torch.equal(noise, c[expert.format(2, 1)] - stored)
    assert torch.equal(a[expert.format(2, 0)], c[expert.format(2, 0)])


# Routing


def test_the_routing_is_that_of_the_mixture_of_the_base(families, tmp_path):
    """Where all experts are the base model, its activations are the mixture's own."""
    base = str(families("llama")[0])
    spec = mixture((base, base, base), experts_per_token=1)
    result = outliermerge.moe(spec, output=tmp_path / "mixed")
    model, seen = load(tmp_path / "mixed"), list[torch.Tensor]()
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for expert, prompts in enumerate(PROMPTS):
        chosen = [[], [], []]
        for text in prompts:
            seen.clear()
            with torch.no_grad():
                model(torch.tensor([tokenizer("<s>" + text)["input_ids"]]))
            for layer, scores in enumerate(seen):
                chosen[layer] += scores[1:].argmax(-1).tolist()  # without the first token
        assert result.routing.num_tokens[expert] == len(chosen[0])
        for layer, own in enumerate(chosen):
            share = [own.count(to) / len(own) for to in (0, 1)]
            assert result.routing.tokens[layer][expert] == pytest.approx(share, abs=1e-5)


def test_the_routing_is_printed(families, tmp_path, capsys):
    file = tmp_path / "moe.yaml"
    file.write_text(yaml.safe_dump(mixture(families("llama"))))
    assert cli(["moe", str(file), str(tmp_path / "mixed"), "-v"]) == 0
    out = capsys.readouterr().out
    assert "layer 2, prompts of" in out and "100% (" in out
    assert cli(["moe", str(file), str(tmp_path / "again"), "--json"]) == 0
    routing = json.loads(capsys.readouterr().out)["routing"]
    assert routing["num_tokens"] == [5, 3]
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for la in routing["weights"] for row in la)
    assert all(sum(row) == pytest.approx(2, abs=1e-5) for la in routing["tokens"] for row in la)


def test_routers_that_are_alike_are_told(families, tmp_path):
    spec = mixture(families("llama"))
    for entry in spec["experts"]:
        entry |= {"positive_prompts": ["code"], "negative_prompts": []}
    alike = outliermerge.moe(spec, output=tmp_path / "alike")
    assert any("experts 0 and 1: 3 of 3 layers" in note for note in alike.notes)
    for entry in spec["experts"]:
        entry["negative_prompts"] = ["python code"]  # ends in the same token, and begins alike
    spec["experts"][0]["negative_prompts"] = ["code"]
    zero = outliermerge.moe(spec, output=tmp_path / "zero")
    assert any("expert 0: 3 of 3 layers" in note for note in zero.notes)


def test_a_forward_pass_holds_one_layer_and_is_transformers_own(families):
    base = families("mistral")[0]
    planned = plan_mixture(load_moe_spec(mixture(families("mistral"))))
    texts = [[1, 3, 4, 5, 6, 7, 8], [1, 9, 3]]
    states, held = list[torch.Tensor](), list[int]()

    def parameters() -> int:
        found = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter]
        return sum(each.numel() for each in found if each.device.type == "cpu")

    gc.collect()
    before = parameters()
    with Reader() as reader:
        forward(
            planned.base,
            planned.layers,
            texts,
            reader,
            device="cpu",
            on_layer=lambda number, given: states.append(given),
            on_mlp=lambda number, given: held.append(parameters() - before),
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    one_layer = sum(each.numel() for each in model.model.layers[0].parameters())
    assert held == [one_layer] * 3
    for number, text in enumerate(texts):
        with torch.no_grad():
            own = model(torch.tensor([text]), output_hidden_states=True).hidden_states[:-1]
        for layer, expected in enumerate(own):
            found = states[layer][number : number + 1, : len(text)]
            assert torch.allclose(found, expected, atol=1e-5)


# Runs


def test_a_killed_mixture_goes_on(families, tmp_path, monkeypatch):
    spec = mixture(families("qwen2")) | shared(families("qwen2"), prompts=True)
    spec["experts"][0]["noise_scale"] = 0.1
    whole = outliermerge.moe(spec, output=tmp_path / "whole", routing=False)
    with stopping_after(monkeypatch, 20), pytest.raises(KeyboardInterrupt):
        outliermerge.moe(spec, output=tmp_path / "killed", routing=False)
    killed = outliermerge.moe(spec, output=tmp_path / "killed", routing=False)
    assert killed.run.num_resumed >= 20 and whole.run.num_resumed == 0
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert outliermerge.verify(tmp_path / "killed") == []


def test_a_mixture_is_made_again_from_its_recipe_and_its_manifest(families, tmp_path):
    spec = mixture(families("llama"))
    outliermerge.moe(spec, output=tmp_path / "first", shard_size="20KB", routing=False)
    assert len([*(tmp_path / "first").glob("*.safetensors")]) > 3
    first = load_folder(tmp_path / "first")
    for name in ("recipe.yaml", "outliermerge.json"):
        again = outliermerge.moe(tmp_path / "first" / name, output=tmp_path / f"of-{name}")
        found = load_folder(again.run.output)
        assert found.keys() == first.keys()
        assert all(torch.equal(found[key], first[key]) for key in first)
    assert "outliermerge moe recipe.yaml DIR" in (tmp_path / "first" / "README.md").read_text()


def test_without_a_dtype_all_is_stored_as_the_base(families, tmp_path):
    base = save_dense("llama", tmp_path / "base", dtype=torch.bfloat16)
    spec = mixture((base, *families("llama")[1:]), gate_mode="cheap_embed")
    del spec["dtype"]
    outliermerge.moe(spec, output=tmp_path / "mixed")
    assert {t.dtype for t in load_folder(tmp_path / "mixed").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_dry_run_writes_nothing_and_computes_no_router(
    families, in_process, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "moe.yaml"
    file.write_text(yaml.safe_dump(mixture(families("llama"))))
    monkeypatch.setattr("outliermerge.execution.routers.add_routers", None)
    assert cli(["moe", str(file), str(tmp_path / "mixed"), "--dry-run"]) == 0
    assert "mixtral" in capsys.readouterr().out
    assert cli(["moe", str(file), "--dry-run", "--json", "--load-check"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["architecture"] == "mixtral" and said["load_check"]["status"] == "loads"
    assert said["spec"]["experts"] and said["actions"] == {"copy": 3 * 8 + 18}
    assert not (tmp_path / "mixed").exists()


def test_without_a_tokenizer_random_routers_are_made_and_others_refused(tmp_path, families):
    base = save_dense("llama", tmp_path / "base")
    for path in base.glob("tokenizer*"):
        path.unlink()
    spec = mixture((base, *families("llama")[1:]), gate_mode="random")
    result = outliermerge.moe(spec, output=tmp_path / "mixed")
    assert result.routing is None and any("no tokenizer" in note for note in result.notes)
    with pytest.raises(outliermerge.OutlierMergeError, match="no tokenizer"):
        outliermerge.moe(spec | {"gate_mode": "hidden"}, output=tmp_path / "other")


def test_an_output_that_is_there_is_refused_before_any_router(families, tmp_path, monkeypatch):
    spec = mixture(families("llama"))
    (tmp_path / "mixed").mkdir()
    monkeypatch.setattr("outliermerge.api.add_routers", None)
    with pytest.raises(outliermerge.OutlierMergeError, match="exists already"):
        outliermerge.moe(spec, output=tmp_path / "mixed")
    with pytest.raises(outliermerge.OutlierMergeError, match="inside the model"):
        outliermerge.moe(spec, output=families("llama")[1] / "mixed")


# Models as they are


def test_an_adapter_can_be_an_expert(families, tmp_path):
    base = families("llama")[0]
    name = "model.layers.1.mlp.up_proj"
    save_lora(
        tmp_path / "adapter",
        {f"{name}.lora_A.weight": torch.ones(1, 32), f"{name}.lora_B.weight": torch.ones(48, 1)},
        target_modules=["up_proj"],
    )
    experts = [str(base), str(tmp_path / "adapter")]
    spec = {
        "base_model": str(base),
        "gate_mode": "random",
        "experts": [{"source_model": expert} for expert in experts],
    }
    outliermerge.moe(spec, output=tmp_path / "mixed")
    mixed = load_folder(tmp_path / "mixed")
    first, second = (
        mixed[f"model.layers.1.block_sparse_moe.experts.{k}.w3.weight"] for k in (0, 1)
    )
    assert torch.equal(first, load_folder(base)[f"{name}.weight"])
    change = second - first
    assert change.abs().min() > 0 and torch.allclose(change, change[0, 0].expand(48, 32), atol=1e-6)


def test_a_pickled_base_gives_the_same_routers(families, tmp_path):
    models = families("llama")
    spec = mixture(models)
    outliermerge.moe(spec, output=tmp_path / "one", routing=False)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in models[0].iterdir():
        if path.suffix != ".safetensors":
            (pickled / path.name).write_bytes(path.read_bytes())
    torch.save(load_folder(models[0]), pickled / "pytorch_model.bin")
    spec["base_model"] = str(pickled)
    outliermerge.moe(spec, output=tmp_path / "other", routing=False)
    one, other = (load_folder(tmp_path / name) for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_mixture_is_reported_as_one(families, tmp_path):
    outliermerge.moe(mixture(families("llama")), output=tmp_path / "mixed", routing=False)
    page = outliermerge.build_report([str(tmp_path / "mixed")], output=tmp_path / "page.html")
    assert "The mixture mixed" in Path(page).read_text()
