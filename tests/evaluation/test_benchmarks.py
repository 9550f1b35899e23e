"""The suite evals/paper.yaml from end to end, on small replicas of its seven benchmarks.

A real checkpoint that answers every question rightly scores 100 on each, one that answers nothing
scores 0: through the command, lmms-eval, its own tasks and ours, and the scoring rules. MMMU is the
exception, as its rule guesses an option where an answer names none.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from oracle_llava import save_oracles
from replicas_mathvista_geoqa import EVALS, GEOQA, MATHVISTA, save_geoqa, save_mathvista
from replicas_official import AI2D, MMMU, MMSTAR, save_ai2d, save_mmmu, save_mmstar
from replicas_wemath_dynamath import DYNAMATH, WEMATH, save_dynamath, save_wemath

from outliermerge.evaluation.scores import ModelScores, Scores, load_scores

SUITE = EVALS / "paper.yaml"
SAVES: tuple[Callable[[Path], None], ...] = (
    save_mathvista, save_mmstar, save_mmmu, save_wemath, save_ai2d, save_dynamath, save_geoqa
)  # fmt: skip
OPEN = [answer for _, _, options, answer, _ in MMMU if not options]


class Benchmark(NamedTuple):
    """What is known of a benchmark's replica before it is run."""

    task: str
    num_samples: int
    units: set[str]
    metrics: set[str]  # 1 where all is right, 0 where nothing is
    reversed: frozenset[str] = frozenset()  # the other way round
    zero: frozenset[str] = frozenset()  # 0 in both


def questions(number: int) -> set[str]:
    """The names of units that are single questions."""
    return {str(i) for i in range(number)}


KINDS = ["figure_question_answering", "geometry_problem_solving", "math_word_problem",
         "textbook_question_answering", "visual_question_answering"]  # fmt: skip
BENCHMARKS = {
    "MathVista": Benchmark(
        "mathvista_direct",
        len(MATHVISTA),
        questions(len(MATHVISTA)),
        {"accuracy,none", *(f"accuracy_{kind},none" for kind in KINDS)},
    ),
    "MMStar": Benchmark(
        "mmstar",
        len(MMSTAR),
        questions(len(MMSTAR)),
        {"average,none", *(f"{category},none" for _, _, _, category, _ in MMSTAR)},
    ),
    "MMMU": Benchmark("mmmu_val", len(MMMU), questions(len(MMMU)), {"mmmu_acc,none"}),
    "WeMath": Benchmark(
        "wemath_direct",
        len(WEMATH),
        {"2steps_1", "3steps_1"},  # problems of three and of four questions
        {"accuracy,none", "strict,none", "strict_cm,none", "loose,none", "loose_cm,none"},
        reversed=frozenset({"strict_ik,none", "loose_ik,none"}),
        zero=frozenset({"strict_ig,none", "strict_rm,none", "loose_ig,none", "loose_rm,none"}),
    ),
    "AI2D": Benchmark("ai2d", len(AI2D), questions(len(AI2D)), {"exact_match,flexible-extract"}),
    "DynaMath": Benchmark(
        "dynamath_direct",
        10 * len(DYNAMATH),
        {"10", "9", "2"},  # seeds of ten variants
        {
            *("average,none", "worst,none", "average_float,none", "average_text,none"),
            "average_multiple_choice,none",
        },
    ),
    "GeoQA": Benchmark("geoqa_direct", len(GEOQA), questions(len(GEOQA)), {"accuracy,none"}),
}


class Run(NamedTuple):
    """The folder with everything, the output's folder, and what the command said."""

    place: Path
    output: Path
    stdout: str
    stderr: str

    @property
    def scores(self) -> Scores:
        return load_scores(self.output)

    def samples(self, model: str, title: str) -> list[dict[str, Any]]:
        """A model's answers to a benchmark's questions, as the run recorded them."""
        (found,) = (found for found in self.scores.models if found.name == model)
        path = (self.output / found.tasks[title].record).with_suffix(".jsonl")
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def command(python: Path, *arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Run the program in a process of its own; return what it said."""
    done = subprocess.run(
        [python, "-m", "outliermerge", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Iterator[Run]:
    place = tmp_path_factory.mktemp("benchmarks")
    (place / "data").mkdir()
    for save in SAVES:
        save(place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
        yield evaluated(place, warm)


def evaluated(place: Path, warm: Path) -> Run:
    """Train both checkpoints and run the suite on them."""
    tasks = [benchmark.task for benchmark in BENCHMARKS.values()]
    save_oracles(
        warm, place / "data", EVALS / "tasks", tasks,
        right=place / "right", mute=place / "nothing",
    )  # fmt: skip
    said = command(
        warm, "eval", place / "right", place / "nothing", "--suite", SUITE, "--device", "cpu",
        "--dtype", "float32", "--no-load-in-8bit", "--data", place / "data", "--jobs", "2",
        "--output", place / "scores",
    )  # fmt: skip
    return Run(place, place / "scores", *said)


def model(run: Run, name: str) -> ModelScores:
    (found,) = (found for found in run.scores.models if found.name == name)
    return found


@pytest.mark.parametrize("title", BENCHMARKS)
@pytest.mark.sampled(2)
def test_right_answers_score_100(run: Run, title: str) -> None:
    expected, score = BENCHMARKS[title], model(run, "right").tasks[title]
    assert (score.task, score.score, score.stderr) == (expected.task, 100, 0)
    assert (score.num_samples, score.num_empty) == (expected.num_samples, 0)
    assert score.units == dict.fromkeys(expected.units, 100)
    assert numbers(score.metrics) == (
        dict.fromkeys(expected.metrics, 1) | dict.fromkeys(expected.reversed | expected.zero, 0)
    )
    answers = [sample["resps"][0][0] for sample in run.samples("right", title)]
    assert len(answers) == expected.num_samples and len(set(answers)) > 2


@pytest.mark.parametrize("title", [title for title in BENCHMARKS if title != "MMMU"])
def test_no_answer_scores_0(run: Run, title: str) -> None:
    expected, score = BENCHMARKS[title], model(run, "nothing").tasks[title]
    assert (score.score, score.stderr) == (0, 0)
    assert score.num_empty == score.num_samples == expected.num_samples
    assert score.units == dict.fromkeys(expected.units, 0)
    assert numbers(score.metrics) == (
        dict.fromkeys(expected.metrics | expected.zero, 0) | dict.fromkeys(expected.reversed, 1)
    )
    assert warns_of_emptiness(run, title)


def warns_of_emptiness(run: Run, title: str) -> bool:
    lines = [line for line in run.stderr.splitlines() if "every answer is empty" in line]
    assert not any("right: " in line for line in lines)
    return any(f"nothing: {title}" in line for line in lines)


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics without lmms-eval's own standard errors."""
    return {key: value for key, value in metrics.items() if "_stderr" not in key}


def test_without_answers_mmmu_scores_lucky_guesses_and_no_open_question(run: Run) -> None:
    # The benchmark's rule chooses at random among the options (`eval_utils.py` of its repository,
    # parse_multi_choice_response); lmms-eval seeds with 0 before each task.
    guess = random.Random(0)
    score = model(run, "nothing").tasks["MMMU"]
    expected = {}
    for i, (_, _, options, answer, _) in enumerate(MMMU):
        letter = guess.choice("ABCD"[: len(options)]) if options else None
        expected[str(i)] = 100 if letter == answer else 0
    assert score.num_empty == score.num_samples == len(MMMU)
    assert score.units == expected
    assert score.score == pytest.approx(sum(expected.values()) / len(MMMU), abs=1e-3)
    assert 0 < sum(expected.values()) < 100 * (len(MMMU) - len(OPEN))
    assert warns_of_emptiness(run, "MMMU")


def test_answers_follow_the_picture(run: Run) -> None:
    samples = run.samples("right", "MMStar")[:3]
    assert len({sample["arguments"][0] for sample in samples}) == 1  # the same prompt
    assert [sample["resps"][0][0] for sample in samples] == ["A", "B", "C"]


def test_open_questions_of_mmmu_are_answered_in_words_and_numbers(run: Run) -> None:
    answers = [sample["resps"][0][0] for sample in run.samples("right", "MMMU")]
    assert answers == ["B", "A", "0.75", "D", "minor third", "B"]


def test_the_table_has_a_column_a_benchmark_and_the_average(run: Run) -> None:
    header, _, right, nothing = table(run.stdout)[:4]
    assert header == ["model", *BENCHMARKS, "avg"]
    assert right == ["right", *["**100.0** ± 0.0"] * 8]
    assert [cell for cell in nothing if cell == "0.0 ± 0.0"] == ["0.0 ± 0.0"] * 6
    assert (run.output / "scores.md").read_text("utf-8").rstrip() == run.stdout.rstrip()
    assert (run.output / "scores.png").stat().st_size > 0


def test_the_papers_rows_stand_below_in_the_same_columns(run: Run, warm: Path) -> None:
    out, _ = command(warm, "compare", run.output, "--paper")
    header, *rows = table(out)
    assert header == ["model", *BENCHMARKS, "avg"]
    assert [row[0] for row in rows[1:4]] == ["right", "nothing", ""]
    printed = {name: cells for name, *cells in rows[4:]}  # arXiv 2501.10661, Table 4
    assert len(printed) == 6 and all(name.endswith(" (paper)") for name in printed)
    best = ["46.0", "43.5", "44.0", "38.4", "70.1", "25.6", "44.2", "44.5"]
    assert printed["min-σ, t=2 (paper)"] == best


def table(markdown: str) -> list[list[str]]:
    """The cells of a table's lines."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# Loads a checkpoint as the worker does; says what its layers hold.
LAYERS = """
import json, sys
from collections import Counter
from lmms_eval import models
from torch import nn
model = models.get_model("llava_hf_8bit").create_from_arg_string("", {
    "pretrained": sys.argv[1], "device": "cpu", "device_map": "cpu", "dtype": "float32"
}).model
layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
print(json.dumps(Counter(str(layer.weight.dtype) for layer in layers)))
"""


def test_in_8_bit_as_the_suite_says_the_answers_are_alike(
    run: Run, warm: Path, tmp_path: Path
) -> None:
    # Not in its float16: bitsandbytes says in the log that it multiplies in 8 bit when it has to
    # cast what it multiplies.
    command(
        warm, "eval", run.place / "right", "--suite", SUITE, "--device", "cpu",
        "--dtype", "float32", "--data", run.place / "data", "--output", tmp_path,
    )  # fmt: skip
    logs = [(folder / "logs" / "right.log").read_text() for folder in (run.output, tmp_path)]
    assert ["MatMul8bitLt" in log for log in logs] == [False, True]
    scores = load_scores(tmp_path)
    assert [run.scores.settings["load_in_8bit"], scores.settings["load_in_8bit"]] == [False, True]
    (found,) = scores.models
    for title in BENCHMARKS:
        assert found.tasks[title].score >= 80, title
        record = json.loads((tmp_path / found.tasks[title].record).read_text("utf-8"))
        assert record["identity"]["settings"]["load_in_8bit"] is True
    loaded = subprocess.run(
        [warm, "-c", LAYERS, run.place / "right"], capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    # The tower's two layers of 6, the projector's 2 and Llama's layer of 7; the head is left out.
    assert json.loads(loaded.stdout.splitlines()[-1]) == {"torch.int8": 21, "torch.float32": 1}


def test_a_gpu_that_is_not_there_is_said_in_a_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is one, it is hidden
    out, err = command(
        Path(sys.executable), "eval", run.place / "right", "--suite", SUITE, "--device", "cuda",
        "--output", tmp_path / "out", code=2,
    )  # fmt: skip
    assert out == ""
    assert err.startswith("error: device cuda is not on this machine: it has 0 CUDA device(s). ")
    assert not (tmp_path / "out").exists()
