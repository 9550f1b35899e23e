"""The commonsense questions of the paper's Table 3: their rows, the prompt, how answers are read.

The data are those of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933): every question is a text that
names its choices, and the answer is one word.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError, quoted

SOURCE = "https://github.com/AGI-Edgerunners/LLM-Adapters"
TRAINING = "ft-training_set/commonsense_170k.json"
Row = dict[str, Any]

# In the order of Table 3, by the names of the data's folders: a title, and the words of answers.
TASKS = {
    "boolq": ("BoolQ", ("true", "false")),
    "piqa": ("PIQA", ("solution1", "solution2")),
    "social_i_qa": ("SIQA", tuple(f"answer{n}" for n in range(1, 6))),
    "hellaswag": ("HellaSwag", tuple(f"ending{n}" for n in range(1, 5))),
    "winogrande": ("WinoGrande", ("option1", "option2")),
    "ARC-Easy": ("ARC-e", tuple(f"answer{n}" for n in range(1, 6))),
    "ARC-Challenge": ("ARC-c", tuple(f"answer{n}" for n in range(1, 6))),
    "openbookqa": ("OBQA", tuple(f"answer{n}" for n in range(1, 6))),
}


def read_training(folder: str) -> list[Row]:
    """Return the rows that are trained on.

    Raises:
        OutlierMergeError: they are not there, or not of this kind.
    """
    path = Path(folder) / TRAINING
    rows = _read(path)
    for number, row in enumerate(rows):
        _expect_text(row, "instruction", path, number)
        _expect_text(row, "output", path, number)
    return rows


def read_test(folder: str, task: str) -> list[Row]:
    """Return the questions of a task, with their answers.

    Raises:
        OutlierMergeError: they are not there, or have no answers.
    """
    path = Path(folder) / "dataset" / task / "test.json"
    rows = _read(path)
    words = TASKS[task][1]
    for number, row in enumerate(rows):
        _expect_text(row, "instruction", path, number)
        if row.get("answer") not in words:
            raise OutlierMergeError(
                f"{path}: row {number}: answer is {quoted(row.get('answer'))}, expected "
                f"{' or '.join(words)}"
            )
    return rows


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        raise OutlierMergeError(
            f"{path} is not there. --data is to be a copy of LLM-Adapters: git clone --depth 1 "
            f"{SOURCE}"
        )
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutlierMergeError(f"{path}: is not JSON ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise OutlierMergeError(f"{path}: found {quoted(rows)}, expected a list of rows")
    return rows


def _expect_text(row: Any, key: str, path: Path, number: int) -> None:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise OutlierMergeError(f"{path}: row {number}: {key} is {quoted(value)}, expected a text")


def prompt(row: Row) -> str:
    """Return what a model is asked: Alpaca's prompt, which ends where the answer begins."""
    given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{row['instruction']}{given}\n\n"
        "### Response:\n"
    )


def read_answer(task: str, text: str) -> str:
    """Return the first of a task's words that a model has written; empty if there is none.

    >>> read_answer("piqa", "the correct answer is solution2")
    'solution2'
    """
    found = re.search("|".join(TASKS[task][1]), text)
    return found[0] if found else ""
