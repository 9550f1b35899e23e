"""Scores models by a Python function."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.errors import OutlierMergeError, SpecError, quoted, shown
from outliermerge.optional import require_torch
from outliermerge.search.questions import Answers
from outliermerge.search.scorer import LoadedModel
from outliermerge.search.workplace import Merged

ONE_TASK = "score"
"""The name of the task where a function has only one."""


def is_function(name: str) -> bool:
    """Tell whether a name is that of a function, as package.module:function.

    >>> is_function("mine.scores:score"), is_function("evals/tiny.yaml"), is_function("C:/x.yaml")
    (True, False, False)
    """
    module, colon, function = name.partition(":")
    parts = [*module.split("."), function]
    return bool(colon) and all(part.isidentifier() for part in parts)


def import_function(name: str) -> Callable[..., Any]:
    """Return the function that package.module:function names.

    Raises:
        SpecError: it cannot be imported, or is none.
    """
    module_name, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109  as `python -m` has it
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise SpecError(f"{name}: no module {quoted(error.name)} can be imported") from error
    except AttributeError as error:
        raise SpecError(f"{name}: {module_name} has no {quoted(attribute)}") from error
    except (Exception, SystemExit) as error:
        raise SpecError(f"{name}: importing it failed: {error}") from error
    if not callable(found):
        raise SpecError(f"{name}: is a {type(found).__name__}, expected a function")
    function: Callable[..., Any] = found
    return function


class FunctionScorer:
    """Scores by a function of a model.

    The function gets what transformers loads from the model's folder (in float32 on a CPU), or a
    dict of tensors where the models are single files or have no class there. It returns by
    question a number, more being better, or by task such a dict. If it has a parameter `questions`,
    it is given those that are asked (in the form that it returns: a list, or lists by task) or
    None for all; if it has a parameter `folder`, the folder of the model.

    Args:
        name: package.module:function.
        models: loads them; several scorers may share one.
    """

    learns = False
    suites: tuple[str, ...] = ()

    def __init__(self, name: str, models: LoadedModel) -> None:
        require_torch(f"a search by {name}")
        self._name, self._function = name, import_function(name)
        try:
            parameters = set(inspect.signature(self._function).parameters)
        except (TypeError, ValueError):  # some built-in functions
            parameters = set()
        self._takes = {"questions", "folder"} & parameters
        self._models, self.device = models, models.device

    def __reduce__(self) -> tuple[type[FunctionScorer], tuple[str, LoadedModel]]:
        return FunctionScorer, (self._name, self._models)

    def identity(self) -> Mapping[str, Any]:
        """Return the function's name, and a hash of its module's file."""
        module = sys.modules[self._name.partition(":")[0]]
        file = getattr(module, "__file__", None)
        lines = Path(file).read_bytes() if file else b""  # some built-in modules have none
        return {"function": self._name, "module": xxhash.xxh3_64_hexdigest(lines)}

    def learn(self, name: str, parent: Merged) -> None:
        """Take up nothing."""

    def score(self, model: Merged, questions: Mapping[str, Sequence[str]] | None) -> Answers:
        """Return the scores that the function gives.

        Raises:
            OutlierMergeError: the model does not load, the function fails, or gives something else.
        """
        import torch

        loaded = self._models.load(model)
        given: dict[str, Any] = {}
        if "questions" in self._takes:
            is_flat = questions is not None and questions.keys() == {ONE_TASK}
            given["questions"] = questions[ONE_TASK] if questions and is_flat else questions
        if "folder" in self._takes:
            given["folder"] = model.path
        try:
            # What it prints is no part of the result, which --json prints.
            with torch.inference_mode(), redirect_stdout(sys.stderr):
                found = self._function(loaded, **given)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and asyncio.CancelledError, too
            raise OutlierMergeError(
                f"{self._name}: failed: {type(error).__name__}: {error}"
            ) from error
        answers = _answers(self._name, found)
        return answers if questions is None else _only(self._name, answers, questions)

    def close(self) -> None:
        """Let go of the model."""
        self._models.forget()


def _answers(name: str, found: Any) -> Answers:
    """Return what a function gave, as scores by task."""
    if not isinstance(found, Mapping) or not found:
        raise OutlierMergeError(
            f"{name}: returned {quoted(found)}, expected a dict of scores by question, or of such "
            "dicts by task"
        )
    has_tasks = all(isinstance(value, Mapping) for value in found.values())
    tasks = found if has_tasks else {ONE_TASK: found}
    answers: dict[str, dict[str, float]] = {}
    for task, scores in tasks.items():
        own = answers[str(task)] = {}
        for question, value in scores.items():
            try:
                own[str(question)] = float(value)
            except Exception as error:  # of whatever was returned
                raise OutlierMergeError(
                    f"{name}: the score of {shown(question)} is {quoted(value)}, expected a number"
                ) from error
            if not math.isfinite(own[str(question)]):
                raise OutlierMergeError(
                    f"{name}: the score of {shown(question)} is {value}, expected a finite number"
                )
    return answers


def _only(name: str, answers: Answers, questions: Mapping[str, Sequence[str]]) -> Answers:
    """Return the scores of some questions."""
    found: dict[str, dict[str, float]] = {}
    for task, own in questions.items():
        scores = answers.get(task, {})
        if lacking := [question for question in own if question not in scores]:
            raise OutlierMergeError(
                f"{name}: gave no score for {len(lacking)} questions, such as {shown(lacking[0])}"
            )
        found[task] = {question: scores[question] for question in own}
    return found
