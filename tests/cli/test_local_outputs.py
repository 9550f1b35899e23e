"""What commands write to this machine alone is refused at an address, and makes no folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import ArgumentError

ADDRESS = "s3://bucket/file"
COMMANDS = {
    "stats --json": ["stats", "model", "--json", ADDRESS],
    "stats --csv": ["stats", "model", "--csv", ADDRESS],
    "stats --parquet": ["stats", "model", "--parquet", ADDRESS],
    "compare-weights --csv": ["compare-weights", "model", "model", "--csv", ADDRESS],
    "simulate --png": ["simulate", "--points", "10", "--png", ADDRESS],
    "simulate --json": ["simulate", "--points", "10", "--json", ADDRESS],
    "report": ["report", "model", "-o", ADDRESS],
    "report --png": ["report", "model", "-o", "page.html", "--png", ADDRESS],
    "compare --markdown": ["compare", "scores.json", "--markdown", ADDRESS],
    "compare --chart": ["compare", "scores.json", "--chart", ADDRESS],
    "eval": ["eval", "model", "--suite", "paper", "-o", ADDRESS],
    "search": ["search", "spec.yaml", "--suite", "paper", "-o", ADDRESS],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tensors(tmp_path / "model", {"w": torch.ones(4, 4)})
    (tmp_path / "spec.yaml").write_text("merge_method: linear\nmodels: [{model: model}]\n")
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("address", [ADDRESS, "hf://org/name", "gs:/bucket/file"])
def test_addresses_are_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, address: str
) -> None:
    before = sorted(here.rglob("*"))
    words = [word.replace(ADDRESS, address) for word in COMMANDS[name]]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: output {address}: ") and said.endswith("name a path")
    assert sorted(here.rglob("*")) == before


def test_the_library_refuses_them_too(here: Path) -> None:
    for output in (ADDRESS, Path(ADDRESS)):
        with pytest.raises(ArgumentError, match="a page is written to this machine"):
            outliermerge.build_report("model", output=output)
