"""Slices: what is taken from where, and that outputs of slices are outputs like all others."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_lora, save_tensors
from safetensors.torch import save_file
from stacks import KINDS, Models, save
from stopping import stopping_after

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.errors import OutlierMergeError
from outliermerge.output.options import RunOptions
from outliermerge.output.parts import run_part
from outliermerge.planning.settings_used import used_settings

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return save("llama", tmp_path_factory.mktemp("models"), num_layers=NUM_LAYERS, num_models=2)


@pytest.fixture
def source(models):
    def entry(name: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"model": str(models[name]), "layer_range": [start, stop]}
        return found | ({"parameters": parameters} if parameters else {})

    return entry


@pytest.fixture
def stack(source) -> dict[str, Any]:
    """Six layers, of which the second is in it twice."""
    parts = [source("m0", 0, 2), source("m1", 1, 3), source("m0", 1, 2), source("base", 3, 4)]
    return {"merge_method": "passthrough", "slices": [{"sources": [part]} for part in parts]}


@pytest.fixture
def merged(source, models) -> dict[str, Any]:
    """Two slices with task vectors of their own."""
    return {
        "merge_method": "ties",
        "base_model": str(models["base"]),
        "parameters": {"density": 0.6},
        "slices": [
            {"sources": [source("m0", 0, 2), source("m1", 0, 2, weight=[0.2, 0.8])]},
            {"sources": [source("m1", 2, 4, weight=0.5), source("base", 2, 4)]},
        ],
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def job(plan: outliermerge.Plan, name: str) -> Any:
    return next(job for job in plan.jobs if job.name == name)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_one_slice_over_whole_models_is_the_merge_of_the_models(method, models, source, tmp_path):
    names = ["m0"] if method == "slerp" else ["m0", "m1"]
    spec: dict[str, Any] = {"merge_method": method}
    if method != "linear":
        spec["base_model"] = str(models["base"])
    key = "t" if method == "slerp" else "weight"
    spec["parameters"] = {key: [{"filter": "mlp", "value": [0.1, 0.9, 0.3]}, {"value": 0.5}]}
    whole = spec | {"models": [{"model": str(models[name])} for name in names]}
    sliced = spec | {"slices": [{"sources": [source(name, 0, NUM_LAYERS) for name in names]}]}

    outputs = [
        outliermerge.run(each, output=tmp_path / name).output
        for name, each in (("whole", whole), ("sliced", sliced))
    ]

    assert files_of(outputs[0]) == files_of(outputs[1])
    assert (outputs[0] / "config.json").read_bytes() == (outputs[1] / "config.json").read_bytes()


def test_layers_are_renumbered_and_what_is_outside_is_of_the_first_and_the_last(stack):
    plan = outliermerge.plan(stack)

    def origin(name: str) -> tuple[str, str]:
        ((number, source),) = job(plan, name).sources
        return Path(plan.inputs[number].reference).name, source.name

    assert [origin(f"model.layers.{n}.mlp.up_proj.weight") for n in range(6)] == [
        (name, f"model.layers.{layer}.mlp.up_proj.weight")
        for name, layer in [("m0", 0), ("m0", 1), ("m1", 1), ("m1", 2), ("m0", 1), ("base", 3)]
    ]
    assert origin("model.embed_tokens.weight")[0] == "m0"
    assert [origin(name)[0] for name in ("model.norm.weight", "lm_head.weight")] == ["base"] * 2


def test_a_gradient_begins_anew_in_each_slice_and_is_at_its_start_outside(source):
    spec = {
        "merge_method": "linear",
        "parameters": {"weight": [1, 3], "normalize": False},
        "slices": [
            {"sources": [source("m0", 0, 3), source("m1", 1, 4)]},
            {"sources": [source("m0", 0, 1), source("m1", 3, 4, weight=[5, 7])]},
        ],
    }
    plan = outliermerge.plan(spec)

    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)]
    assert [job(plan, name).parameters["weight"] for name in names] == [
        (1, 1), (2, 2), (3, 3), (3, 7)
    ]  # fmt: skip
    ends = ("model.embed_tokens.weight", "model.norm.weight")
    assert [job(plan, name).parameters["weight"] for name in ends] == [(1, 1), (1, 5)]
    assert plan.gradients["weight"]["model.layers."] == [(1, 1), (2, 2), (3, 3), (3, 7)]
    used = {(Path(s.models[0]).name, s.values, s.num_tensors) for s in used_settings(plan)
            if s.parameter == "weight"}  # fmt: skip
    assert used == {("m0", (1.0, 3.0), 39), ("m1", (5.0, 7.0), 11), ("m1", (1.0, 3.0), 28)}


def test_a_base_that_no_source_is_gives_the_same_layers(merged, models):
    plan = outliermerge.plan(merged)
    sources = job(plan, "model.layers.1.mlp.up_proj.weight").sources
    assert [(number, source.name) for number, source in sources] == [
        (number, "model.layers.1.mlp.up_proj.weight") for number in range(3)
    ]


def test_a_base_that_passthrough_has_no_use_for_gives_the_config(stack, models, tmp_path):
    shutil.copytree(models["base"], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    spec = stack | {"base_model": str(tmp_path / "other")}

    output = outliermerge.run(spec, output=tmp_path / "out").output

    assert files_of(output) == files_of(outliermerge.run(stack, output=tmp_path / "own").output)
    found = json.loads((output / "config.json").read_text())
    assert (found["rms_norm_eps"], found["num_hidden_layers"]) == (0.25, 6)


def test_what_the_plan_says_of_the_layers(stack, models, tmp_path, capsys):
    (tmp_path / "stack.yaml").write_text(json.dumps(stack))

    assert cli.main(["plan", str(tmp_path / "stack.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert (told["layers"]["stack"], told["layers"]["num_layers"]) == ("text", 6)
    assert told["layers"]["slices"][1] == {
        "layers": [2, 4], "sources": [{"model": str(models["m1"]), "layer_range": [1, 3]}]
    }  # fmt: skip
    sizes = {name: tensor.numel() * 4 for name, tensor in load_folder(models["m0"]).items()}
    layer = sum(size for name, size in sizes.items() if ".1." in name)
    assert told["input_bytes"] == sum(sizes.values()) + 2 * layer  # of four layers six are made
    assert cli.main(["plan", str(tmp_path / "stack.yaml")]) == 0
    text = " ".join(capsys.readouterr().out.replace(f"{models['m0'].parent}/", "").split())
    assert "layer by layer: 0 AABBAC A m0 B m1 C base layers of" in text
    rows = "0–1 {0} m0 0–1 2–3 {0} m1 1–2 4 {0} m0 1 5 {0} base 3".format("passthrough")
    assert f"the output text {rows}" in text
    assert told["layer_map"][1] == {
        "of": "the output", "stack": "text", "layers": [2, 4], "method": "passthrough",
        "sources": [{"model": str(models["m1"]), "layer_range": [1, 3]}],
    }  # fmt: skip


def test_the_recipe_and_the_manifest_give_the_same_bytes_and_both_are_verified(merged, tmp_path):
    first = outliermerge.run(merged, output=tmp_path / "first").output
    shutil.copy(first / "recipe.yaml", tmp_path / "recipe.yaml")

    by_recipe = outliermerge.run(tmp_path / "recipe.yaml", output=tmp_path / "second").output
    by_manifest = outliermerge.run(first / "outliermerge.json", output=tmp_path / "third").output

    assert files_of(first) == files_of(by_recipe) == files_of(by_manifest)
    assert outliermerge.verify(first) == []


@pytest.mark.parametrize("num_tensors", [0, 7, 40])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    num_tensors, stack, monkeypatch, tmp_path
):
    whole = outliermerge.run(stack, output=tmp_path / "whole").output
    with stopping_after(monkeypatch, num_tensors), pytest.raises(KeyboardInterrupt):
        outliermerge.run(stack, output=tmp_path / "out", threads=1)
    result = outliermerge.run(stack, output=tmp_path / "out", threads=1)

    assert result.num_resumed == num_tensors
    assert files_of(result.output) == files_of(whole)


def test_a_sweep_varies_settings_of_the_whole_merge_and_of_slices(merged, tmp_path):
    results = outliermerge.sweep(merged, {"density": [0.5, 1.0]}, output=tmp_path / "all")
    for result, density in zip(results, (0.5, 1.0), strict=True):
        own = merged | {"parameters": {"density": density}}
        alone = outliermerge.run(own, output=tmp_path / f"alone{density}").output
        assert files_of(result.output) == files_of(alone)
    for key, said in (
        ("models.1.weight", r"the spec has slices: write slices\.N\.models\.M\.weight"),
        ("weight", r"slice 1 has a weight of its own.* Set slices\.1\.weight"),
        ("slices.3.weight", "there is no slice 3: the spec has slices 1 to 2"),
        ("slices.1.models.3.weight", "there is no model 3: the spec has models 1 to 2"),
        ("slices.1.dtype", "is no setting of a spec"),
    ):
        with pytest.raises(OutlierMergeError, match=said):
            outliermerge.sweep(merged, {key: [1, 2]}, output=tmp_path / "none")


def test_models_are_measured_as_wholes_where_all_slices_have_the_same(merged, models, source):
    slices = [{"sources": [source("m0", n, n + 2), source("m1", n, n + 2)]} for n in (0, 2)]
    spec = merged | {"parameters": {"density": 0.3, "trim": "model"}, "slices": slices}
    whole = spec | {"models": [{"model": str(models[name])} for name in ("m0", "m1")]}
    del whole["slices"]

    ours, theirs = (outliermerge.plan(each) for each in (spec, whole))

    assert {j.name: j.sources for j in ours.jobs} == {j.name: j.sources for j in theirs.jobs}


def test_a_model_between_the_ends_may_have_another_vocabulary(models, source, tmp_path):
    tensors = load_folder(models["m1"])
    tensors["model.embed_tokens.weight"] = torch.zeros(50, 16)
    tensors["lm_head.weight"] = torch.zeros(50, 16)
    other = save_tensors(tmp_path / "other", tensors)
    shutil.copy(models["m1"] / "config.json", other)
    middle = {"model": str(other), "layer_range": [0, 2]}
    spec = {"merge_method": "passthrough"}
    parts = [source("m0", 0, 2), middle, source("m0", 2, 4)]

    outliermerge.plan(spec | {"slices": [{"sources": [part]} for part in parts]})
    with pytest.raises(OutlierMergeError, match="vocabular"):
        outliermerge.plan(spec | {"slices": [{"sources": [part]} for part in parts[:2]]})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5-decoder", "llava"])
@pytest.mark.parametrize("first", [0, 1])
def test_models_of_slices_may_have_different_numbers_of_layers(kind, first, tmp_path, in_process):
    folders = [
        save(kind, tmp_path / str(depth), num_layers=depth, num_models=0)["base"]
        for depth in (2, 3)
    ]
    parts = [{"sources": [{"model": str(f), "layer_range": [0, 2]}]} for f in folders]
    spec = {"merge_method": "passthrough", "slices": parts if first == 0 else parts[::-1]}
    if KINDS[kind].stack:
        spec["stack"] = KINDS[kind].stack
    output = outliermerge.run(spec, output=tmp_path / "out").output
    own, found = load_folder(folders[1 - first]), load_folder(output)
    layers = outliermerge.plan(spec).stacked.prefix
    last = [name for name in found if f"{layers}3." in name]
    assert last and not any(f"{layers}4." in name for name in found)
    assert all(found[n].equal(own[n.replace(f"{layers}3.", f"{layers}1.")]) for n in last)
    assert outliermerge.verify(output, load=True) == []


def test_each_layer_has_the_dtype_of_its_model_and_the_plan_says_so(models, tmp_path):
    shutil.copytree(models["m1"], tmp_path / "half")
    half = {name: tensor.half() for name, tensor in load_folder(models["m1"]).items()}
    save_file(half, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    parts = [(models["m0"], 0, 2), (tmp_path / "half", 2, 4)]
    sources = [{"model": str(model), "layer_range": [a, b]} for model, a, b in parts]
    spec = {"merge_method": "passthrough", "slices": [{"sources": [each]} for each in sources]}
    plan = outliermerge.plan(spec)
    (note,) = (note for note in plan.notes if "several dtypes" in note)
    assert "20 tensors in float16, 19 tensors in float32" in note
    out = load_folder(outliermerge.run(plan, output=tmp_path / "out").output)
    for name, tensor in out.items():
        of_half = ".2." in name or ".3." in name or name in ("model.norm.weight", "lm_head.weight")
        assert tensor.equal(half[name] if of_half else load_folder(models["m0"])[name]), name
    for more in ({"out_dtype": "float32"}, {"dtype": "bfloat16"}):
        assert not any("several dtypes" in note for note in outliermerge.plan(spec | more).notes)


def test_layers_unlike_those_of_the_config_are_told_by_the_plan(models, source, stack, tmp_path):
    tensors = load_folder(models["m1"])
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(16, 32)
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    lacking = save_tensors(tmp_path / "lacking", tensors)
    shutil.copy(models["m1"] / "config.json", lacking)

    def notes_of(start: int) -> list[str]:
        part = {"model": str(lacking), "layer_range": [start, start + 1]}
        parts = [*stack["slices"], {"sources": [part]}]
        notes = outliermerge.plan(stack | {"slices": parts}).notes
        return [note for note in notes if "may not load" in note]

    assert notes_of(3) == []
    (note,) = notes_of(2)
    assert note.startswith("1 layer(s) of the output are like none of ")
    assert "layer 6, from layer 2 of " in note
    assert "mlp.up_proj.weight: none, there [24, 16]" in note
    assert "mlp.down_proj.weight: [16, 32], there [16, 24]" in note and "inv_freq" not in note


@pytest.mark.parametrize("tie", [None, False, True])
def test_a_head_of_the_last_model_that_the_config_ties_is_not_lost_in_silence(tie, tmp_path):
    tied, own = (
        save(kind, tmp_path / kind, num_layers=2, num_models=0)["base"]
        for kind in ("llama-tied", "llama")
    )
    parts = [{"sources": [{"model": str(m), "layer_range": [0, 2]}]} for m in (tied, own)]
    spec = {"merge_method": "passthrough", "slices": parts}
    if tie is None:
        with pytest.raises(OutlierMergeError, match="the config ties it to the embeddings"):
            outliermerge.plan(spec)
        return
    output = outliermerge.run(spec | {"tie_word_embeddings": tie}, output=tmp_path / "out").output
    heads = [load_folder(folder).get("lm_head.weight") for folder in (own, output)]
    assert torch.equal(*heads) if tie is False else heads[1] is None
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is tie


def test_an_adapter_can_be_sliced(models, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    weight = load_folder(models["base"])[f"{name}.weight"]
    factors = torch.ones(1, weight.shape[1]), torch.full((weight.shape[0], 1), 0.5)
    adapter = save_lora(
        tmp_path / "lora",
        {f"{name}.lora_A.weight": factors[0], f"{name}.lora_B.weight": factors[1]},
        target_modules=["up_proj"],
        base_model_name_or_path=str(models["base"]),
    )
    entry = {"model": f"{models['base']}+{adapter}", "layer_range": [1, 3]}
    spec = {"merge_method": "passthrough", "slices": [{"sources": [entry]}]}

    made = load_folder(outliermerge.run(spec, output=tmp_path / "out").output)

    torch.testing.assert_close(made["model.layers.0.mlp.up_proj.weight"], weight + 0.5)


def test_layers_that_predict_further_tokens_are_left_out_with_a_note(tmp_path):
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)]
    tensors = {name: torch.ones(2, 2) for name in ("model.embed_tokens.weight", *names)}
    folder = save_tensors(tmp_path / "m", tensors | {"model.norm.weight": torch.ones(2)})
    config = {"model_type": "m", "num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    entry = {"model": str(folder), "layer_range": [1, 3]}
    spec = {"merge_method": "passthrough", "slices": [{"sources": [entry]}]}

    result = outliermerge.run(spec, output=tmp_path / "out")

    found = json.loads((result.output / "config.json").read_text())
    assert (found["num_hidden_layers"], found["num_nextn_predict_layers"]) == (2, 0)
    assert len(load_folder(result.output)) == 4
    notes = outliermerge.plan(spec).notes
    assert any("1 layer(s)" in note and "predict further tokens" in note for note in notes)
    entry["layer_range"] = [2, 4]
    with pytest.raises(OutlierMergeError, match="has 3 layers"):
        outliermerge.plan(spec)


def test_parts_of_a_merge_of_slices_are_written_by_several_processes(stack, tmp_path):
    whole = outliermerge.run(stack, output=tmp_path / "whole").output
    planned = pickle.loads(pickle.dumps(outliermerge.plan(stack)))
    for number in (1, 2):
        run_part(planned, tmp_path / "out", number, 2, RunOptions())
    assert files_of(outliermerge.run(stack, output=tmp_path / "out").output) == files_of(whole)


def test_models_of_single_files_are_stacked(models, stack, tmp_path):
    for name in models:
        save_file(load_folder(models[name]), tmp_path / f"{name}.safetensors")
    text = json.dumps(stack)
    for name, folder in models.items():
        text = text.replace(f'{folder}"', f'{tmp_path / name}.safetensors"')

    output = outliermerge.run(json.loads(text), output=tmp_path / "out.safetensors").output

    assert output.is_file()
    assert len({job.name for job in outliermerge.plan(stack).jobs}) == 6 * 9 + 3


def test_a_pipeline_is_not_sliced(tmp_path):
    for part in ("unet", "text_encoder"):
        save_tensors(tmp_path / "pipe" / part, {"layers.0.a.weight": torch.ones(2)})
    (tmp_path / "pipe" / "model_index.json").write_text(
        json.dumps({"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["t", "T"]})
    )
    entry = {"model": str(tmp_path / "pipe"), "layer_range": [0, 1]}
    spec = {"merge_method": "passthrough", "slices": [{"sources": [entry]}]}
    with pytest.raises(OutlierMergeError, match="has several parts, whose layers cannot be sliced"):
        outliermerge.plan(spec)


def test_what_mergekit_passes_over_in_slices_is_left_out_of_a_lenient_merge(stack, tmp_path):
    stack["slices"][0] |= {"merge_method": "slerp", "parameters": {"int8_mask": True, "t": 1}}
    stack["slices"][1]["sources"][0]["weight"] = 2
    with pytest.raises(outliermerge.SpecError):
        outliermerge.plan(stack)

    output = outliermerge.run(stack, lenient=True, output=tmp_path / "out").output

    recipe = tmp_path / "recipe.yaml"
    shutil.copy(output / "recipe.yaml", recipe)
    assert "weight" not in recipe.read_text()
    assert len(outliermerge.plan(recipe).jobs) == 6 * 9 + 3


def test_a_filter_of_a_slice_may_be_of_another_slices_tensors(stack):
    scale = [{"filter": "lm_head", "value": 2}, {"value": 1}]
    for one in stack["slices"]:
        one["parameters"] = {"scale": scale}
    plan = outliermerge.plan(stack)
    assert [job.name for job in plan.jobs if job.action == "merge"] == ["lm_head.weight"]
