"""The file formats of an evaluation, and a strict reader for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import xxhash
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.storage.files import (
    MAX_LARGE_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_VALUES,
    read_bytes,
    write_whole,
)
from outliermerge.storage.json_text import parse_json
from outliermerge.storage.stamps import open_file

FORMAT = 1
# A record has one unit per question; the largest known task has 450,000 questions.
_MAX_VALUES = 2_000_000
_NOT_OURS = "is not what `outliermerge eval` wrote"
_BLOCK_BYTES = 1 << 22
MAX_NAME = 200
# Larger than any score, but small enough that sums of squares do not overflow.
LARGEST = 1e140


class _FileEntry(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_Text = Annotated[str, Field(max_length=10_000)]
_Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
_Positive = Annotated[float, Field(ge=0, le=LARGEST)]
_Count = Annotated[int, Field(ge=0, le=10**9)]


class _ScoreNumbers(_FileEntry):
    """The values of a score that a record and scores.json share."""

    task: _Text
    metric: _Text
    score: _Number
    stderr: _Positive | None
    num_samples: _Count
    num_empty: _Count
    seconds: _Positive
    lower_is_better: bool = False


class ResultEntry(_ScoreNumbers):
    """The numbers of a record."""

    metrics: dict[str, _Number] = {}
    units: dict[str, _Number] = {}
    image_backend: _Text = ""
    date: _Text = ""

    @model_validator(mode="after")
    def _check(self) -> ResultEntry:
        if self.num_empty > self.num_samples:
            raise ValueError(f"{self.num_empty} empty answers to {self.num_samples} questions")
        return self


class IdentityEntry(_FileEntry):
    """The inputs of a record: `model` is the fingerprint of the model's files."""

    model_config = ConfigDict(extra="allow")
    model: _Text
    task: _Text
    metric: _Text


class RecordFile(_FileEntry):
    """The contents of a record: `answers` is the checksum of the file of answers beside it."""

    identity: IdentityEntry
    model: str
    result: ResultEntry
    answers: str | None = None
    checksum: str | None = None

    @model_validator(mode="after")
    def _check(self) -> RecordFile:
        asked, scored = self.identity, self.result
        if (asked.task, asked.metric) != (scored.task, scored.metric):
            raise ValueError("the task or metric of `identity` is not that of `result`")
        return self


class ScoreEntry(_ScoreNumbers):
    """The values of a record that scores.json repeats."""

    record: Annotated[str, Field(pattern=r"^records/[^/\x00]+$", max_length=1000)]
    metrics: dict[str, _Number]
    image_backend: _Text
    date: _Text
    num_units: _Count
    checksum: str = ""


class FailureEntry(_FileEntry):
    """Why a task has no score."""

    task: _Text
    error: str


class MergeEntry(_FileEntry):
    """The merge that made a model."""

    method: _Text
    parameters: dict[str, Any]


def _kind(entry: object) -> str:
    failed = isinstance(entry, FailureEntry) or (isinstance(entry, dict) and "error" in entry)
    return "failed" if failed else "scored"


class ScoresEntry(_FileEntry):
    """A model with its tasks, by title."""

    name: _Name
    path: str
    fingerprint: _Text
    merge: MergeEntry | None
    tasks: dict[
        str,
        Annotated[
            Annotated[FailureEntry, Tag("failed")] | Annotated[ScoreEntry, Tag("scored")],
            Discriminator(_kind),
        ],
    ]


class SettingsEntry(_FileEntry):
    """The settings of an evaluation."""

    model_type: _Text | None = None
    model_args: dict[str, Any] | None = None
    device: _Text | None = None
    dtype: _Text | None = None
    load_in_8bit: bool | None = None
    batch_size: _Count | None = None
    versions: dict[str, _Text | None] | None = None
    limit: _Count | None = None
    num_fewshot: _Count | None = None
    apply_chat_template: bool | None = None
    system_instruction: _Text | None = None
    fewshot_as_multiturn: bool | None = None
    image_backend: _Text | None = None
    date: _Text | None = None


def _no_bool(value: object) -> object:
    return str(value) if isinstance(value, bool) else value  # True would be taken for 1


class ScoresFile(_FileEntry):
    """The contents of scores.json."""

    format: Annotated[Literal[1], BeforeValidator(_no_bool)]
    suite: _Text
    titles: list[_Name]
    settings: SettingsEntry
    models: list[ScoresEntry] = Field(min_length=1)
    checksum: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ScoresFile:
        for title in self.titles:
            if self.titles.count(title) > 1:
                raise ValueError(f"the title {quoted(title)} stands twice")
        for model in self.models:
            if unknown := model.tasks.keys() - set(self.titles):
                raise ValueError(f"{quoted(min(unknown))} is a task, but not among the titles")
        return self


class MergedSpec(_FileEntry):
    """The keys of the spec in a model's manifest that say how it was made."""

    model_config = ConfigDict(extra="ignore")
    merge_method: _Text
    models: list[Any]
    parameters: dict[str, Any] | None = None


class ManifestFile(_FileEntry):
    """The keys of a manifest that are used here."""

    model_config = ConfigDict(extra="ignore")
    spec: MergedSpec


_Read = TypeVar("_Read", bound=BaseModel)


def _parse(kind: type[_Read], content: object, what_if_not: str) -> _Read:
    """Return a value that was read, checked against its format.

    Raises:
        OutlierMergeError: values do not fit the format; the message names each of them.
    """
    try:
        json.dumps(content, ensure_ascii=False).encode()
        return kind.model_validate(content)
    except UnicodeEncodeError:
        problems = ["a text has a lone surrogate"]
    except ValidationError as error:
        problems = [
            f"{'.'.join(shown(part) for part in problem['loc']) or 'the file'}: found "
            f"{quoted(problem['input'])}: {shown(problem['msg'], 300)}"
            for problem in error.errors()
        ]
    told = f" {problems[0]}" if len(problems) == 1 else f"\n{listing(problems, limit=5)}"
    raise OutlierMergeError(f"{what_if_not}:{told}")


def read_merged(file: Path) -> MergedSpec:
    """Read from a model's manifest how it was merged.

    Raises:
        OutlierMergeError: the file is not a manifest.
    """
    content = load(file, max_bytes=MAX_MANIFEST_BYTES, max_values=MAX_MANIFEST_VALUES)
    return _parse(ManifestFile, content, f"{file}: is not a manifest").spec


def read_record(file: Path) -> RecordFile:
    """Read a record.

    Raises:
        OutlierMergeError: the file does not have this format.
    """
    return _parse(RecordFile, load(file), f"{file}: {_NOT_OURS}")


def read_scores(file: Path) -> ScoresFile:
    """Read a scores.json.

    Raises:
        OutlierMergeError: the file does not have this format.
    """
    return _parse(ScoresFile, load(file), f"{file}: {_NOT_OURS}")


def load(file: Path, *, max_bytes: int = MAX_LARGE_BYTES, max_values: int = _MAX_VALUES) -> Any:
    """Return the value of a JSON file.

    Raises:
        OutlierMergeError: the file is absent, not a regular file, too large, or not JSON.
    """
    data = read_bytes(file, max_bytes=max_bytes)
    if data is None:
        raise OutlierMergeError(f"{file}: no such file. `outliermerge eval` writes it.")
    try:
        return parse_json(data, infinite=False, max_values=max_values)
    except ValueError as error:
        raise OutlierMergeError(f"{file}: {error}") from error


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents for a file, with a checksum of them.

    The checksum shows changes by accident or by hand. It does not protect against forgery, because
    anybody can compute it.
    """
    return {**content, "checksum": _digest(_plain(content))}


def check_seal(file: Path, content: RecordFile | ScoresFile) -> None:
    """Raise OutlierMergeError if a file, or the answers beside a record, changed since written."""
    held = content.model_dump(exclude_unset=True, exclude={"checksum"})
    # Records of earlier versions do not name their answers; their checksum is of the result alone.
    is_earlier = isinstance(content, RecordFile) and "answers" not in held
    found = _digest(held["result"] if is_earlier else _plain(held))
    if content.checksum not in (None, found):
        raise _changed(file)
    if held.get("answers") is not None:
        answers = file.with_suffix(".jsonl")
        if digest_of(answers) not in (None, held["answers"]):
            raise _changed(answers)


def _changed(file: Path) -> OutlierMergeError:
    return OutlierMergeError(
        f"{file}: was changed since `outliermerge eval` wrote it (its checksum is another): the "
        "scores are not those that eval wrote. Restore it, or evaluate again: what was not "
        "changed is kept."
    )


def _digest(content: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _plain(value: object) -> object:
    """Return a value with whole numbers as integers, since programs write 50.0 as 50."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def digest_of(file: Path, on_progress: Callable[[int], None] = lambda n: None) -> str | None:
    """Return the checksum of a file's bytes, or None if there is no file.

    Args:
        on_progress: called with the bytes just read.

    Raises:
        OutlierMergeError: it is not a regular file.
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        with open_file(file) as answers:
            while block := answers.read(_BLOCK_BYTES):
                digest.update(block)
                on_progress(len(block))
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, by `write_whole`."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # File names may have bytes that are not valid text: JSON stores them like "\udcff".
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def check_place(path: Path) -> None:
    """Raise OutlierMergeError if a path for a file is taken by something that is not a file."""
    try:
        path.resolve()
    except (OSError, RuntimeError) as error:
        raise OutlierMergeError(f"{path}: is a link to itself. Take it away.") from error
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise OutlierMergeError(f"{path}: is {what}, where a file is to be written. Move it away.")
