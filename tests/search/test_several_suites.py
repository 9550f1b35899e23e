"""Searches by several suites: each counts alike, on a scale of its own, or is an objective."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import save_tensors
from text_models import save_text_model

from outliermerge.cli.main import main as cli
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.evaluation.suite import load_suite
from outliermerge.search.questions import sample
from outliermerge.search.suites import SuiteScorer
from outliermerge.search.workplace import Merged

ROOT = Path(__file__).parents[2]
TINY = ROOT / "evals" / "tiny-text.yaml"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, mean in (("base", 0.0), ("a", 1.0), ("b", 0.2)):
        save_tensors(tmp_path / name, {"w": torch.full((40, 30), mean)})
    models = [{"model": "a"}, {"model": "b"}]
    spec = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "space.yaml").write_text("lambda: {low: 0.1, high: 1.5}\n")
    return tmp_path


def searched(*words: str) -> Any:
    given = ["search", "spec.yaml", "--space", "space.yaml", "-o", "out", "--questions", "8", "-q"]
    assert cli([*given, *words]) == 0
    return json.loads(Path("out/result.json").read_text())


def known(*scores: tuple[float, float, float]) -> list[dict[str, dict[str, float]]]:
    """Return the answers of models: in suite x tasks p and q, in suite y task p."""
    names = ("x/p", "x/q", "y/p")
    return [
        {name: {str(i): own + i / 100 for i in range(8)} for name, own in zip(names, one)}  # noqa: B905
        for one in scores
    ]


class TestScale:
    models = known((0, 10, 2), (40, 50, 3), (20, 30, 7))

    def test_a_suite_goes_from_the_worst_to_the_best_of_the_known_models(self):
        found = sample(self.models, number=4, seed=0, suites=("x", "y"))
        assert found.suites["x"].tasks == ("x/p", "x/q")
        assert found.suites["y"].best - found.suites["y"].worst == pytest.approx(5)
        middle = {"x/p": 30.0, "x/q": 40.0, "y/p": 4.0}
        shift = statistics.fmean(i / 100 for i in map(int, found.searched["y/p"]))
        objectives = found.objectives({name: value + shift for name, value in middle.items()})
        assert objectives["y"] == pytest.approx(0.4)
        assert objectives["x"] == pytest.approx(0.75, abs=0.01)
        assert found.overall({n: v + shift for n, v in middle.items()}) == pytest.approx(
            statistics.fmean(objectives.values())
        )
        errors = {"x/p": 3.0, "x/q": 4.0, "y/p": 0.5}
        expected = ((2.5 / 40) ** 2 + 0.1**2) ** 0.5 / 2
        assert found.stderr(errors) == pytest.approx(expected)
        assert found.stderr({**errors, "y/p": None}) is None

    def test_a_suite_that_tells_no_models_apart_is_refused(self):
        alike = known((0, 10, 2), (40, 50, 2))
        with pytest.raises(OutlierMergeError, match="suite y: all models that are known"):
            sample(alike, number=4, seed=0, suites=("x", "y"))


class TestFunctions:
    suites = ("--suite", "scored:closeness", "--suite", "scored:two_tasks")

    def test_suites_count_alike_and_the_table_has_their_own_units(self, place, capsys):
        found = searched(*self.suites, "--trials", "4")
        tasks = ["closeness/score", "two_tasks/one", "two_tasks/zero"]
        assert list(found["questions"]) == tasks
        assert found["objectives"] == ["closeness", "two_tasks"]
        for row in found["rows"]:
            own = [
                row["tasks"][tasks[0]],
                statistics.fmean(row["tasks"][task] for task in tasks[1:]),
            ]
            scaled = [
                (score - suite["worst"]) / (suite["best"] - suite["worst"])
                for score, suite in zip(own, found["suites"].values(), strict=True)
            ]
            assert row["held_out"] == pytest.approx(statistics.fmean(scaled))
        assert all(len(trial["values"]) <= 1 for trial in found["trials"])
        said = capsys.readouterr().out
        assert "closeness | two_tasks |" in said and "in their own units" in said
        assert cli(["report", "out", "-o", "page.html"]) == 0

    def test_suites_are_objectives_of_nsga2(self, place):
        found = searched(*self.suites, "--trials", "4", "--sampler", "nsga2")
        assert all(len(trial["values"]) == 2 for trial in found["trials"])
        assert found["front"]
        assert cli(["report", "out", "-o", "page.html"]) == 0
        assert ">two_tasks</text>" in Path("page.html").read_text()

    @pytest.mark.parametrize(
        ("suites", "said"),
        [
            (("scored:closeness", "scored:closeness"), "two suites are called closeness"),
            (("scored:closeness", str(TINY)), "tiny-text.yaml is asked by a harness"),
            ((str(TINY), str(ROOT / "evals/tiny.yaml")), "`harness` is lm_eval in one, lmms_eval"),
        ],
    )
    def test_what_one_loaded_model_does_not_serve_is_refused(self, suites, said, place, capsys):
        words = ["search", "spec.yaml", "--space", "space.yaml", "-o", "out"]
        words += [word for name in suites for word in ("--suite", name)]
        assert cli(words) == 2
        assert said in capsys.readouterr().err
        assert not Path("out").exists()


def written(folder: Path, name: str, **changes: Any) -> Any:
    """Return a copy of the tiny suite, with some of its keys changed."""
    document = yaml.safe_load(TINY.read_text()) | {"tasks_folder": str(TINY.parent / "tiny_text")}
    (folder / name).write_text(yaml.safe_dump(document | changes))
    return load_suite(folder / name)


class TestOfOneHarness:
    @pytest.mark.faults
    def test_one_process_asks_them_as_it_asks_each(self, tmp_path, monkeypatch, warm):
        monkeypatch.setattr(sys, "executable", str(warm))
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        save_text_model(tmp_path / "model", seed=1)
        model = Merged(tmp_path / "model", "model", 0)
        tasks = yaml.safe_load(TINY.read_text())["tasks"]
        both = [
            written(tmp_path, "few.yaml", tasks=tasks[:1], limit=3),
            written(tmp_path, "none.yaml", tasks=[tasks[0] | {"num_fewshot": 0}], limit=4),
        ]

        def scores(*suites: Any) -> Any:
            scorer = SuiteScorer(*suites, folder=tmp_path / "work")
            try:
                return scorer.suites, scorer.score(model, None)
            finally:
                scorer.close()

        names, found = scores(*both)
        assert names == ("few", "none")
        alone = [scores(suite) for suite in both]
        assert [own for own, _ in alone] == [(), ()]
        assert found == {"few/sums": alone[0][1]["sums"], "none/sums": alone[1][1]["sums"]}
        assert found["few/sums"].keys() == {"0", "1", "2"}
        assert list((tmp_path / "work").iterdir()) == []

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"batch_size": 4}, "`batch_size` is 1 in one, 4 in the other"),
            ({"apply_chat_template": True}, "`apply_chat_template` is False in one"),
            ({"tasks_folder": "."}, "different folders as `tasks_folder`"),
            ({"data": "."}, "different folders as `data`"),
            ({"tasks_folder": None}, "has a task tiny_sums, which the other names"),
        ],
    )
    def test_those_that_need_another_process_are_refused(self, changes, said, tmp_path):
        suites = written(tmp_path, "a.yaml"), written(tmp_path, "b.yaml", **changes)
        with pytest.raises(SpecError) as error:
            SuiteScorer(*suites, folder=tmp_path / "work")
        assert said in str(error.value)
        assert "the suites a and b cannot be searched together" in str(error.value)
