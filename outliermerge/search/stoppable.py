"""Scores in this process, or where a trial may take only so long in one that can be ended."""

from __future__ import annotations

import base64
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen
from typing import Any

from outliermerge.evaluation.worker_process import worker
from outliermerge.search.process import Process
from outliermerge.search.questions import Answers
from outliermerge.search.scorer import InProcess
from outliermerge.search.workplace import Merged


class Stoppable:
    """Scores by what scores in this process.

    A function that hangs cannot be stopped safely, a process can. So where the seconds are limited,
    the scorer, as it is then, is sent to a process that stays.

    Args:
        scorer: scores models in this process.
        folder: for the process's log.
    """

    def __init__(self, scorer: InProcess, folder: Path) -> None:
        self._scorer = scorer
        self.learns, self.device, self.suites = scorer.learns, scorer.device, scorer.suites
        self._process = Process("the process that scores", folder, "scoring", self._begin)

    def identity(self) -> Mapping[str, Any]:
        """Return what the scores depend on."""
        return self._scorer.identity()

    def learn(self, name: str, parent: Merged) -> None:
        """Take up what a parent says."""
        self._scorer.learn(name, parent)

    def start(self) -> None:
        """Start the process."""
        self._process.start()

    def score(
        self,
        model: Merged,
        questions: Mapping[str, Sequence[str]] | None,
        seconds: float | None = None,
    ) -> Answers:
        """Return the scores of a model.

        Raises:
            LateError: that takes longer than `seconds`.
            OutlierMergeError: the model does not load, or the scorer fails.
        """
        if seconds is None:
            self._process.end()  # it holds a model
            return self._scorer.score(model, questions)
        return self._process.score(model, questions, seconds)

    def close(self) -> None:
        """End what was started."""
        self._process.close()
        self._scorer.close()

    def _begin(
        self, log: Path
    ) -> AbstractContextManager[tuple[Popen[bytes], Iterator[dict[str, Any]]]]:
        self._scorer.close()  # the model that it has loaded
        scorer = base64.b64encode(pickle.dumps(self._scorer)).decode()
        return worker(
            {"scorer": scorer, "modules": sys.path},
            folder=Path.cwd(),
            log=log,
            environment={},
            on_progress=lambda done, total: None,
            program="outliermerge.search.scoring_worker",
        )
