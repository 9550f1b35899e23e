"""The scores that are there already, each under what it was computed from."""

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
from outliermerge.evaluation.models import Model
from outliermerge.evaluation.scores import Score, load_record
from outliermerge.evaluation.suite import Suite, SuiteTask
from outliermerge.evaluation.task_files import task_files

_JUDGE = ("API_TYPE", "MODEL_VERSION", "OPENAI_API_URL", "LLM_JUDGE_URL")


class DamagedRecordError(OutlierMergeError):
    """A record is not what was written."""


class Records:
    """The records of a folder, for one suite at given settings and versions.

    A record is found if the model's files, the task's files and local data, settings and versions
    are what they were; lmms-eval's own cache, which goes by the model's path, is not used.
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
        torchvision = version("torchvision") if util.find_spec("torchvision") else None
        common = {
            "format": FORMAT,
            "settings": dict(settings),
            "versions": {
                **{name: versions[name] for name in ("lmms_eval", "transformers", "torch")},
                "torchvision": torchvision,
            },
            "judge": {name: os.environ.get(name) for name in _JUDGE}
            if suite.document.judge
            else None,
        }
        self._identities = {
            task.title: common | _task_identity(task, suite, fingerprints)
            for task in suite.document.tasks
        }

    def find(self, model: Model, task: SuiteTask) -> Score | None:
        """Return the score of a model on a task; None where there is none.

        Raises:
            DamagedRecordError: there is one, and it is not what was written: score again.
            OutlierMergeError: something else has the name of a file that is to be written.
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
        self, model: Model, task: SuiteTask, result: Mapping[str, Any], image_backend: str
    ) -> Score:
        """Write what a worker found, and return it as a score."""
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

    def answers_path(self, model: Model, task: SuiteTask) -> Path:
        """Return where a worker writes the answers: beside the record."""
        return self._place(model, task)[0].with_suffix(".jsonl")

    def _place(self, model: Model, task: SuiteTask) -> tuple[Path, dict[str, Any]]:
        identity = {**self._identities[task.title], "model": model.fingerprint}
        key = xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())
        name = re.sub(r"[^\w.-]", "_", task.task)[:60]  # another name is another key
        return self._folder / "records" / f"{name}-{key}.json", identity

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _task_identity(task: SuiteTask, suite: Suite, fingerprints: Fingerprints) -> dict[str, Any]:
    files = task_files(task.task, suite.tasks_folder, suite.data)
    return {
        "task": task.task,
        "metric": task.metric,
        "scale": task.scale,
        "limit": suite.limit_of(task),
        "generation": suite.generation_of(task),
        "files": fingerprints.of_files(files),
    }


def _stderr(score: float, units: list[float]) -> float | None:
    """Return the standard error of the mean of units: std(units, ddof=1) / √n.

    None where the score is so far from that mean that it is another quantity: a task may average
    over categories, which a limit leaves unequal.
    """
    if len(units) < 2:
        return None
    mean = sum(units) / len(units)
    variance = sum((unit - mean) ** 2 for unit in units) / (len(units) - 1)
    stderr = float((variance / len(units)) ** 0.5)
    return stderr if abs(score - mean) <= max(stderr, 1e-6) else None
