"""Results of an evaluation, and their files: scores.json, and a record per model and task.

The name of a record is made from its inputs (weights, task, settings, versions). So it is found
again under any name of the model's folder, and never for other weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.folders.absent import meant_inside
from outliermerge.errors import OutlierMergeError, as_path, quoted, shown
from outliermerge.evaluation.formats import (
    FORMAT,
    MAX_NAME,
    FailureEntry,
    RecordFile,
    ScoreEntry,
    ScoresEntry,
    check_seal,
    read_record,
    read_scores,
    sealed,
    write_json,
)

SCORES_NAME = "scores.json"


@dataclass(frozen=True)
class Score:
    """A model's score on one task.

    Attributes:
        task: the harness's name.
        metric: the key of the score among `metrics`, such as "accuracy,none".
        score: 0–100; bits per byte and perplexity are as they are.
        stderr: standard error of the mean of `units`, on the same scale; None if there are no
            units.
        num_samples: questions answered.
        num_empty: how many of these have an empty answer.
        seconds: wall time of the task, loading of the model excluded.
        metrics: all numbers that the task reports, unchanged.
        units: the score of each independent observation, 0–100, by its name. An observation is a
            question, or a group of questions that belong together. Of a ratio of sums, such as
            bits per byte, each observation's contribution, whose mean is the score.
        lower_is_better: whether a lower score is a better one.
        image_backend: the library that prepared the images, "pil" or torchvision.
        date: the date of the run.
        record: the file with all this, relative to scores.json.
        checksum: the checksum of the record; "" if an earlier version wrote it without one.
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
    lower_is_better: bool = False
    image_backend: str = ""
    date: str = ""
    record: str = ""
    checksum: str = field(default="", compare=False)


@dataclass(frozen=True)
class Failure:
    """Why a model has no score on a task."""

    task: str
    reason: str


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model.

    Attributes:
        name: the name in tables.
        path: the path or hub id that was given.
        fingerprint: the hash of its weights and of the files that are loaded with them; "" if
            unknown.
        merge: `method` and `parameters` if outliermerge merged the model, else None.
        tasks: the scores and failures by the tasks' titles.
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
        suite: the suite's name.
        titles: the tasks' titles, in order.
        settings: device, dtype, load_in_8bit, model_type, limit, image_backend, versions, date, and
            of lm-eval how questions are put.
        models: the models' scores, in the given order.
        unsealed: names of models with scores that were read without a checksum.
    """

    suite: str
    titles: tuple[str, ...]
    settings: Mapping[str, Any]
    models: tuple[ModelScores, ...]
    unsealed: tuple[str, ...] = field(default=(), compare=False)

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
        """Write scores.json into a folder, which already has the records."""
        path = folder / SCORES_NAME
        write_json(path, self.as_dict())
        return path

    def as_dict(self) -> dict[str, Any]:
        """Return the contents of scores.json, with a checksum."""
        content = {
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
        return sealed(content)


def _as_dict(result: Score | Failure) -> dict[str, Any]:
    if isinstance(result, Failure):
        return {"task": result.task, "error": result.reason}
    return {name: value for name, value in vars(result).items() if name != "units"} | {
        "num_units": len(result.units)
    }


def load_scores(path: str | Path) -> Scores:
    """Read a scores.json (or the folder with one) and the records beside it.

    Raises:
        OutlierMergeError: there is no such file, or it is not as `outliermerge eval` wrote it, for
            example because a number was changed.
    """
    file = as_path(path)
    if file.is_dir():
        folder, file = file, file / SCORES_NAME
        inside = [path.parent for path in sorted(folder.glob(f"*/{SCORES_NAME}"))]
        if inside and not file.exists():
            meant = meant_inside(inside, "evaluation")
            raise OutlierMergeError(f"{folder}: no {SCORES_NAME}, {meant}")
    found = read_scores(file)
    try:
        check_names([model.name for model in found.models])
    except OutlierMergeError as error:
        raise OutlierMergeError(f"{file}: {error}") from error
    models = tuple(_model(entry, file) for entry in found.models)
    check_seal(file, found)  # last: a message on a number that differs from its record says more
    return Scores(
        suite=found.suite,
        titles=tuple(found.titles),
        settings=found.settings.model_dump(exclude_unset=True),
        models=models,
        unsealed=unsealed(models)
        if found.checksum is not None
        else tuple(model.name for model in models),
    )


def unsealed(models: Sequence[ModelScores]) -> tuple[str, ...]:
    """Return the names of models with scores from records without a checksum."""
    return tuple(
        model.name
        for model in models
        if any(isinstance(r, Score) and not r.checksum for r in model.tasks.values())
    )


def _model(entry: ScoresEntry, file: Path) -> ModelScores:
    tasks = {
        title: Failure(result.task, result.error)
        if isinstance(result, FailureEntry)
        else _score(result, file, entry, title)
        for title, result in entry.tasks.items()
    }
    merge = entry.merge.model_dump() if entry.merge else None
    return ModelScores(entry.name, entry.path, entry.fingerprint, merge, tasks)


def _score(entry: ScoreEntry, file: Path, model: ScoresEntry, title: str) -> Score:
    """Return the score of a record, whose numbers scores.json must repeat."""
    path = file.parent / entry.record
    record = read_record(path)
    score = _score_of(record, entry.record)
    held = {**_as_dict(score), "fingerprint": record.identity.model}
    given = {**entry.model_dump(exclude_unset=True), "fingerprint": model.fingerprint}
    for name, value in given.items():
        if value != held[name]:
            raise OutlierMergeError(
                f"{file}: {shown(title)} of {shown(model.name)}: {name} is {quoted(value)}, but "
                f"{quoted(held[name])} in {path}: one of them was changed since `outliermerge "
                "eval` wrote them. Restore it, or evaluate again."
            )
    check_seal(path, record)
    return score


def _score_of(record: RecordFile, name: str) -> Score:
    return Score(**record.result.model_dump(), record=name, checksum=record.checksum or "")


def load_record(path: Path, *, record: str) -> tuple[Score, dict[str, Any]]:
    """Return a record's score and its inputs.

    Args:
        path: the path of the record.
        record: the record's name in scores.json.

    Raises:
        OutlierMergeError: it is not as `outliermerge eval` wrote it.
    """
    found = read_record(path)
    check_seal(path, found)
    return _score_of(found, record), found.identity.model_dump()


def check_names(names: Sequence[str]) -> None:
    """Refuse two models with the same name, and names that tables and files cannot contain.

    Raises:
        OutlierMergeError: there are such names.
    """
    for name in names:
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise OutlierMergeError(
                f"a model cannot be called {quoted(name)}: expected 1 to {MAX_NAME} signs that "
                "can be printed. Give it a name, as in NAME=PATH."
            )
        if names.count(name) > 1:
            raise OutlierMergeError(
                f"two models are called {quoted(name)}: name them, as in {shown(name)}-a=PATH"
            )
