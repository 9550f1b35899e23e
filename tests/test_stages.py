"""Merges in several stages: one file, one pass, the bytes of one merge after the other."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from checkpoints import family, load_folder, save_lora, save_tensors
from stopping import stopping_after
from vocabularies import KINDS, save_family

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import ArgumentError, OutlierMergeError, SpecError
from outliermerge.spec.check import load_spec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of stages' configs and tokenizers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "outliermerge" / "stages"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and three fine-tunes of it, in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    family("llama", folder, num_models=3, dtype=torch.bfloat16)
    return folder


def of(folder: Path, method: str, *names: str, base: bool = True, **keys: Any) -> dict[str, Any]:
    """Return a spec of some of the models; a name that is no folder's is a stage's."""

    def named(name: str) -> str:
        return str(folder / name) if (folder / name).is_dir() else name

    spec: dict[str, Any] = {"merge_method": method}
    if base:
        spec["base_model"] = named("base")
    return spec | {"models": [{"model": named(name)} for name in names]} | keys


STAGES = {
    "linear": {"base": False, "parameters": {"weight": 0.7, "normalize": False}},
    "ties": {"parameters": {"density": 0.5}},
    "ties of all tensors": {"parameters": {"density": 0.5, "trim": "model"}},
    "dare_ties": {"parameters": {"density": 0.5}},
    "della": {"parameters": {"density": 0.5}},
    "breadcrumbs": {"parameters": {"density": 0.5}},
    "min_sigma": {},
    "sce": {"parameters": {"select_topk": 0.3}},
    "model_stock": {},
    "karcher": {"base": False},
    "nuslerp": {"base": False, "parameters": {"weight": 0.5}},
    "task_arithmetic": {},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("method", STAGES)
def test_two_stages_give_the_bytes_of_two_runs_with_float32_between(
    method, kernels, models, tmp_path
):
    inner = of(models, method.partition(" ")[0], "task0", "task1", **STAGES[method])
    outliermerge.run(inner | {"out_dtype": "float32"}, output=tmp_path / "between", kernels=kernels)
    final = {"parameters": {"density": 0.4}, "out_dtype": "bfloat16"}
    apart = of(models, "ties", str(tmp_path / "between"), "task2", **final)
    outliermerge.run(apart, output=tmp_path / "apart", kernels=kernels)

    together = of(models, "ties", "between", "task2", **final)
    stages = [{"name": "between", **inner}]
    outliermerge.run({"stages": stages, **together}, output=tmp_path / "one", kernels=kernels)

    expected, found = load_folder(tmp_path / "apart"), load_folder(tmp_path / "one")
    assert expected.keys() == found.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def chain(models: Path, **keys: Any) -> dict[str, Any]:
    """A merge of three stages, one of which is used twice, and one as a base."""
    return {
        "stages": [
            {"name": "a", **of(models, "ties", "task0", "task1", parameters={"density": 0.5})},
            {"name": "b", **of(models, "linear", "a", "task2", base=False)},
            {"name": "c", "merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.3},
             "models": [{"model": str(models / "task2")}]},
        ],
        "merge_method": "task_arithmetic",
        "base_model": "a",
        "models": [{"model": "b"}, {"model": "c"}],
        **keys,
    }  # fmt: skip


def test_stages_of_stages_equal_runs_one_after_another(models, tmp_path):
    spec = chain(models)
    for stage in spec["stages"]:
        stage = yaml.safe_load(yaml.safe_dump(stage))
        name = stage.pop("name")
        text = yaml.safe_dump(stage | {"out_dtype": "float32"})
        for other in "abc":  # to where they are written
            text = text.replace(f"model: {other}\n", f"model: {tmp_path / other}\n")
        outliermerge.run(yaml.safe_load(text), output=tmp_path / name)
    last = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "a"),
            "models": [{"model": str(tmp_path / "b")}, {"model": str(tmp_path / "c")}],
            "out_dtype": "bfloat16"}  # fmt: skip
    outliermerge.run(last, output=tmp_path / "apart")
    outliermerge.run(spec, output=tmp_path / "together")
    expected, found = load_folder(tmp_path / "apart"), load_folder(tmp_path / "together")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert found["model.norm.weight"].dtype == torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "together")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def stacked(name: str, *ranges: tuple[int, int]) -> dict[str, Any]:
    """Return a stack of ranges of layers of one model."""
    slices = [{"sources": [{"model": name, "layer_range": list(r)}]} for r in ranges]
    return {"merge_method": "passthrough", "slices": slices}


def test_stacks_of_layers_are_stages_and_stages_are_stacked(models, tmp_path):
    """Two stacks of four layers are averaged, and the average is stacked again, to five."""
    stacks = [stacked(str(models / name), (0, 2), (1, 3)) for name in ("task0", "task1")]
    for number, stack in enumerate(stacks):
        outliermerge.run(stack | {"out_dtype": "float32"}, output=tmp_path / f"s{number}")
    mean = {"merge_method": "linear", "out_dtype": "float32",
            "models": [{"model": str(tmp_path / f"s{n}")} for n in range(2)]}  # fmt: skip
    outliermerge.run(mean, output=tmp_path / "mean")
    last = stacked(str(tmp_path / "mean"), (0, 3), (2, 4)) | {"out_dtype": "bfloat16"}
    outliermerge.run(last, output=tmp_path / "apart")

    stages = [{"name": f"s{number}", **stack} for number, stack in enumerate(stacks)]
    mean = {"merge_method": "linear", "models": [{"model": "s0"}, {"model": "s1"}]}
    stages.append({"name": "mean", **mean})
    spec = {"stages": stages, **stacked("mean", (0, 3), (2, 4))}
    outliermerge.run(spec, output=tmp_path / "together")
    expected, found = load_folder(tmp_path / "apart"), load_folder(tmp_path / "together")
    assert expected.keys() == found.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "together")
    assert model.config.num_hidden_layers == 5
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    outliermerge.run(tmp_path / "together" / "recipe.yaml", output=tmp_path / "again")
    assert all(load_folder(tmp_path / "again")[n].equal(tensor) for n, tensor in found.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_that_a_stage_builds_is_that_of_its_model(kind, tmp_path, cache):
    """A union of two tokenizers is a stage, and the next merge brings a third model into it."""
    root = save_family(tmp_path / "family", kind)
    union = {
        "merge_method": "linear",
        "models": [{"model": str(root / name)} for name in ("base", "other")],
        "tokenizer": {"source": "union"},
    }
    outliermerge.run(union | {"out_dtype": "float32"}, output=tmp_path / "union")

    def last(of: str) -> dict[str, Any]:
        return {
            "merge_method": "linear",
            "models": [{"model": of}, {"model": str(root / "chat")}],
            "tokenizer": {"source": "union"},
        }

    outliermerge.run(last(str(tmp_path / "union")), output=tmp_path / "apart")
    stages = [{"name": "s", **union}]
    outliermerge.run({"stages": stages, **last("s")}, output=tmp_path / "together")
    expected, found = load_folder(tmp_path / "apart"), load_folder(tmp_path / "together")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    names = {path.name for path in (tmp_path / "apart").iterdir()}
    for name in names - {"README.md", "recipe.yaml", "outliermerge.json", "mergekit_config.yml"}:
        assert (tmp_path / "together" / name).read_bytes() == (
            tmp_path / "apart" / name
        ).read_bytes(), name
    (folder,) = cache.iterdir()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1}))
    with pytest.raises(OutlierMergeError, match="holds other files than its name says"):
        outliermerge.plan({"stages": stages, **last("s")})


def test_small_files_of_stages_are_not_kept_for_good(models, tmp_path, cache):
    """Those of a stage are kept while they are used, and go when others are written later."""

    def plan(num_layers: int) -> None:
        stage = stacked(str(models / "task0"), *[(0, 1)] * num_layers)
        entries = [{"model": "s"}]
        outliermerge.plan({"stages": [{"name": "s", **stage}], "merge_method": "linear",
                           "models": entries})  # fmt: skip

    plan(4)
    (first,) = cache.iterdir()
    os.utime(first, (1e9, 1e9))
    plan(4)
    assert first.stat().st_mtime > 1e9  # it is used again
    os.utime(first, (1e9, 1e9))
    plan(5)
    (second,) = cache.iterdir()
    assert second != first
    for number in range(120):
        (cache / str(number)).mkdir()
        os.utime(cache / str(number), (time.time() - 3 * 86_400 + number,) * 2)
    plan(6)
    left = {path.name for path in cache.iterdir()}
    assert second.name in left and "21" in left and "20" not in left and len(left) == 101


@pytest.mark.parametrize("form", ["documents", "list", "final first"])
def test_all_forms_of_a_file_are_the_same_merge(form, models, tmp_path):
    spec = chain(models)
    stages, final = spec["stages"], {k: v for k, v in spec.items() if k != "stages"}
    text = {
        "documents": yaml.safe_dump_all([*reversed(stages), final]),
        "list": yaml.safe_dump({"stages": [*stages, {"name": "out", **final}]}),
        "final first": yaml.safe_dump_all([final, *stages]),
    }[form]
    (tmp_path / "spec.yaml").write_text(text)
    loaded = outliermerge.load_spec(tmp_path / "spec.yaml")
    assert loaded.as_dict() == outliermerge.load_spec(spec).as_dict()
    assert [*loaded.all_stages] == ["a", "b", "c"]


def test_the_recipe_and_the_manifest_repeat_a_merge_in_stages(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    spec = chain(Path())
    outliermerge.run(spec, output=tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert outliermerge.verify("out") == []
    for number, again in enumerate(("recipe.yaml", "outliermerge.json")):
        outliermerge.run(f"out/{again}", output=f"again{number}")
        names = [f.name for f in Path("out").glob("*.safetensors")]
        for name in names:
            assert Path("out", name).read_bytes() == Path(f"again{number}", name).read_bytes()
    manifest = json.loads(Path("out/outliermerge.json").read_text())
    made_of = {entry["model"]: entry.get("made_of") for entry in manifest["inputs"]}
    assert [*made_of] == ["a", "b", "c"]
    assert made_of["a"] == ["base", "task0", "task1"]


def test_kept_stages_are_outputs_of_their_own(models, tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(chain(models)))
    command = ["run", str(tmp_path / "spec.yaml"), str(tmp_path / "out"), "--keep"]
    assert main([*command, "b", "--keep", "a", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert [Path(each["output"]).name for each in kept] == ["out-b", "out-a"]
    alone = chain(models)["stages"]
    outliermerge.run({"stages": alone[:1], **{k: v for k, v in alone[1].items() if k != "name"}},
                     output=tmp_path / "alone")  # fmt: skip
    for file in (tmp_path / "alone").glob("*.safetensors"):
        assert (tmp_path / "out-b" / file.name).read_bytes() == file.read_bytes()
    assert outliermerge.verify(tmp_path / "out-a") == []
    assert main([*command, "d"]) == 2
    assert "--keep: no stage 'd'. " in capsys.readouterr().err


def test_a_kept_stage_whose_name_has_a_slash_is_refused(models, tmp_path):
    spec = of(models, "linear", "a/b", "task0", base=False)
    spec["stages"] = [of(models, "linear", "task0", "task1", base=False, name="a/b")]
    outliermerge.run(spec, output=tmp_path / "out")
    with pytest.raises(ArgumentError, match="keep: the stage 'a/b' is written as OUTPUT-NAME"):
        outliermerge.run(spec, output=tmp_path / "kept", keep=["a/b"])


@pytest.mark.parametrize("again", ["as it is", "copied inputs"])
def test_a_killed_run_in_stages_goes_on_with_the_same_bytes(again, models, tmp_path, monkeypatch):
    copied = tmp_path / "models"
    shutil.copytree(models, copied)
    spec = chain(copied)
    outliermerge.run(spec, output=tmp_path / "whole")
    with stopping_after(monkeypatch, 7), pytest.raises(KeyboardInterrupt):
        outliermerge.run(spec, output=tmp_path / "out", threads=1)
    if again == "copied inputs":  # other inodes, the same bytes and times
        copied.rename(tmp_path / "old")
        shutil.copytree(tmp_path / "old", copied)
    result = outliermerge.run(spec, output=tmp_path / "out")
    assert result.num_resumed == (7 if again == "as it is" else 0)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_run_in_stages_that_was_killed_leaves_nothing_under_its_name(models, tmp_path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(chain(models)))
    held = Path(__file__).with_name("held_run.py")
    arguments = ["run", str(tmp_path / "spec.yaml"), str(tmp_path / "out"), "--threads", "1"]
    process = subprocess.Popen([sys.executable, held, "5", "after", *arguments])
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    outliermerge.run(chain(models), output=tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_the_bytes_do_not_depend_on_threads_memory_or_pickling(models, tmp_path):
    spec = {"stages": [{"name": "s", **of(models, "sce", "task0", "task1",
                                          parameters={"select_topk": 0.4})}],
            **of(models, "dare_ties", "s", "task2", parameters={"density": 0.6})}  # fmt: skip
    outliermerge.run(spec, output=tmp_path / "one", threads=1)
    plan = pickle.loads(pickle.dumps(outliermerge.plan(spec)))
    outliermerge.run(plan, output=tmp_path / "two", threads=3, memory="4MiB")
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


def test_a_stage_has_the_config_that_its_merge_writes(models, tmp_path):
    """Rows of the vocabulary that a stage adds are in the config that the next one reads."""
    models = shutil.copytree(models, tmp_path / "models", ignore=lambda *_: ["tokenizer.json"])
    grown = tmp_path / "grown"
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "task1")
    model.resize_token_embeddings(99, mean_resizing=False)
    model.save_pretrained(grown)
    stage = of(models, "linear", "base", str(grown), base=False, vocabulary="common")
    spec = {"stages": [{"name": "s", **stage}], **of(models, "linear", "s", "task2", base=False)}
    outliermerge.run(spec, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 96
    stage = of(models, "linear", str(grown), "task0", base=False, vocabulary="common")
    spec = {"stages": [{"name": "s", **stage}], **of(models, "linear", "s", "task2", base=False)}
    outliermerge.run(spec, output=tmp_path / "smaller")
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert config["vocab_size"] == 96
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")


def test_an_adapter_is_applied_to_a_stage(models, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    a, b = torch.ones(1, 32) * 0.1, torch.ones(48, 1) * 0.2
    lora = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    adapter = save_lora(tmp_path / "lora", lora, target_modules=["up_proj"])
    stage = {"name": "s", **of(models, "linear", "task0", "task1", base=False)}
    spec = {"stages": [stage], "merge_method": "linear", "models": [{"model": f"s+{adapter}"}],
            "out_dtype": "float32"}  # fmt: skip
    outliermerge.run(spec, output=tmp_path / "out")
    halves = [load_folder(models / each)[f"{name}.weight"].float() for each in ("task0", "task1")]
    expected = (halves[0] + halves[1]) / 2 + b @ a
    torch.testing.assert_close(load_folder(tmp_path / "out")[f"{name}.weight"], expected)


def test_buffers_that_a_stage_copies_must_be_equal(models, tmp_path):
    for name, value in (("x", 1), ("y", 2)):
        state = load_folder(models / "task0") | {"count": torch.tensor([value])}
        save_tensors(tmp_path / name, state)
    inner = {"merge_method": "linear", "models": [{"model": str(tmp_path / n)} for n in "xy"]}
    outer = {"merge_method": "linear", "models": [{"model": "s"}]}
    with pytest.raises(OutlierMergeError, match="stage s copies it, which is right only where"):
        outliermerge.run({"stages": [{"name": "s", **inner}], **outer}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_nan_in_a_model_of_a_stage_is_refused(kernels, models, tmp_path):
    state = load_folder(models / "task0")
    state["model.norm.weight"][3] = torch.nan
    save_tensors(tmp_path / "bad", state)
    for file in ("config.json",):
        (tmp_path / "bad" / file).write_bytes((models / "base" / file).read_bytes())
    stage = {"name": "s", **of(models, "ties", str(tmp_path / "bad"), "task1")}
    spec = {"stages": [stage], **of(models, "task_arithmetic", "s")}
    with pytest.raises(OutlierMergeError, match=r"model.norm.weight.* of a stage has values that"):
        outliermerge.run(spec, output=tmp_path / "out", kernels=kernels)
    outliermerge.run(spec, output=tmp_path / "out", kernels=kernels, allow_non_finite=True)


def test_the_plan_shows_the_stages_and_their_models(models, tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(chain(models)))
    assert main(["plan", str(tmp_path / "spec.yaml")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "stage b: linear of a, " in shown
    assert re.search(r"stage a: ties of .* \(density 0\.5\)", shown)
    assert "in a" in shown
    assert "a stage" in shown
    assert main(["plan", str(tmp_path / "spec.yaml"), "--json"]) == 0
    inputs = json.loads(capsys.readouterr().out)["inputs"]
    assert [entry["model"] for entry in inputs] == ["a", "b", "c"]


def test_stages_that_use_two_others_each_are_planned_once(models):
    """A walk over all ways to the first stage would take 2 ** 40 steps."""
    stages = [of(models, "linear", "task0", "task1", base=False, name="s0")]
    stages.append(of(models, "linear", "s0", "task1", base=False, name="s1"))
    for number in range(2, 60):
        used = f"s{number - 2}", f"s{number - 1}"
        stages.append(of(models, "linear", *used, base=False, name=f"s{number}"))
    loaded = load_spec({"stages": stages} | of(models, "linear", "s59", "task2", base=False))
    assert [*loaded.all_stages] == [f"s{number}" for number in range(60)]
    assert len(loaded.as_dict()["stages"]) == 60


def test_the_output_may_not_be_a_model_of_a_stage(models, tmp_path):
    with pytest.raises(OutlierMergeError, match="is, holds or is inside the model"):
        outliermerge.run(chain(models), output=models / "task1", overwrite=True)


def test_a_sweep_over_stages_gives_what_single_runs_give(models, tmp_path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(chain(models)))
    command = ["sweep", str(tmp_path / "spec.yaml"), "--set", "lambda=0.5,0.7"]
    assert main([*command, "--output", str(tmp_path / "sweep")]) == 0
    for value in (0.5, 0.7):
        alone = chain(models, parameters={"lambda": value})
        outliermerge.run(alone, output=tmp_path / f"alone{value}")
        expected = load_folder(tmp_path / f"alone{value}")
        found = load_folder(tmp_path / "sweep" / f"lambda={value}")
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_a_sweep_varies_settings_of_stages(models, tmp_path):
    spec, keys = chain(models), {"stages.a.density": [0.3], "stages.b.models.2.weight": [0.2, 2]}
    results = outliermerge.sweep(spec, keys, output=tmp_path / "sweep")
    spec["stages"][0]["parameters"]["density"] = 0.3
    for result, weight in zip(results, (0.2, 2), strict=True):
        spec["stages"][1]["models"][1]["parameters"] = {"weight": weight}
        outliermerge.run(spec, output=tmp_path / f"{weight}")
        expected, found = load_folder(tmp_path / f"{weight}"), load_folder(result.output)
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
    for key, said in (
        ("stages.d.t", "there is no stage d. Valid: a, b, c"),
        ("stages.b.models.3.weight", "there is no model 3: the spec has models 1 to 2"),
        ("stages.a.slices.1.t", "there is no slice 1: the spec has no slices"),
    ):
        with pytest.raises(ArgumentError, match=said):
            outliermerge.plan_sweep(spec, {key: [1]})


MULTI = """\
name: first
merge_method: task_arithmetic
base_model: DIR/base
models:
  - model: DIR/task0
    parameters: {weight: 0.5}
  - model: DIR/task1
    parameters: {weight: 0.5}
dtype: float32
---
name: second
merge_method: linear
models:
  - model: first
    parameters: {weight: 0.4}
  - model: DIR/task2
    parameters: {weight: 0.6}
dtype: float32
---
merge_method: slerp
base_model: first
models:
  - model: second
parameters: {t: 0.3}
dtype: float32
"""


def test_a_file_of_mergekit_multi_gives_what_it_gives(models, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
        from mergekit.scripts.multimerge import main as multi
    file = tmp_path / "multi.yaml"
    file.write_text(MULTI.replace("DIR", str(models)))
    theirs = ["--out-path", str(tmp_path / "theirs"), "-I", str(tmp_path / "between"), "--quiet"]
    with pytest.raises(SystemExit) as end:
        multi([str(file), *theirs, "--no-copy-tokenizer", "--no-write-model-card"])
    assert end.value.code == 0
    assert main([str(file), str(tmp_path / "ours")]) == 0
    found = load_folder(tmp_path / "ours")
    for name, expected in load_folder(tmp_path / "theirs").items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=3e-6)
    capsys.readouterr()
    assert main(["convert-config", str(file)]) == 0
    converted = capsys.readouterr().out
    (tmp_path / "converted.yaml").write_text(converted)
    assert main(["run", str(tmp_path / "converted.yaml"), str(tmp_path / "again")]) == 0
    assert all(load_folder(tmp_path / "again")[n].equal(tensor) for n, tensor in found.items())


HEAD = "merge_method: linear\nmodels:\n- model: s\n"
STAGE = "stages:\n- name: s\n  merge_method: linear\n  models:\n  - model: task0\n"
BAD = {
    "no name": (STAGE.replace("name: s\n  ", "") + HEAD, "2:3: stages[0]: `name` is missing"),
    "a list for a stage": ("stages:\n- [a]\n" + HEAD, "2:3: stages[0]: found a list, expected a"),
    "no list": ("stages: x\n" + HEAD, "1:9: stages: found 'x', expected a list of merges"),
    "a number": (STAGE.replace("name: s", "name: 3") + HEAD, "2:9: stages[0].name: found 3, exp"),
    "a plus": (STAGE.replace("name: s", "name: s+t") + HEAD, "2:9: stages[0].name: found 's+t'"),
    "one name twice": (
        STAGE + STAGE.partition("\n")[2] + HEAD,
        "6:9: stages[1].name: 's' is the name of stages[0], too",
    ),
    "a stage that none uses": (
        STAGE + HEAD.replace("model: s", "model: task1"),
        "2:9: stages[0].name: no merge uses the stage 's'. Use or remove it",
    ),
    "a circle": (
        STAGE.replace("task0", "t") + STAGE.partition("\n")[2].replace("name: s", "name: t")
        .replace("task0", "s") + HEAD,
        "9:12: stages[1].models[0].model: a circle: s → t → s. A stage cannot use what is made of",
    ),
    "itself": (
        STAGE.replace("task0", "s") + HEAD, "5:12: stages[0].models[0].model: a circle: s → s."
    ),
    "an output of a stage": (
        STAGE + "  output: x\n" + HEAD,
        "6:3: stages[0].output: a stage has no `output`: it belongs to the merge of the output",
    ),
    "stages of a stage": (STAGE + "  stages: [{}]\n" + HEAD, "6:3: stages[0].stages: a stage has"),
    "a mistake in a stage": (
        STAGE.replace("merge_method", "merge_metod") + HEAD,
        "3:3: stage s: merge_metod: unknown key 'merge_metod'. Did you mean 'merge_method'?",
    ),
    "two without a name": (
        HEAD + "---\n" + HEAD, "5:1: a second merge without a `name`: name each but that of"
    ),
    "two that none uses": (
        "name: a\n" + HEAD + "---\nname: b\n" + HEAD,
        "1:7: name: no merge uses 'a', 'b', so that it cannot be told which is the output: leave",
    ),
    "all used": (
        "name: s\n" + HEAD, None
    ),
    "an empty document": ("---\n---\n", "found nothing, expected a mapping with `merge_method`"),
    "a list as a document": (HEAD + "---\n- a\n", "5:1: found a list, expected a mapping with"),
    "a near name": (
        STAGE.replace("name: s", "name: stage_one") + HEAD.replace("model: s", "model: stage_on")
        .replace("- model: stage_on\n", "- model: stage_on\n- model: stage_one\n"),
        "Did you mean the stage 'stage_one'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in BAD if BAD[case][1]])
def test_a_bad_file_in_stages_is_refused_with_its_line(case, models, tmp_path, capsys):
    text, message = BAD[case]
    (tmp_path / "spec.yaml").write_text(text.replace("task", f"{models}/task"))
    assert main(["plan", str(tmp_path / "spec.yaml")]) == (1 if case == "a near name" else 2)
    said = capsys.readouterr().err
    assert message in said.replace(f"error: {tmp_path}/spec.yaml:", "")
    assert "Traceback" not in said


def test_all_mistakes_of_all_stages_are_told_together(models, tmp_path):
    text = STAGE.replace("task0", str(models / "task0")) + "  dtyp: x\n" + HEAD + "dtpe: y\n"
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SpecError) as error:
        outliermerge.load_spec(tmp_path / "spec.yaml")
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["6", "10"]


def test_what_is_passed_over_in_a_stage_is_a_warning_and_not_in_the_recipe(models, tmp_path):
    weight = [{"filter": "no_such", "value": 2}, {"value": 0.5}]
    stage = of(models, "linear", "task0", "task1", base=False, parameters={"weight": weight})
    spec = {"stages": [{"name": "s", **stage, "dtyp": "x"}], **of(models, "ties", "s", "task2")}
    with pytest.raises(SpecError, match="stage s: dtyp: unknown key"):
        outliermerge.load_spec(spec)
    plan = outliermerge.plan(spec, lenient=True)
    (warning,) = (note for note in plan.notes if note.startswith("warning: "))
    assert warning.startswith("warning: stage s: without effect, as mergekit passes over it")
    assert all(word in warning for word in ("unknown key 'dtyp'", "no_such"))
    outliermerge.run(plan, output=tmp_path / "out")
    again = outliermerge.plan(tmp_path / "out" / "recipe.yaml")
    assert not any(note.startswith("warning: ") for note in again.notes)
    outliermerge.run(again, output=tmp_path / "again")
    found = load_folder(tmp_path / "again")
    assert all(found[n].equal(tensor) for n, tensor in load_folder(tmp_path / "out").items())


def test_a_stage_is_measured_as_a_whole_where_stages_of_it_are_too(models, tmp_path):
    """Densities of all tensors together, of a merge of merges, of which only one layer is used."""
    whole = {"parameters": {"density": 0.3, "trim": "model"}}
    first = of(models, "ties", "task0", "task1", **whole)
    outliermerge.run(first | {"out_dtype": "float32"}, output=tmp_path / "a")
    second = of(models, "ties", str(tmp_path / "a"), "task2", **whole)
    outliermerge.run(second | {"out_dtype": "float32"}, output=tmp_path / "b")
    outliermerge.run(stacked(str(tmp_path / "b"), (1, 2), (1, 2)), output=tmp_path / "apart")
    stages = [{"name": "a", **first}, {"name": "b", **of(models, "ties", "a", "task2", **whole)}]
    spec = {"stages": stages, **stacked("b", (1, 2), (1, 2)), "out_dtype": "float32"}
    plan = pickle.loads(pickle.dumps(outliermerge.plan(spec)))
    outliermerge.run(plan, output=tmp_path / "out", threads=3)
    expected, found = load_folder(tmp_path / "apart"), load_folder(tmp_path / "out")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_a_stage_that_is_misspelt_where_it_is_used_is_guessed(models):
    stage = {"name": "first", **of(models, "linear", "task0", base=False)}
    spec = {"stages": [stage], "merge_method": "linear", "models": [{"model": "frist"}]}
    with pytest.raises(
        SpecError, match=r"no merge uses the stage 'first'\. Is it meant by 'frist'"
    ):
        outliermerge.load_spec(spec)


def test_a_mistake_in_a_stage_has_one_place(models, tmp_path):
    stage = {"name": "s", "merge_method": "linear", "models": [{"model": str(tmp_path / "no")}]}
    (tmp_path / "spec.yaml").write_text(
        yaml.safe_dump_all([stage, of(models, "linear", "s", base=False)])
    )
    with pytest.raises(OutlierMergeError) as error:
        outliermerge.plan(tmp_path / "spec.yaml")
    assert str(error.value).count("spec.yaml:") == 1


def test_an_output_inside_another_is_refused(models, tmp_path):
    spec = of(models, "linear", "task0", "task1", base=False)
    outliermerge.run(spec, output=tmp_path / "out")
    with pytest.raises(OutlierMergeError, match="is inside the output"):
        outliermerge.run(spec, output=tmp_path / "out" / "deep" / "in")
    assert outliermerge.verify(tmp_path / "out") == []


def test_a_plan_says_what_is_under_the_name_of_its_output(models, tmp_path, capsys, monkeypatch):
    spec = of(models, "linear", "task0", "task1", base=False)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    command = ["plan", str(tmp_path / "spec.yaml"), "--output", str(tmp_path / "out")]
    with stopping_after(monkeypatch, 3), pytest.raises(KeyboardInterrupt):
        outliermerge.run(spec, output=tmp_path / "out", threads=1)
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path}/out.partial is there: a run of the same merge goes on with it" in said
    outliermerge.run(spec, output=tmp_path / "out")
    assert main(command) == 0
    assert "a run would stop: " in (said := capsys.readouterr().err)
    assert "exists already. Use --overwrite" in said


def test_what_is_no_output_is_told_apart(models, tmp_path):
    spec = of(models, "linear", "task0", "task1", base=False)
    outliermerge.run(spec, output=tmp_path / "all" / "one")
    with pytest.raises(OutlierMergeError, match="no such file or folder"):
        outliermerge.verify(tmp_path / "nothing")
    with pytest.raises(
        OutlierMergeError, match=r"but an output is in it: did you mean .*all/one\?"
    ):
        outliermerge.verify(tmp_path / "all")
    outliermerge.run(spec, output=tmp_path / "all" / "two")
    with pytest.raises(
        OutlierMergeError, match=r"but 2 outputs are in it\. Name one of them:\n"
    ) as e:
        outliermerge.verify(tmp_path / "all")
    assert str(e.value).endswith(f"  {tmp_path}/all/one\n  {tmp_path}/all/two")
    with pytest.raises(OutlierMergeError, match=r"but 2 models are in it\. Name one of them:\n  "):
        outliermerge.build_report(tmp_path / "all", output=tmp_path / "page.html")


def test_a_text_of_yaml_and_an_array_are_answered_with_what_to_give(models):
    with pytest.raises(SpecError, match=r"found YAML text, .*: give yaml.safe_load\(text\)"):
        outliermerge.plan(yaml.safe_dump(of(models, "linear", "task0", base=False)))
    with pytest.raises(ArgumentError, match=r"models\[1\]: found ndarray, .*torch.from_numpy"):
        outliermerge.merge_tensors([torch.ones(2), torch.ones(2).numpy()], method="linear")


def test_a_seed_of_the_command_line_is_that_of_stages_too(models, tmp_path):
    stage = of(models, "dare_ties", "task0", "task1", parameters={"density": 0.5})
    spec = {"stages": [{"name": "s", **stage}], **of(models, "linear", "s", base=False)}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert main([str(tmp_path / "spec.yaml"), str(tmp_path / "out"), "--random-seed", "5"]) == 0
    spec["stages"][0]["seed"] = 5
    outliermerge.run(spec, output=tmp_path / "five")
    expected, found = load_folder(tmp_path / "five"), load_folder(tmp_path / "out")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    outliermerge.run(tmp_path / "out" / "recipe.yaml", output=tmp_path / "again")
    assert all(load_folder(tmp_path / "again")[n].equal(found[n]) for n in found)
