"""Other model families, as published: what comes out loads, and is the merge made by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import families
import pytest
import torch
import transformers
from checkpoints import load_folder, save_tensors
from families import Family, Tensors, edit_json, refusal, replace_tensors, tune
from safetensors.torch import load_file, save_file
from torch import Tensor

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.errors import ArgumentError, OutlierMergeError, SpecError
from outliermerge.planning.tied import WAYS_OUT

# Kinds whose output is sharded too.
SHARD_SIZES = {"qwen2_5_vl": "60KB", "mixtral": "40KB", "gemma": "15KB", "unet": "60KB"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    @cache
    def build(kind: str) -> Family:
        return families.build(kind, tmp_path_factory.mktemp(kind))

    return build


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("pipeline")
    base = families.pipeline(folder / "base")
    first, second = (
        families.tune_pipeline(base, folder / f"task{seed}", seed=seed) for seed in (1, 2)
    )
    return base, first, second


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> tuple[Path, tuple[Path, Path]]:
    """A plain state dict, and two training checkpoints of torch's DataParallel."""
    folder = tmp_path_factory.mktemp("nets")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = families.train_conv_net(families.ConvNet(), seed=0, steps=20)
    torch.save(base.state_dict(), folder / "base.pt")
    tuned = []
    for seed in (1, 2):
        net = families.train_conv_net(base, seed=seed, steps=4 * seed)
        state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
        tuned.append(folder / f"task{seed}.pt")
        torch.save({"epoch": seed, "state_dict": state}, tuned[-1])
    return folder / "base.pt", (tuned[0], tuned[1])


def spec_of(
    base: Path | str | dict[str, Any],
    models: Sequence[Path | dict[str, Any]],
    method: str = "min_sigma",
    **more: Any,
) -> dict[str, Any]:
    listed = [m if isinstance(m, dict) else {"model": str(m)} for m in models]
    base = base if isinstance(base, dict) else str(base)
    return {"merge_method": method, "base_model": base, "models": listed} | more


def by_hand(base: Tensors, models: Sequence[Tensors], *, t: float = 2.0) -> dict[str, Tensor]:
    """Algorithm 2 of arXiv 2501.10661 in float64, over the models that have a tensor."""
    merged = {}
    for name, tensor in base.items():
        tuned = [model[name] for model in models if name in model]
        if not tensor.is_floating_point() or not tuned:
            merged[name] = tensor
            continue
        deltas = [model.double() - tensor.double() for model in tuned]
        sigma = min(float(delta.std(correction=0)) for delta in deltas)
        kept = [torch.where(d.abs() > t * sigma, d, d / len(deltas)) for d in deltas]
        merged[name] = tensor.double() + torch.stack(kept).sum(0)
    return merged


def summed(base: Tensors, models: Sequence[Tensors]) -> dict[str, Tensor]:
    """Task arithmetic with weights 1 in float64."""
    return {
        name: tensor.double() + sum(model[name].double() - tensor.double() for model in models)
        if tensor.is_floating_point() and all(name in model for model in models)
        else tensor
        for name, tensor in base.items()
    }


def wrong(found: Tensors, expected: Tensors, base: Tensors, models: Sequence[Tensors]) -> list[str]:
    """Return what is not as expected: beyond a rounding of the result and of float32's sums."""
    assert found.keys() == expected.keys()
    differing = []
    for name, tensor in expected.items():
        if tensor.dtype != torch.float64:
            same = found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
            differing += [] if same else [name]
            continue
        assert found[name].dtype == base[name].dtype and found[name].shape == tensor.shape, name
        start = base[name].double()
        size = start.abs() + sum(
            (model[name].double() - start).abs() for model in models if name in model
        )
        step = torch.finfo(found[name].dtype).eps * tensor.abs()
        error = (found[name].double() - tensor).abs()
        if bool((error > step + 4 * torch.finfo(torch.float32).eps * size).any()):
            differing.append(name)
    return differing


def hand_made(folder: Path, like: Path, tensors: Tensors, base: Tensors) -> Path:
    """Save tensors, rounded to the base's dtypes, with a folder's config."""
    shutil.copytree(like, folder)
    return replace_tensors(folder, {n: tensor.to(base[n].dtype) for n, tensor in tensors.items()})


@pytest.mark.parametrize("method", ["min_sigma", "task_arithmetic"])
@pytest.mark.parametrize("kind", families.KINDS)
def test_a_family_is_merged_as_by_hand(kind, method, built, tmp_path):
    family = built(kind)
    spec = spec_of(family.base, family.models, method, missing=family.missing)
    output = outliermerge.run(
        spec, output=tmp_path / "out", shard_size=SHARD_SIZES.get(kind)
    ).output
    assert outliermerge.verify(output) == []
    base, models = load_folder(family.base), [load_folder(path) for path in family.models]
    expected = (by_hand if method == "min_sigma" else summed)(base, models)
    merged = load_folder(output)
    assert wrong(merged, expected, base, models) == []
    assert sum(t.numel() for t in merged.values()) == sum(t.numel() for t in base.values())
    assert (output / "config.json").read_bytes() == (family.base / "config.json").read_bytes()
    assert (len(list(output.glob("*.safetensors"))) > 1) == (kind in SHARD_SIZES)
    by = hand_made(tmp_path / "hand", family.base, expected, base)
    found, wanted, untuned = (
        families.forward(families.load(path)) for path in (output, by, family.base)
    )
    scale = wanted.abs().max()
    tolerance = 1e-5 if all(t.dtype != torch.bfloat16 for t in base.values()) else 2e-3
    assert (found - wanted).abs().max() <= tolerance * scale
    assert (found - untuned).abs().max() > 5e-2 * scale


def test_the_check_by_hand_would_notice_another_threshold(built):
    family = built("gemma")
    base, models = load_folder(family.base), [load_folder(path) for path in family.models]
    found = {n: t.to(base[n].dtype) for n, t in by_hand(base, models, t=2.0).items()}
    assert wrong(found, by_hand(base, models, t=2.0), base, models) == []
    matrices = [name for name, tensor in base.items() if tensor.numel() > 500]
    assert set(matrices) <= set(wrong(found, by_hand(base, models, t=3.0), base, models))


@pytest.mark.parametrize(
    "kind",
    [kind for kind in families.KINDS],
)
def test_what_transformers_writes_today_is_no_other_model(kind, built, tmp_path):
    """A config in the words of the newest version says the same as the published one."""
    family = built(kind)
    saved = tmp_path / "saved"
    families.load(family.base).save_pretrained(saved)
    spec = spec_of(family.base, [saved], missing=family.missing)
    notes = outliermerge.plan(spec).notes
    assert not any("files differ" in note for note in notes), notes


def test_a_scalar_is_merged(built, tmp_path):
    family = built("clip")
    spec = spec_of(family.base, family.models, missing=family.missing)
    result = outliermerge.run(spec, output=tmp_path / "out")
    base, *models = (
        load_folder(path)["logit_scale"].double() for path in (family.base, *family.models)
    )
    merged = load_folder(result.output)["logit_scale"]
    assert merged.shape == ()
    # The standard deviation of one number is 0, so that every change of it is an outlier.
    torch.testing.assert_close(merged.double(), base + sum(m - base for m in models))
    assert result.manifest["tensors"]["logit_scale"]["action"] == "merge"


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_buffers_that_a_fine_tune_lacks_are_told(kind, built):
    family = built(kind)
    names = list(filter(is_buffer, load_folder(family.base)))
    plan = outliermerge.plan(spec_of(family.base, family.models))
    [note] = [note for note in plan.notes if "a model's class computes" in note]
    assert note.startswith(f"{len(names)} buffer(s)") and all(name in note for name in names)
    assert {job.name for job in plan.jobs if job.action != "merge"} == set(names)
    strict = spec_of(family.base, family.models, missing="error")
    message = refusal(strict)
    assert all(f"  {name}: not in " in message for name in names)


def is_buffer(name: str) -> bool:
    return name.endswith("position_ids")


def test_buffers_that_the_base_lacks_are_told(built, tmp_path):
    base, (first, second) = built("bert").base, built("bert").models
    plan = outliermerge.plan(spec_of(first, [base, second]))
    name = "bert.embeddings.position_ids"
    assert plan.dropped == (name,) and any(name in note for note in plan.notes)
    for word, is_kept in (("drop", False), ("copy", True)):
        spec = spec_of(first, [{"model": str(base), "extra": word}, second])
        output = outliermerge.run(spec, output=tmp_path / word).output
        assert (name in load_folder(output)) == is_kept
        families.load(output)


OLD_TO_NEW = [
    {"from": r"LayerNorm\.gamma$", "to": "LayerNorm.weight"},
    {"from": r"LayerNorm\.beta$", "to": "LayerNorm.bias"},
]
NEW_TO_OLD = [
    {"from": r"LayerNorm\.weight$", "to": "LayerNorm.gamma"},
    {"from": r"LayerNorm\.bias$", "to": "LayerNorm.beta"},
]


@pytest.mark.parametrize("direction", ["models", "base", "base and back"])
def test_old_names_of_layer_norms_are_renamed(direction, built, tmp_path):
    family = built("bert")
    new = outliermerge.run(
        spec_of(family.base, family.models, missing=family.missing), output=tmp_path / "new"
    ).output
    base = families.old_layer_norms(families.copy_folder(family.base, tmp_path / "base"))
    assert "missing" in refusal(spec_of(base, family.models, missing=family.missing))
    if direction == "models":
        renamed = [{"model": str(path), "rename": NEW_TO_OLD} for path in family.models]
        spec = spec_of(base, renamed)
    else:
        spec = spec_of({"model": str(base), "rename": OLD_TO_NEW}, family.models)
        if direction == "base and back":
            spec["rename"] = NEW_TO_OLD
    output = outliermerge.run(spec | {"missing": family.missing}, output=tmp_path / "out").output
    assert outliermerge.verify(output) == []
    is_old = direction != "base"
    assert load_folder(output).keys() == load_folder(base if is_old else family.base).keys()
    found, wanted = (families.load(path) for path in (output, new))
    assert all(
        torch.equal(tensor, wanted.state_dict()[name])
        for name, tensor in found.state_dict().items()
    )


def test_a_rename_is_in_the_plan(built, tmp_path):
    family = built("bert")
    base = families.old_layer_norms(families.copy_folder(family.base, tmp_path / "base"))
    plan = outliermerge.plan(
        spec_of({"model": str(base), "rename": OLD_TO_NEW}, family.models, missing=family.missing)
    )
    weights = sum(name.endswith("LayerNorm.gamma") for name in load_folder(base))
    count, before, after = plan.inputs[0].renamed[r"LayerNorm\.gamma$"]
    assert count == weights == 6
    assert before.replace("gamma", "weight") == after


@pytest.mark.parametrize("renamed", ["base", "models"])
def test_a_prefix_of_all_names_is_renamed(renamed, tmp_path):
    family = families.gpt2(tmp_path)
    message = refusal(spec_of(family.base, family.models))
    name = "transformer.h.0.attn.c_attn.bias"
    assert f"  {name}: in {family.models[0]}, not in {family.base}\n" in message
    add, remove = {"from": "^", "to": "transformer."}, {"from": r"^transformer\.", "to": ""}
    if renamed == "base":
        spec = spec_of({"model": str(family.base), "rename": add}, family.models)
    else:
        listed = [{"model": str(path), "rename": remove} for path in family.models]
        spec = spec_of(family.base, listed)
    missing = [{"filter": ".attn.bias", "value": "base"}]
    output = outliermerge.run(spec | {"missing": missing}, output=tmp_path / "out").output
    base = load_folder(family.base)
    models = [
        {name.removeprefix("transformer."): tensor for name, tensor in load_folder(path).items()}
        for path in family.models
    ]
    merged = load_folder(output)
    prefix = "transformer." if renamed == "base" else ""
    assert all(name.startswith(prefix) for name in merged)
    merged = {name.removeprefix(prefix): tensor for name, tensor in merged.items()}
    expected = by_hand(base, models)
    assert wrong(merged, expected, base, models) == []
    by = hand_made(tmp_path / "hand", family.base, expected, base)
    found, wanted = (families.forward(families.load(path)) for path in (output, by))
    # float32 forward passes of weights that differ by a rounding; sums vary with the processor.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_classifiers_of_other_sizes_are_left_to_the_base(built, tmp_path):
    base, (first, second) = built("vit").base, built("vit").models
    other = families.copy_folder(second, tmp_path / "other")
    tensors = load_folder(other)
    wide = {"classifier.weight": torch.zeros(7, 32), "classifier.bias": torch.zeros(7)}
    replace_tensors(other, tensors | wide)
    message = refusal(spec_of(base, [first, other]))
    assert "2 tensor(s) of another shape or kind:\n" in message
    assert (
        f"  classifier.weight: float32 [5, 32] in {base}, float32 [7, 32] in {other}\n" in message
    )
    aside = {
        "model": str(other),
        "rename": {"from": "^classifier", "to": "own_classifier"},
        "extra": [{"filter": "own_classifier", "value": "drop"}],
        "missing": [{"filter": "classifier", "value": "base"}],
    }
    output = outliermerge.run(spec_of(base, [first, aside]), output=tmp_path / "out").output
    families.load(output)
    weights, models = load_folder(base), [load_folder(first), tensors]
    for name in wide:
        del models[1][name]
    assert wrong(load_folder(output), by_hand(weights, models), weights, models) == []


@pytest.mark.parametrize("kind", [*families.KINDS, "pipeline", "nets"])
def test_the_command_line_shows_a_plan(kind, built, pipelines, nets, tmp_path, capsys):
    if kind == "pipeline":
        spec = spec_of(pipelines[0], pipelines[1:])
    elif kind == "nets":
        spec = spec_of(nets[0], nets[1], unequal="base")
    else:
        spec = spec_of(built(kind).base, built(kind).models, missing=built(kind).missing)
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps({key: value for key, value in spec.items() if value is not None}))
    assert cli.main(["plan", str(path)]) == 0
    assert "min_sigma" in capsys.readouterr().out
    assert cli.main(["plan", "--json", str(path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    proof = shown["proof"]
    assert proof["num_reference_parameters"] == shown["num_parameters"]
    assert proof["added"] == proof["removed"] == proof["resized"] == []
    assert shown["dropped"] == shown["checks"] == []


# Tied heads


def give_head(model: Path, folder: Path, *, differs: bool) -> Path:
    """Store the head of a model that ties it, as DeepSpeed's zero_to_fp32.py does."""
    families.copy_folder(model, folder)
    tensors = load_folder(folder)
    head = tensors["model.embed_tokens.weight"].clone()
    if differs:
        head.view(-1)[-1] += 1
    return replace_tensors(folder, tensors | {"lm_head.weight": head}, shard_size="30KB")


@pytest.mark.parametrize("kind", ["gemma", "qwen2_5_vl_tied"])
def test_a_head_equal_to_its_embeddings_is_left_out(kind, built, tmp_path):
    # mergekit's outputs of Gemma gain such a head: github.com/arcee-ai/mergekit #385, #390, #632
    family = built(kind)
    plain = outliermerge.run(spec_of(family.base, family.models), output=tmp_path / "plain").output
    for number, heads in enumerate([(0,), (1,), (0, 1)]):
        models = list(family.models)
        for index in heads:
            folder = tmp_path / f"head{number}{index}"
            models[index] = give_head(family.models[index], folder, differs=False)
        spec = spec_of(family.base, models)
        plan = outliermerge.plan(spec)
        assert plan.dropped == ("lm_head.weight",)
        assert "1 extra tensor(s) are left out:\n  lm_head.weight" in plan.notes
        assert [check.reason for check in plan.checks] == [
            "the output ties lm_head.weight to model.embed_tokens.weight, so that of "
            f"{models[index]} is left out, which is right only where they are equal in that model"
            for index in heads
        ]
        assert plan.num_parameters == plan.proof.num_reference_parameters
        assert (plan.proof.added, plan.proof.removed, plan.proof.resized) == ((), (), ())
        output = outliermerge.run(plan, output=tmp_path / f"out{number}").output
        assert outliermerge.verify(output) == []
        families.load(output)
        merged, expected = load_folder(output), load_folder(plain)
        assert merged.keys() == expected.keys() == load_folder(family.base).keys()
        assert all(torch.equal(merged[name], expected[name]) for name in merged)


@pytest.mark.parametrize("kind", ["gemma", "qwen2_5_vl_tied"])
def test_a_head_unlike_its_embeddings_is_refused(kind, built, tmp_path):
    family = built(kind)
    model = give_head(family.models[1], tmp_path / "head", differs=True)
    spec = spec_of(family.base, [family.models[0], model])
    assert refusal(spec, tmp_path / "out") == (
        f"the output ties lm_head.weight to model.embed_tokens.weight, so that of {model} is "
        "left out, which is right only where they are equal in that model. They are not. "
        + WAYS_OUT
    )
    dropped = spec_of(family.base, [family.models[0], {"model": str(model), "extra": "drop"}])
    output = outliermerge.run(dropped, output=tmp_path / "out", fresh=True).output
    assert load_folder(output).keys() == load_folder(family.base).keys()


def test_a_head_is_not_copied_where_nothing_would_read_it(built, tmp_path):
    family = built("qwen2_5_vl_tied")
    model = give_head(family.models[1], tmp_path / "head", differs=True)
    copied = spec_of(family.base, [family.models[0], {"model": str(model), "extra": "copy"}])
    assert refusal(copied) == (
        "the output would have tensors that its config does not know:\n"
        "  lm_head.weight: the config ties it to the embeddings (tie_word_embeddings), so nothing "
        f"would read it. {WAYS_OUT}"
    )


@pytest.mark.parametrize("kind", ["gemma", "qwen2_5_vl_tied"])
def test_a_tied_head_is_left_out_without_a_base_too(kind, built, tmp_path):
    family = built(kind)
    stored = give_head(family.models[1], tmp_path / "head", differs=False)
    spec = {
        "merge_method": "linear",
        "models": [{"model": str(family.models[0])}, {"model": str(stored)}],
    }
    output = outliermerge.run(spec, output=tmp_path / "out").output
    assert load_folder(output).keys() == load_folder(family.base).keys()
    families.load(output)


def test_a_head_of_a_base_that_says_it_ties_none_is_extra(built, tmp_path):
    family = built("gemma")
    base = families.copy_folder(family.base, tmp_path / "base")
    edit_json(base / "config.json", lambda config: config.update(tie_word_embeddings=False))
    model = give_head(family.models[1], tmp_path / "head", differs=False)
    message = refusal(spec_of(base, [family.models[0], model]))
    assert f"1 tensor(s) extra:\n  lm_head.weight: in {model}, not in {base}" in message


def untie(model: Path, folder: Path) -> Path:
    families.copy_folder(model, folder)
    tensors = load_folder(folder)
    generator = torch.Generator().manual_seed(4)
    head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=generator) * 0.02
    return replace_tensors(folder, tensors | {"lm_head.weight": head})


def test_the_embeddings_of_a_tied_model_serve_as_its_head(tmp_path):
    base = families.save_llama(tmp_path / "base")
    untied = tune(base, tmp_path / "untied", seed=1)
    tied = tune(base, tmp_path / "tied", seed=2)
    tensors = load_folder(tied)
    del tensors["lm_head.weight"]
    replace_tensors(tied, tensors)
    edit_json(tied / "config.json", lambda config: config.update(tie_word_embeddings=True))
    spec = spec_of(base, [untied, tied])
    notes = outliermerge.plan(spec).notes
    assert (
        f"{tied} ties lm_head.weight to model.embed_tokens.weight, which stands for it"
    ) in notes
    assert any(f"tie_word_embeddings: False in {base}, True in {tied}" in note for note in notes)
    output = outliermerge.run(spec, output=tmp_path / "out").output
    families.load(output)
    weights, models = load_folder(base), [load_folder(untied), load_folder(tied)]
    models[1]["lm_head.weight"] = models[1]["model.embed_tokens.weight"]
    merged = load_folder(output)
    assert wrong(merged, by_hand(weights, models), weights, models) == []
    edit_json(tied / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert f"1 tensor(s) missing:\n  lm_head.weight: not in {tied}" in refusal(spec)


def test_a_copy_of_the_head_in_a_tied_base_stays_one(tmp_path):
    base = families.save_llama(tmp_path / "base", tied=True)
    models = [tune(base, tmp_path / f"task{seed}", seed=seed) for seed in (1, 2)]
    stored = give_head(base, tmp_path / "stored", differs=False)
    output = outliermerge.run(spec_of(stored, models), output=tmp_path / "out").output
    merged = load_folder(output)
    assert merged.keys() == load_folder(stored).keys()
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    plain = outliermerge.run(spec_of(base, models), output=tmp_path / "plain").output
    found, wanted = (families.forward(families.load(path)) for path in (output, plain))
    assert torch.equal(found, wanted)


def test_a_tied_copy_that_the_base_alone_stores_is_not_left_as_it_was(built, tmp_path):
    # PyTorch files of before safetensors hold cls.predictions.decoder.weight, a copy of the
    # embeddings; what is saved since leaves it out. Where both are there and differ, transformers
    # does not tie them, so that a copy of the base's would be the head of the merged model.
    family = built("bert")
    base = families.copy_folder(family.base, tmp_path / "base")
    tensors = load_folder(base)
    copies = {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }
    replace_tensors(base, tensors | {name: tensor.clone() for name, tensor in copies.items()})
    spec = spec_of(base, family.models, missing="base")
    try:
        output = outliermerge.run(spec, output=tmp_path / "out").output
    except OutlierMergeError as error:
        assert "cls.predictions.decoder.weight" in str(error)
        return
    model: Any = families.load(output)
    assert torch.equal(
        model.cls.predictions.decoder.weight, model.bert.embeddings.word_embeddings.weight
    )


# Configs and other files


def bare(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    save_tensors(folder, {"a.weight": torch.randn(4, 4, generator=generator)})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_equal_shapes_with_other_numbers_of_heads_are_refused(tmp_path):
    base = families.save_llama(tmp_path / "base")
    model = tune(base, tmp_path / "model", seed=1)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    edit_json(model / "config.json", lambda config: config.update(heads))
    families.load(model)
    message = refusal(spec_of(base, [model]))
    assert message.startswith("the models' configs say that their weights do not mean the same")
    assert f"  num_attention_heads: 4 in {base}, 8 in {model}\n" in message
    assert f"  num_key_value_heads: 2 in {base}, 4 in {model}\n" in message
    assert f"  head_dim: 8 in {base}, 4 in {model}\n" in message
    assert message.endswith(
        "Merge models of one architecture; correct a config.json that is wrong."
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "line"),
    [
        ({"num_hidden_layers": 2}, {"num_hidden_layers": 3}, "num_hidden_layers: 2 in B, 3 in M"),
        ({"n_head": 2}, {"n_head": 4}, "num_attention_heads: 2 in B, 4 in M"),
        (
            {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8},
            {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 16},
            "head_dim: 8 in B, 16 in M",
        ),
        (
            {"text_config": {"num_key_value_heads": 2}},
            {"text_config": {"num_key_value_heads": 4}},
            "num_key_value_heads: 2 in B, 4 in M",
        ),
        (
            {"num_attention_heads": 4},
            {"text_config": {"num_attention_heads": 8}},
            "num_attention_heads: 4 in B, 8 in M",
        ),
        (
            {"vision_config": {"num_attention_heads": 4}},
            {"vision_config": {"num_attention_heads": 8}},
            "vision_config.num_attention_heads: 4 in B, 8 in M",
        ),
        (
            {"vision_config": {"num_heads": 4}},
            {"vision_config": {"num_heads": 8}},
            "vision_config.num_attention_heads: 4 in B, 8 in M",
        ),
    ],
)
def test_configs_that_make_a_merge_senseless_are_refused(ours, theirs, line, tmp_path):
    base, model = bare(tmp_path / "base", ours), bare(tmp_path / "model", theirs, seed=1)
    expected = line.replace("in B", f"in {base}").replace("in M", f"in {model}")
    assert f"\n  {expected}\n" in refusal(spec_of(base, [model]))


@pytest.mark.parametrize(
    ("ours", "theirs", "line"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta: 10000.0 in B, 1000000.0 in M"),
        (
            {"rope_theta": 1e4},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_theta: 10000.0 in B, 500000.0 in M",
        ),
        (
            {"rope_scaling": None},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling: not given in B, {'rope_type': 'linear', 'factor': 2.0} in M",
        ),
        (
            {"max_position_embeddings": 64},
            {"max_position_embeddings": 128},
            "max_position_embeddings: 64 in B, 128 in M",
        ),
        ({"n_positions": 64}, {"n_positions": 128}, "max_position_embeddings: 64 in B, 128 in M"),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act: silu in B, gelu in M"),
        ({"sliding_window": 16}, {"sliding_window": 32}, "sliding_window: 16 in B, 32 in M"),
        (
            {"tie_word_embeddings": True},
            {"tie_word_embeddings": False},
            "tie_word_embeddings: True in B, False in M",
        ),
        (
            {"image_aspect_ratio": "pad"},
            {"image_aspect_ratio": "anyres"},
            "image_aspect_ratio: pad in B, anyres in M",
        ),
        (
            {"vision_feature_layer": -2},
            {"mm_vision_select_layer": -1},
            "vision_feature_layer: -2 in B, -1 in M",
        ),
        (
            {"vision_config": {"image_size": 224}},
            {"vision_config": {"image_size": 336}},
            "vision_config.image_size: 224 in B, 336 in M",
        ),
    ],
)
def test_differences_of_configs_are_noted(ours, theirs, line, tmp_path):
    base, model = bare(tmp_path / "base", ours), bare(tmp_path / "model", theirs, seed=1)
    line = line.replace("in B", f"in {base}").replace("in M", f"in {model}")
    expected = f"the models' files differ; the output has the config of {base}:\n  {line}"
    assert expected in outliermerge.plan(spec_of(base, [model])).notes


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("num_experts_per_tok", {"num_experts_per_tok": 2}, {"num_experts_per_tok": 4}),
        ("rms_norm_eps", {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}),
        ("model_type", {"model_type": "llama"}, {"model_type": "mistral"}),
        # OpenAI's CLIPs have quick_gelu, those of LAION gelu, in the same shapes.
        (
            "hidden_act",
            {"vision_config": {"hidden_act": "quick_gelu"}},
            {"vision_config": {"hidden_act": "gelu"}},
        ),
        # Of a U-Net it is the number of heads or what leads to it; the shapes do not show it.
        ("attention_head_dim", {"attention_head_dim": 8}, {"attention_head_dim": 4}),
    ],
)
def test_more_differences_of_configs_are_told(key, ours, theirs, tmp_path):
    base, model = bare(tmp_path / "base", ours), bare(tmp_path / "model", theirs, seed=1)
    assert key in told(spec_of(base, [model]))


def told(spec: dict[str, Any]) -> str:
    """Return a plan's notes, or what it is refused with."""
    try:
        return "\n".join(outliermerge.plan(spec).notes)
    except OutlierMergeError as error:
        return str(error)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        ({"rope_theta": 1e4}, {}),
        (
            {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4},
            {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        ),
        ({"hidden_size": 32}, {"text_config": {"hidden_size": 32}}),
        ({}, {}),
    ],
)
def test_the_same_said_in_another_way_is_no_difference(ours, theirs, tmp_path):
    base, model = bare(tmp_path / "base", ours), bare(tmp_path / "model", theirs, seed=1)
    assert not any("differ" in note for note in outliermerge.plan(spec_of(base, [model])).notes)


def test_models_without_a_config_are_merged(tmp_path):
    paths = [bare(tmp_path / str(number), {}, seed=number) for number in range(3)]
    for path in paths:
        (path / "config.json").unlink()
    plan = outliermerge.plan(spec_of(paths[0], paths[1:]))
    assert f"{paths[0]} has no config.json: transformers cannot load it" in plan.notes


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "line"),
    [
        ("chat_template.jinja", "{{ a }}", "{{ b }}", "differs between B and M"),
        ("chat_template.jinja", "{{ a }}", None, "in B, not in M"),
        ("chat_template.jinja", None, "{{ a }}", "in M, not in B"),
        ("chat_template.json", '{"chat_template": "a"}', '{"chat_template": "b"}',
         "differs between B and M"),
        ("preprocessor_config.json", '{"size": 1}', '{"size": 2}', "differs between B and M"),
        ("preprocessor_config.json", '{"size": 1}', ' {"size":1}\n', None),
        ("chat_template.jinja", "{{ a }}", "{{ a }}", None),
    ],
)  # fmt: skip
def test_differences_of_files_are_noted(name, ours, theirs, line, tmp_path):
    base, model = bare(tmp_path / "base", {}), bare(tmp_path / "model", {}, seed=1)
    for folder, text in ((base, ours), (model, theirs)):
        if text is not None:
            (folder / name).write_text(text)
    notes = outliermerge.plan(spec_of(base, [model])).notes
    if line is None:
        assert not any("differ" in note for note in notes)
        return
    line = line.replace("B", str(base), 1).replace("and M", f"and {model}")
    line = line.replace("in M", f"in {model}").replace("in B", f"in {base}")
    what = "chat template" if name.startswith("chat") else name
    assert any(note.endswith(f":\n  {what}: {line}") for note in notes), notes


def test_a_chat_template_inside_the_tokenizer_config_is_noted(tmp_path):
    # Before transformers 4.44 and in most published models it is a key of tokenizer_config.json.
    base, model = bare(tmp_path / "base", {}), bare(tmp_path / "model", {}, seed=1)
    for folder in (base, model):
        text = json.dumps({"chat_template": f"{{{{ {folder.name} }}}}"})
        (folder / "tokenizer_config.json").write_text(text)
    notes = outliermerge.plan(spec_of(base, [model])).notes
    assert any("chat template" in note and str(model) in note for note in notes), notes


def test_every_model_that_differs_is_named(tmp_path):
    paths = [
        bare(tmp_path / str(number), {"rope_theta": 1e4 * number, "hidden_act": "silu"}, number)
        for number in range(1, 4)
    ]
    [note] = [n for n in outliermerge.plan(spec_of(paths[0], paths[1:])).notes if "differ" in n]
    assert note.splitlines()[1:] == [
        f"  rope_theta: 10000.0 in {paths[0]}, {theta} in {path}"
        for path, theta in zip(paths[1:], (20000.0, 30000.0), strict=True)
    ]


def test_the_config_of_another_model_is_taken_where_the_spec_says(tmp_path):
    base = bare(tmp_path / "base", {"rope_theta": 1e4})
    model = bare(tmp_path / "model", {"rope_theta": 1e6}, seed=1)
    spec = spec_of(base, [model], config_source=str(model))
    assert any(f"config of {model}:" in note for note in outliermerge.plan(spec).notes)
    output = outliermerge.run(spec, output=tmp_path / "out").output
    assert (output / "config.json").read_bytes() == (model / "config.json").read_bytes()
    message = refusal(spec | {"config_source": "other"})
    assert message.startswith("spec: config_source: 'other' is none of the models.")


# Policies: what a spec says of `b.weight`, in words, and what that is.
SAYS: list[tuple[Any, str | None]] = [
    (None, None),
    ("error", "error"),
    ("LENIENT", "LENIENT"),
    ([{"filter": "b.w", "value": "LENIENT"}], "LENIENT"),
    ([{"filter": "b.w", "value": "error"}, {"value": "LENIENT"}], "error"),
    ([{"filter": "a.w", "value": "error"}, {"value": "LENIENT"}], "LENIENT"),
    ([{"filter": "a.w", "value": "LENIENT"}], None),
    ({"filter": "b.w", "value": "LENIENT"}, "LENIENT"),
]


def says(word: str) -> list[tuple[Any, str | None]]:
    text = json.dumps(SAYS).replace("LENIENT", word)
    return [(raw, outcome) for raw, outcome in json.loads(text)]


@pytest.fixture(scope="module")
def trio(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A whole model, and two of which the first lacks b.weight."""
    folder = tmp_path_factory.mktemp("trio")
    generator = torch.Generator().manual_seed(0)

    def make(name: str, *, lacks: bool = False) -> Path:
        tensors = {key: torch.randn(4, 4, generator=generator) for key in ("a.weight", "b.weight")}
        if lacks:
            del tensors["b.weight"]
        return save_tensors(folder / name, tensors)

    return make("whole"), make("short", lacks=True), make("other")


def with_policy(model: Path, key: str, own: Any) -> dict[str, Any]:
    return {"model": str(model)} | ({} if own is None else {key: own})


@pytest.mark.parametrize("own", says("base"))
@pytest.mark.parametrize("top", says("base"))
def test_missing_is_a_models_own_word_first(top, own, trio, tmp_path):
    whole, short, other = trio
    outcome = own[1] or top[1] or "error"
    third = families.copy_folder(other, tmp_path / "third")
    strict = [with_policy(model, "missing", "error") for model in (other, third)]
    spec = spec_of(whole, [with_policy(short, "missing", own[0]), *strict], missing=top[0])
    if outcome == "error":
        assert refusal(spec) == (
            "the models do not hold the same tensors\n"
            f"1 tensor(s) missing:\n  b.weight: not in {short}\n"
            "`missing: base` in the spec takes a model as unchanged where it lacks a tensor "
            "(it needs a base_model)."
        )
        return
    plan = outliermerge.plan(spec)
    [job] = [job for job in plan.jobs if job.name == "b.weight"]
    having = [plan.inputs[number].reference for number, _ in job.sources]
    assert having == [str(whole), str(other), str(third)]
    lacking = f"1 tensor(s) are not in {short}, which is taken as unchanged there:\n  b.weight"
    assert lacking in plan.notes


def test_a_tensor_that_no_model_has_is_the_bases(trio, tmp_path):
    whole, short, _ = trio
    spec = spec_of(whole, [short], missing="base")
    plan = outliermerge.plan(spec)
    assert "1 tensors in no task model:\n  b.weight" in plan.notes
    output = outliermerge.run(plan, output=tmp_path / "out").output
    assert torch.equal(load_folder(output)["b.weight"], load_folder(whole)["b.weight"])


def test_a_model_that_lacks_a_tensor_does_not_count_there(trio, tmp_path):
    whole, short, other = trio
    spec = spec_of(whole, [short, other], missing="base")
    output = outliermerge.run(spec, output=tmp_path / "out").output
    base, models = load_folder(whole), [load_folder(short), load_folder(other)]
    assert wrong(load_folder(output), by_hand(base, models), base, models) == []


def test_a_tensor_that_only_one_of_the_models_has_is_noted(trio):
    whole, short, other = trio
    notes = outliermerge.plan(spec_of(whole, [short, other], missing="base")).notes
    lacking = f"1 tensor(s) are not in {short}, which is taken as unchanged there:\n  b.weight"
    assert lacking in notes


@pytest.mark.parametrize("word", ["copy", "drop"])
@pytest.mark.parametrize("own", range(len(SAYS)))
@pytest.mark.parametrize("top", range(len(SAYS)))
def test_extra_is_a_models_own_word_first(top, own, word, trio):
    whole, short, _ = trio
    (top_raw, top_says), (own_raw, own_says) = says(word)[top], says(word)[own]
    outcome = own_says or top_says or "error"
    spec = spec_of(short, [with_policy(whole, "extra", own_raw)], extra=top_raw)
    if outcome == "error":
        assert refusal(spec) == (
            "the models do not hold the same tensors\n"
            f"1 tensor(s) extra:\n  b.weight: in {whole}, not in {short}\n"
            "`extra: copy` in the spec copies such tensors, `extra: drop` leaves them out. "
            "What is left out is lost: these weights will not be in the output."
        )
        return
    plan = outliermerge.plan(spec)
    copied = [job.name for job in plan.jobs if job.reason == "extra, copied"]
    note = {
        "copy": "1 tensors extra, copied:\n  b.weight",
        "drop": "1 extra tensor(s) are left out:\n  b.weight",
    }
    assert note[word] in plan.notes
    assert copied == (["b.weight"] if word == "copy" else [])
    assert plan.dropped == (() if word == "copy" else ("b.weight",))
    assert plan.proof.added == tuple(copied)


def test_models_must_agree_on_an_extra_tensor_that_is_copied(trio, tmp_path):
    whole, short, other = trio
    message = refusal(spec_of(short, [whole, other], extra="copy"), tmp_path / "out")
    assert message == (
        "tensor 'b.weight' (float32, extra, copied) cannot be merged, only copied, but it differs "
        f"between:\n  {whole}\n  {other}\n"
        "Give `extra: copy` to one of them and `extra: drop` to the others."
    )
    models = [with_policy(whole, "extra", "drop"), with_policy(other, "extra", "copy")]
    output = outliermerge.run(spec_of(short, models), output=tmp_path / "one").output
    assert torch.equal(load_folder(output)["b.weight"], load_folder(other)["b.weight"])
    same = families.copy_folder(whole, tmp_path / "same")
    output = outliermerge.run(
        spec_of(short, [whole, same], extra="copy"), output=tmp_path / "two"
    ).output
    assert torch.equal(load_folder(output)["b.weight"], load_folder(whole)["b.weight"])


def test_extra_tensors_of_other_shapes_are_not_copied(trio, tmp_path):
    whole, short, _ = trio
    wide = save_tensors(tmp_path / "wide", load_folder(short) | {"b.weight": torch.zeros(4, 5)})
    message = refusal(spec_of(short, [whole, wide], extra="copy"))
    assert "1 tensor(s) of another shape or kind:\n" in message
    assert f"  b.weight: differs between {whole}, {wide}\n" in message
    assert outliermerge.plan(spec_of(short, [with_policy(whole, "extra", "drop"), wide],
                                     extra="copy")).dropped == ()  # fmt: skip


def test_one_model_may_not_have_what_another_may(trio):
    whole, short, other = trio
    models = [with_policy(whole, "extra", "copy"), with_policy(other, "extra", None)]
    message = refusal(spec_of(short, models))
    assert f"1 tensor(s) extra:\n  b.weight: in {other}, not in {short}\n" in message


UNEQUAL_VALUES = {
    "int64": [torch.tensor(7), torch.tensor(8)],
    "bool": [torch.tensor([True, False]), torch.tensor([True, True])],
    "complex64": [torch.tensor([1j, 2]), torch.tensor([1j, 3])],
}


@pytest.mark.parametrize("dtype", UNEQUAL_VALUES)
@pytest.mark.parametrize(
    ("policy", "outcome"),
    [
        (None, "error"),
        ("error", "error"),
        ("base", "base"),
        ([{"filter": "count", "value": "base"}], "base"),
        ([{"filter": "a.w", "value": "base"}], "error"),
        ([{"filter": "count", "value": "error"}, {"value": "base"}], "error"),
    ],
    ids=str,
)
def test_unequal_buffers_are_refused_or_the_bases(policy, outcome, dtype, tmp_path):
    ours, theirs = UNEQUAL_VALUES[dtype]
    base, model, equal = (
        save_tensors(tmp_path / name, {"a.weight": torch.ones(2, 2) * number, "count": count})
        for number, (name, count) in enumerate([("base", ours), ("model", theirs), ("equal", ours)])
    )
    spec = spec_of(base, [equal, model], unequal=policy)
    if outcome == "error":
        assert refusal(spec, tmp_path / "out") == (
            f"tensor 'count' ({dtype}, {dtype} buffer) cannot be merged, only copied, but it "
            f"differs between:\n  {base}\n  {equal}\n  {model}\n"
            "`unequal: base` takes the base model's, or make it equal."
        )
        return
    result = outliermerge.run(spec, output=tmp_path / "out")
    assert torch.equal(load_folder(result.output)["count"], ours)
    assert outliermerge.verify(result.output) == []
    [job] = [job for job in outliermerge.plan(spec).jobs if job.name == "count"]
    assert job.reason == f"{dtype} buffer, the base model's"


POLICY_SPEC = """\
merge_method: min_sigma
base_model: {base}
missing: {missing}
extra: {extra}
unequal: {unequal}
models:
  - model: {model}
    missing: {own_missing}
    extra: {own_extra}
"""


def policy_file(folder: Path, trio: tuple[Path, ...], **policies: str) -> Path:
    keys = ("missing", "extra", "unequal", "own_missing", "own_extra")
    given = dict.fromkeys(keys, "error") | policies
    path = folder / "spec.yaml"
    path.write_text(POLICY_SPEC.format(base=trio[0], model=trio[2], **given))
    return path


LINES = {
    "missing": (3, "missing"),
    "extra": (4, "extra"),
    "unequal": (5, "unequal"),
    "own_missing": (8, "models[0].missing"),
    "own_extra": (9, "models[0].extra"),
}
WORDS = {
    "missing": "'error' or 'base'",
    "extra": "'error', 'copy' or 'drop'",
    "unequal": "'error' or 'base'",
}


@pytest.mark.parametrize("key", LINES)
@pytest.mark.parametrize(
    ("raw", "place", "message"),
    [
        ("keep", "", "found 'keep', expected {words}"),
        ("3", "", "found 3, expected {words}"),
        ("[error, error]", "", "found a list of words, expected one word or a list of filter "
         "entries"),
        ("[]", "", "found an empty list, expected at least one value"),
        ("{filter: a.w}", "", "an entry with a filter needs a `value`"),
        ("{filter: '', value: error}", ".filter", "found '', expected a part of a tensor's name"),
        ("{filter: a.w, value: keep}", ".value", "found 'keep', expected {words}"),
        ("{filters: a.w, value: keep}", ".filters",
         "unknown key 'filters'. Valid: filter, value."),
        ("[{filter: a.w, value: error}, error]", "[1]", "found 'error', expected a filter entry"),
        ("{filter: zzz, value: error}", ".filter",
         "the filter 'zzz' is in no tensor's name. Parts of names are: a, weight, b."),
        ("[{filter: a.w, value: error}, {filter: a.wieght, value: error}]", "[1].filter",
         "the filter 'a.wieght' is in no tensor's name. Did you mean 'a.weight'?"),
    ],
)  # fmt: skip
def test_a_wrong_policy_is_pointed_out(key, raw, place, message, trio, tmp_path):
    path = policy_file(tmp_path, trio, **{key: raw})
    line, name = LINES[key]
    with pytest.raises(SpecError) as caught:
        outliermerge.plan(path)
    start, _, rest = str(caught.value).partition(": ")
    assert start.rpartition(":")[0] == f"{path}:{line}"
    assert rest == f"{name}{place}: " + message.format(words=WORDS[key.removeprefix("own_")])


def test_policies_as_they_should_be_are_taken(trio, tmp_path):
    filtered = "[{filter: a.w, value: error}, {filter: '*', value: base}]"
    path = policy_file(tmp_path, trio, missing=filtered, own_extra="{value: copy}", extra="drop")
    assert len(outliermerge.plan(path).jobs) == 2


def test_unequal_is_no_word_of_one_model(trio):
    whole, _, other = trio
    message = refusal(spec_of(whole, [with_policy(other, "unequal", "base")]))
    assert message.startswith("spec: models[0].unequal: unknown key 'unequal'.")


@pytest.mark.parametrize("key", ["missing", "own_missing", "unequal"])
def test_base_needs_a_base_model(key, trio):
    whole, _, other = trio
    models = [{"model": str(whole)}, {"model": str(other)}]
    spec: dict[str, Any] = {"merge_method": "linear", "models": models}
    if key.startswith("own_"):
        models[1]["missing"] = "base"
        place = "models[1].missing"
    else:
        spec[key] = "base"
        place = key
    name = key.removeprefix("own_")
    assert refusal(spec) == f"spec: {place}: `{name}: base` needs a `base_model`"


# Diffusers pipelines

PARTS = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
}


def load_parts(folder: Path) -> dict[str, Any]:
    """Load each component by its class; nothing may be missing or left over."""
    loaded = {}
    for part, kind in PARTS.items():
        loaded[part], info = kind.from_pretrained(folder / part, output_loading_info=True)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            assert not info[problem], (part, problem, info[problem])
    return loaded


def pipeline_tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{part}/{name}": tensor
        for part in PARTS
        for name, tensor in load_folder(folder / part).items()
    }


def draw(folder: Path) -> Tensor:
    """Return the image that a pipeline makes of a prompt."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    result = pipe("a cat", num_inference_steps=2, height=16, width=16, output_type="pt",
                  generator=torch.Generator().manual_seed(0))  # fmt: skip
    return result.images.double()


# diffusers maps the attention's old names only where a component is one file, as the VAE is here.
@pytest.mark.parametrize("shard_size", [None, "200KB"])
def test_a_pipeline_is_merged_as_by_hand(shard_size, pipelines, tmp_path):
    base, *models = pipelines
    spec = spec_of(base, models)
    output = outliermerge.run(spec, output=tmp_path / "out", shard_size=shard_size).output
    assert outliermerge.verify(output) == []
    load_parts(output)
    weights, tuned = pipeline_tensors(base), [pipeline_tensors(model) for model in models]
    expected = by_hand(weights, tuned)
    assert wrong(pipeline_tensors(output), expected, weights, tuned) == []
    for path in base.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert (output / path.relative_to(base)).read_bytes() == path.read_bytes(), path
    is_sharded = (output / "unet/diffusion_pytorch_model.safetensors.index.json").is_file()
    assert is_sharded == (shard_size is not None)
    hand = families.copy_folder(base, tmp_path / "hand")
    for part in PARTS:
        merged = {
            name.removeprefix(f"{part}/"): tensor.to(weights[name].dtype)
            for name, tensor in expected.items()
            if name.startswith(f"{part}/")
        }
        replace_tensors(hand / part, merged)
    image = draw(output)
    torch.testing.assert_close(image, draw(hand), rtol=1e-3, atol=1e-3)
    assert (image - draw(base)).abs().max() > 1e-2


def test_files_of_a_pipeline_that_nothing_names_are_left_behind(pipelines, tmp_path):
    base = families.copy_folder(pipelines[0], tmp_path / "base")
    shutil.copy(base / "unet/diffusion_pytorch_model.safetensors", base / "all-in-one.safetensors")
    plan = outliermerge.plan(spec_of(base, [pipelines[1]]))
    assert "all-in-one.safetensors" in "\n".join(plan.notes)
    assert not any(job.name.startswith("all") for job in plan.jobs)


def only_unet(pipeline: Path, folder: Path, *, is_pipeline: bool) -> Path:
    """A fine-tune of which only the U-Net is published, in a pipeline's folder or alone."""
    if not is_pipeline:
        return families.copy_folder(pipeline / "unet", folder)
    families.copy_folder(pipeline / "unet", folder / "unet")
    shutil.copy(pipeline / "model_index.json", folder)

    def forget(index: dict[str, Any]) -> None:
        for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
            index[name] = [None, None]

    edit_json(folder / "model_index.json", forget)
    return folder


@pytest.mark.parametrize("is_pipeline", [True, False])
def test_a_fine_tune_of_the_unet_alone(is_pipeline, pipelines, tmp_path):
    base, first, second = pipelines
    alone = only_unet(second, tmp_path / "alone", is_pipeline=is_pipeline)
    entry: dict[str, Any] = {"model": str(alone)}
    if not is_pipeline:
        assert f"  conv_in.weight: in {alone}, not in {base}\n" in (
            refusal(spec_of(base, [first, entry]))
        )
        entry["rename"] = {"from": "^", "to": "unet/"}
    message = refusal(spec_of(base, [first, entry]))
    assert "tensor(s) missing:\n" in message and f": not in {alone}\n" in message
    assert "  unet/" not in message
    spec = spec_of(base, [first, entry | {"missing": "base"}])
    output = outliermerge.run(spec, output=tmp_path / "out").output
    assert outliermerge.verify(output) == []
    load_parts(output)
    weights, tuned = pipeline_tensors(base), [pipeline_tensors(first), {}]
    tuned[1] = {f"unet/{name}": t for name, t in load_folder(second / "unet").items()}
    assert wrong(pipeline_tensors(output), by_hand(weights, tuned), weights, tuned) == []
    only = outliermerge.run(
        spec_of(base, [entry | {"missing": "base"}]), output=tmp_path / "only"
    ).output
    merged = pipeline_tensors(only)
    for name, tensor in weights.items():
        if not name.startswith("unet/"):
            assert torch.equal(merged[name], tensor), name


def test_a_component_that_is_not_there_is_named(pipelines, tmp_path):
    base = families.copy_folder(pipelines[0], tmp_path / "base")
    shutil.rmtree(base / "vae")
    assert "names the component 'vae', but there is no such folder. Fetch the model again." in (
        refusal(spec_of(base, [pipelines[1]]))
    )


def test_a_setting_for_one_component(pipelines, tmp_path):
    base, *models = pipelines
    spec = spec_of(
        base, models, parameters={"lambda": [{"filter": "unet/", "value": 1.0}, {"value": 0.0}]}
    )
    merged = pipeline_tensors(outliermerge.run(spec, output=tmp_path / "out").output)
    for name, tensor in pipeline_tensors(base).items():
        assert torch.equal(merged[name], tensor) != name.startswith("unet/"), name


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("unet/config.json", "attention_head_dim", 8),
        ("text_encoder/config.json", "num_attention_heads", 8),
        ("vae/config.json", "scaling_factor", 0.5),
    ],
)
def test_configs_of_components_that_differ_are_told(file, key, value, pipelines, tmp_path):
    model = families.copy_folder(pipelines[1], tmp_path / "model")
    edit_json(model / file, lambda config: config.update({key: value}))
    assert key in told(spec_of(pipelines[0], [model]))


def test_what_changed_in_a_pipeline_is_found(pipelines, tmp_path):
    spec = spec_of(pipelines[0], pipelines[1:])
    output = outliermerge.run(spec, output=tmp_path / "out").output
    assert "library_name: diffusers" in (output / "README.md").read_text()
    weights = output / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    edit_json(output / "scheduler/scheduler_config.json", lambda c: c.update(beta_start=1.0))
    (output / "unet/extra.json").write_text("{}")
    differences = outliermerge.verify(output)
    assert len(differences) == 3
    assert differences[0].startswith("tensor 'vae/")
    assert differences[1:] == [
        "file scheduler/scheduler_config.json: its contents changed",
        "file unet/extra.json: is not in the manifest",
    ]


def test_a_pipeline_in_another_dtype_says_so(pipelines, tmp_path):
    spec = spec_of(pipelines[0], pipelines[1:], out_dtype="float16")
    output = outliermerge.run(spec, output=tmp_path / "out").output
    merged = pipeline_tensors(output)
    for name, tensor in pipeline_tensors(pipelines[0]).items():
        floating = tensor.is_floating_point()
        assert merged[name].dtype == (torch.float16 if floating else torch.int64), name
    assert json.loads((output / "text_encoder/config.json").read_text())["dtype"] == "float16"
    load_parts(output)


@pytest.mark.parametrize("kind", ["pipeline", "nets"])
def test_an_interrupted_run_goes_on(kind, pipelines, nets, tmp_path):
    name = "out" if kind == "pipeline" else "out.safetensors"
    spec = (
        spec_of(pipelines[0], pipelines[1:])
        if kind == "pipeline"
        else spec_of(nets[0], nets[1], unequal="base")
    )
    whole = outliermerge.run(spec, output=tmp_path / f"whole-{name}", threads=1)
    num_steps = 0

    def stop(num_bytes: int) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 25:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        outliermerge.run(spec, output=tmp_path / name, threads=1, on_progress=stop)
    assert not (tmp_path / name).exists()
    result = outliermerge.run(spec, output=tmp_path / name, threads=1)
    assert 0 < result.num_resumed < len(result.manifest["tensors"])
    assert result.manifest["tensors"] == whole.manifest["tensors"]
    assert not (tmp_path / f"{name}.partial").exists()
    assert outliermerge.verify(result.output) == []


# Raw state dicts


def raw_tensors(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    content = content.get("state_dict", content)
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def test_state_dicts_become_one_file(nets, tmp_path, capsys):
    base, models = nets
    spec = spec_of(base, models, unequal="base")
    output = outliermerge.run(spec, output=tmp_path / "net.safetensors").output
    assert {path.name for path in tmp_path.iterdir()} == {
        "net.safetensors", "net.safetensors.outliermerge.json"
    }  # fmt: skip
    weights, tuned = raw_tensors(base), [raw_tensors(path) for path in models]
    expected = by_hand(weights, tuned)
    merged = load_file(output)
    assert wrong(merged, expected, weights, tuned) == []
    assert merged["1.num_batches_tracked"] == 20
    assert [int(model["1.num_batches_tracked"]) for model in tuned] == [24, 28]
    found, wanted, untuned = families.ConvNet(), families.ConvNet(), families.ConvNet()
    found.load_state_dict(merged, strict=True)
    wanted.load_state_dict({n: t.to(weights[n].dtype) for n, t in expected.items()}, strict=True)
    untuned.load_state_dict(weights)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        image, by, before = (net.eval()(images) for net in (found, wanted, untuned))
    torch.testing.assert_close(image, by)
    assert (image - before).abs().max() > 1e-2
    assert outliermerge.verify(output) == []
    assert cli.main(["verify", str(output)]) == 0
    assert "every tensor and file is as its manifest says" in capsys.readouterr().out
    merged["7.bias"][0] += 1
    save_file(merged, output)
    assert cli.main(["verify", str(output)]) == 1
    assert any("'7.bias'" in difference for difference in outliermerge.verify(output))


def test_counts_of_batches_that_differ_are_refused(nets, tmp_path):
    base, models = nets
    message = refusal(spec_of(base, models), tmp_path / "net.safetensors")
    assert message.startswith("tensor '1.num_batches_tracked' (int64, int64 buffer) cannot be")
    assert message.endswith("`unequal: base` takes the base model's, or make it equal.")
    filtered = [{"filter": "num_batches_tracked", "value": "base"}]
    target = tmp_path / "net.safetensors"
    outliermerge.run(spec_of(base, models, unequal=filtered), output=target, fresh=True)


def test_a_state_dict_says_where_it_was_found(nets):
    base, models = nets
    notes = outliermerge.plan(spec_of(base, models, unequal="base")).notes
    for path in models:
        assert any("under 'state_dict'" in note and str(path) in note for note in notes)
        assert any("'module.' is stripped from the start" in n and str(path) in n for n in notes)
    assert not any("config.json" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net", "is a single file and so is the output: name it net.safetensors"),
        ("net.pt", "is a single file and so is the output: name it net.pt.safetensors"),
        ("net.bin", "is a single file and so is the output: name it net.bin.safetensors"),
    ],
)
def test_a_wrong_name_for_one_file_is_refused(name, message, nets, tmp_path):
    base, models = nets
    found = refusal(spec_of(base, models, unequal="base"), tmp_path / name)
    assert found == f"output {tmp_path / name}: {base} {message}"


def test_a_file_name_for_a_folder_is_refused(trio, tmp_path):
    whole, _, other = trio
    found = refusal(spec_of(whole, [other]), tmp_path / "out.safetensors")
    assert found == (
        f"output {tmp_path / 'out.safetensors'}: a folder is written: leave out .safetensors"
    )


def test_one_file_is_not_sharded(nets, tmp_path):
    base, models = nets
    with pytest.raises(ArgumentError, match="shard_size: the output is a single file"):
        outliermerge.run(
            spec_of(base, models, unequal="base"),
            output=tmp_path / "net.safetensors",
            shard_size="1KB",
        )


def test_a_file_can_be_merged_into_a_folder(trio, tmp_path):
    whole, _, other = trio
    file = tmp_path / "other.pt"
    torch.save(load_folder(other), file)
    left, right = (
        outliermerge.run(spec_of(whole, [model]), output=tmp_path / name).output
        for name, model in (("file", file), ("folder", other))
    )
    found, wanted = load_folder(left), load_folder(right)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_file_is_overwritten_only_where_it_may_be(nets, tmp_path):
    base, models = nets
    spec, target = spec_of(base, models, unequal="base"), tmp_path / "net.safetensors"
    outliermerge.run(spec, output=target)
    with pytest.raises(OutlierMergeError, match="exists already"):
        outliermerge.run(spec, output=target)
    before = target.read_bytes()
    outliermerge.run(spec, output=target, overwrite=True)
    assert target.read_bytes() == before
    assert outliermerge.verify(target) == []
    target.with_name(f"{target.name}.outliermerge.json").unlink()
    with pytest.raises(OutlierMergeError, match="replaces only outputs of outliermerge"):
        outliermerge.run(spec, output=target, overwrite=True)
