"""The existing scores, each stored under a key of its inputs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import date
from importlib import util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.fingerprint import Fingerprints
from outliermerge.evaluation.formats import (
    FORMAT,
    check_place,
    digest_of,
    sealed,
    write_json,
)
from outliermerge.evaluation.models import EvaluatedModel
from outliermerge.evaluation.scores import Score, load_record
from outliermerge.evaluation.suite import Suite, SuiteTask
from outliermerge.evaluation.task_files import task_files

_JUDGE = ("API_TYPE", "MODEL_VERSION", "OPENAI_API_URL", "LLM_JUDGE_URL")


class DamagedRecordError(OutlierMergeError):
    """A record was changed since it was written."""


class Records:
    """The records of a folder, for one suite at given settings and versions.

    A record is found if the model's files, the task's files and local data, the settings and the
    versions are unchanged. The harnesses' own caches are not used: their keys are models' paths.
    """

    def __init__(
        self,
        folder: Path,
        suite: Suite,
        fingerprints: Fingerprints,
        *,
        settings: Mapping[str, Any],
        versions: Mapping[str, str],
    ) -> None:
        self._folder = folder
        harness = suite.document.harness
        packages: dict[str, str | None] = {}
        packages |= {name: versions[name] for name in (harness, "transformers", "torch")}
        if harness == "lmms_eval":  # it prepares images
            found = util.find_spec("torchvision")
            packages["torchvision"] = version("torchvision") if found else None
        common = {
            "format": FORMAT,
            "settings": dict(settings),
            "versions": packages,
            "judge": {name: os.environ.get(name) for name in _JUDGE}
            if suite.document.judge
            else None,
        }
        self._identities = {
            task.title: common | task_identity(task, suite, fingerprints)
            for task in suite.document.tasks
        }

    def find(self, model: EvaluatedModel, task: SuiteTask) -> Score | None:
        """Return the score of a model on a task; None if there is none.

        Raises:
            DamagedRecordError: there is a record, but it was changed; the caller scores again.
            OutlierMergeError: the path of a file to be written is taken by something else.
        """
        path, identity = self._place(model, task)
        check_place(path)
        check_place(self.answers_path(model, task))
        if not path.exists():
            return None
        try:
            score, scored = load_record(path, record=self._relative(path))
            if scored != identity:
                raise OutlierMergeError(f"{path}: is of other weights, settings or data")
            return score
        except (OSError, OutlierMergeError) as error:
            raise DamagedRecordError(str(error)) from error

    def keep(
        self, model: EvaluatedModel, task: SuiteTask, result: Mapping[str, Any], image_backend: str
    ) -> Score:
        """Write a worker's result as a record, and return it as a score."""
        path, identity = self._place(model, task)
        found = {
            "task": task.task,
            "metric": task.metric,
            "stderr": _stderr(result["score"], list(result["units"].values())),
            "image_backend": image_backend,
            "date": date.today().isoformat(),
            **result,
        }
        content = sealed(
            {
                "identity": identity,
                "model": model.reference,
                "result": found,
                "answers": digest_of(self.answers_path(model, task)),
            }
        )
        write_json(path, content)
        return Score(**found, record=self._relative(path), checksum=content["checksum"])

    def answers_path(self, model: EvaluatedModel, task: SuiteTask) -> Path:
        """Return the path for the worker's file of answers, beside the record."""
        return self._place(model, task)[0].with_suffix(".jsonl")

    def _place(self, model: EvaluatedModel, task: SuiteTask) -> tuple[Path, dict[str, Any]]:
        identity = {**self._identities[task.title], "model": model.fingerprint}
        key = xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())
        name = re.sub(r"[^\w.-]", "_", task.task)[:60]  # another name is another key
        return self._folder / "records" / f"{name}-{key}.json", identity

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def task_identity(task: SuiteTask, suite: Suite, fingerprints: Fingerprints) -> dict[str, Any]:
    """Return what a task's scores depend on besides the model, its files and data hashed."""
    files = task_files(task.task, suite.tasks_folder, suite.data, harness=suite.document.harness)
    shots = suite.shots_of(task)
    return {
        **({} if shots is None else {"num_fewshot": shots}),
        "task": task.task,
        "metric": task.metric,
        "scale": task.scale,
        "limit": suite.limit_of(task),
        "generation": suite.generation_of(task),
        "files": fingerprints.of_files(files),
    }


def _stderr(score: float, units: list[float]) -> float | None:
    """Return the standard error of the mean of units: std(units, ddof=1) / √n.

    None if the score is too far from that mean to be the same quantity: a task may average over
    categories, which a limit makes unequal in size.
    """
    if len(units) < 2:
        return None
    mean = sum(units) / len(units)
    variance = sum((unit - mean) ** 2 for unit in units) / (len(units) - 1)
    stderr = float((variance / len(units)) ** 0.5)
    return stderr if abs(score - mean) <= max(stderr, 1e-6) else None
