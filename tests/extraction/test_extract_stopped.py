"""Extractions that are stopped, that find others at work, or whose models change meanwhile.

What fails at each call is in tests/output/test_output_faults.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors

from outliermerge.cli.main import main
from outliermerge.extraction.written import AdapterFolder
from outliermerge.output.journal import Journal


@pytest.fixture
def command(tmp_path: Path, own_cache: Path) -> list[str]:
    """A model with a token more than its base, whose tokenizer belongs to the adapter."""
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(("base", "tuned")):
        tensors = {
            "model.embed_tokens.weight": torch.randn(5 + number, 8, generator=generator),
            "model.layers.0.mlp.up_proj.weight": torch.randn(12, 8, generator=generator),
        }
        save_tensors(tmp_path / name, tensors)
        (tmp_path / name / "tokenizer.json").write_text('{"version": "1.0"}')
    words = ["extract", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--rank", "2"]
    return [*words, "-o", str(tmp_path / "adapter"), "--no-load-check", "-q"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"base", "tuned", "cache"}


@pytest.fixture
def killed(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What an extraction leaves that is killed just before the adapter gets its name."""

    def killed(folder: AdapterFolder, *error: object) -> None:
        folder._journal._close()

    with monkeypatch.context() as patch:
        patch.setattr("outliermerge.extraction.written.move_new", _interrupt)
        patch.setattr(AdapterFolder, "__exit__", killed)
        assert main(command) == 130
    assert names(tmp_path) == {"adapter.partial", "adapter.partial.journal"}
    yield tmp_path / "adapter.partial"


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_the_same_command_makes_anew_what_a_killed_one_has_left(
    killed: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = {path.name: path.read_bytes() for path in killed.iterdir()}
    assert "tokenizer.json" in left
    (killed / "notes.txt").write_text("mine")
    assert main(command) == 1
    assert "notes.txt" in capsys.readouterr().err and (killed / "tokenizer.json").exists()
    (killed / "notes.txt").unlink()
    assert main(command) == 0
    assert names(tmp_path) == {"adapter"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == left


def test_what_is_unfinished_is_no_model_and_no_output(
    killed: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(tmp_path / "base")
    for model in (str(killed), f"{base}+{killed}"):
        spec = {"merge_method": "passthrough", "models": [{"model": model}]}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        assert main(["plan", str(tmp_path / "spec.json"), "-q"]) in (1, 2)
        assert "is not finished" in capsys.readouterr().err
    merge = {"merge_method": "passthrough", "models": [{"model": base}]}
    (tmp_path / "spec.json").write_text(json.dumps(merge))
    assert main(["run", str(tmp_path / "spec.json"), "-o", str(tmp_path / "adapter"), "-q"]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert main(command) == 0


def test_one_process_makes_an_adapter_at_a_time(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path / "adapter")
    try:
        assert main(command) == 1
        assert "another run" in capsys.readouterr().err
        journal.begin({"the spec": {}})
    finally:
        journal.close()
    assert main(command) == 1  # a merge that was killed
    assert "was begun by a merge" in capsys.readouterr().err
    assert names(tmp_path) == {"adapter.partial.journal"}


def test_a_kill_after_the_adapter_has_its_name_leaves_a_journal_for_the_next_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", _interrupt)
        assert main(command) == 130
    assert names(tmp_path) == {"adapter", "adapter.partial.journal"}
    assert main(command) == 1
    assert names(tmp_path) == {"adapter"}


@pytest.mark.parametrize("of_merge", [False, True])
def test_a_model_that_is_written_to_meanwhile_is_noticed(
    of_merge: bool,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "tuned" / "model.safetensors"
    if of_merge:
        save_tensors(tmp_path / "tuned", {"model.layers.0.mlp.up_proj.weight": torch.ones(12, 8)})
        save_tensors(tmp_path / "base", {"model.layers.0.mlp.up_proj.weight": torch.zeros(12, 8)})
        spec = {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(tmp_path / "tuned")}],
        }
        (tmp_path / "spec.yaml").write_text(json.dumps(spec))
        command = ["extract", str(tmp_path / "spec.yaml"), *command[4:]]
    close = AdapterFolder.close_weights

    def change_and_close(folder: AdapterFolder, *config: dict) -> None:
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
        close(folder, *config)

    monkeypatch.setattr(AdapterFolder, "close_weights", change_and_close)
    assert main(command) == 1
    said = capsys.readouterr().err
    assert str(file) in said and "was written to" in said
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "adapter.partial").exists()
