"""The recipe and the manifest of an output, as specs of the same merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from checkpoints import save_lora, save_tensors

import outliermerge
from outliermerge import OutlierMergeError, SpecError
from outliermerge.cli import main as cli
from outliermerge.output.recipe import recipe_of

NAMES = ("base", "a", "b")
SPEC = {
    "merge_method": "ties",
    "base_model": "models/base",
    "models": [{"model": "models/a", "parameters": {"density": 0.5}}, {"model": "./models/b"}],
    "tokenizer_source": "models/a",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models, which is the present one; their names are relative to it."""
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        tensors = {"layers.0.w.weight": torch.randn(40, 30), "head.weight": torch.randn(20, 30)}
        save_tensors(tmp_path / "models" / name, tensors)
    (tmp_path / "models" / "a" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("file", ["recipe.yaml", "outliermerge.json"])
@pytest.mark.parametrize(
    "flags", [[], ["--shard-size", "3kB"], ["--no-kernels"]], ids=["plain", "shards", "torch"]
)
def test_an_output_is_made_again_in_any_folder(place, monkeypatch, file, flags):
    assert cli.main(["run", "spec.yaml", "first", *flags]) == 0
    monkeypatch.chdir(place / "elsewhere")
    first = place / "first"
    command = (first / "recipe.yaml").read_text().split("outliermerge run recipe.yaml DIR")[1]
    more = command.splitlines()[0].split()
    assert [word for word in more if word.startswith("--")] == flags[:1]
    options = [flag for flag in more if file == "recipe.yaml" or flag == "--no-kernels"]

    assert cli.main(["run", str(first / file), "again", *options]) == 0

    assert weights(Path("again")) == weights(first)
    assert cli.main(["verify", "again"]) == 0
    assert (first / "recipe.yaml").read_bytes() == Path("again", "recipe.yaml").read_bytes()
    config = "mergekit_config.yml"
    assert (first / config).is_file() == Path("again", config).is_file()


@pytest.mark.parametrize("file", ["spec.yaml", "first/recipe.yaml", "first/outliermerge.json"])
def test_models_inside_the_present_folder_are_named_from_there(place, file):
    outliermerge.run("spec.yaml", output="first")
    outliermerge.run(file, output="out")
    card = Path("out/README.md").read_text()
    assert str(place) not in card
    assert "- `models/a`" in card and "base_model: models/base\n" in card
    assert str(place) in Path("out/recipe.yaml").read_text()


@pytest.mark.parametrize("again", [False, True])
def test_the_recipe_for_mergekit_names_models_from_the_present_folder(place, again):
    spec = {key: value for key, value in SPEC.items() if key != "tokenizer_source"}
    for name in NAMES:
        (place / "models" / name / "config.json").write_text('{"model_type": "unknown"}')
    out = outliermerge.run(spec, output="out").output
    if again:
        out = outliermerge.run("out/recipe.yaml", output="again").output
    written = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert written["base_model"] == "models/base"
    assert [entry["model"] for entry in written["models"]] == ["models/a", "models/b"]


def test_paths_are_shown_and_stored_without_detours_but_through_links(place, capsys):
    shutil.copytree(place / "models" / "b", place / "deep" / "models" / "b")
    shutil.copytree(place / "models" / "a", place / "deep" / "folder")
    (place / "link").symlink_to("deep/folder")  # link/.. is deep
    _other_values(place / "deep" / "models" / "b")
    spec = SPEC | {
        "base_model": "models/../models/base",
        "models": [
            {"model": f"../{place.name}/elsewhere/../models/a", "parameters": {"density": 0.5}},
            {"model": "link/../models/b"},
        ],
        "tokenizer_source": f"../{place.name}/elsewhere/../models/a",
    }
    Path("detours.yaml").write_text(yaml.safe_dump(spec))
    assert cli.main(["plan", "detours.yaml"]) == 0
    assert "models/../models" not in capsys.readouterr().out
    assert cli.main(["run", "detours.yaml", "elsewhere/../out"]) == 0
    assert capsys.readouterr().out.startswith("wrote out: ")

    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert recipe["base_model"] == str(place / "models" / "base")
    names = [entry["model"] for entry in recipe["models"]]
    assert names == [str(place / "models" / "a"), f"{place}/link/../models/b"]
    assert recipe["tokenizer_source"] == names[0]
    manifest = json.loads(Path("out/outliermerge.json").read_text())
    found = [entry["model"] for entry in manifest["inputs"]]
    assert found == ["models/base", f"../{place.name}/models/a", "link/../models/b"]
    assert "elsewhere/.." not in Path("out/README.md").read_text()
    plain = SPEC | {"models": [SPEC["models"][0], {"model": "deep/models/b"}]}
    assert weights(outliermerge.run(plain, output="plain").output) == weights(Path("out"))


@pytest.mark.parametrize("name", ["x" * 300 + "/../models/b", "a\0b/../c", "models/a/x/../y"])
def test_a_path_that_cannot_be_is_refused_as_it_was_written(place, name):
    spec = SPEC | {"models": [{"model": "models/a"}, {"model": name}]}
    with pytest.raises(OutlierMergeError, match=r"models\[1\]\.model: "):
        outliermerge.plan(spec)


def test_a_single_file_is_made_again_from_its_manifest(place):
    for name in NAMES:
        shutil.copy(place / "models" / name / "model.safetensors", f"{name}.safetensors")
    spec = {
        "merge_method": "linear",
        "models": [{"model": "a.safetensors"}, {"model": "b.safetensors"}],
    }
    outliermerge.run(spec, output="one.safetensors")
    outliermerge.run("one.safetensors.outliermerge.json", output="two.safetensors")
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    assert not Path("recipe.yaml").exists()


def test_a_recipe_names_no_output_and_takes_another(place):
    outliermerge.run(SPEC | {"output": "first"})
    with pytest.raises(SpecError, match="no output"):
        outliermerge.run("first/recipe.yaml")
    assert "output" not in yaml.safe_load(Path("first/recipe.yaml").read_text())


def test_an_output_of_outputs_carries_no_recipe_over(place):
    outliermerge.run("spec.yaml", output="first")
    outliermerge.run("spec.yaml", output="second")
    spec = {"merge_method": "linear", "models": [{"model": "first"}, {"model": "second"}]}
    outliermerge.run(spec, output="third")
    recipe = yaml.safe_load(Path("third/recipe.yaml").read_text())
    assert [entry["model"] for entry in recipe["models"]] == [
        str(place / "first"), str(place / "second"),
    ]  # fmt: skip


def _other_values(folder: Path) -> None:
    torch.manual_seed(9)
    tensors = {"layers.0.w.weight": torch.randn(40, 30), "head.weight": torch.randn(20, 30)}
    save_tensors(folder, tensors)


def _other_size(folder: Path) -> None:
    tensors = {"layers.0.w.weight": torch.randn(40, 30), "head.weight": torch.randn(20, 30)}
    save_tensors(folder, {name: tensor.double() for name, tensor in tensors.items()})


def _other_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_values, "models/a: its tensors have other values"),
        (_other_size, r"models/a: model\.safetensors has [\d,]+ bytes, expected [\d,]+"),
        (_other_name, r"models/a: model\.safetensors is not there any more"),
        (shutil.rmtree, "models/a"),
    ],
)
def test_a_manifest_is_not_run_on_other_models(place, change, message):
    outliermerge.run("spec.yaml", output="first")
    change(place / "models" / "a")
    with pytest.raises(OutlierMergeError, match=message) as caught:
        outliermerge.run("first/outliermerge.json", output="again")
    assert not Path("again").exists()
    assert ("again.partial holds" in str(caught.value)) == Path("again.partial").exists()
    if change is not shutil.rmtree:
        assert "first/recipe.yaml" in str(caught.value)
        outliermerge.run("first/recipe.yaml", output="now")


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "nothing", '{"recipe": {}, "inputs": 3}', '{"recipe": [], "inputs": []}',
     '{"recipe": {}, "inputs": [{}]}', '{"recipe": {}, "inputs": [], "shard_bytes": "1"}'],
)  # fmt: skip
def test_what_is_no_manifest_is_told(place, content, capsys):
    Path("outliermerge.json").write_text(content)
    assert cli.main(["run", "outliermerge.json", "out"]) == 2
    said = capsys.readouterr().err
    assert "outliermerge.json" in said and "Traceback" not in said


def test_an_absent_manifest_is_told(place, capsys):
    assert cli.main(["run", "gone/outliermerge.json", "out"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_manifest_of_before_recipes_is_run_as_its_spec_says(place):
    outliermerge.run("spec.yaml", output="first")
    manifest = json.loads(Path("first/outliermerge.json").read_text())
    del manifest["recipe"]
    Path("old.outliermerge.json").write_text(json.dumps(manifest))
    outliermerge.run("old.outliermerge.json", output="again")
    assert weights(Path("again")) == weights(Path("first"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_hub_ids_get_the_commit_that_was_read(place, monkeypatch, revision):
    """A folder stands in for the hub's cache."""
    snapshot = place / "hub" / "models--org--tuned.1" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    shutil.move(place / "models" / "a", snapshot)
    monkeypatch.setattr(
        "outliermerge.planning.inputs.resolve",
        lambda name: snapshot if name.startswith("org/") else (place / name),
    )
    spec = SPEC | {
        "models": [{"model": f"org/tuned.1{revision}"}, {"model": "models/b"}],
        "tokenizer_source": f"org/tuned.1{revision}",
    }
    recipe = recipe_of(outliermerge.plan(spec))
    assert recipe["models"][0]["model"] == f"org/tuned.1@{COMMIT}"
    assert recipe["tokenizer_source"] == f"org/tuned.1@{COMMIT}"
    assert recipe["base_model"] == str(place / "models" / "base")
    outliermerge.run(spec, output="out")
    card = Path("out/README.md").read_text()
    assert f"[`org/tuned.1{revision}`](https://huggingface.co/org/tuned.1)" in card


@pytest.mark.parametrize(
    ("model", "base", "wanted"),
    [
        ("lora", "models/base", "{place}/lora"),
        ("models/base+lora", "models/base", "{place}/models/base+{place}/lora"),
        ("lora", None, "{place}/models/base+{place}/lora"),
        ("models/base+lora", None, "{place}/models/base+{place}/lora"),
    ],
)
def test_adapters_are_named_with_what_they_change(place, monkeypatch, model, base, wanted):
    save_lora(
        place / "lora",
        {"head.lora_A.weight": torch.randn(1, 30), "head.lora_B.weight": torch.randn(20, 1)},
        base_model_name_or_path="./models/base",
        target_modules=["head"],
    )
    spec = {"merge_method": "passthrough", "models": [{"model": model}]}
    if base is not None:
        spec |= {"merge_method": "task_arithmetic", "base_model": base}
    outliermerge.run(spec, output="first")
    recipe = yaml.safe_load(Path("first/recipe.yaml").read_text())
    assert recipe["models"][0]["model"] == wanted.format(place=place)
    assert not Path("first/mergekit_config.yml").exists()
    monkeypatch.chdir(place / "elsewhere")
    outliermerge.run("../first/recipe.yaml", output="again")
    assert weights(Path("again")) == weights(place / "first")


def test_a_changed_recipe_is_found_by_verify(place, capsys):
    outliermerge.run("spec.yaml", output="first")
    recipe = Path("first/recipe.yaml")
    recipe.write_text(recipe.read_text() + "seed: 1\n")
    assert outliermerge.verify("first") == ["file recipe.yaml: its contents changed"]


def test_flags_that_change_bytes_are_in_the_command(place):
    from outliermerge.output.recipe import command

    planned = outliermerge.plan("spec.yaml", shard_size=5000)
    options = outliermerge.RunOptions(kernels=False).on_this_machine()
    results = {"w": SimpleNamespace(non_finite=["in models/a"])}
    assert command(planned, options, results) == (
        "outliermerge run recipe.yaml DIR --shard-size 5000 --no-kernels --allow-non-finite"
    )


def test_errors_name_outputs_as_they_were_named(place):
    with pytest.raises(OutlierMergeError, match=r"^nothing: no such file or folder"):
        outliermerge.verify("nothing")
    outliermerge.run("spec.yaml", output="deep/out")
    for name in ("deep/out", "./deep/out", "deep/../deep/out"):
        with pytest.raises(OutlierMergeError, match=r"^deep/(\.\./deep/)?out: exists already"):
            outliermerge.run("spec.yaml", output=name)
    (place / "deep" / "out" / "model.safetensors").write_bytes(b"")
    (said, *_) = outliermerge.verify("deep/out")
    assert said.startswith("deep/out/model.safetensors: ")
    (place / "link").symlink_to("deep")
    with pytest.raises(OutlierMergeError, match=f"^{place}/deep/out: exists already"):
        outliermerge.run("spec.yaml", output="link/out")


def test_a_spec_without_output_is_told_without_a_line(place):
    with pytest.raises(SpecError, match=r"^spec\.yaml: no output: give output or"):
        outliermerge.run("spec.yaml")
