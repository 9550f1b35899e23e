"""What an evaluation found, and its file: scores.json with one record a model and task beside it.

A record is named by what it was computed from (weights, task, settings, versions), so that it is
found again whatever the model's folder is called, and is never found for other weights.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.files import read_bytes, write_whole
from outliermerge.errors import OutlierMergeError

SCORES_NAME = "scores.json"
FORMAT = 1


@dataclass(frozen=True)
class Score:
    """A model's score on one task.

    Attributes:
        task: lmms-eval's name.
        metric: the key of the score among `metrics`, such as "accuracy,none".
        score: 0–100.
        stderr: standard error of the mean of `units`, on the same scale; None where there are none.
        num_samples: questions answered.
        num_empty: of these, those whose answer was empty.
        seconds: wall time of the task, loading of the model excluded.
        metrics: every number that the task reports, as it reports them.
        units: score of each independent observation, 0–100: of each question, or of each group of
            questions that belong together, by its name.
        image_backend: what prepared the images, "pil" or torchvision.
        date: of the run.
        record: the file with all this, relative to scores.json.
    """

    task: str
    metric: str
    score: float
    stderr: float | None
    num_samples: int
    num_empty: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict, repr=False)
    image_backend: str = ""
    date: str = ""
    record: str = ""


@dataclass(frozen=True)
class Failure:
    """Why a model has no score on a task."""

    task: str
    reason: str


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model.

    Attributes:
        name: as it stands in tables.
        path: of the model, as given.
        fingerprint: of its weights and of the files that it is loaded with; "" if not known.
        merge: `method` and `parameters` of a model that outliermerge merged, else None.
        tasks: by title.
    """

    name: str
    path: str
    fingerprint: str
    merge: Mapping[str, Any] | None
    tasks: Mapping[str, Score | Failure]


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation.

    Attributes:
        suite: its name.
        titles: of the tasks, in order.
        settings: device, dtype, load_in_8bit, model_type, limit, image_backend, versions, date.
        models: in the order given.
    """

    suite: str
    titles: tuple[str, ...]
    settings: Mapping[str, Any]
    models: tuple[ModelScores, ...]

    @property
    def failures(self) -> list[tuple[str, str, str]]:
        """Model, title and reason of every task without a score."""
        return [
            (model.name, title, result.reason)
            for model in self.models
            for title, result in model.tasks.items()
            if isinstance(result, Failure)
        ]

    def save(self, folder: Path) -> Path:
        """Write scores.json into a folder; the records are there already."""
        path = folder / SCORES_NAME
        write_json(path, self.as_dict())
        return path

    def as_dict(self) -> dict[str, Any]:
        """Return what scores.json holds."""
        return {
            "format": FORMAT,
            "suite": self.suite,
            "titles": list(self.titles),
            "settings": dict(self.settings),
            "models": [
                {
                    "name": model.name,
                    "path": model.path,
                    "fingerprint": model.fingerprint,
                    "merge": model.merge,
                    "tasks": {title: _as_dict(result) for title, result in model.tasks.items()},
                }
                for model in self.models
            ],
        }


def _as_dict(result: Score | Failure) -> dict[str, Any]:
    if isinstance(result, Failure):
        return {"task": result.task, "error": result.reason}
    return {name: value for name, value in vars(result).items() if name != "units"} | {
        "num_units": len(result.units)
    }


def load_scores(path: str | Path) -> Scores:
    """Read a scores.json (or the folder with one) and the records beside it.

    Raises:
        OutlierMergeError: there is none, or it is not what `outliermerge eval` wrote.
    """
    file = Path(path)
    if file.is_dir():
        file = file / SCORES_NAME
    try:
        content = _read(file)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return Scores(
            suite=content["suite"],
            titles=tuple(content["titles"]),
            settings=content["settings"],
            models=tuple(_model(entry, file.parent) for entry in content["models"]),
        )
    except OutlierMergeError:
        raise
    except FileNotFoundError as error:
        raise OutlierMergeError(
            f"{error.filename}: no such file. `outliermerge eval` writes it."
        ) from error
    except OSError as error:
        raise OutlierMergeError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutlierMergeError(
            f"{file}: is not what `outliermerge eval` wrote: {type(error).__name__}: {error}"
        ) from error


def _read(path: Path) -> Any:
    data = read_bytes(path)
    if data is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("lists or objects too deep in one another") from error


def _model(entry: Mapping[str, Any], folder: Path) -> ModelScores:
    tasks: dict[str, Score | Failure] = {}
    for title, result in entry["tasks"].items():
        if "error" in result:
            tasks[title] = Failure(result["task"], result["error"])
        else:
            tasks[title] = load_record(folder / result["record"], record=result["record"])
    return ModelScores(entry["name"], entry["path"], entry["fingerprint"], entry["merge"], tasks)


def load_record(path: Path, *, record: str) -> Score:
    """Read a record; `record` is what scores.json calls it.

    Raises:
        OutlierMergeError: it is not what `outliermerge eval` wrote.
    """
    try:
        return Score(**_read(path)["result"], record=record)
    except (ValueError, KeyError, TypeError) as error:
        raise OutlierMergeError(
            f"{path}: is not what `outliermerge eval` wrote: {type(error).__name__}: {error}"
        ) from error


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, by `write_whole`."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text.encode())


def check_names(names: Sequence[str]) -> None:
    """Refuse two models of one name.

    Raises:
        OutlierMergeError: there are.
    """
    for name in names:
        if names.count(name) > 1:
            raise OutlierMergeError(
                f"two models are called {name!r}: name them, as in {name}-a=PATH"
            )
