"""Shipped specs, the targets of `make`, and the real checkpoints of the demo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llava_replicas
import pytest
import torch
import vlm_replicas
import yaml
from checkpoints import fine_tune, load_folder, save_model
from documents import link_the_project
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
    elif path.stem.startswith("vlm"):
        vlm_replicas.save_vlm(tmp_path / vlm_replicas.VLM)
        vlm_replicas.save_llm(tmp_path / vlm_replicas.MATHS)
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
    stored = {"llava": "float16", "vlm": "float16", "tiny": "bfloat16"}  # as the base is
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


def test_the_make_targets_exist():
    for target in (
        "install",
        "demo",
        "demo-minilm",
        "study",
        "study-peft",
        "paper-table2",
        "paper-table3",
        "evidence",
        "weight-tables",
        "eval-paper",
        "test",
        "check",
        "docs",
        "release-check",
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
    assert all(target in listed for target in ("demo", "test", "check", "docs", "bench"))


def test_the_minilm_demo_compares_base_fine_tune_and_merges(real_models, warm):
    folder = real_models["all-MiniLM-L6-v2"].parent.parent
    link_the_project(folder)
    path = os.pathsep.join([str(warm.parent), os.environ["PATH"]])
    done = subprocess.run(
        [warm, str(ROOT / "demo" / "minilm.py")],
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
