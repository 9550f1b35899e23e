"""What the workers of all harnesses make of a task's samples."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from outliermerge.errors import quoted

# Multiplied by a scale of 100 it is still a valid score (formats.LARGEST).
_LARGEST = 1e138


class Runner(Protocol):
    """A harness in its process. A request is what `requests.py` makes; an entry is of one task.

    A search adds `questions` to an entry: those that are asked, None for all.
    """

    def check(self, entry: Mapping[str, Any]) -> None:
        """Raise an exception if the harness has no such task; called before `load`."""

    def load(self) -> str:
        """Load the model; return the library that prepares images, "" if none does."""

    def evaluate(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a record that the harness knows."""


def number(value: Any) -> float | None:
    """Return a metric as a number; "12.34%" is 12.34.

    >>> number("12.34%"), number(1), number("N/A")
    (12.34, 1.0, None)
    """
    try:
        found = float(value.removesuffix("%") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return None
    return found if abs(found) < _LARGEST else None  # NaN is not


def known(metrics: Iterable[str]) -> str:
    """Return a sentence that names a task's metrics."""
    return f"The task has: {', '.join(sorted(metrics)) or 'none'}"


def no_such_task(harness: str, name: str, names: Iterable[str]) -> LookupError:
    """Return the error for a task that a harness does not have; it tells the nearest name."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    advice = f" Did you mean {quoted(close[0])}?" if close else ""
    return LookupError(f"{harness} has no task of this name ({name}).{advice}")


def unit_scores(
    samples: Iterable[Mapping[str, Any]], name: str, aggregate: Callable[[list[Any]], Any]
) -> dict[str, float]:
    """Return the score of each unit: the task's own aggregation of that unit alone.

    A unit is a question, or all questions whose values name the same `unit`. If the aggregation
    cannot be applied to a single unit, the result is empty.
    """
    units: dict[str, list[Any]] = {}
    documents = set()
    for sample in samples:
        if name not in sample or sample["doc_id"] in documents:
            return {}  # a group of tasks, or several filters whose values cannot be told apart
        documents.add(sample["doc_id"])
        units.setdefault(_unit_of(sample, name), []).append(sample[name])
    try:
        scores = {unit: number(aggregate(values)) for unit, values in units.items()}
    except Exception:  # a task's own code may raise anything; its score exists anyway
        return {}
    return {unit: score for unit, score in scores.items() if score is not None}


def question_scores(
    samples: Iterable[Mapping[str, Any]], name: str, aggregate: Callable[[list[Any]], Any]
) -> dict[str, float]:
    """Return the score of each unit by the numbers of its documents, such as "4" or "4,5,6".

    Raises:
        ValueError: the aggregation cannot be applied to a single unit.
    """
    groups: dict[str, list[int]] = {}
    given = list(samples)
    for sample in given:
        groups.setdefault(_unit_of(sample, name), []).append(sample["doc_id"])
    scores = unit_scores(given, name, aggregate)
    if not given or scores.keys() != groups.keys():
        raise ValueError(f"{name} is no score of single questions, by which a search compares")
    return {",".join(map(str, sorted(groups[unit]))): score for unit, score in scores.items()}


def documents_of(questions: Iterable[str]) -> list[int]:
    """Return the numbers of the documents of questions that `question_scores` has named.

    >>> documents_of(["4", "2,3"])
    [2, 3, 4]
    """
    return sorted(int(number) for name in questions for number in name.split(","))


def _unit_of(sample: Mapping[str, Any], name: str) -> str:
    value = sample.get(name)
    return str(value["unit"] if isinstance(value, dict) and "unit" in value else sample["doc_id"])


def answer_of(sample: Mapping[str, Any]) -> str:
    """Return the first answer to a question as a text."""
    answer = sample["resps"]
    while isinstance(answer, list):
        answer = answer[0] if answer else ""
    return str(answer)


def write_answers(
    samples: Iterable[Mapping[str, Any]], path: str, *, without: Iterable[str]
) -> None:
    """Write the samples as lines of JSON, without some of their keys."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123
        for sample in samples:
            kept = {key: value for key, value in sample.items() if key not in without}
            file.write(json.dumps(kept, ensure_ascii=False, default=str) + "\n")
