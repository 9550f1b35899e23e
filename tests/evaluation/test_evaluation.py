"""`outliermerge eval` with the real lmms-eval on a small LLaVA: its scores, and its words."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from llava_replicas import save_hf_base
from rich.console import Console
from safetensors.torch import load_file, save_file
from waiting import LIMIT_SECONDS, heed_interrupts, wait_for

from outliermerge.cli import evaluation_progress
from outliermerge.cli import main as cli
from outliermerge.cli.evaluation_progress import EvaluationProgress
from outliermerge.evaluation import evaluate as evaluate_module
from outliermerge.evaluation.scores import Failure, Score, Scores, load_scores
from outliermerge.evaluation.suite import load_suite
from outliermerge.evaluation.worker_process import worker

PYTHON = Path(sys.executable)

# One local task each, of the same four questions; `utils.py` is shared.
TASKS = {
    "fixed": "",
    "two_filters": """\
filter_list:
- {name: first, filter: [{function: take_first}]}
- {name: second, filter: [{function: take_first}]}
""",
    "deadly": "doc_to_text: !function utils.end_the_process\n",
    "broken": "doc_to_text: !function utils.divide_by_zero\n",
    "waiting": "doc_to_text: !function utils.wait\n",
    "dataless": "dataset_kwargs: {data_files: {test: local/absent.jsonl}}\n",
}
FRAME = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: local/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: unit
process_results: !function utils.process_results
generation_kwargs: {{max_new_tokens: 4}}
metric_list:
- metric: accuracy
  aggregation: !function utils.mean
  higher_is_better: true
"""
UTILS = """\
import os
import signal
from pathlib import Path

from PIL import Image


def doc_to_visual(doc):
    return [Image.new("RGB", (56, 56), "red")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return "What is in the image?"


def process_results(doc, results):
    return {"accuracy": {"unit": doc["unit"], "right": doc["right"]}}


def mean(values):
    return sum(value["right"] for value in values) / len(values)


def end_the_process(doc, lmms_eval_specific_kwargs=None):
    os.kill(os.getpid(), signal.SIGKILL)


def divide_by_zero(doc, lmms_eval_specific_kwargs=None):
    return 1 // 0


def wait(doc, lmms_eval_specific_kwargs=None):
    place = Path(os.environ["TEST_WAIT"])
    place.with_suffix(".pid").write_text(str(os.getpid()))
    return place.with_suffix(".fifo").read_text()  # nobody writes
"""
RIGHT = {"a": [1, 0, 0], "b": [1]}


def _write_questions(sets: Path, right: Mapping[str, list[int]]) -> None:
    (sets / "local").mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"unit": unit, "right": value})
        for unit, values in right.items()
        for value in values
    ]
    (sets / "local" / "questions.jsonl").write_text("\n".join(lines) + "\n")


def _write_mmstar(sets: Path) -> None:
    """MMStar's official schema: huggingface.co/datasets/Lin-Chen/MMStar."""
    import datasets
    from PIL import Image

    text = datasets.Value("string")
    features = datasets.Features(
        {
            "index": datasets.Value("int64"),
            "question": text,
            "image": datasets.Image(),
            "answer": text,
            "category": text,
            "l2_category": text,
            "meta_info": {"source": text, "split": text, "image_path": text},
        }
    )
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "blue").save(picture, "PNG")
    rows = [
        {
            "index": number,
            "question": "What is the area?\nOptions: A: 1, B: 2, C: 3, D: 4",
            "image": {"bytes": picture.getvalue(), "path": None},
            "answer": "ABC"[number],
            "category": "math",
            "l2_category": ["geometry", "geometry", "statistical reasoning"][number],
            "meta_info": {"source": "MathVista", "split": "testmini", "image_path": "x.png"},
        }
        for number in range(3)
    ]
    folder = sets / "Lin-Chen" / "MMStar" / "data"
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(folder / "val-00000-of-00001.parquet"))


def _write_tasks(folder: Path) -> None:
    (folder / "local").mkdir(parents=True)
    (folder / "local" / "utils.py").write_text(UTILS)
    for name, more in TASKS.items():
        text = FRAME.format(name=name)
        for line in more.splitlines():
            key = line.partition(":")[0]
            if f"\n{key}:" in text:  # this task has its own
                start = text.index(f"\n{key}:") + 1
                text = text[:start] + text[text.index("\n", start) + 1 :]
        (folder / "local" / f"{name}.yaml").write_text(text + more)


def _task(name: str, **settings: Any) -> dict[str, Any]:
    metric = "average,none" if name == "mmstar" else "accuracy,none"
    return {"title": name.title(), "task": name, "metric": metric, **settings}


def _write_suite(file: Path, tasks: list[dict[str, Any]], **settings: Any) -> Path:
    content = {
        "tasks_folder": "tasks",
        "data": "sets",
        "device": "cpu",
        "generation": {"max_new_tokens": 4},
        "tasks": tasks,
    }
    file.write_text(json.dumps({**content, **settings}))  # JSON is YAML
    return file


def _copy(source: Path, target: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def _truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size // 2)


def _drop_processor(folder: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.name not in (
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
        ):
            file.unlink()


def _miscount_image_tokens(folder: Path) -> None:
    file = folder / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size": 28}))


def _change_tensor(folder: Path, ending: str, change: Callable[[dict, str], object]) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith(ending)]:
            change(tensors, name)
            save_file(tensors, shard, metadata={"format": "pt"})


def _lose_a_tensor(folder: Path) -> None:
    name = "layers.2.mlp.down_proj.weight"
    _change_tensor(folder, name, lambda tensors, name: tensors.pop(name))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if not k.endswith(name)}
    index.write_text(json.dumps(content))


def _answer_with_nothing(folder: Path) -> None:
    """Give all tokens one probability: the first is chosen, <unk>, which is not shown."""

    def clear(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = torch.zeros_like(tensors[name])

    _change_tensor(folder, "lm_head.weight", clear)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, broken ones, tasks and data; the data folder has names of Python's modules."""
    root = tmp_path_factory.mktemp("evaluation")
    _write_mmstar(root / "sets")
    _write_questions(root / "sets", RIGHT)
    _write_tasks(root / "tasks")
    for name in ("datasets", "accelerate"):
        (root / "sets" / name).mkdir()
        (root / "sets" / name / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    (root / "sets" / "torch.py").write_text("raise RuntimeError('shadowed')\n")
    good = root / "good"
    save_hf_base(good)
    _copy(good, root / "truncated", _truncate)
    _copy(good, root / "no_config", lambda folder: (folder / "config.json").unlink())
    _copy(good, root / "no_processor", _drop_processor)
    _copy(good, root / "miscounted", _miscount_image_tokens)
    _copy(good, root / "lacking", _lose_a_tensor)
    return root


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


def _start(
    root: Path, arguments: list[object], output: Path, python: Path = PYTHON, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-m", "outliermerge", "eval", *map(str, arguments), "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        start_new_session=True,
        preexec_fn=heed_interrupts,
        env={
            **os.environ,
            "HF_DATASETS_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(root / "cache"),
            "COLUMNS": "80",
            **environment,
        },
    )  # fmt: skip


def _finish(process: subprocess.Popen[str], output: Path) -> Done:
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    return Done(process.returncode, out, err, output)


@pytest.fixture(scope="module")
def both(place: Path, warm: Path) -> tuple[Done, Done]:
    """A good model on good and bad tasks, and bad models on a good task, side by side."""
    tasks = [
        _task("dataless"),
        _task("broken"),
        _task("fixed"),
        _task("no_such_task"),
        _task(
            "two_filters", metric="accuracy,second", generation={"until": ["a, b", "c"]}, limit=3
        ),
        _task("deadly"),
        _task("mmstar"),
        _task("waiting", metric="bleu,none"),
    ]
    suite = _write_suite(place / "all.yaml", tasks)
    (place / "free.fifo").write_text("Is it red?")  # a file: nothing waits
    first = _start(
        place,
        [place / "good", "--suite", suite, "--json"],
        place / "out_tasks",
        warm,
        TEST_WAIT=str(place / "free"),
    )
    suite = _write_suite(place / "one.yaml", [_task("mmstar")])
    bad = ("truncated", "no_config", "no_processor", "miscounted", "lacking")
    second = _start(
        place,
        [*(place / name for name in bad), "--suite", suite, "--jobs", "2"],
        place / "out_models",
        warm,
    )
    return _finish(first, place / "out_tasks"), _finish(second, place / "out_models")


@pytest.fixture(scope="module")
def tasks_run(both: tuple[Done, Done]) -> Done:
    return both[0]


@pytest.fixture(scope="module")
def models_run(both: tuple[Done, Done]) -> Done:
    return both[1]


# One model on good and bad tasks


def test_a_failed_task_has_its_reason_and_no_number_and_the_others_are_scored(tasks_run):
    tasks = tasks_run.tasks("good")
    failed = {title for title, result in tasks.items() if "error" in result}
    assert failed == {"Dataless", "Broken", "No_Such_Task", "Deadly", "Waiting"}
    assert {title for title, result in tasks.items() if "score" in result} == {
        *("Fixed", "Two_Filters", "Mmstar")
    }
    for title in failed:
        assert set(tasks[title]) == {"task", "error"}
    assert tasks_run.code == 1


@pytest.mark.parametrize(
    ("title", "reason"),
    [
        ("Dataless", "absent.jsonl"),
        ("Broken", "ZeroDivisionError"),
        ("No_Such_Task", "no task of this name (no_such_task)"),
        ("Deadly", "was killed (signal 9)"),
        ("Waiting", "no metric 'bleu,none'. The task has: accuracy"),
    ],
)
def test_a_reason_is_the_one_that_helps(tasks_run, title, reason):
    assert reason in tasks_run.tasks("good")[title]["error"]


def test_tasks_after_a_killed_process_still_run(tasks_run):
    assert "good: starting lmms-eval for Mmstar, Waiting\n" in tasks_run.err
    assert tasks_run.tasks("good")["Mmstar"]["num_samples"] == 3


def test_units_are_the_groups_that_a_task_names(tasks_run):
    # Of a: (1, 0, 0), of b: (1). The standard error is that of 1/3 and 1.
    fixed = tasks_run.tasks("good")["Fixed"]
    assert fixed["score"] == 50 and fixed["num_samples"] == 4 and fixed["num_units"] == 2
    record = json.loads((tasks_run.output / fixed["record"]).read_text())["result"]
    assert record["units"] == pytest.approx({"a": 100 / 3, "b": 100})
    assert fixed["stderr"] == pytest.approx((100 - 100 / 3) / 2)


def test_a_task_with_two_filters_counts_each_question_once(tasks_run):
    assert tasks_run.tasks("good")["Two_Filters"]["num_samples"] == 3


def _samples(run: Done, model: str, title: str) -> list[dict[str, Any]]:
    record = run.output / run.tasks(model)[title]["record"]
    return [json.loads(line) for line in record.with_suffix(".jsonl").read_text().splitlines()]


def test_generation_settings_arrive_as_they_are(tasks_run):
    for sample in _samples(tasks_run, "good", "Two_Filters"):
        settings = sample["arguments"][1]
        assert settings["until"] == ["a, b", "c"] and settings["max_new_tokens"] == 4


def test_every_answer_is_kept(tasks_run):
    samples = _samples(tasks_run, "good", "Fixed")
    assert [sample["doc"]["unit"] for sample in samples] == ["a", "a", "a", "b"]
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2, 3]
    assert all(sample["resps"][0][0] for sample in samples)
    assert len(_samples(tasks_run, "good", "Mmstar")) == 3


def test_with_json_nothing_else_is_on_stdout(tasks_run):
    assert json.loads(tasks_run.out) == json.loads((tasks_run.output / "scores.json").read_text())


def test_a_table_and_a_chart_are_there_though_tasks_failed(tasks_run):
    table = (tasks_run.output / "scores.md").read_text()
    assert "| good  |" in table and "50.0 ± 33.3" in table and "good, Deadly: failed: " in table
    assert (tasks_run.output / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_terminal_each_result_is_a_line(tasks_run):
    starts = [line.partition(" (")[0] for line in tasks_run.err.splitlines()]
    assert "good: Fixed 50.0 ± 33.3" in starts
    assert "good: No_Such_Task failed: LookupError: lmms-eval has no task of this name" in starts
    assert len(starts) == 10 and "\x1b" not in tasks_run.err and "\r" not in tasks_run.err


def test_nothing_is_written_into_the_data_folder(tasks_run, place):
    names = {path.relative_to(place / "sets").as_posix() for path in (place / "sets").rglob("*")}
    assert {name.partition("/")[0] for name in names} == {
        *("Lin-Chen", "accelerate", "datasets", "local", "torch.py")
    }
    assert {name for name in names if name.startswith(("Lin-Chen", "local"))} == {
        *("Lin-Chen", "Lin-Chen/MMStar", "Lin-Chen/MMStar/data", "local"),
        *("Lin-Chen/MMStar/data/val-00000-of-00001.parquet", "local/questions.jsonl"),
    }


def test_a_line_of_progress_is_written_at_once(monkeypatch):
    # In pieces, those of models side by side mix.
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(
        write=written.append, flush=lambda: None, isatty=lambda: False, encoding="utf-8",
    ))  # fmt: skip
    with EvaluationProgress(["task"], ["model"]) as progress:
        progress.loading("model", ["A", "B"])
        progress.finished("model", "A", Failure("a", "no reason"))
    assert written == ["model: starting lmms-eval for A, B\n", "model: A failed: no reason\n"]


# Models that cannot be scored


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("truncated", "the model does not load: SafetensorError"),
        ("no_config", "config.json"),
        ("no_processor", "the model does not load: OSError: Can't load image processor"),
    ],
)
def test_a_model_that_does_not_load_fails_and_the_others_go_on(models_run, model, reason):
    assert reason in models_run.tasks(model)["Mmstar"]["error"]
    assert models_run.code == 1
    assert "Traceback" not in models_run.err


def test_answers_that_could_not_be_made_are_a_failure_not_a_zero(models_run):
    # llava_hf catches what generate raises and answers "".
    result = models_run.tasks("miscounted")["Mmstar"]
    assert "score" not in result
    assert "3 answers could not be made" in result["error"]
    assert "mage features and image tokens do not match" in result["error"]


def test_a_model_that_lacks_a_weight_gets_no_score(models_run):
    # transformers makes one up and says so in a log.
    result = models_run.tasks("lacking")["Mmstar"]
    assert "score" not in result and "layers.2.mlp.down_proj.weight" in result["error"]


# A second run in the first one's folder: the model at the same path is another one now


@pytest.fixture(scope="module")
def changed_run(tasks_run: Done, place: Path, warm: Path) -> Done:
    """`good` is merged anew, its former self has another name; Fixed's data has changed."""
    shutil.copytree(place / "good", place / "moved")
    (place / "moved" / "README.md").write_text("# Moved\n")
    (place / "moved" / "outliermerge.json").write_text(
        json.dumps({"spec": {"merge_method": "linear", "models": ["a", "b"]}})
    )
    _answer_with_nothing(place / "good")
    _write_questions(place / "sets", {"a": [1, 1, 1], "b": [1]})
    suite = _write_suite(place / "later.yaml", [_task("mmstar"), _task("fixed")])
    models = [place / "good", f"old={place / 'moved'}"]
    arguments = [*models, "--suite", suite, "--jobs", "2"]
    process = _start(place, arguments, tasks_run.output, warm)
    return _finish(process, tasks_run.output)


def test_the_same_weights_elsewhere_are_not_run_again(changed_run):
    assert "old: Mmstar 0.0 ± 0.0, scored before\n" in changed_run.err
    assert "old: starting lmms-eval for Fixed\n" in changed_run.err


def test_other_weights_at_the_same_path_are_scored_again(changed_run):
    assert "good: starting lmms-eval for Mmstar, Fixed\n" in changed_run.err


def test_changed_data_is_what_is_scored(changed_run):
    assert changed_run.tasks("old")["Fixed"]["score"] == 100
    assert changed_run.tasks("good")["Fixed"]["score"] == 100
    assert changed_run.code == 0


def test_a_model_that_only_answers_with_nothing_is_warned_of(changed_run):
    lines = [line for line in changed_run.err.splitlines() if "every answer is empty" in line]
    assert any(line.startswith("good: Mmstar") for line in lines)
    assert not any(line.startswith("old: ") for line in lines)
    assert changed_run.tasks("good")["Mmstar"]["num_empty"] == 3


def test_a_merge_is_told_by_its_manifest(changed_run):
    (entry,) = (
        model
        for model in json.loads((changed_run.output / "scores.json").read_text())["models"]
        if model["name"] == "old"
    )
    assert entry["merge"]["method"] == "linear"


# A command that is ended, and started again


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Ended(NamedTuple):
    """A command that was ended in its second task, and whether its worker ended with it."""

    code: int
    err: str
    worker_is_gone: bool
    records: list[str]


@pytest.fixture(scope="module")
def ended_runs(place: Path, changed_run: Done) -> tuple[Ended, Ended, Path]:
    """The command is killed in its second task; started again; there it gets Ctrl-C."""
    suite = _write_suite(place / "ended.yaml", [_task("mmstar"), _task("waiting")])
    os.mkfifo(place / "held.fifo")
    output, told = place / "out_ended", place / "held.pid"
    ended = []
    for end in (_kill_the_command, _press_ctrl_c):
        told.unlink(missing_ok=True)
        process = _start(
            place, [place / "moved", "--suite", suite], output, TEST_WAIT=str(place / "held")
        )
        assert wait_for(lambda: told.exists() and told.read_text())
        end(process)
        _, err = process.communicate(timeout=LIMIT_SECONDS)
        gone = wait_for(lambda: _is_gone(int(told.read_text())))
        records = sorted(path.stem.partition("-")[0] for path in output.glob("records/*.json"))
        ended.append(Ended(process.returncode, err, gone, records))
    return ended[0], ended[1], output


def _kill_the_command(process: subprocess.Popen[str]) -> None:
    process.kill()


def _press_ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all


def test_a_worker_does_not_outlive_a_killed_command(ended_runs):
    killed, _, _ = ended_runs
    assert killed.code == -signal.SIGKILL
    assert killed.worker_is_gone and killed.records == ["mmstar"]


def test_what_was_done_before_the_kill_is_not_done_again(ended_runs):
    killed, interrupted, _ = ended_runs
    assert killed.err.count("moved: Mmstar 0.0") == 1 and "scored before" not in killed.err
    assert "moved: Mmstar 0.0 ± 0.0, scored before\n" in interrupted.err
    assert "moved: starting lmms-eval for Waiting\n" in interrupted.err


def test_ctrl_c_ends_the_command_and_its_worker(ended_runs):
    _, interrupted, output = ended_runs
    assert interrupted.code == 130 and interrupted.worker_is_gone
    last = "error: interrupted: the same command goes on from here"
    assert interrupted.err.splitlines()[-1] == last
    assert "failed" not in interrupted.err and "Traceback" not in interrupted.err
    tasks = Done(130, "", "", output).tasks("moved")
    assert "error" not in tasks.get("Waiting", {})


def test_modules_in_the_data_folder_are_not_imported(ended_runs):
    # It holds torch.py and datasets/, and is the working directory; this worker is no fork.
    assert "shadowed" not in (ended_runs[2] / "logs" / "moved.log").read_text()


# What is scored again, without lmms-eval: a worker that answers at once


class _Stub:
    """Stands for the worker: takes requests, gives each task a score."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @contextmanager
    def worker(self, request: Mapping[str, Any], **rest: Any) -> Iterator[tuple[Any, Any]]:
        self.asked += [entry["title"] for entry in request["tasks"]]
        yield Mock(**{"wait.return_value": 0}), self._events(request["tasks"])

    def _events(self, tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        yield {"event": "loaded", "image_backend": "pil"}
        for entry in tasks:
            yield {"event": "started", "title": entry["title"]}
            result = {
                "score": 50.0,
                "metrics": {entry["metric"]: 0.5},
                "num_samples": 2,
                "num_empty": 0,
                "units": {"0": 0.0, "1": 100.0},
                "seconds": 1.0,
            }
            yield {"event": "finished", "title": entry["title"], "result": result}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> _Stub:
    stub = _Stub()
    monkeypatch.setattr(evaluate_module, "worker", stub.worker)
    return stub


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Tasks, data, a model of two small files, and a suite of one local task."""
    _write_tasks(tmp_path / "tasks")
    _write_questions(tmp_path / "sets", RIGHT)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    _write_suite(tmp_path / "suite.yaml", [_task("fixed")])
    return tmp_path


def _evaluate(small: Path, *models: str, suite: Path | None = None, **options: Any) -> Scores:
    loaded = load_suite(suite or small / "suite.yaml")
    models = models or (str(small / "model"),)
    return evaluate_module.evaluate(models, loaded, output=small / "out", **options)


def _append(file: Path, text: str = "\n# changed\n") -> None:
    file.write_text(file.read_text() + text)


def test_what_nothing_has_changed_for_is_kept(small, stub):
    first = _evaluate(small)
    second = _evaluate(small)
    assert stub.asked == ["Fixed"]
    assert second == first


@pytest.mark.parametrize("name", ["README.md", "outliermerge.json", "LICENSE", ".gitattributes"])
def test_a_file_that_is_not_loaded_does_not_matter(small, stub, name):
    _evaluate(small)
    manifest = {"spec": {"merge_method": "ties", "models": ["a", "b"]}}
    (small / "model" / name).write_text(json.dumps(manifest))
    _evaluate(small)
    assert stub.asked == ["Fixed"]


def _set(**settings: Any) -> Callable[[Path], object]:
    def change(small: Path) -> None:
        _write_suite(small / "suite.yaml", [_task("fixed")], **settings)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda small: (small / "model" / "model.safetensors").write_bytes(b"WEIGHTS"),
        lambda small: _append(small / "model" / "config.json", " "),
        lambda small: (small / "model" / "chat_template.jinja").write_text("{{ messages }}"),
        lambda small: _append(small / "tasks" / "local" / "fixed.yaml"),
        lambda small: _append(small / "tasks" / "local" / "utils.py"),
        lambda small: _append(small / "sets" / "local" / "questions.jsonl"),
        _set(limit=1),
        _set(generation={"max_new_tokens": 5}),
        _set(model_args={"use_cache": False}),
        _set(dtype="bfloat16"),
    ],
    ids=["weights", "config", "template", "task", "utils", "data", "limit", "generation",
         "model_args", "dtype"],
)  # fmt: skip
def test_a_change_of_what_a_score_depends_on_is_scored_again(small, stub, change):
    _evaluate(small)
    change(small)
    _evaluate(small)
    assert stub.asked == ["Fixed", "Fixed"]
    _evaluate(small)
    assert stub.asked == ["Fixed", "Fixed"]


@pytest.mark.parametrize("data", ["sets", None])
@pytest.mark.parametrize(
    "lines",
    [
        "dataset_path: json\ndataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}\n",
        "dataset_path: json\ndataset_kwargs: {data_files: {test: FOLDER/*.jsonl}}\n",
        "dataset_path: FOLDER\n",
    ],
    ids=["file", "pattern", "folder"],
)
def test_a_change_of_absolute_data_is_scored_again(small, stub, lines, data):
    questions = small / "sets" / "local" / "questions.jsonl"
    task = small / "tasks" / "local" / "fixed.yaml"
    rest = [line for line in task.read_text().splitlines() if not line.startswith("dataset_")]
    task.write_text("\n".join(rest) + "\n" + lines.replace("FOLDER", str(questions.parent)))
    suite = _write_suite(small / "suite.yaml", [_task("fixed")], data=data)
    _evaluate(small, suite=suite)
    _append(questions)
    _evaluate(small, suite=suite)
    assert stub.asked == ["Fixed", "Fixed"]


def test_a_change_of_data_beside_a_task_is_scored_again(small, stub):
    """lmms-eval looks there first for the files of its generic readers, such as json."""
    shutil.copytree(small / "sets" / "local", small / "tasks" / "local" / "local")
    suite = _write_suite(small / "suite.yaml", [_task("fixed")], data=None)
    _evaluate(small, suite=suite)
    _append(small / "tasks" / "local" / "local" / "questions.jsonl")
    _evaluate(small, suite=suite)
    assert stub.asked == ["Fixed", "Fixed"]


def test_a_task_depends_on_what_its_file_includes(small, stub):
    """lmms-eval's key `include`: the included file names the data here, as many tasks do."""
    task = small / "tasks" / "local" / "fixed.yaml"
    (small / "tasks" / "common").mkdir()
    common = small / "tasks" / "common" / "_frame"
    common.write_text(task.read_text().replace("task: fixed\n", ""))
    task.write_text("task: fixed\ninclude: ../common/_frame\n")
    _evaluate(small)
    _append(small / "sets" / "local" / "questions.jsonl")
    _evaluate(small)
    assert stub.asked == ["Fixed"] * 2
    _append(common)
    _evaluate(small)
    assert stub.asked == ["Fixed"] * 3


def test_a_group_of_tasks_depends_on_the_data_of_each(small, stub):
    (small / "tasks" / "local" / "both.yaml").write_text("group: both\ntask: [fixed, broken]\n")
    suite = _write_suite(small / "suite.yaml", [_task("both")])
    _evaluate(small, suite=suite)
    _append(small / "sets" / "local" / "questions.jsonl")
    _evaluate(small, suite=suite)
    assert stub.asked == ["Both", "Both"]


def test_official_tasks_depend_on_local_data(small, stub):
    _write_mmstar(small / "sets")
    (data,) = (small / "sets" / "Lin-Chen").rglob("*.parquet")
    suite = _write_suite(small / "suite.yaml", [_task("mmstar")])
    _evaluate(small, suite=suite)
    data.write_bytes(data.read_bytes() + b"more")
    _evaluate(small, suite=suite)
    assert stub.asked == ["Mmstar", "Mmstar"]


def test_another_title_or_suite_does_not_matter(small, stub):
    _evaluate(small)
    task = {**_task("fixed"), "title": "Another"}
    scores = _evaluate(small, suite=_write_suite(small / "other.yaml", [task]))
    assert stub.asked == ["Fixed"] and scores.titles == ("Another",)
    assert set(scores.models[0].tasks) == {"Another"}


def test_where_tasks_data_and_model_lie_does_not_matter(small, stub):
    _evaluate(small)
    for name in ("tasks", "sets", "model", "suite.yaml"):
        (small / "elsewhere").mkdir(exist_ok=True)
        (small / name).rename(small / "elsewhere" / name)
    model = str(small / "elsewhere" / "model")
    _evaluate(small, f"moved={model}", suite=small / "elsewhere" / "suite.yaml")
    assert stub.asked == ["Fixed"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"score"', '"scores"'),
        lambda text: text.replace('"limit": null', '"limit": 7'),
        lambda text: json.dumps({**json.loads(text), "result": [1]}),
    ],
)
def test_a_broken_record_is_run_again(small, stub, damage):
    first = _evaluate(small)
    (record,) = (small / "out" / "records").glob("*.json")
    record.write_text(damage(record.read_text()))
    second = _evaluate(small)
    assert stub.asked == ["Fixed", "Fixed"]
    assert second == first == load_scores(small / "out")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 1}', '{"PATH": []}'])
def test_broken_remembered_hashes_are_made_again(small, stub, text):
    first = _evaluate(small)
    stamps = small / "out" / "fingerprints.json"
    weights = small / "model" / "model.safetensors"
    stamps.write_text(text.replace("PATH", str(weights)))
    assert _evaluate(small) == first


def test_two_names_of_the_same_weights_are_scored_once_though_side_by_side(small, stub):
    shutil.copytree(small / "model", small / "same")
    models = (str(small / "model"), str(small / "same"))
    for _ in range(20):  # a race: threads write the same record
        shutil.rmtree(small / "out", ignore_errors=True)
        stub.asked.clear()
        scores = _evaluate(small, *models, jobs=2)
        assert stub.asked == ["Fixed"]
        assert [model.tasks["Fixed"].score for model in scores.models] == [50, 50]


def test_a_dtype_that_the_model_type_does_not_take_is_not_claimed(small, stub, monkeypatch):
    monkeypatch.setattr(evaluate_module, "check_packages", lambda *_, **__: None)
    # qwen2_5_vl has no such argument: it takes the checkpoint's.
    suite = _write_suite(small / "suite.yaml", [_task("fixed")], model_type="qwen2_5_vl")
    assert _evaluate(small, suite=suite).settings["dtype"] == "auto"


# A worker that misbehaves: a process of ours in its place


def _play(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let this script be the worker; `tell` tells an event, `request` is what was asked."""
    file = folder / "worker"
    file.write_text(
        f"#!{PYTHON} -SE\n"
        "import json, os, signal, subprocess, sys, time\n"
        "request = json.load(sys.stdin)\n"
        "def tell(**event):\n    print(json.dumps(event), flush=True)\n"
        "RESULT = {'score': 1.0, 'metrics': {}, 'num_samples': 1, 'num_empty': 0,\n"
        "          'units': {}, 'seconds': 1.0}\n" + script
    )
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


ONE_A_START = """
if len(request["tasks"]) == 2:
    tell(event="loaded", image_backend="pil")
    {first}
    os.kill(os.getpid(), signal.SIGKILL)
tell(event="loaded", image_backend="pil")
for task in request["tasks"]:
    tell(event="started", title=task["title"])
    tell(event="finished", title=task["title"], result=RESULT)
"""


def test_a_worker_killed_while_it_speaks_fails_one_task(small, monkeypatch):
    first = """tell(event="started", title="Fixed")
    sys.stdout.write('{"event": "finished", "title": "Fixed", "res')
    sys.stdout.flush()"""
    _play(small, monkeypatch, ONE_A_START.format(first=first))
    _write_suite(small / "suite.yaml", [_task("fixed"), _task("broken")])
    tasks = _evaluate(small).models[0].tasks
    assert isinstance(tasks["Fixed"], Failure) and "signal 9" in tasks["Fixed"].reason
    assert isinstance(tasks["Broken"], Score)


def test_a_worker_killed_between_two_tasks_fails_none_that_another_can_run(small, monkeypatch):
    first = """tell(event="started", title="Fixed")
    tell(event="finished", title="Fixed", result=RESULT)"""
    _play(small, monkeypatch, ONE_A_START.format(first=first))
    _write_suite(small / "suite.yaml", [_task("fixed"), _task("broken")])
    tasks = _evaluate(small).models[0].tasks
    assert isinstance(tasks["Fixed"], Score) and isinstance(tasks["Broken"], Score)


def test_last_words_are_not_those_of_an_earlier_run(small, monkeypatch):
    _play(small, monkeypatch, "print('out of paper', file=sys.stderr); sys.exit(3)\n")
    (reason,) = (reason for _, _, reason in _evaluate(small).failures)
    assert "ended with exit code 3. Its last words: out of paper" in reason
    _play(small, monkeypatch, "sys.exit(4)\n")
    (reason,) = (reason for _, _, reason in _evaluate(small).failures)
    assert "ended with exit code 4" in reason and "out of paper" not in reason


def test_what_a_worker_has_started_ends_with_it(small, monkeypatch):
    # As vllm's engine: it holds the same standard error.
    _play(
        small,
        monkeypatch,
        "child = subprocess.Popen(['sleep', '1000'], stdin=subprocess.DEVNULL,\n"
        "                         stdout=subprocess.DEVNULL)\n"
        "open('child', 'w').write(str(child.pid))\n"
        "tell(event='loaded', image_backend='pil')\n"
        "tell(event='started', title='Fixed')\n"
        "tell(event='finished', title='Fixed', result=RESULT)\n",
    )
    run = threading.Thread(target=_evaluate, args=(small,), daemon=True)
    run.start()
    run.join(LIMIT_SECONDS)
    assert not run.is_alive(), "it waits for the end of what its worker has started"
    assert wait_for(lambda: _is_gone(int((small / "sets" / "child").read_text())))


def test_an_interrupt_of_the_command_alone_ends_its_worker(small, monkeypatch):
    # `kill -INT` and job schedulers do not reach the worker.
    _play(small, monkeypatch, "open('pid', 'w').write(str(os.getpid())); time.sleep(1000)\n")
    process = subprocess.Popen(
        [PYTHON, "-c", "import sys; from outliermerge.cli import main as cli;"
         "sys.executable = sys.argv.pop(1); sys.exit(cli.main(sys.argv[1:]))",
         sys.executable, "eval", str(small / "model"),
         "--suite", str(small / "suite.yaml"), "--output", str(small / "out")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    told = small / "sets" / "pid"
    try:
        assert wait_for(lambda: told.exists() and told.read_text())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 130 and "interrupted" in err and "failed" not in err
        assert _is_gone(int(told.read_text()))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["json", "argparse", "outliermerge", "threading"])
def test_no_file_of_the_data_folder_stands_for_a_module(small, name):
    """The worker comes to its import of lmms-eval, which is a stub here."""
    (small / "stub").mkdir()
    (small / "stub" / "lmms_eval.py").write_text("raise SystemExit('reached')\n")
    (small / "sets" / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    log = small / "log"
    with worker(
        {"worker": "outliermerge.evaluation.lmms_worker", "tasks": []},
        folder=small / "sets",
        log=log,
        environment={"PYTHONPATH": str(small / "stub")},
        on_progress=lambda done, total: None,
    ) as (process, events):
        assert list(events) == []
        process.wait()
    assert log.read_text().strip() == "reached"


# What is refused before anything runs


def _refused(small: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(
        ["eval", *arguments, "--suite", str(small / "suite.yaml"), "--output", str(small / "out")]
    )
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    assert not (small / "out" / "scores.json").exists()
    return code, printed.err


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["absent"], "error: model 'absent': no such file or folder"),
        (["model", "absent"], "error: model 'absent': no such file or folder"),
        (["model/config.json"], "error: model 'model/config.json': a file, expected a model"),
        (["x=model/config.json"], "error: model 'model/config.json': a file, expected a model"),
        (["model", "other/model"], "error: two models are called 'model': name them"),
        (["a=model", "a=other/model"], "error: two models are called 'a': name them"),
        (["empty"], "an empty folder, expected a model"),
        (["x="], "error: model 'x=': no such file or folder"),
        (["broken"], "outliermerge.json: is not a manifest"),
    ],
)
def test_models_that_cannot_be_meant_are_refused(small, stub, capsys, monkeypatch, models, message):
    monkeypatch.chdir(small)
    shutil.copytree("model", "other/model")
    shutil.copytree("model", "broken")
    Path("broken/outliermerge.json").write_text("{}")
    Path("empty").mkdir()
    code, told = _refused(small, capsys, *models)
    assert code == 1 and message in told and stub.asked == []
    assert told.count("\n") == 1


def test_a_name_stands_before_a_path(small, stub, monkeypatch):
    monkeypatch.chdir(small)
    (small / "runs").mkdir()
    shutil.copytree("model", "runs/t=3")
    models = ("a b=model", "runs/t=3", "min-σ, t=2=model", "σ=runs/t=3")
    names = [model.name for model in _evaluate(small, *models).models]
    assert names == ["a b", "t=3", "min-σ, t=2", "σ"]


def test_a_folder_with_an_at_sign_keeps_its_name(small, stub):
    # In a hub id a revision follows the sign.
    shutil.copytree(small / "model", small / "step@9")
    assert [model.name for model in _evaluate(small, str(small / "step@9")).models] == ["step@9"]


@pytest.mark.parametrize("option", ["--baseline=abscent", "--baseline=model "])
def test_a_baseline_that_is_no_model_is_refused_before_the_run(small, stub, capsys, option):
    code, told = _refused(small, capsys, str(small / "model"), option)
    assert code in (1, 2) and "no such model" in told and stub.asked == []


def test_an_output_that_is_a_file_is_refused(small, stub, capsys):
    (small / "out").write_text("")
    code, told = _refused(small, capsys, str(small / "model"))
    assert code == 1 and str(small / "out") in told and stub.asked == []


def test_a_judge_is_asked_for_before_the_run(small, stub, capsys, monkeypatch):
    for name in ("OPENAI_API_KEY", "API_TYPE", "LLM_JUDGE_URL"):
        monkeypatch.delenv(name, raising=False)
    _write_suite(small / "suite.yaml", [_task("fixed")], judge=True)
    code, told = _refused(small, capsys, str(small / "model"))
    assert code == 2 and "needs a judge: set OPENAI_API_KEY" in told and stub.asked == []
    monkeypatch.setenv("API_TYPE", "dummy")
    code, told = _refused(small, capsys, str(small / "model"))
    assert code == 2 and "invent scores" in told and stub.asked == []


def test_without_lmms_eval_one_message_says_what_to_install(small):
    """All installed packages but lmms-eval, by links."""
    packages = small / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("lmms_eval"):
            (packages / entry.name).symlink_to(entry)
    home = Path(cli.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "outliermerge", "eval", str(small / "model"), "--suite",
         str(small / "suite.yaml"), "--output", str(small / "out")],
        env={**os.environ, "PYTHONPATH": f"{home}:{packages}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: lmms-eval is not installed") and "outliermerge[eval]" in line
    assert not (small / "out").exists()


def test_at_a_terminal_the_reading_of_models_is_shown(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(evaluation_progress, "Console", lambda **_: terminal)
    with EvaluationProgress(["a task"], ["a model"]) as progress:
        assert "hashed" not in screen.getvalue()
        for _ in range(5):
            progress.hashing(300_000_000)
    assert re.search(r"MB of models hashed .* 1500/\?", screen.getvalue())
