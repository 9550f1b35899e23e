r"""Scores a merge of the tiny family for `outliermerge search`, in batches: seconds for a model.

    outliermerge search tiny_min_sigma_t2 --space evals/family/space.yaml \
        --suite evals.family.searched:accuracy -o searched

The questions are the validation sets that the parents' training did not see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration

from evals.family import data
from evals.family.model import build_tokenizer
from evals.family.score import answers

TRAINING = Path(__file__).parent / "models" / "training.json"


@cache
def _rows() -> dict[str, dict[str, dict[str, Any]]]:
    seed = json.loads(TRAINING.read_text())["seed"]
    return {
        task: {str(i): row for i, row in enumerate(data.rows(task, "validation", seed))}
        for task in data.TASKS
    }


def accuracy(
    model: LlavaForConditionalGeneration, questions: Mapping[str, Sequence[str]] | None = None
) -> dict[str, dict[str, float]]:
    """Return by task and question 100 where the greedy answer is right, else 0."""
    tokenizer = build_tokenizer()
    result = {}
    for task, rows in _rows().items():
        names = list(rows) if questions is None else questions.get(task, [])
        asked = [rows[name] for name in names]
        given = answers(model, tokenizer, asked)
        result[task] = {
            name: 100.0 * (answer == row["answer"])
            for name, row, answer in zip(names, asked, given, strict=True)
        }
    return result
