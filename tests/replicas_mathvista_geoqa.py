"""MathVista and GeoQA in small, as they are published, and their tasks run in lmms-eval."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pictures

EVALS = Path(__file__).parent.parent / "evals"
TEXT = Value("string")
MATHVISTA_FEATURES = Features(
    {
        "pid": TEXT,
        "question": TEXT,
        "image": TEXT,
        "decoded_image": Image(),
        "choices": Sequence(TEXT),
        "unit": TEXT,
        "precision": Value("float64"),
        "answer": TEXT,
        "question_type": TEXT,
        "answer_type": TEXT,
        "metadata": {
            "category": TEXT,
            "context": TEXT,
            "grade": TEXT,
            "img_height": Value("int64"),
            "img_width": Value("int64"),
            "language": TEXT,
            "skills": Sequence(TEXT),
            "source": TEXT,
            "split": TEXT,
            "task": TEXT,
        },
        "query": TEXT,
    }
)
# Question, choices, unit, precision, answer, answer type, task.
MATHVISTA = [
    ("Is it red?", ["Yes", "No"], None, None, "No", "text", "visual question answering"),
    (
        "∠A is ( )",
        ["40°", "60°", "140°", "60°"],
        None,
        None,
        "140°",
        "text",
        "geometry problem solving",
    ),
    ("Which is it?", ["(c)", "(a)", "(b)"], None, None, "(a)", "text", "figure question answering"),
    ("How old is it?", None, "years", None, "14", "integer", "visual question answering"),
    ("How cold is it?", None, None, None, "-3", "integer", "figure question answering"),
    ("How long is it?", None, None, 1.0, "0.0", "float", "textbook question answering"),
    ("What does it cost?", None, None, 2.0, "1234.5", "float", "math word problem"),
    ("Which years?", None, None, None, "[2014, 2016]", "list", "figure question answering"),
]
GEOQA = [
    ("In triangle ABC, angle A is ()", ["40°", "60°", "120°", "140°"], "D"),
    ("AB parallel  CD, then angle 2 is equal to ()", ["50°", "60°", "65°", "90°"], "C"),
    ("The length of AB is ()", ["2", "2√{3}", "√{3}", "4"], "B"),
    ("The perimeter is ()", ["6cm", "7cm", "8cm", "9cm"], "A"),
    ("如图，∠B is ()", ["20°", "30°", "40°", "50°"], "C"),
    ("Question: how far is D from E ()", ["1", "2", "3", "none"], "D"),
]

# Stands in for a model: gives every question its right answer, then none.
RUN = """
import json, sys
from lmms_eval.tasks import TaskManager, get_task_dict
name, tasks = sys.argv[1:]
task = get_task_dict([name], TaskManager(include_path=tasks, include_defaults=False))[name]
docs = list(task.test_docs())
def scores(responses):
    values = {}
    for doc, response in zip(docs, responses, strict=True):
        for metric, value in task.process_results(doc, [response]).items():
            values.setdefault(metric, []).append(value)
    return {metric: task.aggregation()[metric](values[metric]) for metric in values}
print(json.dumps({
    "right": scores([task.doc_to_target(doc) for doc in docs]),
    "empty": scores(["" for doc in docs]),
    "prompts": [task.doc_to_text(doc) for doc in docs],
    "pictures": [task.doc_to_visual(doc)[0].convert("RGB").getpixel((0, 0)) for doc in docs],
    "generation": task.config.generation_kwargs,
}))
"""


def load(path: str) -> ModuleType:
    """A file under `evals`, by its path, as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), EVALS / f"{path}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(number: int) -> Pictures.Image:
    return Pictures.new("RGB", (32, 32), (30 * number, 0, 255))


def save_mathvista(folder: Path) -> None:
    """The hub's dataset under its id, with one question of each kind."""
    rows: list[dict[str, Any]] = []
    for i, (question, choices, unit, precision, answer, answer_type, task) in enumerate(MATHVISTA):
        rows.append(
            {
                "pid": str(i + 1),
                "question": question,
                "image": f"images/{i + 1}.jpg",
                "decoded_image": picture(i),
                "choices": choices,
                "unit": unit,
                "precision": precision,
                "answer": answer,
                "question_type": "multi_choice" if choices else "free_form",
                "answer_type": answer_type,
                "metadata": {
                    "category": "math-targeted-vqa",
                    "context": "geometry diagram",
                    "grade": "high school",
                    "img_height": 32,
                    "img_width": 32,
                    "language": "english",
                    "skills": ["arithmetic reasoning"],
                    "source": "replica",
                    "split": "testmini",
                    "task": task,
                },
                "query": f"Hint: the solution prompt.\nQuestion: {question}",
            }
        )
    data = folder / "AI4Math" / "MathVista" / "data"
    data.mkdir(parents=True)
    table = Dataset.from_list(rows, features=MATHVISTA_FEATURES)
    table.to_parquet(data / "testmini-00000-of-00001.parquet")


def save_geoqa_sources(folder: Path) -> None:
    """G-LLaVA's two lists and the folder of pictures."""
    (folder / "images" / "test").mkdir(parents=True)
    questions, answers = [], []
    for i, (question, choices, answer) in enumerate(GEOQA):
        picture(i).save(folder / "images" / "test" / f"{i}.png")
        a, b, c, d = choices
        options = f"A:{a}\nB:{b}\nC:{c}\nD:{d}"
        text = f"\nReason, then answer as Answer: xxx.\nQuestion:{question}\nChoices:\n{options}"
        questions.append({"question_id": i, "image": f"test/{i}.png", "text": text})
        answers.append({"question_id": i, "text": answer})
    for name, lines in (("test_questions", questions), ("test_answers", answers)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def save_geoqa(folder: Path) -> None:
    """What the converter makes of the published files."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        save_geoqa_sources(source)
        load("geoqa").convert(
            source / "test_questions.jsonl",
            source / "test_answers.jsonl",
            source / "images",
            folder / "geoqa" / "test.parquet",
        )


def run_task(python: Path, name: str, folder: Path) -> dict[str, Any]:
    """What lmms-eval's own machinery makes of a task on the replicas in a folder.

    In a process of its own: importing lmms-eval changes torch's global settings.
    """
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [python, "-c", RUN, name, str(EVALS / "tasks")],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result
