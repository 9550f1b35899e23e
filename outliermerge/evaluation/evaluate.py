"""Evaluates models on a suite: scores with a record are reused, a harness computes the others."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.early import check_models, lacking_by_task
from outliermerge.evaluation.fingerprint import Fingerprints, versions
from outliermerge.evaluation.formats import check_place
from outliermerge.evaluation.model_types import (
    check_packages,
)
from outliermerge.evaluation.models import EvaluatedModel, find_models, merge_of
from outliermerge.evaluation.records import DamagedRecordError, Records
from outliermerge.evaluation.requests import (
    HOW_ASKED,
    check_judge,
    dtype_of,
    environment_of,
    request_of,
)
from outliermerge.evaluation.scores import (
    SCORES_NAME,
    Failure,
    ModelScores,
    Score,
    Scores,
    unsealed,
)
from outliermerge.evaluation.suite import Suite, SuiteTask
from outliermerge.evaluation.worker_process import end, why_it_ended, worker
from outliermerge.execution.threads import choose_device
from outliermerge.output.names import as_local
from outliermerge.storage.failures import naming
from outliermerge.storage.system import lock

TABLE_NAME, CHART_NAME = "scores.md", "scores.png"
OUTPUT_NAMES = (SCORES_NAME, TABLE_NAME, CHART_NAME)


class Listener:
    """Callbacks for events of an evaluation, called from any thread. These do nothing."""

    def hashing(self, num_bytes: int) -> None:
        """Bytes of a model's files have been read."""

    def kept(self, model: str, title: str, score: Score) -> None:
        """A score from an earlier run is reused."""

    def damaged(self, model: str, title: str, reason: str) -> None:
        """The record of a score was changed since it was written; the score is computed again."""

    def loading(self, model: str, titles: Sequence[str]) -> None:
        """The harness is starting and loads the model for these tasks."""

    def progress(self, model: str, title: str, done: int, total: int) -> None:
        """Questions have been answered, or documents prepared."""

    def finished(self, model: str, title: str, result: Score | Failure) -> None:
        """A task is done."""


def evaluate(
    models: Sequence[str],
    suite: Suite,
    *,
    output: str | Path,
    jobs: int = 1,
    threads: int = 1,
    listener: Listener | None = None,
) -> Scores:
    """Score models by the suite's harness and write scores.json.

    A model and task that were already scored with the same weights, settings, data and versions are
    not run again. If a task fails, it is reported as failed, and the others continue.

    Args:
        models: folders or hub ids. "NAME=PATH" gives a model another name in tables than the
            folder's.
        suite: the tasks and settings, from `load_suite`.
        output: the folder for scores.json, the records, the answers and the harness's logs.
        jobs: how many models are evaluated at the same time.
        threads: processor threads for each model on a CPU.
        listener: its methods are called at each event.

    Raises:
        SpecError: a judge is needed and none is named.
        OutlierMergeError: a model or the harness is missing, a model is of a type that the suite's
            model type does not load, or two models have the same name.
    """
    folder = as_local(output, "scores are written to a folder of this machine").absolute()
    listener = listener or Listener()
    document = suite.document
    installed = versions(document.harness)
    check_packages(suite.model_type, load_in_8bit=document.load_in_8bit, harness=document.harness)
    check_judge(suite)
    device = choose_device(document.device)
    dtype = dtype_of(suite, device)
    paths = find_models(models)
    check_models(
        suite.model_type,
        [(reference, path) for _, reference, path in paths],
        harness=document.harness,
        own_code=bool(document.model_args.get("trust_remote_code")),
        chat_template=document.apply_chat_template and "tokenizer" not in document.model_args,
    )
    for name in ("records", "logs", "work"):
        with naming(folder, "made"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": suite.model_type,
        "model_args": document.model_args,
        "device": device.partition(":")[0],
        "dtype": dtype,
        "load_in_8bit": document.load_in_8bit,
        "batch_size": document.batch_size,
    }
    if document.harness == "lm_eval":
        settings |= {key: getattr(document, key) for key in HOW_ASKED}
    for name in OUTPUT_NAMES:
        check_place(folder / name)
    with _alone_in(folder):
        fingerprints = Fingerprints(folder, listener.hashing)
        found = [
            EvaluatedModel(name, reference, path, fingerprints.of_model(path), merge_of(path))
            for name, reference, path in paths
        ]
        records = Records(folder, suite, fingerprints, settings=settings, versions=installed)
        fingerprints.save()
        run = _Run(suite, found, folder, records, listener, settings | {"versions": installed})
        return run.evaluate(jobs, device=device, threads=threads)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    place = folder / "work" / "lock"
    check_place(place)
    with place.open("w") as file:
        if not lock(file.fileno()):
            raise OutlierMergeError(f"{folder}: another evaluation is writing there")
        yield


class _Run:
    """One evaluation: its results so far, and the workers for the rest."""

    def __init__(
        self,
        suite: Suite,
        models: Sequence[EvaluatedModel],
        folder: Path,
        records: Records,
        listener: Listener,
        settings: Mapping[str, Any],
    ) -> None:
        self._suite, self._models, self._folder = suite, models, folder
        self._records, self._listener, self._settings = records, listener, settings
        self._lacking = lacking_by_task(suite)
        self._results: dict[tuple[str, str], Score | Failure] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._workers: set[subprocess.Popen[bytes]] = set()
        # Weights that are given twice are scored once.
        self._turns = {model.fingerprint: threading.Lock() for model in models}

    def evaluate(self, jobs: int, *, device: str, threads: int) -> Scores:
        """Take the existing scores, run the other tasks, and return all."""
        with ThreadPoolExecutor(jobs) as pool:
            futures = [
                pool.submit(self._evaluate_model, model, device, threads) for model in self._models
            ]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._stopped.set()
                for process in list(self._workers):
                    end(process)
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._save()

    def _evaluate_model(self, model: EvaluatedModel, device: str, threads: int) -> None:
        with self._turns[model.fingerprint]:
            pending = []
            for task in self._suite.document.tasks:
                try:
                    score = self._records.find(model, task)
                except DamagedRecordError as error:
                    self._listener.damaged(model.name, task.title, str(error))
                    score = None
                if score is None and (reason := self._lacking.get(task.task)):
                    self._finish(model, task, Failure(task.task, reason))
                elif score is None:
                    pending.append(task)
                else:
                    self._results[model.name, task.title] = score
                    self._listener.kept(model.name, task.title, score)
            while pending and not self._stopped.is_set():
                pending = self._run_worker(model, pending, device, threads)

    def _run_worker(
        self, model: EvaluatedModel, pending: Sequence[SuiteTask], device: str, threads: int
    ) -> list[SuiteTask]:
        """Run the harness on some tasks; return the tasks that it did not reach."""
        left = {task.title: task for task in pending}
        current: str | None = None
        image_backend = reason = ""
        log = self._folder / "logs" / (re.sub(r"[^\w.-]", "_", model.name)[:60] + ".log")
        check_place(log)
        log_start = log.stat().st_size if log.exists() else 0
        self._listener.loading(model.name, list(left))

        def on_progress(done: int, total: int) -> None:
            if current is not None:
                self._listener.progress(model.name, current, done, total)

        with worker(
            self._request(model, pending, device),
            folder=self._suite.data or self._folder / "work",
            log=log,
            environment=environment_of(self._suite, device, threads),
            on_progress=on_progress,
        ) as (process, events):
            self._workers.add(process)
            if self._stopped.is_set():
                return []
            for event in events:
                match event["event"]:
                    case "loaded":
                        image_backend = event["image_backend"]
                    case "not loaded":
                        reason = f"the model does not load: {event['reason']}"
                    case "started":
                        current = event["title"]
                    case "failed":
                        task, current = left.pop(event["title"]), None
                        self._finish(model, task, Failure(task.task, event["reason"]))
                    case "finished":
                        task, current = left.pop(event["title"]), None
                        score = self._records.keep(model, task, event["result"], image_backend)
                        self._finish(model, task, score)
            returncode = process.wait()
            self._workers.discard(process)
        if not left or self._stopped.is_set():
            return []
        reason = reason or why_it_ended(self._suite.harness.title, returncode, log, log_start)
        if current:
            failed = [left.pop(current)]
        elif len(left) < len(pending):  # it ended between two tasks: the next start tries the rest
            failed = []
        else:
            failed = [left.pop(title) for title in list(left)]
        for task in failed:
            self._finish(model, task, Failure(task.task, f"{reason} (log: {log})"))
        return [*left.values()]

    def _request(
        self, model: EvaluatedModel, pending: Sequence[SuiteTask], device: str
    ) -> dict[str, Any]:
        return request_of(
            self._suite,
            pending,
            path=model.path,
            device=device,
            dtype=self._settings["dtype"],
            work_folder=self._folder / "work",
            answers={task.title: self._records.answers_path(model, task) for task in pending},
        )

    def _finish(self, model: EvaluatedModel, task: SuiteTask, result: Score | Failure) -> None:
        with self._lock:
            self._results[model.name, task.title] = result
            self._save()
        self._listener.finished(model.name, task.title, result)

    def _save(self) -> Scores:
        """Write the results so far."""
        titles = tuple(task.title for task in self._suite.document.tasks)
        found = dict(self._results)
        scored = [result for result in found.values() if isinstance(result, Score)]
        models = tuple(
            ModelScores(
                model.name,
                model.reference,
                model.fingerprint,
                model.merge,
                {
                    title: found[model.name, title]
                    for title in titles
                    if (model.name, title) in found
                },
            )
            for model in self._models
        )
        scores = Scores(
            suite=self._suite.name,
            titles=titles,
            settings={
                **self._settings,
                "limit": self._suite.document.limit,
                **self._shots(),
                "image_backend": ", ".join(sorted({score.image_backend for score in scored})),
                "date": max((score.date for score in scored), default=date.today().isoformat()),
            },
            models=models,
            unsealed=unsealed(models),
        )
        scores.save(self._folder)
        return scores

    def _shots(self) -> dict[str, int]:
        shots = self._suite.document.num_fewshot
        return {} if shots is None else {"num_fewshot": shots}
