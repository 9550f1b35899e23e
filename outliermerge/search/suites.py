"""Scores models by suites of `eval`: their harness stays in a process, with one model at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

from outliermerge.errors import OutlierMergeError, SpecError, shown
from outliermerge.evaluation.early import lacking_by_task
from outliermerge.evaluation.fingerprint import Fingerprints, versions
from outliermerge.evaluation.model_types import check_packages
from outliermerge.evaluation.records import task_identity
from outliermerge.evaluation.requests import (
    HOW_ASKED,
    check_judge,
    dtype_of,
    environment_of,
    request_of,
)
from outliermerge.evaluation.suite import Suite
from outliermerge.evaluation.task_files import own_files
from outliermerge.evaluation.worker_process import worker
from outliermerge.execution.threads import choose_device
from outliermerge.search.process import Process
from outliermerge.search.questions import Answers
from outliermerge.search.workplace import Merged

_OF_A_PROCESS = ("harness", "model_args", "device", "dtype", "load_in_8bit", "batch_size",
                 *HOW_ASKED, "confirm_run_unsafe_code")  # fmt: skip


class SuiteScorer:
    """Scores by the harness of suites; a question is an independent unit of a task.

    Scores of which less is better, such as perplexities, are taken with the other sign. A ratio
    over all texts, such as bits per byte, is taken text by text.

    Args:
        suites: the tasks and settings.
        folder: for the harness's files and its log.
        threads: processor threads on a CPU.

    Raises:
        SpecError: a judge is needed and none is named, or one loaded model does not do for all.
        OutlierMergeError: the harness, packages of its model type or local data are not there.
    """

    learns = False

    def __init__(self, *suites: Suite, folder: Path, threads: int = 1) -> None:
        self.suites = tuple(suite.name for suite in suites) if len(suites) > 1 else ()
        suite = _joined(suites)
        document = suite.document
        self._versions = versions(document.harness)
        check_packages(
            suite.model_type, load_in_8bit=document.load_in_8bit, harness=document.harness
        )
        for each in suites:
            check_judge(each)
        if lacking := lacking_by_task(suite):
            raise OutlierMergeError("\n".join(f"{task}: {why}" for task, why in lacking.items()))
        self._suite, self._threads = suite, threads
        self._process = Process(
            suite.harness.title, folder, "suite", self._begin, name=f"{suite.name}: "
        )
        self.device = document.device

    def identity(self) -> Mapping[str, Any]:
        """Return the suite with hashes of its tasks' files, and the versions of what asks it."""
        fingerprints = Fingerprints(self._process.folder)
        document = self._suite.document.model_dump(mode="json", exclude_defaults=True)
        return {
            "suite": document | {"device": self.device.partition(":")[0]},
            "tasks": {
                task.title: task_identity(task, self._suite, fingerprints)
                for task in self._suite.document.tasks
            },
            "versions": self._versions,
        }

    def learn(self, name: str, parent: Merged) -> None:
        """Take up nothing."""

    def start(self) -> None:
        """Start the harness."""
        self._process.start()

    def score(
        self,
        model: Merged,
        questions: Mapping[str, Sequence[str]] | None,
        seconds: float | None = None,
    ) -> Answers:
        """Return what a model answers.

        Raises:
            LateError: that takes longer than `seconds`.
            OutlierMergeError: it does not load, or a task fails.
        """
        return self._process.score(model, questions, seconds)

    def close(self) -> None:
        """End the process, and remove what it wrote, but for a log that says why one failed."""
        self._process.close()

    def _begin(
        self, log: Path
    ) -> AbstractContextManager[tuple[Popen[bytes], Iterator[dict[str, Any]]]]:
        suite, folder = self._suite, log.parent
        tasks, device = suite.document.tasks, choose_device(self.device)
        request = request_of(
            suite,
            tasks,
            path=folder,  # each line names the model's own
            device=device,
            dtype=dtype_of(suite, device),
            work_folder=folder,
            answers={
                task.title: folder / f"answers-{number}.jsonl" for number, task in enumerate(tasks)
            },
        )
        return worker(
            request | {"path_argument": suite.kind.path_argument},
            folder=suite.data or folder,
            log=log,
            environment=environment_of(suite, device, self._threads),
            on_progress=lambda done, total: None,
            program="outliermerge.evaluation.question_worker",
        )


def _joined(suites: Sequence[Suite]) -> Suite:
    """Return suites as one that a single process asks one loaded model.

    Raises:
        SpecError: they need different processes or models.
    """
    first, *others = suites
    if not others:
        return first
    folders = [suite for suite in suites if suite.tasks_folder is not None]
    for other in others:
        if told := _difference(first, other, folders):
            raise SpecError(
                f"the suites {first.name} and {other.name} cannot be searched together: {told}. "
                "All suites of a search ask one loaded model. Search by one of them, and score the "
                "winner by the other with `eval`"
            )
    tasks = [
        task.model_copy(
            update={
                "title": f"{suite.name}/{task.title}",
                "limit": suite.limit_of(task),
                "generation": suite.generation_of(task),
                "num_fewshot": suite.shots_of(task),
            }
        )
        for suite in suites
        for task in suite.document.tasks
    ]
    document = first.document.model_copy(
        update={"tasks": tasks, "limit": None, "generation": {}, "num_fewshot": None}
    )
    folder = folders[0].tasks_folder if folders else None
    name = " and ".join(suite.name for suite in suites)
    return replace(first, name=name, document=document, tasks_folder=folder)


def _difference(first: Suite, other: Suite, folders: Sequence[Suite]) -> str:
    """Return what keeps two suites from one process; empty if nothing does."""
    for key in _OF_A_PROCESS:
        own, theirs = (getattr(suite.document, key) for suite in (first, other))
        if own != theirs:
            return f"`{key}` is {shown(own)} in one, {shown(theirs)} in the other"
    if first.model_type != other.model_type:
        return f"`model_type` is {first.model_type} in one, {other.model_type} in the other"
    if first.data != other.data:
        return "they name different folders as `data`"
    if len({suite.tasks_folder for suite in folders}) > 1:
        return "they name different folders as `tasks_folder`"
    for suite in (first, other):
        if folders and suite.tasks_folder is None:
            own_names = {
                name
                for file in own_files(folders[0].tasks_folder, suite.data)
                for name in file.names
            }
            if both := sorted(own_names & {task.task for task in suite.document.tasks}):
                return f"`tasks_folder` of one has a task {shown(both[0])}, which the other names"
    return ""
