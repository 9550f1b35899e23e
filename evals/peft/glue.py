"""The eight tasks of GLUE that the paper's Table 2 has: their rows, their metrics, its settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.peft.runs import first_line
from evals.peft.study import Texts
from outliermerge.errors import OutlierMergeError, quoted

HUB = "nyu-mll/glue"
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        title: as in Table 2.
        texts: the keys of a row's texts.
        num_labels: 1 for a number in place of a class.
        metrics: the names of GLUE's metrics; the first is Table 2's.
        rate, epochs, max_tokens: of Table 10, for what the paper trains.
        validation: the split that is scored.
        beside: a split that is scored, too, by the first metric.
    """

    title: str
    texts: tuple[str, ...]
    num_labels: int
    metrics: tuple[str, ...]
    rate: float
    epochs: int
    max_tokens: int
    validation: str = "validation"
    beside: str | None = None


TASKS = {
    "mnli": Task(
        "MNLI", ("premise", "hypothesis"), 3, ("accuracy",), 5e-4, 12, 256,
        "validation_matched", "validation_mismatched",
    ),
    "sst2": Task("SST-2", ("sentence",), 2, ("accuracy",), 8e-4, 24, 128),
    "cola": Task("CoLA", ("sentence",), 2, ("matthews",), 8e-4, 25, 64),
    "qqp": Task("QQP", ("question1", "question2"), 2, ("accuracy", "f1"), 1e-3, 5, 320),
    "qnli": Task("QNLI", ("question", "sentence"), 2, ("accuracy",), 5e-4, 5, 512),
    "rte": Task("RTE", ("sentence1", "sentence2"), 2, ("accuracy",), 1.2e-3, 50, 320),
    "mrpc": Task("MRPC", ("sentence1", "sentence2"), 2, ("accuracy", "f1"), 1e-3, 30, 320),
    "stsb": Task(
        "STS-B", ("sentence1", "sentence2"), 1, ("correlation", "pearson", "spearman"), 5e-4, 25,
        128,
    ),
}  # fmt: skip


# Metrics of what was predicted (classes, or numbers) and what is right.


def accuracy(predicted: np.ndarray, right: np.ndarray) -> float:
    """Return the share of classes that are right."""
    return float((predicted == right).mean())


def f1(predicted: np.ndarray, right: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0 if none of it is found."""
    found = ((predicted == 1) & (right == 1)).sum()
    wrong = ((predicted == 1) != (right == 1)).sum()
    return float(2 * found / (2 * found + wrong)) if found else 0.0


def matthews(predicted: np.ndarray, right: np.ndarray) -> float:
    """Return Matthews's correlation of two classes: Pearson's of their numbers."""
    return pearson(predicted, right)


def pearson(predicted: np.ndarray, right: np.ndarray) -> float:
    """Return Pearson's correlation; 0 where one side has only one value."""
    one, other = (values - values.mean() for values in (predicted, right))
    size = math.sqrt(float((one * one).sum()) * float((other * other).sum()))
    return float((one * other).sum() / size) if size else 0.0


def spearman(predicted: np.ndarray, right: np.ndarray) -> float:
    """Return Pearson's correlation of the ranks, equal values sharing their mean rank."""
    return pearson(_ranks(predicted), _ranks(right))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def correlation(predicted: np.ndarray, right: np.ndarray) -> float:
    """Return the mean of Pearson's and Spearman's, GLUE's score of STS-B."""
    return (pearson(predicted, right) + spearman(predicted, right)) / 2


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman, correlation)
}


# Rows.


def read(name: str, split: str, folder: str | None) -> list[Row]:
    """Return the rows of a split, from FOLDER/TASK/SPLIT.jsonl or else from the hub.

    Raises:
        OutlierMergeError: they are not there, or have no texts or labels.
    """
    task = TASKS[name]
    if folder is None:
        where, rows = f"{HUB}, {name}, {split}", _from_hub(name, split)
        places = [f"{where}: row {number}" for number in range(len(rows))]
    else:
        path = Path(folder) / name / f"{split}.jsonl"
        where, (rows, places) = str(path), _from_file(path)
    if not rows:
        raise OutlierMergeError(f"{where}: has no rows")
    for row, place in zip(rows, places, strict=True):
        _check(row, task, place)
    return rows


def _from_hub(name: str, split: str) -> list[Row]:
    needed = ("train", TASKS[name].validation, TASKS[name].beside)
    files = " and ".join(f"FOLDER/{name}/{each}.jsonl" for each in needed if each)
    advice = (
        "Where the hub cannot be reached, give the tasks as files: --data FOLDER, with "
        f"{files}, a row of {HUB} on each line"
    )
    try:
        import datasets
    except ImportError as error:
        raise OutlierMergeError(
            "GLUE is read from the hub by datasets, which is not installed: "
            f"pip install 'outliermerge[paper]'. {advice}"
        ) from error
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(HUB, name, split=split)
    except Exception as error:  # of several network libraries
        raise OutlierMergeError(
            f"{HUB} cannot be read: {name}, {split}: {first_line(error)}. {advice}"
        ) from error
    rows: list[Row] = found.to_list()
    return rows


def _from_file(path: Path) -> tuple[list[Row], list[str]]:
    if not path.is_file():
        there = sorted(each.name for each in path.parent.glob("*.jsonl"))
        raise OutlierMergeError(
            f"{path} is not there; its folder has {', '.join(there) or 'no *.jsonl'}. Each line is "
            f"to be a row of {HUB} in JSON"
        )
    rows, places = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise OutlierMergeError(f"{path}: is no text in UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise OutlierMergeError(f"{path}:{number}: is not JSON ({error})") from error
        places.append(f"{path}:{number}")
    return rows, places


def _check(row: Any, task: Task, place: str) -> None:
    if not isinstance(row, dict):
        raise OutlierMergeError(f"{place}: found {quoted(row)}, expected an object")
    for key in task.texts:
        if not isinstance(row.get(key), str):
            raise OutlierMergeError(
                f"{place}: {key} is {quoted(row.get(key))}, expected a text; {task.title}'s rows "
                f"have {', '.join(task.texts)} and label"
            )
    label = row.get("label")
    if label is None or label == -1:
        raise OutlierMergeError(
            f"{place}: has no label. GLUE keeps the labels of its test splits to itself: take "
            "train and validation"
        )
    is_number = isinstance(label, (int, float)) and not isinstance(label, bool)
    if task.num_labels == 1:
        if not is_number or not math.isfinite(label):
            raise OutlierMergeError(f"{place}: label is {quoted(label)}, expected a number")
    elif not is_number or label not in range(task.num_labels):
        raise OutlierMergeError(
            f"{place}: label is {quoted(label)}, expected 0 to {task.num_labels - 1}"
        )


def texts(task: Task, rows: Sequence[Row], tokenizer: Any, max_tokens: int) -> Texts:
    """Return the tokens and labels of rows."""
    columns = [[row[key] for row in rows] for key in task.texts]
    tokens = tokenizer(*columns, truncation=True, max_length=max_tokens)["input_ids"]
    kind = torch.float32 if task.num_labels == 1 else torch.int64
    return Texts(tokens, torch.tensor([row["label"] for row in rows], dtype=kind))


def score(task: Task, logits: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Return a task's metrics times 100, of what a model says of each example."""
    predicted = logits[:, 0] if task.num_labels == 1 else logits.argmax(1)
    return {name: 100 * METRICS[name](predicted, right) for name in task.metrics}
