"""What an evaluation found, and its file: scores.json with one record a model and task beside it.

A record is named by what it was computed from (weights, task, settings, versions), so that it is
found again whatever the model's folder is called, and is never found for other weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.storage.files import load_json, write_whole

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
        OutlierMergeError: there is none, or it is not what `outliermerge eval` wrote, as where a
            number was changed since.
    """
    file = Path(path)
    if file.is_dir():
        file = file / SCORES_NAME
    found = _read(_ScoresFile, file)
    models = tuple(_model(entry, file) for entry in found.models)
    return Scores(
        found.suite, tuple(found.titles), found.settings.model_dump(exclude_unset=True), models
    )


def _model(entry: _ModelEntry, file: Path) -> ModelScores:
    tasks: dict[str, Score | Failure] = {}
    for title, result in entry.tasks.items():
        if isinstance(result, _FailureEntry):
            tasks[title] = Failure(result.task, result.error)
            continue
        path = file.parent / result.record
        score = load_record(path, record=result.record)
        # The record has all numbers; those that are repeated must be the same.
        for name, value in result.model_dump(exclude={"num_units"}, exclude_unset=True).items():
            if value != getattr(score, name):
                raise OutlierMergeError(
                    f"{file}: {title} of {entry.name}: {name} is {quoted(value)}, but "
                    f"{quoted(getattr(score, name))} in {path}: one of them was changed. "
                    "Evaluate again."
                )
        tasks[title] = score
    merge = entry.merge.model_dump(exclude_unset=True) if entry.merge else None
    return ModelScores(entry.name, entry.path, entry.fingerprint, merge, tasks)


def load_record(path: Path, *, record: str) -> Score:
    """Read a record; `record` is what scores.json calls it.

    Raises:
        OutlierMergeError: it is not what `outliermerge eval` wrote.
    """
    found = _read(_RecordFile, path)
    content = found.result.model_dump()
    if found.checksum is not None and found.checksum != checksum_of(
        found.result.model_dump(exclude_unset=True)
    ):
        raise OutlierMergeError(
            f"{path}: was changed since `outliermerge eval` wrote it: its checksum is another. "
            "Evaluate again."
        )
    return Score(**content, record=record)


def checksum_of(result: Mapping[str, Any]) -> str:
    """Return the checksum of a record's result, which tells a change; no proof against a forger."""
    return xxhash.xxh3_128_hexdigest(json.dumps(result, sort_keys=True).encode())


_Read = TypeVar("_Read", bound=BaseModel)


def _read(kind: type[_Read], file: Path) -> _Read:
    """Read a file of ours, all of whose values must be what is written there.

    Raises:
        OutlierMergeError: it is absent, or another value is found than is expected.
    """
    content = load_json(file)
    if content is None and not file.exists():
        raise OutlierMergeError(f"{file}: no such file. `outliermerge eval` writes it.")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(shown(part) for part in problem['loc']) or 'the file'}: found "
            f"{quoted(problem['input'])}: {problem['msg']}"
            for problem in error.errors()
        ]
    raise OutlierMergeError(
        f"{file}: is not what `outliermerge eval` wrote:\n{listing(problems, limit=5)}"
    )


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


_Count = Annotated[int, Field(ge=0)]
_Inside = Annotated[str, Field(pattern=r"^records/[^/]+$")]


class _Result(_Strict):
    """The numbers of a record."""

    task: str
    metric: str
    score: float
    stderr: float | None
    num_samples: _Count
    num_empty: _Count
    seconds: float
    metrics: dict[str, float] = {}
    units: dict[str, float] = {}
    image_backend: str = ""
    date: str = ""


class _RecordFile(_Strict):
    result: _Result
    checksum: str | None = None


class _ScoreEntry(_Strict):
    """What scores.json repeats of a record."""

    record: _Inside
    num_units: _Count = 0
    task: str = ""
    metric: str = ""
    score: float = 0.0
    stderr: float | None = None
    num_samples: _Count = 0
    num_empty: _Count = 0
    seconds: float = 0.0
    metrics: dict[str, float] = {}
    image_backend: str = ""
    date: str = ""


class _FailureEntry(_Strict):
    task: str
    error: str


class _Merge(_Strict):
    method: str | None = None
    parameters: dict[str, Any] | None = None


class _ModelEntry(_Strict):
    name: str
    path: str
    fingerprint: str
    merge: _Merge | None
    tasks: dict[str, _FailureEntry | _ScoreEntry]


class _Settings(_Strict):
    model_config = ConfigDict(extra="allow")
    versions: dict[str, str | None] | None = None
    date: str | None = None


class _ScoresFile(_Strict):
    format: Literal[1]
    suite: str
    titles: list[str]
    settings: _Settings
    models: list[_ModelEntry]


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
