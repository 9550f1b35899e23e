"""What analyses may write over: their own earlier results, and nothing else."""

from __future__ import annotations

import os

import pytest
import torch
from checkpoints import save_tensors

from outliermerge.cli.main import main

FILES = {"page": "-o", "json": "--json", "csv": "--csv", "parquet": "--parquet", "png": "--png"}


@pytest.fixture
def model(tmp_path):
    return save_tensors(tmp_path / "model", {"layers.0.w.weight": torch.randn(8, 8)})


def command(kind, model, file):
    start = {"page": ["report", str(model)], "png": ["simulate", "--points", "4000"]}
    return [*start.get(kind, ["stats", str(model)]), FILES[kind], str(file), "--quiet"]


@pytest.mark.parametrize("kind", FILES)
def test_an_earlier_result_and_an_empty_file_are_replaced(kind, model, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert main(command(kind, model, file)) == 0
    first = file.stat()
    assert first.st_size
    assert main(command(kind, model, file)) == 0
    assert file.stat().st_ino != first.st_ino  # by a new file, not in place


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "content", [b"merge_method: linear\n", b"{}", b"\x89PNG\r\n\x1a\n", b"PAR1" * 9, b"<html>"]
)
def test_other_files_stay(kind, content, model, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(content)
    assert main(command(kind, model, file)) == 1
    assert file.read_bytes() == content
    assert "is not replaced" in capsys.readouterr().err


@pytest.mark.parametrize("kind", FILES)
def test_weights_stay_and_so_do_links_to_them(kind, model, tmp_path, capsys):
    (weights,) = model.glob("*.safetensors")
    content = weights.read_bytes()
    (tmp_path / "link").symlink_to(weights)
    for file in (weights, tmp_path / "link"):
        assert main(command(kind, model, file)) == 1
    assert weights.read_bytes() == content and (tmp_path / "link").is_symlink()


def test_nothing_in_the_folder_of_a_model_is_replaced(model, capsys):
    (model / "config.json").write_text("{}")
    page = model / "page.html"
    assert main(command("page", model, page)) == 0
    assert main(command("page", model, page)) == 1
    assert "in the folder of a model" in capsys.readouterr().err


def test_a_device_is_written_to(model):
    assert main(command("json", model, os.devnull)) == 0


def test_a_table_of_scores_does_not_replace_other_text(tmp_path, capsys):
    (tmp_path / "notes.md").write_text("# Notes\n")
    assert main(["compare", "none.json", "--markdown", str(tmp_path / "notes.md")]) == 1
    assert (tmp_path / "notes.md").read_text() == "# Notes\n"
    assert "is not a table of scores by outliermerge" in capsys.readouterr().err
