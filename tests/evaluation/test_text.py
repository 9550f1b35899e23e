"""`outliermerge eval` with the real lm-eval on small Llamas: its scores, and its words."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import pyarrow.parquet
import pytest
import yaml
from safetensors.torch import load_file, save_file
from text_models import save_text_model
from waiting import LIMIT_SECONDS

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation import evaluate as evaluate_module
from outliermerge.evaluation.early import check_models
from outliermerge.evaluation.scores import Score, load_scores
from outliermerge.evaluation.suite import load_suite
from outliermerge.evaluation.table import make_table
from outliermerge.evaluation.text_worker import Worker, _check_examples, _contributions
from outliermerge.evaluation.worker_process import worker

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "evals" / "tiny_text"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
INSTRUCTION = "Answer in few words."
LIMIT = 12

# Changes of tiny_sums, one a task that cannot be scored.
BROKEN = {
    "deadly": "doc_to_text: !function utils.end_the_process\n",
    "undefined": "doc_to_text: !function utils.divide_by_zero\n",
    "dataless": "dataset_kwargs: {data_files: {test: absent.jsonl}}\n",
    "alone": "dataset_kwargs: {data_files: {test: sums.jsonl}}\ntraining_split: null\n",
    "always_bare": "num_fewshot: 0\n",
    "unsafe": "unsafe_code: true\n",
}
UTILS = """\
import os
import signal


def end_the_process(doc):
    os.kill(os.getpid(), signal.SIGKILL)


def divide_by_zero(doc):
    return 1 // 0
"""


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str
    output: Path

    def tasks(self, model: str) -> dict[str, dict[str, Any]]:
        """Return what scores.json says of a model."""
        models = json.loads((self.output / "scores.json").read_text())["models"]
        (tasks,) = (entry["tasks"] for entry in models if entry["name"] == model)
        return tasks

    def record(self, model: str, title: str) -> dict[str, Any]:
        return json.loads((self.output / self.tasks(model)[title]["record"]).read_text())

    def samples(self, model: str, title: str) -> list[dict[str, Any]]:
        record = self.output / self.tasks(model)[title]["record"]
        return [json.loads(line) for line in record.with_suffix(".jsonl").read_text().splitlines()]


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_suite(file: Path, tasks: list[dict[str, Any]], **settings: Any) -> Path:
    content = {"harness": "lm_eval", "tasks_folder": "tasks", "device": "cpu", "limit": LIMIT}
    file.write_text(json.dumps({**content, "tasks": tasks, **settings}))  # JSON is YAML
    return file


def _task(name: str, **settings: Any) -> dict[str, Any]:
    return {"title": name, "task": name, "metric": "acc,none", **settings}


BITS = {"title": "bits", "task": "tiny_texts", "metric": "bits_per_byte,none", "scale": 1}
WORDS = {"title": "words", "task": "tiny_words", "metric": "exact_match,none"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, their average, models that cannot be scored, good and broken tasks."""
    root = tmp_path_factory.mktemp("text")
    for seed, name in enumerate(("a", "b")):
        save_text_model(root / name, seed=seed)
    models = [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in ("a", "b")]
    outliermerge.run({"merge_method": "linear", "models": models, "output": str(root / "merged")})
    for name, change in (
        ("endless", lambda tensors: tensors["lm_head.weight"].fill_(math.nan)),
        ("lacking", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
    ):
        shutil.copytree(root / "a", root / name)
        _change(root / name, change)
    tasks = root / "tasks"
    shutil.copytree(TASKS, tasks, ignore=shutil.ignore_patterns("data.py"))
    (tasks / "utils.py").write_text(UTILS)
    for name, text in BROKEN.items():
        (tasks / f"{name}.yaml").write_text(f"include: tiny_sums.yaml\ntask: {name}\n{text}")
    (tasks / "both.yaml").write_text(
        "group: both\ntask: [tiny_sums, always_bare]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return root


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, **OFFLINE, "HF_DATASETS_CACHE": str(root / "cache"), "COLUMNS": "80"}


def _eval(root: Path, warm: Path, output: str, *arguments: object) -> Done:
    done = subprocess.run(
        [warm, "-m", "outliermerge", "eval", *map(str, arguments), "--output", output],
        cwd=root, env=_environment(root), capture_output=True, text=True, timeout=LIMIT_SECONDS,
        check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr, root / output)


@pytest.fixture(scope="module")
def own_command(place: Path) -> subprocess.Popen[bytes]:
    """lm-eval's own command on `a`, in a process of its own, beside the other runs."""
    arguments = [
        *("--model", "hf", "--model_args", "pretrained=../a,dtype=float32", "--device", "cpu"),
        *("--tasks", "tiny_sums,tiny_words,tiny_texts", "--include_path", ".", "--batch_size", "1"),
        *("--num_fewshot", "2", "--apply_chat_template", "--system_instruction", INSTRUCTION),
        *("--limit", LIMIT, "--log_samples", "--output_path", "../own"),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "lm_eval", "run", *map(str, arguments)],
        cwd=place / "tasks", env=_environment(place), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def asked(place: Path, warm: Path, own_command: object) -> Done:
    """All three models, asked as lm-eval's command asks."""
    suite = _write_suite(
        place / "asked.yaml",
        [_task("tiny_sums"), WORDS, {**BITS, "num_fewshot": 0}],
        num_fewshot=2,
        apply_chat_template=True,
        system_instruction=INSTRUCTION,
    )
    return _eval(place, warm, "asked", "a", "b", "merged", "--suite", suite)


@pytest.fixture(scope="module")
def broken(place: Path, warm: Path) -> Done:
    """A good model on good and bad tasks, and a group of tasks."""
    names = ("unsafe", "undefined", "deadly", "dataless")
    tasks = [
        *(_task(name) for name in names),
        *(_task(name, num_fewshot=1) for name in ("alone", "always_bare")),
        {**BITS, "title": "shown", "num_fewshot": 1},
        _task("tiny_sums", num_fewshot=9),
        {**WORDS, "metric": "bleu,none", "generation": {"max_gen_toks": 3}},
        _task("both", limit=3),
    ]
    return _eval(place, warm, "broken", "a", "--suite", _write_suite(place / "bad.yaml", tasks))


# The same numbers as lm-eval's own command


@pytest.fixture(scope="module")
def own_results(place: Path, own_command: subprocess.Popen[bytes]) -> Path:
    said, _ = own_command.communicate(timeout=LIMIT_SECONDS)
    assert own_command.returncode == 0, said.decode()
    (folder,) = (place / "own").iterdir()
    return folder


@pytest.mark.parametrize(
    ("title", "task"), [("tiny_sums", "tiny_sums"), ("words", "tiny_words"), ("bits", "tiny_texts")]
)
def test_scores_are_those_of_lm_evals_own_command_digit_for_digit(asked, own_results, title, task):
    (file,) = own_results.glob("results_*.json")
    theirs = json.loads(file.read_text())["results"][task]
    ours = asked.tasks("a")[title]["metrics"]
    assert len(ours) >= 1
    assert ours == {key: theirs[key] for key in ours}
    assert {key for key in theirs if "," in key and "_stderr" not in key} == set(ours)
    (file,) = own_results.glob(f"samples_{task}_*.jsonl")
    own = {row["doc_id"]: row for row in map(json.loads, file.read_text().splitlines())}
    answers = {row["doc_id"]: row for row in asked.samples("a", title)}
    assert len(answers) == LIMIT
    assert {number: row["resps"] for number, row in answers.items()} == {
        number: _as_ours(row["resps"]) for number, row in own.items()
    }


def _as_ours(value: Any) -> Any:
    """lm-eval writes numbers and truth values of answers as texts."""
    if isinstance(value, list):
        return [_as_ours(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"True|False|-?[0-9.e-]+", value):
        return json.loads(value.lower())
    return value


def test_the_standard_error_is_lm_evals_too(asked, own_results):
    (file,) = own_results.glob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["tiny_sums"]["acc_stderr,none"]
    assert asked.tasks("a")["tiny_sums"]["stderr"] == pytest.approx(100 * theirs)


def test_questions_are_put_in_the_chat_format_with_examples(asked):
    prompt = asked.samples("a", "tiny_sums")[0]["arguments"][0][0]
    assert prompt.startswith(f"<system>{INSTRUCTION}\n<user>")
    assert prompt.count("<user>") == 3 and prompt.endswith("<assistant>")


# lm-eval's own tasks, on replicas of their data under the hub's ids


def _official(folder: Path) -> None:
    """Write a few questions in the schemas of the data sets that evals/text.yaml asks."""
    many = range(26)  # ARC's examples, and one
    arc = [
        {
            "id": str(number),
            "question": f"{number} + 1?",
            "choices": {"text": ["1", "x", "y", "z"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[number % 4],
        }
        for number in many
    ]
    _put(folder / "allenai/ai2_arc", "ARC-Challenge", train=arc, validation=arc, test=arc)
    endings = {"ctx_a": "A cat", "ctx_b": "it", "activity_label": "Pets", "label": "1"}
    hella = [{**endings, "ind": number, "endings": ["a", "b", "c", "d"]} for number in many]
    _put(folder / "Rowan/hellaswag", "default", train=hella, validation=hella, test=hella)
    question = {"question": "?", "subject": "x", "choices": ["a", "b", "c", "d"], "answer": 2}
    for subject in _configs("mmlu/default", "mmlu_*.yaml"):
        _put(folder / "cais/mmlu", subject, test=[question], validation=[question],
             dev=[question] * 5)  # fmt: skip
    choices = {"choices": ["yes", "no"], "labels": [1, 0]}
    truth = {"question": "Is it?", "mc1_targets": choices, "mc2_targets": choices}
    _put(folder / "truthfulqa/truthful_qa", "multiple_choice", validation=[truth])
    grande = {"sentence": "A saw B as _ was big.", "option1": "A", "option2": "B", "answer": "2"}
    rows = [{**grande, "sentence": f"{number}: {grande['sentence']}"} for number in many]
    _put(folder / "allenai/winogrande", "winogrande_xl", train=rows, validation=rows)
    gsm = [{"question": f"{n} + 1?", "answer": f"So.\n#### {n + 1}"} for n in many]
    _put(folder / "openai/gsm8k", "main", train=gsm, test=gsm)
    for name in _configs("leaderboard/bbh_mc", "*.yaml"):
        _put(folder / "SaylorTwift/bbh", name, test=[{"input": "Is it?", "target": "(A)"}])


def _configs(folder: str, pattern: str) -> list[str]:
    """Return the configurations that lm-eval's task files of a folder name."""
    (home,) = find_spec("lm_eval").submodule_search_locations
    texts = (path.read_text() for path in Path(home, "tasks", folder).glob(pattern))
    named = [re.findall(r'^"?dataset_name"?: "?(\w+)', text, re.M) for text in texts]
    return sorted(name for names in named for name in names)


def _put(folder: Path, config: str, **splits: list[dict[str, Any]]) -> None:
    import datasets

    (folder / config).mkdir(parents=True)
    for split, rows in splits.items():
        file = folder / config / f"{split}.parquet"
        pyarrow.parquet.write_table(datasets.Dataset.from_list(rows).data.table, file)
    readme = folder / "README.md"
    listed = readme.read_text().splitlines()[2:-1] if readme.exists() else []
    listed += [f"- config_name: {config}", *(["  default: true"] if config == "default" else [])]
    listed += ["  data_files:"]
    for split in splits:
        listed += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    readme.write_text("\n".join(["---", "configs:", *listed, "---", ""]))


@pytest.mark.faults
def test_the_leaderboards_tasks_score_models_as_the_suite_names_them(place, warm):
    # But IFEval: it downloads rules of NLTK when it is imported.
    _official(place / "sets")
    suite = yaml.safe_load((ROOT / "evals" / "text.yaml").read_text())
    tasks = [task for task in suite["tasks"] if task["title"] != "IFEval"]
    file = place / "official.yaml"
    file.write_text(json.dumps({"harness": "lm_eval", "device": "cpu", "tasks": tasks}))
    options = ["--suite", file, "--data", place / "sets", "--limit", 1]
    done = _eval(place, warm, "official", "a", *options, "--generation", "max_gen_toks=4")
    found = done.tasks("a")
    assert done.code == 0, done.err
    counts = {title: result["num_samples"] for title, result in found.items()}
    assert counts == {
        "ARC-C": 1, "HellaSwag": 1, "MMLU": 57, "TruthfulQA": 1, "WinoGrande": 1, "GSM8K": 1,
        "BBH": 24,
    }  # fmt: skip
    assert all(found[title]["num_units"] == count for title, count in counts.items())


# Tables


def test_a_merge_stands_beside_its_parents_with_paired_errors(asked):
    assert asked.code == 0, asked.err
    table = make_table([load_scores(asked.output)])
    assert [row.name for row in table.rows] == ["a", "b", "merged"]
    assert [row.group for row in table.rows] == ["parent", "parent", "merged"]
    assert table.baseline == "merged" and table.averaged == ("tiny_sums", "words")
    assert table.rows[0].cell("gain").stderr is not None
    assert any("lower is better in bits" in note for note in table.notes)


def test_bits_per_byte_have_three_digits_and_the_least_is_best(asked):
    header, _, *rows = (asked.output / "scores.md").read_text().splitlines()
    assert "bits ↓" in header and "↓: lower is better" in (asked.output / "scores.md").read_text()
    values = {name: asked.tasks(name)["bits"]["score"] for name in ("a", "b", "merged")}
    best = min(values, key=lambda name: values[name])
    (row,) = (row for row in rows if row.startswith(f"| {best} "))
    assert f"**{values[best]:.3f}** ± " in row
    assert f"bits {values[best]:.3f} ± " in asked.err


def test_a_table_of_bits_alone_averages_them(asked):
    run = load_scores(asked.output)
    models = tuple(_only(model, "bits") for model in run.models)
    table = make_table([_with(run, titles=("bits",), models=models)])
    assert table.losses == {"bits", "avg", "gain"} and table.averaged == ("bits",)
    (a, _, merged) = table.rows
    assert a.cell("gain").value == pytest.approx(a.cell("bits").value - merged.cell("bits").value)
    paired = a.cell("gain").stderr
    units = [model.tasks["bits"].units for model in models]
    differences = [units[0][name] - units[2][name] for name in units[0]]
    assert paired == pytest.approx(statistics.stdev(differences) / math.sqrt(len(differences)))


def _only(model: Any, title: str) -> Any:
    return _with(model, tasks={title: model.tasks[title]})


def _with(value: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(value, **changes)


def test_runs_with_other_settings_are_noted(asked, broken):
    notes = " ".join(make_table([load_scores(asked.output), load_scores(broken.output)]).notes)
    assert "The scores are of runs that differ: " in notes
    assert "chat template yes / no" in notes and "examples 2 / none" in notes


# Standard errors of ratios


def test_contributions_have_the_score_as_mean_and_its_standard_error():
    # The bootstrap over texts, of bits per byte of long and short texts.
    draw = random.Random(0)
    pairs = [(-draw.uniform(1, 3) * (size := draw.randrange(20, 400)), size) for _ in range(80)]

    def score(chosen: list[tuple[float, int]]) -> float:
        return -sum(nats for nats, _ in chosen) / sum(size for _, size in chosen) / math.log(2)

    units = _contributions(pairs, lambda nats: (nats / math.log(2), 1 / math.log(2)))
    assert statistics.fmean(units) == pytest.approx(score(pairs))
    drawn = [score(draw.choices(pairs, k=len(pairs))) for _ in range(2000)]
    assert statistics.stdev(units) / math.sqrt(len(units)) == pytest.approx(
        statistics.stdev(drawn), rel=0.1
    )


# Tasks and models that cannot be scored


@pytest.mark.parametrize(
    ("title", "reason"),
    [
        ("unsafe", "which is marked as unsafe. Set confirm_run_unsafe_code=True"),
        ("undefined", "ZeroDivisionError"),
        ("deadly", "lm-eval's process was killed (signal 9)"),
        ("dataless", "its data absent.jsonl is nowhere"),
        ("alone", "alone has no examples to show"),
        ("always_bare", "always_bare is asked without examples by its own file"),
        ("shown", "tiny_texts scores whole texts, without examples"),
        ("tiny_sums", "tiny_sums has 8 examples to show, not 9"),
        ("words", "no number 'bleu,none'. The task has: exact_match,none"),
    ],
)
def test_a_task_that_cannot_be_scored_has_its_reason_and_the_others_go_on(broken, title, reason):
    result = broken.tasks("a")[title]
    assert set(result) == {"task", "error"} and reason in result["error"]
    assert broken.code == 1 and "Traceback" not in broken.err


def test_a_group_has_one_score_and_units_of_all_its_tasks(broken):
    both = broken.tasks("a")["both"]
    assert both["num_samples"] == both["num_units"] == 6
    units = broken.record("a", "both")["result"]["units"]
    assert set(units) == {f"{t}/{n}" for t in ("tiny_sums", "always_bare") for n in range(3)}
    assert both["score"] == pytest.approx(statistics.fmean(units.values()))
    assert {sample["task"] for sample in broken.samples("a", "both")} == {
        "tiny_sums",
        "always_bare",
    }


def test_a_model_without_likelihoods_or_a_weight_gets_no_score(place, warm):
    suite = _write_suite(place / "one.yaml", [_task("tiny_sums"), {**BITS, "limit": 1}])
    done = _eval(place, warm, "bad_models", "endless", "lacking", "--suite", suite)
    for result in done.tasks("endless").values():
        assert "the model's likelihoods are no numbers (NaN)" in result["error"]
    assert (
        "its files lack 1 tensors: model.layers.1.mlp.up_proj.weight"
        in (done.tasks("lacking")["bits"]["error"])
    )
    assert done.code == 1


def test_what_was_scored_is_kept_and_other_settings_are_scored_again(place, warm, broken):
    group = _task("both", limit=3)
    suite = _write_suite(place / "again.yaml", [group])
    done = _eval(place, warm, "broken", "a", "--suite", suite, "--batch-size", "2")
    assert "a: starting lm-eval for both" in done.err
    again = _eval(place, warm, "broken", "a", "--suite", suite, "--limit", "3")
    assert re.search(r"a: both .*, scored before", again.err)


def test_a_full_disk_fails_the_task(place, warm, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(warm))
    for name, value in _environment(place).items():
        monkeypatch.setenv(name, value)
    entry = {**_task("tiny_sums", limit=1, scale=1, generation={}, num_fewshot=None)}
    request = {
        "worker": "outliermerge.evaluation.text_worker",
        "model_type": "hf",
        "model_args": {"pretrained": str(place / "a"), "device": "cpu", "dtype": "float32"},
        "batch_size": 1,
        "tasks_folder": str(place / "tasks"),
        **dict.fromkeys(evaluate_module.HOW_ASKED),
        "confirm_run_unsafe_code": False,
        "tasks": [{**entry, "answers_path": "/dev/full"}],
    }
    with worker(
        request,
        folder=place,
        log=place / "full.log",
        environment={},
        on_progress=lambda done, total: None,
    ) as (_, events):
        told = list(events)
    assert told[-1]["event"] == "failed" and "No space left on device" in told[-1]["reason"]


def test_a_tag_is_no_task():
    tags = {"ai2_arc": Score}
    runner = Worker.__new__(Worker)
    runner._tasks = type("Tasks", (), {
        "all_tags": list(tags), "all_tasks": ["arc_easy", "arc_challenge"],
        "task_index": {"ai2_arc": type("Entry", (), {"tags": {"arc_easy", "arc_challenge"}})},
    })  # fmt: skip
    with pytest.raises(LookupError, match="ai2_arc is a tag of lm-eval for 2 tasks"):
        runner.check({"task": "ai2_arc"})
    with pytest.raises(LookupError, match="Did you mean 'arc_challenge'"):
        runner.check({"task": "arc_chalenge"})


def test_examples_of_a_task_that_is_a_class_are_those_of_its_splits():
    task = SimpleNamespace(
        task_name="own", OUTPUT_TYPE="generate_until", config=SimpleNamespace(num_fewshot=None),
        has_training_docs=lambda: True, has_validation_docs=lambda: False,
    )  # fmt: skip
    _check_examples(task, 3)
    task.has_training_docs = task.has_validation_docs
    with pytest.raises(ValueError, match="own has no examples to show"):
        _check_examples(task, 3)


# What is refused before a model is loaded


def test_a_model_without_a_chat_template_is_refused(place, tmp_path):
    save_text_model(tmp_path / "bare", seed=0, chat_template=None)
    models = [(name, folder) for name, folder in (("a", place / "a"), ("bare", tmp_path / "bare"))]
    with pytest.raises(OutlierMergeError, match=r"^model 'bare' has no chat template, by which"):
        check_models("hf", models, harness="lm_eval", chat_template=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_hf"}, "lm_eval has no model type 'llava_hf'. Valid: hf, vllm."),
        ({"harness": "lm_evl"}, "harness: "),
        ({"model_type": "vllm", "batch_size": 4}, "vllm makes its batches by itself"),
        ({"generation": {"max_new_tokens": 4}}, "no generation setting 'max_new_tokens'"),
        ({"harness": "lmms_eval", "num_fewshot": 2}, "only lm_eval has it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, change, message):
    (tmp_path / "tasks").mkdir()
    file = _write_suite(tmp_path / "suite.yaml", [_task("tiny_sums")], **change)
    with pytest.raises(OutlierMergeError, match=re.escape(message)):
        load_suite(file)


@pytest.mark.parametrize(
    ("task", "harness", "message"),
    [
        ({**BITS, "scale": 100}, "lm_eval", "found 100, expected 1"),
        (_task("x", num_fewshot=1), "lmms_eval", "only lm_eval has it"),
    ],
)
def test_settings_of_a_task_that_do_not_fit_are_refused(tmp_path, task, harness, message):
    (tmp_path / "tasks").mkdir()
    with pytest.raises(OutlierMergeError, match=re.escape(message)):
        load_suite(_write_suite(tmp_path / "suite.yaml", [task], harness=harness))


def test_the_command_sets_the_examples_of_all_tasks(place):
    file = _write_suite(place / "three.yaml", [_task("tiny_sums", num_fewshot=3), BITS])
    suite = load_suite(file, num_fewshot=0, apply_chat_template=True)
    assert [suite.shots_of(task) for task in suite.document.tasks] == [0, 0]
    assert suite.document.apply_chat_template


def test_vllm_gets_its_arguments_and_makes_its_batches(place, monkeypatch):
    """It cannot run here: what it would be asked for is looked at."""
    asked = []

    @contextmanager
    def stub(request: dict[str, Any], **rest: Any) -> Iterator[tuple[Any, Any]]:
        asked.append(request)
        yield Mock(**{"wait.return_value": 3}), iter(())

    monkeypatch.setattr(evaluate_module, "worker", stub)
    monkeypatch.setattr(evaluate_module, "check_packages", lambda *_, **__: None)
    settings = {"model_type": "vllm", "dtype": "bfloat16", "confirm_run_unsafe_code": True}
    file = _write_suite(place / "vllm.yaml", [_task("tiny_sums", num_fewshot=2)], **settings,
                        model_args={"gpu_memory_utilization": 0.8})  # fmt: skip
    scores = evaluate_module.evaluate([str(place / "a")], load_suite(file), output=place / "vllm")
    (request,) = asked
    assert request["model_args"] == {
        "pretrained": str(place / "a"), "dtype": "bfloat16", "gpu_memory_utilization": 0.8,
    }  # fmt: skip
    assert (request["model_type"], request["batch_size"]) == ("vllm", "auto")
    assert request["tasks"][0]["num_fewshot"] == 2 and request["confirm_run_unsafe_code"]
    assert "lm-eval's process ended with exit code 3" in scores.failures[0][2]


def test_a_suite_that_asks_for_a_judge_is_refused(place, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(evaluate_module, "worker", None)
    suite = _write_suite(place / "judge.yaml", [_task("tiny_sums")], judge=True)
    code = cli.main(["eval", str(place / "a"), "--suite", str(suite), "-o", str(place / "judged")])
    assert code == 2 and "needs a judge: set OPENAI_API_KEY" in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_told(place, tmp_path, capsys):
    (tmp_path / "file").touch()
    suite = _write_suite(place / "one.yaml", [_task("tiny_sums")])
    output = str(tmp_path / "file" / "scores")
    assert cli.main(["eval", str(place / "a"), "--suite", str(suite), "-o", output]) == 1
    said = capsys.readouterr().err
    assert said == f"error: {output}: cannot be made: Not a directory (ENOTDIR).\n"
