"""What scores searches: suites, whose questions are those of `eval`, and unlabelled texts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import load_folder
from safetensors.torch import save_file
from text_models import save_text_model

from outliermerge.cli.main import main as cli
from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.evaluate import evaluate
from outliermerge.evaluation.suite import load_suite
from outliermerge.search.functions import is_function
from outliermerge.search.process import LateError
from outliermerge.search.scorer import LoadedModel
from outliermerge.search.stoppable import Stoppable
from outliermerge.search.suites import SuiteScorer
from outliermerge.search.unlabelled import UnlabelledScorer
from outliermerge.search.workplace import Merged

ROOT = Path(__file__).parents[2]
FAMILY = ROOT / "evals" / "family" / "models"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Three small Llamas on bytes."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("base", "a", "b")):
        save_text_model(folder / name, seed=seed)
    return folder


@pytest.fixture
def in_warm(monkeypatch, warm) -> None:
    """Have harnesses run in forks of a process that has imported them."""
    monkeypatch.setattr(sys, "executable", str(warm))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def model_at(folder: Path) -> Merged:
    return Merged(folder, checksum=str(folder), num_made=0)


def units_of(folder: Path, suite: Any, output: Path) -> dict[str, dict[str, float]]:
    """Return what `eval` says of each question."""
    (found,) = evaluate([str(folder)], suite, output=output).models
    return {title: dict(score.units) for title, score in found.tasks.items()}  # type: ignore[union-attr]


class TestSuites:
    def test_questions_of_lm_eval_score_as_in_eval(self, texts, tmp_path, in_warm):
        suite = load_suite(ROOT / "evals" / "tiny-text.yaml", limit=5)
        scorer = SuiteScorer(suite, folder=tmp_path / "work")
        try:
            whole = scorer.score(model_at(texts / "a"), None)
            chosen = {"sums": ["4", "1"], "words": ["2"], "bits per byte": ["0", "3"]}
            part = scorer.score(model_at(texts / "a"), chosen)
            other = scorer.score(model_at(texts / "b"), {"sums": ["4", "1"]})
        finally:
            scorer.close()
        expected = units_of(texts / "a", suite, tmp_path / "eval")
        assert whole["sums"] == expected["sums"] and whole["words"] == expected["words"]
        # The bits per byte of each text alone, of which less is better.
        assert all(-20 < value < 0 for value in whole["bits per byte"].values())
        assert part == {
            title: {name: whole[title][name] for name in names} for title, names in chosen.items()
        }
        assert other.keys() == {"sums"} and other["sums"].keys() == {"1", "4"}

    def test_questions_of_lmms_eval_score_as_in_eval(self, tmp_path, in_warm):
        from evals.family import data

        data.write_test_sets(tmp_path / "data", 5, 12)
        suite = load_suite(ROOT / "evals" / "tiny.yaml", limit=4, data=str(tmp_path / "data"))
        scorer = SuiteScorer(suite, folder=tmp_path / "work")
        try:
            whole = scorer.score(model_at(FAMILY / "maths"), None)
            part = scorer.score(model_at(FAMILY / "maths"), {"mathematics": ["3", "2"]})
        finally:
            scorer.close()
        assert whole == units_of(FAMILY / "maths", suite, tmp_path / "eval")
        assert part == {"mathematics": {name: whole["mathematics"][name] for name in ("2", "3")}}

    def test_what_goes_wrong_is_told_and_the_next_model_is_scored(self, texts, tmp_path, in_warm):
        suite = load_suite(ROOT / "evals" / "tiny-text.yaml", limit=4)
        scorer = SuiteScorer(suite, folder=tmp_path / "work")
        try:
            with pytest.raises(OutlierMergeError, match="tiny-text: "):
                scorer.score(model_at(tmp_path), {"sums": ["1"]})
            assert scorer.score(model_at(texts / "a"), {"sums": ["1"]})["sums"].keys() == {"1"}
            scorer._process.start().kill()
            with pytest.raises(OutlierMergeError, match=r"was killed.*log: "):
                scorer.score(model_at(texts / "a"), {"sums": ["1"]})
            with pytest.raises(LateError):
                scorer.score(model_at(texts / "a"), None, seconds=0.01)
            assert scorer.score(model_at(texts / "a"), {"sums": ["1"]})["sums"].keys() == {"1"}
        finally:
            scorer.close()

    @pytest.mark.faults
    def test_a_search_by_a_suite(self, texts, tmp_path, in_warm, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        models = [{"model": str(texts / name)} for name in ("a", "b")]
        spec = {"merge_method": "linear", "models": models}
        Path("spec.yaml").write_text(yaml.safe_dump(spec))
        Path("space.yaml").write_text("models.1.weight: {low: 0, high: 1}\n")
        words = ["spec.yaml", "--space", "space.yaml", "-o", "out", "--limit", "8", "--trials", "2"]
        suite = str(ROOT / "evals" / "tiny-text.yaml")
        assert cli(["search", *words, "--suite", suite, "--questions", "2", "-q"]) == 0
        found = json.loads(Path("out/result.json").read_text())
        assert found["questions"]["sums"] == {"asked": 2, "searched": 4, "held_out": 4}
        assert len(found["trials"]) == 2 and {t["state"] for t in found["trials"]} == {"done"}

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--suite", "absent.yaml"], "absent.yaml: no such suite"),
            (["--suite", "tinny"], "Did you mean 'tiny'"),
            (["--suite", "entropy:absent.jsonl"], "absent.jsonl: no such file of texts"),
            (["--suite", "scored:closeness", "--limit", "3"], "--limit: a function has"),
        ],
    )
    def test_what_is_not_there_is_told(self, words, said, texts, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        spec = {"merge_method": "linear", "models": [{"model": str(texts / name)} for name in "ab"]}
        Path("spec.yaml").write_text(yaml.safe_dump(spec))
        Path("space.yaml").write_text("weight: [0.2, 1]\n")
        assert cli(["search", "spec.yaml", "--space", "space.yaml", "-o", "out", *words]) in (1, 2)
        assert said in capsys.readouterr().err


class TestUnlabelled:
    @pytest.fixture
    def lines(self, tmp_path) -> str:
        lines = [json.dumps({"text": text}) for text in ("One and one.", "Two", "x = 3;", "Ende")]
        (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "texts.jsonl")

    def test_entropy_is_that_of_the_next_tokens(self, texts, lines):
        import transformers

        found = UnlabelledScorer("entropy", lines, LoadedModel("cpu")).score(
            model_at(texts / "a"), None
        )["entropy"]
        model = transformers.LlamaForCausalLM.from_pretrained(texts / "a")
        tokenizer = transformers.AutoTokenizer.from_pretrained(texts / "a")
        ids = torch.tensor([tokenizer("Two")["input_ids"]])
        with torch.no_grad():
            chances = model(ids).logits[0].double().softmax(-1)
        entropy = -(chances * chances.log()).sum(-1).mean()
        assert found["2"] == pytest.approx(-float(entropy), rel=1e-5)
        assert found.keys() == {"1", "2", "3", "4"}

    def test_agreement_is_with_the_parents(self, texts, lines):
        scorer = UnlabelledScorer("agreement", lines, LoadedModel("cpu"))
        scorer.learn("a", model_at(texts / "a"))
        alone = scorer.score(model_at(texts / "a"), {"agreement": ["1", "3"]})
        assert alone == {"agreement": {"1": 1.0, "3": 1.0}}
        scorer.learn("b", model_at(texts / "b"))
        both = scorer.score(model_at(texts / "a"), None)["agreement"]
        assert all(0.5 <= value < 1 for value in both.values())

    def test_in_a_process_of_its_own_it_agrees_alike(self, texts, lines, tmp_path, in_warm):
        scorer = Stoppable(UnlabelledScorer("agreement", lines, LoadedModel("cpu")), tmp_path)
        for name in "ab":
            scorer.learn(name, model_at(texts / name))
        try:
            alone = scorer.score(model_at(texts / "a"), {"agreement": ["2", "4"]}, seconds=300)
            assert alone == scorer.score(model_at(texts / "a"), {"agreement": ["2", "4"]})
            with pytest.raises(OutlierMergeError, match="needs models that transformers loads"):
                scorer.score(model_at(tmp_path), {"agreement": ["2"]}, seconds=300)
        finally:
            scorer.close()

    def test_a_search_by_agreement(self, texts, lines, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        models = [{"model": str(texts / name)} for name in ("a", "b")]
        spec = {"merge_method": "task_arithmetic", "base_model": str(texts / "base")}
        Path("spec.yaml").write_text(yaml.safe_dump(spec | {"models": models}))
        Path("space.yaml").write_text("models.1.weight: [0, 1]\nmodels.2.weight: [0, 1]\n")
        words = ["spec.yaml", "--space", "space.yaml", "-o", "out", "--sampler", "grid", "-q"]
        assert cli(["search", *words, "--suite", f"agreement:{lines}"]) == 0
        rows = {
            row["settings"]: row for row in json.loads(Path("out/result.json").read_text())["rows"]
        }
        alone = rows["models.1.weight=1, models.2.weight=0"]
        assert alone["held_out"] >= 0.5  # it is one of the parents

    def test_outputs_that_are_no_numbers_are_told(self, texts, lines, tmp_path):
        shutil.copytree(texts / "a", tmp_path / "broken")
        tensors = load_folder(tmp_path / "broken")
        save_file(
            {name: each * float("nan") for name, each in tensors.items()},
            tmp_path / "broken" / "model.safetensors",
            metadata={"format": "pt"},
        )
        scorer = UnlabelledScorer("entropy", lines, LoadedModel("cpu"))
        with pytest.raises(OutlierMergeError, match="entropy of text 1 is nan: the model's"):
            scorer.score(model_at(tmp_path / "broken"), None)

    def test_a_file_without_texts_is_refused(self, tmp_path):
        (tmp_path / "texts.jsonl").write_text("\n")
        with pytest.raises(OutlierMergeError, match=r"texts\.jsonl: has no texts"):
            UnlabelledScorer("entropy", str(tmp_path / "texts.jsonl"), LoadedModel("cpu"))

    @pytest.mark.parametrize(
        ("line", "said"),
        [("no", "expected {"), ('{"texts": "x"}', "text"), ('{"text": ""}', "expected a text")],
    )
    def test_wrong_lines_are_told(self, line, said, tmp_path):
        (tmp_path / "texts.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
        with pytest.raises(OutlierMergeError, match=r"texts\.jsonl:2: ") as error:
            UnlabelledScorer("entropy", str(tmp_path / "texts.jsonl"), LoadedModel("cpu"))
        assert said in str(error.value)


def test_names_of_functions_are_told_from_files():
    assert is_function("a.b:c") and not is_function("entropy:texts.jsonl")
