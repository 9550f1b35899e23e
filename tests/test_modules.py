"""Merges of the parts of a model: each part as by hand, all else the base model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from checkpoints import load_folder
from safetensors.torch import save_file
from stopping import stopping_after
from torch import Tensor
from vlm_replicas import MATHS, VLM, save_llm, save_vlm

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import OutlierMergeError, SpecError

pytestmark = pytest.mark.usefixtures("one_thread")

SHIPPED = Path(__file__).parent.parent / "merge_configs" / "vlm_math.yaml"
TEXT = "language_model."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of configs that modules change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with replicas under their hub ids, and a second model of each kind."""
    root = tmp_path_factory.mktemp("world")
    save_vlm(root / VLM)
    save_vlm(root / "vlm2", seed=3)
    save_llm(root / MATHS)
    save_llm(root / "llm", seed=4)
    for name, seed in (("t5", 5), ("t5_a", 6), ("t5_b", 7)):
        torch.manual_seed(seed)
        config = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=3, num_decoder_layers=2,
            vocab_size=40, decoder_start_token_id=0,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape) * 0.05
        model.to(torch.bfloat16).save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def in_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


def modules(base: str = VLM, /, **parts: Any) -> dict[str, Any]:
    return {"base_model": base, "modules": parts}


def merge(method: str, *models: str, **keys: Any) -> dict[str, Any]:
    weights = keys.pop("weights", [1] * len(models))
    entries = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(models, weights, strict=True)
    ]
    return {"merge_method": method, "models": entries} | keys


def run(spec: dict[str, Any], folder: Path, **options: Any) -> dict[str, Tensor]:
    result = outliermerge.run(spec, output=folder, **options)
    assert outliermerge.verify(result.output) == []
    return load_folder(folder)


def of(folder: str | Path, start: str = "") -> dict[str, Tensor]:
    return {n: values for n, values in load_folder(Path(folder)).items() if n.startswith(start)}


# The shipped spec


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_the_shipped_spec_is_the_published_sum_and_keeps_all_else(kernels, tmp_path):
    spec = yaml.safe_load(SHIPPED.read_text()) | {"output": str(tmp_path / "out")}
    outliermerge.run(spec, kernels=kernels)
    assert outliermerge.verify(tmp_path / "out") == []
    out, vlm, maths = load_folder(tmp_path / "out"), of(VLM), of(MATHS)
    assert list(out) == list(vlm)
    num_merged = 0
    for name, values in out.items():
        own = name.removeprefix(TEXT)
        if name.startswith(TEXT) and "embed_tokens" not in name and "lm_head" not in name:
            num_merged += 1
            by_hand = 0.9 * vlm[name].float() + 0.1 * maths[own].float()
            assert torch.equal(values, by_hand.half()), name
            assert not torch.equal(values, vlm[name]), name
        else:
            assert torch.equal(values, vlm[name]), name
    assert num_merged == len(maths) - 2
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_plan_says_which_part_comes_from_which_models(capsys):
    assert main(["plan", str(SHIPPED), "--no-load-check", "--quiet"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "language_model 28 linear" in printed and "2 kept" in printed
    assert "→ language_model. renames" in printed
    row = "merged by linear (module language_model) 28 5,872 bfloat16, float16 float32 float16 "
    assert row in printed and "copied (in no module, the base model's)" in printed
    assert main(["plan", str(SHIPPED), "--json", "--tensors", "--no-load-check", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["modules"] == [
        {
            "module": "language_model",
            "method": "linear",
            "models": [VLM, MATHS],
            "num_tensors": 28,
            "num_merged": 28,
            "kept": [TEXT + "lm_head.weight", TEXT + "model.embed_tokens.weight"],
        }
    ]
    reasons = {tensor["name"]: tensor["reason"] for tensor in told["tensors"]}
    assert reasons["image_newline"] == "in no module, the base model's"
    assert reasons[TEXT + "model.norm.weight"] == "module language_model"


# As merges by hand


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": (0.7, 0.4)},
    "slerp": {"models": [{"model": "llm"}], "base_model": MATHS, "parameters": {"t": [0.1, 0.8]}},
    "task_arithmetic": {"base_model": "llm"},
    "ties": {"parameters": {"density": [0.3, 0.8]}},
    "ties of all tensors": {"parameters": {"density": 0.4, "trim": "model"}},
    "dare_ties": {"parameters": {"density": 0.5}},
    "min_sigma": {"models": [{"model": MATHS}, {"model": "llm"}]},
    "model_stock": {"models": [{"model": MATHS}, {"model": "llm"}]},
    "karcher": {"models": [{"model": MATHS}, {"model": "llm"}], "base_model": None},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_module_is_the_merge_of_its_part_saved_by_itself(method, tmp_path):
    named = method.partition(" ")[0]
    own = merge(named, MATHS, "vlm2", weights=METHODS[method].pop("weights", (1, 1)))
    own |= METHODS[method]
    out = run(modules(text=own | {"keep": ["embed_tokens", "lm_head"]}), tmp_path / "out")
    # The parts as models of their own, with the names of the base.
    for name, model in ((VLM, VLM), ("vlm2", "vlm2"), (MATHS, MATHS), ("llm", "llm")):
        start = "" if model.startswith(("llm", "hkust")) else TEXT
        held = {
            TEXT + n.removeprefix(start): values.contiguous()
            for n, values in of(model, start).items()
            if "embed" not in n and "lm_head" not in n
        }
        (tmp_path / name).mkdir(parents=True)
        save_file(held, tmp_path / name / "model.safetensors", {"format": "pt"})

    def moved(value: Any) -> Any:
        return str(tmp_path / value) if isinstance(value, str) else value

    apart = {"base_model": VLM} | own | {"out_dtype": "float16"}
    apart = {k: v for k, v in apart.items() if v is not None}
    apart["models"] = [e | {"model": moved(e["model"])} for e in apart["models"]]
    if "base_model" in apart:
        apart["base_model"] = moved(apart["base_model"])
    by_hand = run(apart, tmp_path / "apart")
    assert len(by_hand) == 28
    for name, values in of(VLM).items():
        assert torch.equal(out[name], by_hand.get(name, values)), name


def test_encoder_and_decoder_by_different_methods(tmp_path):
    spec = modules(
        "t5",
        encoder=merge("linear", "t5_a", "t5_b", weights=(0.25, 0.75)),
        decoder=merge("task_arithmetic", "t5_a", weights=[0.5]),
    )
    out, base, a, b = run(spec, tmp_path / "out"), of("t5"), of("t5_a"), of("t5_b")
    for name, values in out.items():
        one, two = a[name].double(), b[name].double()
        if name.startswith("encoder."):
            wanted = 0.25 * one + 0.75 * two
        elif name.startswith("decoder."):
            wanted = base[name].double() + 0.5 * (one - base[name].double())
        else:
            wanted = base[name].double()
        assert torch.equal(values, wanted.bfloat16()), name
    assert {n.partition(".")[0] for n in out} == {"encoder", "decoder", "shared"}


def test_slices_of_modules_change_the_config_for_both(tmp_path):
    def stack(*layers: tuple[int, int]) -> dict[str, Any]:
        sources = [[{"model": "t5", "layer_range": list(each)}] for each in layers]
        return {"merge_method": "passthrough", "slices": [{"sources": s} for s in sources]}

    spec = modules("t5", encoder=stack((0, 3), (1, 3)), decoder=stack((0, 1), (0, 2)))
    out, base = run(spec, tmp_path / "out"), of("t5")
    for start, layers in (("encoder", (0, 1, 2, 1, 2)), ("decoder", (0, 0, 1))):
        for number, layer in enumerate(layers):
            name = f"{start}.block.{{}}.layer.0.SelfAttention.q.weight"
            assert torch.equal(out[name.format(number)], base[name.format(layer)])
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (model.config.num_layers, model.config.num_decoder_layers) == (5, 3)


def test_a_module_after_one_that_changes_the_config(tmp_path):
    sources = [[{"model": "t5", "layer_range": [0, 3]}], [{"model": "t5", "layer_range": [2, 3]}]]
    longer = {"merge_method": "passthrough", "slices": [{"sources": s} for s in sources]}
    spec = modules("t5", encoder=longer, decoder=merge("linear", "t5_a", "t5_b"))
    out = run(spec, tmp_path / "out")
    decoder = run(modules("t5", decoder=spec["modules"]["decoder"]), tmp_path / "decoder")
    for name in (name for name in out if name.startswith("decoder")):
        assert torch.equal(out[name], decoder[name]), name
    manifest = json.loads((tmp_path / "out" / "outliermerge.json").read_text())
    assert [*manifest["spec"]["modules"]] == ["encoder", "decoder"]
    rows = [(row["of"], row["stack"], row["layers"]) for row in manifest["layer_map"]]
    assert rows == [
        ("module encoder", "encoder", [0, 3]),
        ("module encoder", "encoder", [3, 4]),
        ("module decoder", "decoder", [0, 2]),
    ]


def test_layers_that_no_module_merges_are_the_bases(capsys):
    part = "vision_tower.vision_model.encoder.layers.1"
    spec = outliermerge.plan(modules(**{part: merge("linear", VLM, "vlm2")}))
    rows = [row.as_dict() for row in spec.layer_map]
    vision = [(row["of"], row["layers"], row["method"]) for row in rows if "vis" in row["stack"]]
    assert vision == [(f"module {part}", [1, 2], "linear"), ("the output", [0, 1], "copy")]
    text = next(row for row in rows if row["stack"] == "text")
    assert (text["of"], text["method"]) == ("the output", "copy")
    assert [source["model"] for source in text["sources"]] == [VLM]


def test_modules_of_one_model_in_another_layout(tmp_path):
    """transformers holds `model.language_model.*` and `lm_head`: two starts of names change."""
    tensors = {}
    for name, values in of("vlm2").items():
        new = name.replace("language_model.model.", "model.language_model.")
        new = new.replace("language_model.lm_head", "lm_head")
        if not name.startswith(TEXT):
            new = f"model.{name}"
        tensors[new] = values
    shutil.copytree("vlm2", tmp_path / "moved")
    save_file(tensors, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    parts = ("text", "vision", "projector")
    moved = modules(**{p: merge("linear", str(tmp_path / "moved")) for p in parts})
    plain = modules(**{p: merge("linear", "vlm2") for p in parts})
    out, wanted = run(moved, tmp_path / "a"), run(plain, tmp_path / "b")
    assert all(torch.equal(out[name], values) for name, values in wanted.items())
    assert all(torch.equal(out[name], values) for name, values in of("vlm2").items())


def test_a_part_by_the_start_of_its_names_and_of_a_stage(tmp_path):
    start = "vision_tower.vision_model.encoder.layers.1"
    spec = modules(**{start: merge("linear", "mean")})
    spec["stages"] = [{"name": "mean"} | merge("linear", VLM, "vlm2")]
    out, one, two = run(spec, tmp_path / "out"), of(VLM), of("vlm2")
    for name, values in out.items():
        if name.startswith(f"{start}."):
            assert torch.equal(values, ((one[name].double() + two[name].double()) / 2).half())
        else:
            assert torch.equal(values, one[name])


# Recipes, resumption


def test_the_recipe_repeats_the_bytes(tmp_path):
    spec = modules(
        text=merge("dare_linear", "llm", base_model=MATHS, keep="embed_tokens", modifiers=[]),
        vision=merge("task_arithmetic", "vlm2", parameters={"lambda": 0.3}),
    ) | {"seed": 5}
    spec["modules"]["text"]["keep"] = ["embed_tokens", "lm_head"]
    out = run(spec, tmp_path / "out")
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["modules"]["text"]["base_model"] == str(Path(MATHS).absolute())
    assert "merge_method" not in recipe and recipe["seed"] == 5
    for file in ("recipe.yaml", "outliermerge.json"):
        again = tmp_path / file.partition(".")[0]
        outliermerge.run(str(tmp_path / "out" / file), output=again)
        assert all(torch.equal(out[name], values) for name, values in load_folder(again).items())


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    with stopping_after(monkeypatch, 9), pytest.raises(KeyboardInterrupt):
        outliermerge.run(str(SHIPPED), output=tmp_path / "out", threads=1)
    result = outliermerge.run(str(SHIPPED), output=tmp_path / "out", threads=1)
    assert result.num_resumed == 9
    whole = run(yaml.safe_load(SHIPPED.read_text()), tmp_path / "whole")
    out = load_folder(tmp_path / "out")
    assert all(torch.equal(out[name], values) for name, values in whole.items())


# What is refused

LINEAR = merge("linear", "vlm2")
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no base": ({"modules": {"text": LINEAR}}, "`base_model` is missing"),
    "no modules": (modules(), "is empty"),
    "a list": (modules() | {"modules": [LINEAR]}, "found a list, expected a mapping"),
    "no merge": (modules(text="vlm2"), "expected a merge with `models` or `slices`"),
    "models beside": (modules(text=LINEAR) | {"models": []}, "models: stands beside `modules`"),
    "misspelt part": (modules(visoin=LINEAR), "no such part. Did you mean 'vision'?"),
    "two of one": (modules(text=LINEAR, language_model=LINEAR), "is in module text, too"),
    "output in it": (modules(text=LINEAR | {"output": "x"}), "belongs to the whole merge"),
    "unknown key": (modules(text=LINEAR | {"modles": []}), "unknown key 'modles'"),
    "no method": (modules(text={"models": [{"model": "vlm2"}]}), "`merge_method` is missing"),
    "no model": (modules(text=merge("linear", "absent")), "models[0].model: model 'absent'"),
    "keep of nothing": (modules(text=LINEAR | {"keep": ["embd_tokens"]}), "Did you mean 'embed_t"),
    "keep of all": (modules(text=LINEAR | {"keep": "weight"}), "leaves nothing of the module"),
    "keep of a number": (modules(text=LINEAR | {"keep": [1]}), "expected a part of a tensor's"),
    "a model without it": (modules(projector=merge("linear", "llm")), "no tensor of llm is one of"),
    "other vocabulary": (modules(text=merge("linear", VLM, MATHS)), "vocabularies differ"),
    "slices of all": (
        modules(**{"vision_tower": {"merge_method": "passthrough", "slices": [
            {"sources": [{"model": VLM, "layer_range": [0, 9]}]}]}}),
        "has 2 layers",
    ),
}  # fmt: skip


def test_a_seed_of_the_command_line_is_that_of_modules(tmp_path):
    spec = modules(text=merge("dare_linear", "llm", base_model=MATHS, parameters={"density": 0.5}))
    spec["modules"]["text"]["keep"] = ["embed_tokens", "lm_head"]
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert main([str(tmp_path / "spec.yaml"), str(tmp_path / "out"), "--random-seed", "5"]) == 0
    out, zero = load_folder(tmp_path / "out"), run(spec, tmp_path / "zero")
    five = run(spec | {"seed": 5}, tmp_path / "five")
    assert all(torch.equal(out[name], values) for name, values in five.items())
    assert not all(torch.equal(out[name], values) for name, values in zero.items())


def test_a_sweep_varies_settings_of_modules(tmp_path):
    of_text = merge("task_arithmetic", "llm", base_model=MATHS, parameters={"lambda": 0.5})
    of_text["keep"] = ["embed_tokens", "lm_head"]
    spec = modules(text=of_text, vision=merge("task_arithmetic", "vlm2", "vlm2"))
    spec["modules"]["vision"]["models"].pop()

    def swept(keys: dict[str, list[float]], name: str) -> dict[str, Tensor]:
        (result,) = outliermerge.sweep(spec, keys, output=tmp_path / "sweep")
        assert result.output.name == name
        return load_folder(result.output)

    found = swept({"modules.text.lambda": [0.25]}, "modules.text.lambda=0.25")
    of_text["parameters"]["lambda"] = 0.25
    expected = run(spec, tmp_path / "alone")
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    with pytest.raises(
        OutlierMergeError, match=r"different values.* set modules\.text\.lambda and"
    ):
        swept({"lambda": [0.25]}, "")
    spec["modules"]["vision"]["parameters"] = {"lambda": 0.25}
    found = swept({"lambda": [0.7]}, "lambda=0.7")
    for module in spec["modules"].values():
        module["parameters"]["lambda"] = 0.7
    expected = run(spec, tmp_path / "all")
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    for key, said in (
        ("density", "no module has such a parameter. Valid: lambda, "),
        ("merge_method", r"the spec has modules: write modules\.NAME\.merge_method"),
        ("modules.txt.t", "there is no module txt. Did you mean 'text'"),
        ("modules.text.dtype", "is no setting of a spec"),
    ):
        with pytest.raises(OutlierMergeError, match=said):
            swept({key: [0.5]}, "")


@pytest.mark.parametrize("case", BAD)
def test_a_bad_module_is_refused(case):
    spec, message = BAD[case]
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    assert message in str(caught.value)
    assert str(caught.value).startswith("spec: ")


def test_an_error_has_the_line_of_the_module(tmp_path):
    text = f"base_model: {VLM}\nmodules:\n  visoin:\n    merge_method: linear\n    models:\n"
    (tmp_path / "spec.yaml").write_text(text + "      - model: vlm2\n        wieght: 1\n")
    with pytest.raises(SpecError, match=r"spec.yaml:7:9: module 'visoin': models\[0\].wieght"):
        outliermerge.plan(tmp_path / "spec.yaml")
    (tmp_path / "spec.yaml").write_text(text + "      - model: vlm2\n        label: 1\n")
    with pytest.raises(OutlierMergeError, match=r"spec.yaml:3:3: modules.visoin: .*no such part"):
        outliermerge.plan(tmp_path / "spec.yaml", lenient=True)


def test_the_lenient_reading_passes_over_what_mergekit_does_not_know(tmp_path):
    spec = modules(text=merge("linear", "vlm2") | {"label": 1})
    with pytest.raises(SpecError, match="unknown key 'label'"):
        outliermerge.plan(spec)
    plan = outliermerge.plan(spec, lenient=True)
    (warning,) = (note for note in plan.notes if note.startswith("warning: "))
    assert warning.startswith("warning: module text: without effect")
    assert "unknown key 'label'" in warning


def test_what_is_passed_over_in_a_module_is_not_in_the_recipe(tmp_path):
    weight = [{"filter": "no_such", "value": 2}, {"value": 0.5}]
    spec = modules(text=merge("linear", "vlm2") | {"label": 1, "parameters": {"weight": weight}})
    plan = outliermerge.plan(spec, lenient=True)
    (warning,) = (note for note in plan.notes if note.startswith("warning: "))
    assert all(word in warning for word in ("unknown key 'label'", "no_such"))
    outliermerge.run(plan, output=tmp_path / "out")
    again = outliermerge.plan(tmp_path / "out" / "recipe.yaml")
    assert not any(note.startswith("warning: ") for note in again.notes)
    assert "label" not in plan.spec.as_dict()["modules"]["text"]


def test_a_module_keeps_the_rows_of_the_base(tmp_path):
    """LLaVA's vocabulary has rows that the text model's lacks."""
    spec = modules(text=merge("linear", VLM, MATHS) | {"vocabulary": "base"})
    out, vlm, maths = run(spec, tmp_path / "out"), of(VLM), of(MATHS)
    name = "model.embed_tokens.weight"
    values, own, other = out[TEXT + name], vlm[TEXT + name], maths[name]
    mean = (own[: len(other)].float() + other.float()) / 2
    assert torch.equal(values, torch.cat([mean.half(), own[len(other) :]]))


def test_a_file_of_mergekit_is_converted_with_what_each_module_takes(tmp_path, capsys):
    path = tmp_path / "mergekit.yaml"
    path.write_text(yaml.safe_dump({
        "base_model": VLM, "merge_method": "linear", "dtype": "bfloat16",
        "parameters": {"weight": 0.5},
        "modules": {"text_decoder": {"models": [{"model": "vlm2"}]},
                    "vision_tower": {"models": [{"model": "vlm2"}, {"model": VLM}]}},
    }))  # fmt: skip
    assert main(["convert-config", str(path)]) == 0
    converted = yaml.safe_load(capsys.readouterr().out)
    assert converted["modules"]["text_decoder"]["models"] == [{"model": "vlm2"}, {"model": VLM}]
    lenient = run(yaml.safe_load(path.read_text()), tmp_path / "a", lenient=True)
    ours = run(converted, tmp_path / "b")
    assert all(torch.equal(ours[name], values) for name, values in lenient.items())
    mean = (of(VLM)[TEXT + "model.norm.weight"].float() + 
            of("vlm2")[TEXT + "model.norm.weight"].float()) / 2  # fmt: skip
    assert torch.equal(ours[TEXT + "model.norm.weight"], mean.bfloat16())
