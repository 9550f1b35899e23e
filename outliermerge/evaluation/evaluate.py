"""Evaluates models on a suite: what has a record is taken from there, the rest lmms-eval runs."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib import util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.errors import SpecError
from outliermerge.evaluation.fingerprint import Fingerprints, task_files, versions
from outliermerge.evaluation.model_types import model_arguments
from outliermerge.evaluation.models import Model, find_models
from outliermerge.evaluation.scores import (
    Failure,
    ModelScores,
    Score,
    Scores,
    load_record,
    write_json,
)
from outliermerge.evaluation.suite import Suite, SuiteTask
from outliermerge.evaluation.worker_process import why_it_ended, worker
from outliermerge.execute import choose_device

_RECORD_FORMAT = 1


class Listener:
    """Is told what happens, from any thread. Does nothing with it."""

    def hashing(self, num_bytes: int) -> None:
        """Bytes of a model's files have been read."""

    def kept(self, model: str, title: str, score: Score) -> None:
        """A score was there from an earlier run."""

    def loading(self, model: str, titles: Sequence[str]) -> None:
        """lmms-eval is starting and loads the model for these tasks."""

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
    """Score models by lmms-eval and write scores.json.

    A model and task that have been scored with the same weights, settings, data and versions are
    not run again. A task that fails is reported as failed; the others go on.

    Args:
        models: folders or hub ids, each with its name in tables before it where it is to have
            another than the folder's: "NAME=PATH".
        suite: what to ask, from `load_suite`.
        output: the folder for scores.json, the records, the answers and lmms-eval's logs.
        jobs: models evaluated at once.
        threads: processor threads of each on a CPU.
        listener: is told what happens.

    Raises:
        SpecError: two models of one name, or a judge is needed and none is named.
        OutlierMergeError: a model is absent, or lmms-eval is.
    """
    listener = listener or Listener()
    installed = versions()
    _check_judge(suite)
    device = choose_device(suite.document.device)
    dtype = suite.document.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    folder = Path(output).expanduser().absolute()
    for name in ("records", "logs", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    fingerprints = Fingerprints(folder, listener.hashing)
    found = find_models(models, fingerprints)
    settings = {
        "model_type": suite.document.model_type,
        "model_args": suite.document.model_args,
        "device": device.partition(":")[0],
        "dtype": dtype,
        "load_in_8bit": suite.document.load_in_8bit,
        "batch_size": suite.document.batch_size,
    }
    run = _Run(suite, settings, device, installed, folder, threads, listener, fingerprints)
    return run.evaluate(found, jobs)


def _check_judge(suite: Suite) -> None:
    if os.environ.get("API_TYPE") == "dummy":
        raise SpecError("API_TYPE=dummy makes lmms-eval's judge invent scores: unset it")
    if suite.document.judge and not (
        os.environ.get("OPENAI_API_KEY")
        or (os.environ.get("API_TYPE") == "local" and os.environ.get("LLM_JUDGE_URL"))
    ):
        raise SpecError(
            f"the suite {suite.name} needs a judge: set OPENAI_API_KEY (and OPENAI_API_URL, "
            "MODEL_VERSION where they are not OpenAI's), or API_TYPE=local and LLM_JUDGE_URL"
        )


@dataclass
class _Run:
    suite: Suite
    settings: Mapping[str, Any]
    device: str
    installed: Mapping[str, str]
    folder: Path
    threads: int
    listener: Listener
    fingerprints: Fingerprints

    def evaluate(self, models: Sequence[Model], jobs: int) -> Scores:
        self._lock = threading.Lock()
        self._stopped = False
        self._results: dict[str, dict[str, Score | Failure]] = {m.name: {} for m in models}
        self._identities = {task.title: self._identity(task) for task in self.suite.document.tasks}
        self.fingerprints.save()
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self._evaluate_model, model, models) for model in models]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._save(models)

    def _identity(self, task: SuiteTask) -> dict[str, Any]:
        """Return all that a task's score depends on besides the model's files."""
        files = task_files(task.task, self.suite.tasks_folder, self.suite.data)
        torchvision = version("torchvision") if util.find_spec("torchvision") else None
        hashes = {
            name: self.fingerprints.of_files(paths, Path("/")) if paths else None
            for name, paths in files.items()
        }
        used = {key: self.installed[key] for key in ("lmms_eval", "transformers", "torch")}
        judge = ("API_TYPE", "MODEL_VERSION", "OPENAI_API_URL", "LLM_JUDGE_URL")
        return {
            "format": _RECORD_FORMAT,
            "task": task.task,
            "metric": task.metric,
            "scale": task.scale,
            "limit": self.suite.limit_of(task),
            "generation": self.suite.generation_of(task),
            "files": hashes,
            "settings": dict(self.settings),
            "versions": {**used, "torchvision": torchvision},
            "judge": {name: os.environ.get(name) for name in judge}
            if self.suite.document.judge
            else None,
        }

    def _record(self, model: Model, title: str) -> tuple[Path, dict[str, Any]]:
        identity = {**self._identities[title], "model": model.fingerprint}
        key = xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())
        return self.folder / "records" / f"{identity['task']}-{key}.json", identity

    def _evaluate_model(self, model: Model, models: Sequence[Model]) -> None:
        pending = []
        for task in self.suite.document.tasks:
            path, identity = self._record(model, task.title)
            try:
                if json.loads(path.read_text("utf-8"))["identity"] != identity:
                    raise ValueError("another identity of the same key")
                score = load_record(path, record=self._relative(path))
            except (OSError, ValueError, KeyError, TypeError):
                pending.append(task)
            else:
                self._results[model.name][task.title] = score
                self.listener.kept(model.name, task.title, score)
        while pending and not self._stopped:
            pending = self._run_worker(model, pending, models)

    def _run_worker(
        self, model: Model, pending: Sequence[SuiteTask], models: Sequence[Model]
    ) -> list[SuiteTask]:
        """Run lmms-eval on some tasks; return those that it did not come to."""
        left = {task.title: task for task in pending}
        current: str | None = None
        image_backend = ""
        loaded = False
        reason = ""
        log = self.folder / "logs" / (re.sub(r"[^\w.-]", "_", model.name) + ".log")
        self.listener.loading(model.name, list(left))

        def on_progress(done: int, total: int) -> None:
            if current is not None:
                self.listener.progress(model.name, current, done, total)

        with worker(
            self._request(model, pending),
            folder=self.suite.data or self.folder / "work",
            log=log,
            environment=self._environment(),
            on_progress=on_progress,
        ) as (process, events):
            for event in events:
                match event["event"]:
                    case "loaded":
                        loaded, image_backend = True, event["image_backend"]
                    case "not loaded":
                        reason = f"the model does not load: {event['reason']}"
                    case "started":
                        current = event["title"]
                    case "failed":
                        current = None
                        task = left.pop(event["title"])
                        self._finish(model, task, Failure(task.task, event["reason"]), models)
                    case "finished":
                        current = None
                        task = left.pop(event["title"])
                        score = self._keep(model, task, event["result"], image_backend)
                        self._finish(model, task, score, models)
            returncode = process.wait()
        if not left or self._stopped:
            return []
        reason = reason or why_it_ended(returncode, log)
        failed = [left.pop(current)] if loaded and current else [*left.values()]
        for task in failed:
            self._finish(model, task, Failure(task.task, f"{reason} (log: {log})"), models)
        return [*left.values()] if loaded and current else []

    def _request(self, model: Model, pending: Sequence[SuiteTask]) -> dict[str, Any]:
        name, arguments = model_arguments(
            self.suite.document.model_type,
            path=str(model.path),
            device=self.device,
            dtype=self.settings["dtype"],
            load_in_8bit=self.suite.document.load_in_8bit,
            extra=self.suite.document.model_args,
        )
        return {
            "model_type": name,
            "model_args": arguments,
            "batch_size": self.suite.document.batch_size,
            "tasks_folder": str(self.suite.tasks_folder) if self.suite.tasks_folder else None,
            "work_folder": str(self.folder / "work"),
            "tasks": [
                {
                    "title": task.title,
                    "task": task.task,
                    "metric": task.metric,
                    "scale": task.scale,
                    "limit": self.suite.limit_of(task),
                    "generation": self.suite.generation_of(task),
                    "samples_path": str(self._samples(self._record(model, task.title)[0])),
                }
                for task in pending
            ],
        }

    def _environment(self) -> dict[str, str]:
        environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if self.device == "cpu":
            # Without it, one run was ten times slower on a busy machine.
            environment["OMP_NUM_THREADS"] = str(self.threads)
        return environment

    def _keep(
        self, model: Model, task: SuiteTask, result: Mapping[str, Any], image_backend: str
    ) -> Score:
        path, identity = self._record(model, task.title)
        score = Score(
            task=task.task,
            metric=task.metric,
            stderr=_stderr(list(result["units"].values())),
            image_backend=image_backend,
            date=date.today().isoformat(),
            record=self._relative(path),
            **result,
        )
        kept = {name: value for name, value in vars(score).items() if name != "record"}
        write_json(path, {"identity": identity, "model": model.reference, "result": kept})
        return score

    def _samples(self, record: Path) -> Path:
        return record.with_suffix(".jsonl")

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _finish(
        self, model: Model, task: SuiteTask, result: Score | Failure, models: Sequence[Model]
    ) -> None:
        with self._lock:
            self._results[model.name][task.title] = result
            self._save(models)
        self.listener.finished(model.name, task.title, result)

    def _save(self, models: Sequence[Model]) -> Scores:
        titles = tuple(task.title for task in self.suite.document.tasks)
        results = {
            model.name: {
                title: self._results[model.name][title]
                for title in titles
                if title in self._results[model.name]
            }
            for model in models
        }
        scored = [r for tasks in results.values() for r in tasks.values() if isinstance(r, Score)]
        scores = Scores(
            suite=self.suite.name,
            titles=titles,
            settings={
                **self.settings,
                "limit": self.suite.document.limit,
                "image_backend": ", ".join(sorted({score.image_backend for score in scored})),
                "versions": dict(self.installed),
                "date": max((score.date for score in scored), default=date.today().isoformat()),
            },
            models=tuple(
                ModelScores(m.name, m.reference, m.fingerprint, m.merge, results[m.name])
                for m in models
            ),
        )
        scores.save(self.folder)
        return scores


def _stderr(units: Sequence[float]) -> float | None:
    """Return the standard error of the mean: std(units, ddof=1) / √n."""
    if len(units) < 2:
        return None
    mean = sum(units) / len(units)
    variance = sum((unit - mean) ** 2 for unit in units) / (len(units) - 1)
    return float((variance / len(units)) ** 0.5)
