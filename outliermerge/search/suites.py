"""Scores models by a suite of `eval`: its harness stays in a process, with one model at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.early import lacking_by_task
from outliermerge.evaluation.fingerprint import versions
from outliermerge.evaluation.model_types import check_packages
from outliermerge.evaluation.requests import check_judge, dtype_of, environment_of, request_of
from outliermerge.evaluation.suite import Suite
from outliermerge.evaluation.worker_process import why_it_ended, worker
from outliermerge.execution.threads import choose_device
from outliermerge.search.questions import Answers
from outliermerge.search.workplace import Merged

_LOG_NAME = "suite.log"


class SuiteScorer:
    """Scores by the harness of a suite; a question is an independent unit of a task.

    Scores of which less is better, such as perplexities, are taken with the other sign. A ratio
    over all texts, such as bits per byte, is taken text by text.

    Args:
        suite: the tasks and settings.
        folder: for the harness's files and its log.
        threads: processor threads on a CPU.
    """

    learns = False

    def __init__(self, suite: Suite, *, folder: Path, threads: int = 1) -> None:
        document = suite.document
        self._versions = versions(document.harness)
        check_packages(
            suite.model_type, load_in_8bit=document.load_in_8bit, harness=document.harness
        )
        check_judge(suite)
        if lacking := lacking_by_task(suite):
            raise OutlierMergeError("\n".join(f"{task}: {why}" for task, why in lacking.items()))
        self._suite, self._folder = suite, folder.absolute()
        self._device, self._threads = choose_device(document.device), threads
        self._stack = ExitStack()
        self._process: Any = None
        self._events: Iterator[dict[str, Any]] = iter(())
        self._log_start = 0

    def identity(self) -> Mapping[str, Any]:
        """Return the suite and the versions of what asks it."""
        return {
            "suite": self._suite.document.model_dump(mode="json", exclude_defaults=True),
            "versions": self._versions,
        }

    def learn(self, name: str, parent: Merged) -> None:
        """Take up nothing."""

    def score(self, model: Merged, questions: Mapping[str, Sequence[str]] | None) -> Answers:
        """Return what a model answers.

        Raises:
            OutlierMergeError: it does not load, or a task fails.
        """
        if self._process is None:
            self._start(model.path)
        line = {"model": model.checksum, "path": str(model.path), "questions": questions}
        try:
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: its last event says why, or its code and its log
        for event in self._events:
            if event["event"] == "failed":
                raise OutlierMergeError(f"{self._suite.name}: {event['reason']}")
            answers: Answers = event["answers"]
            return answers
        title, log = self._suite.harness.title, self._folder / _LOG_NAME
        said = why_it_ended(title, self._process.wait(), log, self._log_start)
        self.close()  # the next model gets a new process
        raise OutlierMergeError(f"{said} (log: {log})")

    def close(self) -> None:
        """End the process."""
        self._stack.close()
        self._process = None

    def _start(self, path: Path) -> None:
        suite, log = self._suite, self._folder / _LOG_NAME
        self._folder.mkdir(parents=True, exist_ok=True)
        tasks = suite.document.tasks
        request = request_of(
            suite,
            tasks,
            path=path,
            device=self._device,
            dtype=dtype_of(suite, self._device),
            work_folder=self._folder,
            answers={
                task.title: self._folder / f"answers-{number}.jsonl"
                for number, task in enumerate(tasks)
            },
        )
        self._log_start = log.stat().st_size if log.exists() else 0
        started = worker(
            request | {"path_argument": suite.kind.path_argument},
            folder=suite.data or self._folder,
            log=log,
            environment=environment_of(suite, self._device, self._threads),
            on_progress=lambda done, total: None,
            program="question_worker",
        )
        self._process, self._events = self._stack.enter_context(started)
