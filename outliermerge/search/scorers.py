"""Chooses what scores the merges of a search, by what a command line names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.errors import ArgumentError, SpecError, argument, shown
from outliermerge.evaluation.suite import load_suite
from outliermerge.search.functions import FunctionScorer, is_function
from outliermerge.search.questions import Answers
from outliermerge.search.scorer import InProcess, LoadedModel, Scorer
from outliermerge.search.stoppable import Stoppable
from outliermerge.search.suites import SuiteScorer
from outliermerge.search.unlabelled import KINDS, UnlabelledScorer
from outliermerge.search.workplace import Merged


def find_scorer(
    names: Sequence[str], *, device: str, folder: Path, threads: int = 1, limit: int | None = None
) -> Scorer:
    """Return a scorer.

    Args:
        names: each the file of a suite, package.module:function, entropy:FILE or agreement:FILE.
        device: where models are loaded; a suite names its own, which another than cpu replaces.
        folder: for the files of a process that scores.
        threads: of a harness.
        limit: how many questions of each task of a suite there are.

    Raises:
        ArgumentError: a function is given a limit, or names do not go together.
        SpecError: there is no such function or suite, or it is wrong.
        OutlierMergeError: the harness or its data are not there.
    """
    files = [name for name in names if not _is_in_process(name)]
    if files and len(files) < len(names):
        raise ArgumentError(
            f"{argument('suite')}: {shown(files[0])} is asked by a harness, which loads the model "
            "in a process of its own: it cannot be beside a function or texts, which are given a "
            "model that is loaded here"
        )
    if files:
        own_device = None if device == "cpu" else device
        suites = [load_suite(name, limit=limit, device=own_device) for name in files]
        _refuse_twice([suite.name for suite in suites])
        return SuiteScorer(*suites, folder=folder, threads=threads)
    if limit is not None:
        raise ArgumentError(f"{argument('limit')}: a function has the questions that it has")
    models = LoadedModel(device)
    scorers = {_short(name): _in_process(name, models) for name in names}
    _refuse_twice([_short(name) for name in names])
    only = next(iter(scorers.values()))
    return Stoppable(only if len(scorers) == 1 else SeveralScorers(scorers, models), folder)


class SeveralScorers:
    """Scores one loaded model by several functions or texts, each of which is a suite.

    Args:
        scorers: by the name of the suite.
        models: loads the models for all of them.
    """

    def __init__(self, scorers: Mapping[str, InProcess], models: LoadedModel) -> None:
        self._scorers, self.suites, self.device = scorers, tuple(scorers), models.device
        self.learns = any(scorer.learns for scorer in scorers.values())

    def identity(self) -> Mapping[str, Any]:
        """Return what each of them depends on."""
        return {name: dict(scorer.identity()) for name, scorer in self._scorers.items()}

    def learn(self, name: str, parent: Merged) -> None:
        """Show a parent to those that learn."""
        for scorer in self._scorers.values():
            if scorer.learns:
                scorer.learn(name, parent)

    def score(self, model: Merged, questions: Mapping[str, Sequence[str]] | None) -> Answers:
        """Return the scores of all of them that are asked something.

        Raises:
            OutlierMergeError: the model does not load, or one of them fails.
        """
        found: dict[str, Mapping[str, float]] = {}
        for name, scorer in self._scorers.items():
            start = f"{name}/"
            own = {
                task.removeprefix(start): asked
                for task, asked in (questions or {}).items()
                if task.startswith(start)
            }
            if questions is not None and not own:
                continue
            answers = scorer.score(model, None if questions is None else own)
            found |= {f"{start}{task}": scores for task, scores in answers.items()}
        return found

    def close(self) -> None:
        """End what they have started."""
        for scorer in self._scorers.values():
            scorer.close()


def _is_in_process(name: str) -> bool:
    return name.startswith(tuple(f"{kind}:" for kind in KINDS)) or is_function(name)


def _in_process(name: str, models: LoadedModel) -> InProcess:
    kind, _, path = name.partition(":")
    return UnlabelledScorer(kind, path, models) if kind in KINDS else FunctionScorer(name, models)


def _short(name: str) -> str:
    """Return what a function or texts are called in tables.

    >>> _short("mine.scores:likelihood"), _short("entropy:data/texts.jsonl")
    ('likelihood', 'entropy')
    """
    start, _, end = name.partition(":")
    return start if start in KINDS else end


def _refuse_twice(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise SpecError(
                f"two suites are called {shown(name)}: tables could not tell them apart. Give one "
                "of them another name"
            )
