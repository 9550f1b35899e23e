"""Paths that lead to no model: what was meant is said, and the hub is not asked in vain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.checkpoint.folders import hub
from outliermerge.checkpoint.folders.absent import hub_id_of, is_slip
from outliermerge.errors import OutlierMergeError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models in it, where the hub cannot be asked."""
    here = tmp_path / "here"
    for name in ("llama-chat", "llama-2-7b", "runs/checkpoint-10"):
        save_tensors(here / "models" / name, {"w": torch.ones(2, 2)})
        (here / "models" / name / "config.json").write_text("{}")
    (here / "models" / "notes").mkdir()
    (here / "models" / "notes" / "todo.txt").write_text("")
    monkeypatch.chdir(here)

    def refuse(*arguments: object) -> Path:
        raise OutlierMergeError("the hub was asked.")

    monkeypatch.setattr(hub, "_fetch", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return here


def _refusal(*models: str) -> str:
    spec = {"merge_method": "linear", "models": [{"model": model} for model in models]}
    with pytest.raises(OutlierMergeError) as raised:
        outliermerge.plan(spec)
    return str(raised.value)


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("models/llama-caht", "models/llama-chat"),
        ("model/llama-chat", "models/llama-chat"),
        ("models/llama-chat ", "models/llama-chat"),
        ("Models/llama-chat", "models/llama-chat"),
        ("./models/llama-caht", "models/llama-chat"),
        ("models/runs/checkpoint-1O", "models/runs/checkpoint-10"),
        ("models/run/checkpoint-10", "models/runs/checkpoint-10"),
        ("models/llama-chat/model.safetensor", "models/llama-chat/model.safetensors"),
        ("HERE/models/llama-cht", "HERE/models/llama-chat"),
    ],
)
def test_what_was_meant_is_said_before_the_hub_is_asked(place, reference, meant):
    reference, meant = (text.replace("HERE", str(place)) for text in (reference, meant))
    message = _refusal(reference)
    assert message.startswith(f"spec: models[0].model: model {reference!r}: no such file or folder")
    assert f"Did you mean {meant!r}?" in message
    assert "the hub was asked" not in message


@pytest.mark.parametrize(
    "reference",
    [
        "models/llama-caht@main",  # a revision is the hub's
        "models/llama-2-13b",  # another version, not a slip
        "models/llama-3-7b",
        "meta/llama-chat",
        "models/note",  # near a folder that is no model
        "org/name",
    ],
)
def test_what_can_be_a_hub_id_is_asked_for(place, reference):
    message = _refusal(reference)
    assert "the hub was asked" in message
    if "/" in reference and reference.startswith("models/") and "@" not in reference:
        assert "The folder models has: llama-2-7b, llama-chat, notes, runs" in message


def test_a_repository_in_the_cache_is_no_slip(place, tmp_path):
    (tmp_path / "cache" / "models--models--llama-caht").mkdir(parents=True)
    assert "the hub was asked" in _refusal("models/llama-caht")


def test_all_absent_models_are_told_at_once_and_none_is_fetched_before(place):
    lines = _refusal("org/name", "models/llama-caht", "./nowhere", "nowhere").split("\n")
    assert [line.split(": ")[1] for line in lines] == [
        "models[1].model", "models[2].model", "models[3].model"
    ]  # fmt: skip


def test_of_a_base_and_its_adapter_each_is_looked_at(place):
    assert "'models/llama-caht'" in _refusal("models/llama-chat+models/llama-caht")
    assert "'models/llama-caht'" in _refusal("models/llama-caht+models/llama-chat")


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/org/name",
        "huggingface.co/org/name",
        "https://hf.co/org/name/tree/main",
        "https://huggingface.co/org/name/blob/main/config.json",
    ],
)
def test_an_address_is_told_as_a_hub_id(place, address):
    wanted = "org/name@main" if "/main" in address else "org/name"
    assert hub_id_of(address) == wanted
    assert f"is an address, write {wanted!r}" in _refusal(address)


def test_a_path_that_starts_from_the_spec_is_told(place, tmp_path):
    (place / "specs").mkdir()
    (place / "specs" / "own").symlink_to(place / "models", target_is_directory=True)
    spec = place / "specs" / "merge.yaml"
    spec.write_text("merge_method: linear\nmodels: [{model: own/llama-chat}]\n")
    with pytest.raises(OutlierMergeError) as raised:
        outliermerge.plan(spec)
    assert "Paths start from the folder where the command runs" in str(raised.value)
    assert str(raised.value).endswith(f"write {str(Path('specs', 'own', 'llama-chat'))!r}")
    assert f"({place / 'own' / 'llama-chat'})" in str(raised.value)


def test_a_folder_of_models_names_one_of_them(place):
    message = _refusal("models/runs")
    assert message.endswith("a model is in it: did you mean models/runs/checkpoint-10?")
    assert "did you mean" not in _refusal("models/notes")


def test_a_file_of_a_model_names_its_folder(place):
    message = _refusal("models/llama-chat/config.json")
    assert message.endswith(f"Name its folder: {place}/models/llama-chat")


@pytest.mark.parametrize(
    ("one", "other", "slip"),
    [
        ("llama-caht", "llama-chat", True),
        ("llama_chat", "llama-chat", True),
        ("Llama-Chat", "llama-chat", True),
        ("mistral", "mixtral", True),
        ("Qwen2-7B", "Qwen2-0.5B", False),
        ("v0.1", "v0.2", False),
        ("llama-base", "llama-chat", False),
        ("llama", "llama-chat", False),
    ],
)
def test_versions_are_no_slips(one, other, slip):
    assert is_slip(one, other) == slip
