"""Shipped specs, the README's commands, and the real checkpoints of the demo."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import llava_replicas
import pytest
import torch
import transformers
import yaml
from checkpoints import fine_tune, load_folder, save_model
from safetensors.torch import load_file, save_file

import outliermerge

ROOT = Path(__file__).parent.parent
SPECS = sorted((ROOT / "merge_configs").glob("*.yaml"))
sys.path.insert(0, str(ROOT / "demo"))


@pytest.fixture(scope="module")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from fetch import fetch

    return fetch(tmp_path_factory.mktemp("real") / "models")


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_shipped_spec_merges_small_replicas(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = yaml.safe_load(path.read_text())
    base = document.get("base_model") or document["models"][0]["model"]
    if path.stem.startswith("llava"):
        llava_replicas.save_all(tmp_path)
    elif path.stem.startswith("tiny"):
        (tmp_path / "evals").symlink_to(ROOT / "evals")
    else:
        save_model("bert", tmp_path / base, dtype=torch.float32)
        for number, entry in enumerate(document["models"]):
            if entry["model"] != base:
                fine_tune(tmp_path / base, tmp_path / entry["model"], seed=number)
    result = outliermerge.run(path)
    assert result.output == Path(document["output"])
    assert outliermerge.verify(result.output) == []
    stored = {"llava": "float16", "tiny": "bfloat16"}  # as the base is
    wanted = document.get("out_dtype", stored.get(path.stem.partition("_")[0], "float32"))
    assert {str(t.dtype) for t in load_folder(result.output).values()} == {f"torch.{wanted}"}


def test_min_sigma_of_the_real_fine_tune_is_the_fine_tune_bit_for_bit(real_models, tmp_path):
    base, tuned = real_models["all-MiniLM-L6-v2"], real_models["sre-embedding-model"]
    result = outliermerge.run(
        {
            "merge_method": "min_sigma",
            "base_model": str(base),
            "models": [{"model": str(tuned)}],
            "missing": "base",
        },
        output=tmp_path / "out",
    )
    merged = load_file(result.output / "model.safetensors")
    expected = load_file(tuned / "model.safetensors")
    extra = load_file(base / "model.safetensors")["embeddings.position_ids"]
    assert merged.keys() - expected.keys() == {"embeddings.position_ids"}
    assert torch.equal(merged["embeddings.position_ids"], extra)
    for name, tensor in expected.items():
        assert torch.equal(merged[name].view(torch.int32), tensor.view(torch.int32)), name


def test_a_buffer_that_the_real_fine_tune_lacks_is_told(real_models):
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(real_models["all-MiniLM-L6-v2"]),
        "models": [{"model": str(real_models["sre-embedding-model"])}],
    }
    assert any("embeddings.position_ids" in note for note in outliermerge.plan(spec).notes)
    with pytest.raises(outliermerge.OutlierMergeError, match=r"embeddings\.position_ids: not in"):
        outliermerge.plan(spec | {"missing": "error"})


def test_min_sigma_of_two_real_task_models_follows_the_rule(real_models, tmp_path):
    base, tuned = real_models["all-MiniLM-L6-v2"], real_models["sre-embedding-model"]
    other = tmp_path / "other"
    other.mkdir()
    w, a = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    # A second task model with real statistics: the fine-tune's change, mirrored within a tensor.
    b = {name: w[name] + (a[name] - w[name]).flatten().flip(0).view_as(w[name]) for name in a}
    save_file(b, other / "model.safetensors")
    result = outliermerge.run(
        {
            "merge_method": "min_sigma",
            "base_model": str(base),
            "models": [{"model": str(tuned)}, {"model": str(other)}],
            "missing": "base",
        },
        output=tmp_path / "out",
    )
    merged = load_file(result.output / "model.safetensors")
    for name in a:
        base64 = w[name].double()
        deltas = torch.stack([(x[name] - w[name]).double() for x in (a, b)])
        sigma = deltas.flatten(1).std(1, correction=0).min()
        kept = torch.where(deltas.abs() > 2 * sigma, deltas, deltas / 2)
        scale = base64.abs().max().clamp_min(1e-3)
        assert (merged[name].double() - (base64 + kept.sum(0))).abs().max() <= 3e-7 * scale, name


def _commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_names_the_two_set_up_commands_and_the_main_job():
    commands = _commands()
    assert commands[:2] == ["make demo", "make test"]
    assert any(command.startswith("outliermerge run ") for command in commands)


def _link_the_project(folder: Path) -> None:
    """Make a folder in which the README's commands run, but for `make`."""
    if (folder / "evals").exists():
        return
    (folder / "merge_configs").symlink_to(ROOT / "merge_configs")
    (folder / "evals" / "data").mkdir(parents=True)
    for path in (ROOT / "evals").iterdir():
        if path.name != "data":
            (folder / "evals" / path.name).symlink_to(path)
    command = [sys.executable, str(ROOT / "evals" / "family" / "data.py"), "evals/data"]
    subprocess.run(command, cwd=folder, check=True)


@pytest.mark.parametrize("command", [c for c in _commands() if not c.startswith("make ")])
def test_every_readme_command_runs(command, real_models, tmp_path_factory):
    folder = real_models["all-MiniLM-L6-v2"].parent.parent
    _link_the_project(folder)
    if "llava" in command and not (folder / "llava-hf").exists():
        llava_replicas.save_all(folder)
    arguments = shlex.split(command)
    assert arguments[0] == "outliermerge"
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("study", ["weights", "peft"])
def test_the_readme_shows_rows_of_the_studies(study):
    shown = (ROOT / "README.md").read_text().partition("## Looking at weights")[2]
    shown = shown.partition("\n## ")[0]
    rows = [line for line in shown.splitlines() if re.search(r"\d ± \d", line) and line[0] == "|"]
    committed = {
        name: set((ROOT / "evals" / name / "README.md").read_text().splitlines())
        for name in ("weights", "peft")
    }
    assert len([row for row in rows if row in committed[study]]) >= 4
    assert all(any(row in lines for lines in committed.values()) for row in rows)


def test_every_figure_of_the_weights_is_shown_and_every_picture_is_there():
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()))
    assert all((ROOT / path).read_bytes().startswith(b"\x89PNG") for path in shown)
    figures = (ROOT / "evals" / "weights" / "figures").iterdir()
    assert {path.relative_to(ROOT).as_posix() for path in figures} <= shown


def test_the_make_targets_of_the_readme_exist():
    for target in (
        "demo",
        "demo-minilm",
        "study",
        "study-peft",
        "weight-tables",
        "eval-paper",
        "test",
        "check",
        "bench",
    ):
        done = subprocess.run(
            ["make", "-n", target, "VENV=absent"],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "venv" in done.stdout
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(target in listed for target in ("demo", "test", "check", "bench"))


def test_the_minilm_demo_compares_base_fine_tune_and_merges(real_models):
    folder = real_models["all-MiniLM-L6-v2"].parent.parent
    _link_the_project(folder)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo" / "minilm.py")],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "103 of 103 tensors equal the fine-tune bit for bit" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "no space left on device" in line)
    base, tuned, min_sigma, half, _ties = (float(cell) for cell in row.split()[-5:])
    assert min_sigma == tuned and base < half < tuned


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft reads it
def test_readme_python_examples_run(real_models, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    folder = real_models["all-MiniLM-L6-v2"].parent.parent
    _link_the_project(folder)
    monkeypatch.chdir(folder)
    w = torch.zeros(4)
    a, b = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    names = {"w": w, "a": a, "b": b, "base": {"w": w}, "tuned_a": {"w": a}, "tuned_b": {"w": b}}
    save_model("llama", tmp_path / "llama", dtype=torch.float32)
    names["model"] = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    module = tmp_path / "readme_examples.py"
    for number, block in enumerate(blocks):
        module.write_text(block)
        code = compile(block, str(module), "exec")
        space = {"__name__": f"readme_{number}", **names}
        sys.modules[space["__name__"]] = type(sys)(space["__name__"])
        exec(code, space)
    assert len(blocks) == 3
    assert (folder / "merged" / "adapter" / "adapter_model.safetensors").is_file()
    assert torch.equal(space["tensor"], torch.tensor([0.5, 0.7, 0, 0]))
