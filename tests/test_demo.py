"""`make demo` with few questions, and `make eval-paper` where it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
ROWS = [
    "base", "instruct", "maths", "average", "task arithmetic", "TIES", "min-σ, t=3", "min-σ, t=2"
]  # fmt: skip
LIMIT = 12


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Path:
    """The folder after the demo has run in it; its commands are run by a warm Python."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "merge_configs").symlink_to(ROOT / "merge_configs")
    evals = folder / "evals"
    evals.mkdir()
    for name in ("family", "tasks", "tiny.yaml"):
        (evals / name).symlink_to(ROOT / "evals" / name)
    (evals / "data").mkdir()
    done = subprocess.run(
        [warm, str(ROOT / "evals" / "demo.py"), "--limit", str(LIMIT)],
        cwd=folder,
        env=ENVIRONMENT | {"PATH": os.pathsep.join([str(warm.parent), os.environ["PATH"]])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def test_the_demo_scores_parents_and_merges_by_lmms_eval(demo):
    scores = json.loads((demo / "scores" / "tiny" / "scores.json").read_text())
    assert [model["name"] for model in scores["models"]] == ROWS
    merges = [model["merge"] and model["merge"]["method"] for model in scores["models"]]
    sigma = ["min_sigma", "min_sigma"]
    assert merges == [None, None, None, "linear", "task_arithmetic", "ties", *sigma]
    for model in scores["models"]:
        assert list(model["tasks"]) == ["attributes", "mathematics"]
        for task in model["tasks"].values():
            assert task["num_samples"] == task["num_units"] == LIMIT
            assert 0 <= task["score"] <= 100
            assert task["num_empty"] == 0
    assert len({model["fingerprint"] for model in scores["models"]}) == len(ROWS)


def test_the_demo_prints_and_saves_the_table_and_the_chart(demo):
    table = (demo / "scores" / "tiny" / "scores.md").read_text()
    assert table.strip() in (demo / "printed").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert [row for row in rows[2:] if row] == ROWS
    assert [cell.strip() for cell in table.splitlines()[0].split("|")[2:-1]] == [
        "attributes", "mathematics", "avg", "gain"
    ]  # fmt: skip
    chart = (demo / "scores" / "tiny" / "scores.png").read_bytes()
    assert chart.startswith(b"\x89PNG") and len(chart) > 10_000


def test_the_papers_evaluation_says_at_once_what_this_machine_lacks(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "evals" / "paper.py")],
        cwd=tmp_path,
        env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: this machine lacks a CUDA device (torch finds none)")
    assert "the hub at" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_make_eval_wants_a_model():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--no-print-directory", "-o", ".venv/.eval", "eval"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "make eval MODEL=" in done.stderr


def test_the_documents_show_the_committed_results_of_the_small_family():
    page = (ROOT / "docs" / "evidence.md").read_text()
    family = ROOT / "evals" / "family"
    table, facts = (family / "scores.md").read_text().split("\n\n")[:2]
    assert table in page and facts.splitlines()[0] in page
    assert "(../evals/family/scores.png)" in page
    assert (family / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert (family / "study.md").read_text().strip() in page
    study = json.loads((family / "study.json").read_text())
    assert len(study["seeds"]) == 5
    monkey = pytest.MonkeyPatch()
    monkey.syspath_prepend(str(ROOT))
    try:
        from evals.family.study import report
    finally:
        monkey.undo()
    assert report(study) == (family / "study.md").read_text()
